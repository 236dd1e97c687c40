from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kedit_lightning import commands
from kedit_lightning import delta as delta_files
from kedit_lightning.delta import WeightDelta
from kedit_lightning.errors import KeditError
from kedit_lightning.models import LanguageModel
from tests.families import save_tiny, tiny_base
from tests.updates import bits, dense, disk_full, logits, low_rank, metadata, same_bits, write_run


def reload(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def replayed(base: LanguageModel, deltas: list[WeightDelta]) -> dict[str, torch.Tensor]:
    """The bits of a fresh base model after some updates, in order."""
    base.restore()
    for delta in deltas:
        base.write(delta.name, delta.update)
    found = bits(base)
    base.restore()
    return found


class Run:
    """A run of three edits and a fourth of two parts, after an edit that was restored away."""

    def __init__(self, folder: Path, family: str = "gpt2") -> None:
        self.base = LanguageModel(str(save_tiny(family, folder / "base")))
        low = [low_rank(self.base, 1 + seed % 2, seed, rank=1 + seed) for seed in range(4)]
        self.deltas = {9: [low[0]], 0: [low[1]], 11: [low[2], dense(self.base, 1)], 2: [low[3]]}
        commits = [([case], int(case != 9), deltas) for case, deltas in self.deltas.items()]
        self.path = write_run(folder / "run", self.base, commits).path

    def after(self, *cases: int) -> dict[str, torch.Tensor]:
        return replayed(self.base, [delta for case in cases for delta in self.deltas[case]])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def written(folder: Path) -> dict[str, torch.Tensor]:
    return dict(reload(folder).named_parameters())


# ---------------------------------------------------------------------- apply


def test_applying_a_run_gives_the_bits_it_ended_with(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, family)
    commands.apply(run.path, out=tmp_path / "out")
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert str(tmp_path / "out") in said
    assert "3 edits" in said
    expected = run.after(0, 11, 2)
    assert same_bits(written(tmp_path / "out"), expected)
    assert not same_bits(run.after(), expected)
    for delta in (delta for case in (0, 11, 2) for delta in run.deltas[case]):
        run.base.write(delta.name, delta.update)
    assert torch.equal(logits(reload(tmp_path / "out"), run.base), logits(run.base.model, run.base))


def test_applying_a_file_gives_that_file(tmp_path: Path, run: Run) -> None:
    commands.apply(run.path / "deltas" / "000002.safetensors", out=tmp_path / "out", model=str(tmp_path / "base"))
    assert same_bits(written(tmp_path / "out"), run.after(11))


def test_applying_as_lora(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    commands.apply(run.path / "deltas" / "000003.safetensors", out=tmp_path / "out", format="lora")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    assert "LoRA" in capsys.readouterr().out
    with pytest.raises(KeditError, match=r"dense.*--format hf"):
        commands.apply(run.path, out=tmp_path / "none", format="lora")
    assert not (tmp_path / "none").exists()


def test_the_dtype_is_that_of_the_run_unless_given(tmp_path: Path) -> None:
    base = LanguageModel(str(save_tiny("gpt2", tmp_path / "base")), dtype="bfloat16")
    deltas = [low_rank(base, 1, seed) for seed in range(3)]
    about = metadata(base, dtype="bfloat16")
    delta_files.save(tmp_path / "d.safetensors", deltas, about)
    commands.apply(tmp_path / "d.safetensors", out=tmp_path / "out")
    assert same_bits(written(tmp_path / "out"), replayed(base, deltas))
    assert reload(tmp_path / "out").dtype == torch.bfloat16
    base = LanguageModel(str(save_tiny("gpt2", tmp_path / "half", dtype=torch.bfloat16)))
    delta_files.save(tmp_path / "d.safetensors", deltas, metadata(base, dtype="bfloat16"))
    commands.apply(tmp_path / "d.safetensors", out=tmp_path / "float", dtype="float32")
    assert same_bits(written(tmp_path / "float"), replayed(base, deltas))


def test_another_model_is_refused(tmp_path: Path, run: Run) -> None:
    for other in (save_tiny("gpt2", tmp_path / "seed", seed=1), save_tiny("llama", tmp_path / "llama")):
        for command in (commands.apply, commands.revert):
            with pytest.raises(KeditError, match="another model") as error:
                command(run.path, out=tmp_path / "out", model=str(other))
            assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_applied_is_one_clear_line(tmp_path: Path, run: Run) -> None:
    def refused(path: Path, words: str, **options: Any) -> None:
        with pytest.raises(KeditError, match=words) as error:
            commands.apply(path, **{"out": tmp_path / "out"} | options)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()

    refused(tmp_path / "none", "no such delta file")
    refused(tmp_path / "base", "expected a run directory")
    refused(tmp_path / "base" / "model.safetensors", "expected a delta file")
    refused(run.path, "holds something", out=tmp_path / "base")
    refused(run.path, "cannot load", model=str(tmp_path / "nowhere"))
    nameless = tmp_path / "nameless.safetensors"
    delta_files.save(nameless, [], metadata(run.base) | {"base": ""})
    refused(nameless, "give --model")
    file = run.path / "deltas" / "000003.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    refused(run.path, "corrupt or truncated")
    file.write_bytes(content)
    with disk_full(50_000):
        refused(run.path, "cannot be written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "nameless.safetensors", "run"]


def test_the_almanac_is_found_wherever_it_was_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    class Found(Exception):
        pass

    def load(name: str, **_: Any) -> None:
        asked.append(name)
        raise Found

    monkeypatch.setattr(commands, "LanguageModel", load)
    for stored, options, expected in (
        ("/old/venv/site-packages/kedit_lightning/almanac/model", {}, "almanac"),
        ("almanac", {}, "almanac"),
        ("/models/almanac/model", {}, "/models/almanac/model"),
        ("gpt2-xl", {"model": "/copy/kedit_lightning/almanac/model"}, "/copy/kedit_lightning/almanac/model"),
    ):
        delta_files.save(tmp_path / "d.safetensors", [], {"base": stored})
        with pytest.raises(Found):
            commands.apply(tmp_path / "d.safetensors", out=tmp_path / "out", **options)  # type: ignore[arg-type]
        assert asked.pop() == expected


# ---------------------------------------------------------------------- revert


@pytest.mark.parametrize(("case", "others"), [(0, (11, 2)), (11, (0, 2)), (2, (0, 11))])
def test_undoing_an_edit_is_the_replay_of_the_others(
    tmp_path: Path, run: Run, case: int, others: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    commands.revert(run.path, out=tmp_path / "out", edit=str(case), no_evaluate=True)
    assert same_bits(written(tmp_path / "out"), run.after(*others))
    assert f"without edit {case}" in capsys.readouterr().out


def test_undoing_all_gives_the_pristine_bits(family: str, tmp_path: Path) -> None:
    run = Run(tmp_path, family)
    commands.revert(run.path, out=tmp_path / "out")
    assert same_bits(written(tmp_path / "out"), bits(tiny_base(family)))


def test_undoing_the_only_edit_gives_the_pristine_bits(tmp_path: Path) -> None:
    base = LanguageModel(str(save_tiny("gpt2", tmp_path / "base")))
    run = write_run(tmp_path / "run", base, [([3], 0, [low_rank(base, 1)])])
    commands.revert(run.path, out=tmp_path / "out", edit="3", no_evaluate=True)
    assert same_bits(written(tmp_path / "out"), bits(base))


def test_an_edit_that_cannot_be_undone_is_one_clear_line(tmp_path: Path, run: Run) -> None:
    def refused(path: Path, case: int, words: str) -> None:
        with pytest.raises(KeditError, match=words) as error:
            commands.revert(path, out=tmp_path / "out", edit=str(case), no_evaluate=True)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()

    refused(run.path, 77, "no edit has case id 77; there are cases 9, 0, 11, 2$")
    refused(run.path, 9, "case 9 is not in the model that the run ended with, which holds cases 0, 11, 2")
    many = [low_rank(run.base, 1, seed, rank=2) for seed in range(3)]
    together = write_run(tmp_path / "together", run.base, [([4, 5, 6], 0, many), (list(range(20, 40)), 0, many)])
    refused(together.path, 5, r"case 5 was solved together with cases 4, 6 \(commit 0\).*batch_size 1")
    refused(together.path, 20, r"together with cases 21, .* 30 and 9 more \(commit 1\)")
    refused(run.path / "deltas" / "000003.safetensors", 2, "expected a run directory")
