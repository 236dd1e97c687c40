"""What a run will cost, found by doing a little of it: a step of every stage, a few edits measured, a few documents."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from kedit_lightning.editors import Editor, Stage
from kedit_lightning.edits import Edit, Site
from kedit_lightning.metrics import Evaluator
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.devices import is_out_of_memory
from kedit_lightning.models.full import FullForward
from kedit_lightning.models.memory import activations
from kedit_lightning.models.packing import KeyReader
from kedit_lightning.models.statistics import Statistics
from kedit_lightning.models.work import flop, watched

T = TypeVar("T")


@contextmanager
def _asked_for(editor: Editor) -> Iterator[list[FullForward]]:
    """The forward passes that stages ask the editor for inside the context."""
    found: list[FullForward] = []

    def listening(*asked: Any, **more: Any) -> FullForward:
        found.append(type(editor).forward_from(editor, *asked, **more))
        return found[-1]

    editor.forward_from = listening  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del editor.forward_from


@dataclass(frozen=True)
class Step:
    """One step of a stage: a loss evaluation, its gradient and an update, of the edits of one part.

    Args:
        stage: The stage's name.
        layer: The layer that its pass starts from.
        steps: Steps at most.
        layers: The first and the last layer that it runs; None where it runs the head alone.
        share: Share of the rows' tokens that it runs there.
        flop: Its floating-point operations, see `flop`.
        full: Those where all tokens went through all layers up to the last (``forward: full``).
        prepare: Seconds that it takes before the first step.
        seconds: Seconds of a step.
        memory: Bytes that it takes at its peak; on a CPU estimated, see `models.memory.activations`.
        part: Tokens of the part, padding included.
    """

    stage: str
    layer: int
    steps: int
    layers: tuple[int, int] | None
    share: float
    flop: float
    full: float
    prepare: float
    seconds: float
    memory: float
    part: int


def step_of_every_stage(editor: Editor, edits: Sequence[Edit]) -> list[Step]:
    """Do one step of every stage for the first part of an edit batch; neither weights nor files are touched.

    Where a part does not fit into memory it is made half as large, as in a fit.

    Args:
        editor: The editor; it takes up the edits.
        edits: The edits of the batch.

    Raises:
        KeditError: A single edit does not fit into memory.
    """
    found: list[Step] = []
    for pass_, layer in enumerate(editor.passes()):
        editor.begin(edits, pass_)
        while True:
            try:
                found += _steps(editor, layer, warm=bool(found))
                break
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                editor.zero_grad()
                editor.parts.divide(0)
                editor.budget = editor.parts.max_tokens
    return found


def _steps(editor: Editor, layer: int, *, warm: bool) -> list[Step]:
    """A step of every stage of a pass; the first one twice, so that nothing is timed that is done only once."""
    part = editor.parts[0]
    if not warm:
        editor.take_up(part)
        _step(editor, next(editor.course()), layer, part.tokens)
        editor.forwards.forget()  # whose pass is to be timed as well
    editor.take_up(part)
    return [_step(editor, stage, layer, part.tokens) for stage in editor.course()]


def _step(editor: Editor, stage: Stage, layer: int, part: int) -> Step:
    base, optimizer = editor.base, editor.configure_optimizers()
    on_gpu = base.device.type == "cuda"
    before = torch.cuda.memory_allocated(base.device) if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(base.device)
    stage.begin()
    with _asked_for(editor) as asked:
        prepare, evaluate = timed(base, stage.prepare)

    def step() -> None:
        evaluate().total.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    with watched(base) as work:
        seconds, _ = timed(base, step)
    rows, last = (asked[0].rows, asked[0].last) if asked else (editor.batch.bare_rows, base.num_layers - 1)
    n, length = rows.input_ids.shape
    layers = work.layers
    share = work.tokens_a_layer(base) / (n * length)
    estimate = activations(base, share * n * length * (layers[1] - layers[0] + 1 if layers else 0), work.logits)
    return Step(
        stage=stage.name,
        layer=layer,
        steps=stage.steps,
        layers=layers,
        share=share,
        flop=flop(base, work, length),
        full=flop(base, work, length, (n * length, last)),
        prepare=prepare,
        seconds=seconds,
        memory=torch.cuda.max_memory_allocated(base.device) - before if on_gpu else estimate,
        part=part,
    )


def measuring_an_edit(evaluator: Evaluator, edits: Sequence[Edit], *, scored: bool) -> tuple[float, float, float]:
    """Seconds that it takes to measure an edit, by doing it.

    Args:
        evaluator: What measures.
        edits: The edits it is tried on.
        scored: Whether edits are scored, beside their greedy answers.

    Returns:
        Seconds each time that an edit is measured, at a checkpoint, which writes no texts, and those that the unedited
        model takes once more.
    """
    each, _ = timed(evaluator.base, lambda: evaluator.answers(edits))
    once = at_checkpoint = 0.0
    if scored:
        once, _ = timed(evaluator.base, lambda: evaluator.references(edits))
        each += timed(evaluator.base, lambda: evaluator.update(evaluator.new(), edits))[0]
        at_checkpoint, _ = timed(evaluator.base, lambda: evaluator.update(evaluator.new(), edits, texts=False))
    return each / len(edits), at_checkpoint / len(edits), once / len(edits)


TRIED = 1024
"""Tokens that the speed of the pass over documents is measured on."""


def seconds_of_a_token(base: LanguageModel, statistics: Statistics, sites: Sequence[Site]) -> float:
    """How long the pass over documents takes for a token: tried on random ones, so that no document is fetched.

    Args:
        base: The model.
        statistics: What is to be computed.
        sites: Of which sites.
    """
    length = min(statistics.max_length, base.max_length, statistics.batch_tokens, TRIED)
    reader = KeyReader(base, sites, statistics.batch_tokens, 0, statistics.forward_dtype)
    vocabulary = int(base.model.config.get_text_config().vocab_size)
    document = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    dtype = getattr(torch, statistics.mom2_dtype)

    def one() -> None:
        for keys in reader.read([[document]]).values():
            keys = keys.to(dtype)
            _ = keys.T @ keys

    return timed(base, one)[0] / length


def timed(base: LanguageModel, work: Callable[[], T]) -> tuple[float, T]:
    """Seconds that something takes on the model's device, and what it gives."""
    started = _now(base)
    found = work()
    return _now(base) - started, found


def _now(base: LanguageModel) -> float:
    if base.device.type == "cuda":
        torch.cuda.synchronize(base.device)
    return time.perf_counter()
