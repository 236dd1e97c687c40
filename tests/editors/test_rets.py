"""RETS: the relation's last token, and second moments that the prompts of a data set join."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kedit_lightning.data.bare_prompts import BarePrompts
from kedit_lightning.editors import RETS
from kedit_lightning.edits import Site, Token
from kedit_lightning.errors import KeditError
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.key_pass import KeyPass
from kedit_lightning.models.prompt_statistics import PromptStatistics
from kedit_lightning.models.statistics import Statistics
from tests.commandline import World, done, kedit, write
from tests.editors.fitting import TEMPLATES, fit, make
from tests.editors.test_rome import DECAY, KL, naive_loss
from tests.families import EDITS, corpus, tiny_base
from tests.test_bad_input import refused

SITE = Site(2, "mlp")
PROMPTS = [text.rsplit(" ", 1)[0] for text in corpus()[:160]]
"""They end in many words, so that the sum over them alone is regular."""


def key(base: LanguageModel, text: str) -> Tensor:
    """The key at a text's last token, the text on its own; float64."""
    found: list[Tensor] = []
    hook = base.linear(SITE).register_forward_pre_hook(lambda _, args: found.append(args[0][0, -1].double()))
    base.model(**base.tokenizer(text, return_tensors="pt"))
    hook.remove()
    return found[0]


def rets(base: LanguageModel, folder: Path, prompts: Sequence[str] = PROMPTS, **settings: Any) -> RETS:
    (folder / "texts.txt").write_text("\n".join(corpus()[:60]), encoding="utf-8")
    statistics = Statistics(
        str(folder / "texts.txt"), tokens="full", mom2_dtype="float64", batch_tokens=128, cache_dir=str(folder)
    )
    shared: dict[str, Any] = {"mom2_adjustment": True, "statistics": statistics, "subject_const": True}
    made = make("RETS", base, (2,), **(shared | {"constraint": BarePrompts(prompts=list(prompts))} | settings))
    assert isinstance(made, RETS)
    return made


# ---------------------------------------------------------------------- where


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_the_prompt_takes_the_subjects_part(family: str) -> None:
    """δ at the prompt's last token of every row, the KL in "{prompt} is a", at that token too."""
    base, edits = tiny_base(family), [EDITS[0], EDITS[1], EDITS[3]]
    editor = make("RETS", base, kl_factor=KL, v_weight_decay=DECAY)
    editor.prepare()
    editor.begin(edits)
    editor.take_up(editor.parts[0])
    assert isinstance(editor, RETS)
    rows, essence = editor.batch.rows, editor.batch.essence
    at = rows.at[editor.v.token]
    assert torch.equal(at[~essence], rows.at[Token.PROMPT_LAST][~essence])
    assert torch.equal(at[essence], rows.at[Token.PROMPT_LAST][editor.batch.bare])
    loss = editor.edit_loss(editor.v)
    with torch.no_grad():
        editor.v.delta.copy_(torch.randn(editor.v.delta.shape, generator=torch.Generator().manual_seed(0)))
    terms = loss().terms
    for i, edit in enumerate(edits):
        whole = replace(edit, prompt="{}", subject=edit.text)
        wanted = naive_loss(base, whole, editor.v.delta[i].detach(), editor.v.origin[i])
        assert {name: float(value[i]) for name, value in terms.items()} == pytest.approx(wanted, abs=2e-5)


def test_with_the_subject_itself_it_is_rome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RETS, "request", lambda _, edit: edit)
    updates = []
    for name in ("RETS", "ROME"):
        (delta,) = fit(make(name, tiny_base("gpt2")), EDITS[1:2], tmp_path / name).run.commits()[0][1]
        updates.append(delta.update)
    assert torch.equal(*updates)


def test_records_keep_prompt_and_subject(tmp_path: Path) -> None:
    (record,) = fit(make("RETS", tiny_base("gpt2")), EDITS[1:2], tmp_path).run.records()
    assert (record["prompt"], record["subject"]) == (EDITS[1].prompt, EDITS[1].subject)


def test_a_space_of_its_own_does_not_begin_the_target_before_delta(tmp_path: Path) -> None:
    """LLaMA 2's tokenizer, and the released preset."""
    editor = make("RETS", tiny_base("llama", kind="spm"), preset="released")
    fit(editor, EDITS[:1], tmp_path)
    first = (editor.batch.rows.labels >= 0).int().argmax(dim=1)
    prompts = ~editor.batch.essence
    assert torch.equal(first[prompts], editor.batch.rows.at[Token.SUBJECT_LAST][prompts])


# ---------------------------------------------------------------------- C′


def expected(base: LanguageModel, prompts: Sequence[str], origin: bool, const: bool, mean: bool) -> Tensor:
    """C′ from keys of single texts."""
    total = torch.zeros(base.weight(SITE).shape[1], dtype=torch.float64).diag()
    if origin:
        found: list[Tensor] = []
        hook = base.linear(SITE).register_forward_pre_hook(lambda _, args: found.append(args[0][0].double()))
        for text in corpus()[:60]:
            base.model(**base.tokenizer(text, return_tensors="pt"))
        hook.remove()
        seen = torch.cat(found)
        total = total + seen.T @ seen / len(seen)
    if const:
        seen = torch.stack([key(base, text) for text in prompts])
        total = total + seen.T @ seen / (len(prompts) if mean else 1)
    return total


@pytest.mark.parametrize("family", ["gpt2", "llama", pytest.param("gemma2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("origin", "const", "mean"),
    [(True, True, False), (True, True, True), (True, False, False), (False, True, False), (False, True, True)],
)
def test_keys_are_weighed_by_both_moments(family: str, origin: bool, const: bool, mean: bool, tmp_path: Path) -> None:
    """A prompt that occurs twice counts twice; batches, packed or padded, give what single texts give.

    Without C the length of C′ does not matter, and is that of the mean.
    """
    base, prompts = tiny_base(family), [*PROMPTS, PROMPTS[0]]
    moment = "mean" if mean else "sum"
    editor = rets(base, tmp_path, prompts, origin_mom=origin, subject_const=const, constraint_moment=moment)
    right = fit(editor, EDITS[:1], tmp_path).run.commits()[0][1][0].right
    base.restore()
    wanted = expected(base, prompts, origin, const, mean or not origin)
    found = editor.moments[SITE].mean.double()
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    star = torch.stack([key(base, EDITS[0].fill(text)) for text in TEMPLATES.templates[0]]).mean(dim=0)  # type: ignore[index]
    direction = torch.linalg.solve(wanted, star)
    assert right is not None
    assert abs(float(torch.cosine_similarity(right[:, 0].double(), direction, dim=0))) > 1 - 1e-4


def test_batches_are_solved_with_the_mean(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    editor = rets(base, tmp_path, constraint_moment="mean", solver="least_squares", mom2_update_weight=2.0)
    (delta,) = fit(editor, EDITS[:3], tmp_path, batch_size=3).run.commits()[0][1]
    base.restore()
    keys = editor.keys({SITE: editor.v.token})[SITE].mean.double()
    residual = (editor.v.value - editor.present({SITE: editor.v.token})[SITE]).double()
    system = 2.0 * expected(base, PROMPTS, True, True, True) + keys.T @ keys
    wanted = residual.T @ torch.linalg.solve(system, keys.T).T
    assert float((delta.update.double() - wanted).norm() / wanted.norm()) < 1e-4


def test_the_constraint_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = rets(tiny_base("gpt2"), tmp_path)
    first.prepare()
    monkeypatch.setattr(KeyPass, "run", lambda *_: pytest.fail("computed again"))
    again = rets(tiny_base("gpt2"), tmp_path, constraint_moment="mean")
    again.prepare()
    one, two = first.moments[SITE].mean, again.moments[SITE].mean
    assert not torch.allclose(one, two)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        rets(tiny_base("gpt2"), tmp_path, PROMPTS[:-1]).prepare()


def test_only_a_sample_converges(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of documents it is said how much more of them would change; the prompts are all there are."""
    prompts = [f"{i} {PROMPTS[0]}" for i in range(600)]
    editor = rets(tiny_base("gpt2"), tmp_path, prompts, constraint_moment="mean")
    for statistics, said in ((editor.statistics, True), (PromptStatistics.like(editor.statistics, prompts), False)):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            statistics.second_moments(editor.base, [SITE])
        assert ("held-out keys" in caplog.text) == said


def test_the_constraint_alone_reads_no_documents(tmp_path: Path) -> None:
    statistics = Statistics(str(tmp_path / "there is no such file.txt"), cache_dir=str(tmp_path))
    editor = rets(tiny_base("gpt2"), tmp_path, origin_mom=False, statistics=statistics)
    editor.prepare()
    assert editor.moments[SITE].count == len(PROMPTS)


def test_without_second_moment_nothing_is_weighed(tmp_path: Path) -> None:
    editor = rets(tiny_base("gpt2"), tmp_path, mom2_adjustment=False, constraint=None, origin_mom=False)
    editor.prepare()
    assert torch.equal(editor.moments[SITE].mean, torch.eye(128))


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"constraint": None}, "give `constraint` one"),
        ({"origin_mom": False, "subject_const": False}, "expected origin_mom or subject_const to be true"),
        ({"solver": "least_squares"}, "set constraint_moment to mean, or solver to constrained"),
        ({"statistics": None}, "give `statistics` a source"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(KeditError, match=words):
        rets(tiny_base("gpt2"), tmp_path, **settings)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [([], "expected at least one"), (["  "], "none of them empty"), (["a b " * 200], "the model reads 128")],
)
def test_prompts_that_cannot_be_used(prompts: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(KeditError, match=words):
        rets(tiny_base("gpt2"), tmp_path, prompts).prepare()


def test_too_few_prompts_alone_are_singular(tmp_path: Path) -> None:
    editor = rets(tiny_base("gpt2"), tmp_path, PROMPTS[:5], origin_mom=False)
    with pytest.raises(KeditError, match=r"is singular \(width 128, 5 tokens\)"):
        fit(editor, EDITS[:1], tmp_path)


def test_from_the_command_line(tmp_path: Path) -> None:
    """The constraint is a file; one that is not there, or is empty, is one line."""
    world = World(tmp_path)
    file = write(tmp_path / "known.json", json.dumps([edit.as_record() for edit in EDITS]))
    config = world.config("ROME", constraint={"dataset": "counterfact"}).read_text()
    rets_config = write(tmp_path / "rets.yaml", config.replace("class_path: ROME", "class_path: RETS"))
    args = ["fit", "--config", rets_config, "--trainer.evaluate=false"]
    key = "--model.init_args.constraint.path"
    done(*args, f"{key}={file}")
    refused(kedit(*args, f"{key}={tmp_path / 'nowhere.json'}"), 1, "nowhere.json")
    refused(kedit(*args, f"{key}={write(tmp_path / 'empty.json', '[]')}"), 1, "empty.json: the file is empty")
