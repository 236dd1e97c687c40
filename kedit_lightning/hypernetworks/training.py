"""Trains a hypernetwork: edits are made, and what they do to other questions says how they should have been made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from kedit_lightning import solvers
from kedit_lightning.edits import Edit, Part, Site
from kedit_lightning.errors import KeditError
from kedit_lightning.hypernetworks.capture import Tokens, captured, check_dtype, require
from kedit_lightning.hypernetworks.data import Triple, TripleData
from kedit_lightning.hypernetworks.files import Purpose, shapes
from kedit_lightning.hypernetworks.losses import MetaLoss
from kedit_lightning.hypernetworks.malmen import MALMENNetwork
from kedit_lightning.hypernetworks.mend import MENDNetwork
from kedit_lightning.hypernetworks.network import Factors, Hypernetwork, Shared
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.memory import token_budget
from kedit_lightning.solvers import double


class HypernetworkTraining(LightningModule):
    """Trains a hypernetwork over triples of an edit, a paraphrase and an unrelated prompt.

    A step makes all edits of its batch at once and takes the `MetaLoss` of the edited model. The base model is never
    touched: its passes take W + Δ in place of W, the loss's gradient in W + Δ is summed over all rows, and goes from
    there through the update's closed form and the networks in chunks (`Hypernetwork.backward`), which is exact.

    Args:
        base: The frozen base model.
        layers: Layers whose weights are edited, ascending.
        parts: Which weights: ``mlp``, ``mlp_in`` (down- and up-projection) or ``attn``.
        rank: Rank of the networks' blocks.
        n_blocks: Blocks of a network.
        edit_lr: First step size of every matrix (MEND's ``edit_lr``, MALMEN's ``lr``).
        networks: Which matrices have one: those of one ``shape``, ``all``, or ``none``.
        tokens: At which tokens of an edit keys and gradients are taken.
        meta_lr: Adam's learning rate (MEND's ``lr``, MALMEN's ``meta_lr``).
        lr_lr: The same of the step sizes.
        cedit: Weight of the paraphrases' loss.
        cloc: Weight of the unrelated prompts' KL.
        kl_tokens: At which tokens of an unrelated prompt that is taken.
        accumulate: Batches of an update.
        clip: The gradient's norm is at most this; the gradient is that of the mean over a batch's edits.
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
        edit_lr: float = 1e-6,
        networks: Shared = "shape",
        tokens: Tokens = "answer",
        meta_lr: float = 1e-5,
        lr_lr: float = 1e-5,
        cedit: float = 1.0,
        cloc: float = 1.0,
        kl_tokens: Tokens = "answer",
        accumulate: int = 1,
        clip: float = 1 / 16,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if not layers or not parts or sorted(set(layers)) != list(layers) or min(accumulate, max_tokens or 1) < 1:
            got = f"{layers}, {parts} and {accumulate}"
            msg = f"expected layers (ascending), parts, and accumulate and max_tokens of at least 1, got {got}"
            raise KeditError(msg)
        if min(meta_lr, lr_lr, clip) <= 0:
            msg = f"meta_lr, lr_lr, clip: expected positive numbers, got {meta_lr}, {lr_lr} and {clip}"
            raise KeditError(msg)
        check_dtype(base)
        self.base, self.layers, self.parts, self.tokens = base, layers, parts, tokens
        self.sites = [Site(layer, part) for layer in layers for part in parts]
        self.meta_lr, self.lr_lr, self.accumulate, self.clip = meta_lr, lr_lr, accumulate, clip
        self.loss, self.max_tokens = MetaLoss(base, cedit, cloc, kl_tokens), max_tokens
        self._accumulated: dict[str, Tensor] = {}
        self.network = self.kind(shapes(base, self.sites), rank, n_blocks, edit_lr, networks)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam; the step sizes have a learning rate of their own."""
        others = [parameter for parameter in self.network.parameters() if parameter is not self.network.steps]
        groups: list[dict[str, Any]] = [{"params": others}, {"params": [self.network.steps], "lr": self.lr_lr}]
        return torch.optim.Adam(groups, lr=self.meta_lr)

    def purpose(self, steps: int) -> Purpose:
        """What the hypernetwork is for, after so many updates."""
        return Purpose.on(self.base, self.layers, list(self.parts), self.tokens, steps)

    # ------------------------------------------------------------------ checkpoints

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have been made with."""
        return {"kind": self.kind.__name__, **self.network.settings, **asdict(self.purpose(0))}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what it is of, and the gradient of an update that is still being accumulated."""
        found = {name: one.grad for name, one in self.network.named_parameters() if one.grad is not None}
        checkpoint |= {"identity": self.identity, "gradients": found}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them up.

        Raises:
            KeditError: The checkpoint is of another model or of other settings.
        """
        given = checkpoint.get("identity", {})
        for name, value in self.identity.items():
            if given.get(name) != value:
                msg = f"--ckpt_path: expected a checkpoint of {name} {value}, got one of {given.get(name)}"
                raise KeditError(msg)
        self._accumulated = checkpoint["gradients"]

    # ------------------------------------------------------------------ steps

    def check(self, trainer: Trainer, data: TripleData) -> None:
        """Refuse, before anything is written, what cannot be trained.

        Raises:
            KeditError: There are several processes, a prompt is too long, or there are more edits in a batch than
                memory for their keys and gradients.
        """
        if trainer.world_size > 1:
            msg = f"trainer.devices: a hypernetwork is trained by one process, got {trainer.world_size}"
            raise KeditError(msg)
        rows = [self.base.encode(edit.text, edit.target_new) for edit in data.edits]
        tokens = sorted(len(row.targets if self.tokens == "answer" else row.ids) for row in rows)
        require(self.network.shapes.values(), data.batch_size, sum(tokens[-data.batch_size :]))

    def on_fit_start(self) -> None:
        """The base model joins the hypernetwork on its device.

        Raises:
            KeditError: As of `check`.
        """
        self.check(self.trainer, self.trainer.datamodule)  # type: ignore[attr-defined]
        self.base.to(self.device)
        self.base.restore()
        self.loss.budget = self.max_tokens or token_budget(self.base)

    def on_train_start(self) -> None:
        """Go on accumulating where a checkpoint was in the middle of it."""
        for name, gradient in self._accumulated.items():
            self.network.get_parameter(name).grad = gradient.to(self.device)

    def on_validation_model_zero_grad(self) -> None:
        """Nothing: a validation may come before an accumulated gradient is whole."""

    def training_step(self, batch: list[Triple], batch_idx: int) -> None:
        """Edit, measure, and go back from the gradient in the edited weights to that of the networks."""
        factors = self.factors([triple.edit for triple in batch])
        for name, each in factors.items():
            self.network.observe(name, each)
        weights = self._edited(factors)
        self._log("train", self.loss(batch, weights, backward=True), len(batch))
        for name, each in factors.items():
            gradient = weights[name].grad
            assert gradient is not None
            self.network.backward(name, each, gradient / self.accumulate)
        if (self.trainer.fit_loop.total_batch_idx + 1) % self.accumulate == 0:
            self._step()

    def _step(self) -> None:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        if not torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip).isfinite():
            msg = f"the gradient is not finite at step {self.global_step}: lower edit_lr or meta_lr"
            raise KeditError(msg)
        optimizer.step()
        optimizer.zero_grad()

    def validation_step(self, batch: list[Triple], batch_idx: int) -> None:
        """Edit and measure, on triples that were not trained on; the normaliser stays as it is."""
        with torch.inference_mode(mode=False), torch.enable_grad():
            weights = self._edited(self.factors([triple.edit for triple in batch]))
            with torch.no_grad():
                self._log("validation", self.loss(batch, weights), len(batch))

    def _log(self, stage: str, found: Mapping[str, float], n: int) -> None:
        if not all(torch.tensor(list(found.values())).isfinite()):
            msg = f"the loss is {found['loss']:g} at step {self.global_step}: lower edit_lr or meta_lr"
            raise KeditError(msg)
        self.log_dict({f"{stage}/{name}": value for name, value in found.items()}, batch_size=n)
        if stage == "train":
            self.log_dict({f"edit_lr/{name}": float(self.network.step(name).detach()) for name in self.network.shapes})
            self.log("loss", found["loss"], prog_bar=True, logger=False)

    # ------------------------------------------------------------------ what they are made of

    def factors(self, edits: Sequence[Edit]) -> dict[str, Factors]:
        """Keys and gradients of edits on the unedited model, by the names of the matrices, in main memory."""
        rows = self.loss.rows([(edit.text, edit.target_new) for edit in edits])
        found = captured(self.base, rows, self.sites, self.tokens)
        return {self.base.name(site): each for site, each in found.items()}

    def _edited(self, factors: Mapping[str, Factors]) -> dict[str, Tensor]:
        """The edited weights, as leaves that a gradient can be asked of."""
        weights = {}
        for name, each in factors.items():
            try:
                update = solvers.times(*self.network.update(name, each))
            except ValueError as error:
                msg = f"{name}: {error}: lower edit_lr or meta_lr"
                raise KeditError(msg) from error
            master = double(self.base.master(name))
            weights[name] = (master + update.to(master)).float().to(self.base.device).requires_grad_()
        return weights


class MENDTraining(HypernetworkTraining):
    """Trains MEND (Mitchell et al., 2022); the defaults are the published settings for large decoders.

    Args:
        base: As in `HypernetworkTraining`; so are all the others.
        layers: Layers whose weights are edited, ascending.
        parts: Which weights of them.
        edit_lr: First step size of every matrix.
        tokens: At which tokens of an edit keys and gradients are taken.
        meta_lr: Adam's learning rate.
        lr_lr: The same of the step sizes.
        cedit: Weight of the paraphrases' loss.
        kl_tokens: At which tokens of an unrelated prompt the KL is taken.
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
        edit_lr: float = 1e-4,
        tokens: Tokens = "all",
        meta_lr: float = 1e-6,
        lr_lr: float = 1e-4,
        cedit: float = 0.1,
        kl_tokens: Tokens = "all",
        accumulate: int = 10,
        clip: float = 100.0,
        **shared: Any,
    ) -> None:
        own: dict[str, Any] = {"edit_lr": edit_lr, "tokens": tokens, "meta_lr": meta_lr, "lr_lr": lr_lr}
        own |= {"cedit": cedit, "kl_tokens": kl_tokens, "accumulate": accumulate, "clip": clip}
        super().__init__(base, layers, parts=parts, **own, **shared)


class MALMENTraining(HypernetworkTraining):
    """Trains MALMEN (Tan et al., 2023), whose released settings are the defaults of `HypernetworkTraining`."""

    kind = MALMENNetwork
