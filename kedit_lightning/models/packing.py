"""Documents laid out in rows, one or several a row, and the keys that the base model has for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor

from kedit_lightning.edits import Site
from kedit_lightning.errors import StatisticsError
from kedit_lightning.models.devices import is_out_of_memory
from kedit_lightning.models.encoding import Batch, buckets
from kedit_lightning.models.language_model import LanguageModel
from kedit_lightning.models.processes import agreed

ForwardDtype = Literal["float32", "bfloat16", "tf32"]
ROW = 512
"""Tokens of a packed row, where no document is longer."""
EQUAL = 1e-5
"""How far a packed document's key may be from that of the document alone, in norm and relative to it."""


def rounds(base: LanguageModel, forward_dtype: ForwardDtype | None) -> bool:
    """Whether a forward pass is in less than float32, so that keys depend on how documents are laid out.

    Attention kernels round otherwise at other lengths: measured on nine families up to 5e-6 of a key in float32, where
    two kernels differ as much, but 5e-2 in bfloat16, where C then moves by up to 1e-3.
    """
    return base.dtype in ("bfloat16", "float16") or forward_dtype in ("bfloat16", "tf32")


@dataclass(frozen=True)
class Rows:
    """Documents in rows, padded on the right; has all that a forward pass reads of a `Batch`.

    Args:
        input_ids: Token ids, shape ``(b, t)``.
        position_ids: Position of every token in its document, 0 in the padding, shape ``(b, t)``. From positions that
            start again transformers sees where a document begins and keeps attention inside it, where there is no mask.
        attention_mask: 1 at real tokens, shape ``(b, t)``; None where rows are packed.
        counted: Where there is a key that counts, shape ``(b, t)``.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    counted: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def owner(self) -> Tensor:
        """A document is of no edit."""
        return torch.full((len(self),), -1)

    def to(self, device: torch.device | str) -> Rows:
        """The same rows on another device."""
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        ids, positions = self.input_ids.to(device), self.position_ids.to(device)
        return replace(self, input_ids=ids, position_ids=positions, attention_mask=mask)


def lay_out(rows: Sequence[Sequence[Tensor]], skip: int = 0, *, packed: bool = True) -> Rows:
    """Put documents into rows.

    Args:
        rows: The documents of each row, as token ids; one a row unless ``packed``.
        skip: The key of a document's token that counts first; -1: of the last, so that it alone counts.
        packed: Whether documents are told apart by their positions alone.

    Returns:
        The rows, on the CPU.
    """
    t = max(sum(map(len, row)) for row in rows)
    ids = torch.zeros(len(rows), t, dtype=torch.long)
    positions = torch.zeros(len(rows), t, dtype=torch.long)
    real = torch.zeros(len(rows), t, dtype=torch.long)
    counted = torch.zeros(len(rows), t, dtype=torch.bool)
    for i, row in enumerate(rows):
        n = sum(map(len, row))
        ids[i, :n], real[i, :n] = torch.cat(list(row)), 1
        positions[i, :n] = torch.cat([torch.arange(len(ids)) for ids in row])
        counted[i, :n] = torch.cat([torch.arange(len(ids)) >= range(len(ids))[skip:].start for ids in row])
    return Rows(ids, positions, None if packed else real, counted)


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Share documents out to rows, the longest first, each into the first row that has room.

    Args:
        lengths: Tokens of each document.
        room: Tokens of a row; a longer document has a row of its own.

    Returns:
        Indices of the documents of each row.

    >>> pack([2, 9, 3, 6], room=9)
    [[1], [3, 2], [0]]
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, free in enumerate(left) if free >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(room)
        rows[row].append(i)
        left[row] -= lengths[i]
    return rows


class KeyReader:
    """Reads the keys of documents, packed where that gives what each document alone gives.

    Args:
        base: The base model.
        sites: Whose keys.
        batch_tokens: Tokens of a batch at most, padding counted.
        skip: The key of a document's token that counts first; -1: of the last, so that it alone counts.
        forward_dtype: Precision of the matrix products of the forward pass; None: as the model is loaded.

    Raises:
        StatisticsError: The model's weights have not the precision that is asked for.
    """

    def __init__(
        self,
        base: LanguageModel,
        sites: Sequence[Site],
        batch_tokens: int = 4096,
        skip: int = 0,
        forward_dtype: ForwardDtype | None = None,
    ) -> None:
        self.base, self.sites, self.batch_tokens, self.skip = base, sites, batch_tokens, skip
        self.forward_dtype, self.packed = forward_dtype, False
        if forward_dtype in ("float32", "tf32") and base.dtype in ("bfloat16", "float16"):
            msg = f"statistics.forward_dtype: {forward_dtype} expected base.dtype float32, got {base.dtype}"
            raise StatisticsError(msg)

    def batches(self, documents: Sequence[Tensor]) -> list[list[list[Tensor]]]:
        """Share documents out to batches of rows of similar length."""
        lengths = [len(ids) for ids in documents]
        room = min(max(ROW, *lengths), self.batch_tokens) if self.packed else 0
        rows = [[documents[i] for i in row] for row in pack(lengths, room)]
        sizes = [sum(map(len, row)) for row in rows]
        return [[rows[i] for i in batch] for batch in buckets(sizes, self.batch_tokens)]

    def read(self, rows: Sequence[Sequence[Tensor]]) -> dict[Site, Tensor]:
        """Keys of the documents of a batch, in the order of the rows.

        Returns:
            For each site the keys that count in float32, shape ``(tokens, k)``.

        Raises:
            StatisticsError: The memory does not suffice.
        """
        return self._read(lay_out(rows, self.skip, packed=self.packed), self.forward_dtype)

    def try_packing(self, documents: Sequence[Tensor]) -> bool:
        """Pack from now on if the model gives the same keys to documents in one row as to each alone.

        Never where the pass `rounds`.

        Args:
            documents: Some documents. The longest is tried, where attention windows show, among the shortest.

        Returns:
            Whether documents are packed.
        """
        first, *some = sorted(documents, key=len)
        if not some or rounds(self.base, self.forward_dtype):
            return False
        row, room = [first, some.pop()], max(ROW, len(first))
        for ids in some:
            if sum(map(len, row)) + len(ids) > len(row[1]) + room:
                break
            row.append(ids)
        twice = row + row  # some kernels see packed documents in a batch of one row only
        alone = self._read(lay_out([[ids] for ids in twice], self.skip, packed=False), self.forward_dtype)
        together = self._read(lay_out([row, row], self.skip), self.forward_dtype)
        self.packed = agreed(
            all(
                bool(((together[site] - keys).norm(dim=1) <= EQUAL * keys.norm(dim=1)).all())
                for site, keys in alone.items()
            )
        )
        return self.packed

    @torch.no_grad()
    def _read(self, rows: Rows, precision: ForwardDtype | None) -> dict[Site, Tensor]:
        found: dict[Site, Tensor] = {}

        def keep(site: Site, key: Tensor) -> None:
            found[site] = key.reshape(-1, key.shape[-1])[rows.counted.reshape(-1).to(key.device)].float()

        try:
            with ExitStack() as stack:
                for site in self.sites:
                    hook = self.base.linear(site).register_forward_pre_hook(
                        lambda _, args, site=site: keep(site, args[0])
                    )
                    stack.callback(hook.remove)
                stack.enter_context(_products(precision, self.base.device))
                self.base.run(cast("Batch", rows), max(site.layer for site in self.sites))
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error):
                raise
            msg = f"out of memory at {rows.input_ids.numel()} tokens a batch: lower `statistics.batch_tokens`"
            raise StatisticsError(msg) from error
        return found


@contextmanager
def _products(precision: ForwardDtype | None, device: torch.device) -> Iterator[None]:
    """Do the matrix products inside the context in a precision; what is summed outside is not touched."""
    if precision is None:
        yield
    elif precision == "bfloat16":
        with torch.autocast(device.type, torch.bfloat16):
            yield
    else:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
