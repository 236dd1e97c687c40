"""How far numbers are from the recorded ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

QUANTITIES: Mapping[str, str] = {
    "before": r"logits_pre/.*",
    "k*": r"key/k_star_mean|.*/layer_ks",
    "R": r".*/resid",
    "P": r"P",
    "M": r"cache_c_after_b\d+",
    "u": r"(stage\d/)?left_vector",
    "v0": r"(stage\d/)?target_init.*",
    "value": r"(stage\d/)?(target|delta)(_(low|high|mlp|attn))?",
    "delta/step": r"(?!eac_stage2/steps/origin_delta)(\w+/)?steps/(\w+_)?delta(_\w+)?",
    "anchors": r"score|average_tensor|values|expanded_delta",
    "curves": r"(\w+/)?steps/(loss|nll_loss|kl_loss|weight_decay\w*|vec_loss)",
    "right": r"(stage\d/)?right_vector",
    "dW": r"dW/.*",
    "logits": r"logits_post/.*",
}
"""Recorded tensors by what they are; the name without its ``reqI/``."""


@dataclass(frozen=True)
class Distance:
    """One comparison.

    Args:
        request: ``req0``, or "" for what belongs to the whole batch.
        name: What was compared, in the recording's own words.
        quantity: What it is.
        error: Relative error in the L2 norm; infinite where the two cannot be compared, or exact things differ.
        note: What to say if it fails.
    """

    request: str
    name: str
    quantity: str
    error: float
    note: str = ""


def relative(found: Tensor, recorded: Tensor) -> float:
    """Relative error in the L2 norm; the error itself where all recorded numbers are zero."""
    if found.shape != recorded.shape:
        return float("inf")
    found, recorded = found.double(), recorded.double()
    error, scale = (found - recorded).norm(), recorded.norm()
    value = error / scale if scale > 0 else error
    return float(value) if value.isfinite() else float("inf")


def compare(
    found: Mapping[str, Tensor], recorded: Mapping[str, Tensor], exact: Mapping[str, Any], expected: Mapping[str, Any]
) -> list[Distance]:
    """Compare everything recorded whose kind is in `QUANTITIES`, and everything expected exactly.

    Args:
        found: Our numbers by recorded name.
        recorded: The recorded numbers.
        exact: Our token ids, positions and counts by name.
        expected: The recorded ones.

    Returns:
        A distance a name; what was recorded and is not found is infinitely far.
    """
    distances = []
    for name, tensor in recorded.items():
        request, rest = split(name)
        quantity = next((q for q, pattern in QUANTITIES.items() if re.fullmatch(pattern, rest)), None)
        if quantity is None:
            continue
        if name in found:
            error = relative(found[name], tensor)
            shapes = f"shape {tuple(found[name].shape)}, recorded {tuple(tensor.shape)}"
            distances.append(
                Distance(request, rest, quantity, error, "" if found[name].shape == tensor.shape else shapes)
            )
        elif quantity not in ("k*", "R"):  # those of single layers are recorded for some editors only
            distances.append(Distance(request, rest, quantity, float("inf"), "not found in our run"))
    updated = {split(name)[0] for name in recorded if split(name)[1].startswith("dW/")}
    for name, tensor in found.items():
        request, rest = split(name)
        if rest.startswith("dW/") and request in updated and name not in recorded and bool(tensor.any()):
            distances.append(Distance(request, rest, "dW", float("inf"), "changed by us, not in the recording"))
    for name, value in expected.items():
        request, rest = split(name)
        same = exact.get(name) == value
        note = "" if same else f"{_short(exact.get(name))}, recorded {_short(value)}"
        distances.append(Distance(request, rest, "exact", 0.0 if same else float("inf"), note))
    return distances


def expected_exactly(
    values: Mapping[str, Any], recorded: Mapping[str, Tensor], bare: Sequence[str] = ()
) -> dict[str, Any]:
    """Token ids, targets, positions, anchors and numbers of loss evaluations of a recording, free of padding.

    Args:
        values: The ``values`` of the case's JSON file.
        recorded: Its tensors.
        bare: Prefixes of stages of which only the first row, the bare prompt, is of interest.
    """
    expected: dict[str, Any] = {}
    for where, value in values.items():
        if not isinstance(value, Mapping):
            continue
        for key in value:
            if key == "n_loss_evaluations" or key.startswith("lookup_idxs"):
                expected[f"{where}/{key}"] = value[key]
    for name, tensor in recorded.items():
        where, _, key = name.rpartition("/")
        if key == "input_ids":
            mask = recorded[f"{where}/attention_mask"].bool()
            expected[f"{where}/tokens"] = [row[kept].tolist() for row, kept in zip(tensor, mask, strict=True)]
        elif key == "rewriting_targets":
            expected[f"{where}/labels"] = [labels(row) for row in tensor]
        elif key in ("target_ids", "important"):
            expected[name] = tensor.tolist()
    for name, value in expected.items():
        if f"{split(name)[1].rpartition('/')[0]}/" in bare and isinstance(value, list) and "target" not in name:
            expected[name] = value[:1]
    return expected


def labels(row: Tensor) -> list[tuple[int, int]]:
    """The labels of a row as (position, token id)."""
    positions = torch.nonzero(row >= 0)[:, 0].tolist()
    return [(position, int(row[position])) for position in positions]


def split(name: str) -> tuple[str, str]:
    """``req0/steps/loss`` in ``req0`` and ``steps/loss``; ``b1/req0/…`` in ``b1/req0`` and the rest."""
    match = re.fullmatch(r"((?:b\d+/)?req\d+|b\d+)/(.*)", name)
    return (match[1], match[2]) if match else ("", name)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
