"""Drift of edited matrices against plain definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kedit_lightning.metrics import drift
from kedit_lightning.metrics.drift import WeightDrift, spectral_norm, weight_drift


def pair(out: int = 24, inner: int = 40, seed: int = 0, size: float = 0.3) -> tuple[Tensor, Tensor]:
    """A matrix before, and after an edit of rank one."""
    rng = torch.Generator().manual_seed(seed)
    before = torch.randn(out, inner, generator=rng)
    return before, before + size * torch.outer(torch.randn(out, generator=rng), torch.randn(inner, generator=rng))


def by_numpy(before: Tensor, after: Tensor) -> dict[str, float]:
    """The definitions, in float64."""
    w0, w = before.double().numpy(), after.double().numpy()
    return {
        "l1": np.abs(w).sum() / np.abs(w0).sum() - 1,
        "l1_change": np.abs(w - w0).sum() / np.abs(w0).sum(),
        "frobenius": np.linalg.norm(w - w0) / np.linalg.norm(w0),
        "spectral": np.linalg.svd(w - w0, compute_uv=False)[0] / np.linalg.svd(w0, compute_uv=False)[0],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (1, 7)])
def test_definitions(shape: tuple[int, int], dtype: torch.dtype) -> None:
    before, after = (matrix.to(dtype) for matrix in pair(*shape))
    assert weight_drift(before, after) == pytest.approx(by_numpy(before, after), rel=1e-5)


def test_a_shrunk_matrix_has_drifted_although_its_norm_is_smaller() -> None:
    before, _ = pair()
    found = weight_drift(before, before / 2)
    assert found["l1"] == pytest.approx(-0.5)
    assert [found[name] for name in ("l1_change", "frobenius", "spectral")] == pytest.approx([0.5] * 3)


def test_no_edit_is_no_drift() -> None:
    before, _ = pair()
    assert weight_drift(before, before.clone()) == dict.fromkeys(drift.MEASURES, 0.0)


def test_a_bias_has_a_drift_too() -> None:
    assert weight_drift(torch.ones(4), 3 * torch.ones(4))["spectral"] == pytest.approx(2.0)


def test_relative_to_a_bias_of_zeros_nothing_has_drifted_but_together_it_counts() -> None:
    zeros, ones = torch.zeros(4), torch.ones(4)
    assert weight_drift(zeros, ones) == weight_drift(zeros, zeros) == dict.fromkeys(drift.MEASURES, 0.0)
    assert all(math.isnan(value) for value in weight_drift(zeros, ones * math.inf).values())
    together = WeightDrift()
    together.update(zeros, ones)
    together.update(ones, ones)
    found = {name: float(value) for name, value in together.compute().items()}
    assert found == {"l1": 1.0, "l1_change": 1.0, "frobenius": 1.0, "spectral": 0.0}


def spectrum(values: Tensor, out: int, inner: int) -> Tensor:
    """A matrix of these singular values."""
    rng = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(n, len(values), generator=rng)).Q for n in (out, inner))
    return left @ torch.diag(values) @ right.T


@pytest.mark.parametrize("shape", [(80, 120), (120, 80)])
@pytest.mark.parametrize(
    "values",
    [
        pytest.param(torch.tensor([3.0]), id="rank one"),
        pytest.param(torch.tensor([5.0, 4.999, 4.99, 1.0]), id="nearly equal"),
        pytest.param(torch.linspace(1.0, 2.0, 60), id="flat"),
        pytest.param(1e20 * torch.linspace(0.1, 1.0, 20), id="huge"),
        pytest.param(1e-20 * torch.linspace(0.1, 1.0, 20), id="tiny"),
    ],
)
def test_the_iteration_for_large_matrices_against_svd(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], values: Tensor
) -> None:
    matrix = spectrum(values, *shape)
    exact = spectral_norm(matrix)
    assert exact == pytest.approx(float(values.max()), rel=1e-4)
    monkeypatch.setattr(drift, "EXACT", 0)
    assert spectral_norm(matrix) == pytest.approx(exact, rel=1e-3)
    assert spectral_norm(matrix) == spectral_norm(matrix), "the same start every time"


def test_a_random_large_matrix_takes_the_iteration() -> None:
    matrix = torch.randn(drift.EXACT + 8, drift.EXACT + 90, generator=torch.Generator().manual_seed(2))
    exact = float(torch.linalg.svdvals(matrix)[0])
    found = spectral_norm(matrix)
    assert found != exact
    assert found == pytest.approx(exact, rel=2e-3)


def test_zero_and_what_is_not_finite() -> None:
    assert spectral_norm(torch.zeros(3, 4)) == 0.0
    before, after = pair()
    after[1, 2] = math.nan
    assert all(math.isnan(value) for value in weight_drift(before, after).values())


def test_zero_by_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "EXACT", 0)
    assert spectral_norm(torch.zeros(30, 40)) == 0.0


def test_the_metric_is_of_each_matrix_and_of_all_together() -> None:
    pairs = [pair(seed=0, size=0.1), pair(12, 30, seed=1, size=0.6), pair(seed=2, size=0.0)]
    metric = WeightDrift()
    for before, after in pairs:
        assert {name: float(value) for name, value in metric(before, after).items()} == weight_drift(before, after)
    befores, afters = (torch.cat([matrix.flatten() for matrix in side])[None] for side in zip(*pairs, strict=True))
    together = by_numpy(befores, afters)
    together["spectral"] = max(by_numpy(before, after)["spectral"] for before, after in pairs)
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(together, rel=1e-5)


def test_processes_that_hold_different_layers_add_up() -> None:
    """As torchmetrics joins them: sums are added, the spectral norm is the largest."""
    pairs = [pair(seed=seed, size=0.2 * seed) for seed in range(4)]
    whole, parts = WeightDrift(), [WeightDrift(), WeightDrift()]
    for i, (before, after) in enumerate(pairs):
        whole.update(before, after)
        parts[i % 2].update(before, after)
    for name, reduce in whole._reductions.items():
        joined = reduce(torch.stack([getattr(part, name) for part in parts]))  # type: ignore[operator,misc]
        torch.testing.assert_close(joined, getattr(whole, name))
