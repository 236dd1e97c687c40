"""Single edits in three ways, measured (teacher-forced): time and peak memory, as a Markdown table.

    python -m benchmarks.side_by_side --out benchmarks/side_by_side.md
    python -m benchmarks.side_by_side --quick

Plain is one edit after another, every step a pass of the whole model with hooks; then one after another through the
suffix; then side by side through the suffix. Editors and layers are those of ``configs/*_almanac.yaml``, each edit from
the unedited model. A round is a fresh run of every way over the same edits, other edits every round, and the ways take
turns in who begins. Peaks are those of a process of its own.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from benchmarks.measuring import Clock, Table, almanac_edits, grown, model_compute, shipped, spread, trainer
from kedit_lightning.callbacks.logs import quiet
from kedit_lightning.models import LanguageModel
from kedit_lightning.run import RunDirectory
from kedit_lightning.stream import EditStream

EDITORS = ("ROME", "TOP", "MEMIT", "JEEP", "PMET")
WAYS: dict[str, tuple[int | None, str]] = {
    "plain": (1, "full"),
    "one by one": (1, "suffix"),
    "side by side": (None, "suffix"),
}
"""And their `parallel_edits` and `forward`."""
CLOSE = 1e-5
"""Margin below which a comparison of two probabilities may turn out either way."""


@dataclass(frozen=True)
class Found:
    """What one run took, and what came of it.

    Args:
        whole: Seconds of the whole run, the unedited model's measurement included.
        seconds: From the first edit to the last that is measured.
        model: Of these, the model's.
        updates: Each edit's Δs.
        scores: Each edit's metrics.
    """

    whole: float
    seconds: float
    model: float
    updates: list[torch.Tensor]
    scores: list[dict[str, float]]


def run(name: str, base: LanguageModel, start: int, stop: int, way: str) -> Found:
    """Measure the unedited model, make edits, and measure them."""
    parallel, forward = WAYS[way]
    data = almanac_edits(start, stop, restore_every=1, parallel_edits=parallel)
    editor = shipped(name, base, forward=forward)
    edited = Clock()
    with (
        tempfile.TemporaryDirectory() as folder,
        model_compute(base, lambda: edited.inside) as model,
        mock.patch.object(EditStream, "edit", edited.watch(EditStream.edit)),
    ):
        made, began = trainer(folder, evaluate=True), time.perf_counter()
        made.fit(editor, datamodule=data)
        whole, scores = time.perf_counter() - began, [line["after"] for line in made.run.records()]
        return Found(whole, edited.seconds, model.seconds, updates(made.run), scores)


def updates(run: RunDirectory) -> list[torch.Tensor]:
    """Each edit's updates in one vector."""
    return [torch.cat([delta.update.flatten() for delta in deltas]) for _, deltas, _ in run.commits()]


def apart(one: Found, other: Found) -> tuple[float, float, int, int]:
    """How far two runs are apart.

    Returns:
        The largest relative difference of an update, that of an answer's log-probability, and how many comparisons of
        two answers came out otherwise: in all, and where their margin is `CLOSE` at least.
    """
    update = max(float((a - b).norm() / a.norm()) for a, b in zip(one.updates, other.updates, strict=True))
    score, otherwise, really = 0.0, 0, 0
    for a, b in zip(one.scores, other.scores, strict=True):
        score = max([score, *(abs(math.log(a[p]) - math.log(b[p])) for p in ("p_new", "p_true") if p in a)])
        if "p_true" in a and (a["p_new"] > a["p_true"]) != (b["p_new"] > b["p_true"]):
            otherwise += 1
            really += abs(math.log(a["p_new"] / a["p_true"])) >= CLOSE
    return update, score, otherwise, really


def memory(name: str, stop: int, way: str, threads: int) -> float:
    """MB by which a process grows over the built model."""
    torch.set_num_threads(threads)
    quiet()
    base = LanguageModel("almanac")
    run(name, base, 0, 1, "one by one")  # imports, second moments
    return grown(lambda: run(name, base, 0, stop, way))


def _seconds(runs: Sequence[Found], edits: int) -> str:
    share = statistics.median(one.model / one.seconds for one in runs)
    return f"{spread([one.seconds / edits for one in runs])} [{share:.0%}]"


def _faster(slow: Sequence[Found], fast: Sequence[Found], *, whole: bool = False) -> float:
    times = ((a.whole, b.whole) if whole else (a.seconds, b.seconds) for a, b in zip(slow, fast, strict=True))
    return statistics.median(a / b for a, b in times)


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--editors", nargs="+", choices=EDITORS, default=EDITORS)
    parser.add_argument("--edits", type=int, default=40, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out, which takes a process a cell")
    parser.add_argument("--quick", action="store_true", help="one round of two edits, to see that it runs")
    parser.add_argument("--out", type=Path, help="a file that takes the table too")
    words = sys.argv[1:] if words is None else words
    args = parser.parse_args(words)
    if args.quick:
        args.edits, args.rounds, args.no_memory = 2, 1, True
    torch.set_num_threads(args.threads)
    quiet()
    base, processes = LanguageModel("almanac"), multiprocessing.get_context("spawn")
    table = Table(
        "Single edits side by side",
        "benchmarks.side_by_side",
        words,
        f"The almanac, float32; medians of {args.rounds} rounds of {args.edits} edits (least to most in brackets). "
        "Seconds are per edit, from the first edit to the last that is measured, in square brackets the share in the "
        "model's forward and backward passes; *whole run*: with the unedited model's measurement, which is the "
        "same in all and otherwise kept from run to run. MB: growth at the peak. *Δ apart*: the largest ‖Δ − Δ′‖ / ‖Δ‖ "
        "of an edit, side by side from one by one, and, by rounding alone, one by one from plain; *log p apart*: the "
        "largest difference of log p of the new or the true answer at the edit's own prompt; *otherwise*: comparisons "
        f"of these two that came out otherwise, and those of them with a margin of {CLOSE:g} at least.",
        [
            *(
                "editor",
                *(f"{way}, s" for way in WAYS),
                "faster than one by one",
                "than plain",
                "whole run, than plain",
            ),
            *(*(f"{way}, MB" for way in WAYS), "Δ apart", "by rounding alone", "log p apart", "otherwise"),
        ],
        args.out,
    )
    for name in args.editors:
        found: dict[str, list[Found]] = {way: [] for way in WAYS}
        run(name, base, 0, 2, "side by side")  # warms up, and gets the second moments
        for i in range(args.rounds):
            for way in list(WAYS)[:: -1 if i % 2 else 1]:
                found[way].append(run(name, base, i * args.edits, (i + 1) * args.edits, way))
        plain, one, many = found.values()
        peaks = [""] * len(WAYS)
        for i, way in enumerate(() if args.no_memory else WAYS):
            with processes.Pool(1) as pool:
                peaks[i] = f"{pool.apply(memory, (name, args.edits, way, args.threads)):.0f}"
        differences = [apart(*pair) for pair in zip(one, many, strict=True)]
        update, score = (max(difference[i] for difference in differences) for i in (0, 1))
        otherwise, really = (sum(difference[i] for difference in differences) for i in (2, 3))
        rounding = max(apart(*pair)[0] for pair in zip(plain, one, strict=True))
        table.line(
            *(name, *(_seconds(runs, args.edits) for runs in found.values())),
            *(f"**{_faster(slow, many):.1f}×**" for slow in (one, plain)),
            f"{_faster(plain, many, whole=True):.1f}×",
            *(*peaks, f"{update:.0e}", f"{rounding:.0e}", f"{score:.0e}", f"{otherwise} ({really})"),
        )
    table.close()


if __name__ == "__main__":
    main()
