"""A stream that is killed at any instant, and resumed, ends like one that was not."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kedit_lightning import delta as delta_files
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.prompts import ContextTemplates
from kedit_lightning.editors import ROME
from kedit_lightning.edits import Site
from kedit_lightning.errors import KeditError
from kedit_lightning.metrics import Evaluation
from kedit_lightning.models import LanguageModel, moment_files
from kedit_lightning.models.key_statistics import Identity, KeyStatistics
from kedit_lightning.models.statistics import Statistics
from kedit_lightning.resume import check_moments, moments
from kedit_lightning.run import RunDirectory
from kedit_lightning.tensor_files import checksum
from kedit_lightning.trainer import EditTrainer
from tests.commandline import EDITOR, Result, World, done, kedit, write
from tests.families import save_tiny

STREAMS: dict[str, dict[str, Any]] = {
    "ROME": {"model": {"layers": [2], "v_num_grad_steps": 3}, "data": {"stop": 4}},
    "AlphaEdit": {
        "model": {"layers": [1, 2], "v_num_grad_steps": 3, "nullspace_threshold": 2.0, "L2": 1.0},
        "data": {"stop": 5, "batch_size": 2},
    },
    "restored": {"model": {"layers": [2], "v_num_grad_steps": 3}, "data": {"stop": 5, "restore_every": 2}},
}
AT = [0, 1, 3, 4]
TIMED = ("seconds", "time")


def config(folder: Path, name: str) -> Path:
    """A configuration on the almanac, small enough for a test."""
    stream = STREAMS[name]
    restored = "restore_every" in stream["data"]
    content = {
        "base": {"name": "almanac"},
        "model": {
            "class_path": "ROME" if restored else name,
            "init_args": {
                **stream["model"],
                "context_templates": {"context_template_length_params": [[4, 2]], "scheme": "rome"},
                "statistics": {"source": "almanac", "tokens": 2000},
            },
        },
        "data": {"dataset": "almanac", **stream["data"]},
        "trainer": {
            "name": name,
            "save_dir": str(folder),
            "evaluation": {"generation": False},
            "evaluate_at": [] if restored else AT,
            "enable_progress_bar": False,
        },
    }
    return write(folder / f"{name}.yaml", content)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each stream that nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken")
    runs = {}
    for name in STREAMS:
        done("fit", "--config", config(folder, name))
        runs[name] = folder / name / "version_0"
    return runs


def start(folder: Path, name: str, *how: str) -> subprocess.Popen[bytes]:
    """`kedit fit` in a process of its own; ``how``: the module that runs it, and its arguments before the command."""
    return begin(folder, *(how or ("kedit_lightning",)), "fit", "--config", str(config(folder, name)))


def begin(folder: Path, *command: str) -> subprocess.Popen[bytes]:
    """A module in a process of its own, with one thread."""
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        env={**os.environ, **one},
        stdout=subprocess.DEVNULL,
        stderr=(folder / "err").open("wb"),
    )


def killed(folder: Path, name: str, point: str, nth: int) -> Path:
    """The run directory of a process that was killed at the nth call of a method."""
    process = start(folder, name, "tests.killed", f"kedit_lightning.{point}", str(nth))
    assert process.wait(120) == -signal.SIGKILL, (folder / "err").read_text()
    return folder / name / "version_0"


def plain(content: Any) -> Any:
    """JSON without what was timed."""
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items() if key not in TIMED}
    return [plain(value) for value in content] if isinstance(content, list) else content


def content(run: Path) -> dict[str, Any]:
    """All that a run must hold again, bit for bit."""
    found: dict[str, Any] = {}
    for name in ("edits.jsonl", "checkpoints.jsonl", "before.jsonl"):
        if (run / name).is_file():
            found[name] = [plain(json.loads(line)) for line in (run / name).read_text().splitlines()]
    for name in ("metrics.json", "contexts.json", "run.json"):
        found[name] = plain(json.loads((run / name).read_text()))
    for file in sorted(run.rglob("*.safetensors")):
        deltas, metadata = delta_files.load(file)
        tensors = [(delta.name, name, bits(tensor)) for delta in deltas for name, tensor in delta.tensors.items()]
        memory = {name: bits(tensor) for name, tensor in delta_files.load_memory(file).items()}
        found[str(file.relative_to(run))] = tensors, metadata, memory
    return found


def drawn(run: Path) -> set[str]:
    """The pictures and tables of a run, without the loss curves, which are of the edits that a process has made."""
    return {file.name for kind in ("*.png", "*.csv") for file in run.glob(kind)} - {"loss_curves.png"}


def bits(tensor: torch.Tensor) -> bytes:
    raw: bytes = tensor.contiguous().numpy().tobytes()
    return raw


def assert_same(run: Path, other: Path) -> None:
    got, wanted = content(run), content(other)
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert got[name] == wanted[name], name
    assert drawn(run) >= drawn(other)
    assert not [file for file in run.rglob(".*") if file.is_file()], "nothing half-written is left"


# ---------------------------------------------------------------------- killed at named points


@pytest.mark.parametrize(
    ("name", "point", "nth"),
    [
        ("ROME", "editors.training:StagedTraining.training_step", 8),
        ("AlphaEdit", "lines:Lines.append", 4),  # checkpoint 0, a commit and its checkpoint, then a delta file alone
        ("restored", "metrics.evaluator:Evaluator.update", 3),  # the edits before, then a group after another
    ],
    ids=["optimising", "between delta file and lines", "measuring"],
)
def test_a_killed_stream_ends_as_if_it_had_not_been(
    name: str, point: str, nth: int, unbroken: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = killed(tmp_path, name, point, nth)
    lines, deltas = RunDirectory(run).records(), sorted(file.stem for file in run.glob("deltas/*"))
    assert not (run / "metrics.json").exists()
    assert 0 < len(lines) < len(RunDirectory(unbroken[name]).records()) + (name == "restored")
    assert len(deltas) == len({line["commit"] for line in lines}) + (name == "AlphaEdit")
    bases: list[LanguageModel] = []
    wrap = LanguageModel._wrap
    monkeypatch.setattr(LanguageModel, "_wrap", lambda self, *args: (wrap(self, *args), bases.append(self)))
    done("fit", "--resume", run)
    assert_same(run, unbroken[name])
    expected = LanguageModel("almanac")
    for _, updates, _ in RunDirectory(unbroken[name]).standing():
        for delta in updates:
            expected.write(delta.name, delta.update)
    for parameter, wanted in zip(bases[0].model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(parameter, wanted)
    events, whole = (EventAccumulator(str(path), size_guidance={"scalars": 0}) for path in (run, unbroken[name]))
    events.Reload()
    whole.Reload()
    for tag in whole.Tags()["scalars"]:  # what was done twice is there twice, at the same steps with the same values
        assert dict(points(events, tag)) == dict(points(whole, tag)), tag


def points(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


def at_work(run: Path) -> bool:
    """Whether a process holds the lock of a run."""
    lock = run / "run.lock"
    return lock.exists() and f":{lock.stat().st_ino} " in Path("/proc/locks").read_text()


def seconds_of_work(
    process: subprocess.Popen[bytes], run: Path, limit: float = math.inf, *, since_a_commit: bool = False
) -> float:
    """Wait until a process has worked on a run for so many seconds, or has ended; how long it worked.

    With ``since_a_commit`` seconds are counted from its first commit, so that kills fall between edits too, which take
    little of the time.
    """

    def commits() -> int:
        return len(list(run.glob("deltas/*.safetensors")))

    before = commits()
    while process.poll() is None and not (at_work(run) and (commits() > before or not since_a_commit)):
        time.sleep(0.01)
    started = time.time()
    while process.poll() is None and time.time() - started < limit:
        time.sleep(0.01)
    return time.time() - started


@pytest.mark.slow
@pytest.mark.parametrize("name", list(STREAMS))
def test_killed_at_random_moments(name: str, unbroken: dict[str, Path], tmp_path: Path) -> None:
    """Runs of each stream, killed and resumed until they are through: at least a dozen kills a stream."""
    draw, kills, stages, run = random.Random(name), 0, set(), tmp_path / name / "version_0"
    whole = seconds_of_work(start(tmp_path, name), run)
    while kills < 12:
        shutil.rmtree(tmp_path / name)
        process = start(tmp_path, name)
        while True:
            between = draw.random() < 0.5
            seconds_of_work(process, run, draw.uniform(0, whole * (0.1 if between else 1)), since_a_commit=between)
            if process.poll() is not None:
                break
            process.kill()
            process.wait()
            kills += 1
            if not (run / "config.yaml").exists():  # nothing to resume yet
                shutil.rmtree(tmp_path / name)
                process = start(tmp_path, name)
                continue
            stages.add(len(RunDirectory(run).records()))
            process = begin(tmp_path, "kedit_lightning", "fit", "--resume", str(run))
        if process.wait() == 0 and (run / "metrics.json").exists():
            assert_same(run, unbroken[name])
        else:
            raise AssertionError((tmp_path / "err").read_text())
    assert len(stages) > 2, f"killed {kills} times, at {stages} edits"


# ---------------------------------------------------------------------- what a crash leaves


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def finished(world: World) -> Path:
    """A finished run of four edits, with checkpoints."""
    return world.fit(world.config(), "--trainer.evaluate_at=[0,1,3,4]", name="finished")


@pytest.fixture
def broken(finished: Path, tmp_path: Path) -> Path:
    """A run of which the fourth edit is still to be made, and the checkpoint of the third to be scored."""
    run = tmp_path / "broken" / "version_0"
    shutil.copytree(finished, run)
    for name in ("metrics.json", "delta.safetensors", "deltas/000003.safetensors", *drawn(run)):
        (run / name).unlink()
    for name, kept in (("edits.jsonl", 3), ("checkpoints.jsonl", 2)):
        lines = (run / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join(lines[:kept]))
    return run


def refused(result: Result, expected: str, status: int = 1) -> None:
    assert result.status == status, result
    assert len(result.err.strip().splitlines()) == 1, result.err
    assert expected in result.err


def test_a_run_goes_on_after_its_last_edit(broken: Path, finished: Path) -> None:
    done("fit", "--resume", broken)
    assert_same(broken, finished)


def test_the_python_call_resumes_too(broken: Path, finished: Path, world: World) -> None:
    editor = ROME(
        LanguageModel(str(world.base)),
        **EDITOR["ROME"],
        context_templates=ContextTemplates(templates=[["{}", "Yes. {}"]]),
        statistics=Statistics("identity"),
    )
    trainer = EditTrainer(evaluation=Evaluation(generation=False), evaluate_at=AT, enable_progress_bar=False)
    torch.manual_seed(5)  # the run goes by the seed that it was begun with
    trainer.fit(editor, datamodule=EditDataModule(edits=world.edits), resume=str(broken.parent))
    assert_same(broken, finished)
    assert plain(trainer.report) == plain(json.loads((finished / "metrics.json").read_text()))


@pytest.mark.parametrize("cut", [1, 10**6])
def test_a_truncated_last_record_is_made_again(broken: Path, finished: Path, cut: int) -> None:
    size = (broken / "edits.jsonl").stat().st_size
    os.truncate(broken / "edits.jsonl", max(0, size - cut))
    done("fit", "--resume", broken)
    assert_same(broken, finished)


@pytest.mark.parametrize("state", ["truncated", "missing"])
def test_a_last_delta_file_that_is_not_whole_is_made_again(broken: Path, finished: Path, state: str) -> None:
    file = broken / "deltas" / "000002.safetensors"
    file.unlink() if state == "missing" else os.truncate(file, 100)
    done("fit", "--resume", broken)
    assert_same(broken, finished)


def test_what_was_being_written_is_cleaned_up(broken: Path, finished: Path) -> None:
    (broken / ".metrics.json.4711").write_text("{")
    (broken / "deltas" / ".000003.safetensors.4711").write_bytes(b"half")
    shutil.copy(broken / "deltas" / "000002.safetensors", broken / "deltas" / "000003.safetensors")
    done("fit", "--resume", broken)
    assert_same(broken, finished)


@pytest.mark.parametrize("left", [(), ("run.json", "contexts.json"), ("run.json", "contexts.json", "before.jsonl")])
def test_a_run_that_was_killed_before_its_first_edit(finished: Path, tmp_path: Path, left: tuple[str, ...]) -> None:
    run = tmp_path / "early" / "version_0"
    (run / "deltas").mkdir(parents=True)
    for name in ("config.yaml", *left):
        shutil.copy(finished / name, run / name)
    done("fit", "--resume", run)
    assert_same(run, finished)


# ---------------------------------------------------------------------- what is refused


def test_a_finished_run_is_left_alone(finished: Path) -> None:
    before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in finished.rglob("*")}
    result = done("fit", "--resume", finished)
    assert f"{finished} is finished: 4 edits made and measured, nothing to resume" in result.out.replace("\n", "")
    assert {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in finished.rglob("*")} == before


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--model.v_lr", "0.25"], "(model.v_lr: 0.5 there, 0.25 here); put it back, or add --resume_anyway"),
        (["--data.batch_size", "2"], "(data.batch_size: 1 there, 2 here); begin another run"),
        (["--data.stop", "3", "--resume_anyway", "true"], "edits: "),
        (["--trainer.evaluate_at", "[4]"], "evaluate_at: [0, 1, 3, 4] there, [4] here"),
    ],
)
def test_another_configuration_is_shown_and_refused(broken: Path, args: list[str], expected: str) -> None:
    before = {file.name: file.read_bytes() for file in broken.rglob("*") if file.is_file()}
    refused(kedit("fit", "--resume", broken, *args), expected)
    now = {file.name: file.read_bytes() for file in broken.rglob("*") if file.is_file()}
    assert {name for name in now if now[name] != before.get(name)} <= {"run.lock"}


def test_a_run_goes_on_otherwise_if_told(broken: Path, finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    done("fit", "--resume", broken, "--model.v_lr", "0.25", "--resume_anyway", "true")
    assert "bit-identity is lost: model.v_lr: 0.5 there, 0.25 here" in caplog.text
    (resumed,) = json.loads((broken / "run.json").read_text())["resumed"]
    assert resumed == {"edits": 3, "differences": ["model.v_lr: 0.5 there, 0.25 here"]}
    for i in range(4):
        ours, theirs = (run / "deltas" / f"{i:06d}.safetensors" for run in (broken, finished))
        assert (ours.read_bytes() == theirs.read_bytes()) == (i < 3)
    config = yaml.safe_load((broken / "config.yaml").read_text())
    assert config["model"]["init_args"]["v_lr"] == 0.25
    assert not {"resume", "resume_anyway"} & config.keys(), "of the call, not of the run"


def test_another_thread_count_or_library_is_refused(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = json.loads((broken / "run.json").read_text())
    (broken / "run.json").write_text(json.dumps({**settings, "threads": 64}))
    refused(kedit("fit", "--resume", broken), "(threads: 64 there, 1 here); put it back, or add --resume_anyway")
    (broken / "run.json").write_text(json.dumps({**settings, "library torch": "1.0"}))
    refused(kedit("fit", "--resume", broken), "library torch: 1.0 there, ")


def test_another_base_model_is_refused_even_if_told(broken: Path, tmp_path: Path) -> None:
    other = save_tiny("gpt2", tmp_path / "other", seed=1)
    result = kedit("fit", "--resume", broken, "--base.name", other, "--resume_anyway", "true")
    refused(result, "this run is of another base model")
    layers = kedit("fit", "--resume", broken, "--model.layers", "[0]", "--resume_anyway", "true")
    refused(layers, "(model.layers: [1] there, [0] here)")


def test_the_newest_run_of_a_folder_goes_on_whatever_else_was_done_there(broken: Path, finished: Path) -> None:
    """Configuration and run are of the same version, although a later one has a configuration too."""
    done(
        "validate",
        "--config",
        broken / "config.yaml",
        "--trainer.name",
        "broken",
        "--trainer.save_dir",
        broken.parent.parent,
    )
    assert (broken.parent / "version_1" / "config.yaml").is_file()
    done("fit", "--resume", broken.parent)
    assert_same(broken, finished)


def test_other_second_moments_are_refused(finished: Path, world: World, tmp_path: Path) -> None:
    """One entry is another; without second moments there is nothing to compare."""
    keys = torch.randn(40, 16)
    editor = ROME(LanguageModel(str(world.base)), **EDITOR["ROME"], statistics=Statistics("identity"))
    editor.moments = {Site(1, "mlp"): KeyStatistics(keys.T @ keys, 40)}
    run = RunDirectory(shutil.copytree(finished, tmp_path / "run"))
    begun = run.read_json("run.json") | {"moments": moments(editor)}
    run.write_json("run.json", begun)
    check_moments(run, moments(editor), anyway=False)
    editor.moments[Site(1, "mlp")].mean[0, 1] *= 1 + 1e-6
    with pytest.raises(KeditError, match="the second moments of the keys are others than this run was begun with; put"):
        check_moments(run, moments(editor), anyway=False)
    assert run.read_json("run.json") == begun
    check_moments(run, moments(editor), anyway=True)
    now = run.read_json("run.json")
    assert now["resumed"] == [{"edits": 4, "differences": ["moments: others than there"]}]
    assert now == begun | {"moments": moments(editor), "resumed": now["resumed"]}
    editor.moments = {Site(1, "mlp"): Identity(16)}
    assert moments(editor) == checksum({})


def test_two_processes_do_not_share_a_run(broken: Path) -> None:
    with (broken / "run.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(kedit("fit", "--resume", broken), "another process is at work on this run; wait until it has ended")


def test_no_run_is_one_line(tmp_path: Path) -> None:
    refused(kedit("fit", "--resume", tmp_path / "none"), "expected a run directory with a config.yaml")


FULL = ("edits.jsonl", "checkpoints.jsonl", "000003.safetensors", "before.jsonl")
FULL_TOO = (
    "delta.safetensors",
    "metrics.json",
    "curve.csv",
    "curve.png",
    "run.json",
    "contexts.json",
    ".edits.journal",
)


@pytest.mark.parametrize("name", [*FULL, *(pytest.param(name, marks=pytest.mark.slow) for name in FULL_TOO)])
def test_a_full_disk_at_each_write_loses_nothing(
    name: str, broken: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in ("run.json", "contexts.json", "before.jsonl"):
        for file in ("run.json", "before.jsonl", "edits.jsonl", "checkpoints.jsonl"):
            (broken / file).unlink()
        shutil.rmtree(broken / "deltas")
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if name in Path(f"/proc/self/fd/{descriptor}").readlink().name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    refused(kedit("fit", "--resume", broken), "cannot be written (No space left on device)")
    monkeypatch.undo()
    done("fit", "--resume", broken)
    assert_same(broken, finished)


@pytest.mark.slow
def test_second_moments_replaced_between_two_calls(world: World, tmp_path: Path) -> None:
    """A file of the cache that was replaced by a sound one with other numbers."""
    source = {"source": str(world.corpus), "tokens": 2000, "cache_dir": str(tmp_path), "ridge": 0.1}
    run = world.fit(world.config(statistics=source), "--data.stop=2", name="moments")
    whole = content(run)
    (run / "metrics.json").unlink()
    (run / "deltas/000001.safetensors").unlink()
    [file] = tmp_path.glob("*.safetensors")
    sound = file.read_bytes()
    with safe_open(file, "pt") as opened:
        about, moment, count = opened.metadata(), opened.get_tensor("moment").clone(), int(opened.get_tensor("count"))
    moment[0, 0] *= 1.001
    moment_files.save(file, moment, count, {key: about[key] for key in about.keys() - {"format", "sha256"}})
    refused(kedit("fit", "--resume", run), "the second moments of the keys are others than this run was begun with")
    replaced = file.read_bytes()
    file.write_bytes(sound)
    done("fit", "--resume", run)
    assert content(run) == whole
    file.write_bytes(replaced)
    (run / "metrics.json").unlink()
    (run / "deltas/000001.safetensors").unlink()
    done("fit", "--resume", run, "--resume_anyway=true")
    kept = json.loads((run / "run.json").read_text())
    assert kept["resumed"] == [{"edits": 2, "differences": ["moments: others than there"]}]
    assert kept["moments"] != whole["run.json"]["moments"]
