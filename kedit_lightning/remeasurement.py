"""What undoing edits changes: the edits of a run measured with and without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning import Fabric

from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.delta import WeightDelta
from kedit_lightning.edits import Edit
from kedit_lightning.errors import DataError, KeditError
from kedit_lightning.history import worked
from kedit_lightning.lines import Record
from kedit_lightning.metrics import EditMetrics, Evaluation, Evaluator
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.progress import steps
from kedit_lightning.run import RunDirectory

if TYPE_CHECKING:
    from kedit_lightning.reverting import Reverted


class Remeasurement:
    """What a model answers with and without some of a run's edits, measured as the run was.

    Args:
        run: The run, whose config.yaml says of what data it is and how it is measured.
        reverted: What is undone.

    Raises:
        KeditError: The configuration or the data cannot be read, or the data are no longer those of the run.
    """

    def __init__(self, run: RunDirectory, reverted: Reverted) -> None:
        self.reverted = reverted
        self.data, self.evaluation, self._accelerator = _configured(run.path / "config.yaml")
        self.data.setup("fit")
        known = {(e.case_id, e.prompt, e.subject, e.target_new): e for e in self.data.edits}

        def edit(line: Record) -> Edit:
            key = tuple(line.get(name) for name in ("case_id", "prompt", "subject", "target_new"))
            if key not in known:
                msg = (
                    f"{run.path}: the data that its config.yaml names no longer hold case {line['case_id']} as it was "
                    "edited; put them back, or give --no_evaluate"
                )
                raise KeditError(msg)
            return known[key]

        self.undone, self.others = [edit(line) for line in reverted.undone], [edit(line) for line in reverted.others]

    def measure(self, base: LanguageModel) -> Record:
        """Measure the model that the run ended with, and the one without the undone edits.

        Args:
            base: The base model, which is as it was afterwards.

        Returns:
            As in metrics.json, ``pre`` (with all edits) and ``post`` (without the undone), both over the other edits;
            ``undone`` and ``others``: for each edit its line with ``answer_unedited``, and ``answer_before``,
            ``before``, ``answer_after`` and ``after`` with all edits and without the undone ones.
        """
        base.to(Fabric(accelerator=self._accelerator, devices=1).device)
        evaluator = Evaluator(base, self.evaluation, self.data.reference_texts())
        edits = [*self.undone, *self.others]
        evaluator.references(edits)
        unedited = evaluator.answers(edits)
        lines = [
            {name: value for name, value in line.items() if name not in ("before", "after", "stages")}
            | {"answer_unedited": answer}
            for line, answer in zip((*self.reverted.undone, *self.reverted.others), unedited, strict=True)
        ]
        report: Record = {"editor": self.reverted.metadata["editor"], "edits": len(self.others)}
        report["protocol"] = {**evaluator.protocol, **self.data.protocol, "base": base.name_or_path}
        report["protocol"]["name"] = f"{self.data.protocol_name}; before with, after {self.reverted.described}"
        for when, score, updates in (
            ("before", "pre", self.reverted.standing),
            ("after", "post", self.reverted.kept),
        ):
            answers, values, metrics = self._with(base, updates, evaluator, f"measuring {when}")
            report[score] = {name: summary.as_dict() for name, summary in metrics.compute().items()}
            for line, answer, value in zip(lines, answers, values, strict=True):
                line[f"answer_{when}"], line[when] = answer, value
        n = len(self.undone)
        return {**report, "undone": lines[:n], "others": lines[n:]}

    @torch.no_grad()
    def _with(
        self, base: LanguageModel, updates: Sequence[WeightDelta], evaluator: Evaluator, title: str
    ) -> tuple[list[str], list[dict[str, float]], EditMetrics]:
        """Answers and values of all edits, and the metrics of those that stay, on the model with these updates."""
        edits, metrics = [*self.undone, *self.others], evaluator.new()
        with steps(title) as step:
            progress: Callable[[int], None] = lambda done: step(done, len(self.others), "")  # noqa: E731
            try:
                for delta in updates:
                    base.write(delta.name, delta.update)
                answers = evaluator.answers(edits)
                values = evaluator.update(evaluator.new(), self.undone, edited=edits)
                values += evaluator.update(metrics, self.others, progress, edited=edits)
            finally:
                base.restore()
        return answers, values, metrics


def changed(report: Record) -> list[Record]:
    """Edits that stay and whose success is another without the undone ones; from `Remeasurement.measure`."""
    return [
        line
        for line in report["others"]
        if worked(line) != worked(line | {"answer_after": line["answer_before"], "after": line["before"]})
    ]


def _configured(path: Path) -> tuple[EditDataModule, Evaluation, str]:
    """Data, evaluation and accelerator of a run's configuration."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(EditDataModule, "data")
    parser.add_argument("--evaluation", type=Evaluation, default=Evaluation())
    try:
        config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        trainer = config.get("trainer", {})
        settings = {"data": config["data"]} | ({"evaluation": e} if (e := trainer.get("evaluation")) else {})
        parsed = parser.instantiate_classes(parser.parse_object(settings))
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror}), and says of what data the run is; give --no_evaluate"
        raise KeditError(msg) from error
    except (yaml.YAMLError, ArgumentError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        msg = f"{path}: expected the configuration of a run ({reason}); put it back, or give --no_evaluate"
        raise DataError(msg) from error
    return parsed.data, parsed.evaluation, "cpu" if trainer.get("accelerator") == "cpu" else "auto"
