"""Second moments of keys: against a document-by-document reference, from every source, kept and found again."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kedit_lightning import almanac
from kedit_lightning.cache import cache_dir
from kedit_lightning.edits import Site
from kedit_lightning.errors import KeditError, StatisticsError
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.factors import condition, factorise
from kedit_lightning.models.fingerprint import fingerprint, fingerprint_below
from kedit_lightning.models.key_pass import KeyPass
from kedit_lightning.models.key_statistics import Identity, KeyStatistics
from kedit_lightning.models.launching import together
from kedit_lightning.models.processes import agreed
from kedit_lightning.models.second_moment import SecondMoment
from kedit_lightning.models.statistics import Statistics, compute
from kedit_lightning.trainer import EditTrainer
from tests.commandline import World, done
from tests.editors.fitting import make
from tests.families import corpus, save_tiny, tiny_base

SITES = [Site(1, "mlp"), Site(2, "mlp"), Site(2, "attn")]
DOCUMENTS = [" ".join(corpus()[i : i + 1 + i % 5]) for i in range(0, 120, 4)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text file with a document a line, blank lines among them."""
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(DOCUMENTS) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def statistics(text: Path, tmp_path: Path) -> Statistics:
    """All of the text, in float64, kept in a folder of the test's own."""
    return Statistics(str(text), tokens="full", mom2_dtype="float64", cache_dir=str(tmp_path / "kept"))


def reference(base: LanguageModel, site: Site, documents: list[str], length: int = 128, skip: int = 0) -> Any:
    """C and the number of keys, one document after the other, hooked by hand."""
    moment, count = torch.zeros(()).double(), 0
    name = base.name(site).removesuffix(".weight")
    for document in documents:
        seen: list[torch.Tensor] = []
        hook = base.model.get_submodule(name).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            base.model(torch.tensor([base.tokenizer(document)["input_ids"][:length]]))
        hook.remove()
        keys = seen[0][0, skip:].double()
        moment, count = moment + keys.T @ keys, count + len(keys)
    return moment / count, count


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each forward pass."""
    rows: list[int] = []
    logits = LanguageModel.logits
    monkeypatch.setattr(LanguageModel, "logits", lambda self, batch: rows.append(len(batch)) or logits(self, batch))
    return rows


# ---------------------------------------------------------------------- the pass


def test_equals_one_document_at_a_time(base: LanguageModel, statistics: Statistics) -> None:
    found = statistics.second_moments(base, SITES)
    for site in SITES:
        mean, count = reference(base, site, DOCUMENTS)
        assert found[site].count == count
        assert found[site].mean.dtype == torch.float64
        torch.testing.assert_close(found[site].mean, mean, rtol=1e-5, atol=1e-6 * float(mean.abs().max()))


@pytest.mark.parametrize("skip", [False, True])
def test_long_documents_are_cut_and_first_tokens_left_out(
    gpt2_base: LanguageModel, statistics: Statistics, skip: bool
) -> None:
    statistics = replace(statistics, max_length=7, skip_first_token=skip)
    mean, count = reference(gpt2_base, SITES[0], DOCUMENTS, 7, int(skip))
    found = statistics.second_moments(gpt2_base, SITES[:1])[SITES[0]]
    assert found.count == count == len(DOCUMENTS) * (7 - skip)
    torch.testing.assert_close(found.mean, mean, rtol=1e-5, atol=1e-7)


def test_all_sites_share_forward_passes_and_padding_is_never_counted(
    gpt2_base: LanguageModel, statistics: Statistics, forwards: list[int]
) -> None:
    all_at_once = statistics.second_moments(gpt2_base, SITES)
    assert sum(forwards) < 2 * len(DOCUMENTS)  # the held-out documents are read twice
    assert len(forwards) < len(DOCUMENTS) / 2
    apart = replace(statistics, batch_tokens=1, cache_dir=statistics.cache_dir + "2")
    one_by_one = apart.second_moments(gpt2_base, SITES)
    for site in SITES:
        assert all_at_once[site].count == one_by_one[site].count
        torch.testing.assert_close(all_at_once[site].mean, one_by_one[site].mean, rtol=1e-5, atol=1e-7)


def test_later_layers_are_not_run(gpt2_base: LanguageModel, statistics: Statistics) -> None:
    gpt2_base.layers[3].register_forward_pre_hook(lambda *_: pytest.fail("a layer above the last site was run"))
    statistics.second_moments(gpt2_base, SITES)


def test_float32_sums_are_near_float64(gpt2_base: LanguageModel, statistics: Statistics) -> None:
    wide = statistics.second_moments(gpt2_base, SITES)
    narrow = replace(statistics, mom2_dtype="float32").second_moments(gpt2_base, SITES)
    for site in SITES:
        assert narrow[site].mean.dtype == torch.float32
        torch.testing.assert_close(narrow[site].mean.double(), wide[site].mean, rtol=1e-4, atol=1e-5)


def test_tokens_are_counted_exactly(gpt2_base: LanguageModel, statistics: Statistics, caplog: Any) -> None:
    assert replace(statistics, tokens=101).second_moments(gpt2_base, SITES)[SITES[0]].count == 101
    short = replace(statistics, tokens=101, skip_first_token=True)
    assert short.second_moments(gpt2_base, SITES)[SITES[0]].count == 101
    assert not any(record.levelno >= logging.WARNING for record in caplog.records)
    default = replace(statistics, tokens=None).second_moments(gpt2_base, SITES)[SITES[0]].count
    assert default is not None
    assert default < 10 * 128  # all there is
    assert "fewer than the 1280 asked for" in caplog.text


def test_the_sample_is_that_of_the_released_codes(gpt2_base: LanguageModel, statistics: Statistics) -> None:
    import random

    order = list(range(len(DOCUMENTS)))
    random.Random(1).shuffle(order)
    mean, count = reference(gpt2_base, SITES[0], [DOCUMENTS[i] for i in order[:5]])
    found = replace(statistics, n_samples=5).second_moments(gpt2_base, SITES[:1])[SITES[0]]
    assert found.count == count
    torch.testing.assert_close(found.mean, mean, rtol=1e-5, atol=1e-7)


def test_an_edited_model_gives_the_unedited_model_s_statistics(
    gpt2_base: LanguageModel, statistics: Statistics
) -> None:
    name = gpt2_base.name(Site(0))
    mean, _ = reference(gpt2_base, SITES[0], DOCUMENTS)
    gpt2_base.write(name, torch.ones_like(gpt2_base.weight(name)))
    edited = gpt2_base.weight(name).clone()
    torch.testing.assert_close(statistics.second_moments(gpt2_base, SITES)[SITES[0]].mean, mean, rtol=1e-5, atol=1e-7)
    assert torch.equal(gpt2_base.weight(name), edited)


def test_not_finite_keys_are_refused(gpt2_base: LanguageModel, statistics: Statistics) -> None:
    gpt2_base.model.transformer.h[0].mlp.c_fc.bias.data[:] = float("inf")
    with pytest.raises(StatisticsError, match="are not finite in float32: load the model in"):
        statistics.second_moments(gpt2_base, SITES)


def test_too_little_memory_names_the_setting(
    gpt2_base: LanguageModel, statistics: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(LanguageModel, "run", full)
    with pytest.raises(StatisticsError, match=r"lower `statistics\.batch_tokens`"):
        statistics.second_moments(gpt2_base, SITES)


# ---------------------------------------------------------------------- the files


def test_kept_statistics_are_found_without_a_forward_pass(
    gpt2_base: LanguageModel, statistics: Statistics, forwards: list[int]
) -> None:
    first = statistics.second_moments(gpt2_base, SITES[:2])
    forwards.clear()
    again = statistics.second_moments(gpt2_base, [SITES[1]])
    assert forwards == []
    assert torch.equal(again[SITES[1]].mean, first[SITES[1]].mean)
    assert again[SITES[1]].count == first[SITES[1]].count
    more = statistics.second_moments(gpt2_base, SITES)
    assert len(forwards) > 0
    assert list(more) == SITES
    folder = Path(str(statistics.cache_dir))
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 50},
        {"n_samples": 7},
        {"mom2_dtype": "float32"},
        {"max_length": 9},
        {"skip_first_token": True},
        {"seed": 2},
        {"forward_dtype": "bfloat16"},
        {"tolerance": 0.1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_that_counts_changes_the_file(
    gpt2_base: LanguageModel, statistics: Statistics, change: dict[str, Any]
) -> None:
    assert statistics.files(gpt2_base, SITES) != replace(statistics, **change).files(gpt2_base, SITES)


def test_settings_that_do_not_count_do_not_change_the_file(gpt2_base: LanguageModel, statistics: Statistics) -> None:
    same = replace(statistics, batch_tokens=7, ridge=0.1, max_length=4096)  # the model reads 128
    assert statistics.files(gpt2_base, SITES) == same.files(gpt2_base, SITES)


def test_the_text_and_the_model_change_the_file(gpt2_base: LanguageModel, statistics: Statistics, text: Path) -> None:
    before = statistics.files(gpt2_base, SITES)
    assert before == statistics.files(tiny_base("gpt2"), SITES)
    assert before.values() != statistics.files(tiny_base("gpt2", seed=1), SITES).values()
    half = tiny_base("gpt2")
    half.model.bfloat16()
    assert set(before.values()).isdisjoint(statistics.files(half, SITES).values())
    copy = text.with_name("copy.txt")
    copy.write_bytes(text.read_bytes())
    assert replace(statistics, source=str(copy)).files(gpt2_base, SITES) == before
    text.write_text("Something else.\n", encoding="utf-8")
    assert set(before.values()).isdisjoint(statistics.files(gpt2_base, SITES).values())


def test_a_layer_above_the_site_does_not_count(gpt2_base: LanguageModel, statistics: Statistics) -> None:
    before = statistics.files(gpt2_base, SITES)
    gpt2_base.model.transformer.h[2].mlp.c_fc.weight.data.mul_(2)
    after = statistics.files(gpt2_base, SITES)
    assert before[SITES[0]] == after[SITES[0]]
    assert before[SITES[1]] != after[SITES[1]]


def test_the_file_says_what_it_is(gpt2_base: LanguageModel, statistics: Statistics) -> None:
    from safetensors import safe_open

    [path] = compute(gpt2_base, statistics, SITES[:1])
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert about["module"] == "transformer.h.1.mlp.c_proj"
    assert about["source"] == statistics.source
    assert about["tokens"] == "full"
    assert about["definition"].endswith("C = moment / count")


def test_compute_gives_the_files(gpt2_base: LanguageModel, statistics: Statistics) -> None:
    paths = compute(gpt2_base, statistics, SITES)
    assert paths == list(statistics.files(gpt2_base, SITES).values())
    assert all(path.is_file() for path in paths)
    with pytest.raises(StatisticsError, match="nothing to compute"):
        compute(gpt2_base, Statistics("identity"), SITES)
    with pytest.raises(StatisticsError, match="nothing to compute"):
        compute(gpt2_base, Statistics(str(paths[0])), SITES[:1])


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "one bit"])
def test_a_damaged_file_is_made_again(
    gpt2_base: LanguageModel, statistics: Statistics, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = statistics.second_moments(gpt2_base, SITES[:1])
    [path] = statistics.files(gpt2_base, SITES[:1]).values()
    whole = path.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # not a view of the file
    flipped = whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "garbage": b"x" * 99, "empty": b"", "one bit": flipped}[damage]
    )
    with pytest.raises(StatisticsError, match=r"corrupt, truncated or of another kind .* take another copy"):
        Statistics(str(path)).second_moments(gpt2_base, SITES[:1])
    again = statistics.second_moments(gpt2_base, SITES[:1])
    assert torch.equal(first[SITES[0]].mean, again[SITES[0]].mean)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(path).items())
    assert sum(record.levelno >= logging.WARNING for record in caplog.records) == 1
    assert "computed again" in caplog.text


def test_a_full_disk_costs_the_file_but_not_the_run(
    gpt2_base: LanguageModel, statistics: Statistics, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kedit_lightning.models.moment_files.save_file", full)
    assert statistics.second_moments(gpt2_base, SITES[:1])[SITES[0]].count
    assert "No space left" in caplog.text
    assert list(Path(str(statistics.cache_dir)).iterdir()) == []
    with pytest.raises(StatisticsError, match="could not be written"):
        compute(gpt2_base, statistics, SITES[:1])


def test_an_interrupt_leaves_nothing_half_done(
    gpt2_base: LanguageModel, statistics: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = gpt2_base.name(Site(0))
    gpt2_base.write(name, torch.ones_like(gpt2_base.weight(name)))
    edited = gpt2_base.weight(name).clone()
    step, handler, calls = KeyPass.test_step, signal.getsignal(signal.SIGINT), []

    def interrupted(self: KeyPass, *args: Any) -> None:
        calls.append(step(self, *args))
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(KeyPass, "test_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace(statistics, batch_tokens=64).second_moments(gpt2_base, SITES)
    assert signal.getsignal(signal.SIGINT) is handler
    left = [path.name for path in Path(str(statistics.cache_dir)).glob("**/*.*")]
    assert all(name.startswith("partial_") for name in left)  # whole, for the next pass to go on from
    assert torch.equal(gpt2_base.weight(name), edited)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in gpt2_base.model.modules())


# ---------------------------------------------------------------------- where documents come from


def test_jsonl_and_its_bad_lines(gpt2_base: LanguageModel, statistics: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS) + "\n", encoding="utf-8")
    found = replace(statistics, source=str(path)).second_moments(gpt2_base, SITES[:1])
    assert torch.equal(found[SITES[0]].mean, statistics.second_moments(gpt2_base, SITES[:1])[SITES[0]].mean)
    path.write_text('{"text": "a"}\n{"words": "b"}\n', encoding="utf-8")
    with pytest.raises(StatisticsError, match=r"corpus\.jsonl, line 2: expected a JSON object with the text in"):
        replace(statistics, source=str(path)).second_moments(gpt2_base, SITES[:1])


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"\n \n", "expected at least one document"), (b"\xff\xfe\x00", "expected text in UTF-8")],
)
def test_unusable_text(gpt2_base: LanguageModel, text: Path, content: bytes | None, message: str) -> None:
    text.unlink()
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(StatisticsError, match=message):
        Statistics(str(text), cache_dir=str(text.parent)).second_moments(gpt2_base, SITES)


@pytest.mark.parametrize("cache", [None, "", "~/somewhere"])
def test_the_cache_is_the_same_for_all(gpt2_base: LanguageModel, monkeypatch: pytest.MonkeyPatch, cache: Any) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("KEDIT_CACHE", raising=False)
    if cache is not None:
        monkeypatch.setenv("KEDIT_CACHE", cache)
    home = Path("/home/somebody") / ("somewhere" if cache else ".cache/kedit_lightning")
    assert cache_dir() == home
    assert {path.parent for path in Statistics().files(gpt2_base, SITES).values()} == {home / "statistics"}


def test_a_folder_of_that_name_is_not_the_almanac(
    gpt2_base: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for keyword in ("almanac", "identity"):
        (tmp_path / keyword).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(almanac, "documents", lambda n, seed: DOCUMENTS[:n])
    found = Statistics(cache_dir=str(tmp_path / "kept"), n_samples=5, tokens="full")
    assert found.second_moments(gpt2_base, SITES[:1])[SITES[0]].count
    assert [path.is_file() for path in compute(gpt2_base, found, SITES[:1])] == [True]


def test_the_almanac_is_the_default(gpt2_base: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []

    def documents(n: int, seed: int) -> list[str]:
        asked.append((n, seed))
        return [f"{seed} {corpus()[i % 200]} {i}" for i in range(n)]

    monkeypatch.setattr(almanac, "documents", documents, raising=False)
    found = Statistics(cache_dir=str(tmp_path), tokens=8_000).second_moments(gpt2_base, SITES)
    assert found[SITES[0]].count == 8_000
    assert asked == [(64, 1), (256, 1), (512, 1)]


class _Rows:
    column_names = ("title", "text")

    def __init__(self, texts: list[str]) -> None:
        self.texts, self.shuffled = texts, 0

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int) -> dict[str, str]:
        return {"text": self.texts[i], "title": ""}

    def __iter__(self) -> Iterator[dict[str, str]]:
        return (self[i] for i in range(len(self)))

    def shuffle(self, seed: int, buffer_size: int) -> _Rows:
        assert (seed, buffer_size) == (1, 10_000)
        self.shuffled += 1
        return self


@pytest.mark.parametrize("tokens", ["full", 100])
def test_a_hugging_face_dataset(
    gpt2_base: LanguageModel, statistics: Statistics, monkeypatch: pytest.MonkeyPatch, tokens: Any
) -> None:
    asked: list[Any] = []
    rows = _Rows(DOCUMENTS)

    def load_dataset(*args: Any, **kwargs: Any) -> _Rows:
        asked.append((args, kwargs))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    wikipedia = replace(statistics, source="wikimedia/wikipedia:20231101.en@main", tokens=tokens)
    found = wikipedia.second_moments(gpt2_base, SITES[:1])[SITES[0]]
    streaming = tokens != "full"
    settings = {"split": "train", "revision": "main", "streaming": streaming}
    assert asked == [(("wikimedia/wikipedia", "20231101.en"), settings)]
    assert rows.shuffled == streaming
    assert streaming == (found.count == 100)
    if not streaming:
        assert torch.equal(found.mean, statistics.second_moments(gpt2_base, SITES[:1])[SITES[0]].mean)
    with pytest.raises(StatisticsError, match=r"no column 'body'; set `statistics\.column` to one of title, text"):
        replace(wikipedia, column="body").second_moments(gpt2_base, SITES)


def test_no_network_is_one_line(gpt2_base: LanguageModel, statistics: Statistics) -> None:
    with pytest.raises(StatisticsError, match="cannot read the dataset 'nobody/nothing'") as error:
        replace(statistics, source="nobody/nothing").second_moments(gpt2_base, SITES)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- files that others made


def npz(path: Path, width: int = 128, **more: Any) -> torch.Tensor:
    """A file as ROME publishes it, with entries that nobody needs."""
    keys = torch.randn(300, width, generator=torch.Generator().manual_seed(0))
    moment = keys.T @ keys
    np.savez(path, **{"mom2.mom2": moment.numpy(), "mom2.count": 300, "mom2.constructor": "x.SecondMoment()"}, **more)
    return moment / 300


@pytest.mark.parametrize("whole_folder", [False, True])
def test_published_npz(gpt2_base: LanguageModel, tmp_path: Path, whole_folder: bool) -> None:
    folder = tmp_path / "gpt2" / "wikipedia_stats"
    folder.mkdir(parents=True)
    path = folder / "transformer.h.1.mlp.c_proj_float32_mom2_100000.npz"
    mean = npz(path)
    found = Statistics(str(tmp_path if whole_folder else path)).second_moments(gpt2_base, SITES[:1])[SITES[0]]
    torch.testing.assert_close(found.mean, mean)
    assert found.count == 300
    with pytest.raises(StatisticsError, match=r"expected .*transformer\.h\.2\.mlp\.c_proj.*got"):
        Statistics(str(tmp_path if whole_folder else path)).second_moments(gpt2_base, SITES)


def test_npz_of_another_model_or_kind(gpt2_base: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "transformer.h.1.mlp.c_proj_float32_mom2_100000.npz"
    npz(path, 96)
    with pytest.raises(StatisticsError, match=r"of shape \(128, 128\), got \(96, 96\)"):
        Statistics(str(path)).second_moments(gpt2_base, SITES[:1])
    whole = path.read_bytes()
    np.savez(path, **{"mom2.mom2": np.array([{}], dtype=object), "mom2.count": 1})
    pickled = path.read_bytes()
    np.savez(path, other=np.ones(3))
    for content in (whole[: len(whole) // 2], b"nonsense", b"", pickled, path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(StatisticsError, match="corrupt, truncated or of another kind"):
            Statistics(str(path)).second_moments(gpt2_base, SITES[:1])


def test_means_under_module_names(gpt2_base: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "cov_tiny.safetensors"
    means = {f"transformer.h.{layer}.mlp.c_proj": torch.eye(128) * (layer + 1) for layer in (1, 2)}
    save_file(means | {"count": torch.tensor(5250)}, path)
    for source in (path, tmp_path):
        found = Statistics(str(source)).second_moments(gpt2_base, SITES[:2])
        assert torch.equal(found[SITES[1]].mean, 3 * torch.eye(128))
        assert found[SITES[1]].count == 5250
    with pytest.raises(StatisticsError, match=r"attn\.c_proj, got those of transformer\.h\.1\.mlp"):
        Statistics(str(path)).second_moments(gpt2_base, SITES)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(StatisticsError, match="corrupt, truncated"):
        Statistics(str(path)).second_moments(gpt2_base, SITES)


def test_our_own_file_by_name_and_of_another_model(gpt2_base: LanguageModel, statistics: Statistics) -> None:
    [path] = compute(gpt2_base, statistics, SITES[:1])
    found = Statistics(str(path.parent)).second_moments(gpt2_base, SITES[:1])[SITES[0]]
    tensors = load_file(path)
    assert torch.equal(found.mean, tensors["moment"] / tensors["count"])
    with pytest.raises(StatisticsError, match="of another model: expected"):
        Statistics(str(path)).second_moments(tiny_base("gpt2", seed=1), SITES[:1])
    with pytest.raises(StatisticsError, match="of another linear map"):
        Statistics(str(path)).second_moments(gpt2_base, SITES[1:2])
    with pytest.raises(StatisticsError, match="no such statistics file"):
        Statistics(str(path) + ".npz").second_moments(gpt2_base, SITES)


# ---------------------------------------------------------------------- solving


def test_solve_is_the_inverse(gpt2_base: LanguageModel, statistics: Statistics) -> None:
    ridged = replace(statistics, ridge=1e-2).second_moments(gpt2_base, SITES)[SITES[0]]
    keys = torch.randn(5, 128)
    matrix = ridged.mean + 1e-2 * ridged.mean.diagonal().mean() * torch.eye(128).double()
    expected = torch.linalg.solve(matrix, keys.double().T).T
    torch.testing.assert_close(ridged.solve(keys), expected)
    torch.testing.assert_close(ridged.solve(keys[0]), expected[0])
    assert ridged.factor() is ridged.factor()


def test_too_few_tokens_need_a_ridge(gpt2_base: LanguageModel, statistics: Statistics) -> None:
    few = replace(statistics, tokens=100)
    with pytest.raises(StatisticsError, match=r"singular \(width 128, 100 tokens\); take more tokens .*ridge"):
        few.second_moments(gpt2_base, SITES)[SITES[0]].solve(torch.ones(128))
    ridged = replace(few, ridge=1e-3).second_moments(gpt2_base, SITES)[SITES[0]]
    assert ridged.solve(torch.ones(128)).isfinite().all()


def test_singular_with_many_tokens(caplog: pytest.LogCaptureFixture) -> None:
    flat = torch.diag(torch.tensor([1.0, 1.0, 0.0]))
    with pytest.raises(
        StatisticsError, match=r"the second moment of h\.1 is singular \(width 3, unknown many tokens\)"
    ):
        KeyStatistics(flat, name="h.1").solve(torch.ones(3))
    KeyStatistics(flat + 1e-12 * torch.eye(3), 9, name="h.1").solve(torch.ones(3))
    assert "h.1 is ill-conditioned (about 1e+12)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        KeyStatistics(torch.diag(torch.tensor([1.0, 1.0, 1e-3])), 9).solve(torch.ones(3))
    assert "condition about 1e+03" in caplog.text


def test_condition_is_a_close_lower_bound() -> None:
    keys = torch.randn(400, 60, dtype=torch.float64) * torch.logspace(0, -3, 60, dtype=torch.float64)
    matrix = keys.T @ keys
    exact = float(torch.linalg.cond(matrix))
    assert exact / 3 < condition(factorise(matrix)) <= exact * (1 + 1e-9)


def test_identity_is_a_choice(gpt2_base: LanguageModel, forwards: list[int]) -> None:
    found = Statistics("identity").second_moments(gpt2_base, SITES)[SITES[2]]
    keys = torch.randn(3, 32)
    assert isinstance(found, Identity)
    assert torch.equal(found.solve(keys), keys.double())
    assert torch.equal(found.mean, torch.eye(32))
    assert forwards == []


def test_the_accumulator_takes_nothing_and_starts_afresh() -> None:
    moment = SecondMoment(3, torch.float64)
    moment.update(torch.ones(2, 3))
    moment.update(torch.ones(0, 3))
    assert torch.equal(moment.compute(), torch.ones(3, 3).double())
    moment.reset()
    assert moment.count == 0
    assert not moment.moment.any()


@pytest.mark.parametrize("k", [3, 4, 7])
def test_half_of_the_sum_is_all_of_it(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kedit_lightning.models.second_moment.BLOCK", 4)
    moment, keys = SecondMoment(k, torch.float64), torch.randn(20, k, dtype=torch.float64)
    for some in keys.split(6):
        moment.update(some)
    assert torch.allclose(moment.total(), keys.T @ keys)
    assert torch.equal(moment.total(), moment.total().T)
    assert torch.allclose(moment.compute(), keys.T @ keys / 20)


@pytest.mark.parametrize("field", ["n_samples", "max_length", "tokens", "batch_tokens"])
def test_numbers_out_of_range(field: str) -> None:
    with pytest.raises(StatisticsError, match=rf"statistics\.{field}: expected at least 1, got 0"):
        Statistics(**{field: 0})
    with pytest.raises(StatisticsError, match="ridge"):
        Statistics(ridge=-1.0)


# ---------------------------------------------------------------------- fingerprints


def test_a_fingerprint_survives_saving_and_editing(family: str, tmp_path: Path) -> None:
    base = tiny_base(family)
    names = [base.name(Site(1)), base.name(Site(0, "attn"))]
    before = fingerprint(base, names), fingerprint_below(base, 2)
    base.write(names[0], torch.ones_like(base.weight(names[0])))
    assert (fingerprint(base, names[::-1]), fingerprint_below(base, 2)) == before
    loaded = LanguageModel(str(save_tiny(family, tmp_path)))
    loaded.tokenizer(["a b", "c"], truncation=True, max_length=2)
    loaded.model.config.pad_token_id = 7
    assert (fingerprint(loaded, names), fingerprint_below(loaded, 2)) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lower_fingerprint_sees_every_change_below(gpt2_base: LanguageModel, dtype: torch.dtype) -> None:
    gpt2_base.model.to(dtype)
    words, bias = gpt2_base.model.transformer.wte.weight.data, gpt2_base.model.transformer.h[1].mlp.c_fc.bias.data
    seen = [fingerprint_below(gpt2_base, 1)]
    for change in (
        lambda: words[1:12].add_(1),
        lambda: words[7, 3].mul_(1.01),
        lambda: words.copy_(words[torch.arange(len(words)).roll(1)]),
        lambda: words.copy_(words.flip(1)),
        lambda: bias.copy_(bias.flip(0)),
    ):
        change()
        seen.append(fingerprint_below(gpt2_base, 1))
    assert len(set(seen)) == 6
    gpt2_base.layers[2].mlp.c_fc.weight.data.add_(1)
    assert fingerprint_below(gpt2_base, 1) == seen[-1]


def test_a_fingerprint_sees_weights_configuration_and_vocabulary(gpt2_base: LanguageModel) -> None:
    names = [gpt2_base.name(Site(1))]
    seen = {fingerprint(gpt2_base, names), fingerprint(gpt2_base, [gpt2_base.name(Site(2))])}
    gpt2_base.weight(names[0]).data[0, 0] += 1e-3
    seen.add(fingerprint(gpt2_base, names))
    gpt2_base.model.config.layer_norm_epsilon = 1e-3
    seen.add(fingerprint(gpt2_base, names))
    gpt2_base.tokenizer.add_tokens(["Zzyzx"])
    seen.add(fingerprint(gpt2_base, names))
    assert len(seen) == 5


# ---------------------------------------------------------------------- several processes


def _process(rank: int, folder: str, statistics: Statistics) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = statistics.second_moments(tiny_base("gpt2"), SITES)
    tensors = {f"{i}": found[site].mean for i, site in enumerate(SITES)}
    save_file(tensors | {"count": torch.tensor(found[SITES[0]].count)}, f"{folder}/rank{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("batch_tokens", [256, 100_000], ids=["shared", "one idle"])
def test_two_processes_equal_one(
    gpt2_base: LanguageModel, statistics: Statistics, tmp_path: Path, batch_tokens: int
) -> None:
    statistics = replace(statistics, batch_tokens=batch_tokens)
    one = statistics.second_moments(gpt2_base, SITES)
    several = replace(statistics, cache_dir=str(tmp_path / "two"))
    torch.multiprocessing.spawn(_process, (str(tmp_path), several), nprocs=2)
    for rank in range(2):
        two = load_file(tmp_path / f"rank{rank}.safetensors")
        assert two["count"] == one[SITES[0]].count
        for i, site in enumerate(SITES):
            torch.testing.assert_close(two[str(i)], one[site].mean, rtol=1e-9, atol=1e-12)
    assert len(list((tmp_path / "two").iterdir())) == len(SITES)


LAUNCHERS = {
    "lightning": ["-m", "kedit_lightning"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kedit_lightning"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "batch_tokens"), [("lightning", 64), ("torchrun", 64), ("lightning", 100_000)], ids=str
)
def test_two_processes_from_the_command_line_equal_one(tmp_path: Path, launcher: str, batch_tokens: int) -> None:
    """The real command; in batches as large as the text the second process has no documents."""
    world = World(tmp_path)
    settings: dict[str, Any] = {"source": str(world.corpus), "tokens": "full", "batch_tokens": batch_tokens}
    one, two = tmp_path / "one", tmp_path / "two"
    done("statistics", "--config", world.config(statistics=settings | {"cache_dir": str(one)}))
    config = world.config(statistics=settings | {"cache_dir": str(two)})
    several = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu"]
    shown = "--trainer.enable_progress_bar=true"
    result = subprocess.run(
        [sys.executable, *LAUNCHERS[launcher], "statistics", "--config", str(config), *several, shown],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    [path] = two.iterdir()
    assert path.name == next(one.iterdir()).name
    assert result.stdout == f"{path}\n", "one process tells"
    assert result.stderr.count("Second moments of 1 layer") == 1
    alone, shared = load_file(one / path.name), load_file(path)
    assert alone["count"] == shared["count"]
    assert float((alone["moment"] - shared["moment"]).norm()) < 1e-6 * float(alone["moment"].norm())
    with safe_open(one / path.name, "pt") as first, safe_open(path, "pt") as second:
        for key in ("count", "documents_read"):
            assert first.metadata()[key] == second.metadata()[key]


@pytest.mark.parametrize("source", ["identity", "none.txt"])
def test_what_cannot_be_computed_is_said_before_processes_start(
    gpt2_base: LanguageModel, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = EditTrainer(save_dir=str(tmp_path), accelerator="cpu", devices=2)
    monkeypatch.setattr(made.strategy.launcher, "launch", lambda *_, **__: pytest.fail("processes were started"))
    words = {"identity": "^nothing to compute", "none.txt": "^none.txt: no such file"}
    with pytest.raises(StatisticsError, match=words[source]):
        made.statistics(make("ROME", gpt2_base, mom2_adjustment=True, statistics=Statistics(source)))


def test_torchrun_and_the_trainer_agree_on_how_many(
    gpt2_base: LanguageModel, tmp_path: Path, statistics: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = EditTrainer(save_dir=str(tmp_path), accelerator="cpu")
    monkeypatch.setattr("torch.distributed.is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(KeditError, match="torchrun has started 2 processes, the trainer has 1: set"):
        made.statistics(make("ROME", gpt2_base, mom2_adjustment=True, statistics=statistics))


def _loses_the_other(rank: int, folder: str) -> None:
    """The first of two processes ends where the second waits for it."""
    environ = {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": folder}
    os.environ.update({name: str(value) for name, value in environ.items()})
    made = EditTrainer(save_dir=folder, accelerator="cpu", devices=2)
    if rank == 0:
        together(made, torch.distributed.barrier)
        return
    with pytest.raises(KeditError, match="process 1 has lost the others"):
        together(made, lambda: (torch.distributed.barrier(), agreed(1)))


@pytest.mark.slow
def test_a_process_that_is_left_alone_says_so() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torch.multiprocessing.spawn(_loses_the_other, (port,), nprocs=2)
