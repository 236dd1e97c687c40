"""The stage over a weight: parameters of the model are trained in its place, on mini-batches of edits."""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kedit_lightning.data.prompts import ContextTemplates, EditBatch
from kedit_lightning.delta import WeightDelta
from kedit_lightning.editors.base import Editor, Preset
from kedit_lightning.editors.checks import at_least
from kedit_lightning.editors.parts import Parts
from kedit_lightning.editors.stages import Loss, Outcome
from kedit_lightning.editors.tuned import TunedWeight
from kedit_lightning.edits import Edit
from kedit_lightning.errors import KeditError, RejectedError
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.processes import attempted, is_shared_shortage


class WeightTraining(Editor):
    """An editor whose stages train weights with one loss for all edits of a mini-batch.

    A loss evaluation goes over all n edits, mini-batch by mini-batch; each makes one update of Adam, unless the stage's
    stopping rule holds for it, and the stage is over when the rule holds for all edits, or after its number of
    evaluations. A mini-batch that does not fit into memory goes through the model part by part, its gradients added up.

    The base model is not touched: its passes take W in place of W₀, and gradients flow into W alone.

    Args:
        base: The frozen base model.
        layers: Layers whose weights are edited, ascending.
        num_steps: Passes over the edits at most.
        lr: Adam's learning rate.
        weight_decay: Adam's own (coupled) weight decay, a pull of W towards 0.
        wd_power_law: Weight decay ``exp(b) · nᵃ`` for n edits, given as (a, b), instead.
        norm_constraint: ε of the L∞ ball around W₀; null: none.
        batch_size: Edits of a mini-batch.
        max_tokens: Tokens that go through the model together, padding included, as in `Editor`.
        unconverged: What becomes of the edits of a stage that ran out of steps.
        preset: ``paper`` or ``released``.

    Raises:
        KeditError: A setting is out of range or contradicts another.
    """

    can_be_side_by_side = False

    def __init__(
        self,
        base: LanguageModel,
        layers: list[int],
        *,
        num_steps: int,
        lr: float,
        weight_decay: float,
        wd_power_law: tuple[float, float] | None,
        norm_constraint: float | None,
        batch_size: int,
        max_tokens: int | None,
        unconverged: Literal["keep", "reject"],
        preset: Preset,
    ) -> None:
        at_least(1, num_steps=num_steps, batch_size=batch_size)
        at_least(0, weight_decay=weight_decay)
        at_least(1e-12, lr=lr, norm_constraint=1.0 if norm_constraint is None else norm_constraint)
        if weight_decay and wd_power_law:
            msg = f"weight_decay and wd_power_law: expected one of them, got {weight_decay} and {list(wd_power_law)}"
            raise KeditError(msg)
        bare = ContextTemplates(templates=[["{}"]])
        super().__init__(
            base,
            layers,
            mom2_adjustment=False,
            context_templates=bare,
            max_tokens=max_tokens,
            unconverged=unconverged,
            preset=preset,
        )
        self.num_steps, self.lr, self.batch_size = num_steps, lr, batch_size
        self.weight_decay, self.wd_power_law = weight_decay, wd_power_law
        self.norm_constraint = norm_constraint

    @property
    def config(self) -> dict[str, Any]:
        """The settings as plain data; those of a value optimisation are not among them."""
        own = inspect.signature(type(self).__init__).parameters
        return {key: value for key, value in super().config.items() if key in own}

    def tune(self, name: str) -> TunedWeight:
        """A weight to train; it starts as it stands in the model."""
        tuned = TunedWeight(name, self.base.master(name), self.norm_constraint)
        self.deltas.append(tuned)
        return tuned

    @property
    def tuned(self) -> list[TunedWeight]:
        """The weights that are trained."""
        return list(self.deltas)  # type: ignore[arg-type]

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """What the model's passes take in place of its own weights."""
        return {tuned.name: tuned.value for tuned in self.tuned}

    def begin(self, edits: Sequence[Edit], pass_: int = 0) -> None:
        """Get ready for one pass over one edit batch; neither keys nor values are kept, so any number of edits fits."""
        self.edits, self.outcomes, self.memory = edits, [], {}
        self.pass_, self.layer = pass_, self.passes()[pass_]
        self.parts = self.share_out(edits)
        self.deltas = nn.ModuleList()
        self.locate()

    def share_out(self, edits: Sequence[Edit]) -> Parts:
        """As of any editor, a part of one mini-batch."""
        separate, size = self.separate_targets, self.batch_size
        return Parts(self.base, edits, self.templates, self.budget, separate=separate, batch_size=size)

    def take_up(self, part: EditBatch) -> None:
        """Turn to some of the edits."""
        self.batch = part.to(self.base.device)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One Adam over all weights; its state lasts over the stages of a pass."""
        decay = self.weight_decay
        if self.wd_power_law:
            exponent, logarithm = self.wd_power_law
            decay = math.exp(logarithm) * len(self.edits) ** exponent
        return torch.optim.Adam(self.deltas.parameters(), lr=self.lr, weight_decay=decay)

    # ------------------------------------------------------------------ the stages

    def on_train_start(self) -> None:
        """Before the first stage."""
        self._stages = self.course()
        self._enter_next_stage()

    def training_step(self, batch: list[Edit], batch_idx: int) -> None:
        """The loss of one part and its gradients; with the last part of a mini-batch the update."""
        of_batch = self.parts.of_batch(self._part)
        try:
            self._evaluate(self._part, sum(len(self.parts[i]) for i in of_batch))
        except Exception as error:
            if not is_shared_shortage(error):
                raise
            self.zero_grad()
            self.parts.divide(self._part)
            self.budget, self._part = self.parts.max_tokens, of_batch[0]
            return
        self._part += 1
        if self._part > of_batch[-1]:
            self._update(torch.cat([self.parts[i].index for i in of_batch]))
        if self._part == len(self.parts):
            self._end_evaluation()

    def _enter_next_stage(self) -> None:
        self._stage = next(self._stages, None)
        if self._stage is None:
            self.check_values()
            self.trainer.should_stop = True
            return
        self.outcome = Outcome.of(self._stage, self.pass_, len(self.edits))
        self.outcomes.append(self.outcome)
        self._evaluation = self._part = 0
        self._stage.begin()

    def _evaluate(self, i: int, size: int) -> None:
        """Part i of a mini-batch of this many edits."""
        assert self._stage is not None
        self.take_up(self.parts[i])
        stage = self._stage
        own = attempted(lambda: stage.prepare()())
        loss = own.summed()
        self._check_finite(loss.total)
        self.outcome.add(loss, self.batch.index, torch.ones(len(self.batch), dtype=torch.bool), self._evaluation)
        self._add_gradients(own.total.sum() / size)

    def _found(self, index: Tensor) -> Loss:
        """The last evaluation of the loss of some edits."""
        outcome = self.outcome
        terms = {term: values[index] for term, values in outcome.curves[self._evaluation].items()}
        return Loss(terms, outcome.probability[index])

    def _update(self, index: Tensor) -> None:
        """Adam's step for the edits of a mini-batch."""
        assert self._stage is not None
        if not self._stage.stop(self._found(index)).all():
            self._sum_gradients(list(self.deltas.parameters()))
            self._stage.observe(torch.ones(len(index), dtype=torch.bool))
            self._optimizer.step()
            for tuned in self.tuned:
                tuned.clamp_()
        self._optimizer.zero_grad()

    def _end_evaluation(self) -> None:
        """All edits have gone through the model once more."""
        stage, every = self._stage, torch.arange(len(self.edits))
        assert stage is not None
        done = bool(stage.stop(self._found(every)).all())
        self.outcome.converged[:] = done
        self._evaluation, self._part = self._evaluation + 1, 0
        self._log_curves(stage.name, every)
        if done or self._evaluation == stage.steps:
            self._enter_next_stage()

    @property
    def optimised(self) -> int:
        """The share of the stage that is over, counted in edits."""
        if self._stage is None:
            return len(self.edits)
        return int(len(self.edits) * (self._evaluation + self._part / len(self.parts)) / self._stage.steps)

    # ------------------------------------------------------------------ what comes of them

    def check_values(self) -> None:
        """Refuse weights that are not finite.

        Raises:
            RejectedError: A weight is not, or the stages did not converge and that is asked for.
        """
        if broken := [tuned.name for tuned in self.tuned if not tuned.value.isfinite().all()]:
            why = f"{broken[0]} is not finite after training; lower lr, or load the model in float32 or bfloat16"
            raise RejectedError({i: f"case {edit.case_id}: {why}" for i, edit in enumerate(self.edits)})
        super().check_values()

    @abstractmethod
    def names(self) -> list[str]:
        """The names of the weights that are edited, among the model's parameters."""

    def needs(self, n: int) -> dict[torch.device, tuple[int, int]]:
        """Of each weight W₀, W, its gradient and Adam's two moments, the ball's two surfaces, and Δ in main memory."""
        found = {torch.device("cpu"): (self.update_size(n), 0)}
        trained = (5 if self.norm_constraint is None else 7) * self.update_size(n)
        found[self.base.device] = found.get(self.base.device, (0, 0))[0] + trained, 0
        return found

    def update_size(self, n: int) -> int:
        """Dense, however many edits there are."""
        return 4 * sum(self.base.weight(name).numel() for name in self.names())

    def locate(self) -> None:
        """Every weight that is edited is trained."""
        for name in self.names():
            self.tune(name)

    def write(self) -> Generator[WeightDelta, None, None]:
        """The change of each weight, dense."""
        for tuned in self.tuned:
            yield WeightDelta(tuned.name, dense=tuned.delta.cpu().contiguous())

    def settle(self) -> None:
        """Nothing is left: what was trained is what is written."""
