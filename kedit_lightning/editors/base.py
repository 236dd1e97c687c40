"""What every editor is made of: its settings, its edit batch, keys, values and the loss that most share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kedit_lightning import objectives, solvers
from kedit_lightning.data.prompts import ContextTemplates, edit_batch
from kedit_lightning.delta import WeightDelta
from kedit_lightning.editors.stages import Terms, ValueDelta
from kedit_lightning.editors.training import StagedTraining
from kedit_lightning.edits import Edit, Site, Token
from kedit_lightning.errors import KeditError
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.statistics import KeyStatistics, Statistics

Preset = Literal["paper", "released"]


class Editor(StagedTraining):
    """A locate-then-edit editor: `locate` · `stages` · `write`.

    One `Trainer.fit` is one pass over one edit batch: the stages run as training of `ValueDelta`s beside a frozen base
    model, then the trainer's ``on_fit_end`` callback drives `write` and adds each update to the weights before it asks
    for the next.

    Args:
        base: The frozen base model.
        layers: Layers whose weights are edited.
        v_lr: Adam's learning rate.
        v_weight_decay: Factor of ``‖δ‖ / ‖v₀‖²``.
        clamp_norm_factor: ‖δ‖ is at most this times ‖v₀‖.
        kl_factor: Factor of the essence KL.
        mom2_adjustment: Whether keys are whitened by their second moment; false takes the identity.
        statistics: Where the second moment comes from.
        context_templates: Texts put before the prompts.
        preset: ``paper``, or ``released`` to follow the authors' code where it differs.

    Raises:
        KeditError: A setting is out of range or contradicts another.
    """

    def __init__(
        self,
        base: LanguageModel,
        layers: list[int],
        *,
        v_lr: float,
        v_weight_decay: float,
        clamp_norm_factor: float,
        kl_factor: float,
        mom2_adjustment: bool,
        statistics: Statistics | None,
        context_templates: ContextTemplates | None,
        preset: Preset,
    ) -> None:
        super().__init__(base, v_lr)
        self.save_hyperparameters(ignore=["base"], logger=False)
        if not layers or len(set(layers)) < len(layers):
            msg = f"layers: expected at least one layer to edit, each once, got {layers}"
            raise KeditError(msg)
        at_least(0, v_weight_decay=v_weight_decay, kl_factor=kl_factor)
        at_least(1e-12, v_lr=v_lr, clamp_norm_factor=clamp_norm_factor)
        if mom2_adjustment and statistics is None:
            msg = (
                f"{type(self).__name__} whitens keys by their second moment over some text: give `statistics` a source "
                "(almanac, a text file, a data set), or mom2_adjustment: false to do without"
            )
            raise KeditError(msg)
        self.layers = sorted(base.check_layer(layer) for layer in layers)
        self.v_weight_decay, self.clamp_norm_factor, self.kl_factor = v_weight_decay, clamp_norm_factor, kl_factor
        self.mom2_adjustment = mom2_adjustment
        self.statistics = statistics or Statistics("identity")
        self.context_templates = context_templates or ContextTemplates()
        self.preset = preset
        self.templates: list[list[str]] = []
        self.moments: dict[Site, KeyStatistics] = {}
        self.layer: int

    @property
    def config(self) -> dict[str, Any]:
        """The settings as plain data, statistics and templates included."""
        nested = (Statistics, ContextTemplates)
        return {key: asdict(value) if isinstance(value, nested) else value for key, value in self.hparams.items()}

    # ------------------------------------------------------------------ what an editor says

    @abstractmethod
    def locate(self) -> None:
        """Declare the value deltas of this pass, by `value_delta`."""

    @abstractmethod
    def write(self) -> Generator[WeightDelta, None, None]:
        """Yield the weight updates; each is added to the weights before the next is asked for."""

    def passes(self) -> Sequence[int]:
        """The layer that `locate` starts from, a pass an entry; one pass by default."""
        return self.layers[-1:]

    def sites(self) -> list[Site]:
        """Where weights are edited and keys are read."""
        return [Site(layer, "mlp") for layer in self.layers]

    # ------------------------------------------------------------------ what an editor is given

    def prepare(self) -> None:
        """Once before the first edit, on the unedited model: context templates and second moments of the keys."""
        self.evaluations = 0
        self.templates = self.context_templates(self.base)
        if self.mom2_adjustment:
            self.moments = self.statistics.second_moments(self.base, self.sites())

    def begin(self, edits: Sequence[Edit], pass_: int = 0) -> None:
        """Get ready for one pass over one edit batch."""
        if pass_ == 0:
            self.outcomes = []
            separate = self.preset == "released"
            self.batch = edit_batch(self.base, edits, self.templates, separate=separate).to(self.base.device)
        self.pass_, self.layer = pass_, self.passes()[pass_]
        self.deltas = nn.ModuleList()
        self.locate()

    def value_delta(self, site: Site, token: Token) -> ValueDelta:
        """A δ at a site and token, with v₀ read from the current model on the bare prompts."""
        self.base.check_layer(site.layer)
        rows = self.batch.bare_rows
        origin = self.base.read(rows, {site: rows.at[token]})[site]
        delta = ValueDelta(site, token, origin, self.clamp_norm_factor)
        self.deltas.append(delta)
        return delta

    def edit_loss(self, *deltas: ValueDelta, essence_at: Tensor | None = None) -> Callable[[], Terms]:
        """The loss that seven editors share: ``nll + kl_factor · essence_kl + v_weight_decay · ‖δ‖/‖v₀‖²``.

        Every δ is added in every row at the row's own token. The KL is taken at the first δ's token of
        "{subject} is a", against the model as it stands before this edit (Eqs. 4 of ROME, 5 of TOP).

        Args:
            deltas: The δs.
            essence_at: Another position in the "{subject} is a" rows for the first δ and the KL, shape ``(n,)``.
        """
        rows, edit, essence = self.batch.rows, self.batch.edit, self.batch.essence
        at = {delta: rows.at[delta.token].clone() for delta in deltas}
        if essence_at is not None:
            at[deltas[0]][essence] = essence_at
        n, kl_at = len(self.batch), at[deltas[0]][essence]
        asking = torch.nonzero(~essence)[:, 0]
        line, position = torch.nonzero(rows.labels[asking] >= 0, as_tuple=True)
        targets = rows.labels[asking[line], position]
        # Where logits are needed: before every target token, then at the KL's place of every edit.
        read = torch.cat([asking[line], torch.nonzero(essence)[:, 0]]), torch.cat([position, kl_at])

        with torch.no_grad():
            every = torch.arange(n, device=kl_at.device)
            reference = self.base.logits(rows.select(essence), (every, kl_at)).float().log_softmax(-1)

        def terms() -> Terms:
            with ExitStack() as stack:
                for delta in deltas:
                    stack.enter_context(self.base.add(delta.site, at[delta], delta.delta[edit]))
                logits = self.base.logits(rows, read)
            nll = objectives.nll(logits[:-n, None], targets[:, None])
            nll = objectives.mean_over_rows(nll, line, len(asking))
            decay = [objectives.weight_decay(delta.delta, delta.origin) for delta in deltas]
            return {
                "nll": objectives.mean_over_rows(nll, edit[~essence], n),
                "kl": self.kl_factor * objectives.essence_kl(logits[-n:].float().log_softmax(-1), reference),
                "weight_decay": self.v_weight_decay * torch.stack(decay).sum(dim=0),
            }

        return terms

    def whiten(self, keys: Tensor, site: Site) -> Tensor:
        """``C⁻¹ k`` in float64 for keys of shape ``(n, k)``; k itself without ``mom2_adjustment``."""
        keys = solvers.double(keys)
        return self.moments[site].solve(keys) if self.mom2_adjustment else keys

    def mean_keys(self, site: Site, token: Token) -> Tensor:
        """k*: each edit's key, its mean over the context templates (by groups, where there are groups); ``(n, k)``."""
        keys = self.base.keys(self.batch.rows, {site: self.batch.rows.at[token]})[site]
        weight = self.batch.weight.to(keys.device)
        edit = self.batch.edit.to(keys.device)
        return keys.new_zeros(len(self.batch), keys.shape[1]).index_add(0, edit, keys * weight[:, None])

    def bare_keys(self, site: Site, token: Token) -> Tensor:
        """Each edit's key in its bare prompt, shape ``(n, k)``."""
        rows = self.batch.bare_rows
        return self.base.keys(rows, {site: rows.at[token]})[site]

    def settle(self) -> None:
        """After `write`: how far the edited model's values are from those that were wanted."""
        rows = self.batch.bare_rows
        for outcome in self.outcomes:
            if outcome.pass_ != self.pass_:
                continue
            outcome.residual = torch.zeros(len(self.batch))
            for delta in outcome.deltas:
                found, wanted = self.base.read(rows, {delta.site: rows.at[delta.token]})[delta.site], delta.value
                outcome.residual += ((found.to(wanted) - wanted).norm(dim=1) / wanted.norm(dim=1)).cpu()


def at_least(least: float, **settings: float) -> None:
    """Refuse settings that are too small.

    Raises:
        KeditError: One is.
    """
    for name, value in settings.items():
        if not value >= least:
            msg = f"{name}: expected {'a positive number' if 0 < least < 1 else f'at least {least}'}, got {value}"
            raise KeditError(msg)
