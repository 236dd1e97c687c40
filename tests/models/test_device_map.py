"""Base models spread by a device map, over main memory and disk: they read, add, write and edit as whole ones do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader
from safetensors.torch import load_file
from torch import Tensor

from kedit_lightning.delta import WeightDelta
from kedit_lightning.edits import Site
from kedit_lightning.errors import KeditError, ModelError
from kedit_lightning.export import write_model
from kedit_lightning.models import Batch, LanguageModel, collate
from kedit_lightning.models.fingerprint import fingerprint, fingerprint_below
from kedit_lightning.models.loading import DeviceMap
from kedit_lightning.models.offloading import device_of, not_held
from kedit_lightning.models.suffix import SuffixForward
from kedit_lightning.trainer import EditTrainer
from tests.commandline import World, kedit, write
from tests.families import LAYERS, WIDTH, save_tiny, tiny_base

SOME = ("gpt2", "gptj", "llama", "gemma2")
HIGH, LOW = Site(2, "mlp"), Site(1, "attn")
ON_DISK = (Site(1, "mlp"), Site(3, "mlp"))


@pytest.fixture(scope="module", params=SOME)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of some families in turn, on disk."""
    return save_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 on disk."""
    return save_tiny("gpt2", tmp_path_factory.mktemp("gpt2"))


def every_other(base: LanguageModel) -> dict[str, int | str]:
    """Odd layers on disk, all else in main memory."""
    above, _, layers = base.architecture.layers.rpartition(".")
    names = [name for name, _ in base.model.named_children() if name != above]
    names += [f"{above}.{name}" for name, _ in base.model.get_submodule(above).named_children() if name != layers]
    at = {f"{above}.{layers}.{i}": "disk" if i % 2 else "cpu" for i in range(LAYERS)}
    return dict.fromkeys(names, "cpu") | at


def in_main_memory(base: LanguageModel) -> LanguageModel:
    """The model offloaded as one is that waits in main memory for a GPU; the CPU stands for the GPU."""
    return LanguageModel.wrap(accelerate.cpu_offload(base.model, "cpu"), base.tokenizer)


PLACED: dict[str, Callable[[str], LanguageModel]] = {
    "cpu": lambda name: LanguageModel(name, device_map="cpu"),
    "auto": lambda name: LanguageModel(name, device_map="auto"),
    "disk": lambda name: LanguageModel(name, device_map="disk"),
    "some_on_disk": lambda name: LanguageModel(name, device_map=every_other(LanguageModel(name))),
    "main_memory": lambda name: in_main_memory(LanguageModel(name)),
}
OFFLOADED = ("disk", "some_on_disk", "main_memory")


def offloaded(base: LanguageModel) -> set[str]:
    return {name for name, parameter in base.model.named_parameters() if parameter.is_meta}


def rows_of(base: LanguageModel) -> Batch:
    return collate(
        [
            base.encode("The mother tongue of Velora Quint is", " Tessaro"),
            base.encode("Where does Oskel Tamrin live? In", " Ulm"),
        ]
    )


def all_of(base: LanguageModel) -> list[Tensor]:
    """Logits, what is read, keys, and the loss and gradients of a suffix from one layer and another on."""
    rows, at = rows_of(base), torch.tensor([3, 2])
    read, keys = base.read(rows, {HIGH: at, LOW: at + 1}), base.keys(rows, {HIGH: at})
    found = [base.logits(rows), *read.values(), *keys.values()]
    with base.add(LOW, at, torch.ones(2, WIDTH)):
        found.append(base.logits(rows))
    added = {site: torch.full((2, WIDTH), 0.3, requires_grad=True) for site in (LOW, HIGH)}
    suffix = SuffixForward(base, rows, {LOW: at, HIGH: at + 1})
    logits = suffix.logits(added, (torch.tensor([0, 1]), at + 2))
    return [*found, logits.detach(), *torch.autograd.grad(logits.logsumexp(-1).sum(), list(added.values()))]


@pytest.mark.parametrize("placement", PLACED)
def test_a_spread_model_computes_what_a_whole_one_does(folder: Path, placement: str) -> None:
    base = PLACED[placement](str(folder))
    assert bool(offloaded(base)) == (placement in OFFLOADED)
    assert (base.device, base.dtype) == (torch.device("cpu"), "float32")
    for found, expected in zip(all_of(base), all_of(LanguageModel(str(folder))), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert bool(offloaded(base)) == (placement in OFFLOADED), "reading brings nothing for good"


@pytest.mark.parametrize("placement", OFFLOADED)
def test_offloaded_weights_are_written_and_given_back(folder: Path, placement: str) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    base, whole = PLACED[placement](str(folder)), LanguageModel(str(folder))
    names = [whole.name(site) for site in ON_DISK]
    assert set(names) <= offloaded(base)
    rows, raw = rows_of(whole), whole.logits(rows_of(whole))
    update = torch.randn(whole.weight(names[0]).shape, generator=torch.Generator().manual_seed(0)) / 8
    for one in (base, whole):
        one.write(names[0], update)
        with pytest.raises(ModelError, match="expected an update of shape"), one.transaction():  # noqa: PT012 - two steps
            one.write(names[1], update)
            one.write(names[1], update[1:])
        one.write(names[1], -update)
    edited = whole.logits(rows)
    assert not torch.allclose(edited, raw)
    for _ in range(2):  # a value that is read anew for each pass would be lost by the second
        assert torch.equal(base.logits(rows), edited)
    assert torch.equal(base.weight(names[0]), whole.weight(names[0]))
    with base.unedited():
        assert torch.equal(base.logits(rows), raw)
    assert torch.equal(base.logits(rows), edited)
    base.restore()
    assert torch.equal(base.logits(rows), raw)
    assert offloaded(base), "what is not edited stays offloaded"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_half_precision_keeps_its_master(gpt2: Path) -> None:
    base, whole = (LanguageModel(str(gpt2), "bfloat16", device_map=place) for place in ("disk", None))
    name, rows = whole.name(HIGH), rows_of(whole)
    assert base.dtype == "bfloat16"
    for one in (base, whole):
        for _ in range(3):
            one.write(name, torch.full(one.weight(name).shape, 1e-3))
    assert torch.equal(base.master(name), whole.master(name))
    assert torch.equal(base.logits(rows), whole.logits(rows))


def test_weights_in_place_of_offloaded_ones_have_gradients(folder: Path) -> None:
    gradients = []
    for base in (LanguageModel(str(folder), device_map="disk"), LanguageModel(str(folder))):
        value = (base.weight(HIGH).detach() * 1.5).requires_grad_()
        loss = base.logits(rows_of(base), weights={base.name(HIGH): value}).logsumexp(-1).sum()
        gradients.append(torch.autograd.grad(loss, value)[0])
    assert torch.equal(*gradients)


def test_a_graph_brings_offloaded_weights_again_instead_of_holding_them(folder: Path) -> None:
    base, at, read = LanguageModel(str(folder), device_map="disk"), torch.tensor([3, 2]), []
    value = torch.zeros(2, WIDTH, requires_grad=True)
    suffix = SuffixForward(base, rows_of(base), {LOW: at})
    get = OffloadedWeightsLoader.__getitem__
    with mock.patch.object(OffloadedWeightsLoader, "__getitem__", lambda self, key: read.append(key) or get(self, key)):
        loss = suffix.logits({LOW: value}, (torch.tensor([0, 1]), at + 2)).sum()
        forward = set(read)
        read.clear()
        loss.backward()
    mlps = [base.name(Site(layer, "mlp")) for layer in range(LAYERS)]
    assert mlps[0] not in forward, "layers below are not even brought"
    assert {*mlps[2:]} <= forward
    assert {*mlps[2:]} <= {*read}, "and again in the backward pass"
    with torch.no_grad(), not_held(base.model):
        assert not base.layers[0].get_submodule(base.architecture.mlp_out)._forward_pre_hooks, "nothing to hold"


def test_a_spread_model_is_the_same_model(gpt2: Path) -> None:
    base, whole = LanguageModel(str(gpt2), device_map="disk"), LanguageModel(str(gpt2))
    assert fingerprint(base, [base.name(HIGH)]) == fingerprint(whole, [whole.name(HIGH)])
    assert fingerprint_below(base, 2) == fingerprint_below(whole, 2)
    assert offloaded(base) == set(dict(base.model.named_parameters())), "they were read for the moment"


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_it_is_saved_whole(gpt2: Path, tmp_path: Path) -> None:
    update = torch.ones(LanguageModel(str(gpt2)).weight(HIGH).shape) / 8
    for name, device_map in (("spread", "disk"), ("whole", None)):
        base = LanguageModel(str(gpt2), device_map=device_map)
        write_model(base, [WeightDelta(base.name(HIGH), dense=update)], tmp_path / name)
    spread, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("spread", "whole"))
    assert spread.keys() == whole.keys()
    assert all(torch.equal(spread[key], whole[key]) for key in whole)


def test_nothing_moves_a_placed_model(gpt2: Path) -> None:
    base = LanguageModel(str(gpt2), device_map="auto")
    assert base.to(torch.device("meta")).device == torch.device("cpu")


def test_a_device_that_runs_offloaded_blocks_is_theirs() -> None:
    block = tiny_base("gpt2").layers[0]
    accelerate.cpu_offload(block, torch.device("meta"))
    for module in block.modules():
        if hasattr(module, "_hf_hook"):
            module._hf_hook.execution_device = 0
    with mock.patch.object(torch, "device", lambda index: f"accelerator {index}"):
        assert device_of(block) == "accelerator 0"


# ---------------------------------------------------------------------- what cannot be done


@pytest.mark.parametrize(
    ("device_map", "said"),
    [
        ("cuda:3", r"expected auto, .* a device of this machine \(cpu, disk.*\), or .*, got 'cuda:3'"),
        ({"": 7}, "of this machine .* got 7"),
        ({"": "gpu"}, "of this machine .* got 'gpu'"),
        ({"": "auto"}, "of this machine .* got 'auto'"),
        ("meta", "of this machine .* got 'meta'"),
        ({"": "cpu", "transformer.blocks.3": "cpu"}, "names of modules .* such as .*, got 'transformer.blocks.3'"),
        ({"transformer.h": "disk", "lm_head": "cpu"}, "does not give any device for .*: transformer.wte.weight"),
        ({"": "cpu", "transformer.h.3": "disk"}, "names a module and, elsewhere, a part of it"),
        ({"transformer": "disk", "lm_head": "cpu"}, "a weight tied to it"),
    ],
)
def test_a_map_that_cannot_be_followed_is_one_line(tmp_path: Path, device_map: DeviceMap, said: str) -> None:
    with pytest.raises(ModelError, match=said) as error:
        LanguageModel(str(save_tiny("gpt2", tmp_path)), device_map=device_map)
    assert "\n" not in str(error.value)


def test_without_accelerate_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kedit_lightning.models.loading.find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"needs accelerate: pip install 'kedit_lightning\[device_map\]'"):
        LanguageModel(device_map="auto")
    assert LanguageModel().device.type == "cpu"


def test_only_safetensors_files_are_offloaded_to_disk(tmp_path: Path) -> None:
    weights = load_file(save_tiny("gpt2", tmp_path) / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=f"cannot load the weights of {str(tmp_path)!r}: only weights in safetensors"):
        LanguageModel(str(tmp_path), device_map="disk")


def test_weights_without_values_are_named() -> None:
    base = tiny_base("gpt2")
    base.model.to("meta")
    with pytest.raises(ModelError, match=r"the weight of a Conv1D has no values .* base\.device_map, or"):
        base.master(base.name(HIGH))


def test_several_processes_are_refused(gpt2: Path) -> None:
    base = LanguageModel(str(gpt2), device_map="cpu")
    base.check_processes(1)
    LanguageModel(str(gpt2)).check_processes(2)
    with pytest.raises(ModelError, match=r"base\.device_map: expected one process, got 2, .* trainer\.devices"):
        base.check_processes(2)


# ---------------------------------------------------------------------- from the command line


def config(world: World, editor: str) -> Path:
    content = {
        "base": {"name": str(world.base)},
        "model": {"class_path": editor, "init_args": EDITORS[editor]},
        "data": {"edits": world.edits[:2], "batch_size": 2 if editor == "MEMIT" else 1},
        "trainer": {"save_dir": str(world.logs), "evaluate": False, "enable_progress_bar": False},
    }
    if editor != "FT":
        statistics = {"source": str(world.corpus), "tokens": 300}
        shared = {"context_templates": {"templates": [["{}", "Yes. {}"]]}, "statistics": statistics}
        content["model"]["init_args"] = EDITORS[editor] | shared
    return write(world.folder / f"{editor}.yaml", content)


EDITORS: dict[str, dict[str, Any]] = {
    "ROME": {"layers": [1], "v_num_grad_steps": 4},
    "MEMIT": {"layers": [1, 2], "v_num_grad_steps": 4, "mom2_update_weight": 10},
    "FT": {"layers": [1], "num_steps": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("editor", EDITORS)
def test_a_spread_model_is_edited_as_a_whole_one(world: World, editor: str) -> None:
    path = config(world, editor)
    spread = every_other(LanguageModel(str(world.base)))
    placed = write(world.folder / "placed.yaml", {"base": {"name": str(world.base), "device_map": spread}})
    whole = world.fit(path, name=f"{editor}_whole")
    mapped = world.fit(path, "--config", placed, "--trainer.accelerator", "auto", name=f"{editor}_mapped")
    expected = load_file(whole / "delta.safetensors")
    found = load_file(mapped / "delta.safetensors")
    assert expected
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0)
    assert any(float(value.abs().max()) > 0 for value in expected.values())


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_3", "ddp_spawn", "ddp_fork", "xla", "best"])
def test_a_strategy_that_cannot_work_is_one_sentence(strategy: str) -> None:
    with pytest.raises(KeditError, match=f"trainer.strategy: expected auto or ddp, got {strategy}: ") as error:
        EditTrainer(strategy=strategy)
    assert ("nothing to shard" in str(error.value)) == (not strategy.startswith("ddp_"))


def test_deepspeed_is_refused_whether_it_is_installed_or_not(world: World) -> None:
    result = kedit("fit", "--config", config(world, "ROME"), "--trainer.strategy=deepspeed", "--trainer.name=never")
    assert result.status == 1
    (line,) = result.err.strip().splitlines()
    assert "trainer.strategy: expected auto or ddp, got deepspeed: there is nothing to shard" in line
    assert not (world.logs / "never").exists()


def test_statistics_of_a_spread_model_are_made_by_one_process(world: World) -> None:
    several = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu"]
    result = kedit("statistics", "--config", config(world, "ROME"), "--base.device_map=cpu", *several)
    assert result.status == 1
    assert "base.device_map: expected one process, got 2" in result.err
