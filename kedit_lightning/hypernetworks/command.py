"""`kedit fit` of a `MENDTraining` or `MALMENTraining`: trains the hypernetwork that MEND or MALMEN then edits with."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

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
from kedit_lightning.writing import write_beside

LOSS = "validation/loss"
CHECKPOINT = "last"
"""Stem of the checkpoint from which a training goes on; it is written after each validation."""


class KeepBest(Callback):
    """Writes the hypernetwork whose validation loss is the least; the last one where none was validated."""

    def __init__(self) -> None:
        self.best, self.file, self.validations = float("inf"), "", 0
        self.checkpoint = Path()

    @property
    def words(self) -> str:
        """What the hypernetwork is the best of."""
        if not self.validations:
            return "never validated, the last step's: lower trainer.val_check_interval"
        return f"the best of {self.validations} validations, {LOSS} {self.best:.3g}"

    def state_dict(self) -> dict[str, Any]:
        """The least loss and of how many, and where its hypernetwork is."""
        return {"best": self.best, "file": self.file, "validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them up."""
        self.best, self.file, self.validations = (state_dict[name] for name in ("best", "file", "validations"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Of a training that goes on the best one so far comes along; where it is gone, the next is the best."""
        self.checkpoint = place(trainer).parent / "checkpoints" / f"{CHECKPOINT}.ckpt"
        if not Path(self.file).is_file():
            self.best, self.validations = float("inf"), 0
        elif Path(self.file) != place(trainer):
            write_beside(place(trainer), lambda beside: shutil.copyfile(self.file, beside))
            self.file = str(place(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it where it is better than all before."""
        loss = float(trainer.callback_metrics.get(LOSS, float("inf")))
        self.validations += 1
        if trainer.global_step and loss < self.best:
            self.best = loss
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it where nothing has been.

        Raises:
            KeditError: It has not been trained.
        """
        if not trainer.global_step:
            msg = "no step was taken: raise trainer.max_epochs, max_steps or max_time, or lower accumulate"
            raise KeditError(msg)
        if self.best == float("inf"):
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, training: LightningModule) -> None:
        assert isinstance(training, HypernetworkTraining)
        self.file = str(place(trainer))
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
                "early_stopping.strict": False,  # a training need not be validated
                "checkpoint.filename": CHECKPOINT,
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:  # noqa: ANN401 - as in Lightning
        """Parse, and look at the checkpoint before Lightning does.

        Raises:
            KeditError: It is none.
        """
        super().parse_arguments(parser, args)
        given = self.config[self.config["subcommand"]].get("ckpt_path")
        if given is not None and not is_zipfile(given):
            got = "no such file" if not Path(given).exists() else "a damaged file, or one of another kind"
            msg = f"{given}: expected the checkpoint of a training, …/checkpoints/{CHECKPOINT}.ckpt, got {got}"
            raise KeditError(msg)

    def before_fit(self) -> None:
        """Refuse, before anything is written, what cannot be trained."""
        assert isinstance(self.model, HypernetworkTraining)
        assert isinstance(self.datamodule, TripleData)
        self.datamodule.setup("fit")
        self.model.check(self.trainer, self.datamodule)


def main(args: list[str]) -> None:
    """Run the training.

    Args:
        args: Command line, for instance ``["fit", "--config", "configs/hypernetworks/mend_almanac.yaml"]``.

    Raises:
        KeditError: The model, the triples, a checkpoint or a setting cannot be used.
        KeyboardInterrupt: It was interrupted; the text says how to go on.
    """
    keep = KeepBest()
    warnings.filterwarnings("ignore", message="The dirpath has changed")  # what was the best comes along
    try:
        cli = _TrainCLI(
            HypernetworkTraining,
            TripleData,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            args=args,
            save_config_kwargs={"overwrite": True},
            # Nothing is normalised before a step.
            trainer_defaults={"callbacks": [keep], "num_sanity_val_steps": 0, "devices": 1},
        )
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and not isinstance(end.__context__, KeyboardInterrupt):
            raise
        go_on = f"the same command with --ckpt_path {keep.checkpoint} goes on from the last validation"
        raise KeyboardInterrupt(go_on if keep.checkpoint.is_file() else "before the first validation") from None
    where = place(cli.trainer)
    if not where.is_file():
        msg = "nothing was trained: the checkpoint has used up its time or steps; raise trainer.max_time or max_steps"
        raise KeditError(msg)
    said = f"{where}: hypernetwork ({keep.words}), for model.init_args.hypernetwork of `kedit fit`"
    get_console().print(Text(said), soft_wrap=True)
