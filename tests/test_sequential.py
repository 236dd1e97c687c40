"""Sequences of edits: checkpoints, rejected edits, and what a commit costs."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kedit_lightning.callbacks import EditCallback
from kedit_lightning.callbacks.sequence import SequenceCurve, curve
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.delta import WeightDelta
from kedit_lightning.editors import Editor
from kedit_lightning.errors import KeditError, RejectedError
from kedit_lightning.metrics import Evaluation, Evaluator, Scorer
from kedit_lightning.trainer import EditTrainer
from tests.editors.fitting import bits, make, same
from tests.families import EDITS, tiny_base

FIVE = EDITS[:5]


def trainer(folder: Path, *callbacks: EditCallback, **settings: Any) -> EditTrainer:
    """A trainer that measures without writing texts, and neither shows nor draws."""
    settings = {"evaluation": Evaluation(generation=False), **settings}
    made = EditTrainer(save_dir=str(folder), accelerator="cpu", enable_progress_bar=False, **settings)
    made.callbacks = [made.weight_update, *callbacks]
    return made


def data(n: int = 5, **settings: Any) -> EditDataModule:
    return EditDataModule(edits=[edit.as_record() for edit in EDITS[:n]], **settings)


class Heard(EditCallback):
    """Keeps what it is told, with the bits of the weights at that time."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, list[int]]] = []
        self.checkpoints: list[dict[str, Any]] = []

    def on_edits_committed(self, trainer: Any, editor: Editor, records: Sequence[dict[str, Any]]) -> None:
        self.heard.append(("committed", [record["case_id"] for record in records]))

    def on_edits_rejected(self, trainer: Any, editor: Editor, records: Sequence[dict[str, Any]]) -> None:
        self.heard.append(("rejected", [record["case_id"] for record in records]))

    def on_checkpoint(self, trainer: Any, editor: Editor, record: dict[str, Any]) -> None:
        lines = (trainer.run.path / "checkpoints.jsonl").read_text() if self.checkpoints else ""
        assert lines.count("\n") == len(self.checkpoints), "told before it is kept, and the last one is kept"
        record["mine"] = record["edits"]
        self.checkpoints.append(record)


# ---------------------------------------------------------------------- checkpoints


def test_checkpoints_score_all_facts_so_far_and_the_latest(tmp_path: Path) -> None:
    heard, base = Heard(), tiny_base("gpt2")
    made = trainer(tmp_path, heard, SequenceCurve(), evaluate_at=[0, 1, 3, 4, 9])
    made.fit(make("ROME", base), datamodule=data(batch_size=2))
    lines = made.run.checkpoints.records()
    assert lines == json.loads(json.dumps(heard.checkpoints))
    assert [line["edits"] for line in lines] == [line["mine"] for line in lines] == [0, 2, 4]
    assert lines[0]["so_far"] == made.report["pre"]
    assert lines[0]["latest"] == {}
    assert lines[0]["so_far"]["locality"]["mean"] == 1, "the unedited model agrees with itself"
    assert [
        (line["so_far"]["efficacy_accuracy"]["n"], line["latest"]["efficacy_accuracy"]["n"]) for line in lines[1:]
    ] == [
        (2, 2),
        (4, 2),
    ]
    assert lines[1]["so_far"] == lines[1]["latest"]
    events = EventAccumulator(str(made.run.path))
    events.Reload()
    curve = events.Scalars("checkpoint/so_far/locality")
    assert [event.step for event in curve] == [0, 2, 4]
    assert [event.value for event in curve] == pytest.approx([line["so_far"]["locality"]["mean"] for line in lines])
    assert [event.step for event in events.Scalars("checkpoint/latest/efficacy_accuracy")] == [2, 4]
    rows = list(csv.DictReader((made.run.path / "curve.csv").open()))
    assert [row["edits"] for row in rows] == ["0", "2", "4"]
    assert float(rows[2]["so_far/locality"]) == pytest.approx(lines[2]["so_far"]["locality"]["mean"], abs=1e-6)
    assert (rows[0]["latest/locality"], rows[0]["so_far/locality"]) == ("", "1.0")
    assert (made.run.path / "curve.png").stat().st_size > 10_000
    assert made.report["protocol"]["eac"]["reliability"] == "efficacy_accuracy"


def test_a_score_that_no_edit_of_a_checkpoint_has_is_not_drawn() -> None:
    found, none = {"mean": 1.0, "n": 2}, {"n": 0, "skipped": 1}
    lines = [{"edits": n, "so_far": {"r_specificity": found}, "latest": {"r_specificity": none}} for n in (1, 2)]
    (line,) = curve("ROME", lines).axes[1].lines
    assert list(line.get_xdata()) == [1, 2], "of all facts so far; there is no latest"


def test_a_checkpoint_at_the_end_says_what_the_end_says(tmp_path: Path) -> None:
    made = trainer(tmp_path, evaluate_at=[5])
    made.fit(make("ROME", tiny_base("gpt2")), datamodule=data())
    (line,) = made.run.checkpoints.records()
    assert line["so_far"] == json.loads(json.dumps(made.report["post"]))


def test_locality_is_agreement_with_the_unedited_model_token_by_token(tmp_path: Path) -> None:
    base, edit = tiny_base("gpt2"), replace(EDITS[0], target_true="a tongue of the valley")
    made = trainer(tmp_path)
    evaluator = Evaluator(base, made.evaluation)
    (reference,) = evaluator.references([edit])
    prompts, answer = edit.neighborhood_prompts, edit.target_true
    assert prompts
    assert answer
    assert any(len(ids) > 1 for ids in reference.neighborhood)
    before = Scorer(base).likeliest([(prompt, answer) for prompt in prompts])
    made.fit(make("ROME", base, v_lr=5.0, clamp_norm_factor=50.0), datamodule=EditDataModule(edits=[edit.as_record()]))
    after = Scorer(base).likeliest([(prompt, answer) for prompt in prompts])
    shares = [
        sum(a == b for a, b in zip(*pair, strict=True)) / len(pair[0]) for pair in zip(before, after, strict=True)
    ]
    got = made.report["post"]["locality"]["mean"]
    assert got == pytest.approx(sum(shares) / len(shares))
    assert got < 1, "an edit of this strength changes something"
    ids = base.tokenizer(f"{prompts[0]} {answer}", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        predicted = base.model(input_ids=ids).logits.argmax(dim=-1)[0, -len(after[0]) - 1 : -1]
    assert predicted.tolist() == after[0]


@pytest.mark.parametrize(
    ("settings", "stream", "expected"),
    [
        ({"evaluate_at": [-1]}, {}, r"evaluate_at: expected numbers of edits from 0 on"),
        ({"evaluate_at": [1], "evaluate": False}, {}, "evaluate: true"),
        ({"evaluate_at": [1]}, {"restore_every": 1}, r"expected data\.restore_every null, got 1"),
    ],
)
def test_checkpoints_that_mean_nothing(
    settings: dict[str, Any], stream: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(KeditError, match=expected):
        trainer(tmp_path, **settings).fit(make("ROME", tiny_base("gpt2")), datamodule=data(**stream))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- rejected edits


def break_updates(editor: Editor, cases: set[int], value: float = math.nan) -> None:
    """Let every update of a batch with one of these cases hold NaN in one place."""
    write = editor.write

    def broken() -> Any:
        for delta in write():
            mine = [editor.edits[delta.edit]] if editor.side_by_side else editor.edits
            if cases & {edit.case_id for edit in mine}:
                update = delta.update.clone()
                update[-1, -1] = value
                yield WeightDelta(delta.name, dense=update, edit=delta.edit)
            else:
                yield delta

    editor.write = broken  # type: ignore[method-assign]


def reject(editor: Editor, cases: set[int]) -> None:
    """Let the value stage reject these cases, as a loss that is not finite does."""
    begin = editor.begin

    def rejecting(edits: Sequence[Any], pass_: int = 0) -> None:
        begin(edits, pass_)
        if found := {i: f"case {edit.case_id}: no" for i, edit in enumerate(edits) if edit.case_id in cases}:
            raise RejectedError(found)

    editor.begin = rejecting  # type: ignore[method-assign]


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_an_update_that_is_not_finite_leaves_the_weight_bytes_unchanged(value: float, tmp_path: Path) -> None:
    cases = [edit.case_id for edit in FIVE]
    base, heard = tiny_base("gpt2"), Heard()
    if value == 3e38:  # finite in float32, not in the type of the weights
        base.model.half()
    before, editor = bits(base), make("ROME", base, (1, 2))
    break_updates(editor, set(cases), value)
    made = trainer(tmp_path, heard)
    with pytest.raises(
        KeditError, match=r"nothing was committed, for all 5 edits were rejected \(the update of .* is not"
    ):
        made.fit(editor, datamodule=data())
    assert same(base, before)
    assert [line["commit"] for line in made.run.records()] == [None] * 5
    assert all("is not finite" in line["rejected"] for line in made.run.records())
    assert heard.heard == [("rejected", [case]) for case in cases]
    assert not list((made.run.path / "deltas").iterdir())


def test_a_rejected_edit_was_never_asked_for(tmp_path: Path) -> None:
    """The others of its batch are edited as if it had not been there, and the batches after it too."""
    bad = EDITS[1].case_id
    base, heard = tiny_base("gpt2"), Heard()
    editor = make("AlphaEdit", base)
    reject(editor, {bad})
    made = trainer(tmp_path / "rejecting", heard)
    made.fit(editor, datamodule=data(batch_size=2))
    other = tiny_base("gpt2")
    without = trainer(tmp_path / "without")
    expected = make("AlphaEdit", other)
    kept = [edit for edit in FIVE if edit.case_id != bad]
    module = EditDataModule(edits=[edit.as_record() for edit in kept], batch_size=2)
    module.setup("fit")
    module.groups = lambda: iter([[module.edits[:1], module.edits[1:3], module.edits[3:]]])  # type: ignore[method-assign]
    without.fit(expected, datamodule=module)
    assert same(base, bits(other))
    assert editor.remembered.keys() == expected.remembered.keys()
    assert all(torch.equal(gram, expected.remembered[name]) for name, gram in editor.remembered.items())
    lines = made.run.records()
    assert [line["case_id"] for line in lines] == [edit.case_id for edit in FIVE]
    assert [line["commit"] for line in lines] == [0, None, 1, 1, 2]
    assert lines[1]["rejected"] == f"case {bad}: no"
    assert lines[1]["after"]["efficacy_accuracy"] is not None, "it is measured like the others"
    assert heard.heard[:2] == [("rejected", [bad]), ("committed", [EDITS[0].case_id])]
    assert (made.report["edits"], made.report["rejected"]) == (5, 1)
    assert made.report["post"]["efficacy"]["n"] == made.report["pre"]["efficacy"]["n"]
    assert made.run.metadata()[0]["case_ids"] == [EDITS[0].case_id]


def test_a_stream_stops_at_a_rejection_if_asked(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    editor = make("ROME", base)
    break_updates(editor, {EDITS[2].case_id})
    made = trainer(tmp_path, on_rejected="stop")
    with pytest.raises(RejectedError, match="is not finite"):
        made.fit(editor, datamodule=data())
    lines = made.run.records()
    assert [line["case_id"] for line in lines] == [edit.case_id for edit in FIVE[:3]]
    assert "is not finite" in lines[2]["rejected"], "recorded with its reason"
    assert lines[2]["commit"] is None
    after = bits(base)
    base.restore()
    for _, deltas, _ in made.run.standing():
        for delta in deltas:
            base.write(delta.name, delta.update)
    assert same(base, after)


def test_a_group_of_which_all_edits_are_rejected_ends_with_the_unedited_model(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    before, editor = bits(base), make("ROME", base)
    break_updates(editor, {EDITS[2].case_id})
    made = trainer(tmp_path)
    made.fit(editor, datamodule=data(3, restore_every=1))
    assert made.run.standing() == []
    assert same(base, before)
    assert len(made.run.commits()) == 2


def test_the_token_budget_of_a_rejected_batch_is_not_kept(tmp_path: Path) -> None:
    """It would be lost by a kill before the next commit, which alone records it."""
    editor = make("MEMIT", tiny_base("gpt2"))
    first = {edit.case_id for edit in FIVE[:2]}
    logits = editor.base.logits

    def limited(batch: Any, *args: Any, **more: Any) -> Any:
        under_way = {edit.case_id for edit in getattr(editor, "edits", [])}
        if under_way and under_way <= first and batch.input_ids.numel() > 100:
            raise torch.OutOfMemoryError
        found = logits(batch, *args, **more)
        return found * math.nan if under_way and under_way <= first else found

    editor.base.logits = limited  # type: ignore[method-assign]
    made = trainer(tmp_path)
    made.fit(editor, datamodule=data(4, batch_size=2))
    lines = made.run.records()
    assert [line["commit"] for line in lines] == [None, None, 0, 0]
    assert made.run.last_metadata()["budget"] == made.run.read_json("run.json")["budget"]


# ---------------------------------------------------------------------- what a commit costs


class Trivial(EditCallback):
    """Counts what this process has read and written up to each commit."""

    def __init__(self) -> None:
        self.counters: list[tuple[int, int, int]] = []

    def on_edits_committed(self, trainer: Any, editor: Editor, records: Any) -> None:
        now = psutil.Process().io_counters()
        self.counters.append((now.write_chars, now.read_chars, now.read_count))


@pytest.mark.slow
def test_the_cost_of_a_commit_does_not_grow_with_the_number_of_edits(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    record = EDITS[0].as_record()
    edits = [{**record, "case_id": case} for case in range(1000)]
    counting = Trivial()
    made = trainer(tmp_path, counting, evaluate=False)
    editor = make("ROME", base, v_num_grad_steps=1)
    made.fit(editor, datamodule=EditDataModule(edits=edits))
    costs = torch.tensor(counting.counters).double().diff(dim=0)
    first, last = costs[10:110].median(dim=0).values, costs[-100:].median(dim=0).values
    assert len(costs) == 999
    assert (last <= 1.05 * first + 64).all(), (first, last)
