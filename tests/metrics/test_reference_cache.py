import json

import pytest

from kedit_lightning.cache import cache_dir
from kedit_lightning.metrics.evaluator import Evaluator
from kedit_lightning.metrics.reference_cache import ReferenceCache
from kedit_lightning.models import LanguageModel

LINES = [{"answer": "Dütch", "before": {"efficacy": 1.0}, "relations": [[3, 4]]}, {"answer": "", "before": {}}]
ABOUT = {"weights": "abc", "edits": "def"}


def before(run):
    return (run / "before.jsonl").read_bytes()


def files(world):
    return sorted((cache_dir() / "references").glob("*"))


@pytest.fixture
def measured(monkeypatch):
    """How often a model was asked before the first edit."""
    seen = []
    answers = Evaluator.answers
    update = Evaluator.update
    logits = LanguageModel.logits

    def counted(function):
        def call(self, *args, **kwargs):
            seen.append(function.__name__)
            return function(self, *args, **kwargs)

        return call

    for owner, function in ((Evaluator, answers), (Evaluator, update), (LanguageModel, logits)):
        monkeypatch.setattr(owner, function.__name__, counted(function))
    return seen


def test_a_second_run_measures_nothing_before(world, measured):
    config = world.config()
    first = world.fit(config, name="cached")
    asked = [measured.count(name) for name in ("answers", "update", "logits")]
    measured.clear()
    second = world.fit(config, name="cached")
    again = [measured.count(name) for name in ("answers", "update", "logits")]
    assert again[0] == asked[0] - 1
    assert again[1] == asked[1] - 1
    assert again[2] < asked[2]
    assert before(second) == before(first)
    assert len(files(world)) == 1


def test_what_the_numbers_depend_on_has_a_file_of_its_own(world):
    config = world.config()
    world.fit(config, name="mine")
    there = len(files(world))
    # No subject comes twice: the same questions, of the same model.
    world.fit(config, "--data.batch_size", 4, "--model.v_lr", 0.1, name="mine")
    assert len(files(world)) == there
    for setting, value in (("data.stop", 3), ("trainer.evaluation.max_tokens", 100)):
        world.fit(config, f"--{setting}", value, name="mine")
        there += 1
        assert len(files(world)) == there, setting


def test_the_cache_can_be_left_alone(world):
    there = files(world)
    world.fit(world.config(), "--trainer.evaluation.cache", "false", "--data.stop", 2, name="alone")
    assert files(world) == there


def test_damaged_files_are_measured_again(world, caplog):
    config = world.config()
    first = world.fit(config, "--data.stop", 1, name="damaged")
    for path in files(world):
        path.write_bytes(path.read_bytes().replace(b'"answer": "', b'"answer": "x'))
    second = world.fit(config, "--data.stop", 1, name="damaged")
    assert before(second) == before(first)
    assert "damaged" in caplog.text


def test_lines_come_back_as_they_were(tmp_path):
    cache = ReferenceCache(tmp_path)
    assert cache.load(ABOUT) is None
    cache.keep(ABOUT, LINES)
    assert cache.load(ABOUT) == LINES
    assert cache.load(ABOUT | {"edits": "x"}) is None


@pytest.mark.parametrize(
    "content",
    ["", "{}\n", "no json\n", json.dumps({"about": {"weights": "other"}, "lines": ""}) + "\n", "[1]\n{}\n"],
)
def test_foreign_files_are_not_taken(tmp_path, content, caplog):
    cache = ReferenceCache(tmp_path)
    cache.path(ABOUT).write_text(content)
    assert cache.load(ABOUT) is None
    assert "measured again" in caplog.text


def test_a_file_that_lost_a_line_is_not_taken(tmp_path, caplog):
    cache = ReferenceCache(tmp_path)
    cache.keep(ABOUT, LINES)
    path = cache.path(ABOUT)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert cache.load(ABOUT) is None
    assert "damaged" in caplog.text


def test_where_nothing_can_be_kept_that_is_said(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    ReferenceCache(tmp_path / "file" / "below").keep(ABOUT, LINES)
    assert "Going on without" in caplog.text
