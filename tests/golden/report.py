"""What a comparison looks like on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from tests.golden.compare import QUANTITIES, Distance
from tests.golden.editors import Recorded

HEADINGS = {"before": "logits before", "delta/step": "delta by step", "logits": "logits after", "right": "Lambda"}


def table(distances: Sequence[Distance], recorded: Recorded) -> list[str]:
    """Largest relative error by request and quantity, then a line for each thing that is too far off."""
    present = [q for q in QUANTITIES if any(d.quantity == q for d in distances)]
    requests = list(dict.fromkeys(d.request for d in distances))
    rows = [["request", *(HEADINGS.get(q, q) for q in present), "ids and counts"]]
    for request in requests:
        mine = [d for d in distances if d.request == request]
        exact = [d for d in mine if d.quantity == "exact"]
        equal = ("equal" if not any(d.error for d in exact) else "differ") if exact else "-"
        rows.append([request or "batch", *(_cell(mine, q) for q in present), equal])
    rows.append(["largest", *(_cell(distances, q) for q in present), ""])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  "
        + "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return [line.rstrip() for line in lines] + [f"  {line}" for line in failures(distances, recorded)]


def too_far(distances: Sequence[Distance], recorded: Recorded) -> list[Distance]:
    """Those that pass the tolerance."""
    return [d for d in distances if not d.error <= recorded.loose.get(d.quantity, recorded.tolerance)]


def failures(distances: Sequence[Distance], recorded: Recorded) -> list[str]:
    """A line for each distance that passes the tolerance."""
    lines = []
    for d in too_far(distances, recorded):
        what = d.note or f"relative error {d.error:.1e}"
        lines.append(f"FAILED {d.request or 'batch'}: {d.name}: {what}")
    return lines


def every(distances: Sequence[Distance]) -> list[str]:
    """A line for each distance."""
    return [f"    {d.request or 'batch':8}{d.name:44}{d.error:.1e}  {d.note}".rstrip() for d in distances]


def _cell(distances: Sequence[Distance], quantity: str) -> str:
    errors = [d.error for d in distances if d.quantity == quantity]
    return f"{max(errors):.1e}" if errors else "-"
