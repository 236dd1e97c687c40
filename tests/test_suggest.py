"""`kedit suggest`: its rules, what it leaves behind, and how it ends where there is nothing to go by."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import suggest as benchmark
from kedit_lightning.edits import Edit
from kedit_lightning.errors import KeditError
from kedit_lightning.lines import Record
from kedit_lightning.models import LanguageModel
from kedit_lightning.places import Place, ranked, spaced, steepest
from kedit_lightning.probes.tracing import Tracer
from kedit_lightning.run import RunDirectory
from kedit_lightning.suggesting import BLOCKS, Suggestion
from tests.commandline import World, done, flat, jsonl, kedit
from tests.editors.fitting import bits, make, same
from tests.families import LAYERS, tiny_base
from tests.test_trainer import data, measuring

PROMPTS = (
    *("{} was born in", "The mother tongue of {} is", "At home {} speaks", "{} plays the", "Where does {} live?"),
    *("Every morning {} goes to work at", "Everybody in the valley knows {}, who became the"),
)
FEW = ("--facts=5", "--edits=2", "--tried=2")


def knowing(base: LanguageModel) -> list[Edit]:
    """Edits whose prompts a random model answers with a word, which is their present answer."""
    found = list[Edit]()
    for i, prompt in enumerate(PROMPTS):
        edit = Edit(prompt, "Velora Quint", "Ulm", case_id=i, paraphrase_prompts=("Velora Quint lives in",))
        said = base.model(torch.tensor([base.encode(edit.text).ids])).logits[0, -1].argmax()
        word = str(base.tokenizer.decode([int(said)])).strip()
        if word and word.isascii() and word.isprintable():
            found.append(replace(edit, target_true=word, neighborhood_prompts=("Tobin lives in",)))
    return found


@pytest.fixture(scope="module")
def facts(world: World) -> Path:
    """A file of four facts, of which the model knows all but the last."""
    base = LanguageModel(str(world.base))
    known: list[Record] = [
        {"prompt": edit.prompt, "subject": edit.subject, "target_new": "Ulm", "target_true": edit.target_true,
         "paraphrase_prompts": edit.paraphrase_prompts, "neighborhood_prompts": edit.neighborhood_prompts}
        for edit in knowing(base)[:3]
    ]  # fmt: skip
    assert len(known) == 3
    return jsonl(world.folder / "facts.jsonl", [*known, flat(2)])


def suggested(world: World, facts: Path, editor: str, name: str, **settings: Any) -> tuple[Path, str]:
    """Run the command on the facts; its directory and what it said."""
    config = world.config(editor, **settings)
    content = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**content, "data": {"dataset": "jsonl", "path": str(facts)}}))
    shown = done("suggest", "--config", config, "--trainer.name", name, *FEW)
    return world.logs / name / "version_0", shown.out


@pytest.fixture(scope="module")
def rome(world: World, facts: Path) -> tuple[Path, str]:
    """What is suggested for ROME: the run's directory, and what was said."""
    return suggested(world, facts, "ROME", "rome_suggested")


def test_an_interrupted_one_goes_on_as_if_it_had_never_stopped(
    world: World, facts: Path, rome: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, lines, tried = rome[0], Suggestion.lines, list[Place]()

    def interrupted(self: Suggestion, place: Place, *args: Any) -> list[dict[str, float]]:
        if len(tried) == 1:
            raise KeyboardInterrupt
        tried.append(place)
        return lines(self, place, *args)

    config = whole / "config.yaml"
    command = ("suggest", "--config", config, "--trainer.name", "rome_interrupted")
    with monkeypatch.context() as patch:
        patch.setattr(Suggestion, "lines", interrupted)
        assert kedit(*command).status == 130
    run = world.logs / "rome_interrupted" / "version_0"
    assert not (run / "suggested.yaml").is_file()
    with RunDirectory(run).locked():
        other = kedit(*command)
    assert (other.status, other.err.count("\n")) == (1, 1)
    assert "another process is at work on this run" in other.err
    with monkeypatch.context() as patch:
        patch.setattr(Suggestion, "lines", lambda *args: tried.append(args[1]) or lines(*args))
        patch.setattr(Tracer, "__call__", None)  # what was traced is not traced again
        assert "which was interrupted" in done(*command).out
    rows = (run / "sweep.csv").read_text()
    assert len(tried) == len(set(tried)) == len(rows.splitlines()) - 1
    assert rows == (whole / "sweep.csv").read_text()
    chosen = [yaml.safe_load((each / "suggested.yaml").read_text())["model"] for each in (whole, run)]
    assert chosen[0] == chosen[1]


def test_rome_is_tried_where_the_trace_points_and_fit_takes_the_choice(world: World, rome: tuple[Path, str]) -> None:
    run, shown = rome
    trace = [row for row in csv.DictReader((run / "causal_trace_subject.csv").open()) if row["token"] == "ls"]
    preferred = sorted(trace, key=lambda row: -float(row["mean"]))[:2]
    rows = list(csv.DictReader((run / "sweep.csv").open()))
    assert [row["layers"] for row in rows[:2]] == [row["layer"] for row in preferred]
    assert all(row["edits"] == "2" for row in rows)
    best = max(rows, key=lambda row: float(row["score"]))
    path = run / "suggested.yaml"
    lines, content = path.read_text().splitlines(), yaml.safe_load(path.read_text())
    assert lines[0] == f"# kedit fit --config {path}"
    assert "# 3 of 4 facts were used" in lines[2]
    assert "r_specificity: not part of that score" in path.read_text()  # these records have no such prompts
    assert content["model"]["init_args"]["layers"] == [int(best["layers"])]
    given = yaml.safe_load((run / "config.yaml").read_text())
    assert {name: content[name] for name in BLOCKS if name != "model"} == {
        name: given[name] for name in BLOCKS if name != "model"
    }
    tried = [row["layers"] for row in rows]
    for layer in (int(best["layers"]) - 1, int(best["layers"]) + 1):
        assert (str(layer) in tried) == (0 <= layer < LAYERS), "those beside the best are tried"
    assert f"layers [{best['layers']}]: of {len(rows)} places tried on 2 facts" in shown
    images = {"causal_trace_subject.png", "sweep.png"}
    assert images <= {one.name for one in run.iterdir()}
    done("fit", "--config", path, "--trainer.name=rome_as_suggested", "--data.stop=1")
    assert (world.logs / "rome_as_suggested" / "version_0" / "metrics.json").is_file()


def test_top_is_tried_with_several_l_a(world: World, facts: Path) -> None:
    run, _ = suggested(world, facts, "TOP", "top_suggested", layers=[0])
    rows = list(csv.DictReader((run / "sweep.csv").open()))
    tried: dict[str, set[str]] = {}
    for row in rows:
        tried.setdefault(row["layers"], set()).add(row["l_a"])
    first = {layer: {*map(str, spaced(int(layer) + 1, LAYERS - 1, 2))} for layer in tried}
    assert all(tried[layer] >= l_a for layer, l_a in first.items())
    assert len(tried) == 2
    best = max(rows, key=lambda row: float(row["score"]))
    at_best = {int(row["l_a"]) for row in rows if row["layers"] == best["layers"]}
    beside = {int(best["l_a"]) - 1, int(best["l_a"]) + 1}
    assert at_best >= {l_a for l_a in beside if int(best["layers"]) < l_a < LAYERS}
    settings = yaml.safe_load((run / "suggested.yaml").read_text())["model"]["init_args"]
    assert settings["layers"] == [int(best["layers"])]
    assert settings["rel_feat_layer"] == int(best["l_a"]) - int(best["layers"])
    done("fit", "--config", run / "suggested.yaml", "--print_config")


@pytest.mark.slow
def test_jeep_takes_its_high_layers_from_the_contrast(tmp_path: Path) -> None:
    base = tiny_base("llama")
    before, editor, made = bits(base), make("JEEP", base, layers_low=[0, 1], layers_high=[3]), measuring(tmp_path)
    path = made.suggest(editor, data(knowing(base)), facts=4)
    settings = yaml.safe_load(path.read_text())["model"]["init_args"]  # from Python there is no more than the layers
    assert set(settings) == {"layers_low", "layers_high"}
    rows = list(csv.DictReader((path.parent / "sweep.csv").open()))
    best = max(rows, key=lambda row: float(row["score"]))
    assert [best["layers"], best["high"]] == [", ".join(map(str, settings[name])) for name in settings]
    assert (rows[0]["layers"], rows[0]["high"]) in {("0, 1", "2"), ("0, 1", "3"), ("1, 2", "3")}
    assert len(rows) > 1, "those beside it are tried"
    assert settings["layers_high"][0] > settings["layers_low"][-1]
    assert (path.parent / "contrast_final_norm.png").is_file()
    assert (path.parent / "sweep.png").is_file()
    assert (editor.layers_low, editor.layers_high) == ([0, 1], [3])
    assert same(base, before)


@pytest.mark.parametrize(
    ("editor", "asked", "message"),
    [
        ("ROME", ("--facts=2",), "no usable prompt: expected the model's next token to be the whole target_true"),
        ("ROME", ("--tried=0",), "suggest: expected at least one fact, edit and place to try, got 100, 40, 0"),
        ("FT", (), "suggest: expected ROME, TOP, MEMIT, PMET, AlphaEdit or JEEP, got FT"),
    ],
)
def test_where_nothing_can_be_suggested_it_says_so_in_one_line(
    world: World, editor: str, asked: tuple[str, ...], message: str
) -> None:
    config = world.config("ROME")
    if editor != "ROME":
        content = yaml.safe_load(config.read_text())
        content["model"] = {"class_path": editor, "init_args": {"layers": [1]}}
        config.write_text(yaml.safe_dump(content))
    refused = kedit("suggest", "--config", config, "--trainer.name=refused", *asked)
    assert refused.status == 1
    assert message in refused.err
    assert refused.err.count("\n") == 1
    assert not list((world.logs / "refused").glob("version_*/suggested.yaml"))


def test_a_place_is_left_again_whatever_happens() -> None:
    editor: Any = make("TOP", tiny_base("gpt2"), layers=[1], rel_feat_layer=1)
    place = Place((0, 1), l_a=3)

    def fail() -> None:
        with place.taken(editor):
            assert (editor.layers, editor.l_a) == ([0, 1], {0: 3, 1: 3})
            raise KeditError

    with pytest.raises(KeditError):
        fail()
    assert (editor.layers, editor.l_a) == ([1], {1: 2})


def test_the_rules() -> None:
    assert ranked([0.2, 0.2, 0.9], 1, 1) == [(0,), (1,)]  # the last may not be taken; of equals the lower
    assert ranked([0.5, 0.1, 0.4, 0.3], 2, 3)[0] == (2, 3)
    assert ranked([0.5], 1, -1) == []
    assert steepest([0.0, 0.9, 0.9, 0.95], 1, below=0) == (2,)  # what rises most lies too low
    assert steepest([0.0, 0.1, 0.2, 0.6, 0.9], 2, below=1) == (2, 3)
    assert spaced(1, 10, 4) == [10, 7, 4, 1]
    assert Place((4, 5), l_a=9).settings == {"layers": [4, 5], "rel_feat_layer": [5, 4]}
    assert Place((3,)).settings == {"layers": [3]}


def test_the_benchmark_compares_on_the_same_facts() -> None:
    half, full = torch.tensor([[1.0, 1, 1, 0.25]] * 6), torch.ones(6, 4)
    half[0, 1] = torch.nan  # a record without such prompts
    assert benchmark.difference(full, full) == (0, 0, 0)
    points = 100 * (1 - 4 / (3 + 1 / 0.25))
    assert benchmark.difference(full, half) == pytest.approx((points, points, points), abs=1e-4)
    base = tiny_base("gpt2")
    assert len(benchmark.places(make("ROME", base))) == LAYERS
    tops = benchmark.places(make("TOP", base, layers=[1], rel_feat_layer=1))
    assert {(place.layers[0], place.l_a) for place in tops} == {(a, b) for b in range(LAYERS) for a in range(b)}
    assert len(tops) == 6
