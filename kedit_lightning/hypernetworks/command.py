"""`kedit fit` of a `MENDTraining` or `MALMENTraining`: trains the hypernetwork that MEND or MALMEN then edits with."""

from __future__ import annotations

from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from rich import get_console
from rich.text import Text

from kedit_lightning.errors import KeditError
from kedit_lightning.hypernetworks.data import TripleData
from kedit_lightning.hypernetworks.files import FILE, save
from kedit_lightning.hypernetworks.training import HypernetworkTraining
from kedit_lightning.models import LanguageModel
from kedit_lightning.parsing import OneLineCLI

LOSS = "validation/loss"


class KeepBest(Callback):
    """Writes the hypernetwork whose validation loss is the least; the last one where none was validated."""

    def __init__(self) -> None:
        self.best = float("inf")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it where it is better than all before."""
        loss = float(trainer.callback_metrics.get(LOSS, float("inf")))
        if trainer.global_step and loss < self.best:
            self.best = loss
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it where nothing has been.

        Raises:
            KeditError: It has not been trained.
        """
        if not trainer.global_step:
            msg = "no step was taken: raise trainer.max_epochs or trainer.max_steps, or lower accumulate"
            raise KeditError(msg)
        if self.best == float("inf"):
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, training: LightningModule) -> None:
        assert isinstance(training, HypernetworkTraining)
        save(place(trainer), training.network, training.purpose(trainer.global_step))


def place(trainer: Trainer) -> Path:
    """Where a training leaves its hypernetwork."""
    return Path(trainer.log_dir or trainer.default_root_dir) / FILE


class _TrainCLI(OneLineCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(LanguageModel, "base")
        parser.link_arguments("base", "model.init_args.base", apply_on="instantiate")
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "early_stopping.monitor": LOSS,
                "early_stopping.patience": 5,
                "checkpoint.monitor": LOSS,
                "checkpoint.filename": "best",
                "checkpoint.save_last": True,
            }
        )


def main(args: list[str]) -> None:
    """Run the training.

    Args:
        args: Command line, for instance ``["fit", "--config", "configs/hypernetworks/mend_almanac.yaml"]``.

    Raises:
        KeditError: The model, the triples or a setting cannot be used.
    """
    cli = _TrainCLI(
        HypernetworkTraining,
        TripleData,
        subclass_mode_model=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        args=args,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"callbacks": [KeepBest()], "num_sanity_val_steps": 0},  # nothing is normalised before a step
    )
    where = place(cli.trainer)
    get_console().print(Text(f"{where}: hypernetwork, for model.init_args.hypernetwork of `kedit fit`"), soft_wrap=True)
