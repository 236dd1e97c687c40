"""Several processes that share a pass: which one this is, and what all of them agree on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from lightning import Trainer
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch import distributed

from kedit_lightning.errors import KeditError

T = TypeVar("T")


def ranks() -> tuple[int, int]:
    """This process's number and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def agreed(value: T) -> T:
    """The first process's value, in all of them."""
    if ranks()[1] == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def of_all(values: Sequence[T]) -> list[T]:
    """The values of all processes, each once and in one order."""
    if ranks()[1] == 1:
        return list(values)
    everyone: list[Sequence[T]] = [[] for _ in range(ranks()[1])]
    distributed.all_gather_object(everyone, values)
    return list(dict.fromkeys(value for theirs in everyone for value in theirs))


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
    strategy = trainer.strategy
    if TorchElasticEnvironment.detect() and (there := TorchElasticEnvironment().world_size()) != trainer.world_size:
        msg = (
            f"torchrun has started {there} processes, the trainer has {trainer.world_size}: set trainer.devices and "
            "trainer.num_nodes to what torchrun was given, and trainer.strategy to ddp"
        )
        raise KeditError(msg)

    def joined() -> T:
        try:
            strategy.setup_environment()
            return work()
        except RuntimeError as error:
            if "gloo" not in str(error) and not isinstance(error, distributed.DistError):
                raise
            msg = f"process {trainer.global_rank} has lost the others: one of them has ended, or cannot be reached"
            raise KeditError(msg) from error
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()

    if strategy.launcher is None:
        return work()
    found: T = strategy.launcher.launch(joined, trainer=trainer)
    return found
