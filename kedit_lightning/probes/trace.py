"""Where in the model an answer is decided: causal tracing (ROME, section 2; TOP, Figs. 9 and 10)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import torch

from kedit_lightning.callbacks.figures import INK, OTHERS, SCORES, STYLE, band, blank, headline
from kedit_lightning.edits import Part
from kedit_lightning.errors import KeditError
from kedit_lightning.lines import Record
from kedit_lightning.metrics.functional import summarize
from kedit_lightning.models.progress import steps
from kedit_lightning.probes.base import Finding, Probe, Study
from kedit_lightning.probes.token_classes import CLASSES
from kedit_lightning.probes.tracing import (
    Asked,
    Corrupt,
    Kind,
    Trace,
    Tracer,
    by_class,
    check,
    noise_level,
    of_edited,
    of_original,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAPS = {"block": "Purples", "mlp": "Greens", "attn": "Reds"}
"""ROME's colours."""
WORDS = {"block": "block outputs", "mlp": "MLP outputs", "attn": "attention outputs"}
COLOURS = dict(zip(CLASSES, (*OTHERS[1:], SCORES[1], SCORES[0], SCORES[2], OTHERS[0], INK), strict=True))


class CausalTrace(Probe):
    """How much of the answer comes back where clean states are restored in a run whose tokens are corrupted by noise.

    A cell's indirect effect is the answer's probability with a part of some layers restored at a token, less that
    without, as means over the noisy copies (ROME, section 2.1). The answer is the model's own next token, which has to
    be the edit's whole answer: ``target_true``, and of the edited model ``target_new``.

    Args:
        edits: How many edits are taken by chance.
        corrupt: Which tokens get noise, a run each: the subject's, or all others.
        parts: What is restored: the outputs of blocks (one at a time), of MLPs, of attention.
        windows: Layers of which MLP or attention outputs are restored together, ⌊w / 2⌋ of them below the cell's;
            clipped at both ends. The papers' is 10.
        noise: Its standard deviation, in those of the embeddings of all subjects' tokens.
        copies: Corrupted copies of a prompt.
        edited: Trace also the same prompts after their own edit each.
        cases: Of how many edits there is a picture of their own.
        seed: Of the choice of edits.

    Raises:
        KeditError: A setting is out of range.
    """

    def __init__(
        self,
        edits: int = 100,
        corrupt: Sequence[Corrupt] = ("subject", "relation"),
        parts: Sequence[Part] = ("block", "mlp", "attn"),
        windows: Sequence[int] = (10,),
        noise: float = 3.0,
        copies: int = 10,
        edited: bool = False,
        cases: int = 1,
        seed: int = 0,
    ) -> None:
        check(edits, noise, copies, windows)
        if not corrupt or not parts:
            msg = f"expected something to corrupt and to restore, got corrupt {list(corrupt)}, parts {list(parts)}"
            raise KeditError(msg)
        self.edits, self.corrupt, self.noise, self.copies = edits, list(dict.fromkeys(corrupt)), noise, copies
        self.kinds: list[Kind] = [
            (part, window) for part in dict.fromkeys(parts) for window in ([1] if part == "block" else windows)
        ]
        self.edited, self.cases, self.seed = edited, cases, seed

    def look(self, study: Study) -> Iterator[Finding]:
        """As `Probe.look`."""
        tracer = Tracer(study.base, noise_level(study.base, study.subjects, self.noise), self.copies, self.kinds)
        asked, found = of_original(study, self.edits, self.seed)
        notes, done = {**found, "noise_std": tracer.level}, count(1)
        with steps("causal trace") as step:

            def traced(one: Asked) -> list[Trace | None]:
                step(next(done), len(asked) * (1 + self.edited), "edited" if one.owner >= 0 else "")
                return [tracer(one, corrupt) for corrupt in self.corrupt]

            before = [traced(one) for one in asked]
            yield from self._findings(before, notes, "")
            if not self.edited:
                return
            edits = [one.edit for one in asked]
            with study.singles.ready():
                after = [traced(one) if one else None for one in of_edited(study, edits)]
        notes |= {"edits": len(edits), "unanswered": after.count(None)}
        yield from self._findings([trace for trace in after if trace], notes, "_edited", before)

    def _findings(
        self,
        traces: Sequence[Sequence[Trace | None]],
        notes: Record,
        after: str,
        before: Sequence[Sequence[Trace | None]] = (),
    ) -> Iterator[Finding]:
        """The mean of all, and the pictures of single edits, after an edit with what was before it; a line an edit."""
        for i, (corrupt, run) in enumerate(zip(self.corrupt, zip(*traces, strict=True), strict=True)):
            if not (there := [trace for trace in run if trace is not None]):
                msg = f"causal trace: expected prompts with {corrupt} tokens to corrupt, got none; leave {corrupt} out"
                raise KeditError(msg)
            rows, name = means(there), f"causal_trace_{corrupt}{after}"
            high, low = (summarize(torch.tensor([getattr(x, y) for x in there])).as_dict() for y in ("high", "low"))
            absent = [kind for kind in CLASSES if not any(kind in trace.classes for trace in there)]
            more = {"used": len(there), "without_such_tokens": len(run) - len(there), "classes_absent": absent}
            title = f"Indirect effects, {corrupt} tokens corrupted, {len(there)} prompts{after.replace('_', ', ')}"
            yield Finding(name, rows, draw(rows, title), {**notes, **more, "clean": high, "corrupted": low})
            for trace in there[: self.cases]:
                case = f"{name}_case_{trace.edit.case_id}"
                told = {"prompt": trace.edit.text, "answer": trace.answer, "clean": trace.high, "corrupted": trace.low}
                same = [one for line in before if (one := line[i]) and one.edit == trace.edit]
                yield Finding(case, single(trace), draw_single([*same, trace]), told)


def means(traces: Sequence[Trace]) -> list[Record]:
    """The mean indirect effect by kind, token class and layer, over prompts, with its 95 % interval."""
    rows: list[Record] = []
    for part, window in traces[0].effects:
        every = torch.stack([by_class(trace.effects[part, window], trace.classes) for trace in traces])
        for i, name in enumerate(CLASSES):
            for layer in range(every.shape[2]):
                found = summarize(every[:, i, layer])
                if found.n:
                    row = {"part": part, "window": window, "token": name, "layer": layer}
                    rows.append({**row, "mean": found.mean, "ci95": found.ci95, "edits": found.n})
    return rows


def single(trace: Trace) -> list[Record]:
    """The indirect effects of one prompt."""
    return [
        {
            **{"part": part, "window": window, "position": i, "token": token, "class": kind},
            **{"layer": layer, "effect": float(effect)},
        }
        for (part, window), effects in trace.effects.items()
        for i, (token, kind) in enumerate(zip(trace.tokens, trace.classes, strict=True))
        for layer, effect in enumerate(effects[i])
    ]


def draw(rows: Sequence[Record], title: str) -> Figure:
    """Heat maps of token classes and layers, and below the same as curves with their 95 % intervals."""
    from matplotlib import rc_context

    kinds = list(dict.fromkeys((row["part"], row["window"]) for row in rows))
    names = [name for name in CLASSES if any(row["token"] == name for row in rows)]
    with rc_context(STYLE):
        figure = blank(max(6.4, 4.4 * len(kinds)), 6.6)
        upper, lower = figure.subplots(2, len(kinds), squeeze=False, height_ratios=[1, 1.1])
        for above, below, (part, window) in zip(upper, lower, kinds, strict=True):
            mine = [row for row in rows if (row["part"], row["window"]) == (part, window)]
            lines = {name: [row for row in mine if row["token"] == name] for name in names}
            heat(above, [[row["mean"] for row in lines[name]] for name in names],
                 [CLASSES[name] for name in names], (part, window), max(row["mean"] for row in mine))  # fmt: skip
            for name, line in lines.items():
                points = [{"edits": row["layer"], "mean": row["mean"], "ci95": row["ci95"]} for row in line]
                band(below, points, COLOURS[name], CLASSES[name], ms=3)
            below.set_xlabel("layer")
            below.set_ylabel("indirect effect")
            below.grid(axis="y", zorder=0)
        figure.legend(*lower[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names), fontsize=9)
        headline(figure, title)
    return figure


def draw_single(traces: Sequence[Trace]) -> Figure:
    """A heat map of tokens and layers for each kind, as in TOP's Fig. 9; a line a model, on the same scale."""
    from matplotlib import rc_context

    kinds = list(traces[0].effects)
    with rc_context(STYLE):
        figure = blank(max(6.4, 4.4 * len(kinds)), 0.8 + len(traces) * (0.9 + 0.26 * len(traces[0].tokens)))
        for line, trace in zip(figure.subfigures(len(traces), 1, squeeze=False)[:, 0], traces, strict=True):
            axes: Any = line.subplots(1, len(kinds), squeeze=False)[0]
            for axis, kind in zip(axes, kinds, strict=True):
                top = max(float(each.effects[kind].max()) for each in traces)
                heat(axis, trace.effects[kind].tolist(), trace.tokens, kind, top)
                axis.set_xlabel("layer")
            told = f"{trace.answer}: probability {trace.high:.3f}, with noise (*) {trace.low:.3f}; what restoring adds"
            line.suptitle(told if trace is traces[0] else f"after the edit, {told}", fontsize=12, x=0.012, ha="left")
    return figure


def heat(axis: Axes, effects: Sequence[Sequence[float]], names: Sequence[str], kind: Kind, top: float) -> None:
    """A map of indirect effects, shape ``(tokens, layers)``, up to ``top``; what is below 0 is drawn as 0."""
    from matplotlib.ticker import MaxNLocator

    part, window = kind
    image = axis.imshow(effects, cmap=MAPS[part], aspect="auto", interpolation="nearest", vmin=0, vmax=max(top, 1e-6))
    axis.figure.colorbar(image, ax=axis)
    axis.set_yticks(range(len(names)), names)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_title(WORDS[part] + (f", {window} layers" if window > 1 else ", one layer"), loc="left")
