"""Curves over the number of edits, from what runs leave."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kedit_lightning.curves import curve, curves, draw
from kedit_lightning.errors import KeditError
from kedit_lightning.metrics import interval_over_runs
from tests.commandline import jsonl


def run(folder: Path, reliability: float, *, l1: float = 0.0) -> Path:
    """What a run of 20 edits leaves, as `lightning_logs/NAME`."""
    version = folder / "version_0"
    version.mkdir(parents=True)
    jsonl(version / "edits.jsonl", [{"case_id": 0}])
    so_far = [{"edits": n, "so_far": {"reliability": {"mean": reliability / n}}} for n in (10, 20)]
    with jsonl(version / "checkpoints.jsonl", so_far).open("a") as file:
        file.write('{"edits": 30, "so_far')  # cut off by a crash
    matrices = {"h.0.weight": {"l1": l1}, "h.1.weight": {"l1": 3 * l1}}
    jsonl(version / "health.jsonl", [{"edits": 0, "drift": {}, "retention": None}, {"edits": 10, "drift": matrices}])
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, list[Path]]:
    three = [run(tmp_path / f"rome{seed}", value, l1=value) for seed, value in enumerate((0.5, 0.6, 1.0))]
    return {"ROME": three, "EAC": [run(tmp_path / "eac", 0.9)]}


def test_a_figure_a_table_and_tensorboard_for_each_quantity(tmp_path: Path, runs: dict[str, list[Path]]) -> None:
    asked = {"reliability, all so far": "so_far.reliability.mean", "L1 drift": "drift.*.l1"}
    made = curves(runs, asked, tmp_path / "out", "ROME and EAC")
    names = [f"{stem}.{kind}" for stem in ("reliability_all_so_far", "L1_drift") for kind in ("png", "csv")]
    assert [path.name for path in made] == [*names, "table.md"]
    assert made[-1].read_text().splitlines()[-1].startswith("| EAC | 20 | 0.045 | ")
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in made[:-1:2])
    rows = list(csv.DictReader(made[1].open()))
    assert [(row["label"], row["edits"], row["runs"]) for row in rows] == [
        ("ROME", "10", "3"),
        ("ROME", "20", "3"),
        ("EAC", "10", "1"),
        ("EAC", "20", "1"),
    ]
    mean, half = interval_over_runs([0.05, 0.06, 0.1])
    assert (float(rows[0]["mean"]), float(rows[0]["ci95"])) == pytest.approx((mean, half), abs=1e-6)
    assert rows[2]["ci95"] == "", "one run has no interval"
    drift = list(csv.DictReader(made[3].open()))
    assert [row["edits"] for row in drift] == ["10", "10"], "the unedited model has no matrices"
    assert float(drift[0]["mean"]) == pytest.approx(2 * 0.7, abs=1e-6), "the mean over matrices, then over runs"
    events = EventAccumulator(str(tmp_path / "out"))
    events.Reload()
    assert set(events.Tags()["images"]) == set(asked)
    values = [(event.step, event.value) for event in events.Scalars("reliability, all so far/EAC")]
    assert values == [(10, pytest.approx(0.09)), (20, pytest.approx(0.045))]


def test_a_curve_has_the_bounds_of_its_interval() -> None:
    rows = [{"label": "a", "edits": n, "runs": 3, "mean": 0.5, "ci95": 0.1 * n} for n in (1, 2)]
    (axis,) = draw(rows, "drift", "title").axes
    assert axis.lines[0].get_ydata().tolist() == [0.5, 0.5]  # type: ignore[union-attr]
    corners: Any = axis.collections[0].get_paths()[0].vertices
    assert sorted({round(float(y), 6) for _, y in corners}) == [0.3, 0.4, 0.6, 0.7]
    assert axis.get_ylabel() == "drift"


def test_a_resumed_run_counts_its_last_measurement() -> None:
    lines = [{"edits": 5, "tasks": {"nli": 0.1}}, {"edits": 5, "tasks": {"nli": 0.9}}, {"edits": 9, "tasks": {}}]
    assert [(row["edits"], row["mean"]) for row in curve({"a": [lines]}, "tasks.nli")] == [(5, 0.9)]


def test_what_cannot_be_drawn_is_one_clear_line(tmp_path: Path, runs: dict[str, list[Path]]) -> None:
    out = tmp_path / "out"
    with pytest.raises(
        KeditError, match=r"tasks.nli is in none of the runs; there are drift\.\*\.l1, edits, so_far\.reli"
    ):
        curves(runs, {"nli": "tasks.nli"}, out, "")
    with pytest.raises(KeditError, match=r"expected a run with checkpoints.jsonl or health.jsonl, found neither"):
        curves({"a": [tmp_path / "nowhere"]}, {"drift": "drift.*.l1"}, out, "")
    assert not out.exists(), "nothing half-made"


def test_what_no_run_has_is_left_out_beside_others(
    tmp_path: Path, runs: dict[str, list[Path]], caplog: pytest.LogCaptureFixture
) -> None:
    files = curves(runs, {"drift": "drift.*.l1", "retained": "retained.mean"}, tmp_path, "")
    assert {path.name for path in files} == {"drift.png", "drift.csv", "table.md"}
    assert "warning: not drawn: retained.mean is in none of the runs" in caplog.text
