"""Command lines and configurations whose errors are one line."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from kedit_lightning import __version__
from kedit_lightning.errors import KeditError
from kedit_lightning.messages import fail, one_line, wrong_file


class OneLineParser(ArgumentParser):
    """A parser whose errors are one line, and which takes no abbreviated keys."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as in jsonargparse
        """Parse; to the parser of a nested class jsonargparse (4.53) hands a null as the text ``None``."""
        if args is not None and not self.exit_on_error:
            args = [re.sub(r"=None$", "=null", arg) for arg in args]
        return super().parse_args(args, *rest, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong in one line and leave with status 2."""
        if not self.exit_on_error:  # the parser of a nested class: let the outer one name the whole key
            super().error(message, ex)
        fail(one_line(message, _keys(self)), 2)


def _keys(parser: ArgumentParser) -> Iterator[str]:
    """The keys of a parser and of its commands' parsers."""
    for action in parser._actions:
        yield action.dest
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _keys(command)


class ConfigFile(ActionConfigFile):
    """A configuration file, which is named if it cannot be read."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *value: Any) -> None:
        """Read it."""
        if wrong := wrong_file(Path(value[0])):
            parser.error(wrong)
        super().__call__(parser, namespace, *value)  # type: ignore[no-untyped-call]


class _EditParser(OneLineParser, LightningArgumentParser):
    """The same, for LightningCLI."""


class OneLineCLI(LightningCLI):
    """LightningCLI whose errors are one line."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser whose errors are one line."""
        kwargs.setdefault("dump_header", [f"kedit_lightning=={__version__}"])
        parser = _EditParser(**kwargs)
        parser.add_argument(
            "-c", "--config", action=ConfigFile, help="Path of a configuration; may be given repeatedly."
        )
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:  # noqa: ANN401 - as in Lightning
        """Parse; Lightning suspects arguments given by a program, which is how all of ours come."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            super().parse_arguments(parser, args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer; what Lightning refuses (an accelerator that is not there) is the user's to mend."""
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ImportError, TypeError, ValueError) as error:
            msg = f"trainer: {str(error).strip().splitlines()[0]}"
            raise KeditError(msg) from error
