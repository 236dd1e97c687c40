"""FT: weights trained in the model's place, beside a hand-made loop over a plain Hugging Face model."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from kedit_lightning import delta as delta_files
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.delta import WeightDelta
from kedit_lightning.editors import FT, ElasticNet
from kedit_lightning.editors.tuned import TunedWeight
from kedit_lightning.edits import Edit
from kedit_lightning.errors import DeltaError, KeditError, RejectedError
from kedit_lightning.export import write_lora, write_model
from kedit_lightning.gamma import GammaSearch
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.fingerprint import fingerprint, fingerprint_below
from kedit_lightning.run import RunDirectory
from tests.editors.fitting import bits, fit, same, trainer
from tests.families import EDITS, build, default_tokenizer, tiny_base, tiny_model, tokenizer
from tests.updates import metadata

BATCH = [EDITS[0], EDITS[1], EDITS[3]]
"""Targets of different lengths."""
LAW = (-0.87028798, 0.15589562)
QUICK = {"num_steps": 5, "lr": 1e-2}


def of_run(run: RunDirectory, commit: int = 0) -> dict[str, Tensor]:
    """ΔW by name of a commit."""
    return {delta.name: delta.update for delta in run.commits()[commit][1]}


def by_hand(
    family: str,
    edits: Sequence[Edit],
    names: Sequence[str],
    *,
    num_steps: int,
    lr: float,
    decay: float = 0.0,
    radius: float | None = None,
    batch_size: int = 64,
    stop: float = 1e-2,
    at_one_position: bool = False,
    net: ElasticNet | None = None,
) -> tuple[dict[str, Tensor], list[float]]:
    """ΔW in math orientation and the mean loss of each pass, prompt by prompt, with the model's own parameters."""
    model, words = tiny_model(family).eval().requires_grad_(False), tokenizer(default_tokenizer(family))
    tuned = [model.get_parameter(name).requires_grad_(True) for name in names]
    start = [parameter.detach().clone() for parameter in tuned]
    adam = torch.optim.Adam(tuned, lr=lr, weight_decay=decay)
    gradients: list[list[Tensor]] = []
    scores: list[Tensor] = []

    def answer(edit: Edit) -> Tensor:
        prompt, whole = words(edit.text)["input_ids"], words(f"{edit.text} {edit.target_new}")["input_ids"]
        targets = whole[len(prompt) :]
        found = model(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
        places = [len(prompt) - 1 + (0 if at_one_position else i) for i in range(len(targets))]
        return -torch.stack([found[place, target] for place, target in zip(places, targets, strict=True)]).mean()

    means = []
    for step in range(num_steps):
        losses = []
        if net and step == net.num_steps:
            mean = [torch.stack(each).mean(dim=0) for each in zip(*gradients, strict=True)]
            scores = [(g * (w.detach() - w0)).abs() for g, w, w0 in zip(mean, tuned, start, strict=True)]
        for i in range(0, len(edits), batch_size):
            batch = edits[i : i + batch_size]
            loss = torch.stack([answer(edit) for edit in batch]).mean()
            for w, w0, score in zip(tuned, start, scores, strict=False):
                assert net is not None
                loss = loss + net.elastic_l1 * ((w - w0).abs() / (score + 1e-6)).sum() + net.mu * ((w - w0) ** 2).sum()
            losses += [loss.item()] * len(batch)
            if loss.item() >= stop:
                adam.zero_grad()
                loss.backward()
                gradients.append([parameter.grad.clone() for parameter in tuned if parameter.grad is not None])
                adam.step()
                with torch.no_grad():
                    for w, w0 in zip(tuned, start, strict=True):
                        if radius is not None:
                            w.clamp_(w0 - radius, w0 + radius)
        means.append(sum(losses) / len(losses))
        if means[-1] < stop:
            break
    found = {}
    for name, w, w0 in zip(names, tuned, start, strict=True):
        delta = (w - w0).detach()
        turned = isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) and delta.ndim == 2
        found[name] = delta.T if turned else delta.reshape(len(delta), -1)
    return found, means


# ---------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        pytest.param({}, {}, id="plain"),
        pytest.param({"preset": "released"}, {"at_one_position": True}, id="one position"),
        pytest.param({"wd_power_law": LAW}, {"decay": 1.168704 * 3 ** LAW[0]}, id="decay law"),
        pytest.param({"weight_decay": 0.5, "rewrite": "block"}, {"decay": 0.5}, id="decay, block"),
        pytest.param({"norm_constraint": 2e-3}, {"radius": 2e-3}, id="ball"),
        pytest.param({"batch_size": 2}, {"batch_size": 2}, id="mini-batches"),
        pytest.param({"stop": 5.5, "batch_size": 1}, {"stop": 5.5, "batch_size": 1}, id="stop"),
        pytest.param({"elastic_net": ElasticNet(2, 1e-7, 0.3)}, {"net": ElasticNet(2, 1e-7, 0.3)}, id="elastic net"),
    ],
)
def test_it_is_adam_on_the_models_own_weights(
    settings: dict[str, Any], reference: dict[str, Any], family: str, tmp_path: Path
) -> None:
    editor = FT(tiny_base(family), [1], **(QUICK | settings))
    run = fit(editor, BATCH, tmp_path, batch_size=3).run
    wanted, means = by_hand(family, BATCH, editor.names(), **(QUICK | reference))
    plain, _ = by_hand(family, BATCH, editor.names(), **QUICK)
    found = of_run(run)
    assert found.keys() == wanted.keys()
    differs = False
    for name, update in found.items():
        assert float((update - wanted[name]).norm()) < 1e-4 * float(wanted[name].norm()), name
        differs |= float((wanted[name] - plain[name]).norm()) > 1e-2 * float(plain[name].norm())
    assert differs == bool(settings)
    losses = [float(sum(terms.values()).mean()) for outcome in editor.outcomes for terms in outcome.curves]  # type: ignore[arg-type]
    assert losses == pytest.approx(means, rel=1e-5)


def test_the_decay_law_of_memit() -> None:
    editor = FT(tiny_base("gpt2"), [1], wd_power_law=LAW)
    editor.prepare()
    editor.begin(BATCH)
    editor.edits = [EDITS[0]] * 10_000
    assert editor.configure_optimizers().defaults["weight_decay"] == pytest.approx(3.86e-4, rel=1e-3)


def test_all_tokens_at_one_position_is_another_answer(tmp_path: Path) -> None:
    """For a target of one token it is the same."""
    first: dict[tuple[str, str], float] = {}
    words = tokenizer(default_tokenizer("gpt2"))
    one = Edit("{} was born in", "Velora Quint", "the")
    assert len(words(f" {one.target_new}")["input_ids"]) == 1 < len(words(f" {EDITS[1].target_new}")["input_ids"])
    for preset in ("paper", "released"):
        for edit in (one, EDITS[1]):
            editor = FT(tiny_base("gpt2"), [1], num_steps=1, preset=preset)  # type: ignore[arg-type]
            fit(editor, [edit], tmp_path)
            first[preset, edit.target_new] = float(editor.outcomes[0].curves[0]["nll"])
    assert first["paper", "the"] == pytest.approx(first["released", "the"], rel=1e-6)
    longer = EDITS[1].target_new
    assert first["paper", longer] != pytest.approx(first["released", longer], rel=1e-2)


# ---------------------------------------------------------------------- the ball


@pytest.mark.parametrize("radius", [1e-6, 5e-5, 2e-3, 0.3])
def test_no_rounding_leaves_the_ball(radius: float) -> None:
    """Entries of all sizes, pushed far out; checked in float64 as they would be written in float32."""
    noise = torch.Generator().manual_seed(0)
    origin = torch.randn(64, 256, generator=noise) * 10 ** (8 * torch.rand(64, 256, generator=noise) - 6)
    tuned = TunedWeight("w", origin, radius)
    with torch.no_grad():
        tuned.value += 3 * radius * torch.randn(64, 256, generator=noise)
    tuned.clamp_()
    moved = (origin + tuned.delta).double() - origin.double()
    assert float(moved.abs().max()) <= radius
    assert float((moved.abs() > 0.99 * radius).double().mean()) > 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_stays_in_the_ball(dtype: torch.dtype, tmp_path: Path) -> None:
    base = LanguageModel.wrap(tiny_model("gptj").to(dtype), tokenizer(default_tokenizer("gptj")))
    editor, radius = FT(base, [1, 2], norm_constraint=1e-3, **QUICK), 1e-3
    before = {name: base.master(name).clone() for name in editor.names()}
    fit(editor, BATCH, tmp_path, batch_size=3)
    for name, old in before.items():
        moved = (base.master(name).double() - old.double()).abs()
        assert 0.9 * radius < float(moved.max()) <= radius, name
        assert base.model.get_parameter(name).dtype == dtype


def test_in_a_sequence_every_edit_starts_from_the_last(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    editor = FT(base, [1], norm_constraint=1e-3, **QUICK)
    before = base.master(editor.names()[0]).clone()
    run = fit(editor, BATCH, tmp_path, batch_size=1).run
    total = sum(of_run(run, i)[editor.names()[0]] for i in range(3))
    assert float((base.master(editor.names()[0]) - before - total).abs().max()) < 1e-6
    assert 1e-3 < float((base.master(editor.names()[0]) - before).abs().max()) <= 3e-3


# ---------------------------------------------------------------------- part by part


def test_the_size_of_the_parts_changes_nothing(tmp_path: Path) -> None:
    for settings in ({}, {"batch_size": 2}, {"elastic_net": ElasticNet(2, 1e-7, 0.3)}):
        found = {}
        for max_tokens in (None, 1):
            editor = FT(tiny_base("gpt2"), [1], max_tokens=max_tokens, **(QUICK | settings))  # type: ignore[arg-type]
            found[max_tokens] = of_run(fit(editor, BATCH, tmp_path, batch_size=3).run), editor.outcomes
            assert len(editor.parts) == (3 if max_tokens else 2 if "batch_size" in settings else 1)
        for name, update in found[None][0].items():
            assert float((found[1][0][name] - update).norm()) < 1e-5 * float(update.norm()), name
        for one, other in zip(found[1][1], found[None][1], strict=True):
            torch.testing.assert_close(one.curves, other.curves)


def test_out_of_memory_halves_the_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Midway through a mini-batch, so that gradients of some parts were there already."""
    wanted = of_run(fit(FT(tiny_base("gpt2"), [1], **QUICK), BATCH, tmp_path / "plenty", batch_size=3).run)
    base = tiny_base("gpt2")
    logits, failed = base.logits, []

    def limited(batch: Any, *args: Any) -> Tensor:
        if len(batch) > 1 and not failed:
            failed.append(batch)
            raise torch.OutOfMemoryError
        return logits(batch, *args)

    base.logits = limited  # type: ignore[method-assign]
    editor = FT(base, [1], **QUICK)
    with caplog.at_level(logging.WARNING):
        found = of_run(fit(editor, BATCH, tmp_path / "scarce", batch_size=3).run)
    assert failed
    assert "Out of memory" in caplog.text
    assert len(editor.parts) > 1
    for name, update in wanted.items():
        assert float((found[name] - update).norm()) < 1e-5 * float(update.norm()), name


def test_an_edit_that_does_not_fit_alone_gets_advice_that_fits(tmp_path: Path) -> None:
    """FT has no context templates that could be fewer."""
    base = tiny_base("gpt2")

    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError

    base.logits = full  # type: ignore[method-assign]
    with pytest.raises(KeditError, match=r"with this edit alone \(\d+ tokens\); load the model in bfloat16$"):
        fit(FT(base, [1], **QUICK), BATCH, tmp_path, batch_size=3)


# ---------------------------------------------------------------------- the elastic net


def test_without_its_factors_the_elastic_net_is_plain_ft(tmp_path: Path) -> None:
    plain = of_run(fit(FT(tiny_base("gpt2"), [1], **QUICK), BATCH, tmp_path, batch_size=3).run)
    editor = FT(tiny_base("gpt2"), [1], elastic_net=ElasticNet(2, 0.0, 0.0), **QUICK)
    found = of_run(fit(editor, BATCH, tmp_path, batch_size=3).run)
    assert [(outcome.stage, len(outcome.curves)) for outcome in editor.outcomes] == [("w", 2), ("elastic", 3)]
    for name, update in plain.items():
        torch.testing.assert_close(found[name], update)


def test_the_elastic_net_keeps_the_change_small(tmp_path: Path) -> None:
    norms = []
    for net in (None, ElasticNet(2, 1e-6, 0.5)):
        editor = FT(tiny_base("gpt2"), [1], elastic_net=net, **(QUICK | {"num_steps": 12}))
        run = fit(editor, BATCH, tmp_path, batch_size=3).run
        norms.append(sum(float(update.abs().sum()) for update in of_run(run).values()))
    assert norms[1] < 0.8 * norms[0]
    stages = run.records()[0]["stages"]
    assert stages[1]["elastic_l1"] > 0 < stages[1]["elastic_l2"]
    assert "elastic_l1" not in stages[0]


# ---------------------------------------------------------------------- biases and norms in a delta


def test_biases_are_saved_merged_applied_and_exported(tmp_path: Path) -> None:
    base, pristine = tiny_base("gpt2"), bits(tiny_base("gpt2"))
    editor = FT(base, [1], rewrite="block", **QUICK)
    run = fit(editor, BATCH[:2], tmp_path, batch_size=1).run
    edited = bits(base)
    small = [delta for _, deltas, _ in run.commits() for delta in deltas if delta.shape[1] == 1]
    assert {delta.name.rpartition(".")[2] for delta in small} == {"weight", "bias"}, "norms, too"
    base.restore()
    assert same(base, pristine)
    deltas, about = delta_files.load(run.path / "delta.safetensors")
    assert [delta.name for delta in deltas] == editor.names()
    delta_files.check(base, deltas, about, run.path)
    write_model(base, deltas, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    for name, value in edited.items():
        torch.testing.assert_close(exported[name], value, atol=1e-6, rtol=1e-5)
    with pytest.raises(DeltaError, match=r"ln_1\.weight is dense.*--format hf"):
        write_lora(base, deltas, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_delta_of_a_bias_knows_its_base_model() -> None:
    base = tiny_base("gpt2")
    name = "transformer.h.1.mlp.c_proj.bias"
    about = metadata(base, fingerprint={"names": [name], "value": fingerprint(base, [name])})
    update = WeightDelta(name, dense=torch.ones(32, 1))
    delta_files.check(base, [update], about, Path("d"))
    below = fingerprint_below(base, 1)
    base.write(name, update.update)
    assert fingerprint(base, [name]) == about["fingerprint"]["value"], "of the unedited model"
    assert fingerprint_below(base, 1) == below
    with pytest.raises(KeditError, match=r"expected an update of shape \(32, 1\)"):
        base.write(name, torch.ones(1, 32))
    with torch.no_grad():
        other = tiny_base("gpt2")
        other.model.get_parameter(name).mul_(1.5)
    assert fingerprint_below(other, 1) != below
    with pytest.raises(DeltaError, match="another model"):
        delta_files.check(other, [update], about, Path("d"))


# ---------------------------------------------------------------------- layers, records, refusals


def test_a_layer_is_exactly_that_layer() -> None:
    """Layer 1 is not layers 10 and 11."""
    model = build("gpt2", n_layer=12, n_embd=8, n_head=2, n_positions=16)
    base = LanguageModel.wrap(model, tokenizer(default_tokenizer("gpt2")))
    assert FT(base, [1]).names() == [f"transformer.h.1.mlp.c_proj.{kind}" for kind in ("weight", "bias")]
    block = FT(base, [1], rewrite="block").names()
    assert len(block) == 12
    assert all(name.startswith("transformer.h.1.") for name in block)
    assert FT(tiny_base("llama"), [0, 2]).names() == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 2)]


def test_what_the_run_remembers(tmp_path: Path) -> None:
    editor = FT(tiny_base("gpt2"), [1], num_steps=40, lr=1e-2, stop=2.0)
    run = fit(editor, BATCH[:1], tmp_path).run
    (stage,) = run.records()[0]["stages"]
    assert stage["stage"] == "w"
    assert stage["layer"] == 1
    assert 1 < stage["steps"] < 40
    assert stage["nll"] < 2
    assert stage["converged"]
    assert len(editor.outcomes[0].curves) == stage["steps"]
    config = run.metadata()[0]["config"]
    assert {"layers", "num_steps", "lr", "norm_constraint", "rewrite"} <= set(config)
    assert not {name for name in config if name.startswith("v_")}
    assert json.dumps(config)


def test_weights_that_are_not_finite_are_rejected() -> None:
    editor = FT(tiny_base("gpt2"), [1])
    editor.prepare()
    editor.begin(BATCH)
    editor.check_values()
    with torch.no_grad():
        editor.tuned[1].value[0] = torch.nan
    with pytest.raises(RejectedError, match=r"case 0: transformer\.h\.1\.mlp\.c_proj\.bias is not finite") as error:
        editor.check_values()
    assert set(error.value.reasons) == {0, 1, 2}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"norm_constraint": 0.0}, "norm_constraint: expected a positive number, got 0"),
        ({"norm_constraint": -1.0}, "norm_constraint: expected a positive number, got -1"),
        ({"lr": 0.0}, "lr: expected a positive number, got 0"),
        ({"lr": float("nan")}, "lr: expected a positive number, got nan"),
        ({"num_steps": 0}, "num_steps: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"weight_decay": -0.1}, "weight_decay: expected at least 0, got -0.1"),
        ({"weight_decay": 0.1, "wd_power_law": LAW}, "weight_decay and wd_power_law: expected one of them"),
        ({"layers": [4]}, "expected a layer between 0 and 3, got 4"),
        ({"layers": []}, "layers: expected at least one layer"),
        ({"elastic_net": ElasticNet(25)}, "elastic_net.num_steps: expected fewer than the 25 of num_steps, got 25"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(KeditError) as error:
        FT(tiny_base("gpt2"), **({"layers": [1]} | settings))
    assert str(error.value).startswith(complaint)
    assert "\n" not in str(error.value)


def test_it_has_no_values_to_compress(tmp_path: Path) -> None:
    data = EditDataModule(edits=[edit.as_record() for edit in BATCH])
    with pytest.raises(KeditError, match="tune-gamma: FT has no setting `compress`"):
        GammaSearch(trainer(tmp_path), FT(tiny_base("gpt2"), [1]), data, [50.0], 1, 0.05)


def test_bad_elastic_nets_are_one_line() -> None:
    with pytest.raises(KeditError, match="mu: expected at least 0, got -1"):
        ElasticNet(mu=-1)
    with pytest.raises(KeditError, match="num_steps: expected at least 1, got 0"):
        ElasticNet(num_steps=0)
