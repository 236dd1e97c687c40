import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from kedit_lightning.objectives import distance, essence_kl, mean_over_rows, nll, weight_decay


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TARGETS = torch.tensor([3, 1, 0, 4])


def test_nll_is_minus_the_log_probability_of_each_target() -> None:
    logits = rand(4, 5)
    naive = [-float(row.softmax(dim=0)[target].log()) for row, target in zip(logits, TARGETS.tolist(), strict=True)]
    assert nll(logits, TARGETS).tolist() == pytest.approx(naive, abs=1e-6)


def test_nll_is_the_usual_cross_entropy_with_its_gradient() -> None:
    logits = rand(4, 5).requires_grad_()
    (ours,) = torch.autograd.grad(nll(logits, TARGETS).mean(), logits)
    (theirs,) = torch.autograd.grad(cross_entropy(logits, TARGETS), logits)
    torch.testing.assert_close(ours, theirs)


def test_nll_of_half_precision_logits_is_taken_in_float32() -> None:
    logits = (50 * rand(4, 5)).bfloat16()
    found = nll(logits, TARGETS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, nll(logits.float(), TARGETS), atol=0, rtol=0)


def test_essence_kl_is_of_the_edited_from_the_unedited() -> None:
    edited, reference = rand(3, 7).log_softmax(-1), rand(3, 7, seed=1).log_softmax(-1)
    naive = [
        sum(float(p.exp() * (p - q)) for p, q in zip(ps, qs, strict=True))
        for ps, qs in zip(edited, reference, strict=True)
    ]
    assert essence_kl(edited, reference).tolist() == pytest.approx(naive, abs=1e-6)
    theirs = kl_div(reference, edited, log_target=True, reduction="none").sum(dim=-1)
    torch.testing.assert_close(essence_kl(edited, reference), theirs)
    assert not torch.allclose(essence_kl(edited, reference), essence_kl(reference, edited))
    assert essence_kl(edited, edited).tolist() == [0, 0, 0]


def test_weight_decay_is_the_norm_over_the_squared_norm() -> None:
    delta, origin = rand(3, 5), rand(3, 5, seed=1)
    naive = [float(d.square().sum().sqrt() / v.square().sum()) for d, v in zip(delta, origin, strict=True)]
    assert weight_decay(delta, origin).tolist() == pytest.approx(naive)


def test_weight_decay_has_no_gradient_at_zero() -> None:
    delta = torch.zeros(3, 5, requires_grad=True)
    value = weight_decay(delta, rand(3, 5))
    value.sum().backward()
    assert value.tolist() == [0, 0, 0]
    assert delta.grad is not None
    assert delta.grad.tolist() == torch.zeros(3, 5).tolist()


def test_distance_adds_a_millionth_to_each_difference() -> None:
    vectors, targets = rand(3, 5), rand(3, 5, seed=1)
    naive = [float((v - t + 1e-6).square().sum().sqrt()) for v, t in zip(vectors, targets, strict=True)]
    assert distance(vectors, targets).tolist() == pytest.approx(naive)
    vectors.requires_grad_()
    distance(vectors, vectors.detach()).sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.isfinite().all()


def test_mean_over_rows_keeps_edits_apart() -> None:
    values, edit = torch.tensor([1.0, 10.0, 3.0, 30.0, 50.0]), torch.tensor([0, 1, 0, 1, 1])
    assert mean_over_rows(values, edit, 2).tolist() == [2, 30]
