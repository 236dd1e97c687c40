"""`kedit scale`: the run directory, the curve, and going on after an end of any kind."""

from __future__ import annotations

import csv
import json
import random
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kedit_lightning.callbacks.figures import scaling
from kedit_lightning.errors import KeditError
from kedit_lightning.metrics import Evaluator, interval_over_runs
from kedit_lightning.models import LanguageModel
from kedit_lightning.scaling import Scaling, log_scale
from tests.commandline import World, done, kedit
from tests.editors.fitting import make
from tests.families import EDITS, tiny_base
from tests.test_trainer import data, measuring
from tests.updates import bits, same_bits

ASKED = ("--counts=[1, 3]", "--seeds=[0, 1]")


@pytest.fixture(scope="module")
def config(world: World) -> Path:
    return world.config("ROME")


@pytest.fixture(scope="module")
def whole(world: World, config: Path) -> Path:
    """A scaling run of two numbers of edits with two seeds."""
    done("scale", "--config", config, "--trainer.name", "whole", *ASKED)
    return world.logs / "whole" / "version_0"


@pytest.fixture
def run(whole: Path, world: World, request: pytest.FixtureRequest) -> Path:
    """A copy of it under a name of its own."""
    name = request.node.name.replace("[", "-").rstrip("]")
    return Path(shutil.copytree(whole, world.logs / name / "version_0"))


def points(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "scaling.jsonl").read_text().splitlines()]


def rows(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "scaling.csv").open()))


def test_the_papers_numbers_of_edits() -> None:
    """As printed in spec/evaluation.md 4.2."""
    printed = [1, 2, 3, 6, 10, 18, 32, 56, 100, 178, 316, 562, 1000, 1778, 3162, 5623, 10000]
    assert log_scale(10_000) == log_scale(12_800) == printed
    assert log_scale(9_999) == printed[:-1]
    assert log_scale(4) == [1, 2, 3]


def test_the_run_directory(whole: Path) -> None:
    there = {path.name for path in whole.iterdir()}
    events = {name for name in there if name.startswith("events.out.tfevents")}
    kept = {"config.yaml", "contexts.json", "scaling.json", "scaling.jsonl", "scaling.csv", "scaling.png"}
    assert there == kept | events, "no updates are kept"
    found = points(whole)
    assert [(point["edits"], point["seed"]) for point in found] == [(0, None), (1, 0), (1, 1), (3, 0), (3, 1)]
    for point in found:
        assert set(point["scores"]) == {"ES", "GS", "LS", "Score", "R-specificity"}
        assert point["scores"]["ES"] == point["metrics"]["efficacy"]["mean"]
        assert point["scores"]["Score"] == point["metrics"]["score3"]["mean"]
        assert point["metrics"]["efficacy"]["n"] == point["edits"] or point["edits"] == 0
    assert (whole / "scaling.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    accumulator = EventAccumulator(str(whole))
    accumulator.Reload()
    assert "scaling" in accumulator.Tags()["images"]


def test_the_table_holds_means_and_intervals_over_seeds(whole: Path) -> None:
    found = rows(whole)
    assert [(row["edits"], row["runs"]) for row in found] == [("1", "2"), ("3", "2")]
    for row in found:
        for name in ("ES", "GS", "LS", "Score"):
            runs = [point["scores"][name] for point in points(whole) if str(point["edits"]) == row["edits"]]
            mean, half = interval_over_runs(runs)
            assert (float(row[name]), float(row[f"{name}_ci95"])) == pytest.approx((mean, half), abs=1e-6)


@pytest.mark.parametrize("width", [80, 120])
def test_show_and_the_run_itself_print_the_table(
    run: Path, world: World, config: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    printed = done("scale", "--config", config, "--trainer.name", run.parent.name, *ASKED).out
    shown = done("show", run.parent).out
    assert shown.strip()
    assert printed.startswith(shown), "then the run directory"
    assert "unfinished" not in shown
    assert "ES efficacy, GS generalization" in shown
    found = {line.split()[0]: line for line in shown.splitlines() if line.split()[:1] in (["1"], ["3"], ["none"])}
    assert set(found) == {"none", "1", "3"}
    for row in rows(run):
        numbers = [float(part) for part in found[row["edits"]].replace("±", " ").split() if part != "–"]
        means = [100 * float(row[name]) for name in ("ES", "GS", "LS", "Score")]
        assert numbers[:2] == [float(row["edits"]), 2.0]
        given = numbers[2::2] if width == 120 else numbers[2:]
        assert given[:4] == pytest.approx(means, abs=0.051)


def test_show_of_a_scaling_run_without_points(run: Path) -> None:
    (run / "scaling.jsonl").unlink()
    result = kedit("show", run)
    assert (result.status, result.err.count("\n")) == (1, 1)
    assert "expected a scaling run with points in scaling.jsonl, found none" in result.err


def test_lines_that_coincide_are_all_seen() -> None:
    """Points of equal scores lie beside each other, each with a marker of its own."""
    names = ("ES", "GS", "LS", "Score", "R-specificity")
    scores = {key: value for name in names for key, value in ((name, 1.0), (f"{name}_ci95", 0.0))}
    points = [{"edits": edits, "runs": 3, **scores} for edits in (10, 100)]
    figure = scaling("", points, dict.fromkeys(names))
    lines = figure.axes[0].get_lines()
    assert len({line.get_marker() for line in lines}) == len(lines) == 5
    starts = sorted(float(line.get_xdata()[0]) for line in lines)  # type: ignore[index,arg-type]
    assert all(1.01 < right / left < 1.05 for left, right in pairwise(starts))
    assert starts[2] == 10


def test_a_point_is_one_batch_on_the_unedited_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first edits of the seed's shuffle, whatever batch size stands in the configuration."""
    base = tiny_base("gpt2")
    editor, before, edits = make("ROME", base), bits(base), data(EDITS[:3], batch_size=1, restore_every=1)
    begun: list[list[int]] = []
    measured: list[bool] = []
    begin, update = editor.begin, Evaluator.update

    def beginning(batch: Any, pass_: int = 0) -> None:
        assert same_bits(bits(base), before)
        begun.append([edit.case_id for edit in batch])
        begin(batch, pass_)

    def measuring_(self: Evaluator, *args: Any, **settings: Any) -> Any:
        measured.append(same_bits(bits(base), before))
        return update(self, *args, **settings)

    monkeypatch.setattr(editor, "begin", beginning)
    monkeypatch.setattr(Evaluator, "update", measuring_)
    made = measuring(tmp_path)
    curve = made.scale(editor, edits, counts=[1, 2], seeds=[0, 5])
    assert [row["edits"] for row in curve] == [1, 2]
    expected = []
    for count in (1, 2):
        for seed in (0, 5):
            cases = [edit.case_id for edit in EDITS[:3]]
            random.Random(seed).shuffle(cases)
            expected.append(cases[:count])
    assert begun == expected
    assert measured == [True, False, False, False, False], "the unedited model once, then each edited one"
    assert same_bits(bits(base), before), "and unedited again at the end"


def test_the_weights_go_back_if_something_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("gpt2")
    before = bits(base)
    monkeypatch.setattr(
        Scaling, "_score", lambda _, title, edits: {"scores": {"ES": 1.0}} if title == "before" else 1 / 0
    )
    made = measuring(tmp_path)
    with pytest.raises(ZeroDivisionError):
        made.scale(make("ROME", base), data(EDITS[:3]), counts=[2], seeds=[0])
    assert same_bits(bits(base), before)


# ---------------------------------------------------------------------- going on


def test_what_is_there_is_not_measured_again(run: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scaling, "_measure", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(Scaling, "_prepare", lambda *_: pytest.fail("prepared for nothing"))
    before = points(run)
    done("scale", "--config", config, "--trainer.name", run.parent.name, *ASKED)
    assert points(run) == before
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]


def test_a_killed_run_goes_on_with_what_is_missing(run: Path, config: Path) -> None:
    whole = points(run)
    lines = (run / "scaling.jsonl").read_text().splitlines(keepends=True)
    (run / "scaling.jsonl").write_text("".join(lines[:3]))
    done("scale", "--config", config, "--trainer.name", run.parent.name, *ASKED)
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    for point, other in zip(points(run), whole, strict=True):
        assert (point["edits"], point["seed"], point["scores"]) == (other["edits"], other["seed"], other["scores"])


def test_more_numbers_and_seeds_are_added(run: Path, config: Path) -> None:
    done("scale", "--config", config, "--trainer.name", run.parent.name, "--counts=[1, 2]", "--seeds=[0, 2]")
    assert [(row["edits"], row["runs"]) for row in rows(run)] == [("1", "3"), ("2", "2"), ("3", "2")]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("--model.init_args.v_lr=0.1",), "model.v_lr: 0.5 there, 0.1 here"),
        (("--data.stop=3",), "edits: "),
        (("--trainer.evaluation.generation=true",), "evaluation.generation: "),
    ],
)
def test_other_settings_are_refused(run: Path, config: Path, settings: tuple[str, ...], named: str) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    result = kedit("scale", "--config", config, "--trainer.name", run.parent.name, *ASKED, *settings)
    assert result.status == 1
    assert result.err.count("\n") == 1
    assert f"holds a scaling run of other settings ({named}" in result.err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("--counts=[3, 1]", "counts: expected ascending numbers from 1 to 4, the edits there are, got [3, 1]"),
        ("--counts=[2, 2]", "counts: expected ascending numbers from 1 to 4"),
        ("--counts=[0, 1]", "counts: expected ascending numbers from 1 to 4"),
        ("--counts=[1, 5]", "counts: expected ascending numbers from 1 to 4"),
        ("--counts=[]", "counts: expected ascending numbers from 1 to 4"),
        ("--seeds=[]", "seeds: expected at least one, each once and none below 0, got []"),
        ("--seeds=[1, 1]", "seeds: expected at least one, each once"),
        ("--seeds=[-1, 1]", "seeds: expected at least one, each once and none below 0"),  # -1 shuffles as 1
    ],
)
def test_numbers_that_mean_nothing(world: World, config: Path, asked: str, message: str) -> None:
    result = kedit("scale", "--config", config, "--trainer.name", "refused", asked)
    assert (result.status, result.err.count("\n")) == (1, 1)
    assert message in result.err
    assert not (world.logs / "refused").exists()


def test_edits_that_contradict_each_other(tmp_path: Path, gpt2_base: LanguageModel) -> None:
    """Also where the stream would make them one by one."""
    first = EDITS[0].as_record()
    second = json.loads(json.dumps(first))
    second["requested_rewrite"]["target_new"]["str"] = "Ulm"
    second["case_id"] = 77
    edits = data([])
    edits.given = [first, second]
    with pytest.raises(KeditError, match="and 77"):
        measuring(tmp_path).scale(make("ROME", gpt2_base), edits)
