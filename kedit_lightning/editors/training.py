"""The stages of a value optimisation as ordinary Lightning training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from lightning import LightningModule
from torch import Tensor, nn

from kedit_lightning.data.prompts import EditBatch
from kedit_lightning.editors.stages import Outcome, Stage, Terms
from kedit_lightning.edits import Edit
from kedit_lightning.errors import KeditError
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.generation import generate


class StagedTraining(LightningModule, ABC):
    """Trains value deltas stage by stage: one fit is one pass, its end is that of the last stage.

    Args:
        base: The frozen base model.
        v_lr: Adam's learning rate.
    """

    batch: EditBatch
    deltas: nn.ModuleList
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

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One Adam over all δs of the pass; one without gradient gets no state and does not move."""
        return torch.optim.Adam(self.deltas.parameters(), lr=self.v_lr)

    def on_train_start(self) -> None:
        """Enter the first stage."""
        self._stages = self.stages()
        self._enter_next_stage()

    def _enter_next_stage(self) -> None:
        stage = next(self._stages, None)
        if stage is None:
            self.trainer.should_stop = True
            return
        self._stage = stage
        n = len(self.batch)
        self._running = torch.ones(n, dtype=torch.bool, device=stage.deltas[0].delta.device)
        self.outcomes.append(Outcome(stage.name, self.pass_, stage.deltas, steps=torch.zeros(n, dtype=torch.long)))

    def training_step(self, batch: list[Edit], batch_idx: int) -> None:
        """One loss evaluation and, unless the stage ends with it, one update of the edits that go on."""
        stage, outcome = self._stage, self.outcomes[-1]
        terms = stage.loss()
        outcome.curves.append({term: values.detach().cpu() for term, values in terms.items()})
        outcome.steps[self._running.cpu()] += 1
        loss = torch.stack(list(terms.values())).sum(dim=0)
        self._check_finite(loss)
        self._log_curves(stage.name, outcome.curves[-1])
        self._running &= ~stage.stop(terms)
        if not self._running.any() or len(outcome.curves) == stage.steps:
            self._enter_next_stage()
            return
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.zero_grad()
        self.manual_backward(loss[self._running].sum())
        before = [delta.delta.detach().clone() for delta in stage.deltas]
        optimizer.step()
        for delta, old in zip(stage.deltas, before, strict=True):
            delta.clamp_()
            with torch.no_grad():
                delta.delta.copy_(torch.where(self._running[:, None], delta.delta, old))

    def _check_finite(self, loss: Tensor) -> None:
        broken = torch.nonzero(~loss.isfinite())
        if len(broken):
            case = self.batch.edits[int(broken[0])].case_id
            msg = f"case {case}: the loss is {float(loss[broken[0]]):g} at step {len(self.outcomes[-1].curves)}; "
            raise KeditError(msg + "load the model in float32 or bfloat16, or lower v_lr")

    def _log_curves(self, stage: str, terms: Terms) -> None:
        means = {f"{stage}/{term}": float(values.mean()) for term, values in terms.items()}
        means[f"{stage}/loss"] = sum(means.values())
        if "nll" in terms:
            means[f"{stage}/target_probability"] = float((-terms["nll"]).exp().mean())
        for logger in self.loggers:  # not `self.log`, which would repeat a stage's last values in the next stage
            logger.log_metrics(means, step=self.evaluations)
        self.evaluations += 1

    def validation_step(self, batch: list[Edit], batch_idx: int) -> None:
        """Nothing to compute: the trainer scores the edits on the model as it stands."""

    test_step = validation_step

    max_new_tokens = 20

    def predict_step(self, batch: list[str], batch_idx: int) -> list[str]:
        """Greedy continuations of prompts by the model as it stands."""
        return generate(self.base, batch, max_new_tokens=self.max_new_tokens, top_k=None)
