"""Several real processes that share the rows of an edit batch: what one process finds, bit for bit the same in all."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning import Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from torch.utils.data import DataLoader

from kedit_lightning import objectives
from kedit_lightning.data.prompts import ContextTemplates
from kedit_lightning.editors import Editor
from kedit_lightning.editors.compression import Compression
from kedit_lightning.editors.ft import ElasticNet
from kedit_lightning.editors.learned import LearnedEditor
from kedit_lightning.editors.tuning import WeightTraining
from kedit_lightning.edits import Edit, Site, Token
from kedit_lightning.errors import DataError, KeditError, RejectedError
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.launching import RowsStrategy, together
from kedit_lightning.models.processes import (
    agreed,
    attempted,
    first,
    gathered,
    is_shared_shortage,
    of_all,
    of_first,
    ranks,
    same,
    share,
    summed,
)
from kedit_lightning.models.statistics import Statistics
from tests.editors.fitting import make
from tests.families import EDITS, corpus, tiny_base

PATIENCE = 240.0
"""Seconds after which processes that wait for each other are ended."""


@dataclass(frozen=True)
class Case:
    """An editor, its edits, and settings with which some of them stop early; ``said``: the model says them already."""

    editor: str
    edits: list[Edit]
    settings: dict[str, Any] = field(default_factory=dict)
    said: bool = False


WIDE = {"clamp_norm_factor": 6.0}
EAC = Compression(v_num_grad_steps1=4, v_num_grad_steps2=4, elastic_l1=1e-3)
TWO = ContextTemplates(templates=[["{}", "Yes. {}"]])  # and "{subject} is a", which is all that the third process has
CASES = {
    "ROME": Case("ROME", EDITS[:1]),
    "ROME, one process asks nothing": Case("ROME", EDITS[:1], {"kl_factor": 0.0, "context_templates": TWO}),
    "TOP": Case("TOP", EDITS[:2], {"stop1": 6.9, "stop2": 0.5, "clamp_norm_factor": 6.0}),
    "TOP, one edit": Case("TOP", EDITS[:1], {"preset": "released"}),
    "MEMIT": Case("MEMIT", EDITS, {"stop": 6.63} | WIDE),
    "JEEP": Case("JEEP", EDITS[:3], {"min_loss": 0.0018, "v_num_grad_steps": 8} | WIDE),
    "JEEP, high": Case("JEEP", EDITS[:2], {"optimize": "high"}),
    "PMET": Case("PMET", EDITS[:3], said=True),
    "EAC": Case("ROME", EDITS[:2], {"compress": EAC}),
    "EAC of TOP": Case("TOP", EDITS[:2], {"compress": replace(EAC, gamma=50.0, kl_reference="start")}),
    "MEND": Case("MEND", EDITS[:4]),
    "MALMEN": Case("MALMEN", EDITS[:2]),
    "FT": Case("FT", EDITS[:4], {"batch_size": 3, "stop": 4.4}),
    "FT, held": Case("FT", EDITS[:2], {"elastic_net": ElasticNet(num_steps=3, elastic_l1=1e-4)}),
}

FAR = {"JEEP": 2e-6}
"""How far δ may be from that of one process where Adam makes more of its rounding: 1.5e-6 for one of JEEP's six δs."""


# ---------------------------------------------------------------------- processes and fits


def in_processes(n: int, work: Callable[[Trainer], None]) -> None:
    """Do something in n processes with a trainer in each; what one of them raises is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = start_processes(_process, (n, port, work), nprocs=n, join=False, start_method="fork")
    end = time.monotonic() + PATIENCE
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, "processes wait for each other"
    finally:
        for process in context.processes:
            process.kill()


def _process(rank: int, n: int, port: int, work: Callable[[Trainer], None]) -> None:
    environ = {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environ.items()})
    made = plain(devices=n, strategy=RowsStrategy())
    together(made, lambda: work(made))


def plain(**settings: Any) -> Trainer:
    """Lightning's own trainer."""
    return Trainer(
        accelerator="cpu",
        logger=False,
        max_epochs=-1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **settings,
    )


def optimise(trainer: Trainer, case: Case, **settings: Any) -> Editor:
    """One fit."""
    editor = make(case.editor, tiny_base("gpt2"), **(case.settings | settings))
    editor.prepare()
    editor.begin(case.edits)
    if case.said:
        say_nearly(editor)
    trainer.fit(editor, DataLoader([0]))  # type: ignore[arg-type]
    return editor


def say_nearly(editor: Editor) -> None:
    """Ask each edit for the tokens that the model says itself; of the second one, in one row, for others."""
    for part in editor.parts:
        labels = part.rows.labels
        asked = labels >= 0
        labels[asked] = editor.base.logits(part.rows).argmax(dim=-1)[asked]
        row = int(part.bare[1]) + 1
        labels[row, asked[row]] = (labels[row, asked[row]] + 1) % 100


def outcome(editor: Editor) -> dict[str, Tensor]:
    """All that a fit finds: values or weights, how each stage went, keys and values of the model."""
    if isinstance(editor, WeightTraining):
        found = {tuned.name: tuned.value for tuned in editor.tuned}
    elif isinstance(editor, LearnedEditor):
        found = {f"delta {update.name}": update.update for update in editor.write()}
    else:
        found = {f"delta {i}": delta.delta for i, delta in enumerate(editor._deltas)}
        found |= {f"origin {i}": delta.origin for i, delta in enumerate(editor._deltas)}
    for i, stage in enumerate(editor.outcomes):
        found |= {f"{i} steps": stage.steps, f"{i} converged": stage.converged, f"{i} probability": stage.probability}
        found |= {f"{i} {j} {term}": v for j, curve in enumerate(stage.curves) for term, v in curve.items()}
    tokens = {Site(0, "attn"): Token.PROMPT_LAST, Site(1, "mlp"): Token.SUBJECT_LAST}
    for site, keys in editor.keys(tokens, bare=True).items():
        found |= {f"mean {site}": keys.mean, f"bare {site}": keys.bare}
    for site, values in editor.present({Site(2, "block"): Token.PROMPT_LAST}).items():
        found |= {f"present {site}": values}
    return {name: value.detach().contiguous().clone() for name, value in found.items()}


@cache
def alone(name: str) -> dict[str, Tensor]:
    """What one process finds."""
    return outcome(optimise(plain(), CASES[name]))


Found = dict[str, list[dict[str, Tensor]]]


@pytest.fixture(scope="module", params=[3, pytest.param(2, marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each of three processes finds, and of two."""
    n, folder = int(request.param), tmp_path_factory.mktemp("found")

    def work(_: Trainer) -> None:
        for name, case in CASES.items():
            editor = optimise(plain(devices=n, strategy=RowsStrategy()), case)
            save_file(outcome(editor), folder / f"{name} {ranks()[0]}")

    in_processes(n, work)
    return {name: [load_file(folder / f"{name} {rank}") for rank in range(n)] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_processes_find_what_one_finds(found: Found, name: str) -> None:
    """More processes than edits, and than rows of one, included; the same bits in every process."""
    one, several = alone(name), found[name]
    for theirs in several:
        assert theirs.keys() == one.keys()
        for key, expected in one.items():
            assert torch.equal(theirs[key].nan_to_num(), several[0][key].nan_to_num()), key
            if key.startswith("delta"):
                far = (theirs[key] - expected).abs().amax(dim=1) / expected.norm(dim=1).clamp(min=1)
                assert float(far.max()) < FAR.get(name, 1e-6), key
            elif expected.is_floating_point():
                torch.testing.assert_close(theirs[key], expected, rtol=1e-5, atol=1e-6, equal_nan=True, msg=key)
            else:
                assert torch.equal(theirs[key], expected), key


@pytest.mark.parametrize("name", ["TOP", "MEMIT", "JEEP", "PMET"])
def test_some_edits_stop_before_others(name: str) -> None:
    """Otherwise the test above would not see a process stop alone."""
    steps, converged = alone(name)["0 steps"], alone(name)["0 converged"]
    assert len(set(steps.tolist())) > 1
    assert converged.any()


# ---------------------------------------------------------------------- what happens in one process alone


@pytest.mark.parametrize("name", ["MEMIT", pytest.param("FT", marks=pytest.mark.slow)])
def test_memory_that_is_too_small_in_one_is_so_in_all(tmp_path: Path, name: str) -> None:
    """In every pass through the model, and in the gradients: the first one fails, and the seventh."""
    places = {"forward": (LanguageModel, "logits"), "backward": (Editor, "manual_backward")}

    def work(_: Trainer) -> None:
        for place, (owner, method) in places.items():
            with patch.object(owner, method, _failing(getattr(owner, method), (1, 7) if ranks()[0] == 1 else ())):
                editor = optimise(plain(devices=2, strategy=RowsStrategy()), CASES[name])
            found = outcome(editor) | {"parts": torch.tensor(len(editor.parts))}
            save_file(found, tmp_path / f"{place} {ranks()[0]}")

    in_processes(2, work)
    one = alone(name)
    for place in places:
        several = [load_file(tmp_path / f"{place} {rank}") for rank in range(2)]
        for theirs in several:
            assert int(theirs["parts"]) > 2
            for key, expected in one.items():
                assert torch.equal(theirs[key].nan_to_num(), several[0][key].nan_to_num()), key
                torch.testing.assert_close(theirs[key], expected, rtol=1e-4, atol=1e-5, equal_nan=True, msg=key)


def _failing(method: Callable[..., Any], at: Sequence[int]) -> Callable[..., Any]:
    """A method that runs out of memory the n-th time it is called."""
    calls = itertools.count(1)

    def failing(*args: Any) -> Any:
        if next(calls) in at:
            msg = "injected"
            raise torch.OutOfMemoryError(msg)
        return method(*args)

    return failing


def test_a_loss_that_is_not_finite_in_one_rejects_the_edit_in_all(tmp_path: Path) -> None:
    def work(trainer: Trainer) -> None:
        rank, nll = ranks()[0], objectives.nll
        if rank == 1:
            objectives.nll = lambda *of: nll(*of) * torch.nan
        with pytest.raises(RejectedError, match="case 0: the loss is nan at step 1") as rejected:
            optimise(trainer, CASES["ROME"])
        (tmp_path / str(rank)).write_text(str(rejected.value.reasons))

    in_processes(2, work)
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()


def test_what_processes_tell_each_other(tmp_path: Path) -> None:
    def work(_: Trainer) -> None:
        rank, n = ranks()
        assert share(7).tolist() == [[0, 3, 6], [1, 4], [2, 5]][rank]
        assert share(1).tolist() == [[0], [], []][rank]
        assert summed(torch.tensor([rank, 1.0])).tolist() == [3.0, 3.0]
        assert of_first(torch.tensor([rank + 5])).tolist() == [5]
        told = [{"é": [rank, None, "x" * 5_000 * rank, 0.1]}, True]
        assert gathered(told) == [[{"é": [i, None, "x" * 5_000 * i, 0.1]}, True] for i in range(n)]
        assert agreed({"rank": rank}) == {"rank": 0}
        assert of_all(["a", "bcd"[rank]]) == ["a", "b", "c", "d"]
        ran = []
        assert first(lambda: ran.append(rank) or ["done"]) == ["done"]
        assert ran == ([0] if rank == 0 else [])
        for error in (KeditError("one"), DataError("two"), RejectedError({3: "three"})):
            with pytest.raises(type(error)) as raised:
                first(partial(_raise, error))
            assert str(raised.value) == str(error)
            assert getattr(raised.value, "reasons", {3: "three"}) == {3: "three"}
        seen: type[Exception] = KeditError if rank else ZeroDivisionError
        with pytest.raises(seen, match="by"):
            first(partial(_raise, ZeroDivisionError("by")))
        same("code", "abc", "start again")
        with pytest.raises(KeditError, match="weights: expected the same in all 3 processes, got others in 2; stop"):
            same("the weights", "abx" if rank == 2 else "abc", "stop")
        assert attempted(lambda: rank) == rank
        with pytest.raises(torch.OutOfMemoryError) as shortage:
            attempted(lambda: _raise(torch.OutOfMemoryError("here")) if rank == 1 else rank)
        assert is_shared_shortage(shortage.value)
        assert not is_shared_shortage(torch.OutOfMemoryError("here alone"))
        (tmp_path / str(rank)).touch()

    in_processes(3, work)
    assert len(list(tmp_path.iterdir())) == 3, "no process has ended before"


def _raise(error: Exception) -> None:
    raise error


# ---------------------------------------------------------------------- what is prepared


def test_processes_prepare_together(tmp_path: Path) -> None:
    """Documents are shared out, and templates sampled once, where processes talk to each other already."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(corpus()[:90]), encoding="utf-8")
    statistics = Statistics(str(path), tokens="full", mom2_dtype="float64", batch_tokens=256)

    def prepared(folder: str) -> Editor:
        here = replace(statistics, cache_dir=str(tmp_path / folder))
        own = {"mom2_adjustment": True, "statistics": here, "context_templates": ContextTemplates()}
        editor = make("ROME", tiny_base("gpt2"), **own)
        editor.prepare()
        return editor

    def work(_: Trainer) -> None:
        rank = ranks()[0]
        torch.manual_seed(rank)
        editor = prepared("several")
        same("templates", str(editor.templates), "")
        save_file({"mean": editor.moments[Site(1)].mean}, tmp_path / f"rank{rank}")  # type: ignore[attr-defined]

    in_processes(2, work)
    one = prepared("one").moments[Site(1)].mean  # type: ignore[attr-defined]
    for rank in range(2):
        torch.testing.assert_close(load_file(tmp_path / f"rank{rank}")["mean"], one, rtol=1e-9, atol=1e-12)
    assert len(list((tmp_path / "several").iterdir())) == 1
