"""Other libraries' loggers, held back for a while."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(*names: str, level: int = logging.ERROR) -> Iterator[None]:
    """Hold back what loggers say below a level during the context.

    Args:
        names: Names of loggers.
        level: The least level that is still said.
    """
    before = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(level)
        yield
    finally:
        for name, former in before.items():
            logging.getLogger(name).setLevel(former)
