"""FT: fine-tuning of a few weights on the facts to be edited."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kedit_lightning import objectives
from kedit_lightning.editors.base import Preset
from kedit_lightning.editors.checks import at_least
from kedit_lightning.editors.stages import Loss, Stage, Stop, Terms
from kedit_lightning.editors.tuning import WeightTraining
from kedit_lightning.edits import Site, Token
from kedit_lightning.errors import KeditError
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.processes import once, share


@dataclass(frozen=True)
class ElasticNet:
    """The scored elastic net on FT (EAC, App. E; our reading, since no code and no equation is published).

    After some steps of plain FT each entry of ΔW = W − W₀ is scored by ``|mean gradient ⊙ ΔW|``; the other steps add
    ``λ Σᵢ |ΔWᵢ| / (scoreᵢ + 1e-6) + μ ‖ΔW‖²`` over all tuned weights to the loss. No entry is masked.

    Args:
        num_steps: Steps of plain FT, of the editor's ``num_steps``.
        elastic_l1: λ.
        mu: μ.

    Raises:
        KeditError: A number is out of range.
    """

    num_steps: int = 10
    elastic_l1: float = 5e-7
    mu: float = 0.5

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        at_least(1, num_steps=self.num_steps)
        at_least(0, elastic_l1=self.elastic_l1, mu=self.mu)


class FT(WeightTraining):
    """Fine-tuning of a down-projection or a whole block (the baselines of ROME, MEMIT, JEEP and EAC).

    `locate`: the weights, biases included, of exactly the given layers. `stages`: Adam on the mean over the edits of
    ``-(1/m) Σₜ log P(oₜ)``, for at most ``num_steps`` passes over them; a mini-batch whose loss is below ``stop`` makes
    no update, and training ends when the mean over all edits is below it. `write`: ΔW as it is.

    FT-L is ``norm_constraint``, which holds each entry within ε of W₀ (Zhu et al., 2020,
    https://arxiv.org/abs/2012.00363); FT-WD is ``wd_power_law``, which the published code never applies (it takes a
    tuple and is given a list); FT with the scored elastic net is ``elastic_net``.

    Targets are teacher-forced: each token is predicted after those before it. ``preset: released`` predicts all tokens
    of a target at the prompt's last token, as the code of ROME and MEMIT does, which for m > 1 trains another answer;
    it also tokenises targets on their own.

    Args:
        base: The frozen base model.
        layers: Layers to edit, ascending.
        num_steps: Passes over the edits at most, each with its updates (N loss evaluations, N updates).
        lr: Adam's learning rate.
        weight_decay: Adam's own (coupled) weight decay, a pull of W towards 0.
        wd_power_law: Weight decay ``exp(b) · nᵃ`` for n edits, given as (a, b), instead; MEMIT's is
            (-0.87028798, 0.15589562), 3.86e-4 for 10,000 edits.
        norm_constraint: ε of the L∞ ball around W₀; null: none.
        rewrite: ``mlp``: the down-projection; ``block``: all that a block has.
        elastic_net: What keeps ΔW small and where it matters; null: nothing.
        stop: No update of a mini-batch, and the end of training, below this loss.
        batch_size: Edits of a mini-batch.
        max_tokens: Tokens that go through the model together, padding included; null: what fits into the GPU's free
            memory, 2048 on a CPU. Where memory runs out, half as many are tried.
        unconverged: What becomes of the edits of a batch whose loss is not below ``stop`` at the end.
        preset: ``paper``, or ``released`` to follow the authors' code where it differs.

    Raises:
        KeditError: A setting is out of range or contradicts another.
    """

    lacks: ClassVar[Mapping[str, str]] = {
        "compress": "FT optimises no value that could be compressed; elastic_net, norm_constraint and wd_power_law are "
        "what keeps its weights near"
    }
    """By setting of other editors why this one does not take it."""

    def __init__(
        self,
        base: LanguageModel,
        layers: list[int],
        num_steps: int = 25,
        lr: float = 5e-4,
        weight_decay: float = 0.0,
        wd_power_law: tuple[float, float] | None = None,
        norm_constraint: float | None = None,
        rewrite: Literal["mlp", "block"] = "mlp",
        elastic_net: ElasticNet | None = None,
        stop: float = 1e-2,
        batch_size: int = 64,
        max_tokens: int | None = None,
        unconverged: Literal["keep", "reject"] = "keep",
        preset: Preset = "paper",
    ) -> None:
        super().__init__(
            base,
            layers,
            num_steps=num_steps,
            lr=lr,
            weight_decay=weight_decay,
            wd_power_law=wd_power_law,
            norm_constraint=norm_constraint,
            batch_size=batch_size,
            max_tokens=max_tokens,
            unconverged=unconverged,
            preset=preset,
        )
        if elastic_net and elastic_net.num_steps >= num_steps:
            msg = (
                f"elastic_net.num_steps: expected fewer than the {num_steps} of num_steps, got {elastic_net.num_steps}"
            )
            raise KeditError(msg)
        self.rewrite, self.elastic_net, self.stop = rewrite, elastic_net, stop

    def names(self) -> list[str]:
        """Every parameter of the maps, or of the blocks, of the layers."""
        found = []
        for layer in self.layers:
            path = f"{self.base.architecture.layers}.{layer}"
            if self.rewrite == "mlp":
                path = self.base.name(Site(layer, "mlp")).removesuffix(".weight")
            found += [f"{path}.{name}" for name, _ in self.base.model.get_submodule(path).named_parameters()]
        return found

    def stages(self) -> Iterator[Stage]:
        """All steps with the loss of the answers; or some, and the others with the elastic net."""
        net, stop = self.elastic_net, _mean_below(self.stop)
        if net is None:
            yield Stage("w", (), self._answers, self.num_steps, stop)
            return
        yield Stage("w", (), self._answers, net.num_steps, stop, observe=self._observe)
        scores = [tuned.score for tuned in self.tuned]
        yield Stage("elastic", (), lambda: self._held(net, scores), self.num_steps - net.num_steps, stop)

    def _answers(self) -> Callable[[], Loss]:
        """The mean NLL of each edit's target tokens."""
        m = len(self.batch)
        mine = share(m).to(self.batch.edit.device)
        rows = self.batch.bare_rows.select(mine)
        line, position = torch.nonzero(rows.labels >= 0, as_tuple=True)
        targets = rows.labels[line, position]
        if self.preset == "released":
            position = rows.at[Token.PROMPT_LAST][line]

        def loss() -> Loss:
            nothing = torch.zeros(0, 1, device=mine.device)
            logits = self.base.logits(rows, (line, position), self.weights) if len(rows) else nothing
            nll = objectives.mean_over_rows(objectives.nll(logits, targets), line, len(rows))
            missed = objectives.sum_over_rows((logits.detach().argmax(dim=-1) != targets).float(), line, len(rows))
            probability = (-nll.detach()).exp()
            of_edits = [objectives.sum_over_rows(values, mine, m) for values in (nll, probability, missed)]
            return Loss({"nll": of_edits[0]}, *of_edits[1:])

        return loss

    def _observe(self, _: Tensor) -> None:
        for tuned in self.tuned:
            tuned.observe()

    def _held(self, net: ElasticNet, scores: list[Tensor]) -> Callable[[], Loss]:
        """The same with the elastic net, which is one number for all edits."""
        answers = self._answers()

        def loss() -> Loss:
            found = answers()
            l1, l2 = torch.zeros_like(found.total[0]), torch.zeros_like(found.total[0])
            for tuned, score in zip(self.tuned, scores, strict=True):
                change = tuned.value - tuned.origin
                l1 = l1 + objectives.scored_l1(change[None], score[None])[0].to(l1)
                l2 = l2 + change.square().sum().to(l2)
            terms: Terms = {"elastic_l1": net.elastic_l1 * l1, "elastic_l2": net.mu * l2}
            every = {name: once(term).expand(len(self.batch)) for name, term in terms.items()}
            return replace(found, terms=found.terms | every)

        return loss


def _mean_below(threshold: float) -> Stop:
    """Stopping rule: the mean loss of the edits is below a threshold."""
    return lambda loss: loss.total.mean() < threshold
