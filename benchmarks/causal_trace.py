"""Causal tracing against the same cell by cell, each a run of the whole model, as a table.

    python -m benchmarks.causal_trace --out benchmarks/causal_trace.md
    python -m benchmarks.causal_trace --quick

Facts are the committed ones, models random ones of published shapes. Cell by cell is ROME's way: for each token and
layer one forward pass of the clean row and its corrupted copies, all tokens, all layers, and the logits of all tokens;
and the same with those of the last token alone. These passes all take the same time, so that only every so many cells
are run. A round traces one fact in each way, another fact every round, and the ways take turns in who begins.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measuring import Table, spread
from benchmarks.shapes import SHAPES, build, prompt_set
from kedit_lightning.callbacks.logs import quiet
from kedit_lightning.edits import Edit, Site
from kedit_lightning.models import LanguageModel, Row, collate
from kedit_lightning.models.restoring import Cell, CorruptedRun
from kedit_lightning.probes.token_classes import classes_of
from kedit_lightning.probes.tracing import CORRUPTED, Kind, cells_of, embedded, noise_level, noise_on, prompt_of

COPIES = 10
TRACES: Sequence[Kind] = (("block", 1), ("mlp", 1), ("mlp", 10), ("attn", 10))
WAYS = ("cell by cell", "last logits alone", "together")


@torch.no_grad()
def cell_by_cell(
    base: LanguageModel, row: Row, noise: Tensor, cells: Sequence[Cell], last: bool = False
) -> tuple[float, float, Tensor]:
    """Scores of cells by a run of the whole model each, on the clean row and its corrupted copies.

    Args:
        base: The model.
        row: The prompt.
        noise: What is added to the embeddings of each copy, shape ``(n, t, d)``.
        cells: m cells.
        last: Take the logits of the last token alone.

    Returns:
        The answer's probability in the clean run, its mean over the copies, and the same with each cell restored.
    """
    batch = collate([row] * (1 + len(noise)))
    at = (torch.arange(len(batch)), torch.full((len(batch),), len(row.ids) - 1)) if last else None
    added = torch.cat([torch.zeros_like(noise[:1]), noise])
    embed = base.model.get_submodule(base.architecture.embed)
    hook = embed.register_forward_hook(lambda _, __, output: output + added)

    def run() -> Tensor:
        logits = base.logits(batch, at)
        return (logits if last else logits[:, -1]).softmax(dim=-1)

    try:
        plain = run()
        answer = int(plain[0].argmax())
        found = []
        for cell in cells:
            with _restored(base, cell):
                found.append(float(run()[1:, answer].mean()))
    finally:
        hook.remove()
    plain = plain[:, answer]
    return float(plain[0]), float(plain[1:].mean()), torch.tensor(found, dtype=torch.float64)


@contextmanager
def _restored(base: LanguageModel, cell: Cell) -> Iterator[None]:
    """Make a cell of all rows that of the first row."""

    def put(_: object, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[1:, cell.position] = hidden[0, cell.position]

    with ExitStack() as stack:
        for layer in range(cell.first, cell.last + 1):
            hook = base.module(Site(layer, cell.part)).register_forward_hook(put)
            stack.callback(hook.remove)
        yield


def traced(base: LanguageModel, fact: Edit, kind: Kind, level: float, way: str, every: int) -> tuple[Tensor, float]:
    """The scores of every so many cells of a fact, its subject corrupted, and the seconds that all of them take."""
    row, where = prompt_of(base, fact), [name in CORRUPTED["subject"] for name in classes_of(base, fact)]
    noise = noise_on(where, COPIES, embedded(base, row.ids[:1]).shape[-1], level)
    cells = cells_of(kind, len(row.ids), base.num_layers)
    began = time.perf_counter()
    if way == "together":
        found = CorruptedRun(base, row, noise, [kind[0]]).scores(cells)[::every]
        return found, time.perf_counter() - began
    some = cells[::every]
    found = cell_by_cell(base, row, noise, some, last=way != WAYS[0])[2]
    return found, (time.perf_counter() - began) * (1 + len(cells)) / (1 + len(some))


def quotient(long: Sequence[float], short: Sequence[float]) -> str:
    """How many times faster all rounds are together, and in brackets the least and the most of one."""
    each = [x / y for x, y in zip(long, short, strict=True)]
    return f"**{sum(long) / sum(short):.1f}×** ({min(each):.1f} to {max(each):.1f})"


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2-small")
    parser.add_argument("--layers", type=int, help="cut the model to so many")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=int, default=13, help="cell by cell run every so many cells")
    parser.add_argument("--quick", action="store_true", help="one round on two layers, to see that it runs")
    parser.add_argument("--out", type=Path, help="a file that takes the table too")
    words = sys.argv[1:] if words is None else words
    args = parser.parse_args(words)
    if args.quick:
        args.layers, args.rounds = 2, 1
    torch.set_num_threads(args.threads)
    quiet()
    layers = args.layers or SHAPES[args.shape].layers
    base, facts = build(SHAPES[args.shape], layers, "float32", "cpu"), prompt_set()[0]
    level = noise_level(base, sorted({fact.subject for fact in facts}), 3.0)
    table = Table(
        "Causal tracing, all cells together against cell by cell",
        "benchmarks.causal_trace",
        words,
        f"A random model of the shape of {args.shape}, {layers} layers, float32; the subject corrupted in {COPIES} "
        f"copies; medians of {args.rounds} rounds of one fact (least to most in brackets). Cell by cell, every "
        f"{args.every}th cell is run and the time scaled to all; *last logits alone*: without those of other tokens. "
        "*faster*: in all rounds together, and in a round. *apart*: the largest difference of a score, and that of two "
        "cells.",
        ["restored", *(f"{way}, s" for way in WAYS), "faster", "than with last logits alone", "apart"],
        args.out,
    )
    traced(base, facts[0], TRACES[0], level, "together", args.every)  # warms up
    for kind in TRACES:
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        apart = effect = 0.0
        for i in range(args.rounds):
            scores: dict[str, Tensor] = {}
            for way in WAYS[:: -1 if i % 2 else 1]:
                scores[way], took = traced(base, facts[i % len(facts)], kind, level, way, args.every)
                seconds[way].append(took)
            one, *_, other = (scores[way] for way in WAYS)
            apart = max(apart, float((one - other).abs().max()))
            effect = max(effect, float(one.max() - one.min()))
        faster = [quotient(seconds[way], seconds["together"]) for way in WAYS[:2]]
        name = f"{kind[0]}, {kind[1]} layer{'s' * (kind[1] > 1)}"
        table.line(name, *map(spread, seconds.values()), *faster, f"{apart:.0e} of {effect:.0e}")
    table.close()


if __name__ == "__main__":
    main()
