"""Trains a hypernetwork: edits are made, and what they do to other questions says how they should have been made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from kedit_lightning import objectives
from kedit_lightning.edits import Edit, Part, Site
from kedit_lightning.errors import KeditError
from kedit_lightning.hypernetworks.capture import Capture, Tokens, answers, require, without_zeros
from kedit_lightning.hypernetworks.data import Triple
from kedit_lightning.hypernetworks.files import Purpose, shapes
from kedit_lightning.hypernetworks.malmen import MALMENNetwork
from kedit_lightning.hypernetworks.mend import MENDNetwork
from kedit_lightning.hypernetworks.network import Factors, Hypernetwork, Shared
from kedit_lightning.models import Batch, LanguageModel, collate
from kedit_lightning.models.encoding import buckets
from kedit_lightning.models.memory import token_budget

Asked = list[tuple[str, str]]
"""Prompts and answers."""


class HypernetworkTraining(LightningModule):
    """Trains a hypernetwork over triples of an edit, a paraphrase and an unrelated prompt.

    A step makes all edits of its batch at once and takes ``edit_weight · NLL(paraphrases) + locality_weight ·
    KL(before ‖ after, unrelated prompts)`` on the edited model. The base model is never touched: its passes take W + Δ
    in place of W, the loss's gradient in W + Δ is summed over all rows, and goes from there through the update's closed
    form and the networks in chunks (`Hypernetwork.backward`), which is exact.

    Args:
        base: The frozen base model.
        layers: Layers whose weights are edited, ascending.
        parts: Which weights: ``mlp``, ``mlp_in`` (down- and up-projection) or ``attn``.
        rank: Rank of the networks' blocks.
        n_blocks: Blocks of a network.
        step_size: First step size of every matrix.
        networks: Which matrices have one: those of one ``shape``, ``all``, or ``none``.
        tokens: At which tokens of an edit keys and gradients are taken.
        lr: Adam's learning rate.
        step_lr: The same of the step sizes.
        edit_weight: Weight of the paraphrases' loss.
        locality_weight: Weight of the unrelated prompts' KL.
        accumulate: Batches of an update.
        clip: The gradient's norm is at most this.
        max_tokens: Tokens that go through the model together; null: as of `Editor`.

    Raises:
        KeditError: A setting is out of range.
    """

    kind: ClassVar[type[Hypernetwork]]
    """What is trained."""

    def __init__(
        self,
        base: LanguageModel,
        layers: list[int],
        *,
        parts: tuple[Part, ...] = ("mlp",),
        rank: int = 1920,
        n_blocks: int = 2,
        step_size: float = 1e-6,
        networks: Shared = "shape",
        tokens: Tokens = "answer",
        lr: float = 1e-5,
        step_lr: float = 1e-5,
        edit_weight: float = 1.0,
        locality_weight: float = 1.0,
        accumulate: int = 1,
        clip: float = 1.0,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if not layers or not parts or sorted(set(layers)) != list(layers) or min(accumulate, max_tokens or 1) < 1:
            got = f"{layers}, {parts} and {accumulate}"
            msg = f"expected layers (ascending), parts, and accumulate and max_tokens of at least 1, got {got}"
            raise KeditError(msg)
        if min(lr, step_lr, clip) <= 0:
            msg = f"lr, step_lr, clip: expected positive numbers, got {lr}, {step_lr} and {clip}"
            raise KeditError(msg)
        self.base, self.layers, self.parts, self.tokens = base, layers, parts, tokens
        self.sites = [Site(layer, part) for layer in layers for part in parts]
        self.lr, self.step_lr, self.accumulate, self.clip = lr, step_lr, accumulate, clip
        self.edit_weight, self.locality_weight, self.max_tokens = edit_weight, locality_weight, max_tokens
        self.network = self.kind(shapes(base, self.sites), rank, n_blocks, step_size, networks)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam; the step sizes have a learning rate of their own."""
        others = [parameter for parameter in self.network.parameters() if parameter is not self.network.steps]
        groups: list[dict[str, Any]] = [{"params": others}, {"params": [self.network.steps], "lr": self.step_lr}]
        return torch.optim.Adam(groups, lr=self.lr)

    def purpose(self, steps: int) -> Purpose:
        """What the hypernetwork is for, after so many updates."""
        return Purpose.on(self.base, self.layers, list(self.parts), self.tokens, steps)

    # ------------------------------------------------------------------ steps

    def on_fit_start(self) -> None:
        """The base model joins the hypernetwork on its device.

        Raises:
            KeditError: There are several processes, or more edits in a batch than memory for their keys and gradients.
        """
        if self.trainer.world_size > 1:
            msg = f"trainer.devices: a hypernetwork is trained by one process, got {self.trainer.world_size}"
            raise KeditError(msg)
        edits, n = self.trainer.datamodule.edits, self.trainer.datamodule.batch_size  # type: ignore[attr-defined]
        lengths = sorted(len(self.base.encode(edit.text, edit.target_new).ids) for edit in edits)
        require(self.network.shapes.values(), n, sum(lengths[-n:]))
        self.base.to(self.device)
        self.base.restore()
        self.budget = self.max_tokens or token_budget(self.base)

    def training_step(self, batch: list[Triple], batch_idx: int) -> None:
        """Edit, measure, and go back from the gradient in the edited weights to that of the networks."""
        factors = self.factors([triple.edit for triple in batch])
        for name, each in factors.items():
            self.network.observe(name, each)
        weights = self._edited(factors)
        found = self.measure(batch, weights, backward=True)
        for name, each in factors.items():
            gradient = weights[name].grad
            assert gradient is not None
            self.network.backward(name, each, gradient / self.accumulate)
        if (batch_idx + 1) % self.accumulate == 0:
            optimizer = self.optimizers()
            assert isinstance(optimizer, LightningOptimizer)
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
            optimizer.step()
            optimizer.zero_grad()
        self._log("train", found, len(batch))

    def validation_step(self, batch: list[Triple], batch_idx: int) -> None:
        """Edit and measure, on triples that were not trained on; the normaliser stays as it is."""
        with torch.inference_mode(mode=False), torch.enable_grad():
            weights = self._edited(self.factors([triple.edit for triple in batch]))
            with torch.no_grad():
                self._log("validation", self.measure(batch, weights), len(batch))

    def _log(self, stage: str, found: Mapping[str, float], n: int) -> None:
        if not all(torch.tensor(list(found.values())).isfinite()):
            msg = f"the loss is {found['loss']:g} at step {self.global_step}: lower step_size or lr"
            raise KeditError(msg)
        self.log_dict({f"{stage}/{name}": value for name, value in found.items()}, batch_size=n)
        if stage == "train":
            self.log_dict(
                {f"step_size/{name}": float(self.network.step(name).detach()) for name in self.network.shapes}
            )
            self.log("loss", found["loss"], prog_bar=True, logger=False)

    # ------------------------------------------------------------------ what they are made of

    def factors(self, edits: Sequence[Edit]) -> dict[str, Factors]:
        """Keys and gradients of edits on the unedited model, by the names of the matrices, in main memory."""
        found: dict[str, list[Factors]] = {name: [] for name in self.network.shapes}
        for rows in self._rows([(edit.text, edit.target_new) for edit in edits]):
            capture = Capture(self.base, rows, self.sites, self.tokens)
            capture.forward()[0].sum().backward()  # type: ignore[no-untyped-call]
            for site, each in capture.factors().items():
                found[self.base.name(site)].append(Factors(*(part.cpu() for part in without_zeros(each))))
        return {name: Factors(*map(torch.cat, zip(*each, strict=True))) for name, each in found.items()}

    def _edited(self, factors: Mapping[str, Factors]) -> dict[str, Tensor]:
        """The edited weights, as leaves that a gradient can be asked of."""
        weights = {}
        for name, each in factors.items():
            left, right = self.network.update(name, each)
            master = self.base.master(name)
            weights[name] = (master.double() + (left @ right.T).to(master.device)).float().requires_grad_()
        return weights

    def measure(
        self, batch: Sequence[Triple], weights: dict[str, Tensor], *, backward: bool = False
    ) -> dict[str, float]:
        """What an edited model makes of triples: means over them.

        Args:
            batch: The triples.
            weights: What takes the place of weights, by their names.
            backward: Whether to add up the loss's gradient in the weights; else the edits themselves are asked too.
        """
        n = len(batch)
        found = dict.fromkeys(("loss", "nll", "kl", "generalization", "locality"), 0.0)
        for rows in self._rows([(triple.paraphrase, triple.edit.target_new) for triple in batch]):
            nll, missed = answers(self.base, rows.to(self.base.device), weights)
            if backward:
                (self.edit_weight * nll.sum() / n).backward()  # type: ignore[no-untyped-call]
            found["nll"] += float(nll.detach().sum()) / n
            found["generalization"] += float((missed == 0).sum()) / n
        for rows in self._rows([(triple.unrelated, triple.answer) for triple in batch]):
            kl, kept = self._kl(rows.to(self.base.device), weights)
            if backward:
                (self.locality_weight * kl.sum() / n).backward()  # type: ignore[no-untyped-call]
            found["kl"] += float(kl.detach().sum()) / n
            found["locality"] += float(kept.sum()) / n
        if not backward:
            for rows in self._rows([(triple.edit.text, triple.edit.target_new) for triple in batch]):
                missed = answers(self.base, rows.to(self.base.device), weights)[1]
                found["efficacy"] = found.get("efficacy", 0.0) + float((missed == 0).sum()) / n
        found["loss"] = self.edit_weight * found["nll"] + self.locality_weight * found["kl"]
        return found

    def _kl(self, rows: Batch, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """KL(before ‖ after) of each row, the mean over its answer's tokens; whether the likeliest ones stay; (b,)."""
        line, position = torch.nonzero(rows.labels >= 0, as_tuple=True)
        with torch.no_grad():
            before = self.base.logits(rows, (line, position)).float().log_softmax(dim=-1)
        after = self.base.logits(rows, (line, position), weights).float().log_softmax(dim=-1)
        kl = objectives.mean_over_rows(objectives.essence_kl(before, after), line, len(rows))
        changed = (after.detach().argmax(dim=-1) != before.argmax(dim=-1)).float()
        return kl, objectives.sum_over_rows(changed, line, len(rows)) == 0

    def _rows(self, asked: Asked) -> Iterator[Batch]:
        """Prompts with their answers, in batches that fit into memory."""
        rows = [self.base.encode(prompt, answer) for prompt, answer in asked]
        for chosen in buckets([len(row.ids) for row in rows], self.budget):
            yield collate([rows[i] for i in chosen])


class MENDTraining(HypernetworkTraining):
    """Trains MEND (Mitchell et al., 2022); the defaults are the published settings for large decoders.

    Args:
        base: As in `HypernetworkTraining`; so are all the others.
        layers: Layers whose weights are edited, ascending.
        parts: Which weights of them.
        step_size: First step size of every matrix.
        tokens: At which tokens of an edit keys and gradients are taken.
        lr: Adam's learning rate.
        step_lr: The same of the step sizes.
        edit_weight: Weight of the paraphrases' loss.
        accumulate: Batches of an update.
        clip: The gradient's norm is at most this.
        shared: The other settings, see `HypernetworkTraining`.
    """

    kind = MENDNetwork

    def __init__(
        self,
        base: LanguageModel,
        layers: list[int],
        parts: tuple[Part, ...] = ("mlp_in", "mlp"),
        step_size: float = 1e-4,
        tokens: Tokens = "all",
        lr: float = 1e-6,
        step_lr: float = 1e-4,
        edit_weight: float = 0.1,
        accumulate: int = 10,
        clip: float = 100.0,
        **shared: Any,
    ) -> None:
        own: dict[str, Any] = {"step_size": step_size, "tokens": tokens, "lr": lr, "step_lr": step_lr}
        super().__init__(
            base, layers, parts=parts, **own, edit_weight=edit_weight, accumulate=accumulate, clip=clip, **shared
        )


class MALMENTraining(HypernetworkTraining):
    """Trains MALMEN (Tan et al., 2023), whose released settings are the defaults of `HypernetworkTraining`."""

    kind = MALMENNetwork
