"""Training a hypernetwork and editing with it: the real commands on tiny models, triples, files, bad input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from kedit_lightning.configured import trains
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.editors import MALMEN, MEND
from kedit_lightning.edits import Edit, Part, Site
from kedit_lightning.errors import DataError, KeditError
from kedit_lightning.hypernetworks.capture import Capture, Tokens
from kedit_lightning.hypernetworks.command import KeepBest
from kedit_lightning.hypernetworks.data import Triple, TripleData, answers_of, complete
from kedit_lightning.hypernetworks.files import FILE
from kedit_lightning.hypernetworks.malmen import MALMENNetwork
from kedit_lightning.hypernetworks.mend import MENDNetwork
from kedit_lightning.hypernetworks.training import HypernetworkTraining, MALMENTraining, MENDTraining
from kedit_lightning.models import LanguageModel, collate
from kedit_lightning.run import RunDirectory
from tests.commandline import done, jsonl, kedit, write
from tests.editors.fitting import bits, fit, hypernetwork, learned, relative, same, untouched
from tests.families import EDITS, save_tiny, tiny_base

TRIPLES = [edit for edit in EDITS if edit.paraphrase_prompts and answers_of(edit)]
SMALL: dict[str, Any] = {"rank": 4, "max_tokens": 64}


def triples(edits: Sequence[Edit] = TRIPLES) -> list[Triple]:
    return [Triple(edit, edit.paraphrase_prompts[0], *answers_of(edit)[0]) for edit in edits]


def training(kind: type[HypernetworkTraining], family: str = "gpt2", **settings: Any) -> HypernetworkTraining:
    torch.manual_seed(0)
    made = kind(tiny_base(family), [1, 2], **(SMALL | {"edit_lr": 0.01} | settings))
    made.loss.budget = settings.get("max_tokens", 64)
    return made


# ---------------------------------------------------------------------- what is captured


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_factors_make_the_gradients_of_the_weights(family: str) -> None:
    """Σ g kᵀ is what autograd says of W itself; all tokens, up- and down-projection."""
    base, parts = tiny_base(family), ("mlp_in", "mlp", "attn")
    before = bits(base)
    sites = [Site(layer, part) for layer in (1, 2) for part in parts]  # type: ignore[arg-type]
    rows = collate([base.encode(edit.text, edit.target_new) for edit in EDITS[:3]])
    capture = Capture(base, rows, sites, "all")
    nll = capture.forward()[0]
    nll.sum().backward()
    assert untouched(base)
    assert same(base, before)
    weights = {base.name(site): base.weight(site).clone().requires_grad_() for site in sites}
    line, position = torch.nonzero(rows.labels >= 0, as_tuple=True)
    log_p = base.logits(rows, (line, position), weights).log_softmax(dim=-1)
    losses = -log_p.gather(1, rows.labels[line, position][:, None])[:, 0]
    wanted = torch.stack([losses[line == i].mean() for i in range(3)])
    assert torch.allclose(nll, wanted, atol=1e-5)
    wanted.sum().backward()
    for site, (keys, grads) in capture.factors().items():
        gradient = weights[base.name(site)].grad
        assert gradient is not None
        assert float((grads.T @ keys - gradient).norm() / gradient.norm()) < 1e-4, site
    answer = Capture(base, rows, sites, "answer")
    answer.forward()[0].sum().backward()
    assert len(answer.factors()[sites[0]].keys) == int((rows.labels >= 0).sum()) < len(keys)


# ---------------------------------------------------------------------- a training step


@pytest.mark.parametrize("kind", [MENDTraining, MALMENTraining])
def test_a_steps_gradient_is_that_of_its_loss(kind: type[HypernetworkTraining]) -> None:
    """Through the language model too: the step size's, and along a direction of all parameters."""
    module = training(kind, tokens="all")
    module.base.model.double()
    module.network.double()
    batch = triples()
    factors = {
        name: type(f)(*(part.double() for part in f)) for name, f in module.factors([t.edit for t in batch]).items()
    }
    for name, each in factors.items():
        module.network.observe(name, each)

    def weights() -> dict[str, Tensor]:
        made = {}
        for name, each in factors.items():
            left, right = module.network.update(name, each)
            made[name] = (module.base.weight(name).double() + left @ right.T).requires_grad_()
        return made

    for block in module.network.networks.modules():
        if hasattr(block, "up"):
            block.up.data += 0.01 * torch.randn_like(block.up)
    edited = weights()
    module.loss(batch, edited, backward=True)
    for name, each in factors.items():
        gradient = edited[name].grad
        assert gradient is not None
        module.network.backward(name, each, gradient)
    parameters = [p for p in module.network.parameters() if p.grad is not None]
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.abs().clamp(min=1e-3) for p in parameters]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, direction, strict=True) if p.grad is not None)
    found = []
    for sign in (1, -1):
        for p, d in zip(parameters, direction, strict=True):
            p.data += sign * 1e-4 * d
        found.append(module.loss(batch, weights(), backward=True)["loss"])
        for p, d in zip(parameters, direction, strict=True):
            p.data -= sign * 1e-4 * d
    assert slope == pytest.approx((found[0] - found[1]) / 2e-4, rel=2e-2)
    assert abs(slope) > 1e-4


def test_how_rows_are_shared_out_does_not_matter() -> None:
    found = []
    for budget in (1, 1000):
        module = training(MALMENTraining, max_tokens=budget)
        factors = module.factors([edit for edit in TRIPLES])
        keys = torch.cat([each.keys.T @ each.keys for each in factors.values()])
        weights = {name: module.base.master(name).clone().requires_grad_() for name in factors}
        losses = module.loss(triples(), weights, backward=True)
        grads = torch.cat([weight.grad.flatten() for weight in weights.values() if weight.grad is not None])
        found.append((keys, grads, losses))
    assert relative(found[0][0], found[1][0]) < 1e-5
    assert float((found[0][1] - found[1][1]).norm() / found[1][1].norm()) < 1e-5
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-5)
    assert found[0][2]["kl"] == pytest.approx(0, abs=1e-6), "nothing is edited yet"


@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_the_kl_by_hand(tokens: Tokens) -> None:
    """KL(before ‖ after), a mean over tokens; of the answer alone or of all of them."""
    module = training(MENDTraining, kl_tokens=tokens)
    base, name = module.base, module.base.name(Site(1))
    weights = {name: base.master(name) * 1.5}
    for rows in module.loss.rows([(one.unrelated, one.answer) for one in triples()[:2]]):
        found, _ = module.loss.kl(rows, weights)
        with torch.no_grad():
            ours = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}
            before = base.model(**ours).logits.log_softmax(dim=-1)
            base.model.get_parameter(name).mul_(1.5)
            after = base.model(**ours).logits.log_softmax(dim=-1)
            base.model.get_parameter(name).div_(1.5)
        kl = (before.exp() * (before - after)).sum(dim=-1)
        for i in range(len(rows)):
            where = rows.labels[i] >= 0 if tokens == "answer" else rows.attention_mask[i] > 0
            assert float(found[i]) == pytest.approx(float(kl[i, where].mean()), rel=1e-4)
            assert float(found[i]) > 1e-3


def trained(folder: Path, dtype: torch.dtype = torch.float32, **limits: Any) -> tuple[HypernetworkTraining, Path]:
    """Five triples an epoch, two batches an update, validated after every third batch."""
    torch.manual_seed(0)
    base = LanguageModel.wrap(tiny_base("gpt2").model.to(dtype), tiny_base("gpt2").tokenizer)
    module = MALMENTraining(base, [1, 2], **SMALL, edit_lr=0.01, meta_lr=1e-3, lr_lr=1e-3, accumulate=2)
    data = TripleData("jsonl", str(jsonl(folder / "e.jsonl", [e.as_record() for e in TRIPLES])), validation=1)
    keep = ModelCheckpoint(folder, "last")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    every = {"val_check_interval": 3, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    resumed = limits.pop("ckpt_path", None)
    made = Trainer(default_root_dir=folder, callbacks=[keep, KeepBest()], **quiet, **every, **limits)
    made.fit(module, data, ckpt_path=resumed)
    return module, folder / "last.ckpt"


def state(module: HypernetworkTraining) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.network.state_dict().items()}


def test_updates_are_accumulated_over_epochs_and_validations(tmp_path: Path) -> None:
    """Ten batches of two epochs are five updates, of the very batches that follow each other."""
    module, _ = trained(tmp_path, max_epochs=2)
    torch.manual_seed(0)
    hand = MALMENTraining(tiny_base("gpt2"), [1, 2], **SMALL, edit_lr=0.01, meta_lr=1e-3, lr_lr=1e-3, accumulate=2)
    hand.loss.budget = 64
    optimizer, batches = hand.configure_optimizers(), list[list[Triple]]()
    for epoch in range(2):
        progress = SimpleNamespace(current=SimpleNamespace(completed=0))
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
        at = SimpleNamespace(current_epoch=epoch, fit_loop=loop)
        data = TripleData("jsonl", str(tmp_path / "e.jsonl"), validation=1)
        data.trainer = cast("Any", at)
        data.setup("fit")
        batches += list(data.train_dataloader())
    assert [t.edit for b in batches[:5] for t in b] != [t.edit for b in batches[5:] for t in b], "in another order"
    for number, batch in enumerate(batches, 1):
        factors = hand.factors([triple.edit for triple in batch])
        for name, each in factors.items():
            hand.network.observe(name, each)
        weights = hand._edited(factors)
        hand.loss(batch, weights, backward=True)
        for name, each in factors.items():
            gradient = weights[name].grad
            assert gradient is not None
            hand.network.backward(name, each, gradient / 2)
        if number % 2 == 0:
            torch.nn.utils.clip_grad_norm_(hand.network.parameters(), hand.clip)
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(tensor, state(hand)[name]) for name, tensor in state(module).items())


def test_a_training_that_goes_on_is_one_that_never_stopped(tmp_path: Path) -> None:
    """Stopped in the middle of an epoch and of an update."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "half").mkdir()
    whole, _ = trained(tmp_path / "whole", max_epochs=2)
    _, checkpoint = trained(tmp_path / "half", max_steps=2)
    kept = torch.load(checkpoint, weights_only=True)
    assert kept["global_step"] == 1
    assert kept["gradients"], "the third batch waits for the fourth"
    resumed, _ = trained(tmp_path / "half", max_epochs=2, ckpt_path=checkpoint)
    assert all(torch.equal(tensor, state(resumed)[name]) for name, tensor in state(whole).items())


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    module, checkpoint = trained(tmp_path, max_steps=2)
    other = MALMENTraining(module.base, [2, 3], **SMALL, edit_lr=0.01)
    with pytest.raises(KeditError, match=r"expected a checkpoint of layers \[2, 3\], got one of \[1, 2\]"):
        other.on_load_checkpoint(torch.load(checkpoint, weights_only=True))


def test_the_best_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, keep = list[float](), KeepBest()
    monkeypatch.setattr(keep, "_write", lambda trainer, _: written.append(trainer.callback_metrics["validation/loss"]))
    for step, loss in enumerate((9.0, 3.0, 4.0, 2.0)):
        at = SimpleNamespace(callback_metrics={"validation/loss": loss}, global_step=step, log_dir=str(tmp_path))
        keep.on_validation_end(cast("Any", at), cast("Any", None))
    keep.on_train_end(cast("Any", at), cast("Any", None))
    assert written == [3.0, 2.0], "untrained ones are not"
    assert keep.words == "the best of 4 validations, validation/loss 2"
    went_on = KeepBest()
    (tmp_path / "old.safetensors").write_text("the best")
    went_on.load_state_dict({**keep.state_dict(), "file": str(tmp_path / "old.safetensors")})
    went_on.on_train_start(cast("Any", at), cast("Any", None))
    assert ((tmp_path / FILE).read_text(), went_on.best) == ("the best", 2.0)


def test_half_precision(tmp_path: Path) -> None:
    """Training in bfloat16 moves the network; float16 is refused."""
    module, _ = trained(tmp_path, torch.bfloat16, max_epochs=1)
    assert all(tensor.isfinite().all() for tensor in state(module).values())
    assert any(float(block.up.norm()) > 0 for block in module.network.networks.modules() if hasattr(block, "up"))
    base = LanguageModel.wrap(tiny_base("gpt2").model.half(), tiny_base("gpt2").tokenizer)
    with pytest.raises(KeditError, match="expected float32 or bfloat16 for MEND and MALMEN, got float16"):
        MALMENTraining(base, [1])


# ---------------------------------------------------------------------- editing


@pytest.mark.parametrize("name", ["MEND", "MALMEN"])
def test_the_update_is_the_closed_form_of_what_was_captured(name: str, tmp_path: Path) -> None:
    base, parts = tiny_base("gptj"), ("mlp_in", "mlp")
    editor = learned(name, base, (1, 2), parts)
    run = fit(editor, EDITS[:3], tmp_path, batch_size=3).run
    base.restore()
    network, tokens = editor.hypernetwork, editor.purpose.tokens  # type: ignore[attr-defined]
    capture = Capture(base, collate([base.encode(e.text, e.target_new) for e in EDITS[:3]]), editor.sites(), tokens)
    capture.forward()[0].sum().backward()
    for delta, (site, factors) in zip(run.commits()[0][1], capture.factors().items(), strict=True):
        left, right = network.update(base.name(site), factors)
        wanted = left @ right.T
        assert float((delta.update - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("name", ["MEND", "MALMEN"])
def test_parts_and_edits_side_by_side_are_the_same(name: str, tmp_path: Path) -> None:
    base = tiny_base("llama")
    whole = fit(learned(name, base, (1, 2)), EDITS[:4], tmp_path / "whole", batch_size=4).run.commits()[0][1]
    editor = learned(name, base, (1, 2))
    editor.max_tokens = 1
    parts = fit(editor, EDITS[:4], tmp_path / "parts", batch_size=4).run.commits()[0][1]
    for one, other in zip(whole, parts, strict=True):
        assert float((one.update - other.update).norm() / one.update.norm()) < 1e-4
    single = {"batch_size": 1, "restore_every": 1}
    alone = fit(learned(name, base, (1, 2)), EDITS[:3], tmp_path / "alone", parallel_edits=1, **single).run.commits()
    beside = fit(learned(name, base, (1, 2)), EDITS[:3], tmp_path / "beside", parallel_edits=3, **single).run.commits()
    for (_, one, _), (_, other, _) in zip(alone, beside, strict=True):
        for left, right in zip(one, other, strict=True):
            assert float((left.update - right.update).norm() / left.update.norm()) < 1e-4


def test_more_edits_than_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = learned("MALMEN", tiny_base("gpt2"), (1,))
    monkeypatch.setattr("kedit_lightning.hypernetworks.capture.free_memory", lambda _: 1000)
    with pytest.raises(KeditError, match=r"3 edits together need about .* set data.batch_size to at most 1"):
        fit(editor, EDITS[:3], tmp_path, batch_size=3)
    assert not list(tmp_path.rglob("*.safetensors"))
    data = TripleData("jsonl", str(jsonl(tmp_path / "e.jsonl", [edit.as_record() for edit in TRIPLES])), batch_size=3)
    data.edits = TRIPLES
    trainer = Trainer(default_root_dir=tmp_path, logger=False, enable_checkpointing=False, accelerator="cpu")
    with pytest.raises(KeditError, match=r"3 edits together need about .* set data.batch_size to at most 1"):
        trainer.fit(training(MALMENTraining), data)


# ---------------------------------------------------------------------- the commands


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "MEND"), ("gptj", "MALMEN"), ("llama", "MALMEN")])
def test_train_and_edit(family: str, kind: str, tmp_path: Path) -> None:
    base, records = (
        save_tiny(family, tmp_path / "base"),
        jsonl(tmp_path / "e.jsonl", [e.as_record() for e in TRIPLES * 2]),
    )
    config = write(
        tmp_path / "train.yaml",
        {
            "base": {"name": str(base)},
            "model": {"class_path": f"{kind}Training", "init_args": {"layers": [1, 2], **SMALL, "accumulate": 1}},
            "data": {"dataset": "jsonl", "path": str(records), "batch_size": 3, "validation": 3},
            "trainer": {
                "max_steps": 2,
                "val_check_interval": 1,
                "accelerator": "cpu",
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "logger": {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": {"save_dir": str(tmp_path), "name": "trained", "default_hp_metric": False},
                },
            },
        },
    )
    folder = tmp_path / "trained" / "version_0"
    assert done("fit", "--config", config).out.startswith(str(folder / FILE))
    assert list(folder.glob("events.out.tfevents*"))
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)  # no pickled objects
    assert checkpoint["global_step"] == 2
    assert all(name.startswith("network.") for name in checkpoint["state_dict"])
    done(
        "fit",
        "--config",
        config,
        "--trainer.max_steps",
        3,
        "--ckpt_path",
        folder / "checkpoints" / "last.ckpt",
    )

    edit = {"base": {"name": str(base)}, "data": {"edits": [e.as_record() for e in EDITS[:2]], "batch_size": 2}}
    edit["model"] = {"class_path": kind, "init_args": {"hypernetwork": str(tmp_path / "trained")}}  # the newest
    edit["trainer"] = {"save_dir": str(tmp_path), "enable_progress_bar": False, "evaluation": {"generation": False}}
    done("fit", "--config", write(tmp_path / "fit.yaml", edit))
    run = RunDirectory(tmp_path / "edits" / "version_0")
    assert [line["stages"][0]["converged"] for line in run.records()] == [True, True]
    assert run.read_json("run.json")["model.hypernetwork_sha256"]
    assert done("test", "--config", tmp_path / "fit.yaml", "--delta", run.path)


def test_the_files_are_the_same_again(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    path = hypernetwork(tmp_path, MENDNetwork, base, (1,))
    editor = MEND(base, str(tmp_path))
    for name, tensor in editor.hypernetwork.state_dict().items():
        assert torch.equal(tensor, load_file(path)[name])
    assert not any(p.requires_grad for p in editor.hypernetwork.parameters())


# ---------------------------------------------------------------------- bad input


def bad(tmp_path: Path, what: str) -> tuple[type[MEND | MALMEN], Path]:
    base = tiny_base("gpt2")
    if what == "none":
        return MEND, tmp_path / "nothing.safetensors"
    if what == "kind":
        return MALMEN, hypernetwork(tmp_path, MENDNetwork, base, (1,))
    if what == "untrained":
        return MALMEN, hypernetwork(tmp_path, MALMENNetwork, base, (1,), steps=0)
    if what == "foreign":
        return MALMEN, hypernetwork(tmp_path, MALMENNetwork, tiny_base("llama"), (1,))
    if what == "other":
        save_file({"a": torch.zeros(1)}, tmp_path / FILE)
        return MEND, tmp_path / FILE
    path = hypernetwork(tmp_path, MENDNetwork, base, (1,))
    content = bytearray(path.read_bytes())
    if what == "truncated":
        path.write_bytes(content[:-20])
    else:
        content[-3] ^= 255
        path.write_bytes(content)
    return MEND, path


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("none", "no such hypernetwork; `kedit fit --config configs/hypernetworks/"),
        ("kind", "expected a MALMENNetwork, got a MENDNetwork"),
        ("untrained", "untrained; `kedit fit --config configs/hypernetworks/…` trains one"),
        ("foreign", "was trained on another model"),
        ("other", r"format kedit-hypernetwork-2\), got a safetensors file of format none"),
        ("truncated", "the hypernetwork is corrupt or truncated"),
        ("flipped", "the checksum does not fit"),
    ],
)
def test_a_hypernetwork_that_does_not_fit_is_one_line(what: str, message: str, tmp_path: Path) -> None:
    kind, path = bad(tmp_path, what)
    with pytest.raises(KeditError, match=message) as raised:
        kind(tiny_base("gpt2"), str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("config", "more", "yes"),
    [
        ("model: {class_path: kedit_lightning.hypernetworks.training.MENDTraining}", [], True),
        ("model: MALMENTraining", [], True),
        ("model: {class_path: MALMEN}", [], False),
        ("trainer: {max_steps: 3}", [], False),
        ("trainer: {max_steps: 3}", ["--model", "MENDTraining"], True),
        ("trainer: {max_steps: 3}", ["--model={class_path: MENDTraining}"], True),
        ("model: {class_path: MALMEN}", ["--model.class_path=MALMENTraining"], True),
        ("model: MENDTraining", ["-c", "missing.yaml"], True),
        ("- no", [], False),
    ],
)
def test_what_fit_trains_and_what_it_edits(config: str, more: list[str], yes: bool, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(config)
    assert trains(["fit", f"--config={path}", *more]) == yes
    assert trains(["fit", "-c", str(path), *more]) == yes
    if yes:
        refused = kedit("plan", f"--config={path}", *more)
        assert (refused.status, refused.err.count("\n")) == (1, 1)
        assert "plan: expected the configuration of an editor, got one that trains a hypernetwork" in refused.err


@pytest.mark.parametrize("kind", ["missing", "damaged"])
def test_a_checkpoint_that_cannot_be_gone_on_with_is_one_line(kind: str, tmp_path: Path) -> None:
    base, path = save_tiny("gpt2", tmp_path / "base"), tmp_path / "x.ckpt"
    if kind == "damaged":
        path.write_bytes(b"x" * 100)
    records = jsonl(tmp_path / "e.jsonl", [e.as_record() for e in TRIPLES])
    config = {
        "base": {"name": str(base)},
        "model": {"class_path": "MENDTraining", "init_args": {"layers": [1], **SMALL}},
        "data": {"dataset": "jsonl", "path": str(records), "validation": 1},
        "trainer": {"default_root_dir": str(tmp_path / "logs"), "accelerator": "cpu"},
    }
    result = kedit("fit", "--config", write(tmp_path / "t.yaml", config), "--ckpt_path", path)
    assert (result.status, result.err.count("\n")) == (1, 1), result.err
    assert f"{path}: expected the checkpoint of a training" in result.err
    assert not (tmp_path / "logs").exists()


def test_the_command_says_it_in_one_line(tmp_path: Path) -> None:
    base = save_tiny("gpt2", tmp_path / "base")
    model = {"class_path": "MEND", "init_args": {"hypernetwork": str(tmp_path / "none")}}
    config = write(tmp_path / "fit.yaml", {"base": {"name": str(base)}, "model": model})
    result = kedit("fit", "--config", config, "--trainer.save_dir", tmp_path / "logs")
    assert result.status == 1
    assert result.err.count("\n") == 1
    assert "no such hypernetwork" in result.err
    assert not (tmp_path / "logs").exists()
    result = kedit("fit", "--config", config, "--model.init_args.compress.gamma", 80)
    assert result.status == 2
    assert "optimises no value that could be compressed" in result.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": ("mlp_in", "mlp"), "networks": "all"}, "networks: expected matrices of one shape"),
        ({"accumulate": 0}, "accumulate and max_tokens of at least 1"),
        ({"meta_lr": 0.0}, "expected positive numbers"),
        ({"layers": [2, 1]}, "expected layers"),
    ],
)
def test_settings_that_cannot_be_trained_with(settings: dict[str, Any], message: str) -> None:
    base = tiny_base("gpt2")
    with pytest.raises(KeditError, match=message):
        MALMENTraining(base, **({"layers": [1]} | settings))


def test_an_architecture_without_its_up_projection() -> None:
    from dataclasses import replace

    base = tiny_base("gpt2")
    base.architecture = replace(base.architecture, mlp_in="")
    parts: tuple[Part, ...] = ("mlp_in",)
    with pytest.raises(KeditError, match=r"base.architecture.mlp_in: expected the path"):
        MALMENTraining(base, [1], parts=parts)


# ---------------------------------------------------------------------- triples


def test_records_without_paraphrase_or_unrelated_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(complete(EDITS, "skip")) == len(TRIPLES)
    assert "left out 1 of 7 records" in caplog.text
    with pytest.raises(DataError, match=r"case 6 has no paraphrase_prompts and no neighborhood_prompts with an answer"):
        complete(EDITS, "raise")
    with pytest.raises(DataError, match="none of 1 records"):
        complete(EDITS[6:], "skip")
    path = jsonl(tmp_path / "e.jsonl", [edit.as_record() for edit in EDITS])
    with pytest.raises(DataError, match="at least 6 edits for validation and 1 for a step, got 6"):
        TripleData("jsonl", str(path), validation=6, on_incomplete="skip").setup("fit")


def test_zsre_is_triples(tmp_path: Path) -> None:
    record = {
        "subject": "Velora Quint", "src": "Where was Velora Quint born?", "rephrase": "Velora Quint's town is?",
        "answers": ["Tessaro"], "alt": "Ulm", "loc": "nq question: who rings the bells", "loc_ans": "Tobin",
    }  # fmt: skip
    (tmp_path / "z.json").write_text(json.dumps([record] * 3))
    data = TripleData("zsre", str(tmp_path / "z.json"), options={"target": "alt"}, validation=1)
    data.setup("fit")
    (triple,) = next(iter(data.train_dataloader()))
    assert (triple.edit.target_new, triple.paraphrase) == ("Ulm", "Velora Quint's town is?")
    assert (triple.unrelated, triple.answer) == ("nq question: who rings the bells?", "Tobin")


def test_facts_to_train_on_are_disjoint_from_those_to_edit() -> None:
    trained = TripleData(options={"skip_subjects": 1000, "facts_per_subject": 8}, validation=200)
    edited = EditDataModule(stop=1000)
    for data in (trained, edited):
        data.setup("fit")
    subjects = {edit.subject for edit in trained.edits}
    assert len(edited.edits) == len(subjects) == 1000
    assert not subjects & {edit.subject for edit in edited.edits}
    validation = {edit.subject for edit in trained.edits[-200:]}
    assert len(validation & {edit.subject for edit in trained.edits[:-200]}) <= 1
    with pytest.raises(DataError, match="skip_subjects from 0 to 1999"):
        TripleData(options={"skip_subjects": 5000}).setup("fit")
