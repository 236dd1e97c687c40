"""`kedit` end to end, on tiny models: commands, the run directory, protocols, and what an interrupt leaves."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import AutoModelForCausalLM

from kedit_lightning import __version__
from kedit_lightning import delta as delta_files
from kedit_lightning.callbacks.figures import Figures
from kedit_lightning.cli import OTHER_COMMANDS, TRAINER_COMMANDS
from kedit_lightning.models import LanguageModel
from kedit_lightning.run import RunDirectory, read_deltas
from tests.commandline import World, done, kedit
from tests.updates import bits, same_bits

BEGUN = {"config.yaml", "run.json", "run.lock", "contexts.json", "before.jsonl", "deltas", "edits.jsonl"}
FILES = BEGUN | {"delta.safetensors", "metrics.json"}
PICTURES = {"before_after.png", "loss_curves.png"}


@pytest.fixture(scope="module")
def config(world: World) -> Path:
    """ROME with sampled templates and computed statistics, as it is used."""
    return world.config(
        v_num_grad_steps=12,
        context_templates={"context_template_length_params": [[5, 1]]},
        statistics={"source": str(world.corpus), "tokens": 400},
    )


@pytest.fixture(scope="module")
def run(world: World, config: Path) -> Path:
    """Four sequential edits."""
    return world.fit(config, name="four")


@pytest.fixture(autouse=True)
def _no_pictures(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time of so short a run; `run` has them."""
    monkeypatch.setattr(Figures, "on_stream_end", lambda *_: None)


def tensors(run: Path) -> dict[str, Tensor]:
    return load_file(run / "delta.safetensors")


def report(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return content


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same summary; batches are padded otherwise, which the last digits show."""
    assert found.keys() == expected.keys()
    for metric, summary in expected.items():
        for key, value in summary.items():
            assert found[metric][key] == pytest.approx(value, rel=1e-5, abs=1e-7, nan_ok=True), (metric, key)


def newest(folder: Path) -> Path:
    return max(folder.glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))


# ---------------------------------------------------------------------- the command


def test_help_and_version() -> None:
    for args in ((), ("--help",), ("-h",)):
        usage = done(*args).out
        assert all(f"  {command.replace('_', '-')} " in usage for command in (*TRAINER_COMMANDS, *OTHER_COMMANDS))
    assert done("--version").out == f"kedit {__version__}\n"


@pytest.mark.parametrize("command", [*TRAINER_COMMANDS, *OTHER_COMMANDS])
def test_help_of_every_command(command: str) -> None:
    result = done(command, "--help")
    assert result.out.startswith("usage: ")
    assert result.err == ""
    words = {
        "fit": "--data.batch_size",
        "test": "--delta",
        "predict": "--prompts",
        "apply": "--out",
        "revert": "--edit",
    }
    assert words.get(command, "") in result.out


# ---------------------------------------------------------------------- fit


def test_the_run_directory(world: World, run: Path) -> None:
    there = {path.name for path in run.iterdir()}
    events = {name for name in there if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    assert there == FILES | PICTURES | events
    assert [path.name for path in sorted((run / "deltas").iterdir())] == [f"{i:06d}.safetensors" for i in range(4)]
    contexts = json.loads((run / "contexts.json").read_text())["templates"]
    assert contexts[0][0] == "{}"
    assert len(contexts[0]) == 2
    content = report(run)
    assert (content["editor"], content["edits"]) == ("ROME", 4)
    assert (content["protocol"]["batch_size"], content["protocol"]["restore_every"]) == (1, None)
    assert content["protocol"]["base"] == str(world.base)
    for when in ("pre", "post"):
        assert content[when]["efficacy"].keys() >= {"mean", "std", "ci95", "n"}


def test_a_line_an_edit(world: World, run: Path) -> None:
    lines = (run / "edits.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == len(world.edits)
    for i, (record, edit) in enumerate(zip(records, world.edits, strict=True)):
        asked = ("case_id", "prompt", "subject", "target_new", "target_true")
        assert {key: record[key] for key in asked} == {key: edit[key] for key in asked}
        assert (record["commit"], record["group"]) == (i, 0)
        assert isinstance(record["answer_before"], str)
        assert isinstance(record["answer_after"], str)
        (stage,) = record["stages"]
        assert (stage["stage"], stage["layer"]) == ("v", 1)
        assert 1 <= stage["steps"] <= 12
        assert stage.keys() >= {"nll", "kl", "weight_decay"}
        for when in ("before", "after"):
            assert 0 <= record[when]["p_new"] <= 1
            assert record[when]["efficacy"] in (0, 1)
    post = report(run)["post"]["efficacy"]
    assert post["mean"] == pytest.approx(sum(record["after"]["efficacy"] for record in records) / 4)


def test_one_continuous_event_stream(run: Path) -> None:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()
    steps = [event.step for event in events.Scalars("v/loss")]
    records = RunDirectory(run).records()
    evaluations = sum(stage["steps"] for record in records for stage in record["stages"])
    assert len(steps) == evaluations
    assert steps == sorted(set(steps))
    assert {"v/nll", "v/kl", "v/weight_decay", "v/target_probability", "post/efficacy"} <= set(tags["scalars"])
    assert any(tag.startswith("norm/update/") for tag in tags["scalars"])
    assert "hp_metric" not in tags["scalars"]
    assert {"before_after", "loss_curves"} <= set(tags["images"])


def test_the_same_configuration_gives_the_same_bits(world: World, run: Path) -> None:
    again = world.fit(run / "config.yaml", "--trainer.name", "again", name="again")
    assert same_bits(tensors(again), tensors(run))
    assert report(again)["post"] == report(run)["post"]


# ---------------------------------------------------------------------- validate, test, predict, statistics


def test_fit_validate_and_test_measure_the_same(world: World, config: Path, run: Path) -> None:
    done("validate", "--config", config, "--trainer.name", "validate")
    found = report(newest(world.logs / "validate"))
    assert_same(found["pre"], report(run)["pre"])
    assert "post" not in found
    for name, delta in (("run", run), ("file", run / "delta.safetensors")):
        done("test", "--config", config, "--trainer.name", f"test-{name}", "--delta", delta)
        found = report(newest(world.logs / f"test-{name}"))
        assert_same(found["post"], report(run)["post"])


def test_predict_shows_the_difference(world: World, config: Path, run: Path) -> None:
    prompts = ["Velora Quint was born in", "The mother tongue of Oskel Tamrin is"]
    args = ("--delta", run, "--max_new_tokens", 6, "--prompts", json.dumps(prompts), "--trainer.name", "predict")
    result = done("predict", "--config", config, *args)
    path = newest(world.logs / "predict") / "predictions.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["prompt"] for record in records] == prompts
    assert any(record["before"] != record["after"] for record in records)
    assert all(prompt in result.out for prompt in prompts)


def test_statistics_are_collected_once(world: World, config: Path, tmp_path: Path) -> None:
    args = ("--config", config, f"--model.init_args.statistics.cache_dir={tmp_path}", "--model.init_args.layers=[0, 2]")
    done("statistics", *args)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert [path.name.split("_")[0] for path in sorted(files)] == [f"transformer.h.{i}.mlp.c" for i in (0, 2)]
    done("statistics", *args)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files


# ---------------------------------------------------------------------- apply, revert, show


def test_apply_revert_and_show(world: World, run: Path, tmp_path: Path) -> None:
    pristine, edited = LanguageModel(str(world.base)), LanguageModel(str(world.base))
    updates, _ = read_deltas(run)
    for update in updates:
        edited.write(update.name, update.update)
    for args, expected in (
        (("apply", run), edited),
        (("revert", run), pristine),
        (("revert", run, "--edit", world.edits[3]["case_id"]), None),
    ):
        out = tmp_path / "-".join(str(arg).strip("-") for arg in args if arg != run)
        done(*args, "--out", out)
        found = AutoModelForCausalLM.from_pretrained(out)
        if expected is None:
            pristine.restore()
            for update in updates[:3]:
                pristine.write(update.name, update.update)
            expected = pristine
        assert same_bits({name: p.detach() for name, p in found.named_parameters()}, bits(expected))
    done("apply", run, "--out", tmp_path / "lora", "--format", "lora", "--model", world.base)
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    shown = done("show", run, run, "--out", tmp_path / "table.txt")
    assert "4 edits" in shown.out
    assert "Efficacy" in (tmp_path / "table.txt").read_text()


# ---------------------------------------------------------------------- protocols


@pytest.mark.parametrize(
    ("batch_size", "restore_every", "commits", "groups", "held"),
    [
        (1, 1, 4, [0, 1, 2, 3], [3]),
        (1, None, 4, [0, 0, 0, 0], [0, 1, 2, 3]),
        (2, 2, 2, [0, 0, 1, 1], [2, 3]),
        (2, None, 2, [0, 0, 0, 0], [0, 1, 2, 3]),
        (1, 3, 4, [0, 0, 0, 1], [3]),
        (3, None, 2, [0, 0, 0, 0], [0, 1, 2, 3]),
    ],
)
def test_protocols(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    restore_every: int | None,
    commits: int,
    groups: list[int],
    held: list[int],
) -> None:
    bases: list[LanguageModel] = []
    restored: list[bool] = []
    wrap, restore = LanguageModel._wrap, LanguageModel.restore
    untouched = bits(LanguageModel(str(world.base)))

    def keep(self: LanguageModel, *args: Any) -> None:
        wrap(self, *args)
        bases.append(self)

    def check(self: LanguageModel) -> None:
        edited = not same_bits(bits(self), untouched)
        restore(self)
        if edited:
            restored.append(same_bits(bits(self), untouched))

    monkeypatch.setattr(LanguageModel, "_wrap", keep)
    monkeypatch.setattr(LanguageModel, "restore", check)
    every = "null" if restore_every is None else restore_every
    args = ("--data.batch_size", batch_size, "--data.restore_every", every, "--data.parallel_edits", 1)
    path = world.fit(world.config("ROME"), *args, name=f"protocol-{batch_size}-{every}")
    run = RunDirectory(path)
    cases = [edit["case_id"] for edit in world.edits]
    assert [record["group"] for record in run.records()] == groups
    assert [record["case_id"] for record in run.records()] == cases
    assert len(run.commits()) == commits
    assert restored == [True] * max(groups)
    updates, metadata = delta_files.load(path / "delta.safetensors")
    assert metadata["case_ids"] == [cases[i] for i in held]
    # What delta.safetensors holds is what the model ended with, up to the rounding of one addition.
    expected = LanguageModel(str(world.base))
    for update in updates:
        expected.write(update.name, update.update)
    for name, value in bits(expected).items():
        torch.testing.assert_close(value, bits(bases[0])[name], rtol=1e-5, atol=1e-6)
    assert not same_bits(bits(expected), untouched)


@pytest.mark.parametrize("editor", ["ROME", "TOP"])
def test_several_layers_are_several_passes(world: World, editor: str) -> None:
    settings = {"layers": [0, 2], **({"rel_feat_layer": [3, 1]} if editor == "TOP" else {})}
    path = world.fit(world.config(editor, **settings), "--data.stop", 2, name=f"passes-{editor}")
    run = RunDirectory(path)
    stages = ["h_r", "v"] if editor == "TOP" else ["v"]
    for record in run.records():
        assert [(stage["layer"], stage["stage"]) for stage in record["stages"]] == [
            (i, s) for i in (0, 2) for s in stages
        ]
    names = [f"transformer.h.{layer}.mlp.c_proj.weight" for layer in (0, 2)]
    for _, updates, _ in run.commits():
        assert [update.name for update in updates] == names
    assert [update.name for update in delta_files.load(path / "delta.safetensors")[0]] == names


def test_measuring_nothing(world: World) -> None:
    path = world.fit(world.config("TOP"), "--trainer.evaluate", "false", "--data.stop", 1, name="unmeasured")
    content = report(path)
    assert "pre" not in content
    assert "post" not in content
    assert RunDirectory(path).records()[0]["answer_after"]


# ---------------------------------------------------------------------- an interrupt


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from kedit_lightning.cli import main; main(['--help']); main(['--version']); "
        "print({'torch', 'lightning', 'transformers', 'numpy', 'jsonargparse'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("command", "kept", "number"),
    [
        ("fit", "; edits that were committed are in the run", signal.SIGINT),
        ("fit", "; edits that were committed are in the run", signal.SIGTERM),
        ("apply", "\n", signal.SIGINT),
    ],
)
def test_an_interrupt_during_the_start_is_a_line(command: str, kept: str, number: signal.Signals) -> None:
    code = (
        "import signal, sys; from kedit_lightning.cli import main\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == 'torch': signal.raise_signal({int(number)})\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        f"main(['{command}'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 130
    assert result.stderr.startswith(f"kedit: interrupted{kept}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupt_leaves_what_was_committed(world: World, number: signal.Signals) -> None:
    config, name = world.config("ROME", v_num_grad_steps=200, v_lr=1e-4), f"interrupted by {number.name}"
    command = [sys.executable, "-m", "kedit_lightning", "fit", "--config", str(config), "--trainer.name", name]
    command += ["--trainer.evaluate", "false"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    first = world.logs / name / "version_0" / "deltas" / "000000.safetensors"
    started = time.time()
    while not first.exists() and process.poll() is None and time.time() - started < 120:
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.startswith("kedit: interrupted"), err
    assert err.count("\n") == 1
    run = RunDirectory(first.parent.parent)
    commits = run.commits()
    assert 1 <= len(commits) < 4
    raw = (run.path / "edits.jsonl").read_text()
    assert raw.endswith("\n")
    assert [json.loads(line)["commit"] for line in raw.splitlines()] == list(range(len(commits)))
    there = {path.name for path in run.path.iterdir() if not path.name.startswith("events")}
    assert there == BEGUN
    assert not [path for path in run.path.rglob("*") if path.name.startswith(".")]
    for _, updates, _ in commits:
        assert all(math.isfinite(float(update.update.norm())) for update in updates)
    assert kedit("test", "--config", config, "--delta", run.path, "--trainer.name", "after").status == 0
