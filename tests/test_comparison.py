"""`kedit compare`: variants over seeds, each a run of `kedit fit`, and their curves."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kedit_lightning.comparison import fit_configuration, read
from kedit_lightning.errors import KeditError
from kedit_lightning.run import RunDirectory, newest
from tests.commandline import World, done, kedit, write

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted((ROOT / "configs/experiments").glob("*.yaml"))
SHIPPED = [path for path in EXPERIMENTS if {"variants", "extends"} & set(yaml.safe_load(path.read_text()))]
SHIPPED = [path for path in SHIPPED if path.stem.endswith("_almanac") and "config: " not in path.read_text()]


def experiment(world: World, **changes: Any) -> dict[str, Any]:
    fit = yaml.safe_load(world.config("ROME").read_text())
    fit["trainer"] |= {"evaluate_at": [0, 1, 3]}
    fit["data"] |= {"restore_every": None, "stop": 3}
    fit["trainer"].pop("save_dir")
    return {
        "name": "pair",
        "title": "Two",
        "seeds": [0, 1],
        "quantities": {"efficacy so far": "so_far.efficacy.mean"},
        **fit,
        "variants": {"ROME": {}, "small steps": {"model": {"init_args": {"v_lr": 0.1}}}},
    } | changes


@pytest.mark.slow
def test_it_runs_every_variant_and_seed_once_and_draws_them(world: World, tmp_path: Path) -> None:
    file = write(tmp_path / "pair.yaml", experiment(world))
    logs = tmp_path / "logs"
    shown = done("compare", "--config", file, "--save_dir", logs)
    assert "run 4 of 4: small steps, seed 1" in shown.out
    places = [logs / "pair" / name / f"seed_{seed}" for name in ("ROME", "small steps") for seed in (0, 1)]
    for place in places:
        run = newest(place, "metrics.json")
        assert json.loads((run / "metrics.json").read_text())["edits"] == 3
        saved = yaml.safe_load((run / "config.yaml").read_text())
        assert saved["model"]["init_args"]["v_lr"] == (0.1 if "small" in str(place) else 0.5)
        assert saved["model"]["init_args"]["context_templates"]["seed"] == int(str(place)[-1])
    with (logs / "pair/pair/efficacy_so_far.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert {(row["label"], row["edits"]) for row in rows} == {(n, e) for n in ("ROME", "small steps") for e in "013"}
    assert all(row["runs"] == "2" for row in rows)
    assert (logs / "pair/pair/efficacy_so_far.png").read_bytes()[:4] == b"\x89PNG"

    before = {path: path.read_bytes() for path in logs.rglob("*.jsonl")}
    (newest(places[1], "metrics.json") / "metrics.json").unlink()  # as if it had been killed before its end
    again = done("compare", "--config", file, "--save_dir", logs)
    assert "run 2 of 4" in again.out or "run 3 of 4" in again.out
    assert again.out.count(" of 4: ") == 1
    assert len(list(places[1].glob("version_*"))) == 1
    assert len(RunDirectory(newest(places[1], "metrics.json")).records()) == 3
    assert before.keys() == {path for path in logs.rglob("*.jsonl")}

    changed = write(tmp_path / "pair.yaml", experiment(world, data={"edits": world.edits, "stop": 2}))
    refused = kedit("compare", "--config", changed, "--save_dir", logs)
    assert refused.status == 1
    assert "holds a run of another configuration" in refused.err
    assert refused.err.count("\n") == 1


def test_a_run_that_was_stopped_goes_on(world: World, tmp_path: Path) -> None:
    settings = {"every": 1, "thresholds": {"frobenius": 1e-9, "perplexity": None}, "action": "stop"}
    one = experiment(world, seeds=[0], variants={"ROME": {}})
    one["trainer"]["callbacks"] = [{"class_path": "CollapseWatch", "init_args": settings}]
    file = write(tmp_path / "one.yaml", one)
    edits = []
    for _ in range(2):
        done("compare", "--config", file, "--save_dir", tmp_path / "logs")
        [run] = (tmp_path / "logs/pair/ROME/seed_0").glob("version_*")
        report = json.loads((run / "metrics.json").read_text())
        shown = " ".join(done("log", run).out.split())
        edits.append((report["edits"], report.get("stopped", False), "stopped before its last edit" in shown))
    assert edits == [(1, True, True), (3, False, False)]


def test_one_file_can_extend_another(world: World, tmp_path: Path) -> None:
    write(tmp_path / "pair.yaml", experiment(world))
    child = {"extends": "pair.yaml", "title": "One", "quantities": {"latest": "latest.efficacy.mean"}}
    found = read(write(tmp_path / "child.yaml", child))
    assert found["name"] == "pair"
    assert (found["title"], found["quantities"]) == ("One", {"latest": "latest.efficacy.mean"})
    assert fit_configuration(found, "ROME", 1, tmp_path) == fit_configuration(
        read(tmp_path / "pair.yaml"), "ROME", 1, tmp_path
    )


def test_a_variant_of_another_class_takes_nothing_of_the_first_ones_settings(world: World, tmp_path: Path) -> None:
    memit = {"class_path": "MEMIT", "init_args": {"layers": [0, 1]}}
    content = experiment(world, variants={"MEMIT": {"model": memit}, "ROME": None})
    found = read(write(tmp_path / "one.yaml", content))
    made = fit_configuration(found, "MEMIT", 2, tmp_path)
    assert made["model"] == {"class_path": "MEMIT", "init_args": {"layers": [0, 1], "context_templates": {"seed": 2}}}
    assert fit_configuration(found, "ROME", 2, tmp_path)["model"]["init_args"]["layers"] == [1]
    assert found["model"]["class_path"] == "ROME"  # nothing was changed in place


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {}}, "variants is empty"),
        ({"seeds": 3}, "expected seeds to be a list, got 3"),
        ({"quantities": {}}, "quantities is empty"),
        ({"vairants": {}}, "unknown block 'vairants'"),
        ({"variants": {"a": {"modle": {}}}}, "variant 'a'"),
        ({"name": None}, "expected name to be a str"),
    ],
)
def test_what_cannot_be_used_is_said(world: World, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = write(tmp_path / "wrong.yaml", experiment(world, **changes))
    with pytest.raises(KeditError, match=message) as found:
        read(file)
    assert "wrong.yaml" in str(found.value)


def test_an_unknown_variant_and_a_missing_file(world: World, tmp_path: Path) -> None:
    file = write(tmp_path / "pair.yaml", experiment(world))
    refused = kedit("compare", "--config", file, "--variants", "[TOP]", "--save_dir", tmp_path)
    assert (refused.status, "there is no 'TOP'; the experiment has ROME, small steps" in refused.err) == (1, True)
    missing = kedit("compare", "--config", tmp_path / "none.yaml")
    assert missing.status == 1
    assert "no configuration file can be read there" in missing.err
    empty = kedit("compare", "--config", file, "--seeds=[]", "--save_dir", tmp_path)
    assert (empty.status, "seeds: expected at least one" in empty.err) == (1, True)
    circle = write(tmp_path / "circle.yaml", {"extends": "circle.yaml"})
    assert "expected files that extend each other in a chain" in kedit("compare", "--config", circle).err
    lost = write(tmp_path / "lost.yaml", {"extends": "none.yaml"})
    assert "none.yaml: no configuration file" in kedit("compare", "--config", lost).err


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["last", "whole"])
@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.stem)
def test_shipped_experiments_are_valid_runs(file: Path, whole: bool, tmp_path: Path) -> None:
    """Every variant of every experiment, or its last one, parses as a configuration of `kedit fit`."""
    found = read(file)
    first = file.read_text().splitlines()[0]
    assert first == f"# kedit compare --config {file.relative_to(ROOT)}"
    for name in found["variants"] if whole else list(found["variants"])[-1:]:
        config = write(tmp_path / "fit.yaml", fit_configuration(found, name, found["seeds"][0], tmp_path))
        done("fit", "--config", config, "--print_config")


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        (
            "{model.init_args.layers: [[1]], data.stop: [2]}",
            "expected sweep to be one setting and a list of its values",
        ),
        ("{data.stop: 3}", "expected sweep to be one setting and a list of its values"),
        ("{data.stop: [2]}\nvariants: {a: {}}", "expected variants or a sweep, got both"),
    ],
)
def test_sweeps_that_cannot_be_made_are_refused_before_anything_runs(tmp_path: Path, sweep: str, said: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(f"name: s\ntitle: S\nseeds: [0]\nscores: [efficacy]\nsweep: {sweep}\n")
    with pytest.raises(KeditError, match=said):
        read(path)


def test_a_sweep_replaces_that_of_the_file_it_extends(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(
        "name: s\ntitle: S\nseeds: [0]\nscores: [efficacy]\nsweep: {model.init_args.v_lr: [0.1, 0.2]}\n"
    )
    (tmp_path / "two.yaml").write_text("extends: one.yaml\nsweep: {data.stop: [2, 3]}\n")
    found = read(tmp_path / "two.yaml")
    assert found["sweep"] == {"data.stop": [2, 3]}
    assert found["variants"] == {"2": {"data": {"stop": 2}}, "3": {"data": {"stop": 3}}}
    (tmp_path / "three.yaml").write_text("extends: one.yaml\nvariants: {mine: {data: {stop: 4}}}\n")
    found = read(tmp_path / "three.yaml")
    assert found["variants"] == {"mine": {"data": {"stop": 4}}}
    assert not found["sweep"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("config:", "expected config to be a file, or a list of them, got None"),
        ("variants: {mine: {model: }}", "variant 'mine': expected model to be a mapping, got None"),
    ],
)
def test_empty_blocks_are_one_line(tmp_path: Path, more: str, said: str) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text(f"name: s\ntitle: S\nseeds: [0]\nscores: [efficacy]\n{more}\n")
    with pytest.raises(KeditError, match=said):
        read(path)
