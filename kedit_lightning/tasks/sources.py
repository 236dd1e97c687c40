"""Where the records of tasks come from: the almanac, a local file, or a data set on the Hugging Face Hub."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kedit_lightning.almanac.check import plain_texts
from kedit_lightning.almanac.items import unseen_items
from kedit_lightning.data.files import as_object, read, read_text
from kedit_lightning.errors import DataError

Record = Mapping[str, Any]
FILES = (".tsv", ".json", ".jsonl", ".txt")
ALMANAC = "almanac:"
SHUFFLE = 37
"""Seed of AlphaEdit's balanced subsets."""


def is_dataset(source: str) -> bool:
    """Whether a source is neither the almanac's nor a file."""
    return not source.startswith(ALMANAC) and Path(source).suffix not in FILES and not Path(source).is_file()


def records(source: str) -> Iterator[tuple[str, Record]]:
    """Read records one by one.

    Args:
        source: ``almanac:TASK`` (``almanac:texts``: plain sentences); a local file, or its address, that ends in
            ``.tsv`` (a first line with the names of the fields, no quoting), ``.json`` (a list), ``.jsonl`` or ``.txt``
            (a text a line); or a data set as ``NAME[:CONFIG[:SPLIT]][@REVISION]``, by default its test split.

    Yields:
        Where a record stands, and its fields.

    Raises:
        DataError: The source is missing, cannot be reached, or a record cannot be read; it is named.
    """
    if source == f"{ALMANAC}texts":
        yield from ((f"text {i}", {"text": text}) for i, text in enumerate(plain_texts(), 1))
    elif source.startswith(ALMANAC):
        items = unseen_items(source.removeprefix(ALMANAC))
        yield from ((f"item {i}", {"prompt": it.prompt, "answer": it.answer}) for i, it in enumerate(items, 1))
    elif is_dataset(source):
        yield from _dataset(source)
    elif source.endswith(".tsv"):
        yield from _table(source)
    elif source.endswith(".txt"):
        lines = enumerate(read_text(source)[1].splitlines(), 1)
        yield from ((f"line {i}", {"text": line.strip()}) for i, line in lines if line.strip())
    else:
        for where, raw in read(source):
            try:
                yield where, as_object(raw)
            except DataError as error:
                raise DataError(error.reason, file=source, record=where) from error


def balanced(found: Sequence[tuple[str, Record]], field: str) -> list[tuple[str, Record]]:
    """As many records of each class as of the smallest, the classes in turn, each in random order.

    As AlphaEdit made its subset of SST-2, to the seed.

    Args:
        found: Records as `records` yields them.
        field: The field of the class.
    """
    rng = random.Random(SHUFFLE)
    classes: dict[Any, list[tuple[str, Record]]] = {}
    for where, record in found:
        classes.setdefault(record.get(field), []).append((where, record))
    for members in classes.values():
        rng.shuffle(members)
    return [record for turn in zip(*classes.values(), strict=False) for record in turn]


def _table(source: str) -> Iterator[tuple[str, Record]]:
    file, text = read_text(source)
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        msg = "the file is empty; expected a line with the names of the fields, and records"
        raise DataError(msg, file=file)
    names = lines[0][1].split("\t")
    for number, line in lines[1:]:
        values = line.split("\t")
        if len(values) != len(names):
            msg = f"expected {len(names)} fields between tabs ({', '.join(names)}), got {len(values)}"
            raise DataError(msg, file=file, record=f"line {number}")
        yield f"line {number}", dict(zip(names, values, strict=True))


def _dataset(source: str) -> Iterator[tuple[str, Record]]:
    import datasets

    name, _, revision = source.partition("@")
    name, config, split, *_ = [*name.split(":"), "", ""]
    try:
        found: Any = datasets.load_dataset(name, config or None, split=split or "test", revision=revision or None)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        msg = f"cannot read the data set {source!r}: {reason}; without a network give a local file in tasks.sources"
        raise DataError(msg) from error
    yield from ((f"row {i}", row) for i, row in enumerate(found))
