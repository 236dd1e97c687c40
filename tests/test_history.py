"""`kedit log` and `kedit revert`: what was edited, and a run without one of its edits."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kedit_lightning import delta as delta_files
from kedit_lightning import history, tensor_files
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.delta import WeightDelta
from kedit_lightning.errors import KeditError
from kedit_lightning.metrics import Evaluation, Evaluator
from kedit_lightning.models import LanguageModel
from kedit_lightning.remeasurement import changed
from kedit_lightning.reverting import undo
from kedit_lightning.run import RunDirectory
from tests.commandline import World, done, jsonl, kedit, write
from tests.families import save_tiny, tiny_base
from tests.updates import bits, dense, low_rank, metadata, same_bits


@pytest.fixture(scope="module")
def whole(world: World) -> Path:
    """A sequence of four edits."""
    return world.fit(world.config("ROME"), name="sequence")


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "logs" / "sequence" / "version_0"))


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "reverted" not in path.parts
    }


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "edits.jsonl").read_text().splitlines()]


def logged(path: Path, *args: object) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(done("log", path, "--json", *args).out)
    return found


class Sequence:
    """A run written by hand: a commit a list of case ids, an update a case, in one group."""

    def __init__(self, folder: Path, commits: list[list[int]], *, rejected: dict[int, str] | None = None) -> None:
        self.base = LanguageModel(str(save_tiny("gpt2", folder / "base")))
        self.run = RunDirectory(folder / "run")
        self.deltas: list[WeightDelta] = []
        for number, cases in enumerate(commits):
            deltas = [low_rank(self.base, 1, seed=len(self.deltas) + i) for i in range(len(cases))]
            self.deltas += deltas
            records = [self.line(case, number) for case in cases]
            if number in (rejected or {}):
                refused = self.line(900 + number, None) | {"rejected": (rejected or {})[number]}
                self.run.lines.append([refused])
            self.run.commit([(number, deltas, metadata(self.base, case_ids=cases, number=number), {})], records)

    @staticmethod
    def line(case: int, commit: int | None) -> dict[str, Any]:
        wanted = {"prompt": "{} speaks", "subject": f"S{case}", "target_new": f"T{commit}"}
        return {"case_id": case, "commit": commit, "group": 0, **wanted, "seconds": 0.5}


# ---------------------------------------------------------------------- log


def test_the_log_of_a_sequence(run: Path) -> None:
    result = done("log", run.parent)
    assert result.err == ""
    for line in lines(run):
        assert str(line["case_id"]) in result.out
        assert line["subject"].split()[0] in result.out
    assert "4 edits in 4 commits" in result.out.replace("\n", "")
    assert "not finished" not in result.out
    assert "warned" not in result.out
    found = logged(run)
    assert [row["commit"] for row in found] == [0, 1, 2, 3]
    for row, line in zip(found, lines(run), strict=True):
        (edit,) = row["edits"]
        assert (edit["case_id"], edit["subject"], edit["id"]) == (
            line["case_id"],
            line["subject"],
            str(line["case_id"]),
        )
        assert row["seconds"] == line["seconds"]
        assert row["delta"] == line["stages"][-1]["delta/mlp"]
        assert row["success"] == float(line["after"]["efficacy"] == 1)


def test_the_newest_only(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    read = delta_files.load_metadata
    monkeypatch.setattr(history, "load_metadata", lambda path: opened.append(path) or read(path))
    assert [row["commit"] for row in logged(run, "--last=2")] == [2, 3]
    assert [path.name for path in opened] == ["000002.safetensors", "000003.safetensors"], "the others stay closed"
    result = kedit("log", run, "--last=0")
    assert (result.status, result.err.count("\n")) == (1, 1)
    assert "last: expected at least 1, got 0" in result.err


def test_no_model_and_no_tensor_is_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LanguageModel, "__init__", lambda *_, **__: pytest.fail("a model is loaded"))
    monkeypatch.setattr(delta_files, "load", lambda *_: pytest.fail("tensors are read"))
    monkeypatch.setattr(tensor_files, "checksum", lambda *_: pytest.fail("tensors are read"))
    assert len(logged(run)) == 4


def test_health_and_checkpoints_stand_with_the_commit_they_followed(run: Path) -> None:
    drift = {"l1": 0.031, "frobenius": 0.5}
    checks = [
        {"edits": 0, "drift": {}, "together": drift, "perplexity": 9.0, "retention": None, "warnings": []},
        {"edits": 2, "drift": {"a": drift}, "together": drift, "perplexity": 12.3, "retention": 1.0, "warnings": []},
        {"edits": 4, "drift": {}, "together": drift, "perplexity": 99.0, "retention": 0.25, "warnings": ["it breaks"]},
    ]
    jsonl(run / "health.jsonl", checks)
    jsonl(run / "checkpoints.jsonl", [{"edits": 1, "so_far": {"efficacy": {"mean": 1.0}}}])
    found = logged(run)
    assert [row["health"] and row["health"]["edits"] for row in found] == [None, 2, None, 4]
    assert [row["checkpoint"] and row["checkpoint"]["edits"] for row in found] == [1, None, None, None]
    assert [row["health"] and row["health"]["edits"] for row in logged(run, "--last=1")] == [4]
    out = " ".join(done("log", run).out.split())
    assert "warned after 4" in out
    condition = history._condition(found[3]).plain
    assert condition == "kept 25%, perplexity 99, L1 +3.10%; it breaks"


def test_rejections_have_a_line_with_their_reason(tmp_path: Path) -> None:
    made = Sequence(tmp_path, [[1], [2]], rejected={1: "case 901: the loss is not finite"})
    found = logged(made.run.path)
    assert [(row["commit"], row["rejected"]) for row in found] == [
        (0, None),
        (None, "case 901: the loss is not finite"),
        (1, None),
    ]
    assert [edit["number"] for row in found for edit in row["edits"]] == [0, 1, 2]
    assert found[1]["success"] is None
    out = " ".join(done("log", made.run.path).out.split())
    assert "rejected: case 901" in out
    assert "2 edits in 2 commits, 1 rejected, not finished" in out


def test_a_killed_run_is_listed(run: Path) -> None:
    (run / "metrics.json").unlink()
    content = (run / "edits.jsonl").read_bytes()
    (run / "edits.jsonl").write_bytes(content[:-30])
    found = logged(run)
    assert [row["commit"] for row in found] == [0, 1, 2, 3], "the last commit is in its delta file"
    cases = [json.loads(line)["case_id"] for line in content.splitlines()]
    assert [edit["case_id"] for row in found for edit in row["edits"]] == cases
    assert found[3]["success"] is None
    assert "not finished" in done("log", run).out


def test_the_time_is_that_of_the_commit_unless_it_is_recorded(tmp_path: Path) -> None:
    made = Sequence(tmp_path, [[1], [2]])
    os.utime(made.run.path / "deltas" / "000000.safetensors", (1_000_000_000, 1_000_000_000))
    records = made.run.records()
    jsonl(made.run.edits, [records[0], records[1] | {"time": 1_100_000_000}])
    times = [row["time"] for row in logged(made.run.path)]
    assert [time[:4] for time in times] == ["2001", "2004"]


def test_what_cannot_be_listed_is_one_clear_line(tmp_path: Path, run: Path) -> None:
    for path, words in ((tmp_path / "none", "expected a run directory"), (tmp_path, "expected a run directory")):
        result = kedit("log", path)
        assert (result.status, result.err.count("\n")) == (1, 1), result
        assert words in result.err
    (run / "edits.jsonl").write_text("{broken\n" + (run / "edits.jsonl").read_text())
    result = kedit("log", run)
    assert (result.status, result.err.count("\n")) == (1, 1)
    assert "one is damaged" in result.err


# ---------------------------------------------------------------------- revert: what stays


def test_reverting_replays_the_others_and_leaves_the_run_alone(run: Path, world: World) -> None:
    before, second = files(run), lines(run)[1]["case_id"]
    result = done("revert", run.parent, "--edit", second, "--no_evaluate")
    assert files(run) == before, "the run is as it was"
    made = run / "reverted" / f"case_{second}.safetensors"
    assert f"{made}: " in result.out
    assert f"without edit {second}, a delta file" in result.out
    assert sorted(path.name for path in made.parent.iterdir()) == [made.name]
    deltas, about = delta_files.load(made)
    others = [line["case_id"] for line in lines(run) if line["case_id"] != second]
    assert about["case_ids"] == others
    assert about["reverted"] == [second]
    base = LanguageModel(str(world.base))
    delta_files.check(base, deltas, about, made)
    for number in (0, 2, 3):
        for delta in delta_files.load(run / "deltas" / f"{number:06d}.safetensors")[0]:
            base.write(delta.name, delta.update)
    expected = bits(base)
    base.restore()
    for delta in deltas:
        base.write(delta.name, delta.update)
    assert same_bits(bits(base), expected)


def test_another_place_for_the_delta_file(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.safetensors"
    done("revert", run, "--commit=0", "--out", out, "--no_evaluate")
    assert out.is_file()
    assert not (run / "reverted").exists()
    result = kedit("revert", run, "--commit=0", "--out", out, "--no_evaluate")
    assert (result.status, result.err.count("\n")) == (1, 1)
    assert "expected a new file" in result.err


def test_a_case_that_comes_twice_is_named_by_its_number(tmp_path: Path) -> None:
    made = Sequence(tmp_path, [[5], [6], [5]])
    with pytest.raises(
        KeditError, match=r"case 5 was edited 2 times: @0 \(S5 → T0, commit 0\); @2 \(S5 → T2, commit 2\)"
    ):
        undo(made.run, "5")
    for edit, number in (("@0", 0), ("6", 1), ("@1", 1), ("@2", 2)):
        reverted = undo(made.run, edit)
        assert [line["number"] for line in reverted.undone] == [number]
        assert [delta.name for delta in reverted.kept] == [made.deltas[0].name] * 2
        expected = [delta for i, delta in enumerate(made.deltas) if i != number]
        for delta, other in zip(reverted.kept, expected, strict=True):
            assert torch.equal(delta.update, other.update)
    ids = [edit["id"] for row in history.history(made.run) for edit in row["edits"]]
    assert ids == ["@0", "6", "@2"], "the log says how each is spelt"
    assert undo(made.run, "@2").name == "edit_2"


def test_rank_one_updates_of_one_commit_are_told_apart(tmp_path: Path) -> None:
    made = Sequence(tmp_path, [[1, 2, 3], [4]])
    reverted = undo(made.run, "2")
    assert reverted.metadata["case_ids"] == [1, 3, 4]
    for delta, other in zip(reverted.kept, [made.deltas[i] for i in (0, 2, 3)], strict=True):
        assert torch.equal(delta.update, other.update)
    assert undo(made.run, commit=0).metadata["case_ids"] == [4]
    assert [line["case_id"] for line in undo(made.run, commit=0).undone] == [1, 2, 3]


@pytest.mark.parametrize("solved", ["dense", "rank 2", "one"])
def test_edits_solved_together_are_undone_together(tmp_path: Path, solved: str) -> None:
    base = tiny_base("gpt2")
    deltas = {
        "dense": [dense(base, 1), dense(base, 1, seed=1)],
        "rank 2": [low_rank(base, 1, rank=2), low_rank(base, 2, rank=2)],
        "one": [low_rank(base, 1)],
    }[solved]
    run = RunDirectory(tmp_path / "run")
    run.commit([(0, deltas, metadata(base, case_ids=[7, 8]), {})], [Sequence.line(7, 0), Sequence.line(8, 0)])
    with pytest.raises(
        KeditError, match=r"case 8 was solved together with case 7 \(commit 0\).*--commit 0 undoes them"
    ):
        undo(run, "8")
    assert undo(run, commit=0).kept == []
    assert undo(run, commit=0).described == "without commit 0 (cases 7, 8)"


def test_an_edit_in_a_batch_that_lost_another(tmp_path: Path) -> None:
    """Rejected edits hold no update; those beside them keep theirs."""
    made = Sequence(tmp_path, [[1], [2, 3]], rejected={1: "the loss is not finite"})
    reverted = undo(made.run, "3")
    for delta, other in zip(reverted.kept, made.deltas[:2], strict=True):
        assert torch.equal(delta.update, other.update)
    assert [line["number"] for line in undo(made.run, "@3").undone] == [3]
    for edit in ("901", "@1"):
        with pytest.raises(KeditError, match=r"rejected \(the loss is not finite\), so there is nothing to undo"):
            undo(made.run, edit)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("--edit=77",), "no edit has case id 77; there are cases"),
        (("--edit=@9",), "no edit has number 9; there are @0 to @3"),
        (("--edit=x",), "edit: expected a case id such as 17, or @ and a number"),
        (("--commit=9",), "commit 9 is not among those that the run ended with (0 to 3)"),
        (("--edit=@0", "--commit=0"), "expected an edit or a commit to undo, got both"),
        ((), "expected what to undo: --edit ID or --commit N"),
    ],
)
def test_what_cannot_be_undone_is_one_clear_line(run: Path, asked: tuple[str, ...], words: str) -> None:
    before = files(run)
    result = kedit("revert", run, *asked)
    assert (result.status, result.err.count("\n")) == (1, 1), result
    assert words in result.err
    assert files(run) == before
    assert not (run / "reverted").exists()


# ---------------------------------------------------------------------- revert: what changes


def test_what_changes_is_measured_and_shown(run: Path, world: World) -> None:
    records = lines(run)
    third = records[2]
    result = done("revert", run, "--edit", third["case_id"])
    assert "undone: " in result.out
    assert third["subject"] in result.out
    assert "of the other 3 edits changed in success" in result.out
    assert "Efficacy: the edited prompt" in result.out
    report = json.loads((run / "reverted" / f"case_{third['case_id']}.json").read_text())
    (undone,) = report["undone"]
    assert undone["case_id"] == third["case_id"]
    assert undone["answer_unedited"] == third["answer_before"]
    assert undone["answer_before"] == third["answer_after"], "with all edits: as the run ended"
    assert undone["before"] == pytest.approx(third["after"], abs=1e-6)
    assert [line["case_id"] for line in report["others"]] == [r["case_id"] for r in records if r != third]
    for line, record in zip(report["others"], [r for r in records if r != third], strict=True):
        assert line["before"] == pytest.approx(record["after"], abs=1e-6)
    assert report["edits"] == 3
    assert report["pre"]["efficacy"]["n"] == 3

    base = LanguageModel(str(world.base))
    for delta in delta_files.load(run / "reverted" / f"case_{third['case_id']}.safetensors")[0]:
        base.write(delta.name, delta.update)
    module = EditDataModule(edits=world.edits)
    module.setup("fit")
    evaluator = Evaluator(base, Evaluation(generation=False))
    assert [undone["answer_after"]] == evaluator.answers([module.edits[2]])


def test_edits_whose_success_changed_are_named() -> None:
    def line(answer: str, efficacy: float, before: str = "Ulm", was: float = 0.0) -> dict[str, Any]:
        asked = {"target_new": "Ulm", "answer_before": before, "before": {"efficacy": was}}
        return asked | {"answer_after": answer, "after": {"efficacy": efficacy}}

    lost, kept, won = line("Bonn", 0.0), line("Ulm.", 1.0), line("Ulm", 1.0, before="Bonn")
    assert changed({"others": [lost, kept, won]}) == [lost, won]


def test_the_data_are_those_of_the_run(run: Path, world: World) -> None:
    before = files(run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(world.edits[1]["target_new"], "Elsewhere"))
    case = lines(run)[0]["case_id"]
    result = kedit("revert", run, "--edit", case)
    assert (result.status, result.err.count("\n")) == (1, 1)
    assert f"no longer hold case {lines(run)[1]['case_id']} as it was edited" in result.err
    assert "--no_evaluate" in result.err
    for content in (None, "data: {nonsense: 1}\n", "[1, 2]\n", "data: [\n"):
        config.unlink(missing_ok=True)
        if content is not None:
            write(config, content)
        result = kedit("revert", run, "--edit", case)
        assert (result.status, result.err.count("\n")) == (1, 1), result
        assert "give --no_evaluate" in result.err
    assert not (run / "reverted").exists()
    assert {name: content for name, content in files(run).items() if name != "config.yaml"} == {
        name: content for name, content in before.items() if name != "config.yaml"
    }


def test_only_what_stands_is_measured(world: World) -> None:
    """With restorations the model at the end holds the last group alone."""
    run = world.fit(world.config("ROME"), "--data.restore_every=2", name="groups")
    records = lines(run)
    first, last = records[0]["case_id"], records[3]["case_id"]
    result = kedit("revert", run, "--edit", first)
    assert "is not in the model that the run ended with" in result.err
    done("revert", run, "--edit", last)
    report = json.loads((run / "reverted" / f"case_{last}.json").read_text())
    assert [line["case_id"] for line in report["others"]] == [records[2]["case_id"]]
    assert report["undone"][0]["answer_after"] is not None
    deltas, about = delta_files.load(run / "reverted" / f"case_{last}.safetensors")
    assert about["case_ids"] == [records[2]["case_id"]]
    assert len(deltas) == 1


def test_a_checkpoint_instead_of_a_delta_file(run: Path, tmp_path: Path) -> None:
    case = lines(run)[3]["case_id"]
    done("revert", run, "--edit", case, "--out", tmp_path / "model", "--no_evaluate")
    done("revert", run, "--edit", case, "--no_evaluate")
    done("apply", run / "reverted" / f"case_{case}.safetensors", "--out", tmp_path / "applied")
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("model", "applied")]
    assert weights[0] == weights[1]
