"""A plan as the terminal shows it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich import box
from rich.table import Table
from rich.text import Text

from kedit_lightning.plan import DISK, Plan

CAPTION = (
    "Times are of one step here and now, times the steps at most: stages may end early. Starting, solving for the "
    "updates, callbacks and figures come on top. Memory for a step is {} and that for measuring is not counted."
)


def table(plan: Plan) -> Table:
    """Rows, steps, memory, time, files, and whether it fits."""
    found = Table(title=f"Plan: {plan.title}", title_justify="left", box=box.HORIZONTALS, show_header=False)
    on_gpu = any(place != DISK and place != "main memory" for place in plan.free)
    found.caption = CAPTION.format("measured" if on_gpu else "estimated from the tokens")
    found.caption_justify = "left"
    found.add_column(no_wrap=True)
    found.add_column(overflow="fold")
    for section in (_rows(plan), _stages(plan), _memory(plan), _time(plan), _written(plan)):
        for name, value in section:
            found.add_row(name, value)
        found.rows[-1].end_section = True
    fits = (
        Text(f"no: {' and '.join(plan.tight)} too small; {plan.advice}", "red") if plan.tight else Text("yes", "green")
    )
    found.add_row(Text("fits", "bold"), fits)
    return found


def _rows(plan: Plan) -> Iterator[tuple[str, str]]:
    rows, n = plan.rows, sum(plan.batches)
    passes = "" if plan.passes == 1 else f", {plan.passes} passes each"
    batches = (
        f"{len(plan.batches):,} batches of at most {max(plan.batches):,}" if len(plan.batches) > 1 else "one batch"
    )
    beside = f", {plan.beside} of them side by side" if plan.beside > 1 else ""
    yield "edits", f"{n:,} in {batches}{beside}{passes}"
    yield "rows", f"{rows.rows:,}, {rows.rows / n:.3g} an edit"
    mean, most = sum(rows.tokens) / n, max(rows.tokens)
    yield "tokens", f"{sum(rows.tokens):,}, {mean:.1f} an edit, {most:,} at most; {rows.padding:.0%} padding"
    parts = sum(map(len, rows.parts))
    yield "parts", f"{parts:,}, of at most {rows.largest:,} tokens with padding (max_tokens {plan.budget:,})"


def _stages(plan: Plan) -> Iterator[tuple[str, str]]:
    for step in plan.steps:
        run = "the head alone"
        if step.layers:
            run = f"layers {step.layers[0]} to {step.layers[1]} of {plan.layers}, {step.share:.0%} of the tokens"
        less = f"{step.flop / 1e9:.3g} GFLOP a step, {step.full / step.flop:.1f} times less than a full forward"
        yield f"stage {step.stage}, layer {step.layer}", f"{step.steps} steps at most; {run}; {less}"
    if not plan.steps:
        yield "stages", "not tried: there is no room for an edit"


def _memory(plan: Plan) -> Iterator[tuple[str, str]]:
    yield "model", f"{size(plan.weights)} of weights, loaded"
    for place, free in plan.free.items():
        if place != DISK:
            held = "; ".join(f"{need.what} {size(need.size)}" for need in plan.needs if need.place == place)
            yield place, f"{size(plan.needed(place))} of {size(free)} free: {held or 'nothing'}"


def _time(plan: Plan) -> Iterator[tuple[str, str]]:
    moments = plan.moments
    if moments.missing and moments.seconds is not None:
        over = f"{moments.documents:,} documents" if moments.tokens is None else f"{moments.tokens:,} tokens"
        speed = f"{1 / moments.seconds:,.0f} tokens a second"
        known = duration(plan.collecting)
        yield "statistics", f"{known}: {moments.missing} of {moments.sites} to be computed over {over}, {speed}"
    elif moments.sites:
        yield "statistics", f"{moments.sites} of {moments.sites} are there"
    if plan.steps:
        each = "; ".join(f"{step.stage} {duration(step.seconds)} a step" for step in plan.steps)
        yield "optimising", f"{duration(plan.optimising)} with all steps: {each}"
    yield "measuring", f"about {duration(plan.measuring)}"
    total = sum(time for time in (plan.optimising, plan.measuring, plan.collecting) if not math.isnan(time))
    without = "" if not math.isnan(plan.optimising + plan.collecting) else " and what is unknown"
    yield "in all", f"about {duration(total)}{without}"


def _written(plan: Plan) -> Iterator[tuple[str, str]]:
    n, commits = sum(plan.batches), plan.commits
    yield "run directory", str(plan.run)
    yield (
        "deltas/",
        f"{len(commits):,} files of {size(max(commits))} and some KiB of metadata, {size(sum(commits))} in all",
    )
    yield "delta.safetensors", size(plan.merged)
    yield (
        "edits.jsonl",
        f"{n:,} lines, and as many of before.jsonl; metrics.json, TensorBoard's events, figures: some hundred KiB",
    )
    yield DISK, f"{size(plan.needed(DISK))} of {size(plan.free[DISK])} free"


def _fits(plan: Plan) -> Text:
    if not plan.tight:
        return Text("yes", "green")
    return Text(f"no: {' and '.join(plan.tight)} too small; {plan.advice}", "red")


def size(n: float) -> str:
    """Bytes in words.

    >>> size(999), size(2048), size(3.5 * 2**30)
    ('999 B', '2.0 KiB', '3.5 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(0.0214), duration(72), duration(7300), duration(3e5), duration(math.nan)
    ('0.021 s', '72 s', '122 min', '83 h', 'unknown')
    """
    if math.isnan(seconds):
        return "unknown"
    if seconds < 10:
        return f"{seconds:.2g} s"
    for most, unit, of_one in ((120, "s", 1), (10_800, "min", 60), (360_000, "h", 3600)):
        if seconds < most:
            return f"{seconds / of_one:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"
