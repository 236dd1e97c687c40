"""What every editor is made of: its settings, its edit batch, and the loss that most share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from typing import Any, Literal

from torch import Tensor, device, nn

from kedit_lightning.data.prompts import ContextTemplates
from kedit_lightning.delta import WeightDelta
from kedit_lightning.editors.checks import ascending, at_least
from kedit_lightning.editors.closed_form import ClosedForm
from kedit_lightning.editors.compression import Compression, compressed
from kedit_lightning.editors.losses import KLPrompt, edit_loss
from kedit_lightning.editors.parts import Parts
from kedit_lightning.editors.stages import Loss, Stage, ValueDelta, latest
from kedit_lightning.edits import Edit, Site, Token
from kedit_lightning.errors import KeditError, RejectedError
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.encoding import Batch
from kedit_lightning.models.full import Forwards, FullForward
from kedit_lightning.models.memory import needed, require, token_budget
from kedit_lightning.models.statistics import Statistics
from kedit_lightning.models.suffix import SuffixForward

Preset = Literal["paper", "released"]


class Editor(ClosedForm):
    """A locate-then-edit editor: `locate` · `stages` · `write`.

    One `Trainer.fit` is one pass over one edit batch: the stages run as training of `ValueDelta`s beside a frozen base
    model, then the trainer's ``on_fit_end`` callback drives `write` and adds each update to the weights before it asks
    for the next.

    Args:
        base: The frozen base model.
        layers: Layers whose weights are edited, ascending.
        v_num_grad_steps: Loss evaluations of a stage at most (one update fewer).
        v_lr: Adam's learning rate.
        v_weight_decay: Factor of ``‖δ‖ / ‖v₀‖²``.
        clamp_norm_factor: ‖δ‖ is at most this times ‖v₀‖.
        kl_factor: Factor of the essence KL.
        mom2_adjustment: Whether keys are weighed by their second moment; false takes the identity.
        statistics: Where the second moment comes from.
        context_templates: Texts put before the prompts.
        forward: ``suffix`` runs only the layers and tokens that δ can change; ``full`` the whole model, for comparison.
        max_tokens: Tokens optimised together, padding included; null: what fits into the GPU's free memory, 2048 on a
            CPU. Where memory runs out, half as many are tried. An edit's rows always stay together.
        compress: EAC: values are optimised twice, the second time on their most important coordinates alone; its own
            numbers of steps take the place of ``v_num_grad_steps``.
        unconverged: What becomes of an edit whose stages ran out of steps before their stopping rule ended them.
        preset: ``paper``, or ``released`` to follow the authors' code where it differs.

    Raises:
        KeditError: A setting is out of range or contradicts another.
    """

    scheme: Literal["rome", "memit"] = "rome"
    """How context templates are sampled where their settings leave it open."""

    def __init__(
        self,
        base: LanguageModel,
        layers: list[int],
        *,
        v_num_grad_steps: int = 25,
        v_lr: float = 0.5,
        v_weight_decay: float = 0.5,
        clamp_norm_factor: float = 0.75,
        kl_factor: float = 0.0625,
        mom2_adjustment: bool = True,
        statistics: Statistics | None = None,
        context_templates: ContextTemplates | None = None,
        forward: Literal["suffix", "full"] = "suffix",
        max_tokens: int | None = None,
        compress: Compression | None = None,
        unconverged: Literal["keep", "reject"] = "keep",
        preset: Preset = "paper",
    ) -> None:
        super().__init__(base, v_lr)
        self.save_hyperparameters(ignore=["base"], logger=False)
        self.layers = [base.check_layer(layer) for layer in ascending(layers=layers)]
        at_least(0, v_weight_decay=v_weight_decay, kl_factor=kl_factor)
        at_least(1, v_num_grad_steps=v_num_grad_steps, max_tokens=1 if max_tokens is None else max_tokens)
        at_least(1e-12, v_lr=v_lr, clamp_norm_factor=clamp_norm_factor)
        if mom2_adjustment and statistics is None:
            msg = (
                f"{type(self).__name__} weighs keys by their second moment over some text: give `statistics` a source "
                "(almanac, a text file, a data set), or mom2_adjustment: false to do without"
            )
            raise KeditError(msg)
        self.v_num_grad_steps = v_num_grad_steps
        self.v_weight_decay, self.clamp_norm_factor, self.kl_factor = v_weight_decay, clamp_norm_factor, kl_factor
        self.statistics = statistics if mom2_adjustment and statistics else Statistics("identity")
        templates = context_templates or ContextTemplates()
        self.context_templates = replace(templates, scheme=templates.scheme or self.scheme)
        self.preset, self.max_tokens, self.compress, self.unconverged = preset, max_tokens, compress, unconverged
        self.kl_reference: Mapping[Site, Tensor] = {}
        self.forwards = Forwards(SuffixForward if forward == "suffix" else FullForward)
        self.templates: list[list[str]] = []
        self.moments = {}
        self.memory: dict[str, Tensor] = {}
        self.layer: int

    @property
    def config(self) -> dict[str, Any]:
        """The settings as plain data, statistics and templates included."""
        own = {key: value for key, value in self.hparams.items() if not key.startswith("_")}  # without jsonargparse's
        return {
            key: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            for key, value in own.items()
        }

    # ------------------------------------------------------------------ what an editor says

    @abstractmethod
    def locate(self) -> None:
        """Declare the value deltas of this pass, by `value_delta`."""

    @abstractmethod
    def write(self) -> Generator[WeightDelta, None, None]:
        """Yield the weight updates; each is added to the weights before the next is asked for.

        After the last, `memory` may be given what the commit is to remember.
        """

    def passes(self) -> Sequence[int]:
        """The layer that `locate` starts from, a pass an entry; one pass by default."""
        return self.layers[-1:]

    @property
    def separate_targets(self) -> bool:
        """Whether targets are tokenised on their own, as most released codes do."""
        return self.preset == "released"

    def request(self, edit: Edit) -> Edit:
        """What the rows of an edit are made from: its prompt, and its subject for "{subject} is a"."""
        return edit

    def sites(self) -> list[Site]:
        """Where weights are edited and keys are read."""
        return [Site(layer, "mlp") for layer in self.layers]

    def names(self) -> list[str]:
        """The names of the weights that are edited, among the model's parameters."""
        return [self.base.name(site) for site in self.sites()]

    def needs(self, n: int) -> dict[device, tuple[int, int]]:
        """Bytes that a batch of n edits takes beside its steps: fixed ones and those an edit, on each device."""
        return needed(self.base, self.sites(), n, self.kept, self.moments)

    def update_size(self, n: int) -> int:
        """Bytes of the updates of n edits as they are saved: factors of rank n, or dense where that is less."""
        shapes = [self.base.weight(name).shape for name in self.names()]
        return 4 * sum(min(n * (out + inner), out * inner) for out, inner in shapes)

    def memory_size(self, n: int) -> int:
        """Bytes of what a commit of n edits remembers."""
        return 0

    @property
    def kept(self) -> int:
        """How many matrices of k × k in float64 the next commit makes, for each site, that then stay in main memory."""
        return 0

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """Take in what a commit has remembered; called after each commit with its `memory`."""

    def forget(self) -> None:
        """Drop all that was remembered: the weights are being restored."""

    def restore(self) -> None:
        """Begin again with the unedited model: its weights, and an editor that remembers nothing."""
        self.base.restore()
        self.forget()

    # ------------------------------------------------------------------ what an editor is given

    def course(self) -> Iterator[Stage]:
        """The stages, each twice where values are compressed."""
        return compressed(self, self.stages(), self.compress) if self.compress else self.stages()

    def check_values(self) -> None:
        """When all stages are over: refuse edits whose values cannot be written, or did not converge if asked.

        Raises:
            RejectedError: There are such edits.
        """
        self.forwards.forget()
        reasons: dict[int, str] = {}
        for outcome in latest([outcome for outcome in self.outcomes if outcome.pass_ == self.pass_]):
            for delta in outcome.deltas:
                broken = (~delta.delta.detach().isfinite().all(dim=1)).nonzero()[:, 0]
                reasons |= dict.fromkeys(broken.tolist(), f"stage {outcome.stage}: δ is not finite")
            if self.unconverged == "reject":
                for i in (~outcome.converged).nonzero()[:, 0].tolist():
                    reasons.setdefault(i, f"stage {outcome.stage} has not converged in {int(outcome.steps[i])} steps")
        if reasons:
            raise RejectedError({i: f"case {self.edits[i].case_id}: {why}" for i, why in sorted(reasons.items())})

    def prepare(self) -> None:
        """Once before the first edit, on the unedited model: context templates and second moments of the keys."""
        self.prepare_rows()
        self.moments = self.statistics.second_moments(self.base, self.sites())

    def prepare_rows(self) -> None:
        """The part of it that rows are made with."""
        self.evaluations = 0
        self.budget = self.max_tokens or token_budget(self.base)
        self.templates = self.context_templates(self.base)

    def share_out(self, edits: Sequence[Edit]) -> Parts:
        """The rows of edits, in parts that go through the model together."""
        requests = [self.request(edit) for edit in edits]
        return Parts(self.base, requests, self.templates, self.budget, separate=self.separate_targets)

    def begin(self, edits: Sequence[Edit], pass_: int = 0) -> None:
        """Get ready for one pass over one edit batch.

        Raises:
            KeditError: There are more edits than memory for their keys and values.
        """
        if pass_ == 0:
            require(self.base, self.sites(), len(edits), self.kept, self.moments)
            self.parts = self.share_out(edits)
            self.edits, self.outcomes, self.memory = edits, [], {}
        self.pass_, self.layer = pass_, self.passes()[pass_]
        self.deltas = nn.ModuleList()
        self.forwards.forget()
        self.locate()

    def value_delta(self, site: Site, token: Token, name: str = "", **settings: Any) -> ValueDelta:
        """A δ at a site and token; v₀ is read from the current model on the bare prompts when it is optimised.

        Args:
            site: Where δ is added.
            token: At which token.
            name: Tells the δs of a loss apart.
            settings: What differs from the editor's own: ``clamp_norm_factor``, ``v_weight_decay``, ``written_at``.
        """
        self.base.check_layer(site.layer)
        shape = len(self.edits), self.base.weight(Site(site.layer, "mlp")).shape[0]
        shared = {"clamp_norm_factor": self.clamp_norm_factor, "v_weight_decay": self.v_weight_decay}
        delta = ValueDelta(site, token, shape, name=name, **(shared | settings))
        self.deltas.append(delta)
        return delta

    # ------------------------------------------------------------------ what the model says

    def forward_from(self, rows: Batch, at: Mapping[Site, Tensor], last: int | None = None) -> FullForward:
        """The model on rows in which vectors are added at these positions of sites, up to a layer or to its head."""
        return self.forwards(self.base, rows, at, last)

    def edit_loss(
        self,
        *deltas: ValueDelta,
        kl_factor: float | None = None,
        kl_prompt: KLPrompt = "essence",
        slip: Tensor | None = None,
    ) -> Callable[[], Loss]:
        """The loss that seven editors share, of the edits under way; see `editors.losses.edit_loss`."""
        kl_factor = self.kl_factor if kl_factor is None else kl_factor
        return edit_loss(
            self.forward_from,
            self.batch,
            deltas,
            kl_factor=kl_factor,
            kl_prompt=kl_prompt,
            slip=slip,
            kl_reference=self.kl_reference,
        )
