"""What an edit makes of the indirect effects of MLP outputs: TOP's relative indirect effect (TOP, Figs. 3 and 7)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import count
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kedit_lightning.callbacks.figures import INK, SCORES, STYLE, blank, headline
from kedit_lightning.errors import KeditError
from kedit_lightning.lines import Record
from kedit_lightning.metrics.functional import summarize
from kedit_lightning.models.progress import steps
from kedit_lightning.probes.base import Finding, Probe, Study
from kedit_lightning.probes.token_classes import CLASSES
from kedit_lightning.probes.tracing import (
    CORRUPTED,
    Asked,
    Kind,
    Tracer,
    by_class,
    check,
    noise_level,
    of_edited,
    of_original,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKER: Any = MappingProxyType({"ms": 3.5, "mfc": "white", "mec": INK})


class RelativeIndirectEffect(Probe):
    """How much more an edited model's new answer rests on each token than the original model's answer did.

    RIE = log(IE(o*, edited) / IE(o, original)) of a token and layer (TOP, Eq. 7), by causal tracing of MLP outputs; for
    each token its largest over the layers; then means over a prompt's tokens of a class, and over prompts. Tokens of
    the subject are restored where the subject is corrupted, all others where these are.

    A cell is undefined where either effect is not above ``floor``. Beside TOP's measure stands the logarithm of the
    ratio of the two largest effects over the layers (``of_maxima``), which no single small effect can make large.

    Args:
        edits: How many edits are taken by chance.
        windows: Layers of which MLP outputs are restored together, as in `CausalTrace`; TOP's is 10.
        noise: As in `CausalTrace`.
        copies: Corrupted copies of a prompt.
        floor: Both effects are to be above.
        seed: Of the choice of edits.

    Raises:
        KeditError: A setting is out of range.
    """

    def __init__(
        self,
        edits: int = 100,
        windows: Sequence[int] = (10,),
        noise: float = 3.0,
        copies: int = 10,
        floor: float = 1e-4,
        seed: int = 0,
    ) -> None:
        check(edits, noise, copies, windows)
        if not floor > 0:
            msg = f"expected a floor above 0, whose logarithm there is, got {floor:g}"
            raise KeditError(msg)
        self.edits, self.noise, self.copies, self.floor, self.seed = edits, noise, copies, floor, seed
        self.kinds: list[Kind] = [("mlp", window) for window in dict.fromkeys(windows)]

    def look(self, study: Study) -> Iterator[Finding]:
        """As `Probe.look`."""
        tracer = Tracer(study.base, noise_level(study.base, study.subjects, self.noise), self.copies, self.kinds)
        asked, found = of_original(study, self.edits, self.seed)
        done = count(1)
        with steps("relative indirect effect") as step:

            def traced(one: Asked) -> _Effects:
                step(next(done), 2 * len(asked), "edited" if one.owner >= 0 else "original")
                return effects_of(tracer, one)

            before = [traced(one) for one in asked]
            with study.singles.ready():
                after = [traced(one) if one else None for one in of_edited(study, [one.edit for one in asked])]
        pairs = [(x, y) for x, y in zip(before, after, strict=True) if y is not None]
        rows, notes = list[Record](), {"edits": found["edits"], "used": len(pairs)}
        notes |= {"unanswered_by_original": found["unanswered"], "unanswered_by_edited": after.count(None)}
        gaps: Record = {}
        for kind in self.kinds:
            more, gap = compare(pairs, kind, self.floor)
            rows += more
            gaps[f"window_{kind[1]}"] = gap
        title = f"{type(study.editor).__name__}: relative indirect effect of MLP outputs, {len(pairs)} edits"
        absent = [name for name in CLASSES if not any(row["token"] == name for row in rows)]
        told = {**notes, "noise_std": tracer.level, "floor": self.floor, "classes_absent": absent}
        yield Finding(
            "relative_indirect_effect", rows, draw(rows, title), {**told, "last_subject_less_last_relation": gaps}
        )


_Effects = tuple[list[str], dict[Kind, Tensor]]
"""The class of every token of a prompt; and by kind the indirect effects, ``(t, layers)``, nan where there are none."""


def effects_of(tracer: Tracer, asked: Asked) -> _Effects:
    """The indirect effects of a prompt's tokens, each from the run in which it is corrupted."""
    found: dict[Kind, Tensor] = {}
    classes: list[str] = []
    for corrupt, names in CORRUPTED.items():
        if (trace := tracer(asked, corrupt)) is None:
            continue
        classes, mine = trace.classes, torch.tensor([name in names for name in trace.classes])
        for kind, effects in trace.effects.items():
            found[kind] = effects.where(mine[:, None], found.get(kind, torch.full_like(effects, math.nan)))
    return classes, found


def ratios(before: Tensor, after: Tensor, floor: float) -> Tensor:
    """log(after / before), nan where either is not above the floor.

    >>> ratios(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([2.0, 0.05, 1.0]), 0.1)
    tensor([0.6931,    nan,    nan])
    """
    return (after / before).log().where((before > floor) & (after > floor), math.nan)


def largest(values: Tensor) -> Tensor:
    """The largest of each line but for nan, of which a line of nothing else remains nan.

    >>> largest(torch.tensor([[1.0, math.nan], [math.nan, math.nan]]))
    tensor([1., nan])
    """
    return values.nan_to_num(nan=-math.inf).amax(dim=-1).where(~values.isnan().all(dim=-1), math.nan)


def compare(pairs: Sequence[tuple[_Effects, _Effects]], kind: Kind, floor: float) -> tuple[list[Record], Record]:
    """RIE by token class, with 95 % intervals over prompts.

    Args:
        pairs: The indirect effects of each prompt in the original and in the edited model.
        kind: What was restored.
        floor: As in `RelativeIndirectEffect`.

    Returns:
        A record a class; and by measure how much more the last subject token has than the last relation token, paired.
    """
    values: dict[str, list[Tensor]] = {"rie": [], "of_maxima": []}
    cells = undefined = torch.zeros(len(CLASSES), dtype=torch.long)
    for (classes, before), (_, after) in pairs:
        found = ratios(before[kind], after[kind], floor)
        values["rie"].append(by_class(largest(found), classes))
        maxima = ratios(largest(before[kind]), largest(after[kind]), floor)
        values["of_maxima"].append(by_class(maxima, classes))
        of = torch.tensor([[name == each for name in classes] for each in CLASSES])
        cells = cells + of.sum(dim=1) * found.shape[1]
        undefined = undefined + (of.long() @ found.isnan().long()).sum(dim=1)
    stacked = {name: torch.stack(lines) for name, lines in values.items()}
    rows: list[Record] = []
    for i, name in enumerate(CLASSES):
        if cells[i]:
            row: Record = {"window": kind[1], "token": name}
            for measure, lines in stacked.items():
                mean = summarize(lines[:, i])
                row |= {measure: mean.mean, f"{measure}_ci95": mean.ci95, f"{measure}_edits": mean.n}
            rows.append({**row, "cells": int(cells[i]), "undefined": int(undefined[i])})
    ls, lr = (list(CLASSES).index(name) for name in ("ls", "lr"))
    return rows, {name: summarize(lines[:, ls] - lines[:, lr]).as_dict() for name, lines in stacked.items()}


def draw(rows: Sequence[Record], title: str) -> Figure:
    """RIE by token class, a bar for each window, with 95 % intervals; a point: the ratio of the largest effects."""
    from matplotlib import rc_context

    windows = list(dict.fromkeys(row["window"] for row in rows))
    names = [name for name in CLASSES if any(row["token"] == name for row in rows)]
    wide, colours = 0.8 / len(windows), [colour for colour in SCORES if colour != INK]  # intervals are INK
    with rc_context(STYLE):
        figure = blank(8.2, 4.4)
        axis = figure.subplots()
        for k, window in enumerate(windows):
            mine = {row["token"]: row for row in rows if row["window"] == window}
            at = [i + (k - (len(windows) - 1) / 2) * wide for i in range(len(names))]
            colour, plural = colours[k % len(colours)], "s" * (window > 1)
            label = f"window of {window} layer{plural}"
            axis.bar(at, [mine[name]["rie"] for name in names], 0.92 * wide, color=colour, label=label, zorder=2)
            for measure, aside, style in (("rie", -0.2, {"fmt": "none"}), ("of_maxima", 0.2, {"fmt": "D", **MARKER})):
                means = [mine[name][measure] for name in names]
                halves = [mine[name][f"{measure}_ci95"] or math.nan for name in names]  # 0: there is but one prompt
                places = [x + aside * wide for x in at]
                axis.errorbar(places, means, halves, ecolor=INK, elinewidth=1, capsize=2, zorder=3, **style)
        axis.plot([], [], "D", **MARKER, label="ratio of the largest effects")
        axis.axhline(0, color=INK, lw=0.8)
        axis.set_xticks(range(len(names)), [CLASSES[name].replace(" ", "\n") for name in names])
        axis.set_ylabel("relative indirect effect, largest over layers")
        axis.grid(axis="y", zorder=0)
        figure.legend(loc="outside right center", fontsize=8.5)
        headline(figure, title)
    return figure
