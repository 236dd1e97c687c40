import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kedit_lightning.delta import WeightDelta
from kedit_lightning.errors import DeltaError, KeditError
from kedit_lightning.export import write_lora, write_model
from kedit_lightning.models import LanguageModel
from tests.families import save_tiny, tiny_base
from tests.updates import bits, dense, disk_full, logits, low_rank, same_bits


def edited_logits(base: LanguageModel, deltas: list[WeightDelta]) -> torch.Tensor:
    for delta in deltas:
        base.write(delta.name, delta.update)
    result = logits(base.model, base)
    base.restore()
    return result


def reload(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


# ---------------------------------------------------------------------- checkpoints


def test_a_checkpoint_is_the_edited_model_in_plain_hugging_face(family: str, tmp_path: Path) -> None:
    base = tiny_base(family)
    raw = logits(base.model, base)
    deltas = [low_rank(base, 1), dense(base, 2), low_rank(base, 1, 1, rank=3)]
    expected = edited_logits(base, deltas)
    write_model(base, deltas, tmp_path / "out")
    model = reload(tmp_path / "out")
    assert torch.equal(logits(model, base), expected)
    assert not torch.allclose(expected, raw, atol=1e-3)
    assert {name: torch.equal(value, bits(base)[name]) for name, value in model.named_parameters()} == dict.fromkeys(
        bits(base), True
    )
    text = "Oskel Tamrin plays the flute"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == base.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_has_the_dtype_of_the_base(tmp_path: Path, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    base = LanguageModel(str(save_tiny("llama", tmp_path / "base", dtype=dtype)), dtype=name)  # type: ignore[arg-type]
    deltas = [low_rank(base, 1, seed) for seed in range(3)]
    write_model(base, deltas, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    exact = base.pristine(deltas[0].name).float() + sum(delta.update for delta in deltas)
    torch.testing.assert_close(found[deltas[0].name], exact.to(dtype), rtol=0, atol=0)


def test_a_tokenizer_may_save_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("gpt2")
    templates = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    monkeypatch.setattr(base.tokenizer, "chat_template", templates, raising=False)
    write_model(base, [], tmp_path / "out")
    (template,) = (tmp_path / "out" / "additional_chat_templates").iterdir()
    assert template.read_text() == "{{ tools }}"


def test_a_checkpoint_goes_into_an_empty_folder_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_base("gpt2")
    (tmp_path / "empty").mkdir()
    write_model(base, [], tmp_path / "empty")
    assert capsys.readouterr().err == "", "no progress bar of transformers' own"
    assert torch.equal(logits(reload(tmp_path / "empty"), base), logits(base.model, base))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    (tmp_path / "file").write_text("mine")
    for write in (write_model, write_lora):
        with pytest.raises(KeditError, match=r"new or empty folder.*holds something"):
            write(base, [low_rank(base, 0)], tmp_path / "empty")
        with pytest.raises(KeditError, match="this is a file"):
            write(base, [low_rank(base, 0)], tmp_path / "file")
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted([*before, "file"])
    assert (tmp_path / "file").read_text() == "mine"


def test_everybody_may_read_what_anybody_may(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    write_model(base, [], tmp_path / "out")
    (tmp_path / "plain").write_text("")
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode, path


@pytest.mark.parametrize("room", [0, 1000, 60_000])
def test_a_full_disk_leaves_nothing(tmp_path: Path, room: int) -> None:
    base = tiny_base("gpt2")
    pristine = bits(base)
    for write, deltas in ((write_model, [dense(base, 0)]), (write_lora, [low_rank(base, 0, rank=20)])):
        with disk_full(min(room, 60_000 if write is write_model else 1000)), pytest.raises(KeditError) as error:
            write(base, deltas, tmp_path / "out")
        assert "cannot be written" in str(error.value)
        assert "\n" not in str(error.value)
        assert list(tmp_path.iterdir()) == []
        assert same_bits(bits(base), pristine), "a model that was not written is not edited either"


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("gpt2")
    pristine = bits(base)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(base.tokenizer), "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_model(base, [dense(base, 0)], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert same_bits(bits(base), pristine)


# ---------------------------------------------------------------------- LoRA


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.*:FutureWarning")  # peft 0.21 on transformers 5.23
@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
def test_peft_gives_the_edited_logits(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / "base")
    base = LanguageModel(str(folder))
    deltas = [low_rank(base, 1), low_rank(base, 2, 1, rank=3), low_rank(base, 1, 2)]
    expected, raw = edited_logits(base, deltas), logits(base.model, base)
    write_lora(base, deltas, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    assert sorted(config["rank_pattern"].values()) == [2, 3]
    assert config["fan_in_fan_out"] is (family == "gpt2")
    adapted = PeftModel.from_pretrained(reload(folder), str(tmp_path / "lora"))
    torch.testing.assert_close(logits(adapted, base), expected, rtol=1e-4, atol=1e-4)
    assert (expected - raw).abs().max() > 0.1
    assert len([name for name, _ in adapted.named_modules() if name.endswith("lora_A.default")]) == 2
    torch.testing.assert_close(logits(adapted.merge_and_unload(), base), expected, rtol=1e-4, atol=1e-4)


def test_lora_factors_are_balanced(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    delta = low_rank(base, 1, rank=4)
    assert delta.left is not None
    delta.left[:, 2] = 0
    write_lora(base, [delta], tmp_path / "lora")
    found = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    module = f"base_model.model.{delta.name.removesuffix('.weight')}"
    a, b = found[f"{module}.lora_A.weight"], found[f"{module}.lora_B.weight"]
    assert (a.shape, b.shape) == ((4, 128), (32, 4))
    kept = [0, 1, 3]
    torch.testing.assert_close(a[kept].norm(dim=1), b[:, kept].norm(dim=0))
    torch.testing.assert_close(b @ a, delta.update)
    assert a.isfinite().all()


def test_a_dense_update_is_no_lora(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    many = [low_rank(base, 1, seed) for seed in range(30)]
    for deltas in ([dense(base, 1)], many, [low_rank(base, 1), dense(base, 1)]):
        with pytest.raises(DeltaError, match=r"transformer\.h\.1\.mlp\.c_proj\.weight is dense.*--format hf"):
            write_lora(base, deltas, tmp_path / "lora")
    with pytest.raises(DeltaError, match="at least one update"):
        write_lora(base, [], tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []
