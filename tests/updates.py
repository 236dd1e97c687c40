"""Weight updates, run directories and a full disk for the tests of delta, run, export and commands."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kedit_lightning.delta import WeightDelta
from kedit_lightning.edits import Site
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.fingerprint import fingerprint
from kedit_lightning.run import RunDirectory

SITES = [Site(layer, "mlp") for layer in range(4)]


def low_rank(base: LanguageModel, layer: int, seed: int = 0, rank: int = 1) -> WeightDelta:
    """A random update, its left factor a hundred times as long as its right one."""
    generator = torch.Generator().manual_seed(seed)
    name = base.name(Site(layer, "mlp"))
    out, inner = base.weight(name).shape
    left = 1.0 * torch.randn(out, rank, generator=generator)
    return WeightDelta.low_rank(name, left, 0.01 * torch.randn(inner, rank, generator=generator))


def dense(base: LanguageModel, layer: int, seed: int = 0) -> WeightDelta:
    """A random dense update."""
    name = base.name(Site(layer, "mlp"))
    generator = torch.Generator().manual_seed(seed)
    return WeightDelta(name, dense=0.01 * torch.randn(base.weight(name).shape, generator=generator))


def metadata(base: LanguageModel, **more: Any) -> dict[str, Any]:
    names = [base.name(site) for site in SITES]
    return {
        "editor": "ROME",
        "base": str(base.model.config._name_or_path),
        "fingerprint": {"names": names, "value": fingerprint(base, names)},
        "case_ids": [0],
        "group": 0,
        "number": 0,
    } | more


def write_run(
    path: Path, base: LanguageModel, commits: Sequence[tuple[Sequence[int], int, Sequence[WeightDelta]]]
) -> RunDirectory:
    """A run directory of commits, each its case ids, its group and its updates."""
    run = RunDirectory(path)
    for number, (cases, group, deltas) in enumerate(commits):
        about = metadata(base, case_ids=list(cases), group=group, number=number)
        run.commit([(number, deltas, about, {})], [{"case_id": case, "commit": number} for case in cases])
    return run


def bits(base: LanguageModel) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {name: parameter.detach().clone() for name, parameter in base.model.named_parameters()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def logits(model: Any, base: LanguageModel) -> Tensor:
    """Logits of any model on a text, in float32."""
    ids = base.tokenizer("The mother tongue of Oskel Tamrin is High Kestrian", return_tensors="pt")["input_ids"]
    result: Tensor = model(input_ids=ids).logits.float()
    return result


@contextmanager
def disk_full(after: int = 1000) -> Iterator[None]:
    """No file can grow beyond so many bytes: the operating system refuses, as it does where a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
