"""The value stage: the suffix forward against the full one with hooks, as a Markdown table.

    python -m benchmarks.value_stage > value_stage.md
    python -m benchmarks.value_stage --shape gpt-j-6b --layers 4 --singles 1 --no-memory > value_stage_wide.md
    python -m benchmarks.value_stage --shape llama-7b --dtype bfloat16 --device cuda

The full path runs every layer on every token, and the head on every token, of one edit at a time, as the released codes
do (``--full-head read``: the head where logits are read, as the project's own `FullForward`). It is not charged for
the pass that gives the KL its reference. Times of a whole edit are put together from medians: what prepares a stage
once, N loss evaluations, and N - 1 backward passes with Adam's step (EAC: N). In every round the paths take turns, edit
by edit. Memory is what a fresh process grows by at its peak over the built model.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.measuring import machine, resident
from benchmarks.shapes import SHAPES, Counting, Flop, Shape, build, command, editor, prompt_set
from kedit_lightning.editors import Editor
from kedit_lightning.editors.stages import Stage
from kedit_lightning.edits import Edit, Site
from kedit_lightning.models import LanguageModel

# ---------------------------------------------------------------------- time


@dataclass
class Timing:
    """Seconds of a stage's parts, one entry a round, and their FLOP."""

    prepare: list[float] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    prepared: Flop = field(default_factory=Flop)
    step: Flop = field(default_factory=Flop)

    def seconds(self, evaluations: int, updates: int, *, prepare: bool) -> float:
        """A whole stage, from medians."""
        forward, backward = statistics.median(self.forward), statistics.median(self.backward)
        return prepare * statistics.median(self.prepare) + evaluations * forward + updates * backward

    def flop(self, evaluations: int, updates: int, *, prepare: bool) -> float:
        """FLOP of the same."""
        return prepare * self.prepared.forward + evaluations * self.step.forward + updates * self.step.backward


class Runner:
    """Takes an editor through its stages on some edits, without a trainer."""

    def __init__(self, editor: Editor, edits: Sequence[Edit]) -> None:
        self.editor, self.edits, self.counting = editor, edits, Counting(editor)
        editor.prepare_rows()
        editor.moments = {}

    def __iter__(self) -> Iterator[Stage]:
        """The stages, begun."""
        self.editor.begin(list(self.edits))
        self.editor.take_up(self.editor.parts[0])
        for stage in self.editor.course():
            self.optimizer = torch.optim.Adam([delta.delta for delta in stage.deltas], lr=1e-3)
            stage.begin()
            yield stage

    def round(self, stage: Stage, timing: Timing) -> None:
        """Prepare a stage's loss, anew except where it follows on one that is compressed, and take one step."""
        if not (self.editor.compress and stage.name == "v"):
            self.editor.forwards.forget()
        start = clock(self.editor.base)
        evaluate = stage.prepare()
        prepared = clock(self.editor.base)
        loss = evaluate()
        forwarded = clock(self.editor.base)
        self.optimizer.zero_grad()
        loss.total.sum().backward()
        self.optimizer.step()
        timing.backward.append(clock(self.editor.base) - forwarded)
        timing.forward.append(forwarded - prepared)
        timing.prepare.append(prepared - start)
        timing.prepared, timing.step = self.counting.prepared, self.counting.step
        stage.observe(torch.ones(len(self.editor.batch), dtype=torch.bool, device=self.editor.base.device))


def clock(base: LanguageModel) -> float:
    """Seconds, with all that was asked of the device done."""
    if base.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def product_speed(base: LanguageModel, tokens: int) -> float:
    """FLOP per second of the machine's matrix product: down-projections of so many tokens, once in every layer."""
    weights = [base.weight(Site(layer, "mlp")).T for layer in range(base.num_layers)]
    x = torch.randn(tokens, len(weights[0]), device=base.device).to(weights[0])
    start = clock(base)
    for weight in weights:
        torch.mm(x, weight)
    return 2 * tokens * sum(weight.numel() for weight in weights) / (clock(base) - start)


@dataclass
class Case:
    """One line of the table, a stage or all of them: seconds, FLOP, and the seconds that products alone would take."""

    stage: str
    full: float
    single: float
    batch: float
    flop_full: float
    flop_single: float
    flop_batch: float
    product_single: float
    product_batch: float


def measure(
    kind: str, base: LanguageModel, shape: Shape, singles: int, batch: int, rounds: int, full: str = "released"
) -> list[Case]:
    """The lines of one editor: of the stages the seconds and FLOP per edit, and what products alone would take."""
    facts = (prompt_set()[0] * batch)[:batch]
    alone = [facts[i * len(facts) // singles] for i in range(singles)]
    runners = {(full, i): Runner(editor(kind, base, shape, full), [fact]) for i, fact in enumerate(alone)}
    runners |= {("suffix", i): Runner(editor(kind, base, shape, "suffix"), [fact]) for i, fact in enumerate(alone)}
    together = Runner(editor(kind, base, shape, "suffix"), facts)
    cases = []
    for stages in zip(*runners.values(), together, strict=True):
        timings, few, many = [Timing() for _ in stages], list[float](), list[float]()
        for turn in tqdm(range(rounds + 1), desc=f"{kind}, {stages[-1].name}", unit="round"):
            for i in range(singles):
                for at in (i, singles + i):
                    runner = list(runners.values())[at]
                    runner.round(stages[at], timings[at])
            together.round(stages[-1], timings[-1])
            few.append(product_speed(base, sum(timing.step.tokens for timing in timings[singles:-1]) // singles))
            many.append(product_speed(base, max(16, min(2048, timings[-1].step.tokens))))
            if turn == 0:  # warms up
                timings = [Timing() for _ in stages]
        stage = stages[-1]
        n = stage.steps, stage.steps - (not stage.updates_last)

        def mean(part: Sequence[Timing], what: str, *, prepare: bool, n: tuple[int, int] = n) -> float:
            return sum(getattr(timing, what)(*n, prepare=prepare) for timing in part) / len(part)

        alike, single, whole = timings[:singles], timings[singles:-1], timings[-1:]
        case = Case(
            stage.name,
            mean(alike, "seconds", prepare=False),
            mean(single, "seconds", prepare=True),
            mean(whole, "seconds", prepare=True) / batch,
            mean(alike, "flop", prepare=False),
            mean(single, "flop", prepare=True),
            mean(whole, "flop", prepare=True) / batch,
            mean(single, "flop", prepare=True) / statistics.median(few[1:]),
            mean(whole, "flop", prepare=True) / batch / statistics.median(many[1:]),
        )
        cases.append(case)
    return cases


# ---------------------------------------------------------------------- memory


def grown(kind: str, forward: str, n: int, settings: Mapping[str, Any]) -> float:
    """MB by which a process grows at its peak while it prepares every stage and takes one step in it."""
    torch.set_num_threads(settings["threads"])
    base = build(SHAPES[settings["shape"]], settings["layers"], settings["dtype"], settings["device"])
    runner = Runner(editor(kind, base, SHAPES[settings["shape"]], forward), (prompt_set()[0] * n)[:n])
    cuda = settings["device"] == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        before = resident("VmRSS")
    for stage in runner:
        runner.round(stage, Timing())
    return ((torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")) - before) / 1e6


# ---------------------------------------------------------------------- the table


def rows(kind: str, cases: Sequence[Case], batch: int, memory: Sequence[float]) -> Iterator[str]:
    """Lines of the table: one edit, then a batch, for each stage and for all."""
    names = [case.stage for case in cases]
    values = [[getattr(case, name) for case in cases] for name in Case.__dataclass_fields__ if name != "stage"]
    if len(cases) > 1:
        cases = [*cases, Case("all", *map(sum, values))]
        names = [*names, "all"]
    for case, stage in zip(cases, names, strict=True):
        for n, seconds, spent, product in (
            (1, case.single, case.flop_single, case.product_single),
            (batch, case.batch, case.flop_batch, case.product_batch),
        ):
            of_flop, faster, whole = case.flop_full / spent, case.full / seconds, case is cases[-1]
            yield (
                f"| {kind} | {stage} | {n} | {case.full:.3g} | {seconds:.3g} | **{faster:.1f}×** | {of_flop:.1f}× "
                f"| {faster / of_flop:.0%} | {product / seconds:.0%} "
                f"| {f'{memory[0]:.0f}' if whole and memory else ''} "
                f"| {f'{memory[1 if n == 1 else 2]:.0f}' if whole and memory else ''} |\n"
            )


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command(__doc__, shape="gpt2-small", dtype="float32", device="cpu", rounds=5)
    parser.add_argument("--singles", type=int, default=8, help="edits that are taken one at a time")
    parser.add_argument("--batch", type=int, default=16, help="edits that are taken together")
    parser.add_argument("--full-head", choices=("all", "read"), default="all", help="where the full path runs the head")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out, which takes a process a cell")
    args = parser.parse_args(words)
    args.layers = args.layers or SHAPES[args.shape].layers
    return args


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    args, say = arguments(words), sys.stdout.write
    full = "released" if args.full_head == "all" else "full"
    torch.set_num_threads(args.threads)
    base = build(SHAPES[args.shape], args.layers, args.dtype, args.device)
    given = " ".join(sys.argv[1:] if words is None else words)
    say(
        f"# Value stage: {args.shape}, {args.layers} layers, {args.dtype}\n\n"
        f"`python -m benchmarks.value_stage{' ' if given else ''}{given}`\n\n{machine(args.device)}.\n\n"
        f"Seconds and FLOP are per edit: full, one at a time (mean of {args.singles} facts; the head on "
        f"{'every token' if full == 'released' else 'what is read'}), against the suffix, one at a time (the same "
        f"facts) and {args.batch} together. Medians of {args.rounds} rounds in which the paths take turns. *of FLOP*: "
        "what the two paths need, without padding; *share*: the measured ratio over that one; *of product*: the FLOP "
        "over the time, against `torch.mm` on the model's matrices with as many tokens as a step has, in the same "
        "rounds; MB: growth at the peak over the built model, in a process of its own.\n\n"
        "| editor | stage | edits | full, s | suffix, s | faster | of FLOP | share | of product "
        "| full, MB | suffix, MB |\n"
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n"
    )
    processes, per_edit = multiprocessing.get_context("spawn"), {}
    for kind in args.editors:
        cases = measure(kind, base, SHAPES[args.shape], args.singles, args.batch, args.rounds, full)
        per_edit[kind] = sum(case.single for case in cases), sum(case.batch for case in cases)
        memory = []
        for forward, n in () if args.no_memory else ((full, 1), ("suffix", 1), ("suffix", args.batch)):
            with processes.Pool(1) as pool:
                memory.append(pool.apply(grown, (kind, forward, n, vars(args))))
        say("".join(rows(kind, cases, args.batch, memory)))
        sys.stdout.flush()
    if {"ROME", "EAC(ROME)"} <= set(per_edit):
        (one, many), (one_eac, many_eac) = per_edit["ROME"], per_edit["EAC(ROME)"]
        say(
            f"\nEAC on ROME (10 + 10 evaluations and updates) against ROME alone (20 and 19): {one_eac:.3g} s against "
            f"{one:.3g} s, {one_eac / one:.2f} times, for one edit; {many_eac:.3g} s against {many:.3g} s, "
            f"{many_eac / many:.2f} times, for each of {args.batch}.\n"
        )


if __name__ == "__main__":
    main()
