"""`kedit plan`: its numbers against counts by hand and against what a fit leaves; nothing is written or changed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from kedit_lightning import planning
from kedit_lightning.calibration import Step, step_of_every_stage
from kedit_lightning.editors import Editor
from kedit_lightning.models import Statistics, memory
from kedit_lightning.plan import DISK, Moments, Need, Plan, Rows
from kedit_lightning.plan_table import table
from kedit_lightning.planning import plan
from tests.commandline import World, done, kedit
from tests.editors.fitting import EDITORS, LEARNED, TEMPLATES, VALUES, bits, fit, make, same, trainer, untouched
from tests.families import EDITS, tiny_base
from tests.test_trainer import data

THREE = EDITS[:3]


def planned(editor: Editor, folder: Path, **settings: Any) -> Plan:
    module = data(THREE, **settings)
    module.setup("fit")
    return plan(trainer(folder), editor, module)


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


# ---------------------------------------------------------------------- the command


def test_the_command_counts_and_writes_nothing(world: World) -> None:
    config = world.config(statistics={"source": str(world.corpus), "tokens": 400})
    before = everything(world.folder)
    shown = done("plan", "--config", config, "--data.restore_every", 1, "--data.parallel_edits", 1).out
    assert everything(world.folder) == before
    words = " ".join(shown.split())
    tokenizer = tiny_base("gpt2").tokenizer
    tokens = []
    for edit in EDITS[:4]:
        target = len(tokenizer(f"{edit.text} {edit.target_new}")["input_ids"]) - 1
        prefixed = len(tokenizer(f"Yes. {edit.text} {edit.target_new}")["input_ids"]) - 1
        tokens.append(target + prefixed + len(tokenizer(f"{edit.subject} is a")["input_ids"]))
    assert "edits 4 in 4 batches of at most 1" in words
    assert "rows 12, 3 an edit" in words
    assert f"tokens {sum(tokens):,}, {sum(tokens) / 4:.1f} an edit, {max(tokens):,} at most" in words
    changed = r"stage v, layer 1 4 steps at most; layers [12] to 3 of 4"
    assert re.search(changed, words), "an MLP's output changes nothing below it"
    assert "1 of 1 to be computed over 400 tokens" in words
    assert "deltas/ 4 files of" in words
    assert "fits yes" in words


def test_statistics_that_are_there_are_not_announced(world: World) -> None:
    config = world.config(statistics={"source": str(world.corpus), "tokens": 401})
    assert "1 of 1 to be computed" in done("plan", "--config", config).out
    done("statistics", "--config", config)
    assert "1 of 1 are there" in " ".join(done("plan", "--config", config).out.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--model.init_args.statistics.source", "missing.txt"), "missing.txt: no such file"),
        (("--data.start", 9), "nothing to edit: 4 records"),
        (("--base.name", "no/such-model"), "no/such-model"),
    ],
)
def test_what_cannot_be_planned_is_one_line(world: World, changes: tuple[object, ...], message: str) -> None:
    refused = kedit("plan", "--config", world.config(), *changes)
    assert refused.status == 1
    assert message in refused.err
    assert refused.err.count("\n") == 1


# ---------------------------------------------------------------------- every editor


@pytest.mark.parametrize(
    ("name", "batch_size", "restore_every"), [("ROME", 1, 1), ("FT", 1, 1), *((name, 2, None) for name in EDITORS)]
)
def test_a_plan_is_what_a_fit_leaves(name: str, batch_size: int, restore_every: int | None, tmp_path: Path) -> None:
    stream = {"batch_size": batch_size, "restore_every": restore_every}
    base = tiny_base("gpt2")
    before = bits(base)
    editor = make(name, base, (1, 2))
    found = planned(editor, tmp_path / "plan", **stream)
    assert same(base, before)
    assert untouched(base)
    assert not (tmp_path / "plan").exists()
    assert (list(editor.deltas), editor.moments, editor.outcomes) == ([], {}, [])

    run = fit(editor, THREE, tmp_path / "after", **stream).run
    sizes = [tensor_bytes(file) for file in sorted((run.path / "deltas").iterdir())]
    merged = tensor_bytes(run.path / "delta.safetensors")
    if name in LEARNED:  # of a rank of the edits' tokens, which nobody has read yet
        assert (len(found.commits), found.merged) >= (len(sizes), merged)
        assert all(most >= size for most, size in zip(found.commits, sizes, strict=True))
    else:
        assert (list(found.commits), found.merged) == (sizes, merged)
    stages = [stage for record in run.records()[:1] for stage in record["stages"]]
    assert [(step.stage, step.layer) for step in found.steps] == [(stage["stage"], stage["layer"]) for stage in stages]
    assert all(step.steps >= stage["steps"] for step, stage in zip(found.steps, stages, strict=True))
    edited = bits(base)

    fresh = tiny_base("gpt2")
    fit(make(name, fresh, (1, 2)), THREE, tmp_path / "without", **stream)
    assert same(fresh, edited), "a fit after a plan is the fit without one"


def tensor_bytes(file: Path) -> int:
    with safe_open(file, "pt") as found:
        return sum(found.get_tensor(key).nbytes for key in found.keys())  # noqa: SIM118


def test_rows_and_parts_by_hand(tmp_path: Path) -> None:
    editor = make("MEMIT", tiny_base("gpt2"), (1, 2), max_tokens=1)
    found = planned(editor, tmp_path, batch_size=3)
    base, templates = editor.base, [template for group in TEMPLATES.templates or [] for template in group]
    lengths = []
    for edit in THREE:
        prompts = [len(base.encode(template.format(edit.text), edit.target_new).ids) for template in templates]
        lengths.append([*prompts, len(base.encode(f"{edit.subject} is a").ids)])
    assert found.rows.rows == 3 * (len(templates) + 1)
    assert sorted(found.rows.tokens) == sorted(map(sum, lengths))
    padded = [len(mine) * max(mine) for mine in lengths]
    assert [sorted(parts) for parts in found.rows.parts] == [sorted(padded)], "an edit a part"
    assert found.rows.padding == pytest.approx(1 - sum(map(sum, lengths)) / sum(padded))
    assert found.rows.largest == max(padded)


def test_memory_is_that_of_the_memory_module(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    statistics = Statistics(str(corpus_in(tmp_path)), tokens=300, cache_dir=str(tmp_path / "cache"))
    editor = make("MEMIT", base, (1, 2), mom2_adjustment=True, statistics=statistics)
    found = planned(editor, tmp_path, batch_size=3)
    assert not (tmp_path / "cache").exists()
    assert (found.moments.sites, found.moments.missing, found.moments.tokens) == (2, 2, 300)
    d, k = base.weight(editor.sites()[0]).shape
    sizes = {need.what: need.size for need in found.needs}
    moments = statistics.second_moments(base, editor.sites())
    ((fixed, each),) = memory.needed(base, editor.sites(), 3, 0, moments).values()
    assert sizes["3 edits together"] == fixed + 3 * each
    assert sizes["second moments"] == 2 * 4 * k * k
    assert sizes["edited weights, as before the run and before the batch"] == 2 * 2 * 4 * d * k
    assert sizes["updates"] == sum(found.commits) + found.merged
    assert found.weights == sum(4 * weight.numel() for weight in base.model.parameters())


def corpus_in(folder: Path) -> Path:
    from tests.families import corpus

    path = folder / "corpus.txt"
    path.write_text("\n".join(corpus()[:40]))
    return path


def test_what_does_not_fit_is_said_with_what_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = make("MEMIT", tiny_base("gpt2"), (1, 2))
    ((fixed, each),) = editor.needs(3).values()
    for module in (planning, memory):
        monkeypatch.setattr(module, "free_memory", lambda _: fixed + 2 * each)
    found = planned(editor, tmp_path, batch_size=3)
    assert (found.tight, found.room, len(found.steps)) == (["main memory"], 2, 1)
    assert "set data.batch_size to at most 2" in shown(found)
    for module in (planning, memory):
        monkeypatch.setattr(module, "free_memory", lambda _: fixed)
    found = planned(editor, tmp_path, batch_size=3)
    assert (found.room, found.steps) == (0, [])
    assert "a larger machine is needed" in shown(found)


# ---------------------------------------------------------------------- the work of a step


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize(("name", "stage"), [("ROME", 0), ("TOP", 0), ("TOP", 1), ("MEMIT", 0)])
def test_the_flop_ratio_is_that_of_a_direct_count(name: str, stage: int, family: str) -> None:
    step, counted = {}, {}
    for forward in ("suffix", "full"):
        base = tiny_base(family)
        base.model.set_attn_implementation("eager")  # its products are counted
        editor = make(name, base, (1,), forward=forward)
        editor.prepare_rows()
        editor.moments = planning._stand_ins(editor)
        step[forward] = step_of_every_stage(editor, THREE)[stage]
        editor.take_up(editor.parts[0])
        for i, one in enumerate(editor.course()):
            if i == stage:
                one.begin()
                evaluate = one.prepare()
                with FlopCounterMode(display=False) as counter:
                    evaluate().total.sum().backward()  # type: ignore[no-untyped-call]
                counted[forward] = counter.get_total_flops()
    assert step["suffix"].full / step["suffix"].flop == pytest.approx(counted["full"] / counted["suffix"], rel=0.15)
    assert step["suffix"].flop == pytest.approx(counted["suffix"], rel=0.15)
    assert step["suffix"].flop < step["suffix"].full
    assert step["full"].flop == pytest.approx(step["full"].full)
    assert step["full"].share == 1


def test_a_part_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = make("MEMIT", tiny_base("gpt2"))
    editor.prepare_rows()
    editor.moments = planning._stand_ins(editor)
    take_up = editor.take_up

    def small(part: Any) -> None:
        if len(part) > 1:
            raise torch.OutOfMemoryError
        take_up(part)

    monkeypatch.setattr(editor, "take_up", small)
    (step,) = step_of_every_stage(editor, THREE)
    assert step.part == editor.parts[0].tokens
    assert (len(editor.parts[0]), editor.budget) == (1, editor.parts.max_tokens)


# ---------------------------------------------------------------------- arithmetic


STEP = Step("v", 1, 20, (1, 3), 0.5, 1e9, 4e9, prepare=2.0, seconds=0.5, memory=2**20, part=100)
PLAN = Plan(
    title="ROME, single",
    layers=4,
    batches=[2, 2],
    beside=1,
    passes=1,
    rows=Rows(12, [40, 60, 30, 30], [[100, 50], [90]]),
    budget=100,
    steps=[STEP, replace(STEP, steps=10, prepare=1.0)],
    weights=2**20,
    moments=Moments(2, 1, tokens=1000, documents=50, seconds=0.01),
    needs=[
        Need("main memory", "2 edits together", 600.0),
        Need("main memory", "a step", 100.0),
        Need(DISK, "updates", 9),
    ],
    free={"main memory": 700, DISK: 10},
    room=2,
    measuring=60.0,
    commits=[4, 4],
    merged=1,
    run=Path("logs"),
)


def shown(found: Plan) -> str:
    """The table's text on one line."""
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(table(found))
    return " ".join(capture.get().split())


def test_times_by_hand() -> None:
    assert PLAN.optimising == pytest.approx((2 + 20 * 0.5 + 1 + 10 * 0.5) * 240 / 100)
    assert PLAN.collecting == 10
    assert "in all about" in shown(PLAN)
    unknown = replace(PLAN, moments=replace(PLAN.moments, tokens=None))
    assert "unknown: 1 of 2 to be computed over 50 documents" in shown(unknown)
    assert re.search(r"in all about \d+ s and what is unknown", shown(unknown))
    assert replace(PLAN, moments=Moments(2)).collecting == 0


@pytest.mark.parametrize(
    ("changes", "tight", "advice"),
    [
        ({}, [], ""),
        ({"free": {"main memory": 699, DISK: 10}}, ["main memory"], "max_tokens"),
        ({"free": {"main memory": 699, DISK: 10}, "room": 1}, ["main memory"], "data.batch_size to at most 1"),
        ({"free": {"main memory": 700, DISK: 8}}, [DISK], "trainer.save_dir"),
    ],
)
def test_whether_it_fits(changes: dict[str, Any], tight: list[str], advice: str) -> None:
    found = replace(PLAN, **changes)
    assert found.tight == tight
    assert advice in found.advice
    assert ("fits yes" in shown(found)) is not bool(tight)
    assert (f"no: {' and '.join(tight)} too small" in shown(found)) is bool(tight)


def test_weights_are_trained_in_dense_copies() -> None:
    assert "FT" not in VALUES
    base = tiny_base("gpt2")
    dense = 4 * base.weight("transformer.h.1.mlp.c_proj.weight").numel()
    for ball, copies in ((None, 5), (0.1, 7)):
        editor = make("FT", base, norm_constraint=ball)
        one = editor.update_size(1)
        assert dense <= one == editor.update_size(100)
        assert editor.needs(100) == {torch.device("cpu"): ((1 + copies) * one, 0)}
