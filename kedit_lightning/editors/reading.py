"""Keys and values of all edits of a batch, read from the model as it stands, part by part.

Several processes share the rows out, and all of them have what was read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kedit_lightning.data.prompts import EditBatch
from kedit_lightning.edits import Site, Token
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.processes import share, summed


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
        prompts = prompts[share(len(prompts)).to(prompts.device)]
        rows, edit, weight = part.rows.select(prompts), part.edit[prompts], part.weight[prompts]
        first = torch.nonzero(torch.isin(prompts, part.bare))[:, 0]
        at = {site: rows.at[token] for site, token in tokens.items()}
        widths = {site: base.weight(site).shape[1] for site in at}
        for site, keys in (base.keys(rows, at) if len(rows) else _nothing(base, widths)).items():
            if site not in found:
                k = keys.shape[1]
                found[site] = Keys(keys.new_zeros(n, k), keys.new_zeros(n if bare else 0, k))
            mean = keys.new_zeros(len(part), keys.shape[1])
            mean.index_add_(0, edit.to(keys.device), keys * weight.to(keys)[:, None])
            index = part.index.to(keys.device)
            found[site].mean[index] = mean
            if bare:
                found[site].bare[index[edit[first].to(keys.device)]] = keys[first.to(keys.device)]
    return {site: Keys(*map(summed, keys)) for site, keys in found.items()}


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
        for site, values in own_values(base, part, tokens).items():
            if site not in found:
                found[site] = values.new_zeros(n, values.shape[1])
            found[site][part.index.to(values.device)] = values
    return {site: summed(values) for site, values in found.items()}


def own_values(base: LanguageModel, part: EditBatch, tokens: Mapping[Site, Token]) -> dict[Site, Tensor]:
    """What `read_values` gives of m edits, where they are this process's share, zeros elsewhere; shape ``(m, d)``."""
    mine = share(len(part))
    rows = part.bare_rows.select(mine.to(part.edit.device))
    at = {site: rows.at[token] for site, token in tokens.items()}
    widths = {site: base.weight(Site(site.layer, "mlp")).shape[0] for site in at}
    found = base.read(rows, at) if len(rows) and at else _nothing(base, widths)
    return {
        site: values.new_zeros(len(part), values.shape[1]).index_copy(0, mine.to(values.device), values)
        for site, values in found.items()
    }


def _nothing(base: LanguageModel, widths: Mapping[Site, int]) -> dict[Site, Tensor]:
    """What is read of no rows: a process has none where there are more processes than rows."""
    return {site: torch.zeros(0, width, device=base.device) for site, width in widths.items()}
