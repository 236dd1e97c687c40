"""Stages as Lightning training, with an editor whose loss is known in closed form."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kedit_lightning.callbacks import WeightUpdate
from kedit_lightning.callbacks.console import Console
from kedit_lightning.delta import WeightDelta
from kedit_lightning.editors import Editor, Loss, Outcome, Stage, ValueDelta
from kedit_lightning.editors.stages import Stop, below
from kedit_lightning.edits import Edit, Site, Token
from kedit_lightning.errors import KeditError, ModelError
from kedit_lightning.models import LanguageModel
from tests.editors.fitting import TEMPLATES, bits, fit, same, stream, trainer
from tests.families import EDITS, WIDTH, tiny_base

THREE = EDITS[:3]
LR, CLAMP = 0.3, 0.6


class Toy(Editor):
    """‖δ − target‖², a target an edit, at two places one after the other; writes nothing by itself."""

    def __init__(self, base: LanguageModel, layers: Sequence[int] = (1,), *, steps: Any = (5, 4)) -> None:
        super().__init__(
            base,
            list(layers),
            v_lr=LR,
            v_weight_decay=0.0,
            clamp_norm_factor=CLAMP,
            kl_factor=0.0,
            mom2_adjustment=False,
            context_templates=TEMPLATES,
        )
        self.steps = steps
        self.seen: dict[str, list[Tensor]] = {"a": [], "b": []}
        self.at_rest: list[Tensor] = []
        self.between: list[str] = []
        self.stop: Stop = below(-1)
        self.updates: list[WeightDelta] = []

    def locate(self) -> None:
        self.a = self.value_delta(Site(self.layer, "mlp"), Token.SUBJECT_LAST)
        self.b = self.value_delta(Site(self.layer + 1, "block"), Token.PROMPT_LAST)

    def stages(self) -> Iterator[Stage]:
        yield Stage("a", (self.a,), lambda: lambda: self.loss("a", self.a), self.steps[0], self.stop)
        self.between.append("after a")
        self.at_rest.append(self.a.delta.detach().clone())
        yield Stage("b", (self.b,), lambda: lambda: self.loss("b", self.b), self.steps[1], self.stop)
        self.between.append("after b")

    def loss(self, name: str, delta: ValueDelta) -> Loss:
        index, whole = self.batch.index, self.seen[name][-1].clone() if self.seen[name] else None
        whole = torch.zeros(len(self.edits), WIDTH) if whole is None or len(whole) != len(self.edits) else whole
        whole[index] = delta.delta.detach()
        self.seen[name].append(whole)
        square = (delta.delta - targets(len(self.edits))[index]).square()
        return Loss({"near": square[:, ::2].sum(dim=1), "far": square[:, 1::2].sum(dim=1)})

    def write(self) -> Iterator[WeightDelta]:
        yield from self.updates


def targets(n: int) -> Tensor:
    """Each edit has another one, so that their losses fall differently."""
    return torch.linspace(-1, 1, WIDTH).repeat(n, 1) * torch.arange(1, n + 1)[:, None]


def adam(origin: Tensor, target: Tensor, updates: int) -> Tensor:
    """One edit by itself: plain Adam with the clamp."""
    delta = torch.zeros(WIDTH, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=LR)
    for _ in range(updates):
        optimizer.zero_grad()
        (delta - target).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            if delta.norm() > CLAMP * origin.norm():
                delta *= CLAMP * origin.norm() / delta.norm()
    return delta.detach()


@pytest.fixture
def toy(gpt2_base: LanguageModel) -> Toy:
    return Toy(gpt2_base)


# ---------------------------------------------------------------------- stages


def test_n_evaluations_are_n_minus_one_updates(toy: Toy, tmp_path: Path) -> None:
    fit(toy, THREE, tmp_path, batch_size=3)
    assert [(o.stage, o.pass_, len(o.curves), o.steps.tolist()) for o in toy.outcomes] == [
        ("a", 0, 5, [5, 5, 5]),
        ("b", 0, 4, [4, 4, 4]),
    ]
    assert toy.between == ["after a", "after b"]
    for name, delta in (("a", toy.a), ("b", toy.b)):
        assert not toy.seen[name][0].any()
        assert all(not torch.equal(one, next_one) for one, next_one in pairwise(toy.seen[name]))
        assert torch.equal(delta.delta, toy.seen[name][-1]), "the δ returned is the one whose loss was last measured"


def test_one_adam_over_all_edits_is_one_adam_an_edit(toy: Toy, tmp_path: Path) -> None:
    fit(toy, THREE, tmp_path, batch_size=3)
    for delta, updates in ((toy.a, 4), (toy.b, 3)):
        alone = torch.stack([adam(v0, t, updates) for v0, t in zip(delta.origin, targets(3), strict=True)])
        torch.testing.assert_close(delta.delta.detach(), alone, atol=1e-6, rtol=1e-6)
        assert bool((delta.delta.norm(dim=1) <= CLAMP * delta.origin.norm(dim=1) * (1 + 1e-6)).all())


def test_an_edit_that_stops_keeps_its_delta_while_others_go_on(toy: Toy, tmp_path: Path) -> None:
    ends = torch.tensor([2, 5, 3])
    toy.stop = lambda _: (toy.outcome.steps >= ends)[toy.batch.index]
    fit(toy, THREE, tmp_path, batch_size=3)
    assert toy.outcomes[0].steps.tolist() == [2, 5, 3]
    assert toy.outcomes[1].steps.tolist() == [2, 4, 3]
    for name, delta in (("a", toy.a), ("b", toy.b)):
        for i, end in enumerate([2, len(toy.seen[name]), 3]):
            for seen in [*toy.seen[name][end - 1 :], delta.delta]:
                assert torch.equal(seen[i], toy.seen[name][end - 1][i])
            updates = end - 1
            torch.testing.assert_close(delta.delta[i].detach(), adam(delta.origin[i], targets(3)[i], updates))
    first = toy.outcomes[0]
    for i, end in enumerate([2, 5, 3]):
        final = first.final(i)
        assert final["steps"] == end
        assert {term: final[term] for term in ("near", "far")} == {
            term: float(values[i]) for term, values in first.curves[end - 1].items()
        }


def test_a_stage_may_end_before_its_first_update(toy: Toy, tmp_path: Path) -> None:
    toy.stop = below(1e9)
    fit(toy, THREE, tmp_path, batch_size=3)
    assert [outcome.steps.tolist() for outcome in toy.outcomes] == [[1, 1, 1], [1, 1, 1]]
    assert not toy.a.delta.any()
    assert torch.equal(toy.a.value, toy.a.origin)


def test_a_stage_of_one_evaluation_updates_nothing(gpt2_base: LanguageModel, tmp_path: Path) -> None:
    toy = Toy(gpt2_base, steps=(1, 2))
    fit(toy, THREE, tmp_path, batch_size=3)
    assert not toy.a.delta.any()
    assert toy.b.delta.any()


def test_a_delta_without_gradient_does_not_move(toy: Toy, tmp_path: Path) -> None:
    fit(toy, THREE, tmp_path, batch_size=3)
    assert torch.equal(toy.a.delta, toy.at_rest[0]), "stage b leaves a alone, Adam's momentum notwithstanding"


def test_below_counts_all_terms() -> None:
    terms = {"nll": torch.tensor([0.25, 0.5, 0.5]), "kl": torch.tensor([0.25, 0.5, 0.25])}
    assert below(0.75)(Loss(terms)).tolist() == [True, False, False]


def test_the_last_entry_of_an_outcome_is_that_of_the_final_delta() -> None:
    steps, both = torch.zeros(2, dtype=torch.long), torch.arange(2)
    outcome = Outcome("a", 0, (), steps, torch.tensor([True, False]), torch.full((2,), torch.nan))
    outcome.add(Loss({"x": torch.tensor([3.0, 2.0])}), both, torch.tensor([True, True]), 0)
    outcome.add(Loss({"x": torch.tensor([1.0, 9.0])}), both, torch.tensor([True, False]), 1)
    assert [outcome.final(i) for i in (0, 1)] == [
        {"steps": 2, "converged": True, "x": 1.0},
        {"steps": 1, "converged": False, "x": 2.0},
    ]


def test_a_loss_that_is_not_finite_is_named_by_case_and_step(toy: Toy, tmp_path: Path) -> None:
    before, loss = bits(toy.base), toy.loss

    def breaking(name: str, delta: ValueDelta) -> Loss:
        found = loss(name, delta)
        if len(toy.seen[name]) == 3:
            found.terms["far"] = found.terms["far"] * torch.tensor([1, torch.nan, torch.inf])
        return found

    toy.loss = breaking  # type: ignore[method-assign]
    made = trainer(tmp_path, on_rejected="stop")
    with pytest.raises(KeditError, match=r"case 11: the loss is nan at step 3; load the model in float32"):
        stream(made, toy, THREE, batch_size=3)
    assert same(toy.base, before)


# ---------------------------------------------------------------------- ValueDelta


def test_clamp_scales_back_only_what_is_too_long() -> None:
    origin = torch.tensor([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0], [0.0, 1.0]])
    delta = ValueDelta(Site(1), Token.SUBJECT_LAST, (4, 2), 2.0, 0.0)
    delta.open(torch.arange(4), origin)
    with torch.no_grad():
        delta.delta.copy_(torch.tensor([[0.0, 20.0], [6.0, 8.0], [0.0, 0.0], [-3.0, 0.0]]))
    delta.clamp_()
    torch.testing.assert_close(delta.delta.detach(), torch.tensor([[0.0, 10], [6, 8], [0, 0], [-2, 0]]))
    assert delta.delta.requires_grad
    torch.testing.assert_close(delta.value, origin + delta.delta.detach())


def test_the_origin_is_the_sites_output_on_the_bare_prompt(toy: Toy, tmp_path: Path) -> None:
    fit(toy, THREE, tmp_path, batch_size=3)
    for i, edit in enumerate(THREE):
        words = toy.base.tokenizer(edit.text, return_tensors="pt")
        hidden = toy.base.model(**words, output_hidden_states=True).hidden_states
        torch.testing.assert_close(toy.b.origin[i], hidden[3][0, -1], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- what Lightning does, and what we lean on


def test_only_deltas_are_registered(toy: Toy, tmp_path: Path) -> None:
    assert list(toy.parameters()) == []
    fit(toy, THREE, tmp_path, batch_size=3)
    assert sum(parameter.numel() for parameter in toy.parameters()) == 2 * 3 * WIDTH
    assert {key.rpartition(".")[2] for key in toy.state_dict()} == {"delta"}
    assert not any(isinstance(module, type(toy.base.model)) for module in toy.modules())


def test_weights_are_written_after_teardown_and_the_base_model_is_never_moved(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for name in ("cpu", "write", "on_train_end"):
        method = getattr(toy, name)
        monkeypatch.setattr(toy, name, lambda method=method, name=name: (order.append(name), method())[1])
    monkeypatch.setattr(toy.base.model, "_apply", lambda *_: order.append("the base model is moved"))
    fit(toy, THREE, tmp_path, batch_size=3)
    assert order == ["on_train_end", "cpu", "write"]


def test_every_update_is_written_before_the_next_is_asked_for(toy: Toy, tmp_path: Path) -> None:
    name = toy.base.name(Site(1))
    update = WeightDelta(name, dense=torch.ones(toy.base.weight(name).shape))
    found = [toy.base.weight(name).clone()]

    def write() -> Iterator[WeightDelta]:
        assert not torch.is_grad_enabled()
        for _ in range(3):
            yield update
            found.append(toy.base.weight(name).clone())

    toy.write = write  # type: ignore[method-assign]
    fit(toy, THREE, tmp_path, batch_size=3)
    assert all(torch.equal(before + 1, after) for before, after in pairwise(found))
    assert len(found) == 4


def test_a_fit_without_steps_writes_nothing(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="took no steps"):
        WeightUpdate().on_fit_end(trainer(tmp_path), toy)
    toy.stages = lambda: iter(())  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="took no steps"):
        fit(toy, THREE, tmp_path)


def test_an_editor_takes_a_new_stream_with_a_new_trainer(toy: Toy, tmp_path: Path) -> None:
    made = stream(trainer(tmp_path), toy, THREE[:1])
    with pytest.raises(KeditError, match="holds a run already: take another EditTrainer"):
        stream(made, toy, THREE[1:])
    assert len(stream(trainer(tmp_path), toy, THREE).run.records()) == 3


def test_each_edit_starts_afresh(toy: Toy, tmp_path: Path) -> None:
    fit(toy, [THREE[0], THREE[1], THREE[0]], tmp_path)
    first, _, again = toy.seen["a"][:5], toy.seen["a"][5:10], toy.seen["a"][10:]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([], KeditError, "at least one layer"),
        ([2, 1], KeditError, r"layers: expected .* in ascending order, got \[2, 1\]"),
        ([1, 1], KeditError, "each once"),
        ([1, 4], ModelError, "between 0 and 3, got 4"),
        ([-1], ModelError, "got -1"),
    ],
)
def test_layers_are_checked(layers: list[int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Toy(tiny_base("gpt2"), layers)


def test_a_delta_needs_a_layer_that_is_there(gpt2_base: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="between 0 and 3, got 4"):
        fit(Toy(gpt2_base, [3]), THREE[:1], tmp_path)


def test_a_prompt_longer_than_the_context_is_named(toy: Toy, tmp_path: Path) -> None:
    long = Edit("word " * 200 + "{} is", "Tobin", "a baker", case_id=77)
    with pytest.raises(KeditError, match="case 77: the prompt takes"):
        fit(toy, [long], tmp_path)


def test_the_console_can_be_on(toy: Toy, tmp_path: Path) -> None:
    """The terminal reads what editors offer: one fit with it, the others are without."""
    fit(toy, THREE[:1], tmp_path, Console())


def test_whole_values_are_in_main_memory(toy: Toy, tmp_path: Path) -> None:
    """Lightning moves what is registered to the CPU before the weights are written, and nothing else."""
    fit(toy, THREE, tmp_path, batch_size=3)
    for delta in (toy.a, toy.b):
        assert delta.origin.device == delta.delta.device == torch.device("cpu")
        assert delta.to("meta").origin.device == torch.device("cpu"), "it is not registered, and so not moved"
