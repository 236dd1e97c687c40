"""EditTrainer: Lightning's Trainer over a stream of edits, one `Trainer.fit` a pass."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from kedit_lightning import delta as delta_files
from kedit_lightning.callbacks.base import EditCallback
from kedit_lightning.callbacks.console import Console
from kedit_lightning.callbacks.figures import Figures
from kedit_lightning.callbacks.scoring import Scoring
from kedit_lightning.callbacks.weight_update import WeightUpdate
from kedit_lightning.data.datamodule import EditDataModule, given
from kedit_lightning.delta import WeightDelta
from kedit_lightning.editors import Editor
from kedit_lightning.edits import Edit
from kedit_lightning.errors import DeltaError, KeditError
from kedit_lightning.interrupts import interrupts_passed_on
from kedit_lightning.logger import EditLogger
from kedit_lightning.measurement import Measurement
from kedit_lightning.metrics import Evaluation
from kedit_lightning.models.statistics import compute
from kedit_lightning.run import Record, RunDirectory, read_deltas
from kedit_lightning.scaling import SEEDS, Scaling
from kedit_lightning.stream import EditStream


class EditTrainer(Trainer):
    """Streams edit batches through an editor.

    `fit` measures the unedited model, edits batch after batch (a `Trainer.fit` a pass, the weight update in its
    ``on_fit_end``), measures the edited model before every restoration and at the end, and leaves a run directory. The
    weights stay edited as they are after the last batch. An edit batch commits or is rolled back as a whole.

    Args:
        name: Folder of this run's versions under ``save_dir``.
        save_dir: Where runs are kept.
        evaluation: What is measured before and after.
        evaluate: Whether anything is measured at all.
        accelerator: As in Lightning.
        devices: As in Lightning.
        num_nodes: As in Lightning.
        strategy: As in Lightning.
        callbacks: Further callbacks.
        enable_progress_bar: Whether the terminal shows progress.

    Raises:
        KeditError: More than one process is asked for.
    """

    def __init__(
        self,
        name: str = "edits",
        save_dir: str = "lightning_logs",
        evaluation: Evaluation | None = None,
        evaluate: bool = True,
        accelerator: str = "auto",
        devices: int | str | list[int] = 1,
        num_nodes: int = 1,
        strategy: str = "auto",
        callbacks: list[Callback] | None = None,
        enable_progress_bar: bool = True,
    ) -> None:
        self.weight_update = WeightUpdate()
        self.edit_logger = EditLogger(save_dir, name=name, default_hp_metric=False)
        super().__init__(
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
            callbacks=[self.weight_update, Scoring(), Console(), Figures(), *(callbacks or [])],
            logger=self.edit_logger,
            max_epochs=-1,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
        )
        if self.world_size > 1:
            msg = f"expected one process, got {self.world_size}: set trainer.devices and trainer.num_nodes to 1"
            raise KeditError(msg)
        self.run = RunDirectory(Path(self.log_dir or "."))
        self.report: Record = {}
        self.show_progress = enable_progress_bar
        self.evaluation, self.evaluate = evaluation or Evaluation(), evaluate

    def tell(self, hook: str, *args: Any) -> None:
        """Call a hook of the edit stream on every callback that hears of it."""
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EditCallback):
                getattr(callback, hook)(self, *args)

    def fit(  # type: ignore[override]
        self,
        model: Editor,
        train_dataloaders: None = None,
        val_dataloaders: None = None,
        datamodule: EditDataModule | None = None,
        ckpt_path: None = None,
    ) -> None:
        """Edit the stream of the data module.

        Args:
            model: The editor.
            train_dataloaders: Not used; the data module streams.
            val_dataloaders: Not used.
            datamodule: The stream.
            ckpt_path: Not used; a run is resumed from its directory.
        """
        datamodule = given(datamodule, "fit")
        one_pass = partial(super().fit, model, datamodule=datamodule)
        model.base.restore()
        stream = EditStream(self, model, datamodule)
        with closing(self.edit_logger), interrupts_passed_on():
            stream.open()
            for index, group in enumerate(datamodule.groups()):
                stream.restore()
                records: list[Record] = []
                for batch in group:
                    records += stream.edit(batch, index, one_pass)
                stream.evaluate(group, records)
            self.report = stream.close()

    # ------------------------------------------------------------------ validate, test, predict

    def validate(  # type: ignore[override]
        self, model: Editor, dataloaders: None = None, datamodule: EditDataModule | None = None
    ) -> Record:
        """Measure the unedited base model.

        Args:
            model: The editor that holds the base model.
            dataloaders: Not used; the data module gives the edits.
            datamodule: The edits.

        Returns:
            The report, as in metrics.json.
        """
        self._open(model, datamodule, "validate")
        super().validate(model, datamodule=datamodule, verbose=False)
        return self._measurement.close("pre", "unedited")

    def test(  # type: ignore[override]
        self,
        model: Editor,
        dataloaders: None = None,
        datamodule: EditDataModule | None = None,
        delta: str | None = None,
    ) -> Record:
        """Measure an edited model.

        Args:
            model: The editor that holds the base model.
            dataloaders: Not used; the data module gives the edits.
            datamodule: The edits.
            delta: The delta file, or the run directory, of the edited model.

        Returns:
            The report, as in metrics.json.
        """
        updates = self._read(model, delta)
        self._open(model, datamodule, "test")
        for update in updates:
            model.base.write(update.name, update.update)
        super().test(model, datamodule=datamodule, verbose=False)
        return self._measurement.close("post", f"as edited by {delta}")

    def predict(  # type: ignore[override]
        self,
        model: Editor,
        dataloaders: None = None,
        datamodule: EditDataModule | None = None,
        delta: str | None = None,
        prompts: list[str] | None = None,
        max_new_tokens: int = 20,
    ) -> list[Record]:
        """Continue prompts greedily with the unedited and with an edited model, and show the difference.

        Args:
            model: The editor that holds the base model.
            dataloaders: Not used.
            datamodule: Whose edit prompts are taken where none are given.
            delta: The delta file, or the run directory, of the edited model.
            prompts: The prompts.
            max_new_tokens: How far they are continued.

        Returns:
            A record a prompt: ``prompt``, ``before``, ``after``; predictions.jsonl holds the same.
        """
        if max_new_tokens < 1:
            msg = f"max_new_tokens: expected at least 1, got {max_new_tokens}"
            raise KeditError(msg)
        updates = self._read(model, delta)
        if prompts is None:
            prompts = [edit.text for edit in given(datamodule, "predict").edits]
        model.base.restore()
        model.base.to(self.strategy.root_device)
        model.max_new_tokens = max_new_tokens
        loader = DataLoader(prompts, batch_size=32, collate_fn=list)  # type: ignore[arg-type,var-annotated]
        before = super().predict(model, dataloaders=loader)
        for update in updates:
            model.base.write(update.name, update.update)
        after = super().predict(model, dataloaders=loader)
        texts = zip(prompts, itertools.chain(*before or []), itertools.chain(*after or []), strict=True)
        records = [{"prompt": prompt, "before": b, "after": a} for prompt, b, a in texts]
        self.run.write_lines("predictions.jsonl", records)
        self.tell("on_predictions", records)
        return records

    def statistics(self, model: Editor, datamodule: EditDataModule | None = None) -> None:
        """Collect the second moments of the keys that an editor's configuration needs; `fit` does so by itself.

        Args:
            model: The editor.
            datamodule: Not used.

        Raises:
            StatisticsError: There is nothing to collect, or it cannot be kept.
        """
        model.base.to(self.strategy.root_device)
        self.tell("on_statistics", compute(model.base, model.statistics, model.sites()))

    def scale(
        self,
        model: Editor,
        datamodule: EditDataModule | None = None,
        counts: list[int] | None = None,
        seeds: list[int] = SEEDS,
    ) -> list[Record]:
        """Edit more and more facts at once, each time on the unedited model, and measure how the scores change.

        Args:
            model: The editor.
            datamodule: The edits.
            counts: How many, ascending; by default JEEP's 1, 2, 3, 6, …, 10,000 as far as there are edits.
            seeds: Of the choice of edits, a run each.

        Returns:
            A record a number of edits, as in scaling.csv.
        """
        scaling = Scaling(self, model, given(datamodule, "fit"), counts, seeds)
        with interrupts_passed_on():
            return scaling.run(partial(super().fit, model, datamodule=datamodule))

    def _open(self, editor: Editor, datamodule: EditDataModule | None, stage: str) -> None:
        """Begin to measure, on the unedited model."""
        datamodule = given(datamodule, stage)
        editor.base.restore()
        self._measurement = Measurement(self, editor, datamodule)
        self._measurement.open(stage)

    def score(self, batch: Sequence[Edit]) -> None:
        """Score one batch of `validate` or `test` on the model as it stands."""
        self._measurement.add(batch)

    def _read(self, editor: Editor, path: str | None) -> list[WeightDelta]:
        """Updates of an edited model, checked against the base model."""
        if path is None:
            msg = "expected --delta, a run directory or a delta file; `kedit fit` makes one"
            raise DeltaError(msg)
        updates, metadata = read_deltas(Path(path))
        delta_files.check(editor.base, updates, metadata, Path(path))
        return updates
