"""How several processes are started and end: as Lightning's DDP does it, without its wrapper, and with one line."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from lightning import Trainer
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store

from kedit_lightning.errors import ElsewhereError, KeditError
from kedit_lightning.messages import say

T = TypeVar("T")

PATIENCE = 10.0
"""Seconds in which a process that waits for one that has ended finds so itself; one that computes, or waits by NCCL,
does not."""
MOMENT = 3.0
"""Seconds in which a process that finds another one ended leaves by itself."""
STARTED_BY = "KEDIT_STARTED_BY"
"""Environment variable: the process that has started this one."""
INTERRUPTED = 130
"""Exit status of a command that was interrupted."""
REASON = "kedit/reason"
"""Under which a process that fails leaves its reason to the first, which says it."""


class Launcher(_SubprocessScriptLauncher):
    """Starts the other processes of a machine, by running the command again."""

    def launch(self, function: Callable[..., T], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> T:
        """Start them, unless they are there, and do something; Lightning would kill this one without a word."""
        if not self.cluster_environment.creates_processes_externally:
            os.environ[STARTED_BY] = str(os.getpid())
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no stack of frames where the first is gone
            self._call_children_scripts()
        found: T = super().launch(function, *args, trainer=trainer, **kwargs)
        return found

    @contextmanager
    def watched(self, rank: int) -> Iterator[None]:
        """End this process, with a line, where another has ended and this one does not find it for long."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(1):
                if self._incomplete() and not over.wait(PATIENCE):
                    try:
                        if not self._orphaned() or self.cluster_environment.local_rank() == 1:  # one says it
                            say((None if self._orphaned() else _left()) or str(self._lost(rank)))
                    finally:  # whatever becomes of the word
                        self.kill(signal.SIGKILL)
                        os._exit(1)

        threading.Thread(target=watch, daemon=True, name="other-processes").start()
        try:
            yield
        finally:
            over.set()

    def end(self, error: BaseException, rank: int) -> KeditError | None:
        """End the processes of a command that fails, so that one of them says why.

        Args:
            error: What was raised here.
            rank: This process's number.

        Returns:
            What is to be raised instead; None: the error itself.

        Raises:
            KeyboardInterrupt: Another one was interrupted, and has ended before this one was.
        """
        lost, store = _is_loss(error), distributed.is_initialized() and _get_default_store()
        instead: KeditError | None = None
        if rank > 0 and store:
            try:
                if lost:
                    store.check([REASON])
                    instead = ElsewhereError(str(self._lost(rank)))
                elif isinstance(error, Exception):  # no interrupt, which the first has itself
                    store.set(REASON, f"process {rank} has failed: {str(error) or type(error).__name__}")
                    instead = ElsewhereError(str(error)) if isinstance(error, KeditError) else None
            except RuntimeError:  # the first is gone: one of a machine's others says so
                if lost and self.cluster_environment.local_rank() > 1:
                    instead = ElsewhereError(str(self._lost(rank)))
        elif lost:  # the others find it as well, or say why they have ended
            _wait(self.procs, MOMENT)
            if (left := _left()) is not None:
                instead = KeditError(left)
        interrupted = any(process.poll() == INTERRUPTED for process in self.procs)
        self.kill(signal.SIGKILL)  # before the connection ends, which they would say
        if lost and interrupted:
            raise KeyboardInterrupt from error
        return instead or (self._lost(rank) if lost else None)

    def _incomplete(self) -> bool:
        """Whether a process has ended that this one has started, or that has started this one; all end together."""
        return self._orphaned() or any(process.poll() is not None for process in self.procs)

    def _orphaned(self) -> bool:
        """Whether the process that has started this one has ended; nothing can be asked of the first one then."""
        parent = str(os.getppid())
        return self.cluster_environment.local_rank() > 0 and os.environ.get(STARTED_BY, parent) != parent

    def _lost(self, rank: int) -> KeditError:
        killed = [(rank + i, -process.returncode) for i, process in enumerate(self.procs, 1) if process.poll()]
        which = "".join(f": process {i} was killed by signal {n}" for i, n in killed[:1] if n > 0)
        return KeditError(
            f"process {rank} has lost the others{which or ', of which one has ended or cannot be reached'}; run the "
            "command again (what `kedit fit` has committed is kept, and --resume goes on from there)"
        )


def _left() -> str | None:
    """The reason that a process which has failed has left; None where there is none."""
    store = _get_default_store() if distributed.is_initialized() else None
    return store.get(REASON).decode() if store is not None and store.check([REASON]) else None


class RowsStrategy(DDPStrategy):
    """Processes as DDP starts them, each with parameters of its own, which training keeps equal by itself.

    Rows are shared out, and what is summed over them is summed over the processes (`summed`). DDP's wrapper would
    average gradients, and cannot follow parameters that change their shape.
    """

    def configure_ddp(self) -> None:
        """No wrapper, and nothing is sent when a fit begins."""

    def _configure_launcher(self) -> None:
        if self.cluster_environment is not None:
            self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)


def known_strategy(name: str) -> str:
    """A Trainer's strategy, if edits can be shared out by it.

    Raises:
        KeditError: They cannot.
    """
    if name in ("auto", "ddp"):
        return name
    if str(name).startswith("ddp_"):
        why = "processes have to be the command itself, run again in each, and their exchange of gradients plain"
    else:
        why = (
            "there is nothing to shard, since what is optimised is a few vectors that every process holds whole, and "
            "the base model stands outside the module (base.device_map spreads one that is larger than a GPU)"
        )
    msg = f"trainer.strategy: expected auto or ddp, got {name}: {why}"
    raise KeditError(msg)


def strategy_of(name: str, devices: int | str | list[int], num_nodes: int) -> str | RowsStrategy:
    """A Trainer's strategy: `RowsStrategy` where there is more than one process.

    Args:
        name: ``auto`` or ``ddp``.
        devices: As the Trainer takes them.
        num_nodes: Machines.

    Raises:
        KeditError: Edits cannot be shared out by it.
    """
    known = known_strategy(name)
    if isinstance(devices, list):
        many = len(devices) > 1
    elif str(devices) in ("auto", "-1"):
        many = torch.cuda.device_count() > 1
    else:
        many = "," in str(devices) or str(devices) not in ("0", "1")
    return RowsStrategy() if known == "ddp" or many or num_nodes > 1 else known


def together(trainer: Trainer, work: Callable[[], T]) -> T:
    """Do something in all processes of a trainer, which can talk to each other meanwhile.

    They are started by the trainer's own strategy, which runs the command again in each, or are there already
    (torchrun, SLURM).

    Args:
        trainer: Says how many processes there are to be, and on which devices.
        work: What each of them does.

    Returns:
        What it gave in this process.

    Raises:
        KeditError: torchrun has started another number of processes than the trainer has, or another process has ended.
    """
    strategy, rank = trainer.strategy, trainer.global_rank
    if TorchElasticEnvironment.detect() and (there := TorchElasticEnvironment().world_size()) != trainer.world_size:
        msg = (
            f"torchrun has started {there} processes, the trainer has {trainer.world_size}: set trainer.devices and "
            "trainer.num_nodes to what torchrun was given, and trainer.strategy to ddp"
        )
        raise KeditError(msg)
    launcher = strategy.launcher
    if not isinstance(launcher, Launcher):
        return work()

    def joined() -> T:
        try:
            with launcher.watched(rank):
                strategy.setup_environment()
                found = work()
                distributed.barrier()
                return found
        except BaseException as error:  # an interrupt too
            if (said := launcher.end(error, rank)) is not None:
                raise said from error
            raise
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()

    return launcher.launch(joined, trainer=trainer)


def _is_loss(error: BaseException) -> bool:
    """Whether an error says that another process is not there any more."""
    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """Wait until processes have ended, but not for longer."""
    end = time.monotonic() + seconds
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
