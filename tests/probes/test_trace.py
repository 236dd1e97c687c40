"""Causal tracing: a planted cell is found, every shortcut gives what whole runs give, and what cannot be traced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.causal_trace import cell_by_cell
from kedit_lightning.edits import Edit, Site
from kedit_lightning.errors import KeditError
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.restoring import Cell, CorruptedRun
from kedit_lightning.probes import CausalTrace, Finding, Study
from kedit_lightning.probes.token_classes import classes_of
from kedit_lightning.probes.tracing import Asked, Kind, Tracer, answered, cells_of, noise_level, noise_on, prompt_of
from tests.commandline import World, kedit
from tests.families import EDITS, WIDTH, tiny_base
from tests.families import tokenizer as make_tokenizer

KINDS: list[Kind] = [("block", 1), ("mlp", 1), ("mlp", 3), ("attn", 1), ("attn", 10)]
SUBJECTS = sorted({edit.subject for edit in EDITS})
LAYER, KEY, ATTRIBUTE, ANSWER, OTHER = 1, 0, 24, 25, 26


def planted() -> tuple[LanguageModel, list[Edit]]:
    """A model whose MLP of layer 1 knows the subject's last token, and whose attention of layer 2 tells the answer.

    Tokens are in the first 24 coordinates, what the MLP recalls in the next, what the attention copies it to behind.
    The other MLPs write into coordinates that nothing reads.
    """
    words = make_tokenizer("byte_bpe")
    torch.manual_seed(0)
    sizes = {"n_layer": 4, "n_embd": 32, "n_head": 1, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(words), tie_word_embeddings=False, **sizes)).eval()
    base = LanguageModel.wrap(model, words)
    answer = next(i for i in range(300, len(words)) if words.decode([i]).strip().isalpha())
    edit = Edit("The tongue of {} is", "Velora Quint", "x", words.decode([answer]).strip(), case_id=7)
    row = prompt_of(base, edit)
    last = max(i for i, name in enumerate(classes_of(base, edit)) if name == "ls")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "ln_" not in name:
                weight.zero_()
        model.transformer.wte.weight[:, :24] = torch.nn.functional.normalize(torch.randn(len(words), 24), dim=1)
        key = model.transformer.wte.weight[row.ids[last]]
        for layer in (0, 2, 3):
            model.transformer.h[layer].mlp.c_fc.weight.normal_()
            model.transformer.h[layer].mlp.c_proj.weight[:, 28:].normal_(std=0.01)
        mlp, attn = model.transformer.h[LAYER].mlp, model.transformer.h[LAYER + 1].attn
        mlp.c_fc.weight[:, KEY], mlp.c_fc.bias[KEY] = 4 * key, -16.0
        mlp.c_proj.weight[KEY, ATTRIBUTE] = 4.0
        attn.c_attn.weight[ATTRIBUTE, 64 + ANSWER] = 10.0
        attn.c_proj.weight[ANSWER, ANSWER] = len(row.ids)  # it is a mean over the tokens that is copied
        attn.c_proj.bias[OTHER] = 40.0  # what is said where nothing is recalled
        model.lm_head.weight[answer, ANSWER] = model.lm_head.weight[answer - 1, OTHER] = 4.0
    return base, [edit]


class Unedited:
    """Edits side by side of which none changes anything."""

    def __init__(self) -> None:
        self.inside = False

    @contextmanager
    def ready(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def blocks(self, edits: Sequence[Edit]) -> Iterator[tuple[Sequence[Edit], list[int]]]:
        assert self.inside
        yield edits, [-1] * len(edits)


def study_of(base: LanguageModel, edits: Sequence[Edit]) -> Study:
    return Study(cast("Any", SimpleNamespace(base=base)), edits, cast("Any", Unedited()), SUBJECTS)


def look(probe: CausalTrace, base: LanguageModel, edits: Sequence[Edit]) -> dict[str, Finding]:
    return {finding.name: finding for finding in probe.look(study_of(base, edits))}


def test_the_planted_cell_is_found() -> None:
    """Alone among the MLPs, and no attention but that which copies it to the last token."""
    base, edits = planted()
    found = look(CausalTrace(windows=[1, 3]), base, edits)
    assert list(found) == [
        *("causal_trace_subject", "causal_trace_subject_case_7"),
        *("causal_trace_relation", "causal_trace_relation_case_7"),
    ]
    notes = found["causal_trace_subject"].notes
    gap = notes["clean"]["mean"] - notes["corrupted"]["mean"]
    assert gap > 0.3
    assert (notes["used"], notes["unanswered"], notes["classes_absent"]) == (1, 0, ["ms", "fr", "mr"])

    def effects(name: str, part: str, window: int) -> dict[tuple[str, int], float]:
        rows = found[name].rows
        return {
            (row["class"], row["layer"]): row["effect"]
            for row in rows
            if (row["part"], row["window"]) == (part, window) and abs(row["effect"]) > 0.02 * gap
        }

    subject = "causal_trace_subject_case_7"
    (cell, effect), *others = effects(subject, "mlp", 1).items()
    assert (cell, others) == (("ls", LAYER), [])
    assert effect > 0.7 * gap
    assert set(effects(subject, "mlp", 3)) == {("ls", layer) for layer in (0, 1, 2)}
    assert set(effects(subject, "attn", 1)) == {("lr", LAYER + 1)}
    states = {*(("ls", layer) for layer in range(LAYER + 1)), *(("lr", layer) for layer in range(LAYER + 1, 4))}
    assert set(effects(subject, "block", 1)) == states
    assert not effects("causal_trace_relation_case_7", "mlp", 3), "the relation's tokens recall nothing"
    mean = [row for row in found["causal_trace_subject"].rows if (row["part"], row["window"]) == ("mlp", 1)]
    best = max(mean, key=lambda row: float(row["mean"]))
    assert (best["token"], best["layer"], best["edits"]) == ("ls", LAYER, 1)
    assert all(finding.figure is not None for finding in found.values())


@pytest.mark.parametrize("family", ["gpt2", "gptj", "mistral", "gemma2"])
def test_batched_is_cell_by_cell(family: str) -> None:
    """Positions, layers and windows; padded together and one at a time."""
    base, edit = tiny_base(family), EDITS[1]
    row, classes = prompt_of(base, edit), classes_of(base, edit)
    noise = noise_on([name in ("fs", "ms", "ls") for name in classes], 3, WIDTH, noise_level(base, SUBJECTS, 3))
    cells = [cell for kind in KINDS for cell in cells_of(kind, len(row.ids), base.num_layers)]
    run = CorruptedRun(base, row, noise, ["block", "mlp", "attn"])
    found = run.scores(cells)
    high, low, expected = cell_by_cell(base, row, noise, cells)
    assert (run.high, run.low) == (pytest.approx(high, abs=1e-6), pytest.approx(low, abs=1e-6))
    assert (expected - low).abs().max() > 1e-3
    assert torch.allclose(found, expected, atol=1e-5, rtol=0)
    some = range(0, len(cells), 7)
    alone = torch.cat([run.scores([cells[i]]) for i in some])
    assert torch.allclose(found[list(some)], alone, atol=1e-6, rtol=0)


def test_what_cannot_matter_is_not_run() -> None:
    base = tiny_base("gpt2")
    row = prompt_of(base, EDITS[0])
    t, top = len(row.ids), base.num_layers - 1
    noise = noise_on([i == 2 for i in range(t)], 2, WIDTH, 0.5)
    run = CorruptedRun(base, row, noise, ["block", "mlp", "attn"])
    run._restored = cast("Any", None)  # what would run cannot
    nothing = [Cell(1, "mlp", 0, top), Cell(2, "mlp", top, top), Cell(2, "block", top, top)]
    assert run.scores(nothing).tolist() == [run.low] * 3
    assert run.scores([Cell(t - 1, "block", top, top)]).tolist() == [run.high]
    with pytest.raises(TypeError):
        run.scores([Cell(2, "mlp", 0, 0)])


def edited_weights(base: LanguageModel, left: Tensor, right: Tensor) -> None:
    weight = base.model.get_parameter(base.name(Site(1)))
    with torch.no_grad():
        weight += right @ left.T  # GPT-2 keeps (in, out)


def test_side_by_side_is_the_edited_model() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(WIDTH, 1, generator=generator), torch.randn(128, 1, generator=generator) / 8
    base, other = tiny_base("gpt2"), tiny_base("gpt2")
    plain = Tracer(base, 0.5, 3, KINDS)(Asked(EDITS[0]), "subject")
    base.side_by_side.write(1, base.name(Site(1)), left, right)
    edited_weights(other, left, right)
    for corrupt in ("subject", "relation"):
        one, two = (
            Tracer(base, 0.5, 3, KINDS)(Asked(EDITS[0], 1), corrupt),
            Tracer(other, 0.5, 3, KINDS)(Asked(EDITS[0]), corrupt),
        )
        assert one is not None
        assert two is not None
        assert (one.high, one.low) == (pytest.approx(two.high, abs=1e-5), pytest.approx(two.low, abs=1e-5))
        assert all(torch.allclose(one.effects[kind], two.effects[kind], atol=1e-5, rtol=0) for kind in KINDS)
        assert one.answer == two.answer
    unseen = Tracer(base, 0.5, 3, KINDS)(Asked(EDITS[0]), "subject")
    assert plain is not None
    assert unseen is not None
    assert torch.equal(plain.effects["mlp", 1], unseen.effects["mlp", 1])
    assert (plain.high, plain.answer) != (one.high, one.answer)


def test_noise_is_romes() -> None:
    """numpy's generator, drawn for each span from the left; its level from the subjects' tokens."""
    found = noise_on([True, True, False, True], 2, 3, 0.5)
    generator = np.random.RandomState(1)
    first, second = generator.randn(2, 2, 3), generator.randn(2, 1, 3)
    expected = np.concatenate([first, np.zeros((2, 1, 3)), second], axis=1)
    assert torch.allclose(found.double(), 0.5 * torch.from_numpy(expected), atol=1e-6)
    base = tiny_base("llama")
    ids = [token for subject in SUBJECTS for token in base.tokenizer.encode(subject, add_special_tokens=False)]
    assert len(set(ids)) < len(ids), "a token counts as often as it occurs"
    assert noise_level(base, SUBJECTS, 3) == pytest.approx(3 * float(base.model.model.embed_tokens.weight[ids].std()))


def test_a_start_token_is_never_corrupted() -> None:
    base = tiny_base("llama")
    trace = Tracer(base, 0.5, 2, [("mlp", 1)])(Asked(EDITS[1]), "relation")
    assert trace is not None
    stars = [token.endswith("*") for token in trace.tokens]
    assert stars == [name in ("rp", "fr", "mr", "lr") for name in trace.classes]
    assert (trace.classes[0], stars[0]) == ("", False)


def test_answers_are_whole() -> None:
    base, (edit,) = planted()
    first = Edit(edit.prompt, edit.subject, "x", f"{edit.target_true}x")
    yes, no = answered(base, [edit, first], "target_true")
    assert (yes and base.tokenizer.decode([yes.answer]).strip(), no) == (edit.target_true, None)
    found = look(CausalTrace(corrupt=["subject"], parts=["mlp"], cases=0), base, [edit, first])
    assert found["causal_trace_subject"].notes["unanswered"] == 1


def test_no_tokens_to_corrupt() -> None:
    base, (edit,) = planted()
    for prompt in ("{}", "The tongue of {} is"):  # whatever it answers, it is asked for that
        row = prompt_of(base, Edit(prompt, edit.subject, "x"))
        run = CorruptedRun(base, row, torch.zeros(1, len(row.ids), 32), ["mlp"])
        known = Edit(prompt, edit.subject, "x", base.tokenizer.decode([run.answer]).strip())
        probe = CausalTrace(corrupt=["relation"], parts=["mlp"], copies=2, cases=0)
        if prompt == "{}":
            with pytest.raises(KeditError, match="expected prompts with relation tokens to corrupt, got none"):
                look(probe, base, [known])
        else:
            assert look(probe, base, [known])


@pytest.mark.parametrize(
    "settings", [{"edits": 0}, {"copies": 0}, {"noise": 0.0}, {"windows": []}, {"windows": [0]}, {"parts": []}]
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(KeditError, match="expected"):
        CausalTrace(**settings)


def test_no_usable_prompt(tmp_path: Path) -> None:
    """A model that knows none of the facts: one line."""
    world = World(tmp_path)
    result = kedit("probe", "--config", world.config(), "--probe", "CausalTrace", "--probe.edits", 3)
    assert result.status == 1
    line = result.err.strip().splitlines()[-1]
    assert "no usable prompt: expected the model's next token to be the whole target_true" in line
    assert "Traceback" not in result.err
