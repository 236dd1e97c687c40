from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from kedit_lightning import solvers
from kedit_lightning.solvers import constrained, double


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def second_moment(k: int, seed: int = 1) -> Tensor:
    keys = rand(4 * k, k, seed=seed)
    return keys.T @ keys / len(keys)


def test_the_constraint_holds_exactly() -> None:
    weight, key, value = rand(5, 7), rand(7, seed=2), rand(5, seed=3)
    left, right = constrained(value - weight @ key, rand(7, seed=4), key)
    assert (left.shape, right.shape) == ((5, 1), (7, 1))
    torch.testing.assert_close((weight + left @ right.T) @ key, value, atol=1e-12, rtol=1e-12)


def test_of_all_updates_that_do_it_this_one_moves_the_other_keys_least() -> None:
    """Against brute force: minimise ‖Δ C^½‖² subject to Δ k = r, as one least-norm problem over all entries of Δ."""
    d, k = 3, 6
    c, key, residual = second_moment(k), rand(k, seed=2), rand(d, seed=3)
    left, right = constrained(residual, torch.linalg.solve(c, key), key)
    root = torch.linalg.cholesky(c)
    # With X = Δ root the norm is plain and Δ k = X root⁻¹ k; lstsq gives the solution of least norm.
    moved = torch.linalg.solve_triangular(root, key[:, None], upper=False)[:, 0]
    system = torch.kron(torch.eye(d, dtype=torch.float64), moved[None])
    x = torch.linalg.lstsq(system, residual[:, None], driver="gelsd").solution.reshape(d, k)
    brute = torch.linalg.solve_triangular(root, x, upper=False, left=False)
    torch.testing.assert_close(left @ right.T, brute, atol=1e-10, rtol=1e-10)


def test_nearby_updates_that_keep_the_constraint_move_more() -> None:
    c, key, residual = second_moment(6), rand(6, seed=2), rand(3, seed=3)
    left, right = constrained(residual, torch.linalg.solve(c, key), key)
    least = left @ right.T

    def cost(update: Tensor) -> float:
        return float(torch.trace(update @ c @ update.T))

    for seed in range(5):
        other = rand(3, 6, seed=10 + seed)
        other -= torch.outer(other @ key, key) / (key @ key)
        assert cost(least + 0.1 * other) > cost(least)


def test_the_length_of_the_direction_does_not_matter() -> None:
    key, direction, residual = rand(6), rand(6, seed=1), rand(3, seed=2)
    one, other = constrained(residual, direction, key), constrained(residual, 1e-9 * direction, key)
    torch.testing.assert_close(one[0] @ one[1].T, other[0] @ other[1].T)


def test_half_precision_in_float64_out() -> None:
    key, direction, residual = rand(6).half(), rand(6, seed=1).bfloat16(), rand(3, seed=2).float()
    left, right = constrained(residual, direction, key)
    assert left.dtype == right.dtype == torch.float64
    torch.testing.assert_close((left @ right.T) @ key.double(), residual.double(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("key", [torch.zeros(4), torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.full((4,), torch.nan)])
@pytest.mark.parametrize("angle", [0.0, 0.7])
def test_a_key_that_the_direction_cannot_reach(key: Tensor, angle: float) -> None:
    """Orthogonal also where rounding leaves a little, after both were turned by an angle."""
    a, b = torch.tensor(angle, dtype=torch.float64).cos(), torch.tensor(angle, dtype=torch.float64).sin()
    turn = torch.eye(4, dtype=torch.float64)
    turn[0, 0], turn[0, 2], turn[2, 0], turn[2, 2] = a, -b, b, a
    direction = turn @ torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"expected a key with a part along|expected finite"):
        constrained(torch.ones(2), direction, turn @ key.double())


class _Apple(Tensor):
    """A tensor on a device that has no float64."""

    device = property(lambda _: torch.device("mps"))  # type: ignore[assignment]

    def double(self) -> Tensor:
        msg = "Cannot convert a MPS Tensor to float64"
        raise TypeError(msg)

    def cpu(self) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor)


def test_a_device_without_float64() -> None:
    values = [rand(n, seed=n).float() for n in (5, 7, 7)]
    expected = constrained(*values)
    for found, one in zip(constrained(*(value.as_subclass(_Apple) for value in values)), expected, strict=True):
        assert type(found) is Tensor
        assert torch.equal(found, one)
    assert double(values[0]).dtype == torch.float64


# ---------------------------------------------------------------------- batches


SIZES = [(1, 6, 24), (5, 6, 24), (12, 6, 24), (24, 6, 24), (40, 6, 24), (5, 24, 24), (30, 40, 24)]


def conditioned(k: int, number: float) -> Tensor:
    """A second moment with eigenvalues from 1 down to 1/number."""
    vectors, _ = torch.linalg.qr(rand(k, k, seed=5))
    moment = vectors * torch.logspace(0, -math.log10(number), k, dtype=torch.float64) @ vectors.T
    return (moment + moment.T) / 2


def plain(residual: Tensor, keys: Tensor, moment: Tensor, weight: float) -> Tensor:
    """Δ as the papers write it, with an explicit inverse."""
    return residual.T @ keys @ torch.linalg.inv(weight * moment + keys.T @ keys)


def by_woodbury(residual: Tensor, keys: Tensor, moment: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    whitened = solvers.cholesky_solve(keys.T, solvers.cholesky(moment)).T
    return solvers.woodbury(residual, keys, whitened, weight)


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def unsolved(update: Tensor, residual: Tensor, keys: Tensor, moment: Tensor, weight: float) -> float:
    """Residual of the normal equations, ``Δ (λ C + K Kᵀ) = R Kᵀ``."""
    return apart(update @ (weight * moment + keys.T @ keys), residual.T @ keys)


@pytest.mark.parametrize("solve", [solvers.least_squares, by_woodbury])
@pytest.mark.parametrize("weight", [0.1, 15_000.0])
@pytest.mark.parametrize(("n", "d", "k"), SIZES)
def test_batches_equal_the_explicit_inverse(n: int, d: int, k: int, weight: float, solve: Any) -> None:
    residual, keys, moment = rand(n, d), rand(n, k, seed=2), second_moment(k)
    left, right = solve(residual, keys, moment, weight)
    assert left.shape[0] == d
    assert right.shape[0] == k
    assert left.shape[1] == right.shape[1] == (n if solve is by_woodbury else min(n, d))
    assert apart(left @ right.T, plain(residual, keys, moment, weight)) < 1e-10


@pytest.mark.parametrize("n", [1, 7, 30, 90])
@pytest.mark.parametrize("number", [1e2, 1e4, 1e5])
def test_both_forms_agree_to_1e_8_up_to_a_condition_of_1e5(number: float, n: int) -> None:
    k = 60
    moment = conditioned(k, number)
    keys = rand(n, k, seed=2) @ torch.linalg.cholesky(moment).T  # as the text's own keys are
    residual = rand(n, 8)
    direct, few = (f(residual, keys, moment, 20.0) for f in (solvers.least_squares, by_woodbury))
    expected = plain(residual, keys, moment, 20.0)
    assert apart(direct[0] @ direct[1].T, expected) < 1e-8
    assert apart(few[0] @ few[1].T, expected) < 1e-8


@pytest.mark.parametrize("number", [1e6, 1e8, 1e10, 1e12])
@pytest.mark.parametrize("weight", [1e-2, 1.0, 1e4])
def test_ill_conditioned_batches_solve_their_normal_equations(number: float, weight: float) -> None:
    k, n = 60, 20
    moment = conditioned(k, number)
    keys, residual = rand(n, k, seed=2), rand(n, 8)
    for solve, digits in ((solvers.least_squares, 1e-11), (by_woodbury, 1e-9 if number <= 1e8 else 1e-4)):
        left, right = solve(residual, keys, moment, weight)
        assert unsolved(left @ right.T, residual, keys, moment, weight) < digits


def test_the_push_through_form_is_as_exact_as_a_condition_allows() -> None:
    """Against 50 digits: below ε times the condition; the textbook's difference of matrices keeps 2 digits at 1e12."""
    k, n = 24, 5
    keys, residual = rand(n, k, seed=2), rand(n, 1)
    for number in (1e4, 1e8, 1e12):
        moment = conditioned(k, number)
        with mpmath.workdps(50):
            wide = mpmath.matrix(keys.T.tolist())
            system = mpmath.matrix(moment.tolist()) + wide * wide.T
            exact = mpmath.lu_solve(system, wide * mpmath.matrix(residual.tolist()))
        left, right = by_woodbury(residual, keys, moment, 1.0)
        assert apart(left @ right.T, torch.tensor([[float(x) for x in exact]], dtype=torch.float64)) < 2e-16 * number


@pytest.mark.parametrize("solve", [solvers.least_squares, by_woodbury])
def test_one_edit_without_weight_is_the_constrained_one(solve: Any) -> None:
    weight, key, value, moment = rand(5, 7), rand(7, seed=2), rand(5, seed=3), second_moment(7)
    left, right = solve((value - weight @ key)[None], key[None], moment, 1e-11)
    torch.testing.assert_close((weight + left @ right.T) @ key, value, atol=1e-8, rtol=1e-8)
    rome = constrained(value - weight @ key, torch.linalg.solve(moment, key), key)
    if solve is by_woodbury:  # the k × k system has a condition of 1e11 here
        assert apart(left @ right.T, rome[0] @ rome[1].T) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [3, 20])
def test_batches_in_half_precision(dtype: torch.dtype, n: int) -> None:
    residual, keys, moment = rand(n, 8).to(dtype), rand(n, 12, seed=2).to(dtype), second_moment(12).float()
    expected = plain(residual.double(), keys.double(), moment.double(), 2.0)
    basis = torch.eye(12)[:, :7]
    for left, right in (
        solvers.least_squares(residual, keys, moment, 2.0),
        by_woodbury(residual, keys.double(), moment.double(), 2.0),
        solvers.null_space_projected(residual, keys, basis, moment, 2.0),
    ):
        assert left.dtype == right.dtype == torch.float64
        if right[7:].any():
            assert apart(left @ right.T, expected) < 1e-10


def test_inputs_are_left_as_they_were_and_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    residual, keys, moment, memory = rand(20, 4), rand(20, 9, seed=2), second_moment(9), second_moment(9, seed=7)
    before = [tensor.clone() for tensor in (residual, keys, moment, memory)]
    whole = solvers.least_squares(residual, keys, moment, 2.0, ridge=0.1)
    solvers.null_space_projected(residual, keys, torch.eye(9).double(), memory, 1.0)
    monkeypatch.setattr(solvers, "BLOCK", 7)
    for found, expected in zip(solvers.least_squares(residual, keys, moment, 2.0, ridge=0.1), whole, strict=True):
        torch.testing.assert_close(found, expected)
    assert all(map(torch.equal, before, (residual, keys, moment, memory)))
    ridged = moment + 0.1 * moment.diagonal().mean() * torch.eye(9).double()
    assert apart(whole[0] @ whole[1].T, plain(residual, keys, ridged, 2.0)) < 1e-12


def test_the_cheaper_form() -> None:
    assert solvers.woodbury_is_cheaper(1, 1600, 6400)
    assert solvers.woodbury_is_cheaper(1600, 1600, 6400)
    assert not solvers.woodbury_is_cheaper(6000, 1600, 6400)
    assert not solvers.woodbury_is_cheaper(10, 4, 10)


@pytest.mark.parametrize("missing", [1, 4])
@pytest.mark.parametrize("k", [20, 60, 200])
def test_a_singular_system_is_refused_whichever_way_it_rounds(k: int, missing: int) -> None:
    for seed in range(5):
        keys = rand(k - missing - 1, k, seed=seed)
        with pytest.raises(solvers.SingularError, match=f"expected a positive definite {k} × {k} system"):
            solvers.least_squares(rand(1, 3), rand(1, k, seed=99), keys.T @ keys, 1.0)


def test_what_a_batch_cannot_be() -> None:
    good = rand(3, 2), rand(3, 5), second_moment(5)
    nan = torch.full((3, 5), torch.nan)
    for solve in (solvers.least_squares, lambda r, k, _, w: solvers.woodbury(r, k, k, w)):
        for weight in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match=f"expected a weight of the second moment above 0, got {weight}"):
                solve(*good, weight)
        with pytest.raises(ValueError, match=r"a line an edit, got \(3, 2\) and \(4, 5\)"):
            solve(good[0], rand(4, 5), good[2], 1.0)
        with pytest.raises(ValueError, match="expected finite keys, got NaN or infinity"):
            solve(good[0], nan, good[2], 1.0)
    with pytest.raises(ValueError, match=r"expected the second moment of shape \(5, 5\) .* got \(6, 6\)"):
        solvers.least_squares(*good[:2], second_moment(6), 1.0)
    same = torch.ones(2, 5)
    with pytest.raises(solvers.SingularError, match="2 × 2"):
        solvers.woodbury(rand(2, 3), same, same, 1e-20)


# ---------------------------------------------------------------------- null spaces


@pytest.mark.parametrize("n", [1, 4, 9, 30])
@pytest.mark.parametrize("remembered", [False, True])
def test_null_space_equals_the_unreduced_formula(n: int, remembered: bool) -> None:
    k, d, r, l2 = 12, 5, 8, 10.0
    basis, _ = torch.linalg.qr(rand(k, r, seed=4))
    residual, keys = rand(n, d), rand(n, k, seed=2)
    memory = second_moment(k) if remembered else None
    projection, one = basis @ basis.T, torch.eye(k, dtype=torch.float64)
    total = keys.T @ keys + (0 if memory is None else memory)
    as_released = torch.linalg.solve(projection @ total + l2 * one, projection @ keys.T @ residual).T
    as_written = residual.T @ keys @ projection @ torch.linalg.inv(total @ projection + l2 * one)
    left, right = solvers.null_space_projected(residual, keys, basis, memory, l2)
    update = left @ right.T
    assert apart(update, as_released) < 1e-11
    assert apart(update, as_written) < 1e-11
    protected = (one - projection) @ rand(k, seed=6)
    assert (update @ protected).norm() < 1e-6 * update.norm() * protected.norm()
    assert (update @ protected).norm() < 1e-14 * update.norm() * protected.norm()
    assert (update @ keys[0]).norm() > 1e-3 * update.norm() * keys[0].norm()


def test_null_space_refusals() -> None:
    residual, keys, basis = rand(2, 3), rand(2, 6), torch.eye(6).double()[:, :4]
    with pytest.raises(ValueError, match="expected L2 of at least 0, got -1"):
        solvers.null_space_projected(residual, keys, basis, None, -1.0)
    with pytest.raises(solvers.SingularError, match="4 × 4"):
        solvers.null_space_projected(residual, keys, basis, None, 0.0)
    with pytest.raises(ValueError, match=r"expected a basis of shape \(6, r\), got \(4, 6\)"):
        solvers.null_space_projected(residual, keys, basis.T, None, 1.0)
    with pytest.raises(ValueError, match=r"expected the memory of earlier edits of shape \(6, 6\)"):
        solvers.null_space_projected(residual, keys, basis, second_moment(4), 1.0)
    regular = solvers.null_space_projected(residual, keys, basis, second_moment(6), 0.0)
    assert regular[1].isfinite().all()


# ---------------------------------------------------------------------- memory


MEASURED = """
import re, resource, torch
from kedit_lightning import solvers
k, d, n = 4096, 64, 2048
moment = torch.eye(k, dtype=torch.float64)
residual, keys = torch.randn(n, d), torch.randn(n, k)
solvers.least_squares(residual[:, :9], keys[:, :9], moment[:9, :9], 1.0)  # libraries load
with open("/proc/self/statm") as file:
    before = int(file.read().split()[1]) * resource.getpagesize()
def report():
    with open("/proc/self/status") as file:  # ru_maxrss would begin with that of the process that started this one
        peak = 1024 * int(re.search("VmHWM:\\s+(\\d+)", file.read())[1])
    print((peak - before) / (8 * k * k))
solvers.least_squares(residual, keys, moment, 1.0)
report()
wasted = moment.clone()
solvers.least_squares(residual[:1], keys[:1], moment, 1.0)
report()
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own account of memory")
def test_memory_of_a_large_batch() -> None:
    """Three k × k matrices with the given C, so two beside it and a block of keys; one more than needed is seen."""
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    matrices, wasteful = map(float, done.stdout.split())
    assert 1.5 < matrices < 2.55
    assert wasteful > 2.9
