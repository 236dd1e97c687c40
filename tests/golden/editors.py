"""Which of our editors stands for a recorded one: one line an editor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kedit_lightning.editors.compression import Compression


@dataclass(frozen=True)
class Stage:
    """A stage of ours in the words of a recording.

    Args:
        prefix: Put before the names of its tensors.
        suffixes: Put after the names of its δs, in the stage's order.
        bare: Whether our loss takes the bare prompt alone where the recorded code also ran the others, unused.
    """

    prefix: str = ""
    suffixes: tuple[str, ...] = ("",)
    bare: bool = False


@dataclass(frozen=True)
class Recorded:
    """What it takes to run a recorded editor with ours and to name the results as the recording does.

    Args:
        editor: Class name in `kedit_lightning.editors`.
        tolerance: Largest relative error allowed, as the recordings' README suggests.
        stages: Our stages by name, in their order.
        settings: Arguments of the editor that the recording's hyper-parameters do not hold.
        means: Hyper-parameters of the recording that our editor or its settings stand for; ``...`` is any value.
        loose: Larger tolerances, by quantity.
        needed: What a case must hold to say anything.
    """

    editor: str
    tolerance: float
    stages: Mapping[str, Stage]
    settings: Mapping[str, Any] = field(default_factory=dict)
    means: Mapping[str, Any] = field(default_factory=dict)
    loose: Mapping[str, float] = field(default_factory=dict)
    needed: Sequence[str] = ("value", "curves", "exact")


def _tuned(**settings: Any) -> Recorded:
    """FT, of which the loss of each evaluation and ΔW are recorded."""
    return Recorded("FT", 5e-5, {"w": Stage(suffixes=())}, settings, {"kl_factor": 0}, needed=("curves", "dW"))


EDITORS: Mapping[str, Recorded] = {
    "ROME": Recorded("ROME", 5e-5, {"v": Stage()}),
    "RETS": Recorded("RETS", 5e-5, {"v": Stage()}, loose=dict.fromkeys(("u", "right", "dW", "logits"), 5e-3)),
    "TOP": Recorded("TOP", 5e-5, {"h_r": Stage("stage1/"), "v": Stage("stage2/", bare=True)}),
    "MEMIT": Recorded("MEMIT", 5e-5, {"z": Stage()}),
    "PMET": Recorded("PMET", 3e-4, {"v": Stage("", ("_mlp", "_attn"))}, means={"rewrite_module_tmps": ...}),
    "PMET-both": Recorded(
        "PMET", 3e-4, {"v": Stage("", ("_mlp", "_attn"))}, {"rewrite": "both"}, means={"rewrite_module_tmps": ...}
    ),
    "AlphaEdit": Recorded("AlphaEdit", 3e-4, {"z": Stage()}, means={"mom2_update_weight": ...}),
    "JEEP": Recorded(
        "JEEP",
        3e-4,
        {"v": Stage("", ("_low", "_high"))},
        means={
            "emb_module_tmp": ...,
            "fact_token_high": "pred_last",
            "fact_token_low": "subject_last",
            "kl_factor_high": 0,
            "layer_selection_high": "all",
            "layer_selection_low": "all",
            "mom2_adjustment_high": True,
            "mom2_adjustment_low": True,
            "rewrite_module_tmp_high": ...,
            "rewrite_module_tmp_low": ...,
        },
    ),
    "FT-L": _tuned(),
    "FT-U": _tuned(norm_constraint=None),
    "FT-WD": _tuned(norm_constraint=None, weight_decay=0.0),
    "EAC-ROME": Recorded(
        "ROME",
        5e-5,
        {"v_anchors": Stage("eac_stage1/"), "v": Stage("eac_stage2/")},
        {"compress": Compression(gamma=80, elastic_l1=0, kl_reference="start")},
        means={"v_num_grad_steps": ...},
    ),
    "EAC-MEMIT": Recorded(
        "MEMIT",
        5e-5,
        {"z_anchors": Stage("eac_stage1/"), "z": Stage("eac_stage2/")},
        {"compress": Compression(gamma=95, v_num_grad_steps2=15, start="zeros")},
        means={"v_num_grad_steps": ...},
    ),
}
"""By EDITOR of the case's file name (``PMET-both``) or, where that has no line, by the editor written in the case."""

TERMS: Mapping[str, str] = {
    "nll": "nll_loss",
    "kl": "kl_loss",
    "weight_decay": "weight_decay",
    "weight_decay_low": "weight_decay_low",
    "weight_decay_high": "weight_decay_high",
    "distance": "vec_loss",
    "elastic_l1": "weighted_loss",
}
"""Terms of our losses by the recordings' names."""

WITHOUT_EFFECT: Mapping[str, Any] = {
    "alg_name": ...,
    "attn_module_tmp": ...,
    "context_template_length_params": ...,
    "device": ...,
    "fact_token": "subject_last",
    "layer_module_tmp": ...,
    "layer_selection": "all",
    "lm_head_module": ...,
    "ln_f_module": ...,
    "mlp_module_tmp": ...,
    "model_name": ...,
    "mom2_dataset": ...,
    "mom2_dtype": "float32",
    "mom2_n_samples": ...,
    "nll_loss_factor": 1,
    "rewrite_module_tmp": ...,
    "stats_dir": ...,
    "v_loss_layer": ...,
}
"""Hyper-parameters of the recordings that name modules, paths or what the case brings itself; ``...`` is any value."""
