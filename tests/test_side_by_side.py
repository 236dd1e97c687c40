"""Single edits side by side: the same as one by one, without a weight being touched."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml

from kedit_lightning.callbacks import EditCallback
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.delta import WeightDelta
from kedit_lightning.editors import Editor
from kedit_lightning.editors.compression import Compression
from kedit_lightning.errors import DataError
from kedit_lightning.metrics import Evaluation
from kedit_lightning.metrics.scorer import Scorer
from kedit_lightning.models import LanguageModel, collate
from kedit_lightning.models.generation import generate
from kedit_lightning.models.weights import EditableWeights
from kedit_lightning.run import Record
from kedit_lightning.trainer import EditTrainer
from tests.editors.fitting import VALUES, make
from tests.families import EDITS, FAMILIES, tiny_base
from tests.models.test_language_model import OTHERS


def fitted(
    editor: Editor, folder: Path, parallel_edits: int | None, *callbacks: EditCallback, generation: bool = False
) -> EditTrainer:
    """Single edits of all records, measured."""
    made = EditTrainer(
        save_dir=str(folder),
        evaluation=Evaluation(generation=generation, generation_length=30),
        enable_progress_bar=False,
        accelerator="cpu",
        callbacks=list(callbacks),
    )
    records = [edit.as_record() for edit in EDITS]
    module = EditDataModule(edits=records, batch_size=1, restore_every=1, parallel_edits=parallel_edits)
    made.fit(editor, datamodule=module)
    return made


def compare(one_by_one: EditTrainer, together: EditTrainer) -> None:
    """The same Δs, the same lines, the same scores."""
    pairs = list(zip(one_by_one.run.commits(), together.run.commits(), strict=True))
    assert len(pairs) == len(EDITS)
    for (number, wanted, about), (other, found, said) in pairs:
        assert (number, about["case_ids"], about["group"]) == (other, said["case_ids"], said["group"])
        assert [delta.name for delta in wanted] == [delta.name for delta in found]
        there, here = (torch.cat([delta.update.flatten() for delta in deltas]) for deltas in (wanted, found))
        assert (there - here).norm() <= 1e-5 * there.norm()
        assert there.norm() > 0
    for line, other in zip(one_by_one.run.records(), together.run.records(), strict=True):
        assert {k: line[k] for k in ("case_id", "commit", "group")} == {
            k: other[k] for k in ("case_id", "commit", "group")
        }
        assert [stage["steps"] for stage in line["stages"]] == [stage["steps"] for stage in other["stages"]]
        assert line["answer_after"] == other["answer_after"]
        assert line["after"] == pytest.approx(other["after"], abs=1e-5)
        for name in {"p_new", "p_true"} & line["after"].keys():
            assert math.log(line["after"][name]) == pytest.approx(math.log(other["after"][name]), abs=2e-5)
    post, others = one_by_one.report["post"], together.report["post"]
    assert post.keys() == others.keys()
    for name in post:
        assert post[name] == pytest.approx(others[name], abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("name", VALUES)
def test_equal_to_one_by_one(name: str, tmp_path: Path) -> None:
    """Over two layers, so that rows are read while the layer below is written for each edit alone."""
    made = []
    for parallel_edits in (1, None):
        base = tiny_base("gpt2")
        made.append((fitted(make(name, base, (0, 1)), tmp_path, parallel_edits), base))
    compare(made[0][0], made[1][0])
    for edited in made[0][1]._pristine:  # in the end both hold the last edit
        assert torch.allclose(made[0][1].weight(edited), made[1][1].weight(edited), atol=1e-5)
        assert not torch.equal(made[1][1].weight(edited), made[1][1].pristine(edited))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
def test_equal_to_one_by_one_in_every_family(family: str, tmp_path: Path) -> None:
    made = [fitted(make("MEMIT", tiny_base(family), (0, 1)), tmp_path, parallel) for parallel in (1, None)]
    compare(*made)


@pytest.mark.parametrize(
    "settings", [{"compress": Compression(gamma=50, v_num_grad_steps1=3, v_num_grad_steps2=3)}, {"max_tokens": 40}]
)
def test_equal_where_values_are_compressed_and_where_parts_are_small(settings: Record, tmp_path: Path) -> None:
    compare(*(fitted(make("ROME", tiny_base("gpt2"), **settings), tmp_path, parallel) for parallel in (1, 3)))


def test_texts_are_written_by_each_edit_alone(tmp_path: Path) -> None:
    made = [fitted(make("ROME", tiny_base("gpt2")), tmp_path, n, generation=True) for n in (1, None)]
    compare(*made)
    assert {"fluency", "efficacy_generated"} <= made[0].report["post"].keys()


def test_no_weight_is_touched_until_the_end(tmp_path: Path) -> None:
    """Only the last edit is written, once, when all is measured."""
    base, written = tiny_base("gpt2"), []
    write = EditableWeights.write

    def counting(self: EditableWeights, name: str, update: torch.Tensor) -> None:
        written.append(len(made.run.records()))
        write(self, name, update)

    class Made(EditCallback):
        def on_edits_evaluated(self, trainer: Any, editor: Editor, records: Any) -> None:
            assert not written

    made = EditTrainer(
        save_dir=str(tmp_path),
        evaluation=Evaluation(generation=False),
        enable_progress_bar=False,
        accelerator="cpu",
        callbacks=[Made()],
    )
    module = EditDataModule(edits=[edit.as_record() for edit in EDITS], batch_size=1, restore_every=1, parallel_edits=2)
    with patch.object(EditableWeights, "write", counting):
        made.fit(make("ROME", base), datamodule=module)
    assert written == [len(EDITS)]
    last = made.run.commits()[-1][1][0]
    assert torch.allclose(base.weight(last.name) - base.pristine(last.name), last.update, atol=1e-6)
    assert not base.side_by_side._updates


def test_an_edit_that_is_rejected_leaves_the_others(tmp_path: Path) -> None:
    """Whether its loss or its update is not finite."""
    editor, bad = make("MEMIT", tiny_base("gpt2")), EDITS[1].case_id
    write = editor.write

    def broken() -> Any:
        for delta in write():
            assert delta.edit is not None
            nan = editor.edits[delta.edit].case_id == bad
            yield replace(delta, left=delta.left * math.nan) if nan and delta.left is not None else delta

    editor.write = broken  # type: ignore[method-assign]
    made = fitted(editor, tmp_path, None)
    lines = made.run.records()
    assert [line["commit"] for line in lines] == [0, None, *range(1, len(EDITS) - 1)]
    assert "is not finite" in lines[1]["rejected"]
    assert [line["group"] for line in lines] == list(range(len(EDITS)))
    assert lines[1]["after"]["p_new"] == pytest.approx(lines[1]["before"]["p_new"], abs=1e-6)
    alone = fitted(make("MEMIT", tiny_base("gpt2")), tmp_path, 1)
    for line, other in zip(lines[2:], alone.run.records()[2:], strict=True):
        assert line["after"]["p_new"] == pytest.approx(other["after"]["p_new"], abs=1e-5)


class Watching(EditCallback):
    reads_weights = True


@pytest.mark.parametrize(
    ("name", "more", "why"),
    [
        ("FT", {}, "FT trains weights"),
        ("ROME", {"callbacks": [Watching()]}, "Watching looks at the edited weights"),
        ("ROME", {"on_rejected": "stop"}, "trainer.on_rejected is stop"),
        ("ROME", {}, None),
    ],
)
def test_where_edits_are_made_one_by_one(
    name: str, more: Record, why: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = EditTrainer(save_dir=str(tmp_path), evaluate=False, enable_progress_bar=False, accelerator="cpu", **more)
    records = [edit.as_record() for edit in EDITS[:3]]
    module = EditDataModule(edits=records, batch_size=1, restore_every=1, parallel_edits=2)
    made.fit(make(name, tiny_base("gpt2")), datamodule=module)
    assert made.run.read_json("run.json")["parallel_edits"] == (1 if why else 2)
    said = [record.message for record in caplog.records if "one by one" in record.message]
    assert said == ([f"warning: edits are made one by one, not 2 side by side: {why}"] if why else [])


@pytest.mark.parametrize("name", ["ROME", "MEMIT"])
def test_what_cannot_be_solved_for_rejects_its_edit_alone(name: str, tmp_path: Path) -> None:
    """As one by one: a key that is not finite."""
    bad = EDITS[2].case_id
    made = []
    for parallel_edits in (1, None):
        editor = make(name, tiny_base("gpt2"))
        keys = editor.keys

        def spoilt(*args: Any, editor: Editor = editor, keys: Any = keys, **more: Any) -> Any:
            found = keys(*args, **more)
            for i, edit in enumerate(editor.edits):
                if edit.case_id == bad:
                    for each in found.values():
                        each.mean[i] = math.nan
                        each.bare[i : i + 1] = math.nan
            return found

        editor.keys = spoilt  # type: ignore[method-assign]
        made.append(fitted(editor, tmp_path, parallel_edits).run.records())
    wanted = [0, 1, None, *range(2, len(EDITS) - 1)]
    assert [[line["commit"] for line in lines] for lines in made] == [wanted, wanted]
    assert "finite" in made[1][2]["rejected"]


def test_halved_until_memory_holds_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cpu")
    editor = make("ROME", tiny_base("gpt2"))
    with (
        patch.object(type(editor), "needs", lambda _, n: {device: (0, 10**7)}),
        patch("kedit_lightning.models.memory.free_memory", lambda _: 2 * (10**7 + editor.update_size(1))),
    ):
        made = fitted(editor, tmp_path, 5)
    assert made.run.read_json("run.json")["parallel_edits"] == 2
    assert [r.message for r in caplog.records if "side by side" in r.message] == [
        "5 edits side by side do not fit into memory: going on with 2."
    ]


@pytest.mark.parametrize(("batch_size", "restore_every"), [(1, None), (2, 2), (1, 5)])
def test_edits_that_a_model_holds_together_are_refused(batch_size: int, restore_every: int | None) -> None:
    with pytest.raises(DataError, match="parallel_edits: expected single edits"):
        EditDataModule(batch_size=batch_size, restore_every=restore_every, parallel_edits=8)
    EditDataModule(batch_size=batch_size, restore_every=restore_every, parallel_edits=1)


def test_half_precision_says_that_no_weight_was_rounded(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    base.model.to(torch.bfloat16)  # type: ignore[arg-type]
    made = fitted(make("ROME", base), tmp_path, None)
    assert made.report["protocol"]["name"] == "single, side by side: updates not rounded to bfloat16"
    base = tiny_base("gpt2")
    base.model.to(torch.bfloat16)  # type: ignore[arg-type]
    assert fitted(make("ROME", base), tmp_path, 1).report["protocol"]["name"] == "single"


# ---------------------------------------------------------------------- the rows' own updates


def low_rank(base: LanguageModel, name: str, rank: int, seed: int) -> WeightDelta:
    out, inner = base.weight(name).shape
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(out, rank, generator=generator), torch.randn(inner, rank, generator=generator)
    return WeightDelta(name, left, 0.1 * right)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_each_row_sees_its_own_updates_alone(family: str) -> None:
    """Logits, scores and texts: as with the weights edited for one edit after the other."""
    if family in OTHERS:
        from tests.families import build
        from tests.families import tokenizer as make_tokenizer

        architecture, settings = OTHERS[family]
        base = LanguageModel.wrap(build(family, **settings), make_tokenizer("byte_bpe"), architecture)
    else:
        base = tiny_base(family)
    names = [base.name(site) for site in make("MEMIT", base, (0, 2)).sites()]
    own = {
        0: [low_rank(base, names[0], 1, 0), low_rank(base, names[0], 2, 1)],
        2: [low_rank(base, names[1], 1, 2)],
        1: [],
    }
    prompts, answers = ["Velora Quint was born in", "The mayor of Tessaro is"], ["Tessaro", "Velora Quint"]
    rows = [base.encode(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    wanted, scores, texts = {}, {}, {}
    for edit in (0, 1, 2):
        for delta in own[edit]:
            base.write(delta.name, delta.update)
        wanted[edit] = base.logits(collate(rows)).detach()
        scores[edit] = Scorer(base).score(prompts, answers)
        texts[edit] = generate(base, prompts, max_new_tokens=5, top_k=None)
        base.restore()
    for edit, deltas in own.items():
        for delta in deltas:
            base.side_by_side.write(edit, delta.name, *delta.factors)
    owners = [2, 0, 0, 1, -1, 2]
    mixed = collate([replace(rows[i % 2], owner=owner) for i, owner in enumerate(owners)])
    found = base.logits(mixed)
    for i, owner in enumerate(owners):
        t = len(rows[i % 2].ids)
        expected = wanted[max(owner, 1) if owner < 0 else owner][i % 2, :t]
        assert (found[i, :t] - expected).norm() < 1e-5 * expected.norm()
    assert (wanted[0] - wanted[1]).norm() > 1e-3
    together = Scorer(base).score([prompts[i % 2] for i in range(6)], [answers[i % 2] for i in range(6)], owners)
    for i, owner in enumerate(owners):
        expected = scores[1 if owner < 0 else owner].nll_sum[i % 2]
        assert float(together.nll_sum[i]) == pytest.approx(float(expected), rel=1e-4)
    written = generate(base, [prompts[i % 2] for i in range(6)], max_new_tokens=5, top_k=None, owners=owners)
    assert written == [texts[1 if owner < 0 else owner][i % 2] for i, owner in enumerate(owners)]
    base.side_by_side.clear()
    assert torch.equal(base.logits(collate(rows)), wanted[1])


def test_a_killed_block_is_made_again_from_its_beginning(tmp_path: Path) -> None:
    """A block's lines are there together or not at all, and what was cut off is edited to the same bits."""
    whole = fitted(make("ROME", tiny_base("gpt2")), tmp_path / "whole", 2)
    cut = fitted(make("ROME", tiny_base("gpt2")), tmp_path / "cut", 2)
    cut.run.lines.cut(3)  # in the middle of the second block
    (cut.run.path / "metrics.json").unlink()
    resumed = EditTrainer(
        save_dir=str(tmp_path / "cut"),
        evaluation=Evaluation(generation=False, generation_length=30),
        enable_progress_bar=False,
        accelerator="cpu",
    )
    records = [edit.as_record() for edit in EDITS]
    module = EditDataModule(edits=records, batch_size=1, restore_every=1, parallel_edits=2)
    resumed.fit(make("ROME", tiny_base("gpt2")), datamodule=module, resume=str(cut.run.path))
    files = sorted((whole.run.path / "deltas").iterdir())
    assert [file.name for file in files] == sorted(file.name for file in (resumed.run.path / "deltas").iterdir())
    for file in files:
        assert file.read_bytes() == (resumed.run.path / "deltas" / file.name).read_bytes()
    times = ("seconds", "time")
    for line, other in zip(whole.run.records(), resumed.run.records(), strict=True):
        assert {k: v for k, v in line.items() if k not in times} == {k: v for k, v in other.items() if k not in times}
    assert yaml.safe_dump(whole.report["post"]) == yaml.safe_dump(resumed.report["post"])
