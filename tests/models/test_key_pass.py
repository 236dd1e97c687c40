"""The pass over documents: packing, precision, convergence, resuming after a kill, and what a person sees of it."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kedit_lightning.callbacks.logs import SAID, quiet
from kedit_lightning.edits import Site
from kedit_lightning.errors import StatisticsError
from kedit_lightning.models import LanguageModel, key_pass, moment_files
from kedit_lightning.models.convergence import Convergence
from kedit_lightning.models.encoding import Row, collate
from kedit_lightning.models.key_pass import KeyPass
from kedit_lightning.models.packing import KeyReader, lay_out, pack
from kedit_lightning.models.progress import DISPLAY
from kedit_lightning.models.statistics import Statistics
from tests.families import WINDOW, corpus, tiny_base

SITES = [Site(0, "attn"), Site(1, "mlp"), Site(3, "mlp")]
DOCUMENTS = [" ".join(corpus()[i : i + 1 + i % 4]) for i in range(0, 600, 3)]


@pytest.fixture
def statistics(tmp_path: Path) -> Statistics:
    """All of a text of some 8,000 tokens, in float64, in small batches."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(DOCUMENTS), encoding="utf-8")
    return Statistics(
        str(path), tokens="full", mom2_dtype="float64", batch_tokens=256, cache_dir=str(tmp_path / "kept")
    )


def ids(base: LanguageModel, texts: list[str]) -> list[torch.Tensor]:
    """Token ids of texts."""
    return [torch.tensor(base.tokenizer(text)["input_ids"], dtype=torch.int32) for text in texts]


def alone(base: LanguageModel, documents: list[torch.Tensor]) -> dict[Site, torch.Tensor]:
    """Keys of documents, one forward pass a document."""
    passes = [base.keys(collate([Row(document.tolist(), [], {})]), dict.fromkeys(SITES)) for document in documents]
    return {site: torch.cat([found[site] for found in passes]) for site in SITES}


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformers that sees no documents in a row."""
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)


# ---------------------------------------------------------------------- packing


@pytest.mark.parametrize("skip", [0, 1])
def test_packed_documents_have_the_keys_they_have_alone(family: str, skip: int) -> None:
    base = tiny_base(family)
    documents = ids(base, DOCUMENTS[:11])
    assert max(map(len, documents)) > 5 * WINDOW
    reader = KeyReader(base, SITES, skip=skip)
    assert reader.try_packing(documents)
    rows = [documents[:6], documents[6:10], documents[10:]]
    found, expected = reader.read(rows), alone(base, documents)
    kept = torch.cat([torch.arange(len(document)) >= skip for document in documents])
    for site in SITES:
        keys = expected[site][kept]
        assert float((found[site] - keys).norm(dim=1).div(keys.norm(dim=1)).max()) < 1e-5


@pytest.mark.usefixtures("blind")
def test_a_model_that_cannot_be_packed_is_seen(family: str) -> None:
    base = tiny_base(family)
    assert not KeyReader(base, SITES).try_packing(ids(base, DOCUMENTS[:11]))
    half = tiny_base(family)
    half.model.bfloat16()
    assert not KeyReader(half, SITES).try_packing(ids(base, DOCUMENTS[:11]))


@pytest.mark.parametrize("forward_dtype", [None, "bfloat16", "tf32"])
def test_what_rounds_has_a_row_a_document(gpt2_base: LanguageModel, forward_dtype: Any) -> None:
    """There packed keys are percents away: far more than the bound."""
    documents = ids(gpt2_base, DOCUMENTS[:60])
    if forward_dtype is None:
        gpt2_base.model.bfloat16()
    reader = KeyReader(gpt2_base, SITES, forward_dtype=forward_dtype)
    assert not reader.try_packing(documents)
    assert all(len(row) == 1 for rows in reader.batches(documents) for row in rows)
    if forward_dtype != "tf32":  # which is float32 on a CPU
        single = reader.read([[document] for document in documents])
        reader.packed = True
        packed = reader.read([documents[:20], documents[20:40], documents[40:]])
        apart = [float((packed[s] - single[s]).norm(dim=1).div(single[s].norm(dim=1)).max()) for s in SITES]
        assert max(apart) > 1e-3


def test_the_attention_kernel_matters_only_in_reduced_precision(family: str) -> None:
    """In float32 kernels differ no more than packing may; only otherwise a file depends on which it was."""
    base, half = tiny_base(family), tiny_base(family)
    half.model.bfloat16()
    if base.model._supports_sdpa and base.model._can_set_attn_implementation():
        documents, keys, paths = ids(base, DOCUMENTS[:11]), [], []
        for kernel in ("sdpa", "eager"):
            base.model.set_attn_implementation(kernel)
            half.model.set_attn_implementation(kernel)
            keys.append(alone(base, documents))
            paths.append([Statistics("almanac", forward_dtype=dtype).files(base, SITES) for dtype in (None, "tf32")])
            paths[-1].append(Statistics("almanac").files(half, SITES))
        for site in SITES:
            assert float((keys[0][site] - keys[1][site]).norm(dim=1).div(keys[1][site].norm(dim=1)).max()) < 1e-5
            assert [one[site] == other[site] for one, other in zip(*paths, strict=True)] == [True, False, False]


def test_it_then_takes_one_document_a_row(
    gpt2_base: LanguageModel, statistics: Statistics, request: pytest.FixtureRequest, caplog: Any
) -> None:
    packed = statistics.second_moments(gpt2_base, SITES)
    request.getfixturevalue("blind")
    with caplog.at_level(logging.INFO):
        found = replace(statistics, cache_dir=statistics.cache_dir + "2").second_moments(gpt2_base, SITES)
    assert caplog.text.count("One document a row") == 1
    for site in SITES:
        assert found[site].count == packed[site].count
        torch.testing.assert_close(found[site].mean, packed[site].mean, rtol=1e-5, atol=1e-6)


def test_batches_hold_every_document_once(gpt2_base: LanguageModel) -> None:
    documents = [torch.arange(1 + i % 7, dtype=torch.int32) for i in range(23)]
    reader = KeyReader(gpt2_base, SITES, batch_tokens=20)
    for reader.packed in (False, True):
        batches = reader.batches(documents)
        flat = [id(document) for rows in batches for row in rows for document in row]
        assert sorted(flat) == sorted(map(id, documents))
        assert max(lay_out(rows, packed=reader.packed).input_ids.numel() for rows in batches) <= 20
    assert len(batches) == 5  # 86 tokens


def test_rows_without_room() -> None:
    assert pack([3, 3], room=0) == [[0], [1]]
    assert pack([], room=9) == []


# ---------------------------------------------------------------------- precision


def test_a_bfloat16_forward_is_near_and_leaves_the_weights(gpt2_base: LanguageModel, statistics: Statistics) -> None:
    before = {name: value.clone() for name, value in gpt2_base.model.state_dict().items()}
    exact = statistics.second_moments(gpt2_base, SITES)
    found = replace(statistics, forward_dtype="bfloat16").second_moments(gpt2_base, SITES)
    for site in SITES:
        apart = float((found[site].mean - exact[site].mean).norm() / exact[site].mean.norm())
        assert found[site].mean.dtype == torch.float64
        assert 1e-5 < apart < 0.02
    assert all(torch.equal(value, before[name]) for name, value in gpt2_base.model.state_dict().items())


@pytest.mark.parametrize("precision", ["tf32", "float32"])
def test_matrix_products_are_set_back(
    gpt2_base: LanguageModel, statistics: Statistics, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    run = LanguageModel.run

    def spy(self: LanguageModel, *args: Any) -> None:
        seen.append(torch.get_float32_matmul_precision())
        run(self, *args)

    monkeypatch.setattr(LanguageModel, "run", spy)
    before = torch.get_float32_matmul_precision()
    replace(statistics, forward_dtype=precision).second_moments(gpt2_base, SITES)
    assert {"tf32": "high", "float32": "highest"}[precision] in seen
    assert torch.get_float32_matmul_precision() == before
    gpt2_base.model.bfloat16()
    with pytest.raises(
        StatisticsError, match=rf"forward_dtype: {precision} expected base\.dtype float32, got bfloat16"
    ):
        replace(statistics, forward_dtype=precision).second_moments(gpt2_base, SITES)


# ---------------------------------------------------------------------- convergence


def test_every_doubling_is_said_and_kept(gpt2_base: LanguageModel, statistics: Statistics, caplog: Any) -> None:
    with caplog.at_level(logging.INFO):
        [site] = statistics.second_moments(gpt2_base, SITES[2:])
    lines = [record.getMessage() for record in caplog.records if "held-out keys" in record.getMessage()]
    [path] = statistics.files(gpt2_base, [site]).values()
    with safe_open(path, "pt") as file:
        about = file.metadata()
    changes = {int(tokens): change for tokens, change in json.loads(about["convergence"]).items()}
    assert len(lines) == len(changes) >= 4
    counts = list(changes)
    assert all(1.8 < after / before < 2.2 for before, after in itertools.pairwise(counts))
    assert list(changes.values())[-1] < next(iter(changes.values()))
    assert (
        f"{counts[-1]} tokens: relative change of C⁻¹k on 256 held-out keys {changes[counts[-1]]:.2g} (layer 3)"
        in lines[-1]
    )


def test_the_tolerance_ends_the_count(gpt2_base: LanguageModel, statistics: Statistics, caplog: Any) -> None:
    whole = statistics.second_moments(gpt2_base, SITES[2:])[SITES[2]]
    with caplog.at_level(logging.INFO):
        early = replace(statistics, tokens=100_000, tolerance=0.9).second_moments(gpt2_base, SITES[2:])[SITES[2]]
    assert early.count is not None
    assert whole.count is not None
    assert 128 < early.count < whole.count / 2
    assert "within 0.9, enough" in caplog.text
    assert "fewer than" not in caplog.text
    never = replace(statistics, tolerance=1e-9).second_moments(gpt2_base, SITES[2:])[SITES[2]]
    assert torch.equal(never.mean, whole.mean)


def test_the_count_goes_on_while_one_layer_wants_more(
    gpt2_base: LanguageModel, statistics: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Convergence.update

    def slow(self: Convergence, site: Site, mean: torch.Tensor, count: int) -> float | None:
        return 0.95 if site == SITES[1] and update(self, site, mean, count) else update(self, site, mean, count)

    monkeypatch.setattr(Convergence, "update", slow)
    found = replace(statistics, tolerance=0.9).second_moments(gpt2_base, SITES)
    everything = sum(map(len, ids(gpt2_base, DOCUMENTS)))
    assert found[SITES[0]].count == everything


def test_the_change_is_that_of_the_inverse() -> None:
    site, generator = Site(0), torch.Generator().manual_seed(0)
    keys = torch.randn(5, 3, generator=generator)
    few, many = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (4, 50))
    convergence = Convergence({site: keys})
    assert convergence.update(site, torch.ones(3, 3), 100) is None  # singular
    assert convergence.update(site, few.T @ few, 2) is None  # fewer than the width
    assert convergence.update(site, few.T @ few, 4) is None  # nothing to compare with
    old, new = (torch.linalg.solve(c.T @ c, keys.double().T).T for c in (few, many))
    expected = float(((new - old).norm(dim=1) / new.norm(dim=1)).median())
    assert convergence.update(site, many.T @ many, 50) == pytest.approx(expected)
    assert convergence.changes[site] == {50: pytest.approx(expected)}


# ---------------------------------------------------------------------- after a kill


def _killed(statistics: Statistics, kept: int) -> None:
    """A process that dies as soon as the partial file has been written for the n-th time."""
    torch.set_num_threads(1)
    key_pass.KEEP_EVERY, key_pass.BATCHES = 0.0, 1
    save, calls = moment_files.save_partial, []

    def dying(*args: Any) -> None:
        save(*args)
        calls.append(args)
        if len(calls) == kept:
            os.kill(os.getpid(), signal.SIGKILL)

    moment_files.save_partial = dying
    statistics.second_moments(tiny_base("gpt2"), SITES)


@pytest.mark.parametrize("kept", [1, 9])
def test_a_killed_pass_goes_on(
    gpt2_base: LanguageModel, statistics: Statistics, kept: int, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(key_pass, "BATCHES", 1)
    process = torch.multiprocessing.get_context("spawn").Process(target=_killed, args=(statistics, kept))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    folder = Path(str(statistics.cache_dir))
    [partial] = folder.iterdir()
    _, about = moment_files.load_partial(partial) or ({}, {})
    stood = json.loads(about["state"])["documents"]
    read: list[int] = []
    step = KeyPass.test_step

    def count(self: KeyPass, round_: Any, index: int) -> None:
        read.append(len(round_.documents))
        step(self, round_, index)

    monkeypatch.setattr(KeyPass, "test_step", count)
    with caplog.at_level(logging.INFO):
        resumed = statistics.second_moments(gpt2_base, SITES)
    assert "where a pass was stopped" in caplog.text
    assert sum(read) == len(DOCUMENTS) - stood
    assert not list(folder.glob("partial_*"))
    read.clear()
    whole = replace(statistics, cache_dir=str(folder) + "2")
    never_killed = whole.second_moments(gpt2_base, SITES)
    assert sum(read) == len(DOCUMENTS)
    headers = []
    for site in SITES:
        assert resumed[site].count == never_killed[site].count
        assert torch.equal(resumed[site].mean, never_killed[site].mean)
        for path in (statistics.files(gpt2_base, [site])[site], whole.files(gpt2_base, [site])[site]):
            with safe_open(path, "pt") as file:
                headers.append(file.metadata()["convergence"])
        assert headers[-1] == headers[-2]


def _stopped(base: LanguageModel, statistics: Statistics, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The partial file of a pass that an error ended."""
    save = moment_files.save_partial

    def failing(*args: Any) -> None:
        save(*args)
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(moment_files, "save_partial", failing)
        with pytest.raises(RuntimeError):
            statistics.second_moments(base, SITES)
    [partial] = Path(str(statistics.cache_dir)).iterdir()
    return partial


def test_other_settings_do_not_find_the_partial_file(
    gpt2_base: LanguageModel, statistics: Statistics, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    partial = _stopped(gpt2_base, statistics, monkeypatch)
    with caplog.at_level(logging.INFO):
        replace(statistics, seed=2).second_moments(gpt2_base, SITES)
        statistics.second_moments(gpt2_base, SITES[:1])
    assert "where a pass was stopped" not in caplog.text
    assert partial.is_file()


@pytest.mark.parametrize("damage", ["truncated", "one bit", "garbage"])
def test_a_damaged_partial_file_is_left_aside(
    gpt2_base: LanguageModel, statistics: Statistics, damage: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    partial = _stopped(gpt2_base, statistics, monkeypatch)
    whole = partial.read_bytes()
    flipped = whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]
    partial.write_bytes({"truncated": whole[:-500], "one bit": flipped, "garbage": b"x"}[damage])
    found = statistics.second_moments(gpt2_base, SITES)[SITES[0]]
    assert sum(record.levelno >= logging.WARNING for record in caplog.records) == 1
    assert "starts from its beginning" in caplog.text
    assert found.count == sum(map(len, ids(gpt2_base, DOCUMENTS)))


def test_no_room_for_partial_sums_is_one_warning(
    gpt2_base: LanguageModel, statistics: Statistics, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("kedit_lightning.models.key_pass.KEEP_EVERY", 0.0)
        patch.setattr("kedit_lightning.models.moment_files.save_file", full)
        found = statistics.second_moments(gpt2_base, SITES)
    warned = [record.getMessage() for record in caplog.records]
    assert sum("Cannot keep partial sums" in line for line in warned) == 1
    assert found[SITES[0]].count == sum(map(len, ids(gpt2_base, DOCUMENTS)))
    assert list(Path(str(statistics.cache_dir)).iterdir()) == []


def _one_of_two(rank: int, folder: str, statistics: Statistics, victim: int | None) -> None:
    """One of two processes that do a pass together; the victim dies after its fifth round."""
    torch.set_num_threads(1)
    key_pass.KEEP_EVERY, key_pass.BATCHES = 0.0, 1
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet_{victim}", rank=rank, world_size=2)
    between, rounds = KeyPass._between, []

    def dying(self: KeyPass, round_: Any) -> None:
        between(self, round_)
        rounds.append(len(round_.documents))
        if len(rounds) == 5 and rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    KeyPass._between = dying  # type: ignore[method-assign]
    found = statistics.second_moments(tiny_base("gpt2"), SITES)
    sums = {str(i): found[site].mean for i, site in enumerate(SITES)}
    save_file(sums | {"read": torch.tensor(sum(rounds))}, f"{folder}/rank{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_two_processes_go_on_where_one_was_killed(
    gpt2_base: LanguageModel, statistics: Statistics, tmp_path: Path, victim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one is ended by whoever started both, as torchrun does."""
    with pytest.raises(torch.multiprocessing.ProcessExitedException) as killed:
        torch.multiprocessing.spawn(_one_of_two, (str(tmp_path), statistics, victim), nprocs=2)
    assert killed.value.exit_code == -signal.SIGKILL
    [partial] = Path(str(statistics.cache_dir)).glob("partial_*.safetensors")
    _, about = moment_files.load_partial(partial) or ({}, {})
    stood = json.loads(about["state"])["documents"]
    assert stood > 0
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path), statistics, None), nprocs=2)
    assert not partial.exists()
    monkeypatch.setattr(key_pass, "BATCHES", 2)  # the same rounds in one process
    whole = replace(statistics, cache_dir=str(tmp_path / "whole")).second_moments(gpt2_base, SITES)
    for rank in range(2):
        resumed = load_file(tmp_path / f"rank{rank}.safetensors")
        assert 0 < resumed["read"] < len(DOCUMENTS) - stood  # the held-out documents come last, by themselves
        for i, site in enumerate(SITES):
            torch.testing.assert_close(resumed[str(i)], whole[site].mean, rtol=1e-9, atol=1e-12)
    for path in statistics.files(gpt2_base, SITES).values():
        with safe_open(path, "pt") as file:
            assert int(file.metadata()["count"]) == whole[SITES[0]].count


# ---------------------------------------------------------------------- what a person sees


@pytest.mark.parametrize("tokens", [3_000, "full"])
def test_steps_go_to_the_bars_that_are_up(gpt2_base: LanguageModel, statistics: Statistics, tokens: Any) -> None:
    shown: list[tuple[str, int, int | None, str]] = []
    token = DISPLAY.set(lambda *step: shown.append(step))
    try:
        count = replace(statistics, tokens=tokens).second_moments(gpt2_base, SITES)[SITES[0]].count
    finally:
        DISPLAY.reset(token)
    done = [step[1] for step in shown]
    assert done == sorted(done)
    assert len(done) > 10
    assert shown[-1][1] == count
    assert shown[-1][2] == pytest.approx(count, rel=0.05)  # of a whole text it is guessed from the documents so far
    assert shown[-1][3].endswith(" tokens/s")
    if tokens == 3_000:
        assert {step[2] for step in shown} == {3_000}


@pytest.fixture
def said() -> Iterator[None]:
    """What `kedit` does to loggers, undone."""
    before = [(logging.getLogger(name), logging.getLogger(name).level) for name in SAID]
    quiet()
    yield
    for logger, level in before:
        logger.setLevel(level)
        logger.handlers.clear()


@pytest.mark.usefixtures("said")
def test_kedit_says_how_it_converges(
    gpt2_base: LanguageModel, statistics: Statistics, capsys: pytest.CaptureFixture[str]
) -> None:
    statistics.second_moments(gpt2_base, SITES)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"Second moments of 3 layers over {statistics.source}."
    assert sum("held-out keys" in line for line in lines) >= 4
    assert not any("\r" in line or "\x1b" in line for line in lines)


def test_a_terminal_has_a_bar_of_its_own(
    gpt2_base: LanguageModel,
    statistics: Statistics,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    statistics.second_moments(gpt2_base, SITES)
    err = capsys.readouterr().err
    assert "second moments" in err
    assert "tokens/s" in err
    assert err.rstrip().endswith("\x1b[2K")  # nothing of it stays
