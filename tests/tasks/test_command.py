"""`kedit tasks` in this process: the almanac with few items, unedited and edited."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kedit_lightning.models import LanguageModel
from kedit_lightning.tasks import TASKS, Tasks
from tests.commandline import done, kedit
from tests.families import save_tiny
from tests.updates import low_rank, write_run

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs/tasks").glob("*.yaml"))


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


def curves(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_unedited_and_edited(tmp_path):
    base = LanguageModel()
    commits = [([3, 4], 0, [low_rank(base, layer, layer, rank=64) for layer in (2, 3)]), ([5], 0, [low_rank(base, 5)])]
    run = write_run(tmp_path / "run", base, commits)
    args = ("tasks", "--config", CONFIGS[0], "--tasks.names=[questions, perplexity]", "--tasks.items=8")
    result = done(*args, "--delta", run.path, "--save_dir", tmp_path, "--accelerator=cpu")
    folder = tmp_path / "tasks_almanac" / "version_0"
    report = json.loads((folder / "tasks.json").read_text())
    assert (report["edits"], report["base"]) == (3, "almanac")
    tasks = Tasks(["questions", "perplexity"], items=8)
    assert report["pre"] == tasks.evaluate(base)
    for _, deltas, _ in run.standing():
        for delta in deltas:
            base.write(delta.name, delta.update)
    assert report["post"] == tasks.evaluate(base)
    share = report["post"]["questions"]["score"] / report["pre"]["questions"]["score"]
    assert report["retained"] == {"questions": share, "mean": share}
    assert share < 1 < report["post"]["perplexity"]["score"] / report["pre"]["perplexity"]["score"]
    assert f"{100 * share:.1f} %" in result.out
    assert "3 edits" in result.out
    found = curves(folder)
    assert [step for step, _ in found["tasks/questions"]] == [0, 3]
    assert found["tasks/perplexity"][1][1] == pytest.approx(report["post"]["perplexity"]["score"])
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["tasks"]["items"] == 8
    again = done("tasks", "--config", folder / "config.yaml", "--delta=null")
    assert "after" not in again.out
    second = json.loads((tmp_path / "tasks_almanac" / "version_1" / "tasks.json").read_text())
    assert second["pre"] == report["pre"]
    assert "post" not in second


@pytest.mark.parametrize(
    ("args", "status", "reason"),
    [
        (["--tasks.names=[rtee]"], 2, "tasks.names: expected one of 'nli', .*, got rtee"),
        (["--tasks.names=[rte]", "--tasks.sources.rte=bad.tsv"], 1, r"bad\.tsv: no such file"),
        (["--tasks.sources.rte=a.tsv"], 1, "tasks.sources: 'rte' is not among tasks.names"),
        (["--delta=nowhere"], 1, "nowhere"),
        (["--tasks.scorer=loose"], 2, "tasks.scorer"),
    ],
)
def test_one_line_says_what_is_wrong_and_nothing_is_left(tmp_path, args, status, reason):
    result = kedit("tasks", "--save_dir", tmp_path, *args)
    assert result.status == status
    lines = [line for line in result.err.splitlines() if "Loading weights" not in line]
    assert len(lines) == 1
    assert re.search(reason, lines[0])
    assert list(tmp_path.iterdir()) == []


RECORDS = {
    "rte": {"sentence1": "It rains.", "sentence2": "It is wet.", "label": "entailment"},
    "nq": {"question": "who won?", "answer": ["Ann"], "output": ["Ann won."]},
    "samsum": {"dialogue": "A: Hi", "summary": "They greet."},
    "sst2": {"sentence": "fine", "label": "0"},
    "perplexity": {"text": "It rains and it rains."},
    "glue_mmlu": {"question": "Which?", "choices": ["w", "x", "y", "z"], "answer": 2},
    "glue_mrpc": {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 1},
}
LIKE = {"glue_nli": "rte", "glue_rte": "rte", "glue_sst": "sst2", "glue_cola": "sst2"}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_runs(tmp_path, name):
    """By the command in its first line, on a tiny stand-in and own records where it asks for the network."""
    command, method, *args = shlex.split((ROOT / name).read_text().splitlines()[0].removeprefix("# "))
    assert (command, method, args) == ("kedit", "tasks", ["--config", name])
    content = yaml.safe_load((ROOT / name).read_text())
    overrides = {"save_dir": tmp_path}
    if content["base"]["name"] != "almanac":
        overrides["base.name"] = save_tiny("gpt2", tmp_path / "base")
        for task in content["tasks"]["names"]:
            source = tmp_path / f"{task}.json"
            source.write_text(json.dumps([RECORDS[LIKE.get(task, task)]] * 12))
            overrides[f"tasks.sources.{task}"] = source
    else:
        overrides |= {"tasks.items": 2}
    done(method, *args, *(f"--{key}={value}" for key, value in overrides.items()))
    (file,) = tmp_path.rglob("tasks.json")
    report = json.loads(file.read_text())
    assert list(report["pre"]) == content["tasks"]["names"]
    assert set(report["pre"]) <= set(TASKS) | {"perplexity"}
    assert all(score["skipped"] == 0 for score in report["pre"].values())
