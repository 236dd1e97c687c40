"""EAC as a setting of every editor that optimises a value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kedit_lightning import objectives
from kedit_lightning.editors import Editor, Loss, Stage
from kedit_lightning.editors.compression import Compression, largest
from kedit_lightning.errors import KeditError
from kedit_lightning.models import LanguageModel
from tests.editors.fitting import Kept, bits, end_at, fit, relative, same
from tests.editors.test_mass import BATCH, WAYS, agree_on_values, of, quick
from tests.families import WIDTH, default_tokenizer, tiny_base, tiny_model, tokenizer

ONE = BATCH[:1]
COMPRESSED = [way for way, (name, _) in WAYS.items() if not name.startswith("FT")]
NAMED = quick(("ROME", "MEMIT", "TOP", "PMET", "JEEP", "AlphaEdit"), COMPRESSED)
SMALL = {"gamma": 80, "v_num_grad_steps1": 4, "v_num_grad_steps2": 4, "elastic_l1": 1e-4}


def eac(**settings: Any) -> Compression:
    return Compression(**{**SMALL, **settings})


def fitted(way: str, base: LanguageModel, folder: Path, edits: Any = BATCH, **settings: Any) -> tuple[Editor, Kept]:
    editor, kept = of(way, base, **settings), Kept()
    fit(editor, edits, folder, kept, batch_size=len(edits))
    return editor, kept


@pytest.mark.parametrize("family", quick(("gpt2",)))
@pytest.mark.parametrize("way", NAMED)
def test_delta_moves_on_its_anchors_alone(way: str, family: str, tmp_path: Path) -> None:
    editor, kept = fitted(way, tiny_base(family), tmp_path, compress=eac())
    retrained = [outcome for outcome in editor.outcomes if any(delta.anchors is not None for delta in outcome.deltas)]
    assert retrained
    for outcome in retrained:
        for delta in outcome.deltas:
            assert delta.anchors is not None
            assert delta.anchors.sum(dim=1).tolist() == [int(WIDTH * 0.2)] * len(BATCH)
            assert not delta.delta[~delta.anchors].any()
            assert (delta.delta[delta.anchors] != 0).float().mean() > 0.9
        record = outcome.final(0)
        assert record[f"anchors/{outcome.deltas[0].label}"] == int(WIDTH * 0.2)
    stages = [outcome.stage for outcome in editor.outcomes]
    if way.startswith("TOP"):  # the relation feature is left whole
        assert stages == ["h_r", "v_anchors", "v"]
        assert editor.h_r.anchors is None  # type: ignore[attr-defined]
    for outcome in editor.outcomes:
        has_net = any(term.startswith("elastic_l1") for term in outcome.curves[0])
        assert has_net == (not outcome.stage.endswith("_anchors") and outcome.stage != "h_r")
    weighed = [v for term, v in editor.outcomes[-1].curves[0].items() if term.startswith("elastic_l1")]
    assert all((term > 0).all() for term in weighed)  # stage B starts from δ of stage A on the anchors
    assert kept.commits


@pytest.mark.parametrize("way", NAMED)
def test_without_compression_in_it_it_is_its_base_editor(way: str, tmp_path: Path) -> None:
    """γ = 0, λ = 0 and no stage A; N updates where the base editor takes N + 1 evaluations."""
    steps = {"v_num_grad_steps": 5} if not way.startswith("TOP") else {"v_num_grad_steps2": 5}
    never = {name: value for name, value in (("stop", 0.0), ("stop2", 0.0), ("min_loss", 2.0))}
    takes = {"TOP": ("stop2",), "JEEP": ("min_loss",)}.get(way[:4].rstrip(","), ("stop",))
    settings = steps | {name: never[name] for name in takes}
    nothing = eac(gamma=0, elastic_l1=0, v_num_grad_steps1=0, v_num_grad_steps2=4)
    plain, one = fitted(way, tiny_base("gpt2"), tmp_path / "plain", **settings)
    twice, other = fitted(way, tiny_base("gpt2"), tmp_path / "eac", **settings, compress=nothing)
    agree_on_values(other, one, 1e-6)
    assert [outcome.stage for outcome in plain.outcomes] == [outcome.stage for outcome in twice.outcomes]


@pytest.mark.parametrize("way", quick(("ROME", "JEEP"), COMPRESSED))
def test_a_batch_equals_one_by_one(way: str, tmp_path: Path) -> None:
    """Half of the edits end early, so that the others go on alone; also with little memory, and where it runs out."""
    ends = dict(zip((edit.case_id for edit in BATCH), (3, 4, 3, 4), strict=True))

    def ended(folder: str, edits: Any = BATCH, out_at: int = 0, **settings: Any) -> tuple[Editor, Kept]:
        editor, kept = of(way, tiny_base("gpt2"), compress=eac(kl_reference="start"), **settings), Kept()
        end_at(editor, ends)
        step, calls = editor._step, iter(range(1, 1000))

        def limited(stage: Stage) -> None:
            if next(calls) == out_at:
                raise torch.OutOfMemoryError
            step(stage)

        editor._step = limited  # type: ignore[method-assign]
        fit(editor, edits, tmp_path / folder, kept, batch_size=len(edits))
        return editor, kept

    together, all_at_once = ended("all")
    assert all(outcome.steps.tolist() == [3, 4, 3, 4] for outcome in together.outcomes)
    for folder, settings in (("parts", {"max_tokens": 60}), ("out of memory in stage B", {"out_at": 6})):
        parted, in_parts = ended(folder, **settings)  # type: ignore[arg-type]
        assert len(parted.parts) > 1
        agree_on_values(in_parts, all_at_once)
    for i, edit in enumerate(BATCH):
        alone, single = ended(str(i), [edit])
        if len(together.passes()) > 1:
            continue  # the second pass reads a model that was edited with the whole batch
        for (delta, _), (wanted, _) in zip(all_at_once.commits[0], single.commits[0], strict=True):
            assert relative(delta[i : i + 1], wanted) < 1e-5
        for mine, whole in zip(alone.deltas, together.deltas, strict=True):
            if mine.anchors is not None:
                assert torch.equal(mine.anchors[0], whole.anchors[i])


@pytest.mark.parametrize("family", quick(("gemma2",)))
@pytest.mark.parametrize("way", quick(("ROME", "JEEP"), COMPRESSED))
def test_suffix_forward_equals_full(way: str, family: str, tmp_path: Path) -> None:
    _, full = fitted(way, tiny_base(family), tmp_path / "full", compress=eac(), forward="full")
    _, suffix = fitted(way, tiny_base(family), tmp_path / "suffix", compress=eac())
    agree_on_values(suffix, full, 2e-5)


def hand_made(base: LanguageModel, **settings: Any) -> Tensor:
    """δ of EAC on ROME of one edit, written down plainly."""
    editor = of("ROME", base)
    editor.prepare()
    editor.begin(ONE)
    editor.take_up(editor.parts[0])
    (stage,) = editor.stages()
    setting = eac(**settings)
    delta, v = editor.v.delta, editor.v  # type: ignore[attr-defined]
    evaluate = stage.prepare()
    optimizer, gradients = torch.optim.Adam([delta], lr=0.5), []
    for _ in range(setting.v_num_grad_steps1):
        optimizer.zero_grad()
        evaluate().total.sum().backward()
        gradients.append(delta.grad.clone())
        optimizer.step()
        v.clamp_()
    found = delta.detach().clone()
    score = (torch.stack(gradients).mean(dim=0) * found).abs()
    kept = score[0].argsort(descending=True)[: int(WIDTH * (100 - float(setting.gamma)) / 100)]  # type: ignore[arg-type]
    mask = torch.zeros_like(found, dtype=torch.bool)
    mask[0, kept] = True
    delta.data.copy_(found * mask)
    optimizer = torch.optim.Adam([delta], lr=0.5)
    for _ in range(setting.v_num_grad_steps2):
        optimizer.zero_grad()
        net = setting.elastic_l1 * (delta.abs() / (score + 1e-6))[mask].sum()
        (evaluate().total.sum() + net).backward()
        delta.grad[~mask] = 0
        optimizer.step()
        v.clamp_()
    return delta.detach().clone()


@pytest.mark.parametrize("family", quick(("gpt2", "gemma2")))
@pytest.mark.parametrize("gamma", [50, 80, 95])
def test_it_is_what_the_paper_writes_down(gamma: float, family: str, tmp_path: Path) -> None:
    base = tiny_base(family)
    wanted = hand_made(base, gamma=gamma)
    _, kept = fitted("ROME", base, tmp_path, ONE, compress=eac(gamma=gamma))
    assert relative(kept.commits[0][0][0], wanted) < 1e-5


def test_scored_l1_has_the_gradient_of_its_formula() -> None:
    delta = torch.tensor([[1.0, -2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    score = torch.tensor([[0.5, 0.25, 1.0]], dtype=torch.float64, requires_grad=True)
    value = objectives.scored_l1(delta, score)
    value.sum().backward()
    assert value.item() == pytest.approx(1 / 0.500001 + 2 / 0.250001)
    assert delta.grad is not None
    assert delta.grad[0].tolist() == pytest.approx([1 / 0.500001, -1 / 0.250001, 0.0])
    assert score.grad is None


def test_largest_keeps_as_many_as_asked() -> None:
    values = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    mask = largest(values, 2)
    assert mask[0].tolist() == [True, False, True, False]
    assert mask.sum(dim=1).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("d", "gamma", "kept"),
    [(1600, 80, 320), (1600, 85, 240), (4096, 95, 204), (48, 80, 9), (4, 99, 1), (1000, 97.7, 23)],
)
def test_how_many_are_kept(d: int, gamma: float, kept: int, gpt2_base: LanguageModel) -> None:
    class Delta:
        delta = torch.zeros(1, d)
        label = "mlp"

    assert Compression(gamma=gamma).kept(Delta()) == kept  # type: ignore[arg-type]
    assert Compression(gamma={"mlp": gamma}).kept(Delta()) == kept  # type: ignore[arg-type]


def anchors_of(base: LanguageModel, folder: Path, edits: Any = BATCH, **settings: Any) -> Tensor:
    base.restore()
    editor, _ = fitted("ROME", base, folder, edits, compress=eac(**settings))
    mask = editor.v.anchors  # type: ignore[attr-defined]
    assert mask is not None
    return mask


def test_selectors_choose_differently_and_chance_the_same_again(gpt2_base: LanguageModel, tmp_path: Path) -> None:
    ways = ("score", "gradient", "magnitude", "random")
    found = {way: anchors_of(gpt2_base, tmp_path / way, select=way) for way in ways}
    for one in ways:
        for other in ways:
            assert torch.equal(found[one], found[other]) == (one == other)
    alone = anchors_of(gpt2_base, tmp_path / "alone", BATCH[2:3], select="random")
    assert torch.equal(alone[0], found["random"][2])
    again = anchors_of(gpt2_base, tmp_path / "seed", select="random", seed=1)
    assert not torch.equal(again, found["random"])
    gpt2_base.restore()
    both, _ = fitted("PMET", gpt2_base, tmp_path / "both", compress=eac(select="random"))
    masks = [delta.anchors for delta in both.deltas]
    assert not torch.equal(*masks)  # type: ignore[arg-type]


def test_every_delta_has_its_own_gamma(gpt2_base: LanguageModel, tmp_path: Path) -> None:
    compress = eac(gamma={"low": 50, "high": 75})
    editor, _ = fitted("JEEP", gpt2_base, tmp_path, compress=compress)
    counts = {delta.label: delta.anchors.sum(dim=1).tolist() for delta in editor.deltas}  # type: ignore[union-attr]
    assert counts == {"low": [WIDTH // 2] * len(BATCH), "high": [WIDTH // 4] * len(BATCH)}
    gpt2_base.restore()
    with pytest.raises(KeditError, match=r"compress\.gamma: expected a percentile for mlp, got one for low, high"):
        fitted("ROME", gpt2_base, tmp_path / "rome", compress=compress)


def test_paper_literal_zeroes_the_value_and_not_delta(gpt2_base: LanguageModel, tmp_path: Path) -> None:
    compress = eac(preset="paper_literal", mu=1e-3, start="zeros")
    editor, _ = fitted("ROME", gpt2_base, tmp_path, compress=compress)
    v = editor.v  # type: ignore[attr-defined]
    assert not v.value[~v.anchors].any()
    assert v.value[v.anchors].ne(0).all()
    first = editor.outcomes[-1].curves[0]
    assert "weight_decay" not in first
    at_start = (v.origin * v.anchors).square().sum(dim=1)
    assert torch.allclose(first["elastic_l2"], 1e-3 * at_start)
    assert (first["elastic_l1"] > 0).all()


def test_squared_replaces_the_weight_decay(gpt2_base: LanguageModel, tmp_path: Path) -> None:
    editor, _ = fitted("ROME", gpt2_base, tmp_path / "a", compress=eac(elastic_l2="squared", mu=0.25))
    last = editor.outcomes[-1]
    assert "weight_decay" not in last.curves[0]
    assert "weight_decay" in editor.outcomes[0].curves[0]
    gpt2_base.restore()
    editor, _ = fitted("ROME", gpt2_base, tmp_path / "b", compress=eac(elastic_l1=0, elastic_l2="squared", mu=0))
    assert editor.outcomes[-1].curves[0].keys() == {"nll", "kl", "elastic_l2"}


def test_kl_can_refer_to_where_stage_b_starts(gpt2_base: LanguageModel, tmp_path: Path) -> None:
    """As in the released code on ROME: the KL of stage B's first evaluation is then zero."""
    kl: dict[str, Tensor] = {}
    for reference in ("unedited", "start"):
        gpt2_base.restore()
        editor, _ = fitted("ROME", gpt2_base, tmp_path / reference, compress=eac(kl_reference=reference))
        kl[reference] = editor.outcomes[-1].curves[0]["kl"]
        assert not editor.kl_reference
    assert (kl["start"].abs() < 1e-6).all()
    assert (kl["unedited"] > 1e-4).all()


def test_stage_b_can_start_from_zeros(gpt2_base: LanguageModel, tmp_path: Path) -> None:
    editor, _ = fitted("MEMIT", gpt2_base, tmp_path, compress=eac(start="zeros"))
    first, second = editor.outcomes
    assert torch.allclose(first.curves[0]["nll"], second.curves[0]["nll"])
    assert not second.curves[0]["elastic_l1"].any()


def test_in_bfloat16_delta_and_scores_stay_float32(tmp_path: Path) -> None:
    base = LanguageModel.wrap(tiny_model("llama").bfloat16(), tokenizer(default_tokenizer("llama")))
    editor, kept = fitted("ROME", base, tmp_path, compress=eac())
    v = editor.v  # type: ignore[attr-defined]
    assert v.delta.dtype == torch.float32
    assert not v.delta[~v.anchors].any()
    assert kept.commits[0][0][1].isfinite().all()


def test_edits_that_end_in_stage_a_go_through_stage_b_too(gpt2_base: LanguageModel, tmp_path: Path) -> None:
    """An edit may end stage A at once: it then has no gradient, any anchors, and δ = 0."""
    editor = of("ROME", gpt2_base, compress=eac())
    stages, calls = editor.stages, iter((True, False))

    def ending() -> Any:
        for stage in stages():
            yield Stage(stage.name, stage.deltas, stage.prepare, stage.steps, first_edit_done)

    def first_edit_done(loss: Loss) -> Tensor:
        return (editor.batch.index == 0) & next(calls, torch.tensor(False))

    editor.stages = ending  # type: ignore[method-assign]
    fit(editor, BATCH, tmp_path, batch_size=len(BATCH))
    mask, delta = editor.v.anchors, editor.v.delta  # type: ignore[attr-defined]
    assert mask.sum(dim=1).tolist() == [int(WIDTH * 0.2)] * len(BATCH)
    assert editor.outcomes[0].steps.tolist()[0] == 1
    assert editor.outcomes[1].steps.tolist() == [4] * len(BATCH)
    assert not delta[~mask].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 100}, r"compress\.gamma: expected a percentile of at least 0 and below 100, got 100"),
        ({"gamma": -1}, r"compress\.gamma: expected a percentile"),
        ({"gamma": {"low": 80, "high": 120}}, r"got 120"),
        ({"v_num_grad_steps2": 0}, r"v_num_grad_steps2"),
        ({"elastic_l1": -1e-7}, r"elastic_l1"),
        ({"mu": -1}, r"mu"),
        ({"v_num_grad_steps1": 0}, r"without a stage A"),
        ({"v_num_grad_steps1": 0, "gamma": 0}, r"there are no scores: set elastic_l1 to 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(KeditError, match=message):
        Compression(**settings)


def test_an_edit_that_does_not_converge_can_be_refused(gpt2_base: LanguageModel, tmp_path: Path) -> None:
    before = bits(gpt2_base)
    with pytest.raises(KeditError, match=r"case 0: stage v has not converged in 6 steps"):
        fit(of("ROME", gpt2_base, unconverged="reject", stop=1e-9), ONE, tmp_path)
    assert same(gpt2_base, before)


def test_records_say_which_stages_converged(gpt2_base: LanguageModel, tmp_path: Path) -> None:
    made = fit(of("ROME", gpt2_base, stop=1e9), ONE, tmp_path / "at_once")
    assert [stage["converged"] for stage in made.run.records()[0]["stages"]] == [True]
    gpt2_base.restore()
    made = fit(of("ROME", gpt2_base, stop=1e-9), ONE, tmp_path / "never")
    assert [stage["converged"] for stage in made.run.records()[0]["stages"]] == [False]
