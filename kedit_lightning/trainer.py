"""EditTrainer: Lightning's Trainer over a stream of edits, one `Trainer.fit` a pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Literal

from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from kedit_lightning import delta as delta_files
from kedit_lightning.callbacks.console import Console
from kedit_lightning.callbacks.figures import Figures
from kedit_lightning.callbacks.scoring import Scoring
from kedit_lightning.callbacks.sequence import SequenceCurve
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
from kedit_lightning.models.launching import strategy_of
from kedit_lightning.resume import check_processes, environment, settings
from kedit_lightning.run import SETTINGS, Record, RunDirectory, newest, read_deltas
from kedit_lightning.stream import EditStream
from kedit_lightning.studies import Studies


class EditTrainer(Studies):
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
        strategy: ``auto`` or ``ddp``, as in Lightning.
        callbacks: Further callbacks.
        enable_progress_bar: Whether the terminal shows progress.
        evaluate_at: After how many edits all facts so far, and the latest batch of them, are scored as well, such as
            ``[0, 1, 5, 10, 20]``; in batches at the first that reaches the number. 0 is the unedited model, on all
            facts to come.
        on_rejected: What becomes of a stream in which edits are rejected (a loss, a value or an update is not finite):
            ``skip`` goes on without them, ``stop`` ends it before their batch.

    Raises:
        KeditError: A number of ``evaluate_at`` is negative, or nothing is measured; edits cannot be shared out by the
            strategy.
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
        evaluate_at: list[int] | None = None,
        on_rejected: Literal["skip", "stop"] = "skip",
    ) -> None:
        self.evaluate_at, self.on_rejected = evaluate_at or [], on_rejected
        if self.evaluate_at and (min(self.evaluate_at) < 0 or not evaluate):
            msg = f"evaluate_at: expected numbers of edits from 0 on, and evaluate: true, got {evaluate_at}, {evaluate}"
            raise KeditError(msg)
        self.weight_update = WeightUpdate()
        self.edit_logger = EditLogger(save_dir, name=name, default_hp_metric=False)
        super().__init__(
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy_of(strategy, devices, num_nodes),
            callbacks=[self.weight_update, Scoring(), Console(), Figures(), SequenceCurve(), *(callbacks or [])],
            logger=self.edit_logger,
            max_epochs=-1,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
        )
        self.run = RunDirectory(Path(self.log_dir or "."))
        self.report: Record = {}
        self.stop_stream = False  # set by a callback: the stream ends after this commit and is measured
        self.show_progress = enable_progress_bar
        self.evaluation, self.evaluate = evaluation or Evaluation(), evaluate

    def fit(  # type: ignore[override]
        self,
        model: Editor,
        train_dataloaders: None = None,
        val_dataloaders: None = None,
        datamodule: EditDataModule | None = None,
        ckpt_path: None = None,
        resume: str | None = None,
        resume_anyway: bool = False,
    ) -> None:
        """Edit the stream of the data module.

        Args:
            model: The editor.
            train_dataloaders: Not used; the data module streams.
            val_dataloaders: Not used.
            datamodule: The stream.
            ckpt_path: Not used; a run is resumed from its directory.
            resume: Run directory of a stream that was interrupted or stopped, which is gone on with; the command line
                takes the configuration from there. It ends as if it had never stopped, bit for bit. One that is
                finished is left as it is.
            resume_anyway: Resume even where settings, libraries or threads differ from those that the run was begun
                with, which gives up bit-identity.
        """
        if resume is not None:
            self.turn_to(newest(Path(resume), SETTINGS))
            finished = self.run.read_json("metrics.json")
            if finished is not None and not finished.get("stopped"):
                self.report = finished
                self.tell("on_stream_finished", finished)
                return
        datamodule = given(datamodule, "fit")
        one_pass = partial(super().fit, model, datamodule=datamodule)

        def stream() -> None:
            model.base.restore()
            self.stop_stream = False
            edits = EditStream(self, model, datamodule, one_pass, resumed=resume is not None, anyway=resume_anyway)
            with closing(self.edit_logger), interrupts_passed_on(), edits.opened():
                edits.edit()
                self.report = edits.close()

        self._together(model, stream)

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
        score = partial(super().validate, model, datamodule=datamodule, verbose=False)
        return self._measured(model, datamodule, "validate", score, [], "pre", "unedited")

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
        score = partial(super().test, model, datamodule=datamodule, verbose=False)
        return self._measured(model, datamodule, "test", score, updates, "post", f"as edited by {delta}")

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
        self._alone("predict")
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

    def _measured(
        self,
        editor: Editor,
        datamodule: EditDataModule | None,
        stage: str,
        score: Callable[[], object],
        updates: Sequence[WeightDelta],
        when: str,
        protocol: str,
    ) -> Record:
        """Measure the model with some updates; what specificity refers to is taken from it without them."""

        def measure() -> Record:
            editor.base.restore()
            data = given(datamodule, stage)
            self._measurement = Measurement(self, editor, data)
            check_processes(lambda: settings(editor, data, self._measurement) | environment(self))
            self._measurement.open(stage)
            for update in updates:
                editor.base.write(update.name, update.update)
            score()
            return self._measurement.close(when, protocol)

        return self._together(editor, measure)

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
