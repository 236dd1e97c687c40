import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kedit_lightning import delta as delta_files
from kedit_lightning.delta import WeightDelta
from kedit_lightning.errors import DeltaError, KeditError
from kedit_lightning.models import LanguageModel
from kedit_lightning.writing import write_beside
from tests.families import tiny_base
from tests.updates import bits, dense, disk_full, low_rank, metadata, same_bits


def one_line(error: pytest.ExceptionInfo[Exception], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def deltas_of(base: LanguageModel) -> list[WeightDelta]:
    return [low_rank(base, 1), low_rank(base, 2, 1, rank=3), low_rank(base, 1, 2), dense(base, 2)]


@pytest.mark.parametrize("rank", [1, 2, 7, 25, 26, 40])
def test_low_rank_is_kept_in_factors_only_where_that_is_smaller(rank: int) -> None:
    out, inner = 32, 128
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(inner, rank, generator=generator, dtype=torch.float64)
    delta = WeightDelta.low_rank("w", left, right)
    assert (delta.dense is not None) == (rank * (out + inner) > out * inner)
    assert delta.shape == (out, inner)
    assert all(tensor.dtype == torch.float32 for tensor in delta.tensors.values())
    torch.testing.assert_close(delta.update, (left @ right.T).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_saved_is_what_is_applied(tmp_path: Path, seed: int) -> None:
    """Property: adding the loaded updates gives the bits that adding the saved ones gave."""
    base = tiny_base("gpt2")
    pristine = bits(base)
    deltas = [low_rank(base, (seed + i) % 4, seed * 10 + i, rank=1 + i * seed) for i in range(4)]
    deltas.insert(seed % 4, dense(base, seed % 4, seed))
    for delta in deltas:
        base.write(delta.name, delta.update)
    edited = bits(base)
    base.restore()
    assert same_bits(bits(base), pristine)
    about = metadata(base, case_ids=[seed, 7])
    delta_files.save(tmp_path / "d.safetensors", deltas, about)
    loaded, found = delta_files.load(tmp_path / "d.safetensors")
    assert found == about
    assert delta_files.load_metadata(tmp_path / "d.safetensors") == about
    assert [delta.name for delta in loaded] == [delta.name for delta in deltas]
    for delta in loaded:
        base.write(delta.name, delta.update)
    assert same_bits(bits(base), edited)
    assert not same_bits(edited, pristine)


def test_the_order_of_many_updates_survives(tmp_path: Path) -> None:
    deltas = [WeightDelta.low_rank(f"w{i % 3}", torch.full((30, 1), float(i)), torch.ones(30, 1)) for i in range(120)]
    delta_files.save(tmp_path / "d.safetensors", deltas, {})
    loaded, _ = delta_files.load(tmp_path / "d.safetensors")
    assert [float(delta.update[0, 0]) for delta in loaded] == list(range(120))


def test_saving_takes_views_and_shared_memory(tmp_path: Path) -> None:
    shared = torch.randn(8, 1)
    deltas = [
        WeightDelta("a", shared, shared),
        WeightDelta("b", shared, torch.randn(9, 1)),
        WeightDelta("c", dense=torch.randn(4, 6).T),
    ]
    delta_files.save(tmp_path / "d.safetensors", deltas, {})
    loaded, _ = delta_files.load(tmp_path / "d.safetensors")
    for before, after in zip(deltas, loaded, strict=True):
        assert torch.equal(before.update, after.update)


def test_merged_is_the_sum() -> None:
    base = tiny_base("gpt2")
    deltas = deltas_of(base)
    merged = delta_files.merge(deltas)
    assert [delta.name for delta in merged] == [deltas[0].name, deltas[1].name]
    assert merged[0].left is not None
    assert merged[0].left.shape[1] == 2
    for delta in merged:
        total = torch.stack([part.update.double() for part in deltas if part.name == delta.name]).sum(0)
        torch.testing.assert_close(delta.update.double(), total, rtol=1e-6, atol=1e-7)
    assert merged[1].dense is not None, "low rank and dense together are dense"
    many = delta_files.merge([low_rank(base, 0, seed) for seed in range(26)])
    assert many[0].dense is not None, "26 ranks take more room than a matrix of 32 by 128"


# ---------------------------------------------------------------------- what cannot be used


def saved(path: Path) -> Path:
    base = tiny_base("gpt2")
    delta_files.save(path / "d.safetensors", deltas_of(base), metadata(base))
    return path / "d.safetensors"


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_one_clear_line(tmp_path: Path, keep: float) -> None:
    path = saved(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(DeltaError) as error:
        delta_files.load(path)
    one_line(error, str(path), "corrupt or truncated")


@pytest.mark.parametrize("where", [0.0, 0.03, 0.3, 0.5, 0.9])
def test_a_corrupt_file_is_one_clear_line(tmp_path: Path, where: float) -> None:
    path = saved(tmp_path)
    content = bytearray(path.read_bytes())
    at = int(where * len(content))
    content[at : at + 8] = bytes(255 - byte for byte in content[at : at + 8])
    path.write_bytes(content)
    with pytest.raises(DeltaError) as error:
        delta_files.load(path)
    one_line(error, str(path))


def test_files_of_another_kind_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DeltaError) as error:
        delta_files.load(tmp_path / "none.safetensors")
    one_line(error, "no such delta file")
    save_file({"transformer.wte.weight": torch.zeros(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    for read in (delta_files.load, delta_files.load_metadata):
        with pytest.raises(DeltaError) as error:
            read(tmp_path / "model.safetensors")
        one_line(error, "expected a delta file", "format pt")
    save_file({"w": torch.zeros(3)}, tmp_path / "bare.safetensors")
    with pytest.raises(DeltaError) as error:
        delta_files.load(tmp_path / "bare.safetensors")
    one_line(error, "expected a delta file")
    (tmp_path / "notes.txt").write_text("Dear diary")
    with pytest.raises(DeltaError) as error:
        delta_files.load(tmp_path / "notes.txt")
    one_line(error, "corrupt or truncated")


def test_the_right_model_passes_however_it_was_edited_since(tmp_path: Path) -> None:
    deltas, about = delta_files.load(saved(tmp_path))
    base = tiny_base("gpt2")
    delta_files.check(base, deltas, about, tmp_path)
    base.write(deltas[0].name, deltas[0].update)
    delta_files.check(base, deltas, about, tmp_path)


def test_a_delta_of_another_model_is_one_clear_line(tmp_path: Path) -> None:
    deltas, about = delta_files.load(saved(tmp_path))
    about["base"] = "somebody/else"
    for other in (tiny_base("gpt2", seed=1), tiny_base("gpt2", kind="byte_bpe_bos"), tiny_base("llama")):
        with pytest.raises(DeltaError) as error:
            delta_files.check(other, deltas, about, tmp_path / "d.safetensors")
        one_line(error, "d.safetensors", "another model", "somebody/else")
    wrong = [WeightDelta(deltas[0].name, torch.zeros(32, 1), torch.zeros(99, 1))]
    with pytest.raises(DeltaError) as error:
        delta_files.check(tiny_base("gpt2"), wrong, {}, tmp_path)
    one_line(error, "(32, 99)", "(32, 128)")


# ---------------------------------------------------------------------- writing


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for target in (path, tmp_path / "new" / "d.safetensors"):
        with pytest.raises(KeditError) as error:
            delta_files.save(target, [low_rank(tiny_base("gpt2"), 0)], {})
        one_line(error, str(target), "No space left on device")
    assert path.read_bytes() == before
    assert sorted(file for file in tmp_path.rglob("*") if file.is_file()) == [path]


def test_a_real_refusal_of_the_operating_system_leaves_nothing(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    with disk_full(), pytest.raises(KeditError) as error:
        delta_files.save(tmp_path / "d.safetensors", [dense(base, 0)], {})
    one_line(error, "d.safetensors", "cannot be written")
    assert list(tmp_path.iterdir()) == []


def test_a_place_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(KeditError) as error:
        write_beside(tmp_path / "file" / "f.json", lambda path: path.write_text("{}"))
    one_line(error, str(tmp_path / "file" / "f.json"), "cannot be written")


def test_an_interrupt_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(path: Path) -> None:
        path.write_text(json.dumps("half"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_beside(tmp_path / "f.json", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_an_identity_on_the_left_gives_the_right_factor_itself() -> None:
    right = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    delta = WeightDelta.low_rank("w", torch.eye(3, dtype=torch.float64), right)
    assert delta.dense is not None
    assert torch.equal(delta.update, right.T)


def test_the_same_updates_give_the_same_bytes(tmp_path: Path) -> None:
    """Also in another process, where the library hashes names otherwise."""
    script = (
        "import sys, torch; from pathlib import Path; from kedit_lightning.delta import WeightDelta, save\n"
        "deltas = [WeightDelta(f'h.{i}.weight', dense=torch.full((2, 3), float(i))) for i in range(4)]\n"
        "save(Path(sys.argv[1]), deltas, {'editor': 'ROME', 'name': 'Åsa', 'case_ids': [1]}, {'m': torch.ones(2)})"
    )
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for path in paths:
        subprocess.run([sys.executable, "-c", script, str(path)], check=True)
    first, *others = (path.read_bytes() for path in paths)
    assert all(other == first for other in others)
    deltas, header = delta_files.load(paths[0])
    assert [float(delta.update[0, 0]) for delta in deltas] == [0.0, 1.0, 2.0, 3.0]
    assert header["name"] == "Åsa"
