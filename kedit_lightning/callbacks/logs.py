"""What is logged and warned of beside the bars: our news are shown, other libraries' talk is not."""

from __future__ import annotations

import io
import logging
import sys
import warnings

from transformers.utils import logging as transformers_logging

from kedit_lightning.models.processes import ranks

NOISE = (
    r".*does not have many workers",
    r"The number of training batches",
    r"Total length of `\w+` across ranks is zero",
    r".*treespec, LeafSpec",
    r"The `srun` command is available",
    r"Your `IterableDataset` has `__len__`",
)
"""Warnings of Lightning about training loops that edit streams are not."""

SAID = tuple(f"kedit_lightning.models.{name}" for name in ("statistics", "key_pass", "sums", "key_statistics"))
"""Loggers whose news are shown, not only their warnings."""


def quiet() -> None:
    """Silence what Lightning and transformers say to people who write training loops."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    LINES.setLevel(logging.INFO)
    for name in SAID:
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).addHandler(LINES)
    for stream in (sys.stdout, sys.stderr):  # ✓ and ± on a terminal without them are no reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


class _Lines(logging.Handler):
    """What we log goes to standard error, above the bars; it need not be the one of the start."""

    def emit(self, record: logging.LogRecord) -> None:
        """A line, of the first of several processes."""
        if ranks()[0] == 0:
            sys.stderr.write(f"{self.format(record)}\n")


LINES = _Lines()
