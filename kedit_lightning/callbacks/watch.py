"""The collapse watch: a model's health while it is edited one fact after another."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Literal, cast

from lightning import LightningModule, Trainer
from torch import Tensor

from kedit_lightning.callbacks.base import EditCallback
from kedit_lightning.callbacks.health import flat, keep_health
from kedit_lightning.callbacks.thresholds import Thresholds
from kedit_lightning.editors import Editor
from kedit_lightning.errors import KeditError
from kedit_lightning.lines import Lines, Record
from kedit_lightning.metrics import Scorer
from kedit_lightning.metrics.drift import WeightDrift
from kedit_lightning.metrics.perplexity import perplexity
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.corpora import Corpus
from kedit_lightning.models.processes import agreed

if TYPE_CHECKING:
    from kedit_lightning.trainer import EditTrainer

HELD_OUT = 20_000
"""Seed of the held-out texts; key statistics are collected with another."""

_log = logging.getLogger(__name__)


@dataclass
class _State:
    """What is known of the run.

    Args:
        texts: Held-out texts.
        lines: health.jsonl.
        history: The checks so far, as it holds them.
        sample: Earlier edits that are asked for: prompt → target, those with the smallest hash.
        norms: By site ‖δ‖ / ‖v₀‖ of the edits since the last check.
        done: Edits so far, those that were rejected included.
        committed: Edits so far without those.
        checked: How many had been committed at the last check; -1 before the first.
        group: Which restoration they follow.
    """

    texts: list[str]
    lines: Lines
    history: list[Record] = field(default_factory=list)
    sample: dict[str, str] = field(default_factory=dict)
    norms: dict[str, list[float]] = field(default_factory=dict)
    done: int = 0
    committed: int = 0
    checked: int = -1
    group: int = -1

    def add(self, records: Iterable[Record], size: int) -> None:
        """Count edits, and let them into the sample."""
        for record in records:
            self.done += 1
            if record.get("rejected") is not None:
                continue
            self.committed += 1
            if record["group"] != self.group:
                self.group, self.sample = record["group"], {}
            self.sample[record["prompt"].replace("{}", record["subject"], 1)] = record["target_new"]
            for stage in record["stages"]:
                for name, value in stage.items():
                    if name.startswith("delta/"):
                        self.norms.setdefault(name.removeprefix("delta/"), []).append(value)
        self.sample = dict(sorted(self.sample.items(), key=lambda item: _hash(item[0]))[:size])

    def measure(self, editor: Editor) -> Record:
        """A check of the model as it is now."""
        base, metric = editor.base, WeightDrift(sync_on_compute=False)
        drift = {name: _plain(metric(base.pristine(name), base.weight(name))) for name in editor.names()}
        norms, self.norms, self.checked = self.norms, {}, self.committed
        return {
            "edits": self.done,
            "drift": drift,
            "together": _plain(metric.compute()),
            "delta_norm": {site: fmean(values) for site, values in norms.items()},
            "perplexity": perplexity(base, self.texts) if self.texts else None,
            "retention": retention(base, self.sample) if self.sample else None,
        }


def retention(base: LanguageModel, facts: Mapping[str, str]) -> float:
    """Share of prompts whose whole answer is the arg-max, token by token under teacher forcing.

    Args:
        base: The model, as its weights are now.
        facts: Prompt → answer.
    """
    scores = Scorer(base).score(list(facts), list(facts.values()))
    return float((scores.n_correct == scores.n_tok).double().mean())


def _plain(drift: Mapping[str, Tensor]) -> dict[str, float]:
    return {measure: float(value) for measure, value in drift.items()}


def _hash(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()


class CollapseWatch(EditCallback):
    """Watches drift, perplexity and retention every so many edits, and warns, or ends the stream, before a collapse.

    A check adds a line to health.jsonl in the run directory (flushed to the disk), curves to TensorBoard, and one
    warning for each threshold that the check before had not crossed: ``edits`` so far; ``drift`` of each edited matrix
    (`metrics.drift`) and of all ``together``; ``delta_norm``, ‖δ‖ / ‖v₀‖ by site, the mean over the edits since the
    last check; ``perplexity`` of held-out text, null where there is none; ``retention``; ``warnings``. The first line
    is the unedited model's, the last that of the model at the end of the stream, where there are health.csv and
    health.png too.

    Retention is the share of earlier edits whose whole target_new is still the greedy answer to the edit prompt (every
    token the arg-max under teacher forcing), among at most ``sample`` of those since the last restoration: the ones
    whose prompts have the smallest SHA-256, so that the choice depends on the edits alone. An edit that was overwritten
    by a later one of the same prompt does not count.

    A check costs the same however many edits were made. All that is remembered is read from the run directory, so a
    resumed run is watched as if it had never been interrupted.

    Args:
        every: Edits between two checks; those that are rejected do not count. The end of the stream is checked too.
        thresholds: What is no longer healthy.
        action: ``warn``, or ``stop``: at a new crossing the stream ends after the commit, is measured as if it had been
            all, and can be resumed.
        texts: Held-out text as `statistics` takes it: a text file with a document a line, a ``.jsonl`` file with
            ``text``, or a Hugging Face data set; by default the almanac's own for the embedded model, else none.
        n_texts: Documents at most.
        sample: Earlier edits that are asked for at most.

    Raises:
        KeditError: A number is below 1.
    """

    reads_weights = True

    def __init__(
        self,
        every: int = 10,
        thresholds: Thresholds | None = None,
        action: Literal["warn", "stop"] = "warn",
        texts: str | None = None,
        n_texts: int = 50,
        sample: int = 50,
    ) -> None:
        for name, value in {"every": every, "n_texts": n_texts, "sample": sample}.items():
            if value < 1:
                msg = f"CollapseWatch.{name}: expected at least 1, got {value}"
                raise KeditError(msg)
        self.every, self.thresholds, self.action, self.sample = every, thresholds or Thresholds(), action, sample
        self.texts, self.n_texts = texts, n_texts
        self._state: _State | None = None

    @property
    def protocol(self) -> Record:
        """All settings but ``action``, so that a stream that was stopped can go on with a warning."""
        given = {"texts": self.texts, "n_texts": self.n_texts, "sample": self.sample}
        return {"every": self.every, "thresholds": asdict(self.thresholds), **given}

    def on_stream_start(self, trainer: Trainer, editor: Editor, n_edits: int) -> None:
        """Begin anew."""
        self._state = None

    def on_stream_caught_up(self, trainer: Trainer, editor: Editor) -> None:
        """Take up what the run directory holds, and make the check that it lacks."""
        self._take_up(cast("EditTrainer", trainer), editor)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first pass of a stream that nothing was taken up of: the check of the unedited model."""
        if self._state is None:
            self._take_up(cast("EditTrainer", trainer), cast("Editor", pl_module))

    def on_edits_rejected(self, trainer: Trainer, editor: Editor, records: Sequence[Record]) -> None:
        """Count."""
        assert self._state is not None
        self._state.add(records, self.sample)

    def on_edits_committed(self, trainer: Trainer, editor: Editor, records: Sequence[Record]) -> None:
        """Count; check, where it is time."""
        assert self._state is not None
        self._state.add(records, self.sample)
        if self._due(self._state):
            self._check(cast("EditTrainer", trainer), editor, self._state)

    def on_stream_end(self, trainer: Trainer, editor: Editor, report: Record) -> None:
        """Check what has not been checked, unless the stream is to go on some time; draw."""
        if (state := self._state) is None:
            return
        if state.checked < state.committed and not report.get("stopped"):
            self._check(cast("EditTrainer", trainer), editor, state)
        if trainer.is_global_zero:
            keep_health(trainer, f"{type(editor).__name__}: health over {state.done} edits", state.history)

    def _take_up(self, trainer: EditTrainer, editor: Editor) -> None:
        """Read what there is of the run; a run that was killed between a commit and its check is checked now."""
        name = self.texts or ("almanac" if editor.base.name_or_path == "almanac" else None)
        texts = list(Corpus(name, n_samples=self.n_texts, seed=HELD_OUT)) if name else []
        state = self._state = _State(texts, trainer.run.health)
        records, state.history = trainer.run.records(), state.lines.records()
        if state.history:
            checked = state.history[-1]["edits"]
            state.add(records[:checked], self.sample)
            records, state.norms, state.checked = records[checked:], {}, state.committed
        state.add(records, self.sample)
        if self._due(state):
            self._check(trainer, editor, state)

    def _due(self, state: _State) -> bool:
        return state.checked // self.every < state.committed // self.every

    def _check(self, trainer: EditTrainer, editor: Editor, state: _State) -> None:
        """Measure, keep, and say what is new."""
        earlier = self.thresholds.crossed(state.history)
        check = state.measure(editor)
        state.history.append(check := agreed(check))  # what each process decides by
        crossed = self.thresholds.crossed(state.history)
        check["warnings"] = list(crossed.values())
        state.lines.append([check])
        if trainer.logger is not None:
            curves = {f"health/{name}": value for name, value in flat(check).items()}
            trainer.logger.log_metrics(curves, step=check["edits"])
        new = [sentence for measure, sentence in crossed.items() if measure not in earlier]
        for sentence in new:
            _log.warning("warning: %s", sentence)
        trainer.stop_stream |= bool(new) and self.action == "stop"
