"""What runs behind `kedit COMMAND`: LightningCLI for what trains, plain functions for the rest."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from docstring_parser import parse

from kedit_lightning.callbacks.logs import quiet
from kedit_lightning.configured import run_trainer, trains
from kedit_lightning.errors import KeditError
from kedit_lightning.messages import number
from kedit_lightning.parsing import OneLineParser
from kedit_lightning.usage import TRAINER_COMMANDS


def run(command: str, args: list[str]) -> None:
    """Run a command.

    Args:
        command: One of `usage.TRAINER_COMMANDS` or `usage.OTHER_COMMANDS`.
        args: The whole command line, the command included.
    """
    quiet()
    if number("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        logging.getLogger("kedit_lightning").setLevel(logging.ERROR)  # the first of several processes warns
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries, where there is no network
    if command in TRAINER_COMMANDS and trains(args):
        if command != "fit":
            msg = (
                f"{command}: expected the configuration of an editor, got one that trains a hypernetwork, which only "
                "`kedit fit` does; MEND and MALMEN edit by configs/mend_*.yaml and configs/malmen_*.yaml"
            )
            raise KeditError(msg)
        from kedit_lightning.hypernetworks.command import main as train

        train(args)
    elif command in TRAINER_COMMANDS:
        run_trainer(args)
    elif command == "pretrain":
        from kedit_lightning.almanac.pretrain import main as pretrain

        pretrain(args[1:])
    elif command == "tasks":
        from kedit_lightning.tasks.command import main as tasks

        tasks(args[1:])
    else:
        _run_function(command, args[1:])


def _run_function(command: str, args: Sequence[str]) -> None:
    """Run a plain function: parameters by position are paths, keyword-only ones options, False ones switches."""
    from kedit_lightning import commands, comparison, history, show, tables
    from kedit_lightning.html import command as html

    elsewhere: dict[str, Callable[..., Any]] = {"show": show.show, "log": history.log, "compare": comparison.compare}
    elsewhere["report"] = html.report
    elsewhere["tables"] = tables.tables
    function = elsewhere.get(command) or getattr(commands, command)
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
    switches = {name for name, one in inspect.signature(function).parameters.items() if one.default is False}
    for name in sorted(switches):
        parser.add_argument(f"--{name}", action="store_true", help=helps.get(name))
    parser.add_function_arguments(function, skip={*paths, *switches, "console"})
    parsed = parser.instantiate(parser.parse_args(list(args)))
    function(**{name: parsed[name] for name in (*paths, *inspect.signature(function).parameters) if name in parsed})
