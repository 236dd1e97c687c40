"""How much memory there is, and how much a model takes of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch

from kedit_lightning.edits import Site
from kedit_lightning.errors import KeditError
from kedit_lightning.models.devices import free_memory
from kedit_lightning.models.key_statistics import ROOMY, KeyStatistics
from kedit_lightning.models.language_model import LanguageModel
from kedit_lightning.models.offloading import device_of
from kedit_lightning.models.processes import gathered, on_this_machine
from kedit_lightning.solvers import woodbury_is_cheaper

CPU_TOKENS = 2048
"""Tokens of a batch on a CPU: enough to fill its cores; more of them only wait for each other's padding."""
SHARE = 0.5
"""Share of a GPU's free memory that activations may take; the rest is for the cache of keys and values, and solves."""


def token_budget(base: LanguageModel) -> int:
    """Tokens whose forward and backward pass through the model fits into memory, padding included.

    On a GPU from its free memory and what a token's activations take, with the logits of a token in four. Elsewhere
    `CPU_TOKENS`. Where blocks are spread over several, the fullest is taken to run them all. Several processes take
    together so many times what the fullest of them does.
    """
    tokens = CPU_TOKENS
    if base.device.type == "cuda":
        free = min(free_memory(device) for device in {device_of(block) for block in base.layers})
        tokens = max(1, int(SHARE * free / activations(base, base.num_layers, 0.25)))
    everyone = gathered(tokens)
    return len(everyone) * min(everyone)


def activations(base: LanguageModel, tokens: float, logits: float) -> float:
    """Bytes that a forward and backward pass keeps, about: 16 vectors of the model's width and 4 of the key's a token.

    Args:
        base: The model.
        tokens: Tokens, summed over the layers that they go through.
        logits: Tokens whose logits are taken, each four times in float32.
    """
    weight, vocabulary = base.weight(Site(0, "mlp")), int(base.model.config.get_text_config().vocab_size)
    width, keys = weight.shape
    return tokens * (16 * width + 4 * keys) * weight.element_size() + logits * 4 * 4 * vocabulary


def free_for_one(device: torch.device) -> int:
    """Bytes that are free for this process: of main memory an equal part, since a machine's processes share it."""
    free = free_memory(device)
    return free // on_this_machine() if device.type == "cpu" else free


def room(needs: Mapping[torch.device, tuple[int, int]]) -> int:
    """For how many edits there is room, by what they need (`needed`); where none needs any, for all."""
    left = {device: free_for_one(device) - fixed for device, (fixed, _) in needs.items()}
    return min((max(0, left[device] // each) for device, (_, each) in needs.items() if each), default=sys.maxsize)


def fitting(n: int, needs: Callable[[int], Mapping[torch.device, tuple[int, int]]], each: int) -> int:
    """How many of n edits are made together: n, halved until there is room.

    Args:
        n: How many there are to be.
        needs: What a number of them needs (`needed`).
        each: Bytes that an edit takes beside that, on every device.
    """
    while n > 1 and room({device: (fixed, more + each) for device, (fixed, more) in needs(n).items()}) < n:
        n //= 2
    return n


def require(
    base: LanguageModel,
    sites: Sequence[Site],
    n: int,
    kept: int = 0,
    moments: Mapping[Site, KeyStatistics] = MappingProxyType({}),
) -> None:
    """Refuse, before anything is done, more edits than memory holds keys and values for.

    Args:
        base: The base model.
        sites: Where its weights are edited.
        n: Edits of a batch.
        kept: Matrices of k × k in float64 that are yet to be made and then stay in main memory, for each site.
        moments: Second moments, whose Cholesky factors may be made and then stay.

    Raises:
        KeditError: It takes more than is free; the message says for how many edits there is room.
    """
    for device, (fixed, each) in needed(base, sites, n, kept, moments).items():
        free = free_for_one(device)
        if fixed + n * each <= free:
            continue
        room = max(0, (free - fixed) // each)
        where = "" if device.type == "cpu" else f" on {device}"
        msg = (
            f"{n:,} edits together need about {(fixed + n * each) / 2**30:.1f} GiB for their keys and values and the "
            f"solve, {free / 2**30:.1f} GiB are free{where}: set data.batch_size to at most {room:,}"
        )
        raise KeditError(msg if room else msg.rpartition(":")[0] + ": a machine with more memory is needed")


def needed(
    base: LanguageModel,
    sites: Sequence[Site],
    n: int,
    kept: int = 0,
    moments: Mapping[Site, KeyStatistics] = MappingProxyType({}),
) -> dict[torch.device, tuple[int, int]]:
    """What `require` asks for: bytes that do not grow with the edits, and bytes an edit, on each device.

    A layer is written with three k × k matrices and, an edit, three keys and four values, all in float64 in main
    memory. On a GPU are the keys of all sites and three values an edit in float32, as they are read. The factor of C
    (8 k² bytes) of a site whose batches are solved by it stays on the GPU while there is room, else in main memory.
    """
    shapes = {site: tuple(base.weight(site).shape) for site in sites}
    fixed = max(8 * 3 * k * k for _, k in shapes.values()) + sum(8 * kept * k * k for _, k in shapes.values())
    there, room = 0, free_memory(base.device) if base.device.type == "cuda" else 0
    for site, (d, k) in shapes.items():
        if site in moments and moments[site].factor_is_due and woodbury_is_cheaper(n, d, k):
            if room - there > ROOMY * 8 * k * k:
                there += 8 * k * k
            else:
                fixed += 8 * k * k
    found = {torch.device("cpu"): (fixed, max(8 * (3 * k + 4 * d) for d, k in shapes.values()))}
    if base.device.type == "cuda":
        keys, values = sum(k for _, k in shapes.values()), max(d for d, _ in shapes.values())
        found[base.device] = there, 4 * (keys + 3 * values)
    return found
