"""Second moments of keys (`kedit statistics`) against a plain forward pass: tokens per second, as a Markdown table.

    python -m benchmarks.second_moments --out benchmarks/second_moments.md
    python -m benchmarks.second_moments --quick

A random model of GPT-2 small's shape reads documents of the almanac. Plain runs the same batches through the model's
own forward, without hooks; ours is the whole pass: laying documents out, reading keys, summing their second moments and
reading off how they converge. In every round the ways take turns. Several processes share the cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, distributed

from benchmarks.measuring import Table, gpt2_small, grown, spread
from kedit_lightning.edits import Site
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.corpora import Corpus, tokenise
from kedit_lightning.models.key_pass import KeyPass
from kedit_lightning.models.packing import KeyReader, lay_out

LAYERS = {"ROME": [5], "MEMIT": [3, 4, 5], "every layer": list(range(12))}
"""Of which MLPs keys are read."""
BATCH_TOKENS = 4096
"""As `Statistics` has it."""


def documents(base: LanguageModel, tokens: int) -> list[Tensor]:
    """Token ids of almanac documents."""
    return list(tokenise(Corpus("almanac"), base.tokenizer, max_length=base.max_length, tokens=tokens, skip=0))


class Pass:
    """Reads documents once, in the two ways.

    Args:
        base: The model.
        layers: Whose keys ours sums, and up to which plain runs.
        texts: The documents.
    """

    def __init__(self, base: LanguageModel, layers: Sequence[int], texts: Sequence[Tensor]) -> None:
        self.base, self.texts, self.last = base, texts, max(layers)
        self.sites = [Site(layer, "mlp") for layer in layers]
        self.reader = KeyReader(base, self.sites, BATCH_TOKENS)
        self.tokens = sum(map(len, texts))
        self.reader.try_packing(texts[:16])

    def ours(self) -> dict[Site, tuple[Tensor, int]]:
        """The second moments."""
        return KeyPass(KeyReader(self.base, self.sites, BATCH_TOKENS), self.texts).run()

    @torch.no_grad()
    def plain(self, last: int | None = None) -> None:
        """The same batches through the model up to a layer; by default through all of it but the head."""
        for rows in self.reader.batches(self.texts):
            batch = lay_out(rows, packed=self.reader.packed)
            self.base.run(batch, self.base.num_layers - 1 if last is None else last)  # type: ignore[arg-type]

    def speeds(self, rounds: int) -> list[list[float]]:
        """Tokens per second of plain, plain up to the last layer whose keys are read, and ours, an entry a round."""
        found: list[list[float]] = [[], [], []]
        for turn in range(rounds):
            calls = list(enumerate((self.plain, lambda: self.plain(self.last), self.ours)))
            for i, call in calls[:: -1 if turn % 2 else 1]:
                start = time.perf_counter()
                call()
                found[i].append(self.tokens / (time.perf_counter() - start))
        return found


def share(rank: int, processes: int, meeting: str, threads: int, rounds: int, *made: object) -> list[float]:
    """Tokens per second of ours in several processes, of which this is one."""
    torch.set_num_threads(max(1, threads // processes))
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    try:
        one, found = build(*made), list[float]()  # type: ignore[arg-type]
        for turn in range(rounds + 1):
            distributed.barrier()
            start = time.perf_counter()
            one.ours()
            found += [one.tokens / (time.perf_counter() - start)] * (turn > 0)
        return found
    finally:
        distributed.destroy_process_group()


def build(layers: Sequence[int], tokens: int, width: int, depth: int) -> Pass:
    """The same in every process."""
    base = gpt2_small(n_layer=depth, n_embd=width)
    return Pass(base, [layer for layer in layers if layer < depth], documents(base, tokens))


def shared(processes: int, threads: int, rounds: int, *made: object) -> list[float]:
    """Tokens per second of ours, shared out over new processes."""
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(processes) as pool:
        meeting = str(Path(folder) / "meeting")
        given = [(rank, processes, meeting, threads, rounds, *made) for rank in range(processes)]
        return pool.starmap(share, given, chunksize=1)[0]


def memory(way: str, threads: int, *made: object) -> float:
    """MB by which a process grows in one pass."""
    torch.set_num_threads(threads)
    one = build(*made)  # type: ignore[arg-type]
    return grown(getattr(one, way))


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of all processes together")
    parser.add_argument("--processes", type=int, nargs="*", default=[2], help="beside one")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out, which takes a process a cell")
    parser.add_argument("--quick", action="store_true", help="one round on a small model, to see that it runs")
    parser.add_argument("--out", type=Path, help="a file that takes the table too")
    words = sys.argv[1:] if words is None else words
    args = parser.parse_args(words)
    width, depth = 768, 12
    if args.quick:
        args.layers, args.tokens, args.rounds, args.no_memory = args.layers[:1], 600, 1, True
        width, depth = 24, 6
    torch.set_num_threads(args.threads)
    table = Table(
        "Second moments of keys",
        "benchmarks.second_moments",
        words,
        f"GPT-2 small's shape ({depth} layers, {width} wide), random weights, float32, about {args.tokens:,} tokens of "
        f"the almanac. Thousands of tokens a second, medians of {args.rounds} rounds (least to most in brackets). "
        "*plain*: a forward pass through the same batches without hooks, all layers, without the head; *plain, to the "
        "layer*: no further than the last layer whose keys are read, where ours ends too; the two ratios are to these, "
        "in one process with all cores. MB: growth at the peak over the built model.",
        [
            *("keys of", "layers", "processes", "plain", "plain, to the layer", "ours", "to plain"),
            *("to plain, to the layer", "plain, MB", "ours, MB"),
        ],
        args.out,
    )
    for name in args.layers:
        made = LAYERS[name], args.tokens, width, depth
        one = build(*made)
        one.ours()  # warms up
        plain, same, ours = one.speeds(args.rounds)
        peaks = ["", ""]
        for i, way in enumerate(() if args.no_memory else ("plain", "ours")):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peaks[i] = f"{pool.apply(memory, (way, args.threads, *made)):.0f}"
        for n in (1, *args.processes):
            speeds = ours if n == 1 else shared(n, args.threads, args.rounds, *made)
            ratios = [statistics.median(speeds) / statistics.median(other) for other in (plain, same)]
            table.line(
                *(name, len(one.sites), n, *(spread([x / 1e3 for x in values]) for values in (plain, same, speeds))),
                *(f"**{ratios[0]:.0%}**", f"{ratios[1]:.0%}", *(peaks if n == 1 else ("", ""))),
            )
    table.close()


if __name__ == "__main__":
    main()
