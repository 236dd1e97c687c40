"""The contrast probe against what the model says itself, and against answers known beforehand."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.edits import Edit, Token
from kedit_lightning.errors import DataError, KeditError
from kedit_lightning.models import LanguageModel, collate
from kedit_lightning.probes import ContrastProbe, Study
from kedit_lightning.probes.contrast_figure import PLACES, means
from kedit_lightning.probes.lens import measured
from kedit_lightning.probes.word_sets import SETS, STOP, WordTokens, read_sets
from kedit_lightning.single_edits import SingleEdits
from kedit_lightning.trainer import EditTrainer
from tests.commandline import World, done, jsonl, kedit
from tests.editors.fitting import bits, fit, make, same, trainer
from tests.families import EDITS, tiny_base

KNOWN = [edit for edit in EDITS if edit.target_true]


def study(base: LanguageModel, edits: Sequence[Edit] = KNOWN) -> Study:
    return Study(make("ROME", base), edits, None, ())  # type: ignore[arg-type] # makes no edits


def rows(probe: ContrastProbe, of: Study) -> dict[str, dict[tuple[str, str, int], dict[str, Any]]]:
    with patch("kedit_lightning.probes.contrast.draw"):
        findings = list(probe.look(of))
    return {
        finding.name: {(row["model"], row["position"], row["layer"]): dict(row) for row in finding.rows}
        for finding in findings
    }


def answers(base: LanguageModel, edit: Edit) -> list[int]:
    return [base.encode(edit.text, answer).targets[0] for answer in (edit.target_true, edit.target_new)]


def places(base: LanguageModel, edit: Edit) -> tuple[Tensor, list[int]]:
    start = edit.prompt.index("{}")
    row = base.encode(edit.text, None, (start, start + len(edit.subject)))
    return torch.tensor([row.ids]), [row.positions[Token.SUBJECT_LAST], row.positions[Token.PROMPT_LAST]]


def expected(logits: Sequence[Tensor], tokens: Sequence[Sequence[int]]) -> dict[str, float]:
    """Means over prompts, from float64 logits, one by one."""
    found = []
    for line, pair in zip(logits, tokens, strict=True):
        p = line.double().softmax(dim=0)
        one = {"entropy": -float((p * p.log()).sum())}
        for name, token in zip(("original", "target"), pair, strict=True):
            one |= {f"{name}_probability": float(p[token]), f"{name}_rank": float((line > line[token]).sum())}
        found.append(one)
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


# ---------------------------------------------------------------------- against the model itself


def test_every_layer_is_what_the_models_head_makes_of_it(base: LanguageModel) -> None:
    """With the final norm the last layer is the model's own softmax; without it W h + b of what transformers gives."""
    found = rows(ContrastProbe(known=False), study(base))
    tokens = [answers(base, edit) for edit in KNOWN]
    head = base.model.get_output_embeddings()
    for place, name in enumerate(PLACES):
        own, raw = [], []
        for edit in KNOWN:
            ids, at = places(base, edit)
            with torch.no_grad():
                out = base.model(input_ids=ids, output_hidden_states=True)
                own.append(out.logits[0, at[place]])
                raw.append([head(hidden[0, at[place]]) for hidden in out.hidden_states[:-1]])
        for layer in range(base.num_layers):
            line = found["contrast"]["unedited", name, layer - 1]
            for key, value in expected([one[layer] for one in raw], tokens).items():
                assert line[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, layer - 1, key)
        line = found["contrast_final_norm"]["unedited", name, base.num_layers - 1]
        for key, value in expected(own, tokens).items():
            assert line[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, key)
        raw_line = found["contrast"]["unedited", name, base.num_layers - 1]
        assert abs(raw_line["entropy"] - line["entropy"]) > 1e-3, "the norm makes a difference"


def test_batches_and_padding_change_nothing(gpt2_base: LanguageModel) -> None:
    together = rows(ContrastProbe(known=False), study(gpt2_base))
    with (
        patch("kedit_lightning.probes.contrast.token_budget", lambda _: 1),
        patch("kedit_lightning.probes.contrast.LOGITS", 1),
    ):
        alone = rows(ContrastProbe(known=False), study(gpt2_base))
    for name, lines in together.items():
        for key, line in lines.items():
            for column, value in line.items():
                if isinstance(value, float):
                    assert alone[name][key][column] == pytest.approx(value, rel=1e-4, abs=1e-6)


# ---------------------------------------------------------------------- against what is known beforehand

FROM = 2


@pytest.fixture
def promoting() -> LanguageModel:
    """A GPT-2 whose blocks add nothing, but that of layer 2 the direction of the token of " Norvast".

    All other directions have length 1, and tokens beside the first 31 none in common with it.
    """
    base = tiny_base("gpt2")
    answer = answers(base, KNOWN[0])[0]
    with torch.no_grad():
        for name, parameter in base.model.named_parameters():
            if "c_proj" in name or "wpe" in name:
                parameter.zero_()
        wte = base.model.get_input_embeddings().weight
        wte.zero_()
        wte[torch.arange(len(wte)), torch.arange(len(wte)) % 31] = 1.0
        wte[answer] = 0.0
        wte[answer, 31] = 1.0
        base.layers[FROM].mlp.c_proj.bias[31] = 5.0
    return base


def test_a_planted_promotion_is_found_where_it_is(promoting: LanguageModel) -> None:
    base = promoting
    edit, (answer, target) = KNOWN[0], answers(promoting, KNOWN[0])
    n = base.model.config.vocab_size
    (found,) = rows(ContrastProbe(final_norm=False), study(base, [edit])).values()
    ids, at = places(base, edit)
    for place, name in enumerate(PLACES):
        direction = int(ids[0, at[place]]) % 31
        alike = sum(token % 31 == direction and token != answer for token in range(n))
        before = alike * math.e + n - alike
        for layer in range(-1, base.num_layers):
            line = found["unedited", name, layer]
            there = layer >= FROM
            weight, total = (math.exp(5), before - 1 + math.exp(5)) if there else (1.0, before)
            assert line["original_probability"] == pytest.approx(weight / total, rel=1e-5)
            assert line["original_rank"] == (0 if there else alike)
            assert line["target_rank"] == (int(there) + (alike if target % 31 != direction else 0))


def test_prompts_that_are_not_answered_as_expected_are_skipped_and_counted(promoting: LanguageModel) -> None:
    right, wrong, unknown = KNOWN[0], replace(KNOWN[1], target_true="Brundish"), EDITS[-1]
    findings = list(ContrastProbe().look(study(promoting, [wrong, unknown, right])))
    for finding in findings:
        assert finding.notes["prompts"] == 1
        assert finding.notes["skipped"] == {"without target_true": 1, "not answered as expected": 1}
        assert {row["original_n"] for row in finding.rows} == {1}
        assert finding.figure is not None
    released = next(ContrastProbe(preset="released").look(study(promoting, [wrong, unknown, right])))
    assert released.notes["prompts"] == 1, "what is known does not hang on which token is looked at"
    with pytest.raises(KeditError, match=r"^no usable prompt: expected the model's likeliest next token .* among 1 "):
        list(ContrastProbe().look(study(promoting, [wrong])))
    with pytest.raises(KeditError, match=r"^no usable prompt: expected an edit with target_true"):
        list(ContrastProbe().look(study(promoting, [unknown])))
    with pytest.raises(KeditError, match=r"^prompts: expected at least 1 or null, got 0$"):
        ContrastProbe(prompts=0)


def test_ranks_count_strictly_likelier_tokens_and_sets_are_summed() -> None:
    logits = torch.tensor([5.0, 1.0, 3.0, 1.0]).expand(1, 2, 3, 4)
    p = torch.tensor([5.0, 1.0, 3.0, 1.0]).softmax(dim=0)
    mask = torch.zeros(1, len(SETS), 4, dtype=torch.bool)
    mask[0, 0, [0, 1]] = True
    mask[0, 1, 2] = True
    found = measured(logits, torch.tensor([[1], [2]]), mask)
    assert {tuple(values.shape) for values in found.values()} == {(1, 2, 3)}
    at = {name: float(values[0, 1, 2]) for name, values in found.items()}
    assert (at["original_rank"], at["target_rank"]) == (2, 1)
    assert at["original_probability"] == pytest.approx(float(p[1]))
    assert (at["related_rank"], at["factual_rank"]) == ((0 + 2) / 2, 1)
    assert at["related_probability"] == pytest.approx(float(p[0] + p[1]))
    assert at["entropy"] == pytest.approx(-float((p * p.log()).sum()))
    assert all(math.isnan(at[f"{name}_{kind}"]) for name in SETS[2:] for kind in ("rank", "probability"))


def test_intervals_are_normal_and_leave_out_what_is_missing() -> None:
    values = torch.rand(20, 2, 3, generator=torch.Generator().manual_seed(0))
    values[3:5] = math.nan
    columns = {"target_probability": values, "target_rank": 7 * values}
    lines = means("unedited", columns, ["target"])
    assert [(row["position"], row["layer"]) for row in lines] == [(p, layer) for p in PLACES for layer in (-1, 0, 1)]
    seen = np.delete(values[:, 1, 2].double().numpy(), [3, 4])
    assert lines[-1]["target_n"] == 18
    assert lines[-1]["target_rank"] == pytest.approx(7 * seen.mean(), rel=1e-6)
    assert lines[-1]["target_rank_ci95"] == pytest.approx(1.96 * 7 * np.std(seen) / np.sqrt(18), rel=1e-6)


# ---------------------------------------------------------------------- after an edit


def test_each_prompt_sees_its_own_edit(tmp_path: Path, gpt2_base: LanguageModel) -> None:
    before, probe = bits(gpt2_base), ContrastProbe(known=False, edited=True, final_norm=True)
    some, editor, made = KNOWN[:3], make("ROME", gpt2_base), trainer(tmp_path / "probe")
    module = EditDataModule(edits=[edit.as_record() for edit in some])
    module.setup("fit")
    once = partial(super(EditTrainer, made).fit, editor, datamodule=module)
    (finding,) = probe.look(Study(editor, some, SingleEdits(made, editor, module, once), ()))
    assert same(gpt2_base, before)
    assert finding.notes["skipped"]["edit rejected"] == 0
    assert 0 <= finding.notes["edits whose target is likeliest"] <= len(some)

    one_by_one = []
    for edit in some:
        gpt2_base.restore()
        fit(make("ROME", gpt2_base), [edit], tmp_path / str(edit.case_id))
        one_by_one.append(probe._see(gpt2_base, [probe._question(gpt2_base, edit)], None).values[True])
    by_name = {name: torch.cat([one[name] for one in one_by_one]) for name in one_by_one[0]}
    lines = {(row["model"], row["position"], row["layer"]): row for row in finding.rows}
    changed = 0
    for row in means("edited", by_name, ("original", "target", "entropy")):
        line = lines["edited", row["position"], row["layer"]]
        unedited = lines["unedited", row["position"], row["layer"]]
        assert line["target_probability"] == pytest.approx(row["target_probability"], rel=1e-3, abs=1e-6)
        assert line["entropy"] == pytest.approx(row["entropy"], rel=1e-3)
        changed += abs(line["entropy"] - unedited["entropy"]) > 1e-3
        assert row["layer"] >= 1 or line["entropy"] == pytest.approx(unedited["entropy"], abs=1e-6)
    assert changed, "the edit of layer 1 is seen"


# ---------------------------------------------------------------------- tokens and word sets


def test_the_released_rule_tokenises_an_answer_alone() -> None:
    base = tiny_base("gpt2")
    paper, released = (ContrastProbe(preset=p)._question(base, KNOWN[0]) for p in ("paper", "released"))
    tokenizer = base.tokenizer
    assert paper.target == tokenizer(" Tessaro")["input_ids"][0]
    assert released.target == tokenizer("Tessaro")["input_ids"][0] != paper.target


def test_the_sets_of_a_case_as_tokens() -> None:
    first = {**dict.fromkeys(STOP, 6), "lamp": 3, "kite": 4, "the": 5, "lamps": 3}
    tokens = WordTokens({7: {"related": ["lamp", "lamps", "the"], "factual": ["kite"], "stop": ["the"]}}, first.get)
    mask = tokens.mask([7, 8], torch.tensor([9, 9]), 11)
    by_name = dict(zip(SETS, (line.nonzero()[:, 0].tolist() for line in mask[0]), strict=True))
    rest = [0, 1, 2, 6, 7, 8, 10]
    assert by_name == {"related": [3, 5], "factual": [4], "non_factual": [], "stop": [5], "unrelated": rest}
    assert not mask[1].any(), "a case without sets"
    without = WordTokens({7: {"related": ["lamp"]}}, first.get).mask([7], torch.tensor([9]), 11)
    assert without[0, SETS.index("stop")].nonzero()[:, 0].tolist() == [5, 6], "function words and punctuation"


def test_sets_are_drawn_beside_the_answer(tmp_path: Path, gpt2_base: LanguageModel) -> None:
    path = jsonl(tmp_path / "words.jsonl", [{"case_id": KNOWN[0].case_id, "related": ["harm", "valley"]}])
    probe = ContrastProbe(known=False, final_norm=True, words=str(path))
    contrast, sets = probe.look(study(gpt2_base))
    assert (contrast.name, sets.name) == ("contrast_final_norm", "word_sets_final_norm")
    assert sets.notes["skipped"]["without word sets"] == len(KNOWN) - 1
    assert {(row["original_n"], row["related_n"], row["factual_n"]) for row in sets.rows} == {(len(KNOWN), 1, 0)}
    logits = gpt2_base.logits(collate([gpt2_base.encode(KNOWN[0].text)]))[0, -1]
    tokens = [gpt2_base.tokenizer(f" {word}")["input_ids"][0] for word in ("harm", "valley")]
    assert sets.rows[-1]["related_probability"] == pytest.approx(float(logits.softmax(dim=0)[tokens].sum()), rel=1e-4)
    other = jsonl(tmp_path / "other.jsonl", [{"case_id": 99, "related": ["harm"]}])
    with pytest.raises(KeditError, match=r"^no usable prompt: expected an edit whose case id is in .*other\.jsonl"):
        list(ContrastProbe(known=False, words=str(other)).look(study(gpt2_base)))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"case_id": 0, "related": ["a"]', "line 2: expected one JSON object"),
        ('{"case_id": "0", "related": ["a"]}', "line 2: expected a whole number `case_id`, and lists of words"),
        ('{"case_id": 0, "related": "a"}', "line 2: expected a whole number `case_id`, and lists of words"),
        ('{"case_id": 0, "relatd": ["a"]}', "line 2: expected a whole number `case_id`, and lists of words"),
        ('{"case_id": 0, "related": [" "]}', "line 2: expected a whole number `case_id`, and lists of words"),
    ],
)
def test_word_sets_that_cannot_be_used(tmp_path: Path, line: str, said: str) -> None:
    path = jsonl(tmp_path / "words.jsonl", [{"case_id": 1, "stop": []}, line])
    with pytest.raises(DataError) as caught:
        read_sets(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- the command


def test_the_command_leaves_tables_and_figures(world: World) -> None:
    asked = ("probe", "--config", world.config(), "--probe", "ContrastProbe", "--trainer.name", "contrast")
    refused = kedit(*asked)
    assert refused.status == 1
    assert "no usable prompt: expected the model's likeliest next token" in refused.err
    assert not list((world.logs / "contrast").glob("version_*")), "nothing was found, nothing is left"
    done(*asked, "--probe.known", "no", "--probe.final_norm", "no", "--probe.edited", "true")
    run = max((world.logs / "contrast").glob("version_*"))
    lines = list(csv.DictReader((run / "contrast.csv").open()))
    assert len(lines) == 2 * 2 * 5, "models, positions, layers with the embedding"
    assert (run / "contrast.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((run / "contrast.json").read_text())["prompts"] == 4
    assert not list(run.glob("*final_norm*"))
