"""Documents for statistics: where they come from, how they are sampled and cut."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kedit_lightning.errors import StatisticsError

SHUFFLE_BUFFER = 10_000
TEXT_FILES = (".txt", ".text", ".jsonl")


@dataclass(frozen=True)
class Corpus:
    """A sample of documents.

    Args:
        source: ``almanac``; a text file with one document a line; a ``.jsonl`` file with the text in a field; or a
            Hugging Face dataset as ``NAME[:CONFIG][@REVISION]``.
        split: Split of a Hugging Face dataset.
        column: Field of the text, in a dataset or a ``.jsonl`` file.
        n_samples: Documents at most.
        seed: Seed of the shuffle.
        streaming: Read a Hugging Face dataset as a shuffled stream instead of downloading all of it.
    """

    source: str
    split: str = "train"
    column: str = "text"
    n_samples: int = 100_000
    seed: int = 1
    streaming: bool = False

    @property
    def file(self) -> Path | None:
        """The text file that is meant, if one is."""
        path = Path(self.source).expanduser()
        return path if path.is_file() or path.suffix in TEXT_FILES else None

    @property
    def size(self) -> int:
        """Documents of the sample, at most."""
        if self.source == "almanac" or self.file is None:
            return self.n_samples
        return min(self.n_samples, len(self._lines(self.file)))

    def identity(self) -> str:
        """What the documents depend on beside the sample: the content of a file, the name of a dataset.

        The content of a dataset counts only where its revision is given: asking for it would need a network.
        """
        if self.source == "almanac":
            return f"almanac {_digest(self._almanac(64))}"
        if self.file is not None:
            self._exists(self.file)
            with self.file.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            return f"file {content}" + (f" {self.column}" if self.file.suffix == ".jsonl" else "")
        return f"dataset {self.source} {self.split} {self.column}" + (" streamed" if self.streaming else "")

    def __iter__(self) -> Iterator[str]:
        """The documents of the sample, in its order.

        Raises:
            StatisticsError: The source is missing, cannot be reached, or has no text.
        """
        if self.source == "almanac":
            return self._growing_almanac()
        if self.file is not None:
            lines = self._lines(self.file)
            return (lines[i] for i in self._sample(len(lines)))
        return self._dataset()

    def _sample(self, n: int) -> list[int]:
        """The first `n_samples` of the shuffled indices, as in the released codes."""
        indices = list(range(n))
        random.Random(self.seed).shuffle(indices)
        return indices[: self.n_samples]

    def _almanac(self, n: int) -> list[str]:
        from kedit_lightning import almanac

        return almanac.documents(n, self.seed)

    def _growing_almanac(self) -> Iterator[str]:
        done, n = 0, 256
        while done < self.n_samples:
            yield from self._almanac(min(n, self.n_samples))[done:]
            done, n = min(n, self.n_samples), 2 * n

    def _exists(self, path: Path) -> None:
        if not path.is_file():
            msg = f"{path}: no such file; `statistics.source` expected a text file with one document a line, or .jsonl"
            raise StatisticsError(msg)

    def _lines(self, path: Path) -> list[str]:
        self._exists(path)
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            msg = f"{path}: expected text in UTF-8, got other bytes ({error.reason} at byte {error.start})"
            raise StatisticsError(msg) from error
        if path.suffix == ".jsonl":
            lines = [self._record(path, i, line) for i, line in enumerate(lines, 1) if line.strip()]
        documents = [line.strip() for line in lines if line.strip()]
        if not documents:
            msg = f"{path}: expected at least one document (one a line), got none"
            raise StatisticsError(msg)
        return documents

    def _record(self, path: Path, number: int, line: str) -> str:
        try:
            text = json.loads(line)[self.column]
        except (json.JSONDecodeError, KeyError, TypeError, IndexError):
            text = None
        if not isinstance(text, str):
            msg = f"{path}, line {number}: expected a JSON object with the text in the field {self.column!r}"
            raise StatisticsError(msg)
        return text

    def _dataset(self) -> Iterator[str]:
        import datasets

        name, _, revision = self.source.partition("@")
        name, _, config = name.partition(":")
        try:
            found: Any = datasets.load_dataset(
                name, config or None, split=self.split, revision=revision or None, streaming=self.streaming
            )
            columns = found.column_names
            if columns is not None and self.column not in columns:
                msg = (
                    f"{self.source}: no column {self.column!r}; set `statistics.column` to one of {', '.join(columns)}"
                )
                raise StatisticsError(msg)
            if self.streaming:
                rows = found.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)
                for row in islice(rows, self.n_samples):
                    yield row[self.column]
            else:
                for i in self._sample(len(found)):
                    yield found[i][self.column]
        except StatisticsError:
            raise
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = str(error).strip().split("\n")[0]
            msg = (
                f"cannot read the dataset {self.source!r}: {reason}; without a network set `statistics.source` to "
                "almanac, a text file, a folder of statistics files or identity"
            )
            raise StatisticsError(msg) from error


def tokenise(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int, tokens: int | None, skip: int = 0
) -> Iterator[Tensor]:
    """Token ids of documents, as they are asked for, until enough keys have come together.

    Args:
        documents: Texts; those without tokens are left out.
        tokenizer: The tokenizer.
        max_length: A document is cut after this many tokens.
        tokens: Keys wanted; the last document is cut so that there are exactly as many. None takes all.
        skip: Tokens at the start of each document whose keys do not count.

    Yields:
        One vector of ids a document, int32.
    """
    left = tokens
    texts = (text for text in documents if text.strip())
    while chunk := list(islice(texts, 256)):
        for ids in tokenizer(chunk, verbose=False)["input_ids"]:
            length = min(len(ids), max_length) if left is None else min(len(ids), max_length, left + skip)
            if length <= skip:
                continue
            yield torch.tensor(ids[:length], dtype=torch.int32)
            if left is not None:
                left -= length - skip
                if left == 0:
                    return


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
