"""The edits of a batch in parts that fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import groupby

from kedit_lightning.data.prompts import EditBatch, edit_batches
from kedit_lightning.edits import Edit
from kedit_lightning.errors import KeditError
from kedit_lightning.models import LanguageModel

log = logging.getLogger(__name__)


class Parts(Sequence[EditBatch]):
    """n edits in parts under a token budget; an edit's rows stay together.

    Args:
        base: The model that reads them.
        edits: The n edits.
        templates: Context templates in groups.
        max_tokens: Tokens of a part at most, padding included.
        separate: Whether targets are tokenised on their own.
        batch_size: Edits of a mini-batch, in their order; the edits of a part are of one. None: all are one batch.
    """

    def __init__(
        self,
        base: LanguageModel,
        edits: Sequence[Edit],
        templates: Sequence[Sequence[str]],
        max_tokens: int,
        *,
        separate: bool = False,
        batch_size: int | None = None,
    ) -> None:
        self.base, self.edits, self.templates, self.separate = base, edits, templates, separate
        self.max_tokens, self.batch_size = max_tokens, batch_size or len(edits)
        self._parts = self._share_out(range(len(edits)))

    def _share_out(self, places: Sequence[int]) -> list[EditBatch]:
        parts = []
        for _, group in groupby(places, lambda place: place // self.batch_size):
            mine = list(group)
            edits = [self.edits[i] for i in mine]
            batches = edit_batches(self.base, edits, self.templates, max_tokens=self.max_tokens, separate=self.separate)
            parts += [batch.placed(mine) for batch in batches]
        return parts

    def of_batch(self, i: int) -> list[int]:
        """The parts of the mini-batch that part i is of."""
        batches = [int(part.index[0]) // self.batch_size for part in self._parts]
        return [j for j, batch in enumerate(batches) if batch == batches[i]]

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, i: int) -> EditBatch:  # type: ignore[override]
        return self._parts[i]

    def __iter__(self) -> Iterator[EditBatch]:
        return iter(self._parts)

    def divide(self, i: int) -> None:
        """Make smaller parts, of half its tokens, of part i and of those after it: it did not fit into memory.

        Raises:
            KeditError: The part is a single edit.
        """
        large = self._parts[i]
        if len(large) == 1:
            fewer = "take fewer context templates, or " if sum(map(len, self.templates)) > 1 else ""
            msg = (
                f"case {large.edits[0].case_id}: out of memory with this edit alone ({large.tokens} tokens); "
                f"{fewer}load the model in bfloat16"
            )
            raise KeditError(msg)
        self.max_tokens = large.tokens // 2
        log.warning("Out of memory at %d tokens: going on with at most %d together.", large.tokens, self.max_tokens)
        places = sorted(place for part in self._parts[i:] for place in part.index.tolist())
        self._parts[i:] = self._share_out(places)
