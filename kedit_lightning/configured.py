"""Commands of the trainer: LightningCLI over the blocks ``base``, ``model``, ``data`` and ``trainer``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from kedit_lightning.callbacks.base import EditCallback
from kedit_lightning.errors import KeditError
from kedit_lightning.messages import wrong_file
from kedit_lightning.parsing import OneLineCLI
from kedit_lightning.run import CONFIG, SETTINGS, newest
from kedit_lightning.usage import TRAINER_COMMANDS
from kedit_lightning.writing import write_beside


class _SaveConfig(SaveConfigCallback, EditCallback):
    """Writes config.yaml beside its place, then renames it there, as every file of a run."""

    def on_stream_start(self, trainer: Trainer, editor: LightningModule, n_edits: int) -> None:
        """Before anything else is, so that the run can be resumed from there on; that of a resumed run stays."""
        folder: Path = trainer.run.path  # type: ignore[attr-defined] # EditTrainer
        if trainer.is_global_zero and (not (folder / CONFIG).is_file() or self.config.get("resume_anyway")):
            self.save_config(trainer, editor, "fit")
        self.already_saved = True

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it."""
        config = self.config.clone()
        for name in ("resume", "resume_anyway"):  # of this call, not of the run; other commands do not know them
            config.pop(name, None)
        text = self.parser.dump(config, skip_unset=False)
        folder: Path = trainer.run.path  # type: ignore[attr-defined] # EditTrainer
        write_beside(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


class EditCLI(OneLineCLI):
    """Blocks of a configuration: ``base`` (the model), ``model`` (the editor), ``data`` (the stream), ``trainer``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the base model, and hand it to the editor."""
        from kedit_lightning.models import LanguageModel

        parser.add_class_arguments(LanguageModel, "base")
        parser.link_arguments("base", "model.init_args.base", apply_on="instantiate")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The trainer's methods that are commands, each with the parameters that are no options."""
        hidden = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule", "ckpt_path"}
        return {name: hidden for name in TRAINER_COMMANDS}


def run_trainer(args: Sequence[str]) -> None:
    """Run a command of the trainer.

    Args:
        args: The whole command line, the command included.

    Raises:
        KeditError: There is no run to be resumed, or it is a training.
    """
    from kedit_lightning import editors, probes  # noqa: F401 - lets a configuration name them by bare class names
    from kedit_lightning.data.datamodule import EditDataModule
    from kedit_lightning.editors import Editor
    from kedit_lightning.trainer import EditTrainer

    EditCLI(
        model_class=Editor,
        datamodule_class=EditDataModule,
        trainer_class=EditTrainer,
        subclass_mode_model=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=_SaveConfig,
        save_config_kwargs={"save_to_log_dir": False},
        args=_resuming(args),
    )


def trains(args: Sequence[str]) -> bool:
    """Whether a command line of `fit` trains a hypernetwork (`MENDTraining`, `MALMENTraining`) instead of editing.

    Args:
        args: The whole command line; configurations that cannot be read say nothing here.
    """
    from kedit_lightning.hypernetworks.training import HypernetworkTraining

    named = ""
    for i, arg in enumerate(args):
        option, _, value = arg.partition("=")
        value = value or "".join(args[i + 1 : i + 2])
        if option in ("-c", "--config") and not wrong_file(Path(value)):
            named = _class(yaml.safe_load(Path(value).read_text(encoding="utf-8")).get("model")) or named
        elif option == "--model":
            named = _class(yaml.safe_load(value))
        elif option == "--model.class_path":
            named = value
    return named.rpartition(".")[2] in {kind.__name__ for kind in _below(HypernetworkTraining)}


def _class(model: object) -> str:
    """The class that the block of a model names; empty where it names none."""
    return str(model.get("class_path") or "") if isinstance(model, dict) else str(model or "")


def _below(kind: type[Any]) -> Iterator[type[Any]]:
    for own in kind.__subclasses__():
        yield own
        yield from _below(own)


def _resuming(args: Sequence[str]) -> list[str]:
    """The command line, with the configuration of the run that is to be resumed before everything else."""
    for i, arg in enumerate(args):
        name, _, value = arg.partition("=")
        if name == "--resume" and (path := value or "".join(args[i + 1 : i + 2])):
            config = newest(Path(path), SETTINGS) / CONFIG  # the run that `EditTrainer.fit` takes
            if not config.is_file():
                msg = f"{path}: expected a run directory with a {CONFIG}, such as lightning_logs/edits/version_0"
                raise KeditError(msg)
            if trains(["fit", "--config", str(config)]):
                msg = (
                    f"{path}: a training goes on by --config {config} --ckpt_path {config.parent}/checkpoints/last.ckpt"
                )
                raise KeditError(msg)
            return [args[0], "--config", str(config), *args[1:]]
    return list(args)
