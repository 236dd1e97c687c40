"""The collapse watch: what it writes, when it warns or stops, and that it goes on after a kill."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from kedit_lightning.callbacks import CollapseWatch, EditCallback, Thresholds
from kedit_lightning.callbacks.watch import retention
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.delta import load
from kedit_lightning.editors import Editor
from kedit_lightning.errors import KeditError
from kedit_lightning.metrics import Scorer
from kedit_lightning.metrics.drift import weight_drift
from kedit_lightning.metrics.perplexity import perplexity
from kedit_lightning.models import LanguageModel
from kedit_lightning.trainer import EditTrainer
from tests.commandline import World, done
from tests.editors.fitting import fit, make
from tests.families import EDITS, corpus, tiny_base
from tests.test_trainer import measuring

NONE = Thresholds(perplexity=None, retention=None)


def check(edits: int, **changes: Any) -> dict[str, Any]:
    drift = {"a": {"l1": 0.1, "frobenius": 0.2, "spectral": 0.3}, "b": {"l1": 0.0, "frobenius": 0.0, "spectral": 0.0}}
    return {"edits": edits, "drift": drift, "perplexity": 10.0, "retention": 1.0, "warnings": [], **changes}


@pytest.fixture
def texts(tmp_path: Path) -> str:
    path = tmp_path / "held_out.txt"
    path.write_text("\n".join(corpus()[:6]))
    return str(path)


# ---------------------------------------------------------------------- thresholds


@pytest.mark.parametrize(
    ("thresholds", "changes", "words"),
    [
        ({"perplexity": 1.2}, {"perplexity": 12.1}, ("perplexity", "12.1", "10", "1.2 times")),
        ({"retention": 0.1}, {"retention": 0.85}, ("85%", "100%", "10 points")),
        ({"l1": 0.05}, {}, ("l1 drift of a is 0.1", "0.05")),
        ({"frobenius": 0.1}, {}, ("frobenius drift of a is 0.2",)),
        ({"spectral": 0.1}, {}, ("spectral drift of a is 0.3",)),
        ({"perplexity": 1.2}, {"perplexity": float("nan")}, ("nan",)),
        ({"l1": 9.0}, {"drift": {"a": {"l1": 0.0}, "b": {"l1": float("nan")}}}, ("l1 drift of b is nan",)),
    ],
)
def test_what_crosses_a_threshold_is_said_in_a_sentence(
    thresholds: dict[str, float], changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    only = Thresholds(**{"perplexity": None, "retention": None, **thresholds})
    ((measure, sentence),) = only.crossed([check(0, retention=None), check(5), check(10, **changes)]).items()
    assert measure in thresholds
    assert sentence.startswith("after 10 edits ")
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize("changes", [{}, {"perplexity": 11.9}, {"retention": 0.91}, {"perplexity": None}])
def test_what_is_within_the_thresholds_is_not(changes: dict[str, Any]) -> None:
    history = [check(0, retention=None), check(5), check(10, **changes)]
    assert Thresholds(perplexity=1.2, retention=0.1, l1=0.2).crossed(history) == {}
    assert NONE.crossed([check(0), check(5, perplexity=1e9, retention=0.0)]) == {}


@pytest.mark.parametrize("wrong", [{"perplexity": 1.0}, {"retention": 0.0}, {"l1": -1.0}])
def test_a_threshold_that_every_model_crosses_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(KeditError, match=f"thresholds.{next(iter(wrong))}: expected more than"):
        Thresholds(**wrong)


@pytest.mark.parametrize("name", ["every", "n_texts", "sample"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(KeditError, match=f"CollapseWatch.{name}: expected at least 1, got 0"):
        CollapseWatch(**{name: 0})


# ---------------------------------------------------------------------- checks


def test_checks_say_what_the_weights_are(tmp_path: Path, gpt2_base: LanguageModel, texts: str) -> None:
    measured: dict[int, dict[str, Any]] = {}

    class Witness(EditCallback):
        def on_edits_committed(self, trainer: Any, editor: Editor, records: Any) -> None:
            base, n = editor.base, len(measured) + 1
            drift = {name: weight_drift(base.pristine(name), base.weight(name)) for name in editor.names()}
            facts = {edit.text: edit.target_new for edit in EDITS[:n]}
            scores = Scorer(base).score(list(facts), list(facts.values()))
            kept = (scores.n_correct == scores.n_tok).float().mean()
            measured[n] = {"drift": drift, "retention": float(kept), "perplexity": perplexity(base, lines)}

    lines = sorted(corpus()[:6])
    watch = CollapseWatch(every=2, thresholds=NONE, texts=texts)
    made = fit(make("ROME", gpt2_base, (1,)), EDITS[:5], tmp_path, Witness(), watch, batch_size=1)
    checks = made.run.health.records()
    assert [line["edits"] for line in checks] == [0, 2, 4, 5], "the end of the stream is checked too"
    assert set(checks[0]["drift"]) == {"transformer.h.1.mlp.c_proj.weight"}
    assert checks[0]["retention"] is None
    assert all(value == 0.0 for value in checks[0]["together"].values())
    for line in checks[1:]:
        want = measured[line["edits"]]
        assert line["drift"] == want["drift"]
        assert line["retention"] == pytest.approx(want["retention"])
        assert line["perplexity"] == pytest.approx(want["perplexity"], rel=1e-5)
        assert line["warnings"] == []
    edits = made.run.records()
    norms = [edits[i]["stages"][0]["delta/mlp"] for i in (2, 3, 4)]
    assert checks[2]["delta_norm"] == {"mlp": pytest.approx(sum(norms[:2]) / 2)}
    assert checks[3]["delta_norm"] == {"mlp": pytest.approx(norms[2])}
    assert checks[1]["perplexity"] != checks[0]["perplexity"]


def test_the_table_and_the_picture(tmp_path: Path, gpt2_base: LanguageModel, texts: str) -> None:
    watch = CollapseWatch(every=1, texts=texts)
    made = fit(make("MEMIT", gpt2_base, (0, 1)), EDITS[:3], tmp_path, watch, batch_size=1)
    with (made.run.path / "health.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["edits"] for row in rows] == ["0", "1", "2", "3"]
    assert rows[0]["retention"] == "", "nothing to retain"
    checks = made.run.health.records()
    assert [float(row["l1/together"]) for row in rows] == pytest.approx(
        [line["together"]["l1"] for line in checks], abs=1e-6
    )
    assert float(rows[3]["frobenius/transformer.h.0.mlp.c_proj.weight"]) > 0
    assert (made.run.path / "health.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_only_edits_since_the_last_restoration_are_asked_for(tmp_path: Path, gpt2_base: LanguageModel) -> None:
    watch = CollapseWatch(every=1, thresholds=NONE)
    asked: list[set[str]] = []

    class Witness(EditCallback):
        def on_edits_committed(self, trainer: Any, editor: Any, records: Any) -> None:
            assert watch._state is not None
            asked.append(set(watch._state.sample))

    fit(make("ROME", gpt2_base), EDITS[:4], tmp_path, watch, Witness(), batch_size=1, restore_every=2)
    texts = [edit.text for edit in EDITS]
    assert asked == [{texts[0]}, {texts[0], texts[1]}, {texts[2]}, {texts[2], texts[3]}]


def test_the_sample_depends_on_the_edits_alone_and_the_later_of_two_answers_counts() -> None:
    from kedit_lightning.callbacks.watch import _State
    from kedit_lightning.lines import Lines

    lines: list[dict[str, Any]] = [
        {"prompt": "{} is", "subject": f"S{i}", "target_new": "a", "group": 0, "stages": []} for i in range(30)
    ]
    lines += [{**lines[3], "target_new": "b"}, {**lines[4], "rejected": "not finite", "target_new": "c"}]
    at_once, one_by_one = (_State([], Lines(Path("none"))) for _ in range(2))
    at_once.add(lines, 40)
    assert at_once.sample["S3 is"] == "b"
    assert at_once.sample["S4 is"] == "a"
    assert (at_once.done, at_once.committed) == (32, 31)
    at_once = _State([], Lines(Path("none")))
    at_once.add(lines, 7)
    for line in lines:
        one_by_one.add([line], 7)
    assert len(at_once.sample) == 7
    assert set(at_once.sample) == set(one_by_one.sample)


def test_retention_is_the_share_of_whole_greedy_answers() -> None:
    base = tiny_base("llama")
    prompts = ["Velora Quint was born in", "Oskel Tamrin plays the"]
    top = Scorer(base).next_token(prompts)[1]
    first = [base.tokenizer.decode([token]).strip() for token in top.tolist()]
    scores = Scorer(base).score(prompts, first)
    facts = dict(zip(prompts, first, strict=True))
    assert retention(base, facts) == pytest.approx(float((scores.n_correct == scores.n_tok).float().mean()))
    assert retention(base, {prompts[0]: "zzz qqq"}) == 0.0


# ---------------------------------------------------------------------- warnings


def test_one_warning_a_crossing_not_a_check(
    tmp_path: Path, gpt2_base: LanguageModel, texts: str, caplog: pytest.LogCaptureFixture
) -> None:
    watch = CollapseWatch(every=1, thresholds=Thresholds(l1=1e-9, frobenius=1e-9, retention=None), texts=texts)
    with caplog.at_level(logging.WARNING, logger="kedit_lightning.callbacks.watch"):
        made = fit(make("ROME", gpt2_base), EDITS[:3], tmp_path, watch, batch_size=1)
    said = [r.getMessage() for r in caplog.records if r.name.endswith("watch") and "drift" in r.getMessage()]
    assert len([line for line in said if "frobenius" in line]) == 1
    assert all("\n" not in line for line in said)
    frobenius = [sum("frobenius" in line for line in check["warnings"]) for check in made.run.health.records()]
    assert frobenius == [0, 1, 1, 1], "each check keeps all that it found"


def test_stop_ends_the_stream_after_the_commit(tmp_path: Path, gpt2_base: LanguageModel) -> None:
    watch = CollapseWatch(every=2, thresholds=Thresholds(frobenius=1e-9), action="stop")
    made = fit(make("ROME", gpt2_base), EDITS[:5], tmp_path, watch, batch_size=1)
    assert [record["case_id"] for record in made.run.records()] == [edit.case_id for edit in EDITS[:2]]
    assert made.report["edits"] == 2
    assert (made.run.path / "delta.safetensors").is_file()
    name = "transformer.h.1.mlp.c_proj.weight"
    assert not torch.equal(gpt2_base.pristine(name), gpt2_base.weight(name)), "the model is as it was edited so far"


def test_a_stopped_stream_can_be_resumed(tmp_path: Path, gpt2_base: LanguageModel) -> None:
    """It ends as one that was never stopped."""

    def watch(action: Literal["warn", "stop"]) -> CollapseWatch:
        return CollapseWatch(every=2, thresholds=Thresholds(frobenius=1e-9), action=action)

    def editing(made: EditTrainer, **settings: Any) -> Any:
        gpt2_base.restore()
        records = [edit.as_record() for edit in EDITS[:5]]
        made.fit(make("ROME", gpt2_base), datamodule=EditDataModule(edits=records, batch_size=1), **settings)
        return made

    whole = editing(measuring(tmp_path / "whole", watch("warn")))
    stopped = editing(measuring(tmp_path / "stopped", watch("stop")))
    assert (stopped.report["edits"], stopped.report["stopped"]) == (2, True)
    resumed = editing(measuring(tmp_path / "stopped", watch("warn")), resume=str(stopped.run.path))
    assert "stopped" not in resumed.report
    assert resumed.report["post"] == whole.report["post"]
    lines = [[{**line, "seconds": 0, "time": 0} for line in one.run.records()] for one in (resumed, whole)]
    assert lines[0] == lines[1]
    merged = [(one.run.path / "delta.safetensors") for one in (resumed, whole)]
    assert all(torch.equal(a.update, b.update) for a, b in zip(*(load(path)[0] for path in merged), strict=True))


# ---------------------------------------------------------------------- as if never killed


@pytest.mark.parametrize("kept", ["all", "last lost", "last cut off"])
def test_it_goes_on_as_if_never_interrupted(
    tmp_path: Path, gpt2_base: LanguageModel, texts: str, kept: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed after a commit, with its check whole, missing, or half written; another watch takes up the run."""

    def settings() -> CollapseWatch:
        return CollapseWatch(every=2, thresholds=Thresholds(frobenius=1e-9), texts=texts, sample=2)

    class Replaced(EditCallback):
        """After four edits the first watch is gone, as with its process."""

        def __init__(self) -> None:
            self.done, self.watch = 0, settings()

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            self.watch.on_fit_start(trainer, pl_module)

        def on_edits_committed(self, trainer: Any, editor: Any, records: Any) -> None:
            self.watch.on_edits_committed(trainer, editor, records)
            self.done += len(records)
            if self.done == 4:
                path = trainer.run.path / "health.jsonl"
                lines = path.read_bytes().splitlines(keepends=True)
                if kept != "all":
                    path.write_bytes(b"".join(lines[:-1]) + (lines[-1][:20] if kept == "last cut off" else b""))
                trainer.run.health = type(trainer.run.health)(path)
                self.watch = settings()

    whole = fit(make("ROME", tiny_base("gpt2")), EDITS[:6], tmp_path / "whole", settings(), batch_size=1)
    with caplog.at_level(logging.WARNING, logger="kedit_lightning.callbacks.watch"):
        caplog.clear()
        broken = fit(make("ROME", gpt2_base), EDITS[:6], tmp_path / "broken", Replaced(), batch_size=1)
    assert broken.run.health.records() == whole.run.health.records()
    assert [line["edits"] for line in broken.run.health.records()] == [0, 2, 4, 6]
    assert sum("frobenius" in record.getMessage() for record in caplog.records) == 1, "said before the kill"


@pytest.mark.parametrize("at", [3, 4, "end"])
def test_the_end_is_checked_once_also_when_resumed(tmp_path: Path, gpt2_base: LanguageModel, at: int | str) -> None:
    """Stopped by another callback, before the last commit or the end; killed once the end was checked."""

    class Stopped(EditCallback):
        def on_edits_committed(self, trainer: Any, editor: Any, records: Any) -> None:
            trainer.stop_stream |= len(trainer.run.records()) == at

        def on_stream_end(self, trainer: Any, editor: Any, report: Any) -> None:
            if at == "end":
                raise RuntimeError

    def editing(name: str, *more: EditCallback, **settings: Any) -> EditTrainer:
        gpt2_base.restore()
        made = measuring(tmp_path / name, CollapseWatch(every=9), *more)
        module = EditDataModule(edits=[edit.as_record() for edit in EDITS[:5]], batch_size=1)
        try:
            made.fit(make("ROME", gpt2_base), datamodule=module, **settings)
        except RuntimeError:
            assert at == "end"
        return made

    whole = editing("whole").run.health.records()
    broken = editing("broken", Stopped()).run
    assert [line["edits"] for line in whole] == [0, 5]
    assert len(broken.health.records()) == (2 if at == "end" else 1)
    assert editing("broken", resume=str(broken.path)).run.health.records() == whole


@pytest.mark.parametrize(("action", "restore_every"), [("warn", 2), ("stop", None)])
def test_a_check_that_a_kill_prevented_is_made_before_anything_else(
    tmp_path: Path, action: Literal["warn", "stop"], restore_every: int | None
) -> None:
    """Where the weights are restored next, and where the stream is to end with it."""

    class Killed(CollapseWatch):
        def on_edits_committed(self, trainer: Any, editor: Editor, records: Any) -> None:
            if len(trainer.run.records()) == 2:
                raise RuntimeError
            super().on_edits_committed(trainer, editor, records)

    def editing(name: str, kind: type[CollapseWatch], **settings: Any) -> EditTrainer:
        watch = kind(every=2, thresholds=Thresholds(frobenius=1e-9), action=action)
        made = measuring(tmp_path / name, watch)
        module = EditDataModule(edits=[edit.as_record() for edit in EDITS[:4]], restore_every=restore_every)
        made.fit(make("ROME", tiny_base("gpt2")), datamodule=module, **settings)
        return made

    whole = editing("whole", CollapseWatch)
    with pytest.raises(RuntimeError):
        editing("killed", Killed)
    resumed = editing(
        "killed", CollapseWatch, resume=str(tmp_path / "killed" / whole.run.path.relative_to(tmp_path / "whole"))
    )
    assert resumed.run.health.records() == whole.run.health.records()
    assert resumed.report["edits"] == whole.report["edits"] == (2 if action == "stop" else 4)


# ---------------------------------------------------------------------- the command line


def test_by_its_bare_name_from_yaml(tmp_path: Path, texts: str) -> None:
    world = World(tmp_path)
    more = tmp_path / "watch.yaml"
    settings = {"every": 2, "thresholds": {"frobenius": 1e-9, "perplexity": 50.0}, "action": "warn", "texts": texts}
    watch = {"class_path": "CollapseWatch", "init_args": settings}
    more.write_text(json.dumps({"trainer": {"callbacks": [watch]}}))
    run = world.fit(world.config(), "--config", more, name="watched")
    checks = [json.loads(line) for line in (run / "health.jsonl").read_text().splitlines()]
    assert [line["edits"] for line in checks] == [0, 2, 4]
    assert any("frobenius" in warning for warning in checks[-1]["warnings"])
    assert (run / "health.png").is_file()
    assert done("show", run).status == 0
