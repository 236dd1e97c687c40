"""Sets of words that have to do with a fact, built from texts and a table of facts: `kedit words`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from re import findall, search
from typing import Any

import numpy as np

from kedit_lightning.edits import Edit
from kedit_lightning.errors import DataError, KeditError
from kedit_lightning.lines import Record, as_lines
from kedit_lightning.metrics.stopwords import STOP_WORDS
from kedit_lightning.models.corpora import TEXT_FILES, Corpus
from kedit_lightning.models.progress import steps
from kedit_lightning.probes.word_sets import objects
from kedit_lightning.writing import write_beside

K1, B = 1.2, 0.75
"""BM25's saturation of term frequencies and its share of length normalisation, at their usual values."""
_WORD = r"\w+(?:['’-]\w+)*"


@dataclass(frozen=True)
class Known:
    """One line of a table of facts.

    Args:
        subject: The subject.
        relation_id: The relation, as edits name it.
        object: The object.
        relation: The relation in words.
    """

    subject: str
    relation_id: str
    object: str
    relation: str = ""


class Bm25:
    """Finds the documents that fit a query best.

    A document's score is the sum over the query's words of ``idf · tf (K1 + 1) / (tf + K1 (1 − B + B · length / mean
    length))`` with ``idf = ln(1 + (n − df + ½) / (df + ½))``; upper and lower case are the same.

    Args:
        documents: n texts.

    Raises:
        KeditError: No text has a word.
    """

    def __init__(self, documents: Sequence[str]) -> None:
        from sklearn.feature_extraction.text import CountVectorizer

        self._vectorizer = CountVectorizer(token_pattern=_WORD)
        if not any(search(_WORD, text) for text in documents):
            msg = "expected texts with words, got none that has any; give other ones"
            raise KeditError(msg)
        weights = self._vectorizer.fit_transform(documents).tocsc().astype(np.float64)
        length, df = np.asarray(weights.sum(axis=1))[:, 0], np.diff(weights.indptr)
        idf = np.log1p((len(documents) - df + 0.5) / (df + 0.5))
        tf, norm = weights.data, K1 * (1 - B + B * length / length.mean())
        weights.data = tf * (K1 + 1) / (tf + norm[weights.indices]) * np.repeat(idf, df)
        self._weights = weights

    def scores(self, query: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The score of every document, shape ``(n,)``."""
        words = self._vectorizer.transform([query]).indices
        return np.asarray(self._weights[:, words].sum(axis=1))[:, 0]

    def best(self, query: str, n: int) -> list[int]:
        """The documents of the n highest scores above 0, best first, of equals the first."""
        scores = self.scores(query)
        order = np.argsort(-scores, kind="stable")[:n]
        return [int(i) for i in order if scores[i] > 0]


class FactTable:
    """Which words are factual for a fact.

    Args:
        facts: The facts that are known.
        candidates: So many facts of the subject, and as many of the relation, are looked at.
    """

    def __init__(self, facts: Iterable[Known], candidates: int) -> None:
        self._by_subject: dict[str, list[Known]] = {}
        self._by_relation: dict[str, list[Known]] = {}
        for fact in facts:
            for table, key in ((self._by_subject, fact.subject), (self._by_relation, fact.relation_id)):
                if len(some := table.setdefault(key, [])) < candidates:
                    some.append(fact)

    def words(self, edit: Edit) -> set[str]:
        """Words of the relations and objects of the edit's subject, and of subjects and objects of its relation."""
        own = self._by_subject.get(edit.subject, [])
        like = self._by_relation.get(edit.relation_id or "", [])
        texts = [f"{fact.relation} {fact.object}" for fact in own] + [f"{fact.subject} {fact.object}" for fact in like]
        return {word for text in texts for word in findall(_WORD, text)}


def build(edits: Sequence[Edit], documents: Sequence[str], facts: FactTable, top: int) -> Iterator[Record | None]:
    """Word sets of edits (JEEP, appendix A.1, where Wikipedia and GPT-4 are the sources).

    ``related``: the words of those of the best documents for the edit prompt (BM25) in which the subject occurs;
    ``factual``: see `FactTable`; ``non_factual``: the related words that are neither factual nor stop words. The words
    of the original answer are in none.

    Args:
        edits: The edits.
        documents: Texts, such as paragraphs.
        facts: What is factual.
        top: How many of the best documents are looked at.

    Yields:
        For each edit a record as `read_sets` reads it; None where no such document names the subject.
    """
    index = Bm25(documents)
    with steps("Words") as step:
        for done, edit in enumerate(edits, 1):
            texts = [documents[i] for i in index.best(edit.text, top) if edit.subject in documents[i]]
            answer = {word.lower() for word in findall(_WORD, edit.target_true or "")}
            related = {word for text in texts for word in findall(_WORD, text) if word.lower() not in answer}
            factual = {word for word in facts.words(edit) if word.lower() not in answer | STOP_WORDS}
            known = {word.lower() for word in factual} | STOP_WORDS
            sets = {
                "related": sorted(related),
                "factual": sorted(factual),
                "non_factual": sorted(word for word in related if word.lower() not in known),
            }
            step(done, len(edits), "")
            yield {"case_id": edit.case_id, "subject": edit.subject, **sets} if texts else None


def write_sets(path: Path, records: Iterable[Record | None]) -> int:
    """Write records a line each, as they come; without those that are None.

    Returns:
        How many were written.

    Raises:
        KeditError: There is none, or the file cannot be written.
    """
    written = 0

    def write(beside: Path) -> None:
        nonlocal written
        with beside.open("wb") as file:
            for record in records:
                if record is not None:
                    file.write(as_lines([record]))
                    written += 1
        if not written:
            msg = "no usable edit: expected texts that name the subjects, got none that does; give other or more texts"
            raise KeditError(msg)

    write_beside(path, write)
    return written


def read_documents(folder: Path | None, n: int) -> list[str]:
    """The documents of a folder: of its text files the lines, of ``.jsonl`` the field ``text``.

    Args:
        folder: The folder, with those below it; None: the almanac's text.
        n: How many of the almanac's documents.

    Raises:
        KeditError: There is no such folder, or no text in it.
    """
    if folder is None:
        return list(Corpus("almanac", n_samples=n))
    files = sorted(path for path in folder.rglob("*") if path.suffix in TEXT_FILES)
    if not files:
        msg = f"{folder}: expected a folder with texts ({', '.join(TEXT_FILES)}: a document a line), got none there"
        raise KeditError(msg)
    found = list[str]()
    with steps("Texts") as step:
        for done, path in enumerate(files, 1):
            found += Corpus(str(path), n_samples=sys.maxsize)
            step(done, len(files), path.name)
    return found


def read_facts(path: Path | None) -> Iterator[Known]:
    """The facts of a JSON list or JSONL with ``subject``, ``relation_id``, ``object`` and, if known, ``relation``.

    Args:
        path: The file; None: the almanac's facts.

    Raises:
        DataError: The file or a record cannot be used.
    """
    if path is None:
        from kedit_lightning import almanac

        for fact in almanac.World().facts:
            yield Known(fact.subject.name, fact.relation.id, fact.object.name, fact.relation.label)
        return
    for where, record in objects(path):
        known = [record.get(name, "") for name in ("subject", "relation_id", "object", "relation")]
        if not all(isinstance(value, str) for value in known) or not all(known[:3]):
            msg = "expected a fact with the texts `subject`, `relation_id`, `object` and, if known, `relation`"
            raise DataError(msg, file=path, record=where)
        yield Known(*known)
