"""What is solved with second moments: the form that is chosen, what is refused, and what is said about it."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kedit_lightning import solvers
from kedit_lightning.errors import StatisticsError
from kedit_lightning.models import key_statistics
from kedit_lightning.models.key_statistics import Identity, KeyStatistics
from tests.test_solvers import apart, conditioned, plain, rand, second_moment, unsolved


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which solvers were called, in order; ``cholesky 24`` for a factor of that size."""
    seen: list[str] = []
    for name in ("least_squares", "woodbury"):
        solver = getattr(solvers, name)
        monkeypatch.setattr(solvers, name, lambda *a, s=solver, n=name, **k: (seen.append(n), s(*a, **k))[1])
    cholesky = solvers.cholesky
    monkeypatch.setattr(solvers, "cholesky", lambda m: (seen.append(f"cholesky {len(m)}"), cholesky(m))[1])
    return seen


def solved(statistics: KeyStatistics, residual: Tensor, keys: Tensor, weight: float) -> Tensor:
    left, right = statistics.least_squares(residual, keys, weight)
    return left @ right.T


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize(("n", "few"), [(1, True), (6, True), (24, False), (60, False)])
def test_a_batch_is_solved_in_the_cheaper_form(n: int, few: bool, ridge: float, calls: list[str]) -> None:
    k, d = 24, 8
    moment, residual, keys = second_moment(k), rand(n, d), rand(n, k, seed=2)
    statistics = KeyStatistics(moment, 4 * k, ridge)
    ridged = moment + ridge * moment.diagonal().mean() * torch.eye(k).double()
    assert apart(solved(statistics, residual, keys, 7.0), plain(residual, keys, ridged, 7.0)) < 1e-10
    assert calls == (["cholesky 24", "woodbury", f"cholesky {n}"] if few else ["least_squares", "cholesky 24"])
    calls.clear()
    solved(statistics, residual, keys, 3.0)
    assert calls == (["woodbury", f"cholesky {n}"] if few else ["least_squares", "cholesky 24"])  # C's factor is kept


@pytest.mark.parametrize("number", [1e2, 1e5, 1e7, 1e9, 1e12])
def test_the_form_follows_the_condition(number: float, calls: list[str], caplog: pytest.LogCaptureFixture) -> None:
    k, n, weight = 60, 4, 2.0
    moment, residual, keys = conditioned(k, number), rand(n, 8), rand(n, k, seed=2)
    statistics = KeyStatistics(moment, 10**6, name="h.3")
    with caplog.at_level(logging.INFO):
        update = solved(statistics, residual, keys, weight)
        solved(statistics, residual, keys, weight)
    form = "woodbury" if number <= key_statistics.WHITENS_WELL else "least_squares"
    assert [call for call in calls if not call.startswith("cholesky")] == [form, form]
    assert len(calls) == 5  # C was tried once, each batch has its own system
    if number <= 1e5:
        assert apart(update, plain(residual, keys, moment, weight)) < 1e-8
    assert unsolved(update, residual, keys, moment, weight) < 1e-9
    [said] = [record for record in caplog.records if "condition" in record.message]
    assert said.levelname == ("WARNING" if number > key_statistics.ILL_CONDITIONED else "INFO")


def test_a_singular_moment_is_solved_whole_if_the_batch_fills_it(calls: list[str]) -> None:
    k, weight = 24, 2.0
    tokens, residual, keys = rand(20, k), rand(5, 16), rand(5, k, seed=2)
    moment = tokens.T @ tokens / 20
    expected = plain(residual, keys, moment, weight)
    for count in (20, None):
        calls.clear()
        statistics = KeyStatistics(moment, count)
        assert apart(solved(statistics, residual, keys, weight), expected) < 1e-7
        solved(statistics, residual, keys, weight)
        assert calls.count("least_squares") == 2
        assert calls.count("cholesky 24") == (2 if count else 3)


@pytest.mark.parametrize("count", [20, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_system_is_one_line(count: int | None, dtype: torch.dtype) -> None:
    tokens = rand(20, 24)
    moment = (tokens.T @ tokens / 20).to(dtype)
    few = rand(2, 16), rand(2, 24, seed=2)
    if count or dtype == torch.float64:  # float32 alone leaves noise in place of zeros
        with pytest.raises(
            StatisticsError, match=r"h\.1 .*singular, also with the keys of 2 edits .*take more"
        ) as error:
            KeyStatistics(moment, count, name="h.1").least_squares(*few, 2.0)
        assert "\n" not in str(error.value)
    ridged = moment.double() + 1e-3 * moment.double().diagonal().mean() * torch.eye(24).double()
    found = solved(KeyStatistics(moment, count, 1e-3), *few, 2.0)
    assert apart(found, plain(*few, ridged, 2.0)) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    residual, keys, moment = rand(3, 8).to(dtype), rand(3, 24, seed=2).to(dtype), second_moment(24).float()
    expected = plain(residual.double(), keys.double(), moment.double(), 5.0)
    assert apart(solved(KeyStatistics(moment, 99), residual, keys, 5.0), expected) < 1e-8


@pytest.mark.parametrize("n", [1, 10, 24, 60])
def test_identity(n: int, calls: list[str]) -> None:
    k, d = 24, 8
    residual, keys = rand(n, d), rand(n, k, seed=2)
    expected = plain(residual, keys, torch.eye(k).double(), 3.0)
    assert apart(solved(Identity(k), residual, keys, 3.0), expected) < 1e-12
    assert calls == (["woodbury", f"cholesky {n}"] if n <= 10 else ["least_squares", "cholesky 24"])


@pytest.mark.parametrize("use", ["solve", "least_squares", "null_space"])
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (torch.tensor([[1.0, math.nan], [math.nan, 1.0]]), "entries that are not finite"),
        (torch.tensor([[1.0, math.inf], [math.inf, 1.0]]), "entries that are not finite"),
        (torch.tensor([[1.0, 0.1], [0.2, 1.0]]), "expected a symmetric matrix, got entries that differ"),
        (torch.ones(2, 3), r"expected a square matrix, got shape \(2, 3\)"),
    ],
    ids=["nan", "inf", "asymmetric", "oblong"],
)
def test_what_is_no_second_moment(entries: Tensor, message: str, use: str) -> None:
    statistics = KeyStatistics(entries, name="h.1")
    arguments: dict[str, Any] = {
        "solve": (torch.ones(2),),
        "least_squares": (torch.ones(1, 2), torch.ones(1, 2), 1.0),
        "null_space": (0.1,),
    }
    with pytest.raises(StatisticsError, match=rf"the second moment of h\.1.*{message}"):
        getattr(statistics, use)(*arguments[use])


def test_rounding_is_no_asymmetry() -> None:
    moment = second_moment(6).float()
    moment[0, 1] += 1e-5
    KeyStatistics(moment, 99).solve(torch.ones(6))


@pytest.mark.parametrize("statistics", [KeyStatistics(torch.eye(6), name="h.1"), Identity(6, "h.1")])
def test_keys_of_another_width(statistics: KeyStatistics) -> None:
    with pytest.raises(StatisticsError, match=r"h\.1 is of another width: expected 5, that of the keys, got 6"):
        statistics.least_squares(torch.ones(1, 2), torch.ones(1, 5), 1.0)


def test_a_weight_that_is_none() -> None:
    with pytest.raises(ValueError, match="weight of the second moment above 0, got 0"):
        KeyStatistics(torch.eye(6)).least_squares(torch.ones(1, 2), torch.ones(1, 6), 0.0)


# ---------------------------------------------------------------------- null spaces


def test_the_null_space_is_what_lies_below(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    moment = conditioned(20, 1e4)
    values, vectors = torch.linalg.eigh(moment)
    statistics = KeyStatistics(moment, 99, name="h.1")
    with caplog.at_level(logging.INFO):
        basis = statistics.null_space(0.02)
    rank = int((values < 0.02).sum())
    assert 0 < rank < 20
    assert (basis.dtype, basis.shape) == (torch.float64, (20, rank))
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank).double())
    torch.testing.assert_close(basis @ basis.T, vectors[:, :rank] @ vectors[:, :rank].T)
    assert f"Null space of h.1 below 0.02: rank {rank} of 20" in caplog.text
    eigh, seen = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (seen.append(1), eigh(m))[1])
    assert statistics.null_space(0.02) is basis
    assert statistics.null_space(0.2).shape[1] > rank
    assert len(seen) == 1


def test_an_update_in_the_null_space_leaves_the_text_alone() -> None:
    """A rank-deficient C: what its tokens span is untouched, and the edit is written nevertheless."""
    tokens, key, residual = rand(15, 20), rand(1, 20, seed=2), rand(1, 4, seed=3)
    basis = KeyStatistics((tokens.T @ tokens / 15).float(), 15).null_space(1e-4)
    assert basis.shape == (20, 5)
    left, right = solvers.null_space_projected(residual, key, basis, None, 1e-9)
    update = left @ right.T
    torch.testing.assert_close(update @ key[0], residual[0], atol=1e-6, rtol=1e-6)
    assert (update @ tokens.T).norm() < 1e-5 * update.norm() * tokens.norm()


def test_no_null_space_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    statistics = KeyStatistics(torch.diag(torch.tensor([0.5, 1.0, 2.0])), 99, name="h.1")
    with pytest.raises(StatisticsError, match=r"h\.1: expected eigenvalues .* below 0\.02, got 0\.5 as the smallest"):
        statistics.null_space(0.02)
    assert statistics.null_space(3.0).shape == (3, 3)
    assert "nothing is protected: its largest eigenvalue is 2; lower `nullspace_threshold` (3)" in caplog.text
