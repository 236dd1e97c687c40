"""Batch least squares, ours against the plain way of the released codes: time and peak memory, as a Markdown table.

    python benchmarks/solvers.py > benchmarks/solvers.md
    python benchmarks/solvers.py --device cuda --width 16384 --out-dim 4096

Ours is `KeyStatistics.least_squares`, which keeps the factor of C between calls; plain is
``torch.linalg.solve(λ C + K Kᵀ, K)`` in float64, from scratch at every call. Both start from float32 statistics, keys
and residuals and end with the dense Δ in float32, ours by way of `WeightDelta`. Both see the same data, each cell in a
process of its own; memory is what a cell's peak adds to its inputs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kedit_lightning import __version__
from kedit_lightning.delta import WeightDelta
from kedit_lightning.models.key_statistics import KeyStatistics

EDITS = (1, 10, 100, 1_000, 10_000)
WEIGHT = 15_000.0


def plain(moment: Tensor, residual: Tensor, keys: Tensor) -> Tensor:
    """Δ as in the released code of MEMIT (`memit_main.py`), columns being edits."""
    keys, residual = keys.double().T, residual.double().T
    solved = torch.linalg.solve(WEIGHT * moment.double() + keys @ keys.T, keys)
    return (residual @ solved.T).float().cpu()


def measure(way: str, n: int, k: int, d: int, runs: int, device: str) -> tuple[float, float, float, Tensor]:
    """Seconds of the first call, median seconds of the calls after it, peak memory in GB, and a part of Δ."""
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(256, k, generator=generator)
    moment = (some.T @ some / 256).to(device)
    moment.diagonal().add_(0.1)
    keys, residual = (
        torch.randn(n, k, generator=generator).to(device),
        torch.randn(n, d, generator=generator).to(device),
    )
    kept = KeyStatistics(moment, 10 * k)

    def ours() -> Tensor:
        return WeightDelta.low_rank("w", *kept.least_squares(residual, keys, WEIGHT)).update[:64]

    def released() -> Tensor:
        return plain(moment, residual, keys)[:64]

    call: Callable[[], Tensor] = ours if way == "ours" else released
    before = occupied(device)
    seconds = []
    for _ in range(runs + 1 if way == "ours" else runs):
        start = time.perf_counter()
        update = call()
        seconds.append(time.perf_counter() - start)
    later = seconds[1:] if way == "ours" else seconds
    return seconds[0], statistics.median(later), (peak(device) - before) / 1e9, update


def occupied(device: str) -> int:
    """Bytes in use now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def peak(device: str) -> int:
    """Bytes in use at the worst moment so far."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else 1024 * resource.getrusage(0).ru_maxrss


def machine(device: str) -> str:
    """What this was run on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    if device == "cpu" and (info := Path("/proc/cpuinfo")).exists():
        name = next(line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line)
    return f"{name}, {torch.get_num_threads()} threads"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=6400, help="width k of the keys; 6400 is GPT-2 XL's")
    parser.add_argument("--out-dim", type=int, default=1600, help="width d of the values")
    parser.add_argument("--runs", type=int, default=5, help="calls a cell; a third as many above 1,000 edits")
    parser.add_argument("--edits", type=int, nargs="+", default=EDITS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    say = sys.stdout.write
    say(
        f"# Batch least squares: k = {args.width:,}, d = {args.out_dim:,}\n\n"
        f"`python benchmarks/solvers.py {' '.join(sys.argv[1:])}`".replace(" `", "`")
        + f"\n\n{machine(args.device)}; Python {platform.python_version()}, torch {torch.__version__}, kedit_lightning "
        f"{__version__}. Float64. Plain: `torch.linalg.solve(λ C + K Kᵀ, K)` from scratch at every call. The first "
        "call of ours factorises C and estimates its condition where the form needs it, once a layer. Seconds are "
        "medians of the calls given (the first call is one); GB is the peak above the inputs, the kept factor "
        "included.\n\n"
        "| edits | calls | plain, s | ours, s | ours, first call, s | faster | plain, GB | ours, GB | apart |\n"
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n"
    )
    processes = multiprocessing.get_context("spawn")
    for n in args.edits:
        runs = args.runs if n <= 1_000 else max(1, args.runs // 3)
        found = {}
        for way in ("plain", "ours"):
            with processes.Pool(1) as pool:
                found[way] = pool.apply(measure, (way, n, args.width, args.out_dim, runs, args.device))
        (_, theirs, their_peak, expected), (first, later, our_peak, update) = found["plain"], found["ours"]
        apart = float((update - expected).norm() / expected.norm())
        say(
            f"| {n:,} | {runs} | {theirs:.2f} | {later:.3f} | {first:.2f} | {theirs / later:.1f}× | {their_peak:.2f} "
            f"| {our_peak:.2f} | {apart:.0e} |\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
