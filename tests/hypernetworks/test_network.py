"""Hypernetworks as pure modules: finite differences, closed forms by hand, chunks of any size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kedit_lightning import solvers
from kedit_lightning.errors import KeditError
from kedit_lightning.hypernetworks.malmen import MALMENNetwork, ridge_gradients, ridge_update
from kedit_lightning.hypernetworks.mend import MENDNetwork
from kedit_lightning.hypernetworks.network import Factors, Hypernetwork, RunningNorm

D, K = 5, 4
SHAPES = {"low": (D, K), "high": (D, K), "up": (K, D)}
KINDS = [MENDNetwork, MALMENNetwork]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(name: str, n: int, seed: int = 0) -> Factors:
    d, k = SHAPES[name]
    return Factors(random(n, k, seed=seed), 0.1 * random(n, d, seed=seed + 100))


def trained(kind: type[Hypernetwork]) -> Hypernetwork:
    """A hypernetwork in float64 with no parameter where it began."""
    torch.manual_seed(0)
    network = kind(SHAPES, rank=3, n_blocks=2, edit_lr=0.02).double()
    with torch.no_grad():
        for i, (_, parameter) in enumerate(sorted(network.named_parameters())):
            parameter += 0.3 * parameter.abs().clamp(min=0.02) * random(*parameter.shape, seed=i)
            if parameter.ndim == 2 and parameter.shape[1] == 3:  # U
                parameter += 0.2 * random(*parameter.shape, seed=50 + i)
    for name in SHAPES:
        network.observe(name, factors(name, 40, seed=7))
    return network


def objective(network: Hypernetwork, given: dict[str, Factors], gradients: dict[str, Tensor]) -> float:
    """A loss that is linear in every Δ."""
    total = 0.0
    for name, each in given.items():
        left, right = network.update(name, each)
        total += float((gradients[name] * (left @ right.T)).sum())
    return total


@pytest.mark.parametrize("n", [1, 3, 9], ids=["one token", "fewer than keys", "more than keys"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: type[Hypernetwork], n: int) -> None:
    network = trained(kind)
    given = {name: factors(name, n, seed=i) for i, name in enumerate(SHAPES)}
    gradients = {name: random(*shape, seed=20 + i) for i, (name, shape) in enumerate(SHAPES.items())}
    for name, each in given.items():
        network.backward(name, each, gradients[name])
    step = 1e-6
    moved = 0
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        flat, grad = parameter.data.view(-1), parameter.grad.view(-1)
        for i in range(0, len(flat), max(1, len(flat) // 4)):
            before = float(flat[i])
            values = []
            for sign in (1, -1):
                flat[i] = before + sign * step
                values.append(objective(network, given, gradients))
            flat[i] = before
            wanted = (values[0] - values[1]) / (2 * step)
            assert float(grad[i]) == pytest.approx(wanted, rel=1e-5, abs=1e-8), (name, i)
            moved += abs(wanted) > 1e-6
    assert moved > 20, "most parameters matter"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [3, 9, 33])
@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_chunks_does_not_matter(
    kind: type[Hypernetwork], n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates to 1e-6; gradients, which float32 sums lose more digits of, to 1e-5 there and to 1e-12 in float64."""
    found = []
    for size in (1, 4, 1024):
        monkeypatch.setattr(Hypernetwork, "chunk", size)
        monkeypatch.setattr(solvers, "BLOCK", size)
        network, each = trained(kind).to(dtype), Factors(*(part.to(dtype) for part in factors("low", n)))
        network.backward("low", each, random(D, K, seed=3))
        left, right = network.update("low", each)
        grads = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
        found.append((left @ right.T, torch.cat(grads).double()))
    for update, gradient in found[1:]:
        assert float((update - found[0][0]).norm() / found[0][0].norm()) < 1e-6
        off = float((gradient - found[0][1]).norm() / found[0][1].norm())
        assert off < (1e-5 if dtype == torch.float32 else 1e-12)


def test_mend_is_a_sum_of_rank_one_pseudo_gradients() -> None:
    network, each = trained(MENDNetwork), factors("low", 3)
    keys, grads = network.pseudo("low", each)
    wanted = sum(network.step("low") * torch.outer(g, k) for g, k in zip(grads, keys, strict=True))
    left, right = network.update("low", each)
    assert torch.allclose(left @ right.T, wanted)
    many = factors("low", 12)
    (left, right), (keys, grads) = network.update("low", many), network.pseudo("low", many)
    assert left.shape == (D, D), "of more tokens than d no more than d columns"
    assert torch.allclose(left @ right.T, network.step("low") * grads.T @ keys)


def test_one_key_is_the_rank_one_closed_form() -> None:
    """As ROME's with C = I where the ridge vanishes; with it the change is shortened by ‖k‖² / (‖k‖² + ρ)."""
    network, each = trained(MALMENNetwork), factors("low", 1)
    keys, grads = network.pseudo("low", each)
    wanted = -network.step("low") * (each.keys[0] @ keys[0]) * grads[0]
    key, ridge = each.keys[0], network.ridge("low")
    left, right = network.update("low", each)
    assert torch.allclose(left @ right.T, torch.outer(wanted, key) / (key @ key + ridge))
    network.log_ridge.data.fill_(-60.0)
    left, right = network.update("low", each)
    one, other = solvers.constrained(wanted.detach(), key, key)
    assert torch.allclose(left @ right.T, one @ other.T, rtol=1e-10)


@pytest.mark.parametrize("n", [3, 9])
def test_the_ridge_by_hand(n: int) -> None:
    keys, values, gradient, ridge = random(n, K), random(n, D, seed=1), random(D, K, seed=2), 0.3
    wanted = values.T @ keys @ torch.linalg.inv(keys.T @ keys + ridge * torch.eye(K))
    left, right = ridge_update(values, keys, ridge)
    assert torch.allclose(left @ right.T, wanted)
    values.requires_grad_()
    rho = torch.tensor(ridge, dtype=torch.float64, requires_grad=True)
    update = values.T @ keys @ torch.linalg.inv(keys.T @ keys + rho * torch.eye(K))
    of_values, of_ridge = torch.autograd.grad((gradient * update).sum(), (values, rho))
    found, other = ridge_gradients(gradient, values.detach(), keys, ridge)
    assert torch.allclose(found, of_values)
    assert other == pytest.approx(float(of_ridge))


def test_float32_factors_are_solved_in_float64() -> None:
    """Keys that are nearly alike: in float32 the normal equation has lost the difference."""
    keys = torch.ones(3, K) + 1e-4 * random(3, K).float()
    values, ridge = random(3, D, seed=1).float(), 1e-8
    left, right = ridge_update(values, keys, ridge)
    exact = keys.double()
    wanted = torch.linalg.solve(exact @ exact.T + ridge * torch.eye(3), values.double()).T @ exact
    assert float((left @ right.T - wanted).norm() / wanted.norm()) < 1e-6


def test_the_normaliser_knows_mean_and_deviation_of_all_lines() -> None:
    norm, lines = RunningNorm(3).double(), 1e-6 * random(50, 3) + 2e-6
    for part in lines.split([1, 7, 42]):
        norm.update(part)
    wanted = (lines - lines.mean(dim=0)) / (lines.std(dim=0) + 1e-7)
    assert torch.allclose(norm(lines), wanted, rtol=1e-9)
    norm.update(lines[:0])
    assert int(norm.count) == 50


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_is_the_identity_at_first_and_can_be_left(kind: type[Hypernetwork]) -> None:
    network = kind(SHAPES, rank=3, n_blocks=2, edit_lr=0.02).double()
    each = factors("up", 20)
    network.observe("up", each)
    lines = torch.cat(each, dim=1)
    wanted = (lines - lines.mean(dim=0)) / (lines.std(dim=0) + 1e-7)
    assert torch.allclose(torch.cat(network.pseudo("up", each), dim=1), wanted)
    network.backward("up", each, random(K, D))
    blocks = network.networks[network.places["up"][0]].blocks
    assert all(float(block.up.grad.norm()) > 0 for block in blocks)


def test_networks_are_shared_by_shape() -> None:
    def count(**how: str) -> int:
        return len(MENDNetwork(SHAPES, 3, 2, 0.1, **how).networks)  # type: ignore[arg-type]

    assert (count(), count(networks="none")) == (2, 3)
    with pytest.raises(KeditError, match=r"networks: expected matrices of one shape .* got 4 × 5 and 5 × 4"):
        count(networks="all")
    alike = {name: (D, K) for name in ("a", "b")}
    assert len(MENDNetwork(alike, 3, 2, 0.1, networks="all").networks) == 1


@pytest.mark.parametrize(("rank", "n_blocks", "step"), [(0, 2, 0.1), (3, 0, 0.1), (3, 2, 0.0)])
def test_numbers_out_of_range_are_refused(rank: int, n_blocks: int, step: float) -> None:
    with pytest.raises(KeditError, match="rank and n_blocks of at least 1"):
        MALMENNetwork(SHAPES, rank, n_blocks, step)
