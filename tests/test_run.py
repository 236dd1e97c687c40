import errno
import json
import os
from pathlib import Path

import pytest

from kedit_lightning import delta as delta_files
from kedit_lightning.errors import DeltaError, KeditError
from kedit_lightning.models import LanguageModel
from kedit_lightning.run import COMMITS, RunDirectory, newest, read_deltas
from tests.families import tiny_base
from tests.updates import disk_full, low_rank, metadata, write_run


@pytest.fixture
def base() -> LanguageModel:
    return tiny_base("gpt2")


def lines(run: RunDirectory) -> list[dict[str, object]]:
    return [json.loads(line) for line in run.edits.read_text(encoding="utf-8").splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def commit(run: RunDirectory, base: LanguageModel, number: int, group: int = 0, text: str = "Åsa") -> None:
    about = metadata(base, case_ids=[number], number=number, group=group)
    run.commit([(number, [low_rank(base, 1, number)], about, {})], [{"case_id": number, "text": text}])


def test_a_commit_is_a_file_and_its_lines(tmp_path: Path, base: LanguageModel) -> None:
    run = write_run(tmp_path / "run", base, [([5, 6], 0, [low_rank(base, 1), low_rank(base, 2)]), ([7], 0, [])])
    assert names(run.path) == ["deltas/000000.safetensors", "deltas/000001.safetensors", "edits.jsonl"]
    assert run.records() == lines(run) == [{"case_id": case, "commit": case // 7} for case in (5, 6, 7)]
    assert [(number, len(deltas), about["case_ids"]) for number, deltas, about in run.commits()] == [
        (0, 2, [5, 6]),
        (1, 0, [7]),
    ]
    assert [about["case_ids"] for about in run.metadata()] == [[5, 6], [7]]


def test_commits_are_in_the_order_of_their_numbers(tmp_path: Path, base: LanguageModel) -> None:
    run = RunDirectory(tmp_path)
    for number in (1000000, 999999, 2):
        delta_files.save(tmp_path / "deltas" / f"{number:06d}.safetensors", [], metadata(base, number=number))
    assert [about["number"] for about in run.metadata()] == [2, 999999, 1000000]


def test_standing_commits_are_those_since_the_last_restoration(tmp_path: Path, base: LanguageModel) -> None:
    deltas = [low_rank(base, 1, seed) for seed in range(5)]
    groups = (0, 0, 1, 1, 1)
    run = write_run(tmp_path, base, [([i], group, [deltas[i]]) for i, group in enumerate(groups)])
    assert [number for number, _, _ in run.standing()] == [2, 3, 4]
    found, about = read_deltas(tmp_path)
    assert [float(delta.update[0, 0]) for delta in found] == [float(delta.update[0, 0]) for delta in deltas[2:]]
    assert about["case_ids"] == [2, 3, 4]
    one, about = read_deltas(tmp_path / "deltas" / "000001.safetensors")
    assert (len(one), about["case_ids"]) == (1, [1])


@pytest.mark.parametrize(
    ("groups", "of_line", "standing"), [((0, 1), 0, [1]), ((0, 0), 1, [])], ids=["no lines", "rejected"]
)
def test_what_stands_in_a_killed_run(
    groups: tuple[int, ...], of_line: int, standing: list[int], tmp_path: Path, base: LanguageModel
) -> None:
    """After a restoration a delta file whose lines are not there yet; and lines of rejected edits alone."""
    run = write_run(tmp_path, base, [([i], group, [low_rank(base, 1, i)]) for i, group in enumerate(groups)])
    run.lines.replace(1, [{"case_id": 1, "commit": None, "group": of_line}])
    assert [number for number, _, _ in RunDirectory(tmp_path).standing()] == standing


def test_a_file_system_without_locks_is_not_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(KeditError, match="cannot be locked"), RunDirectory(tmp_path).locked():
        pass


def test_a_group_is_completed_in_place(tmp_path: Path, base: LanguageModel) -> None:
    run = RunDirectory(tmp_path)
    for group in range(3):
        for i in range(2):
            commit(run, base, 2 * group + i, group)
        done = [{"case_id": 2 * group + i, "text": "Ö" * 50 * (2 - group), "after": i} for i in range(2)]
        run.lines.replace(2 * group, done)
        assert run.records() == lines(run)
        assert run.records()[-2:] == done
    assert [record["case_id"] for record in run.records()] == list(range(6))
    assert all("after" in record for record in run.records())
    assert ".edits.journal" not in names(tmp_path)


@pytest.mark.parametrize("cut", [1, 5, 15])
def test_a_truncated_tail_is_dropped_and_appended_after(tmp_path: Path, base: LanguageModel, cut: int) -> None:
    run = RunDirectory(tmp_path)
    for number in range(3):
        commit(run, base, number)
    os.truncate(run.edits, run.edits.stat().st_size - cut)
    assert [record["case_id"] for record in RunDirectory(tmp_path).records()] == [0, 1]
    again = RunDirectory(tmp_path)
    commit(again, base, 3)
    assert [record["case_id"] for record in lines(again)] == [0, 1, 3]
    again.lines.replace(2, [{"case_id": 3, "after": 1}])
    assert lines(again)[1:] == [{"case_id": 1, "text": "Åsa"}, {"case_id": 3, "after": 1}]


@pytest.mark.parametrize("size", ["nothing", "half a line", "one and a half"])
def test_an_interrupted_completion_is_made_good(tmp_path: Path, base: LanguageModel, size: str) -> None:
    run = RunDirectory(tmp_path)
    commit(run, base, 0)
    start = run.edits.stat().st_size
    commit(run, base, 1, 1)
    commit(run, base, 2, 1)
    done = [{"case_id": 1, "after": "x" * 30}, {"case_id": 2, "after": "y" * 30}]
    text = "".join(json.dumps(record) + "\n" for record in done)
    (tmp_path / ".edits.journal").write_text(json.dumps({"start": start, "lines": text}))
    written = {"nothing": 0, "half a line": 20, "one and a half": 70}[size]
    content = run.edits.read_bytes()[:start] + text.encode()[:written]
    run.edits.write_bytes(content)
    again = RunDirectory(tmp_path)
    assert [record["case_id"] for record in again.records()] == [0, 1, 2]
    assert again.records()[1:] == done
    commit(again, base, 3, 2)
    assert [record["case_id"] for record in lines(again)] == [0, 1, 2, 3]
    assert ".edits.journal" not in names(tmp_path)


def test_a_full_disk_leaves_neither_file_nor_lines(tmp_path: Path, base: LanguageModel) -> None:
    run = RunDirectory(tmp_path)
    commit(run, base, 0)
    before = names(tmp_path)
    with disk_full(), pytest.raises(KeditError, match="cannot be written"):
        commit(run, base, 1)
    assert names(tmp_path) == before
    with disk_full(4000), pytest.raises(KeditError, match=r"edits\.jsonl: cannot be written"):
        commit(run, base, 1, text="x" * 10000)
    assert names(tmp_path) == before
    assert lines(run) == [{"case_id": 0, "text": "Åsa"}]
    commit(run, base, 1)
    assert [record["case_id"] for record in lines(run)] == [0, 1]


def test_a_full_disk_does_not_lose_lines_that_were_there(tmp_path: Path, base: LanguageModel) -> None:
    run = RunDirectory(tmp_path)
    commit(run, base, 0)
    with disk_full(), pytest.raises(KeditError, match="cannot be written"):
        run.lines.replace(0, [{"case_id": 0, "after": "x" * 5000}])
    assert run.records() == lines(run) == [{"case_id": 0, "text": "Åsa"}]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupt_while_a_commit_is_written_undoes_it(
    tmp_path: Path, base: LanguageModel, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    run = RunDirectory(tmp_path)
    commit(run, base, 0)
    before = names(tmp_path)
    fsync = os.fsync
    calls = []

    def interrupted(file: int) -> None:
        calls.append(file)
        if len(calls) == at:  # the delta file's, then that of its name in the folder, then that of the lines
            raise KeyboardInterrupt
        fsync(file)

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        commit(run, base, 1)
    assert names(tmp_path) == before
    assert [record["case_id"] for record in lines(run)] == [0]


def test_json_and_lines_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path / "new")
    run.write_json("metrics.json", {"name": "Åsa"})
    run.write_lines("predictions.jsonl", [{"a": 1}, {"a": 2}])
    assert json.loads((run.path / "metrics.json").read_text(encoding="utf-8")) == {"name": "Åsa"}
    assert (run.path / "predictions.jsonl").read_text() == '{"a": 1}\n{"a": 2}\n'

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeditError, match="No space left on device"):
        run.write_json("metrics.json", {})
    assert json.loads((run.path / "metrics.json").read_text(encoding="utf-8")) == {"name": "Åsa"}
    assert names(run.path) == ["metrics.json", "predictions.jsonl"]


def test_no_run_directory_is_one_clear_line(tmp_path: Path) -> None:
    assert RunDirectory(tmp_path).records() == []
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(DeltaError, match="expected a run directory"):
            RunDirectory(path).standing()


def test_the_newest_run_is_the_newest_that_holds_what_is_needed(tmp_path: Path, base: LanguageModel) -> None:
    write_run(tmp_path / "version_2", base, [([0], 0, [low_rank(base, 1, 0)])])
    write_run(tmp_path / "version_10", base, [([1], 0, [low_rank(base, 1, 1)])])
    (tmp_path / "version_11").mkdir()
    (tmp_path / "version_11" / "metrics.json").write_text("{}")
    (tmp_path / "version_12").mkdir()
    assert newest(tmp_path, COMMITS).name == "version_10"
    assert newest(tmp_path, "metrics.json").name == "version_11"
    assert newest(tmp_path, "nothing").name == "version_12"
    assert newest(tmp_path / "version_2", COMMITS).name == "version_2"
    assert read_deltas(tmp_path)[1]["case_ids"] == [1]
