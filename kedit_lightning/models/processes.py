"""Several processes that share a pass: which one this is, and what all of them agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import distributed

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
