"""Causal tracing against the same cell by cell, each a run of the whole model: time and peak memory, as a table.

    python -m benchmarks.causal_trace --out benchmarks/causal_trace.md
    python -m benchmarks.causal_trace --quick

Facts are the committed ones, models random ones of published shapes. Cell by cell is ROME's way: for each token and
layer one forward pass of the clean row and its corrupted copies, all tokens, all layers. A round traces one fact in
either way, another fact every round, and the ways take turns in who begins. Peaks are those of a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measuring import Table, grown, spread
from benchmarks.shapes import SHAPES, build, prompt_set
from kedit_lightning.callbacks.logs import quiet
from kedit_lightning.edits import Edit, Site
from kedit_lightning.models import Batch, LanguageModel, Row, collate
from kedit_lightning.models.restoring import Cell, CorruptedRun
from kedit_lightning.probes.token_classes import classes_of
from kedit_lightning.probes.tracing import CORRUPTED, Kind, cells_of, embedded, noise_level, noise_on, prompt_of

COPIES = 10
TRACES: Sequence[Kind] = (("block", 1), ("mlp", 1), ("mlp", 5), ("mlp", 10), ("attn", 10))
WAYS = ("cell by cell", "together")


@torch.no_grad()
def cell_by_cell(base: LanguageModel, row: Row, noise: Tensor, cells: Sequence[Cell]) -> tuple[float, float, Tensor]:
    """Scores of cells by a run of the whole model each, on the clean row and its corrupted copies.

    Returns:
        The answer's probability in the clean run, its mean over the copies, and the same with each cell restored.
    """
    batch = collate([row] * (1 + len(noise)))
    added = torch.cat([torch.zeros_like(noise[:1]), noise])
    embed = base.model.get_submodule(base.architecture.embed)
    hook = embed.register_forward_hook(lambda _, __, output: output + added)
    try:
        logits = base.logits(batch)[:, -1]
        answer = int(logits[0].argmax())
        plain = logits.softmax(dim=-1)[:, answer]
        found = [float(_restored(base, batch, cell)[1:, answer].mean()) for cell in cells]
    finally:
        hook.remove()
    return float(plain[0]), float(plain[1:].mean()), torch.tensor(found, dtype=torch.float64)


def _restored(base: LanguageModel, batch: Batch, cell: Cell) -> Tensor:
    """Next-token probabilities of all rows, where a cell of the copies is that of the first row."""

    def put(_: object, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[1:, cell.position] = hidden[0, cell.position]

    with ExitStack() as stack:
        for layer in range(cell.first, cell.last + 1):
            hook = base.module(Site(layer, cell.part)).register_forward_hook(put)
            stack.callback(hook.remove)
        return base.logits(batch)[:, -1].softmax(dim=-1)


def traced(base: LanguageModel, fact: Edit, kind: Kind, level: float, way: str) -> Tensor:
    """The score of every token and layer of a fact, its subject corrupted."""
    row, where = prompt_of(base, fact), [name in CORRUPTED["subject"] for name in classes_of(base, fact)]
    noise = noise_on(where, COPIES, embedded(base, row.ids[:1]).shape[-1], level)
    cells = cells_of(kind, len(row.ids), base.num_layers)
    if way == "cell by cell":
        return cell_by_cell(base, row, noise, cells)[2]
    return CorruptedRun(base, row, noise, [kind[0]]).scores(cells)


def memory(shape: str, layers: int, kind: Kind, way: str, threads: int) -> float:
    """MB by which a process grows over the built model."""
    torch.set_num_threads(threads)
    quiet()
    base, (fact, *_) = build(SHAPES[shape], layers, "float32", "cpu"), prompt_set()[0]
    return grown(lambda: traced(base, fact, kind, 0.1, way))


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2-small")
    parser.add_argument("--layers", type=int, help="cut the model to so many")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out, which takes a process a cell")
    parser.add_argument("--quick", action="store_true", help="one round on two layers, to see that it runs")
    parser.add_argument("--out", type=Path, help="a file that takes the table too")
    words = sys.argv[1:] if words is None else words
    args = parser.parse_args(words)
    if args.quick:
        args.layers, args.rounds, args.no_memory = 2, 1, True
    torch.set_num_threads(args.threads)
    quiet()
    layers = args.layers or SHAPES[args.shape].layers
    base, facts = build(SHAPES[args.shape], layers, "float32", "cpu"), prompt_set()[0]
    level, processes = noise_level(base, facts, 3.0), multiprocessing.get_context("spawn")
    table = Table(
        "Causal tracing, all cells together against cell by cell",
        "benchmarks.causal_trace",
        words,
        f"A random model of the shape of {args.shape}, {layers} layers, float32; the subject corrupted in {COPIES} "
        f"copies; medians of {args.rounds} rounds of one fact (least to most in brackets). *faster*: medians of the "
        "ratio in a round. MB: growth at the peak. *apart*: the largest difference of a score, and the largest effect.",
        ["restored", *(f"{way}, s" for way in WAYS), "faster", *(f"{way}, MB" for way in WAYS), "apart"],
        args.out,
    )
    for kind in TRACES:
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        traced(base, facts[0], kind, level, "together")  # warms up
        apart = effect = 0.0
        for i in range(args.rounds):
            scores: dict[str, Tensor] = {}
            for way in WAYS[:: -1 if i % 2 else 1]:
                began = time.perf_counter()
                scores[way] = traced(base, facts[i % len(facts)], kind, level, way)
                seconds[way].append(time.perf_counter() - began)
            one, other = (scores[way] for way in WAYS)
            apart = max(apart, float((one - other).abs().max()))
            effect = max(effect, float((one - one[0]).abs().max()))
        ratio = statistics.median(x / y for x, y in zip(*seconds.values(), strict=True))
        sizes = ["-", "-"]
        if not args.no_memory:
            with processes.Pool(1, maxtasksperchild=1) as pool:
                sizes = [f"{pool.apply(memory, (args.shape, layers, kind, way, args.threads)):.0f}" for way in WAYS]
        name = f"{kind[0]}, {kind[1]} layer{'s' * (kind[1] > 1)}"
        table.line(name, *map(spread, seconds.values()), f"**{ratio:.1f}×**", *sizes, f"{apart:.0e} of {effect:.0e}")
    table.close()


if __name__ == "__main__":
    main()
