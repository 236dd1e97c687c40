"""The callback that measures general abilities at checkpoints."""

import json
from types import SimpleNamespace

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback

from kedit_lightning.callbacks import TaskCurves
from kedit_lightning.callbacks.figures import Figures
from kedit_lightning.models import LanguageModel
from kedit_lightning.run import RunDirectory
from kedit_lightning.tasks import Tasks, scores
from tests.commandline import World, write
from tests.updates import low_rank


class Logger:
    def __init__(self):
        self.logged = []

    def log_metrics(self, metrics, step):
        self.logged.append((step, metrics))


@pytest.fixture(scope="module")
def base():
    return LanguageModel()


def stream(folder, base):
    trainer = SimpleNamespace(logger=Logger(), run=RunDirectory(folder))
    return trainer, SimpleNamespace(base=base)


def checkpoint(callback, trainer, editor, edits):
    """As the stream does it: the record is kept once all callbacks have added to it."""
    record = {"edits": edits}
    callback.on_checkpoint(trainer, editor, record)
    trainer.run.checkpoints.append([record])
    return record


def test_a_curve_over_the_number_of_edits_also_where_it_is_resumed(base, tmp_path):
    tasks = Tasks(["questions", "perplexity"], items=6)
    trainer, editor = stream(tmp_path, base)
    callback = TaskCurves(tasks)
    callback.on_stream_start(trainer, editor, 5)
    first = checkpoint(callback, trainer, editor, 0)
    assert first["tasks"] == scores(tasks.evaluate(base))
    assert first["retained"] == {"questions": 1.0, "mean": 1.0}
    deltas = [low_rank(base, layer, layer, rank=64) for layer in (2, 3)]
    with base.transaction():
        for delta in deltas:
            base.write(delta.name, delta.update)
        later = checkpoint(callback, trainer, editor, 5)
        assert later["tasks"]["perplexity"] > first["tasks"]["perplexity"]
        share = later["tasks"]["questions"] / first["tasks"]["questions"]
        assert share < 1
        assert later["retained"] == {"questions": share, "mean": share}
        assert trainer.logger.logged[1][0] == 5
        names = ("tasks/questions", "tasks/perplexity", "retained/questions", "retained/mean")
        assert list(trainer.logger.logged[1][1]) == list(names)

        trainer, editor = stream(tmp_path, base)  # the same run, resumed: still against the unedited model
        with (tmp_path / "checkpoints.jsonl").open("a") as file:
            file.write('{"edits": 6, "ta')  # cut off by a crash
        callback.on_stream_start(trainer, editor, 5)
        record = {"edits": 7}
        callback.on_checkpoint(trainer, editor, record)
        assert record["retained"] == later["retained"]

        trainer, editor = stream(tmp_path / "new", base)  # another run of the same callback
        callback.on_stream_start(trainer, editor, 5)
        callback.on_checkpoint(trainer, editor, record)
        assert record["retained"]["mean"] == 1
    base.restore()


def test_it_is_made_from_a_configuration():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    settings = {"class_path": "TaskCurves", "init_args": {"tasks": {"names": ["nli"], "items": 3}}}
    parsed = parser.parse_object({"callbacks": [settings]})
    (callback,) = parser.instantiate(parsed).callbacks
    assert isinstance(callback, TaskCurves)
    assert (callback.tasks.names, callback.tasks.items) == (("nli",), 3)


def test_a_stream_keeps_the_curve(tmp_path, monkeypatch):
    monkeypatch.setattr(Figures, "on_stream_end", lambda *_: None)
    world = World(tmp_path)
    records = [{"sentence": f"film {i}", "label": i % 2} for i in range(14)]
    (tmp_path / "sst.json").write_text(json.dumps(records))
    tasks = {"names": ["glue_sst", "perplexity"], "items": 4, "scorer": "likelihood"}
    tasks["sources"] = {"glue_sst": str(tmp_path / "sst.json")}
    callback = {"class_path": "TaskCurves", "init_args": {"tasks": tasks}}
    config = world.config()
    content = yaml.safe_load(config.read_text())
    content["trainer"] |= {"callbacks": [callback], "evaluate_at": [0, 2]}
    content["data"] |= {"restore_every": None, "stop": 2}
    run = RunDirectory(world.fit(write(config, content), name="curve"))
    first, last = run.checkpoints.records()
    assert (first["edits"], last["edits"]) == (0, 2)
    assert set(first["tasks"]) == {"glue_sst", "perplexity"}
    assert first["tasks"]["perplexity"] != last["tasks"]["perplexity"]
    assert "mean" in last["retained"]
    base = LanguageModel(str(world.base))
    for _, deltas, _ in run.standing():
        for delta in deltas:
            base.write(delta.name, delta.update)
    again = scores(Tasks(**tasks).evaluate(base))
    assert last["tasks"] == pytest.approx(again, rel=1e-5)
