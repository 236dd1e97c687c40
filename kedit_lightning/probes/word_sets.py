"""Sets of words that have to do with a fact: read from a file, and as tokens of a model."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kedit_lightning.data.files import as_object, read
from kedit_lightning.errors import DataError
from kedit_lightning.lines import Record
from kedit_lightning.metrics.stopwords import STOP_WORDS

GIVEN = ("related", "factual", "non_factual", "stop")
"""Sets that a record may hold; ``stop``, where it does not, is `STOP`."""
SETS = (*GIVEN, "unrelated")
"""All sets; ``unrelated`` is the vocabulary without the others and the original answer."""
STOP = (*sorted(STOP_WORDS), *string.punctuation)


def read_sets(path: Path | str) -> dict[int, dict[str, list[str]]]:
    """Word sets from a JSON list or JSONL: ``case_id`` and lists of words, any of `GIVEN`; other fields are left out.

    Returns:
        By case id the sets by name.

    Raises:
        DataError: The file or a record cannot be used.
    """
    found: dict[int, dict[str, list[str]]] = {}
    for where, record in objects(path):
        sets = {name: record[name] for name in GIVEN if name in record}
        case, lists = record.get("case_id"), sets.values()
        listed = all(
            isinstance(words, list) and all(isinstance(w, str) and w.strip() for w in words) for words in lists
        )
        if not isinstance(case, int) or not sets or not listed:
            msg = f"expected a whole number `case_id`, and lists of words under one or more of {', '.join(GIVEN)}"
            raise DataError(msg, file=path, record=where)
        found[case] = sets
    return found


def objects(path: Path | str) -> Iterator[tuple[str, Record]]:
    """The objects of a JSON list or JSONL, each with where it stands.

    Raises:
        DataError: The file cannot be read, or holds something else; the message says where.
    """
    for where, raw in read(path):
        try:
            yield where, as_object(raw)
        except DataError as error:
            raise DataError(error.reason, file=path, record=where) from error


class WordTokens:
    """The first tokens of the words of sets.

    Args:
        sets: Word sets by case id.
        first: The first token of a word.
    """

    def __init__(self, sets: Mapping[int, Mapping[str, Sequence[str]]], first: Callable[[str], int]) -> None:
        self._sets, self._first = sets, first
        self._tokens: dict[str, int] = {}

    def __contains__(self, case_id: int) -> bool:
        return case_id in self._sets

    def _of(self, words: Sequence[str]) -> list[int]:
        """The first token of each word."""
        for word in words:
            if word not in self._tokens:
                self._tokens[word] = self._first(word)
        return [self._tokens[word] for word in words]

    def mask(self, case_ids: Sequence[int], answers: Tensor, vocabulary: int) -> Tensor:
        """Which tokens are in which set of each case.

        Args:
            case_ids: b cases; those without sets have empty ones.
            answers: The first token of each original answer, shape ``(b,)``.
            vocabulary: Number of tokens.

        Returns:
            Boolean, shape ``(b, sets, vocabulary)``, in the order of `SETS`; on the CPU.
        """
        mask = torch.zeros(len(case_ids), len(SETS), vocabulary, dtype=torch.bool)
        for one, case, answer in zip(mask, case_ids, answers.tolist(), strict=True):
            if (sets := self._sets.get(case)) is None:
                continue
            for line, name in zip(one, GIVEN, strict=False):
                line[self._of(sets.get(name, STOP if name == "stop" else ()))] = True
            one[-1] = ~one.any(dim=0)
            one[-1, answer] = False
        return mask


def over_sets(values: Tensor, mask: Tensor) -> Tensor:
    """Sums of values over the tokens of sets.

    Args:
        values: Shape ``(b, …, vocabulary)``.
        mask: Shape ``(b, sets, vocabulary)``.

    Returns:
        Shape ``(b, sets, …)``.
    """
    sums = mask.to(values) @ values.flatten(1, -2).mT
    return sums.view(*sums.shape[:2], *values.shape[1:-1])
