"""One edit after another, all kept: is an edit as fast at the end as at the beginning, and what is not the model's?

    python -m benchmarks.sequential --out benchmarks/sequential.md
    python -m benchmarks.sequential --quick

ROME as in ``configs/rome_almanac.yaml``, with `restore_every: null` and `evaluate: false`: a long sequence on the
almanac, then a handful of edits on a random model of GPT-2 small's shape. An edit's seconds are those from the commit
before to its own. Of these the ones inside the model's forward and backward passes are the model's, the rest the
framework's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.measuring import Table, almanac_edits, gpt2_small, grown, model_compute, shipped, spread, trainer
from kedit_lightning.callbacks import EditCallback
from kedit_lightning.callbacks.logs import quiet
from kedit_lightning.models import LanguageModel, Statistics

BLOCK = 100
"""Edits whose median is a line."""


class Laps(EditCallback):
    """When each edit of a sequence was committed, and how much of the time the model had had."""

    def __init__(self) -> None:
        self.laps: list[tuple[float, float]] = []

    def on_stream_start(self, trainer: object, editor: object, n_edits: int) -> None:
        """Begin anew."""
        self.laps = []

    def on_edits_committed(self, trainer: object, editor: object, records: object) -> None:
        """Note the time."""
        self.laps.append((time.perf_counter(), self.clock.seconds))

    def sequence(self, name: str, base: LanguageModel, edits: int, **changes: object) -> Iterator[tuple[float, float]]:
        """Seconds of each edit after the first, and those of them that were the model's."""
        data, editor = almanac_edits(0, edits, restore_every=None), shipped(name, base, **changes)
        with tempfile.TemporaryDirectory() as folder, model_compute(base) as self.clock:
            made = trainer(folder, evaluate=False)
            made.callbacks.append(self)  # type: ignore[attr-defined]
            made.fit(editor, datamodule=data)
        for (before, model_before), (after, model_after) in zip(self.laps, self.laps[1:], strict=False):
            yield after - before, model_after - model_before


def growth(seconds: Sequence[float]) -> float:
    """By which fraction a straight line through all of them rises from the first to the last."""
    n = len(seconds)
    slope, start = statistics.linear_regression(range(n), seconds)
    return slope * (n - 1) / start


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--editor", choices=("ROME", "TOP", "MEMIT"), default="ROME")
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--block", type=int, default=BLOCK, help="edits whose median is a line")
    parser.add_argument("--few", type=int, default=8, help="edits by which the framework's share is told")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few edits and small models, to see that it runs")
    parser.add_argument("--out", type=Path, help="a file that takes the table too")
    words = sys.argv[1:] if words is None else words
    args = parser.parse_args(words)
    sizes = {}
    if args.quick:
        args.edits, args.block, args.few = 5, 2, 3
        sizes = {"n_layer": 4, "n_embd": 48, "vocab_size": 2500}
    torch.set_num_threads(args.threads)
    quiet()
    base = LanguageModel("almanac")
    table = Table(
        "One edit after another",
        "benchmarks.sequential",
        words,
        f"{args.editor} on the almanac, float32, all edits kept, nothing scored; seconds from one commit to the next, "
        f"medians of {args.block} edits. *model*: inside the model's forward passes (our hooks in them included) and "
        "backward passes; *framework*: the share of everything else, which is rows, keys and values to read and to "
        "solve with, Adam, the trainer's loop and hooks, logs, and the files of the commit.",
        ["edits", "seconds an edit", "model, s", "framework"],
        args.out,
    )
    seconds: list[float] = []

    def long() -> None:
        pairs = list(Laps().sequence(args.editor, base, args.edits))
        seconds.extend(second for second, _ in pairs)
        for start in range(0, len(pairs), args.block):
            table.line(
                f"{start + 2} to {min(start + args.block, len(pairs)) + 1}", *_cells(pairs[start:][: args.block])
            )

    memory = grown(long)
    parts = [seconds[start:][: args.block] for start in range(0, len(seconds), args.block)]
    first, last = statistics.median(parts[0]), statistics.median(parts[-1])
    identity = {"statistics": Statistics("identity")}
    pairs = list(Laps().sequence(args.editor, gpt2_small(**sizes), args.few + 1, **identity))
    table.line(f"GPT-2 small, 2 to {args.few + 1}", *_cells(pairs))
    table.close(
        f"The last {args.block} edits take {last / first - 1:+.1%} against the first {args.block}; a straight line "
        f"through all rises by {growth(seconds):+.1%}. The process grew by {memory:.0f} MB at its peak."
    )


def _cells(pairs: Sequence[tuple[float, float]]) -> list[str]:
    share = statistics.median(1 - model / second for second, model in pairs)
    return [spread([second for second, _ in pairs]), f"{statistics.median(m for _, m in pairs):.3g}", f"{share:.0%}"]


if __name__ == "__main__":
    main()
