"""Keys and values of all edits of a batch, read from the model as it stands, part by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kedit_lightning.data.prompts import EditBatch
from kedit_lightning.edits import Site, Token
from kedit_lightning.models import LanguageModel


class Keys(NamedTuple):
    """Keys of n edits at a site, float32, both of shape ``(n, k)``.

    Attributes:
        mean: k*: the mean over the context templates (by groups, where there are groups).
        bare: The key in the bare prompt; empty, ``(0, k)``, where it was not asked for.
    """

    mean: Tensor
    bare: Tensor


def read_keys(
    base: LanguageModel, parts: Sequence[EditBatch], tokens: Mapping[Site, Token], *, bare: bool = False
) -> dict[Site, Keys]:
    """Keys of n edits at sites, by one forward pass over their prompts.

    Args:
        base: The model.
        parts: The edits.
        tokens: For each site the token whose key is meant.
        bare: Whether the keys of the bare prompts are wanted by themselves too.
    """
    n = sum(map(len, parts))
    found: dict[Site, Keys] = {}
    for part in parts:
        prompts = torch.nonzero(~part.essence)[:, 0]
        rows, edit, weight = part.rows.select(prompts), part.edit[prompts], part.weight[prompts]
        first = torch.searchsorted(prompts, part.bare)
        for site, keys in base.keys(rows, {site: rows.at[token] for site, token in tokens.items()}).items():
            if site not in found:
                k = keys.shape[1]
                found[site] = Keys(keys.new_zeros(n, k), keys.new_zeros(n if bare else 0, k))
            mean = keys.new_zeros(len(part), keys.shape[1])
            mean.index_add_(0, edit.to(keys.device), keys * weight.to(keys)[:, None])
            index = part.index.to(keys.device)
            found[site].mean[index] = mean
            if bare:
                found[site].bare[index] = keys[first.to(keys.device)]
    return found


def read_values(base: LanguageModel, parts: Sequence[EditBatch], tokens: Mapping[Site, Token]) -> dict[Site, Tensor]:
    """What sites put out on the bare prompts of n edits; float32, shape ``(n, d)``.

    Args:
        base: The model.
        parts: The edits.
        tokens: For each site the token whose value is meant.
    """
    n = sum(map(len, parts))
    found: dict[Site, Tensor] = {}
    for part in parts:
        rows = part.bare_rows
        for site, values in base.read(rows, {site: rows.at[token] for site, token in tokens.items()}).items():
            if site not in found:
                found[site] = values.new_zeros(n, values.shape[1])
            found[site][part.index.to(values.device)] = values
    return found
