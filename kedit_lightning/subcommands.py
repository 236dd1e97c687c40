"""What runs behind `kedit COMMAND`: LightningCLI for what trains, plain functions for the rest."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from docstring_parser import parse
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from kedit_lightning.callbacks.console import quiet
from kedit_lightning.parsing import OneLineCLI, OneLineParser
from kedit_lightning.usage import TRAINER_COMMANDS
from kedit_lightning.writing import write_beside


def run(command: str, args: list[str]) -> None:
    """Run a command.

    Args:
        command: One of `usage.TRAINER_COMMANDS` or `usage.OTHER_COMMANDS`.
        args: The whole command line, the command included.
    """
    quiet()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries, where there is no network
    if command in TRAINER_COMMANDS:
        _run_trainer(args)
    elif command == "pretrain":
        from kedit_lightning.almanac.pretrain import main as pretrain

        pretrain(args[1:])
    else:
        _run_function(command, args[1:])


class _SaveConfig(SaveConfigCallback):
    """Writes config.yaml beside its place, then renames it there, as every file of a run."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it."""
        text = self.parser.dump(self.config, skip_unset=False)
        write_beside(Path(trainer.log_dir or ".") / "config.yaml", lambda path: path.write_text(text, encoding="utf-8"))


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


def _run_trainer(args: Sequence[str]) -> None:
    from kedit_lightning import editors  # noqa: F401 - lets a configuration name an editor by its bare class name
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
        args=list(args),
    )


def _run_function(command: str, args: Sequence[str]) -> None:
    """Run a plain function: parameters that may be given by position are paths, keyword-only ones are options."""
    from kedit_lightning import commands, report

    function: Callable[..., Any] = report.show if command == "show" else getattr(commands, command)
    described = parse(inspect.getdoc(function) or "")
    parser = OneLineParser(prog=f"kedit {command}", description=described.short_description)
    paths = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    }
    helps = {parameter.arg_name: parameter.description for parameter in described.params}
    for name, parameter in paths.items():
        several = "+" if "Sequence" in str(parameter.annotation) else None
        parser.add_argument(name, type=Path, help=helps.get(name), nargs=several)
    parser.add_function_arguments(function, skip={*paths, "console"})
    parsed = parser.instantiate(parser.parse_args(list(args)))
    function(**{name: parsed[name] for name in (*paths, *inspect.signature(function).parameters) if name in parsed})
