"""`kedit` in a process that kills itself: ``python -m tests.killed MODULE:CLASS.METHOD NTH fit …``.

It dies by SIGKILL at the beginning of the nth call of the method.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from functools import wraps
from typing import Any


def main(point: str, nth: str, *args: str) -> None:
    """Run a command, up to a call of a method."""
    module, _, path = point.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    method, calls = getattr(owner, name), iter(range(1, int(nth)))

    @wraps(method)
    def dying(*positional: Any, **named: Any) -> Any:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*positional, **named)

    setattr(owner, name, dying)
    from kedit_lightning.cli import main as kedit

    kedit(args)


if __name__ == "__main__":
    main(*sys.argv[1:])
