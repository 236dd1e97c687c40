"""The norms of hand-made updates are told as they are, run by run and restoration by restoration."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kedit_lightning.delta import WeightDelta, check
from kedit_lightning.errors import DeltaError
from kedit_lightning.models.fingerprint import fingerprint
from kedit_lightning.probes import NormDrift
from kedit_lightning.probes.drift import draw, ending, replay
from kedit_lightning.run import RunDirectory, read_deltas
from tests.commandline import World, done, kedit
from tests.families import tiny_base

NAMES = ("transformer.h.1.mlp.c_proj.weight", "transformer.h.2.mlp.c_proj.weight")


def a_run(path: Path, updates: Sequence[dict[str, float]], groups: Sequence[int] | None = None) -> Path:
    """A run on the tiny GPT-2 whose commits scale matrices by what is given."""
    base = tiny_base("gpt2")
    made = {"names": list(NAMES), "value": fingerprint(base, NAMES)}
    run = RunDirectory(path)
    for number, factors in enumerate(updates):
        group = groups[number] if groups else 0
        deltas = [WeightDelta(name, dense=factor * base.weight(name).clone()) for name, factor in factors.items()]
        metadata: dict[str, Any] = {"case_ids": [2 * number, 2 * number + 1], "group": group, "fingerprint": made}
        run.commit([(number, deltas, metadata, {})], [{"commit": number, "group": group}] * 2)
    return path


def test_the_norms_of_hand_made_updates(tmp_path: Path) -> None:
    base, (first, second) = tiny_base("gpt2"), NAMES
    before = {name: float(base.weight(name).double().abs().sum()) for name in NAMES}
    bits = {name: base.weight(name).clone() for name in NAMES}
    run = a_run(tmp_path / "run", [{first: 1.0}, {first: -1.5, second: 1.0}], [0, 0])
    rows = {(row["matrix"], row["edits"]): row for row in replay(base, run)}
    assert [edits for name, edits in rows if name == first] == [0, 2, 4]
    assert rows[first, 0]["update"] is None
    for name, edits, drift, change, update in (
        (first, 0, 0, 0, None),
        (first, 2, 1, 1, 1),
        (first, 4, -0.5, 0.5, 1.5),
        (second, 2, 0, 0, 0),
        (second, 4, 1, 1, 1),
    ):
        row = rows[name, edits]
        assert row["drift"] == pytest.approx(drift, abs=1e-6)
        assert row["l1"] == pytest.approx((1 + drift) * before[name], rel=1e-6)
        assert row["change"] == pytest.approx(change * before[name], rel=1e-6)
        assert row["update"] == (None if update is None else pytest.approx(update * before[name], rel=1e-6))
    both = before[second] - 0.5 * before[first]
    assert rows["together", 4]["drift"] == pytest.approx(both / sum(before.values()), rel=1e-6)
    assert all(torch.equal(base.weight(name), weight) for name, weight in bits.items())


def test_a_run_that_restores_starts_each_edit_from_the_unedited_model(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", [{NAMES[0]: 1.0}, {NAMES[0]: 0.5}], [0, 1])
    drift = [row["drift"] for row in replay(tiny_base("gpt2"), run) if row["matrix"] == NAMES[0]]
    assert drift == pytest.approx([0, 1, 0.5], abs=1e-6)


def test_several_runs_of_a_label_are_a_mean_with_its_interval(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / str(i), [{NAMES[0]: 0.5 * i, NAMES[1]: 0.5 * i}]) for i in (1, 3)]
    base = tiny_base("gpt2")
    rows = [{"label": "A", "run": i, **row} for i, run in enumerate(runs) for row in replay(base, run)]
    last = ending(rows, "A")
    assert (last["edits"], last["runs"], last["mean"]) == (2, 2, pytest.approx(1.0, abs=1e-6))
    assert last["ci95"] == pytest.approx(12.706 * 0.5, rel=1e-3)  # t(0.975, 1) s / √2, s = 0.7071
    drift, change, update = draw(rows).axes
    assert [len(axis.lines) for axis in (drift, change, update)] == [1, 1, 1]
    assert drift.lines[0].get_ydata() == pytest.approx([0, 1], abs=1e-6)
    assert (drift.get_yscale(), change.get_yscale()) == ("linear", "log")


def test_the_command_tells_the_drift_of_a_run_as_its_deltas_have_it(world: World, tmp_path: Path) -> None:
    config = world.config("ROME")
    run = world.fit(config, "--data.restore_every", "null", "--data.stop", 3, name="drift")
    runs = json.dumps({"ROME": [str(run)]})
    done("probe", "--config", config, "--probe", "NormDrift", "--probe.runs", runs, "--trainer.save_dir", tmp_path)
    (found,) = tmp_path.rglob("norm_drift.csv")
    with found.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["edits"] for row in rows] == ["0", "1", "2", "3"]
    name = rows[0]["matrix"]
    before = load_file(world.base / "model.safetensors")[name].T.double()
    change = sum(delta.update.double() for delta in read_deltas(run)[0])
    expected = float((before + change).abs().sum() / before.abs().sum() - 1)
    assert float(rows[-1]["drift"]) == pytest.approx(expected, abs=2e-6)
    assert expected != 0
    assert (found.with_suffix(".png")).read_bytes()[:4] == b"\x89PNG"
    missing = kedit("probe", "--config", config, "--probe", "NormDrift", '--probe.runs={"A": ["nowhere"]}')
    assert (missing.status, missing.err.count("\n")) == (1, 1)
    assert "nowhere: expected a run directory" in missing.err
    none = kedit("probe", "--config", config, "--probe", "NormDrift", '--probe.runs={"A": []}')
    assert (none.status, "probe.runs: expected run directories by label" in none.err) == (1, True)


def test_runs_of_another_model_are_refused(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", [{NAMES[0]: 1.0}])
    other = tiny_base("gpt2", seed=1)
    with pytest.raises(DeltaError, match="the delta is of another model"):
        list(replay(other, run))
    check(tiny_base("gpt2"), *read_deltas(run), run)
    assert NormDrift({"A": [str(run)]}).runs == {"A": [str(run)]}
