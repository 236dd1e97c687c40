"""`kedit` in several real processes on the CPU: what one process does, counted once, with one line where it cannot."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kedit_lightning.delta import WeightDelta
from kedit_lightning.run import RunDirectory
from tests.commandline import World, done, kedit, write
from tests.families import EDITS
from tests.test_resume import assert_same, plain

PATIENCE = 60.0
"""Seconds within which all processes have ended once one is gone."""
WATCH = {"class_path": "CollapseWatch", "init_args": {"every": 2, "n_texts": 3, "sample": 4}}
EAC = {"gamma": 50, "v_num_grad_steps1": 3, "v_num_grad_steps2": 3, "elastic_l1": 1e-3}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("several"))


def config(world: World, editor: str = "ROME", edits: int = 4, **settings: Any) -> Path:
    """A configuration on invented facts; ``data`` and ``trainer`` are added to its blocks, all else is the editor's."""
    data, trainer = settings.pop("data", {}), settings.pop("trainer", {})
    settings = {"max_tokens": 4000, **settings}  # otherwise of the memory that is free just now
    content = yaml.safe_load(world.config("ROME", **settings).read_text())
    if editor != "ROME":
        content["model"] = {"class_path": editor, "init_args": content["model"]["init_args"] | settings}
    content["data"] = {"edits": [record(i) for i in range(edits)], **data}
    content["trainer"] |= {"accelerator": "cpu", **trainer}
    return write(world.folder / f"{len(list(world.folder.glob('*.yaml')))}.yaml", content)


def record(i: int) -> dict[str, Any]:
    """An invented fact with prompts of every kind."""
    own, other = EDITS[i % len(EDITS)], EDITS[(i + 3) % len(EDITS)]
    subject, born = f"{own.subject} {'ABCDEFGH'[i // len(EDITS)]}", "The town where {} was born is"
    return {
        "case_id": i,
        "prompt": own.prompt,
        "subject": subject,
        "target_new": own.target_new,
        "target_true": own.target_true or "Norvast",
        "paraphrase_prompts": [born.format(subject), f"In truth, {own.prompt.format(subject)}"],
        "neighborhood_prompts": [own.prompt.format(other.subject), born.format(other.subject)],
        "relation_specific_prompts": [f"{subject} works as a"],
        "relation_specific_relations": ["profession"],
    }


# ---------------------------------------------------------------------- processes

Popen = subprocess.Popen[str]


def begin(*args: object, how: Sequence[object] = ("kedit_lightning",), **env: object) -> Popen:
    """A command in a process of its own, which starts others; ``how``: the module that runs it, and its arguments."""
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, (*how, *args))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **{k: str(v) for k, v in env.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background
    )


def several(n: int, *args: object) -> str:
    """A command that must work in n processes; what it printed."""
    out, err = begin(*args, f"--trainer.devices={n}").communicate(timeout=600)
    assert not err, err
    return out


def fit(world: World, path: Path, name: str, n: int = 1) -> Path:
    """The run directory of a stream, edited by one process or several."""
    args = ("fit", "--config", path, "--trainer.name", name)
    if n == 1:
        done(*args)
    else:
        several(n, *args)
    [run] = (world.logs / name).iterdir()
    return run


def children(process: Popen) -> list[int]:
    """The processes that one has started."""
    try:
        return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))
    except OSError:
        return []


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def committed(run: Path) -> Callable[[], bool]:
    """Whether a stream has a whole commit."""
    return lambda: bool(RunDirectory(run).records())


def struck(process: Popen, ready: Callable[[], bool], number: int, *pids: int) -> tuple[int, str]:
    """Send processes of a stream a signal.

    Args:
        process: The first, which has started the others.
        ready: Whether it is time.
        number: The signal.
        pids: 0: the first, 1: the second.

    Returns:
        Exit status of the first, and what all have said when they have ended.
    """
    while not ready():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    others = children(process)
    assert others
    for which in pids:
        os.kill((process.pid, *others)[which], number)
    end = time.monotonic() + PATIENCE
    while any(map(lives, [process.pid, *others])):
        assert time.monotonic() < end, "processes wait for one that is gone"
        process.poll()
        time.sleep(0.1)
    return process.wait(), process.communicate()[1]


# ---------------------------------------------------------------------- the same as one process


def assert_equal(run: Path, one: Path, within: float = 1e-6) -> None:
    """The same files with the same numbers, but for rounding; nothing is counted twice."""
    assert files(run) == files(one)
    assert (run / "contexts.json").read_bytes() == (one / "contexts.json").read_bytes()
    for name in ("before.jsonl", "edits.jsonl", "checkpoints.jsonl", "health.jsonl"):
        if (one / name).is_file():
            near(*([plain(json.loads(line)) for line in (at / name).read_text().splitlines()] for at in (run, one)))
    near(*(plain(json.loads((at / "metrics.json").read_text())) for at in (run, one)))
    begun, alone = (json.loads((at / "run.json").read_text()) for at in (run, one))
    assert {key for key in {**begun, **alone} if begun.get(key) != alone.get(key)} == {"world_size"}
    for delta, expected in updates(run, one):
        assert expected.norm > 0
        assert apart(delta, expected) < within
    curves, alone_curves = events(run), events(one)
    assert curves.keys() == alone_curves.keys()
    for tag, points in alone_curves.items():
        near(curves[tag], points, tag)


def files(run: Path) -> list[str]:
    """Names of all files of a run; that of the events without time and process."""
    return sorted(file.name.partition(".tfevents")[0] for file in run.rglob("*") if file.is_file())


def events(run: Path) -> dict[str, list[tuple[int, float]]]:
    loaded = EventAccumulator(str(run), size_guidance={"scalars": 0})
    loaded.Reload()
    return {tag: [(event.step, event.value) for event in loaded.Scalars(tag)] for tag in loaded.Tags()["scalars"]}


def updates(run: Path, one: Path) -> Iterator[tuple[WeightDelta, WeightDelta]]:
    """Those of two runs, commit by commit."""
    for (_, ours, _), (_, theirs, _) in zip(RunDirectory(run).commits(), RunDirectory(one).commits(), strict=True):
        assert [delta.name for delta in ours] == [delta.name for delta in theirs]
        yield from zip(ours, theirs, strict=True)


def apart(delta: WeightDelta, expected: WeightDelta) -> float:
    return float((delta.update.double() - expected.update.double()).norm()) / max(1.0, expected.norm)


def near(ours: Any, theirs: Any, where: str = "") -> None:
    """The same plain data, magnitudes but for rounding."""
    assert type(ours) is type(theirs), where
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for key, value in theirs.items():
            near(ours[key], value, f"{where}.{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for i, value in enumerate(theirs):
            near(ours[i], value, f"{where}[{i}]")
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5, nan_ok=True), where
    else:
        assert ours == theirs, where


@pytest.fixture(scope="module")
def pair(world: World) -> dict[int, Path]:
    """Four edits in a sequence, with checkpoints and a watch, by one process and by two."""
    path = config(world, trainer={"evaluate_at": [0, 1, 3], "callbacks": [WATCH]})
    return {n: fit(world, path, f"pair{n}", n) for n in (2, 1)}


def test_two_processes_do_what_one_does(pair: dict[int, Path]) -> None:
    assert_equal(pair[2], pair[1])
    assert {"edits.jsonl", "checkpoints.jsonl", "health.jsonl", "events.out", "metrics.json"} <= set(files(pair[2]))
    assert json.loads((pair[2] / "run.json").read_text())["world_size"] == 2


def test_a_run_of_two_processes_is_not_resumed_by_one(pair: dict[int, Path], tmp_path: Path) -> None:
    run = unfinished(pair[2], tmp_path / "run")
    result = kedit("fit", "--resume", run, "--trainer.devices", 1)
    assert result.status == 1
    expected = "(world_size: 2 there, 1 here); put it back, or add --resume_anyway true, which gives up bit-identity\n"
    assert result.err.endswith(expected), result.err
    assert result.err.count("\n") == 1
    done("fit", "--resume", run, "--trainer.devices", 1, "--resume_anyway", "true")
    near(*(plain(json.loads((at / "metrics.json").read_text())) for at in (run, pair[2])))
    [resumed] = json.loads((run / "run.json").read_text())["resumed"]
    assert resumed["differences"] == ["world_size: 2 there, 1 here"]


def unfinished(run: Path, copy: Path) -> Path:
    """A copy of a run, cut back to its first three edits."""
    shutil.copytree(run, copy)
    for name in ("metrics.json", "delta.safetensors", "deltas/000003.safetensors"):
        (copy / name).unlink()
    lines = (copy / "edits.jsonl").read_text().splitlines(keepends=True)
    (copy / "edits.jsonl").write_text("".join(lines[:3]))
    return copy


STREAMS: dict[str, dict[str, Any]] = {
    "20 by ROME": {"edits": 20, "trainer": {"evaluate_at": [0, 1, 10, 20], "callbacks": [WATCH]}},
    "20 by EAC": {"edits": 20, "compress": EAC},
    "7 by MEMIT": {
        "editor": "MEMIT",
        "edits": 7,
        "layers": [1, 2],
        "mom2_update_weight": 1.0,
        "data": {"batch_size": 7},
        "trainer": {"evaluation": {"generation": True}},
    },
    "single": {"edits": 7, "data": {"batch_size": 1, "restore_every": 1}},
    "1": {"edits": 1},
}
"""Sequences, a batch, edits side by side, and fewer edits than processes."""
OTHERWISE = {"forward": "full", "max_tokens": 300}
"""Settings that change nothing but how rows stand together, and so the rounding."""
LARGER = 4
"""How many times as far as one process is from itself with `OTHERWISE` several may be from it, where that is more than
1e-6 of the larger of an update's norm and 1. A δ is within 1e-6 (tests/editors/test_processes.py); what is solved with
it multiplies its rounding and the keys' by the condition, and in a sequence every edit stands on those before."""


@pytest.fixture(scope="module")
def alone(world: World) -> Callable[[str], Path]:
    """The run of each stream by one process, made when it is first asked for."""
    return cache(lambda name: fit(world, config(world, **STREAMS[name]), f"{name} alone"))


@pytest.fixture(scope="module")
def rounding(world: World, alone: Callable[[str], Path]) -> Callable[[str], float]:
    """How far rounding alone takes the updates of each stream."""

    def measure(name: str) -> float:
        other = fit(world, config(world, **{**STREAMS[name], **OTHERWISE}), f"{name} otherwise")
        return max(itertools.starmap(apart, updates(other, alone(name))))

    return cache(measure)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", STREAMS)
def test_streams_of_several_processes(
    world: World, alone: Callable[[str], Path], rounding: Callable[[str], float], name: str, n: int
) -> None:
    one = alone(name)
    assert (json.loads((one / "run.json").read_text())["parallel_edits"] > 1) == (name == "single")
    assert_equal(fit(world, one / "config.yaml", f"{name} by {n}", n), one, max(1e-6, LARGER * rounding(name)))


# ---------------------------------------------------------------------- what goes wrong


def streaming(pair: dict[int, Path], world: World, name: str, how: Sequence[object] = ("kedit_lightning",)) -> Any:
    """The stream of two processes begun again: the first of them, and the run directory."""
    return begin("fit", "--config", pair[2] / "config.yaml", "--trainer.name", name, how=how), (
        world.logs / name / "version_0"
    )


def one_line(err: str, expected: str) -> None:
    assert err.startswith("kedit: "), err
    assert expected in err, err
    assert err.count("\n") == 1, err


def goes_on(run: Path, pair: dict[int, Path]) -> None:
    """A run that has stopped in its middle ends with the bits of the one that has not."""
    assert not (run / "metrics.json").exists()
    assert 0 < len(RunDirectory(run).records()) <= 4
    several(2, "fit", "--resume", run)
    assert_same(run, pair[2])


LEFT = "process {} has lost the others{}; run the command again (what `kedit fit` has committed is kept"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "pids", "status", "said"),
    [
        (signal.SIGKILL, [1], 1, LEFT.format(0, ": process 1 was killed by signal 9")),
        (signal.SIGKILL, [0], -9, LEFT.format(1, ", of which one has ended or cannot be reached")),
        (signal.SIGINT, [0, 1], 130, "interrupted; edits that were committed are in the run directory"),
    ],
    ids=["another is killed", "the first is killed", "Ctrl-C"],
)
def test_all_stop_with_one_line_and_go_on(
    pair: dict[int, Path], world: World, number: int, pids: list[int], status: int, said: str
) -> None:
    process, run = streaming(pair, world, f"struck {number} {pids}")
    ended, err = struck(process, committed(run), number, *pids)
    assert ended == status
    one_line(err, said)
    goes_on(run, pair)


@pytest.mark.slow
def test_where_the_first_of_three_is_killed_one_line_says_so(pair: dict[int, Path], tmp_path: Path) -> None:
    three = ("--trainer.devices", 3, "--trainer.save_dir", tmp_path, "--trainer.name", "three")
    process = begin("fit", "--config", pair[2] / "config.yaml", *three)
    status, err = struck(process, committed(tmp_path / "three" / "version_0"), signal.SIGKILL, 0)
    assert status == -9
    one_line(err, "process 1 has lost the others")


@pytest.mark.slow
@pytest.mark.parametrize("asleep", [0, 1])
def test_one_that_does_not_wait_for_the_others_is_ended_too(pair: dict[int, Path], tmp_path: Path, asleep: int) -> None:
    """It is in a long computation, as it were, or waits in NCCL."""
    path, marker = pair[2] / "config.yaml", tmp_path / "asleep"
    process = begin(
        *("fit", "--config", path, "--trainer.save_dir", tmp_path), how=(__name__, "sleep", asleep), ASLEEP=marker
    )
    status, err = struck(process, marker.exists, signal.SIGKILL, 1 - asleep)
    assert status == (-9 if asleep else 1)
    one_line(err, f"process {asleep} has lost the others")


@pytest.mark.slow
@pytest.mark.parametrize(("point", "nth", "whole"), [("run:RunDirectory._commit", 3, 2), ("lines:Lines._write", 5, 1)])
def test_the_first_is_killed_while_it_writes(
    pair: dict[int, Path], world: World, point: str, nth: int, whole: int
) -> None:
    """Before a commit's delta file, and between that and its lines."""
    process, run = streaming(pair, world, point, ("tests.killed", f"kedit_lightning.{point}", nth))
    err = process.communicate(timeout=600)[1]
    assert process.returncode == -signal.SIGKILL
    one_line(err, LEFT.format(1, ", of which one has ended or cannot be reached"))
    assert len(RunDirectory(run).records()) == whole
    assert len(list(run.glob("deltas/*"))) == 2
    goes_on(run, pair)


@pytest.mark.slow
def test_one_that_ends_before_the_others_is_not_waited_for(pair: dict[int, Path], world: World) -> None:
    """As one that has found nothing to do in a run that another command has just finished."""
    process, run = streaming(pair, world, "leaving", (__name__, "leave", 1))
    err = process.communicate(timeout=600)[1]
    assert process.returncode == 1
    one_line(err, "process 0 has lost the others, of which one has ended or cannot be reached")
    goes_on(run, pair)


@pytest.mark.slow
def test_a_full_disk_stops_all_with_one_line(pair: dict[int, Path], world: World) -> None:
    process, run = streaming(pair, world, "full", (__name__, "full", "000002.safetensors"))
    err = process.communicate(timeout=600)[1]
    assert process.returncode == 1
    one_line(err, "000002.safetensors: cannot be written (No space left on device)")
    goes_on(run, pair)


@pytest.mark.slow
def test_what_another_process_fails_of_is_said_by_the_first(pair: dict[int, Path], world: World) -> None:
    process, run = streaming(pair, world, "failing", (__name__, "fail", 1))
    err = process.communicate(timeout=600)[1]
    assert process.returncode == 1
    one_line(err, "process 1 has failed: injected")
    goes_on(run, pair)


def main(what: str, where: str, *args: str) -> None:
    """`kedit` where one process fails, or sleeps, at its ninth step, or where the disk is full for one file."""
    from kedit_lightning.cli import main
    from kedit_lightning.editors.training import StagedTraining
    from kedit_lightning.errors import KeditError

    fsync, step, steps = os.fsync, StagedTraining.training_step, itertools.count(1)

    def full(descriptor: int) -> None:
        if where in Path(f"/proc/self/fd/{descriptor}").readlink().name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    def stopping(*of: Any) -> Any:
        if next(steps) == 9 and os.environ.get("LOCAL_RANK", "0") == where:
            if what == "leave":
                os._exit(0)
            if what == "fail":
                msg = "injected"
                raise KeditError(msg)
            Path(os.environ["ASLEEP"]).touch()
            time.sleep(600)
        return step(*of)

    if what == "full":
        os.fsync = full
    else:
        StagedTraining.training_step = stopping  # type: ignore[method-assign]
    main(args)


# ---------------------------------------------------------------------- how they are started, and what is refused


@pytest.mark.slow
def test_torchrun(pair: dict[int, Path], world: World) -> None:
    run = world.logs / "torchrun" / "version_0"
    how = ("torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "kedit_lightning")
    process = begin("fit", "--config", pair[2] / "config.yaml", "--trainer.name", "torchrun", how=how)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert out.count("run directory") == 1
    assert_same(run, pair[2])


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "validate", "statistics"])
def test_other_settings_in_one_process_are_refused(pair: dict[int, Path], world: World, command: str) -> None:
    """Started by hand, one of them with another learning rate."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        begin(
            *(command, "--config", pair[2] / "config.yaml", "--trainer.name", "other", f"--model.v_lr={0.5 + rank}"),
            *(("--model.statistics.source", world.corpus) if command == "statistics" else ()),
            LOCAL_RANK=rank,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    one_line(said[0], "settings and data: expected the same in all 2 processes, got others in 1; run one version of")
    assert said[1] == "", "the first says it"
    assert not (world.logs / "other" / "version_0" / "config.yaml").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["validate", "test"])
def test_measuring_by_several_processes(pair: dict[int, Path], world: World, command: str) -> None:
    path = config(world, edits=7, trainer={"evaluation": {"generation": True}})
    edited = ["--delta", pair[1]] if command == "test" else []
    args = (command, "--config", path, *edited, "--trainer.name")
    done(*args, f"{command} 1")
    out = several(2, *args, f"{command} 2")
    one, two = (json.loads((world.logs / f"{command} {n}/version_0/metrics.json").read_text()) for n in (1, 2))
    near(plain(two), plain(one))
    assert out.count("ROME, 7 edits") == 1
    assert len(list((world.logs / f"{command} 2").iterdir())) == 1


def test_a_model_that_is_spread_over_devices_takes_one_process(world: World) -> None:
    result = kedit("fit", "--config", config(world), "--base.device_map", "cpu", "--trainer.devices", 2)
    assert result.status == 1
    one_line(result.err, "base.device_map: expected one process, got 2")


if __name__ == "__main__":
    main(*sys.argv[1:])
