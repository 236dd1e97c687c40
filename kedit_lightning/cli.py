"""The `kedit` command: LightningCLI for what trains, plain functions for the rest, one line for every error."""

from __future__ import annotations

import errno
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from docstring_parser import parse
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from kedit_lightning import __version__
from kedit_lightning.callbacks.console import quiet
from kedit_lightning.delta import write_beside
from kedit_lightning.errors import KeditError
from kedit_lightning.messages import one_line
from kedit_lightning.parsing import OneLineCLI, OneLineParser, fail

TRAINER_COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "fit": "edit a stream of facts, measured before and after",
        "validate": "measure the unedited model",
        "test": "measure an edited model (--delta)",
        "predict": "continue prompts before and after the edits (--delta)",
        "statistics": "collect the key statistics that a configuration needs",
    }
)
OTHER_COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "apply": "write an edited model, as a Hugging Face checkpoint or a LoRA adapter",
        "revert": "write the model without one edit, or without any",
        "show": "print the tables of runs, side by side",
        "pretrain": "train the almanac's model from scratch",
    }
)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `kedit`.

    Args:
        args: The command line; that of the process by default.

    Raises:
        SystemExit: Status 1 for what cannot be done, 2 for a command line or configuration that cannot be read; one
            line says why.
    """
    args = list(sys.argv[1:] if args is None else args)
    command = args[0] if args else "--help"
    quiet()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries, where there is no network
    threading.excepthook = _thread_failed
    try:
        if command in TRAINER_COMMANDS:
            _run_trainer(args)
        elif command == "pretrain":
            from kedit_lightning.almanac.pretrain import main as pretrain

            pretrain(args[1:])
        elif command in OTHER_COMMANDS:
            _run_function(command, args[1:])
        elif command in ("-h", "--help"):
            sys.stdout.write(_usage())
        elif command == "--version":
            sys.stdout.write(f"kedit {__version__}\n")
        else:
            fail(f"unknown command {command!r}; there are {', '.join((*TRAINER_COMMANDS, *OTHER_COMMANDS))}", 2)
    except (KeditError, ValueError, TypeError) as error:
        known = _cause(error)
        if known is None:
            raise
        fail(str(known), 1)
    except torch.OutOfMemoryError as error:
        fail(f"out of memory ({one_line(str(error))}); lower data.batch_size, or load base.dtype bfloat16", 1)
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        _interrupted()  # Lightning turns an interrupt during a fit into an exit
    except OSError as error:
        if error.errno is None:
            raise
        full = "; nothing half-written is left, free some space and run again" if error.errno == errno.ENOSPC else ""
        fail(f"{error.strerror}: {error.filename or 'a file of the run'}{full}", 1)


def _cause(error: BaseException | None) -> KeditError | None:
    """The user's error at the bottom of an exception: jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, KeditError):
        error = error.__cause__ or error.__context__
    return error


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread of its own; what it cannot write (a full disk) is raised again by its flush."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def _interrupted() -> NoReturn:
    fail("interrupted; edits that were committed are in the run directory", 130)


def _usage() -> str:
    commands = "\n".join(f"  {name:<12}{what}" for name, what in {**TRAINER_COMMANDS, **OTHER_COMMANDS}.items())
    return f"usage: kedit COMMAND …\n\n{commands}\n\n`kedit COMMAND --help` lists a command's options.\n"


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
