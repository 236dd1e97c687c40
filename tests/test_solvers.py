import pytest
import torch
from torch import Tensor

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
    with pytest.raises(ValueError, match="expected a key with a part along"):
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
