"""Gradients of an editor's loss by layer and token class."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from kedit_lightning.data.prompts import ContextTemplates
from kedit_lightning.editors import Editor
from kedit_lightning.edits import Edit, Site, Token
from kedit_lightning.errors import KeditError
from kedit_lightning.lines import Record
from kedit_lightning.models import LanguageModel, collate
from kedit_lightning.probes import Finding, GradientSaliency
from kedit_lightning.probes.gradients import Gradients, pooled
from kedit_lightning.probes.token_classes import CLASSES, classes_of
from tests.editors.fitting import VALUES, bits, end_at, make, same, trainer, untouched
from tests.families import EDITS, FAMILY_CONFIGS, tiny_base
from tests.test_trainer import data

FAMILIES = tuple(FAMILY_CONFIGS)
PAIRS = [
    (editor or VALUES[i % len(VALUES)], family or FAMILIES[i % len(FAMILIES)])
    for i, (editor, family) in enumerate(zip_longest(VALUES, FAMILIES))
]
"""Every editor and every family at least once."""


NAMED = ("edit_layer", "stage", "layer", "token", "edits")


def looked(folder: Path, editor: Editor, edits: Sequence[Edit], **settings: Any) -> list[Finding]:
    return trainer(folder).probe(editor, data(edits), GradientSaliency(**settings))


def at(rows: Sequence[Record], layer: int, token: str, stage: str = "v") -> Record:
    (row,) = (row for row in rows if (row["layer"], row["token"], row["stage"]) == (layer, token, stage))
    return row


def by_differences(base: LanguageModel, edit: Edit, added: dict[Site, Tensor], layer: int) -> dict[str, float]:
    """The norm of the gradient of the bare prompt's NLL at a block's output, a class the mean over its tokens."""
    start = edit.prompt.index("{}")
    row, step = base.encode(edit.text, edit.target_new, (start, start + len(edit.subject))), 1e-4
    directions = step * torch.eye(32, dtype=torch.float64)
    rows = collate([row] * 64)
    line, position = torch.nonzero(rows.labels >= 0, as_tuple=True)

    def loss(where: int) -> Tensor:
        shift = torch.cat([directions, -directions])
        contexts = [base.add(site, rows.at[Token.SUBJECT_LAST], delta.expand(64, -1)) for site, delta in added.items()]
        contexts.append(base.add(Site(layer, "block"), torch.full((64,), where), shift))
        for context in contexts:
            context.__enter__()
        try:
            log_p = base.logits(rows, (line, position)).log_softmax(-1)
        finally:
            for context in contexts:
                context.__exit__(None, None, None)
        nll = -log_p.gather(1, rows.labels[line, position][:, None])[:, 0]
        return torch.zeros(64, dtype=torch.float64).index_add(0, line, nll) / len(row.targets)

    norms: dict[str, list[float]] = {}
    for i, token in enumerate(classes_of(base, edit)):
        there, back = loss(i).split(32)
        norms.setdefault(token, []).append(float(((there - back) / (2 * step)).norm()))
    return {token: sum(values) / len(values) for token, values in norms.items()}


def test_it_is_what_finite_differences_say_at_every_step(tmp_path: Path) -> None:
    base, edit = tiny_base("gpt2"), EDITS[0]
    base.model.double()
    first = make("ROME", base, v_num_grad_steps=2)
    looked(tmp_path, first, [edit], epochs=[1])
    delta = first.deltas[0].delta.detach().double()
    assert float(delta.norm()) > 0
    one, two = looked(tmp_path, make("ROME", base, v_num_grad_steps=3), [edit], epochs=[1, 2])
    assert {row["layer"] for row in one.rows} == {1, 2, 3}
    for layer in (1, 2, 3):
        begun = by_differences(base, edit, {}, layer)
        moved = by_differences(base, edit, {Site(1, "mlp"): delta}, layer)
        for token, value in begun.items():
            if (layer, token) == (3, "lr"):
                continue
            assert at(one.rows, layer, token)["gradient"] == pytest.approx(value, rel=1e-5, abs=1e-9)
            assert at(two.rows, layer, token)["gradient"] == pytest.approx(
                (value + moved[token]) / 2, rel=1e-5, abs=1e-9
            )
    assert not any(row["edits"] for row in one.rows if (row["layer"], row["token"]) == (3, "lr"))


def test_the_loss_being_a_mean_over_prompts_is_undone(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    found = [
        looked(
            tmp_path,
            make("ROME", base, v_num_grad_steps=2, context_templates=ContextTemplates(templates=[templates])),
            EDITS[:2],
            epochs=[1],
            prompts=prompts,
        )[0].rows
        for templates, prompts in ((["{}"], "bare"), (["{}", "{}"], "bare"), (["{}", "{}"], "all"))
    ]
    for row, other, third in zip(*found, strict=True):
        assert row["gradient"] == pytest.approx(other["gradient"], rel=1e-4, abs=1e-7, nan_ok=True)
        assert row["gradient"] == pytest.approx(third["gradient"], rel=1e-4, abs=1e-7, nan_ok=True)
    longer = make("ROME", base, v_num_grad_steps=2, context_templates=ContextTemplates(templates=[["{}", "Yes. {}"]]))
    other = looked(tmp_path, longer, EDITS[:2], epochs=[1], prompts="all")[0].rows
    assert at(other, 1, "ls")["gradient"] != pytest.approx(at(found[0], 1, "ls")["gradient"], rel=1e-3)


def test_classes_stand_where_each_row_has_its_subject() -> None:
    base = LanguageModel("almanac")
    edit = Edit("The mother tongue of {} is", "Robert Fasazar", "Ulm", case_id=0)
    bare = Edit("{} was born in", "Robert Fasazar", "Ulm", case_id=1)
    templates = ContextTemplates(templates=[["{}", "Yes. {}"]])
    editor = make("ROME", base, v_num_grad_steps=1, context_templates=templates)
    editor.prepare_rows()
    editor.begin([edit, bare])
    editor.take_up(editor.parts[0])
    rows = editor.batch.rows
    assert base.encode("Robert").ids != base.encode("Yes. Robert").ids[-len(base.encode("Robert").ids) :]
    gradients = Gradients(editor, [edit, bare], 1, "all")
    asks = (rows.labels >= 0).any(dim=1).nonzero()[:, 0].tolist()
    seen: list[Tensor] = []

    def kept(norms: Tensor, kinds: Tensor) -> Tensor:
        seen.append(kinds)
        return pooled(norms, kinds)

    with patch("kedit_lightning.probes.gradients.pooled", kept), patch.object(gradients, "_add"):
        gradients.watch(rows)(0, torch.ones(len(rows), rows.input_ids.shape[1]))
    names = list(CLASSES)
    for line, row in enumerate(asks):
        first, last, end = (
            int(rows.at[token][row]) for token in (Token.SUBJECT_FIRST, Token.SUBJECT_LAST, Token.PROMPT_LAST)
        )
        assert (seen[0][line] == names.index("fs")).nonzero()[:, 0].tolist() == [first]
        assert (seen[0][line] == names.index("ls")).nonzero()[:, 0].tolist() == [last]
        assert (seen[0][line] == names.index("lr")).nonzero()[:, 0].tolist() == [end]
        assert (seen[0][line, :first] == -1).all() or rows.owner[row] == 0, "a template has no class"


def test_in_parts_as_together_and_each_edit_with_the_steps_that_it_took(tmp_path: Path) -> None:
    base, found = tiny_base("gpt2"), []
    for settings in ({}, {"max_tokens": 1}):
        editor = make("ROME", base, **settings)
        end_at(editor, {edit.case_id: n for edit, n in zip(EDITS[:3], (1, 3, 6), strict=True)})
        found.append(looked(tmp_path, editor, EDITS[:3], epochs=[1, 5], seed=1))
    for together, parts in zip(*found, strict=True):
        assert together.notes == parts.notes
        assert together.notes["edits_used"] == 2
        for row, other in zip(together.rows, parts.rows, strict=True):
            assert [row[name] for name in NAMED] == [other[name] for name in NAMED]
            for name in ("gradient", "ci95"):
                assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6, nan_ok=True)
    assert at(found[0][0].rows, 1, "ls")["edits"] == 2


def check(folder: Path, name: str, family: str) -> None:
    base = tiny_base(family)
    before, editor = bits(base), make(name, base)
    (finding,) = looked(folder, editor, EDITS[:2], epochs=[3])
    assert same(base, before)
    assert untouched(base)
    rows, stages = finding.rows, {row["stage"] for row in finding.rows}
    assert len(rows) == sum(len({row["layer"] for row in rows if row["stage"] == stage}) for stage in stages) * 7
    assert [row["token"] for row in rows[:7]] == list(CLASSES)
    (value,) = stages - {"h_r"}
    assert min(row["layer"] for row in rows if row["stage"] == value) == 1
    last_subject = at(rows, 1, "ls", value)
    assert last_subject["edits"] == 2
    assert last_subject["gradient"] > 0
    assert all(row["gradient"] >= 0 for row in rows if row["edits"])
    if name == "TOP":
        assert {row["layer"] for row in rows if row["stage"] == "h_r"} == {2, 3}
        assert {row["layer"] for row in rows if row["stage"] == value} == {1, 2}


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_editors_and_families(name: str, family: str, tmp_path: Path) -> None:
    check(tmp_path, name, family)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", VALUES)
def test_every_editor_on_every_family(name: str, family: str, tmp_path: Path) -> None:
    check(tmp_path, name, family)


def test_what_has_no_gradient_is_refused(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    with pytest.raises(KeditError, match="optimises a value, got FT"):
        looked(tmp_path, make("FT", base), EDITS[:1])
    with pytest.raises(KeditError, match="none among 2"):
        looked(tmp_path, make("ROME", base, stop=1e9), EDITS[:2])
    with pytest.raises(KeditError, match="epochs"):
        GradientSaliency(epochs=[5, 1])
    with pytest.raises(KeditError, match="edits: expected at least 1"):
        GradientSaliency(edits=0)
