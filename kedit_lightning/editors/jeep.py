"""JEEP: joint knowledge editing for information enrichment and probability promotion."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Literal

from kedit_lightning.delta import WeightDelta
from kedit_lightning.editors.base import Editor, Preset
from kedit_lightning.editors.checks import ascending, at_least
from kedit_lightning.editors.closed_form import Spread
from kedit_lightning.editors.stages import Loss, Stage, ValueDelta, likely
from kedit_lightning.edits import Part, Site, Token
from kedit_lightning.errors import KeditError
from kedit_lightning.models import LanguageModel

Regions = Literal["both", "low", "high"]
HighPart = Literal["mlp", "attn"]


class JEEP(Editor):
    """Joint editing of low and high layers (Shi et al., 2025, https://arxiv.org/abs/2412.17872).

    `locate`: δ′ at the subject's last token in the last low layer L′ and δ* at the prompt's last token in the last high
    layer L*. `stages`: both in one stage (Eq. 11), clamped each by itself (Eq. 12), until the target is likely enough.
    `write`: first the low layers, where the residual is shared by square roots, then the high layers, where it is
    shared evenly; both by least squares (Eq. 10).

    As in the released code a weight decay is ``‖δ‖/‖v₀‖²``, the KL sits at the subject's last token of "{subject} is a"
    (Eq. 11 puts it on the edit prompt: ``kl_prompt: edit``), and keys are means over groups of templates. The paper's
    high site is the MLP. ``preset: released`` adds δ* to the attention's output and writes it into the MLP.

    The rows of Table 4: ``optimize: high`` (w/o δ′ & Step2), ``optimize: low`` (w/o δ* & Step3), ``rewrite: high`` (w/o
    Step2), ``rewrite: low`` (w/o Step3), ``joint: false`` (separate optimisation), ``spread_low: even``, ``high_site:
    attn`` with ``high_rewrite: attn`` (MHSA in Step3), and the whole.

    Args:
        base: The frozen base model.
        layers_low: Low layers to edit, ascending.
        layers_high: High layers to edit, ascending, all above the low ones.
        v_num_grad_steps: Loss evaluations at most.
        v_weight_decay_low: Factor β′ of δ′'s weight decay.
        v_weight_decay_high: Factor β* of δ*'s weight decay.
        clamp_norm_factor_low: γ′: ‖δ′‖ is at most this times ‖v₀′‖.
        clamp_norm_factor_high: γ*: ‖δ*‖ is at most this times ‖v₀*‖.
        kl_factor_low: Factor α′ of the KL, which only δ′ can change.
        mom2_update_weight_low: λ′, the weight of the second moment in the low layers.
        mom2_update_weight_high: λ*, that in the high layers.
        min_loss: An edit is done when its target's mean probability is at least this (the authors' name).
        optimize: Which δs are optimised.
        rewrite: Which regions are written; null: those optimised.
        joint: Both δs in one stage; false: δ′, then the low layers are written, then δ* on the model so edited.
        spread_low: How the residual is shared over the low layers.
        spread_high: How it is shared over the high layers.
        high_site: What δ* is added to; null: the output of what is written, with ``preset:
            released`` the attention's.
        high_rewrite: Which weights of the high layers are written.
        kl_prompt: Where the KL is taken: on "{subject} is a" or on the bare edit prompt.
        preset: ``paper``, or ``released`` to follow the authors' code where it differs.
        shared: The settings of every editor, see `Editor`.
    """

    scheme = "memit"

    def __init__(
        self,
        base: LanguageModel,
        layers_low: list[int],
        layers_high: list[int],
        v_num_grad_steps: int = 30,
        v_weight_decay_low: float = 0.5,
        v_weight_decay_high: float = 0.5,
        clamp_norm_factor_low: float = 0.75,
        clamp_norm_factor_high: float = 0.25,
        kl_factor_low: float = 0.0625,
        mom2_update_weight_low: float = 2000,
        mom2_update_weight_high: float = 2000,
        min_loss: float = 0.9,
        optimize: Regions = "both",
        rewrite: Regions | None = None,
        joint: bool = True,
        spread_low: Spread = "sqrt",
        spread_high: Spread = "even",
        high_site: HighPart | None = None,
        high_rewrite: HighPart = "mlp",
        kl_prompt: Literal["essence", "edit"] = "essence",
        preset: Preset = "paper",
        **shared: Any,
    ) -> None:
        low, high = ascending(layers_low=layers_low), ascending(layers_high=layers_high)
        if low[-1] >= high[0]:
            msg = f"layers_high: expected layers above the low ones {low}, got {high}"
            raise KeditError(msg)
        self.optimized, self.rewritten = REGIONS[optimize], REGIONS[rewrite or optimize]
        if not set(self.rewritten) <= set(self.optimized) or not (joint or optimize == "both"):
            msg = f"expected regions to rewrite that are optimized, and both without joint; got {optimize}, {rewrite}"
            raise KeditError(msg)
        super().__init__(
            base,
            [*low, *high],
            v_num_grad_steps=v_num_grad_steps,
            v_weight_decay=v_weight_decay_low,
            clamp_norm_factor=clamp_norm_factor_low,
            kl_factor=kl_factor_low,
            preset=preset,
            **shared,
        )
        at_least(0, v_weight_decay_high=v_weight_decay_high)
        at_least(1e-12, clamp_norm_factor_high=clamp_norm_factor_high)
        at_least(1e-12, mom2_update_weight_low=mom2_update_weight_low, mom2_update_weight_high=mom2_update_weight_high)
        self.layers_low, self.layers_high, self.joint, self.min_loss = low, high, joint, min_loss
        self.spread_low, self.spread_high = spread_low, spread_high
        self.mom2_update_weight_low, self.mom2_update_weight_high = mom2_update_weight_low, mom2_update_weight_high
        self.high = {"clamp_norm_factor": clamp_norm_factor_high, "v_weight_decay": v_weight_decay_high}
        self.high_site: HighPart = high_site or ("attn" if preset == "released" else high_rewrite)
        self.high_rewrite, self.kl_prompt = high_rewrite, kl_prompt

    def passes(self) -> Sequence[int]:
        """One pass, or one a region where they are not joint."""
        last = {"low": self.layers_low[-1], "high": self.layers_high[-1]}
        return [last[region] for region in (self.optimized[-1:] if self.joint else self.optimized)]

    @property
    def separate_targets(self) -> bool:
        """Never: the released code, too, drops the lone space that SentencePiece puts before a target by itself."""
        return False

    def sites(self) -> list[Site]:
        """Where the regions that are rewritten are edited."""
        low = [Site(layer, "mlp") for layer in self.layers_low if "low" in self.rewritten]
        return low + [Site(layer, self.high_rewrite) for layer in self.layers_high if "high" in self.rewritten]

    def locate(self) -> None:
        """δ′ and δ*, or that of the region whose turn it is."""
        self.under_way = self.optimized if self.joint else self.optimized[self.pass_ : self.pass_ + 1]
        self.values: dict[str, ValueDelta] = {}
        if "low" in self.under_way:
            self.values["low"] = self.value_delta(Site(self.layers_low[-1], "mlp"), Token.SUBJECT_LAST, "low")
        if "high" in self.under_way:
            last = self.layers_high[-1]
            site, written_at = Site(last, self.high_site), Site(last, self.high_rewrite)
            self.values["high"] = self.value_delta(site, Token.PROMPT_LAST, "high", written_at=written_at, **self.high)

    def stages(self) -> Iterator[Stage]:
        """The values, jointly; δ* alone comes too late to change the KL."""
        yield Stage("v", tuple(self.values.values()), self._joint_loss, self.v_num_grad_steps, likely(self.min_loss))

    def _joint_loss(self) -> Callable[[], Loss]:
        deltas = tuple(self.values.values())
        if "low" in self.values:
            return self.edit_loss(*deltas, kl_prompt=self.kl_prompt)
        return self.edit_loss(*deltas, kl_factor=0.0)

    def write(self) -> Generator[WeightDelta, None, None]:
        """The low layers, then the high ones on the model so edited."""
        written = [region for region in self.under_way if region in self.rewritten]
        if "low" in written:
            low: dict[Part, ValueDelta] = {"mlp": self.values["low"]}
            yield from self.spread(self.layers_low, low, self.spread_low, self.mom2_update_weight_low)
        if "high" in written:
            high: dict[Part, ValueDelta] = {self.high_rewrite: self.values["high"]}
            yield from self.spread(self.layers_high, high, self.spread_high, self.mom2_update_weight_high)


REGIONS = {"both": ("low", "high"), "low": ("low",), "high": ("high",)}
"""Regions by the names of the settings."""
