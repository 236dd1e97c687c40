"""The `kedit` command: one line for every error, and for an interrupt at any time.

Nothing heavy is imported here, so that help is quick and an interrupt finds `main` already running.
"""

from __future__ import annotations

import errno
import signal
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from kedit_lightning import __version__
from kedit_lightning.errors import ElsewhereError, KeditError
from kedit_lightning.messages import fail, number, one_line
from kedit_lightning.usage import OTHER_COMMANDS, TRAINER_COMMANDS, usage


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
    if not command.startswith("-"):
        args[0] = command = command.replace("-", "_")  # tune-gamma
    threading.excepthook = _thread_failed
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)
    try:
        if command in ("-h", "--help"):
            sys.stdout.write(usage())
        elif command == "--version":
            sys.stdout.write(f"kedit {__version__}\n")
        elif command in TRAINER_COMMANDS or command in OTHER_COMMANDS:
            from kedit_lightning.subcommands import run

            run(command, args)
        else:
            known = ", ".join((*TRAINER_COMMANDS, *OTHER_COMMANDS)).replace("_", "-")
            fail(f"unknown command {command!r}; there are {known}", 2)
    except KeyboardInterrupt as error:
        _interrupted(command, str(error))
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        _interrupted(command)  # Lightning turns an interrupt during a fit into an exit
    except Exception as error:
        if isinstance(_cause(error), ElsewhereError):
            sys.exit(1)
        if not (reason := _reason(error)):
            raise
        fail(reason, 1)


def _reason(error: Exception) -> str:
    """What the user can do something about; empty for a bug."""
    if isinstance(error, (KeditError, ValueError, TypeError)):
        return str(_cause(error) or "")
    if isinstance(error, OSError) and error.errno is not None:
        full = "; nothing half-written is left, free some space and run again" if error.errno == errno.ENOSPC else ""
        return f"{error.strerror}: {error.filename or 'a file of the run'}{full}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be loaded yet
        return f"out of memory ({one_line(str(error))}); lower data.batch_size, or load base.dtype bfloat16"
    return ""


def _cause(error: BaseException | None) -> KeditError | None:
    """The user's error at the bottom of an exception: jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, KeditError):
        error = error.__cause__ or error.__context__
    return error


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread of its own; what it cannot write (a full disk) is raised again by its flush."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def _terminated(*_: object) -> NoReturn:
    """A termination, of a batch system whose time is over for one, is an interrupt."""
    raise KeyboardInterrupt


def _interrupted(command: str, advice: str = "") -> NoReturn:
    kept = {
        "fit": "; edits that were committed are in the run directory, from which `kedit fit --resume` goes on",
        "compare": "; what was done is kept, and the same command goes on from there",
        "probe": "; what was found is in the run directory",
        "suggest": "; what was found is in the run directory, and the same command goes on from there",
        "scale": "; what was measured is in the run directory, and the same command goes on from there",
    }
    if number("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        sys.exit(130)  # Ctrl-C reaches the first process too
    fail(f"interrupted{f'; {advice}' if advice else kept.get(command, '')}", 130)
