"""Seconds per edit and peak memory at the widths of large models, as a Markdown table.

    python -m benchmarks.large_models --shape gpt-j-6b --device cuda --dtype bfloat16 > benchmarks/large_models_gptj.md
    python -m benchmarks.large_models --shape llama-7b --device cuda --dtype bfloat16 > benchmarks/large_models_llama.md
    python -m benchmarks.large_models --shape gpt-j-6b --device cpu --layers 2 --edits 1 10

Random weights, the facts of `prompts.jsonl` over and over, and a random second moment of the keys' true width. The
value stage is timed on the first part that fits into memory together, all stages at their full number of evaluations,
put together from the median of a few; what writes the values (reading keys and values of all edits, and the closed
form) is run whole, with C factorised before.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.measuring import machine, resident
from benchmarks.shapes import SHAPES, build, command, editor, prompt_set
from benchmarks.value_stage import Runner, Timing, clock
from kedit_lightning.edits import Site
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.key_statistics import KeyStatistics

PUBLISHED = {
    "gpt-j-6b": {"ROME": 4.4, "MEMIT": 3.2, "JEEP": 1.19},
    "llama-7b": {"ROME": 13.3, "MEMIT": 1.3, "JEEP": 1.30},
}
"""Seconds per edit of 10,000 on an A100 (JEEP's paper)."""


def second_moment(base: LanguageModel) -> KeyStatistics:
    """A random one, of full rank."""
    k = base.weight(Site(0, "mlp")).shape[1]
    some = torch.randn(256, k, device=base.device)
    moment = some.T @ some / 256
    moment.diagonal().add_(0.1)
    return KeyStatistics(moment, 10 * k)


def measure(kind: str, base: LanguageModel, shape: str, n: int, rounds: int, moment: KeyStatistics) -> list[float]:
    """Edits of a part, seconds per edit of the value stage and of writing, and GB at the peak over the built model."""
    facts = prompt_set()[0]
    chosen = editor(kind, base, SHAPES[shape], "suffix")
    chosen.max_tokens = None
    runner = Runner(chosen, [facts[i % len(facts)] for i in range(n)])
    cuda = base.device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        before = resident("VmRSS")
    value = 0.0
    for stage in runner:
        timing, warm = Timing(), Timing()
        runner.round(stage, warm)
        for _ in range(rounds):
            runner.round(stage, timing)
        value += timing.seconds(stage.steps, stage.steps - (not stage.updates_last), prepare=True)
    for delta in chosen._deltas:
        delta.whole()
    chosen.forwards.forget()
    chosen.moments = dict.fromkeys(chosen.sites(), moment)
    seconds = []
    for _ in range(2):  # the first also factorises C
        start = clock(base)
        with torch.no_grad():
            for _ in chosen.write():
                pass
        seconds.append(clock(base) - start)
    grown = (torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")) - before
    part = len(chosen.parts[0])
    return [part, value / part, seconds[-1] / n, grown / 1e9]


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = command(__doc__, shape="gpt-j-6b", dtype="bfloat16", device="cuda", rounds=3)
    parser.add_argument("--edits", type=int, nargs="+", default=(1, 100, 1000))
    args, say = parser.parse_args(words), sys.stdout.write
    torch.set_num_threads(args.threads)
    layers = args.layers or SHAPES[args.shape].layers
    base = build(SHAPES[args.shape], layers, args.dtype, args.device)
    moment = second_moment(base)
    given = " ".join(sys.argv[1:] if words is None else words)
    say(
        f"# {args.shape}, {layers} layers, {args.dtype}\n\n`python -m benchmarks.large_models {given}`\n\n"
        f"{machine(args.device)}. Keys {moment.mean.shape[0]:,} wide. Seconds are per edit; *together*: edits whose "
        f"values are optimised at once; GB: growth at the peak over the built model and C; published: an A100, all "
        f"layers.\n\n"
        "| editor | edits | together | value, s | writing, s | both, s | GB | 10,000 edits, h | published, s (h) |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|\n"
    )
    for kind in args.editors:
        for n in args.edits:
            together, value, writing, grown = measure(kind, base, args.shape, n, args.rounds, moment)
            both, known = value + writing, PUBLISHED.get(args.shape, {}).get(kind)
            say(
                f"| {kind} | {n:,} | {together:,.0f} | {value:.3g} | {writing:.3g} | {both:.3g} | {grown:.2f} "
                f"| {both * 10_000 / 3600:.2f} | {f'{known} ({known * 10_000 / 3600:.1f})' if known else ''} |\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
