"""The stages of a value optimisation as ordinary Lightning training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from lightning import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from kedit_lightning.data.prompts import EditBatch
from kedit_lightning.editors.parts import Parts
from kedit_lightning.editors.reading import own_values
from kedit_lightning.editors.stages import Loss, Outcome, Stage, ValueDelta
from kedit_lightning.edits import Edit
from kedit_lightning.errors import RejectedError
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.generation import generate
from kedit_lightning.models.processes import attempted, is_shared_shortage, ranks, summed

QUANTILES = (0.1, 0.5, 0.9)
"""Of the losses of edits that are optimised together, as they are logged."""


class StagedTraining(LightningModule, ABC):
    """Trains value deltas stage by stage: one fit is one pass over n edits, part by part.

    A part is as many edits as memory takes at once; it goes through all stages before the next part begins, so what a
    stage keeps between its steps does not grow with n.

    Several processes (`RowsStrategy`) hold the same δs and share out the rows. Losses are summed over them before
    anything is decided and gradients before each update, so all make the same steps. A stage's `prepare`, and what it
    gives, wait for no other process; `stop`, `observe` and `begin` see what is the same in all.

    Args:
        base: The frozen base model.
        v_lr: Adam's learning rate.
    """

    edits: Sequence[Edit]
    """The n edits of the batch."""
    budget: int
    """Tokens of a part at most, padding included."""
    parts: Parts
    """The same in parts."""
    part: EditBatch
    """The part under way."""
    batch: EditBatch
    """The m edits of it that are not done."""
    deltas: nn.ModuleList
    outcome: Outcome
    """How the stage under way has gone so far."""
    pass_: int

    def __init__(self, base: LanguageModel, v_lr: float) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.base, self.v_lr = base, v_lr
        self.outcomes: list[Outcome] = []
        self.evaluations = 0

    @abstractmethod
    def stages(self) -> Iterator[Stage]:
        """Yield the stages in order; the code between two yields runs between the stages."""

    @abstractmethod
    def course(self) -> Iterator[Stage]:
        """The stages as they are run."""

    @abstractmethod
    def check_values(self) -> None:
        """Refuse what the stages have found where it must not be written."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One Adam over all δs of the pass; one without gradient gets no state and does not move."""
        return torch.optim.Adam(self.deltas.parameters(), lr=self.v_lr)

    # ------------------------------------------------------------------ parts and stages

    def on_train_start(self) -> None:
        """Before the first part."""
        self._part, self._stage, self._loss = -1, None, None

    def training_step(self, batch: list[Edit], batch_idx: int) -> None:
        """One loss evaluation and, unless a stage ends with it, one update of the edits that go on."""
        try:
            if self._stage is None:
                self._enter_next_part()
            if self._stage is not None:
                self._step(self._stage)
        except Exception as error:
            if not is_shared_shortage(error):
                raise
            self._stage = self._loss = None
            self.zero_grad()
            self.parts.divide(self._part)
            self.budget = self.parts.max_tokens
            self._part -= 1

    _stage: Stage | None
    _loss: Callable[[], Loss] | None

    def _enter_next_part(self) -> None:
        self._part += 1
        self.take_up(self.parts[self._part])
        self._stages, self._entered = self.course(), 0
        self._enter_next_stage()

    def take_up(self, part: EditBatch) -> None:
        """Turn to some of the edits: δ = 0, and v₀ read on the bare prompts from the model as it stands."""
        self.part = self.batch = part.to(self.base.device)
        tokens = {delta.site: delta.token for delta in self._deltas}
        origins = attempted(lambda: own_values(self.base, self.batch, tokens))
        for delta in self._deltas:
            delta.open(part.index, summed(origins[delta.site]))

    def _enter_next_stage(self) -> None:
        """All edits of the part take part, with a new Adam: over some edits it is the same as over all."""
        self._turn_to(self.part)
        self._optimizer.state.clear()
        self._stage = next(self._stages, None)
        if self._stage is None:
            self._loss = None
            if self._part == len(self.parts) - 1:
                for delta in self._deltas:
                    delta.whole()
                self.check_values()
                self.trainer.should_stop = True
            return
        mine = [outcome for outcome in self.outcomes if outcome.pass_ == self.pass_]
        if self._entered == len(mine):
            mine.append(Outcome.of(self._stage, self.pass_, len(self.edits)))
            self.outcomes.append(mine[-1])
        self.outcome, self._evaluation = mine[self._entered], 0
        self._entered += 1
        self._stage.begin()
        self._go_on(self._stage)

    def _go_on(self, stage: Stage) -> None:
        """Evaluate the loss of the edits of `batch` from now on."""
        self._running = torch.ones(len(self.batch), dtype=torch.bool, device=self.base.device)
        self._loss = None  # before the next, since it keeps what the model has cached for it
        self._loss = attempted(stage.prepare)

    def _turn_to(self, batch: EditBatch) -> None:
        self.batch = batch
        for delta in self._deltas:
            delta.show(batch.index, self.base.device)

    @property
    def optimised(self) -> int:
        """How many edits of this pass have been optimised so far."""
        return sum(len(self.parts[i]) for i in range(self._part + (self._stage is None)))

    def _step(self, stage: Stage) -> None:
        assert self._loss is not None
        own, running = attempted(self._loss), self._running
        loss = own.summed()
        self.outcome.add(loss, self.batch.index, running.cpu(), self._evaluation)
        self._evaluation += 1
        self._check_finite(loss.total)
        self._log_curves(stage.name, self.part.index)
        running &= ~stage.stop(loss)
        self.outcome.converged[self.batch.index] = ~running.cpu()
        last = self._evaluation == stage.steps
        if not running.any() or (last and not stage.updates_last):
            self._enter_next_stage()
            return
        optimizer = self._optimizer
        optimizer.zero_grad()
        self._add_gradients(own.total[running].sum())
        self._sum_gradients([delta.delta for delta in stage.deltas])
        stage.observe(running)
        before = [delta.delta.detach().clone() for delta in stage.deltas]
        for delta in stage.deltas:
            delta.hold()
        optimizer.step()
        for delta, old in zip(stage.deltas, before, strict=True):
            delta.clamp_()
            with torch.no_grad():
                delta.delta.copy_(torch.where(running[:, None], delta.delta, old))
        if last:
            self._enter_next_stage()
        elif 4 * int(running.sum()) <= 3 * len(running):  # to prepare the loss anew costs a third of an evaluation
            self._leave_out_those_done(torch.nonzero(running)[:, 0])
            self._go_on(stage)

    def _add_gradients(self, own: Tensor) -> None:
        """Those of this process's share of a loss; where it has no rows there are none."""
        attempted(lambda: self.manual_backward(own) if own.requires_grad else None)

    def _sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Those of all processes, before an update: all of them make the same."""
        for parameter in parameters if ranks()[1] > 1 else ():
            parameter.grad = summed(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)

    def _leave_out_those_done(self, running: Tensor) -> None:
        self._turn_to(self.batch.select(running))
        for state in self._optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name][running]

    @property
    def _deltas(self) -> list[ValueDelta]:
        return list(self.deltas)  # type: ignore[arg-type]

    @property
    def _optimizer(self) -> LightningOptimizer:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        return optimizer

    def _check_finite(self, loss: Tensor) -> None:
        reasons = {}
        for i in torch.nonzero(~loss.isfinite())[:, 0].tolist():
            what = f"case {self.batch.edits[i].case_id}: the loss is {float(loss.detach()[i]):g}"
            advice = "load the model in float32 or bfloat16, or lower the learning rate"
            reasons[int(self.batch.index[i])] = f"{what} at step {self._evaluation}; {advice}"
        if reasons:
            raise RejectedError(reasons)

    def _log_curves(self, name: str, index: Tensor) -> None:
        """Means over some edits, those that are done included; of several the quantiles of their loss too."""
        outcome = self.outcome
        terms = {term: values[index] for term, values in outcome.curves[self._evaluation - 1].items()}
        curves = {f"{name}/{term}": float(values.mean()) for term, values in terms.items()}
        loss = torch.stack(list(terms.values())).sum(dim=0)
        curves[f"{name}/loss"] = float(loss.mean())
        if len(index) > 1:
            quantiles = loss.quantile(torch.tensor(QUANTILES)).tolist()
            curves |= {f"{name}/loss_q{int(100 * q)}": value for q, value in zip(QUANTILES, quantiles, strict=True)}
        if (probability := float(outcome.probability[index].mean())) == probability:  # nan: there is no target
            curves[f"{name}/target_probability"] = probability
        for logger in self.loggers:  # not `self.log`, which would repeat a stage's last values in the next stage
            logger.log_metrics(curves, step=self.evaluations)
        self.evaluations += 1

    # ------------------------------------------------------------------ other loops

    def validation_step(self, batch: list[Edit], batch_idx: int) -> None:
        """Nothing to compute: the trainer scores the edits on the model as it stands."""

    test_step = validation_step

    max_new_tokens = 20

    def predict_step(self, batch: list[str], batch_idx: int) -> list[str]:
        """Greedy continuations of prompts by the model as it stands."""
        return generate(self.base, batch, max_new_tokens=self.max_new_tokens, top_k=None)
