"""Several processes that share a pass: which one this is, what its share is, and what all of them agree on.

Everything here but `ranks`, `share` and `once` waits for the other processes: all have to call it, in one order. What
they tell each other is plain data, sent as JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from kedit_lightning import errors
from kedit_lightning.errors import KeditError, RejectedError
from kedit_lightning.models.devices import is_out_of_memory

T = TypeVar("T")

_ALONE = ContextVar("alone", default=False)
"""Whether the other processes wait for what this one does."""


def ranks() -> tuple[int, int]:
    """This process's number and how many there are; what `first` does is done by one that is alone."""
    if _ALONE.get():
        return 0, 1
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def on_this_machine() -> int:
    """How many processes share this machine, as torchrun or SLURM says; all of them, where nothing says it."""
    there = distributed.is_available() and distributed.is_initialized()
    processes = distributed.get_world_size() if there else 1
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or ""
    return min(processes, int(told)) if told.isdecimal() and int(told) else processes


# ---------------------------------------------------------------------- shares and sums


def share(n: int) -> Tensor:
    """Which of n things are this process's, ascending: dealt out like cards; shape ``(m,)``, empty where n is small."""
    rank, processes = ranks()
    return torch.arange(n)[rank::processes].contiguous()


def once(term: Tensor) -> Tensor:
    """A term that all processes know, so that it counts once in their sum: zeros in all but the first."""
    return term if ranks()[0] == 0 else torch.zeros_like(term)


def summed(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, the same bits in each.

    Args:
        tensor: This process's share, of one shape in all of them. The sum may take its place in memory.
    """
    if ranks()[1] == 1:
        return tensor
    total = tensor.detach().to(_wire()).contiguous()
    distributed.all_reduce(total)
    return total.to(tensor.device)


def of_first(tensor: Tensor) -> Tensor:
    """The first process's tensor, in all of them; they hold one of the same shape and type."""
    if ranks()[1] == 1:
        return tensor
    sent = tensor.detach().to(_wire()).contiguous()
    distributed.broadcast(sent, src=0)
    return sent.to(tensor.device)


def attempted(work: Callable[[], T]) -> T:
    """Do something for which memory may be too small: where it is so in one process, it fails in all of them.

    Args:
        work: What each of them does. It waits for no other process.

    Raises:
        OutOfMemoryError: Of this process, or another's; `is_shared_shortage` knows it.
    """
    if ranks()[1] == 1:
        return work()
    found = list[T]()
    try:
        found.append(work())
    except Exception as error:  # not kept: it holds all that was being computed
        if not is_out_of_memory(error):
            raise
    if summed(torch.tensor(len(found))) < ranks()[1]:
        msg = "out of memory in one of the processes"
        raise _SharedShortageError(msg)
    return found[0]


class _SharedShortageError(torch.OutOfMemoryError):
    """Raised in all processes."""


def is_shared_shortage(error: BaseException) -> bool:
    """Whether an error says that memory is too small, and says so in all processes."""
    return isinstance(error, _SharedShortageError) or (ranks()[1] == 1 and is_out_of_memory(error))


# ---------------------------------------------------------------------- plain data


def gathered(value: T) -> list[T]:
    """What each process gives, by their numbers; plain data, small."""
    processes = ranks()[1]
    if processes == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value), "utf-8"), dtype=torch.uint8).to(_wire())
    lengths = [torch.tensor([0], device=_wire()) for _ in range(processes)]
    distributed.all_gather(lengths, torch.tensor([len(data)], device=_wire()))
    longest = max(map(int, lengths))
    everyone = [data.new_zeros(longest) for _ in lengths]
    distributed.all_gather(everyone, torch.cat([data, data.new_zeros(longest - len(data))]))
    texts = [bytes(theirs[: int(n)].tolist()) for theirs, n in zip(everyone, lengths, strict=True)]
    return [json.loads(text) for text in texts]


def agreed(value: T) -> T:
    """The first process's value, in all of them."""
    return gathered(value)[0]


def dealt(n: int, work: Callable[[list[int]], Sequence[T]]) -> list[T]:
    """What comes of each of n things, every process doing its share of them.

    Args:
        n: How many.
        work: Gives plain data for each of some of them; where there are several processes it comes back as JSON has it.
    """
    everyone = gathered(list(work(share(n).tolist())))
    found: list[Any] = [None] * n
    for rank, theirs in enumerate(everyone):
        found[rank :: len(everyone)] = theirs
    return found


def of_all(values: Sequence[T]) -> list[T]:
    """The values of all processes, each once and in one order."""
    return list(dict.fromkeys(value for theirs in gathered(values) for value in theirs))


def first(work: Callable[[], T]) -> T:
    """Do something in the first process alone; all of them have what came of it, be it an error.

    Args:
        work: What the first does. It waits for no other process and gives plain data.

    Returns:
        What it gave; where there are several processes, as JSON has it.

    Raises:
        KeditError: What it raised, in all of them. Another error is itself in the first only.
    """
    rank, processes = ranks()
    if processes == 1:
        return work()
    said, error = dict[str, Any](), None
    if rank == 0:
        alone = _ALONE.set(True)
        try:
            said["found"] = work()
        except Exception as raised:  # the others are waiting
            said["error"], error = _told(raised), raised
        finally:
            _ALONE.reset(alone)
    said = gathered(said)[0]
    if error is not None:
        raise error
    if "error" in said:
        raise _retold(said["error"])
    found: T = said["found"]
    return found


def same(what: str, value: str, advice: str) -> None:
    """See that all processes have the same.

    Args:
        what: What it is, in words.
        value: A hash of it.
        advice: What to do where it differs.

    Raises:
        KeditError: They differ, in all of them.
    """
    everyone = gathered(value)
    if others := [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]:
        which = ", ".join(map(str, others))
        msg = f"{what}: expected the same in all {len(everyone)} processes, got others in {which}; {advice}"
        raise KeditError(msg)


def _told(error: Exception) -> dict[str, Any]:
    reasons = list(error.reasons.items()) if isinstance(error, RejectedError) else None
    return {"kind": type(error).__name__, "message": str(error), "reasons": reasons}


def _retold(told: dict[str, Any]) -> KeditError:
    if told["reasons"] is not None:
        return RejectedError(dict(told["reasons"]))
    kind = getattr(errors, told["kind"], None)
    if kind is None:
        return KeditError(f"process 0 has failed: {told['kind']}: {told['message']}")
    error: KeditError = kind(told["message"])
    return error


def _wire() -> torch.device:
    """Where tensors are that processes send each other: NCCL takes those of GPUs, gloo all in main memory."""
    if distributed.get_backend() == "nccl":
        return torch.device(torch.cuda.current_device())
    return torch.device("cpu")
