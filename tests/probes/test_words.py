"""`kedit words`: sets of words on texts so few that one sees the answer."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from kedit_lightning import commands
from kedit_lightning.errors import KeditError
from kedit_lightning.probes.word_sets import read_sets
from kedit_lightning.probes.words import K1, B, Bm25, read_documents
from tests.commandline import done, jsonl, kedit

PARAGRAPHS = [
    "Velora Quint was born in Norvast, and the lamp shines.",
    "Norvast lies by the sea. Velora Quint left it for Tessaro.",
    "Oskel Tamrin was born in the valley, in winter.",
    "Velora Quint keeps bees.",
]
FACTS = [
    {"subject": "Velora Quint", "relation_id": "birthplace", "object": "Norvast", "relation": "place of birth"},
    {"subject": "Velora Quint", "relation_id": "pet", "object": "bees"},
    {"subject": "Oskel Tamrin", "relation_id": "birthplace", "object": "Tessaro"},
    {"subject": "Oskel Tamrin", "relation_id": "trade", "object": "baker"},
]
EDITS = [
    {
        "case_id": 3,
        "subject": "Velora Quint",
        "prompt": "{} was born in",
        "target_new": "Ulm",
        "target_true": "Norvast",
    },
    {
        "case_id": 4,
        "subject": "Mirabel Foss",
        "prompt": "{} was born in",
        "target_new": "Ulm",
        "target_true": "Norvast",
    },
]
EDITS = [{**edit, "relation_id": "birthplace"} for edit in EDITS]


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Path]:
    """Four documents in two files of a folder, a table of facts and two edits."""
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_text("\n".join(PARAGRAPHS[:2]))
    jsonl(folder / "more" / "b.jsonl", [{"text": text} for text in PARAGRAPHS[2:]])
    edits = jsonl(tmp_path / "edits.jsonl", EDITS)
    return {"texts": folder, "facts": jsonl(tmp_path / "facts.jsonl", FACTS), "edits": edits}


def command(given: dict[str, Path], out: Path, *more: object) -> tuple[object, ...]:
    where = ("--texts", given["texts"], "--facts", given["facts"], "--path", given["edits"])
    return ("words", "--dataset", "jsonl", *where, "--out", out, *more)


def test_the_sets_of_four_documents(tmp_path: Path, given: dict[str, Path]) -> None:
    said = done(*command(given, out := tmp_path / "words.jsonl")).out
    assert "word sets of 1 edit; no text names the subject of 1 edit, skipped" in said
    (line,) = out.read_text().splitlines()
    assert json.loads(line)["subject"] == "Velora Quint"
    sets = read_sets(out)[3]
    assert set(sets["related"]) == set(
        "Velora Quint was born in and the lamp shines lies by sea left it for Tessaro keeps bees".split()
    ), "of the documents with the subject, without the answer"
    assert set(sets["factual"]) == set("place birth bees Velora Quint Oskel Tamrin Tessaro".split())
    assert set(sets["non_factual"]) == set("born lamp shines lies sea left keeps".split())


def test_fewer_texts_and_facts(tmp_path: Path, given: dict[str, Path]) -> None:
    done(*command(given, out := tmp_path / "words.jsonl", "--top", 1, "--candidates", 1))
    sets = read_sets(out)[3]
    assert set(sets["related"]) == set("Velora Quint was born in and the lamp shines".split())
    assert set(sets["factual"]) == {"place", "birth", "Velora", "Quint"}


def test_bm25_is_its_formula() -> None:
    query = "Velora Quint was born in"
    texts = [re.findall(r"\w+", text.lower()) for text in PARAGRAPHS]
    mean = sum(map(len, texts)) / len(texts)
    expected = []
    for text in texts:
        score = 0.0
        for word in query.lower().split():
            df, tf = sum(word in other for other in texts), text.count(word)
            idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
            score += idf * tf * (K1 + 1) / (tf + K1 * (1 - B + B * len(text) / mean))
        expected.append(score)
    index = Bm25(PARAGRAPHS)
    assert index.scores(query).tolist() == pytest.approx(expected)
    assert index.best(query, 2) == sorted(range(4), key=lambda i: -expected[i])[:2]
    assert index.best("bees, bees", 3) == [3], "of documents that have a word of the query"
    assert index.best("zebra", 3) == []


def test_the_almanacs_texts_and_facts_by_default(tmp_path: Path) -> None:
    commands.words(out=tmp_path / "words.jsonl", size=4, documents=3000)
    found = read_sets(tmp_path / "words.jsonl")
    from kedit_lightning import almanac

    assert found
    world = almanac.World()
    for record in almanac.records(4):
        if (sets := found.get(record["case_id"])) is None:
            continue
        rewrite = record["requested_rewrite"]
        (subject,) = (one for one in world.subjects if one.name == rewrite["subject"])
        others = {fact.object.name for fact in world.facts_of(subject)} - {rewrite["target_true"]["str"]}
        assert others <= set(sets["factual"])
        assert rewrite["target_true"]["str"] not in sets["related"] + sets["factual"]
        assert set(subject.name.split()) <= set(sets["related"])


@pytest.mark.parametrize(
    ("what", "content", "said"),
    [
        ("facts", '{"subject": "A", "relation_id": "b"', "line 1: expected one JSON object"),
        ("facts", '{"subject": "A", "relation_id": "b"}', "line 1: expected a fact with the texts"),
        ("texts", None, "expected a folder with texts"),
        ("texts", "\n", "expected at least one document"),
        ("texts", "Nobody is here.", "no usable edit: expected texts that name the subjects"),
        ("texts", "...", "expected texts with words"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_file(
    tmp_path: Path, given: dict[str, Path], what: str, content: str | None, said: str
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    if content is not None:
        (folder / "a.txt").write_text(content)
    given[what] = folder / "a.txt" if what == "facts" else folder
    result = kedit(*command(given, out := tmp_path / "words.jsonl"))
    assert result.status == 1
    assert said in result.err
    assert result.err.strip().count("\n") == 0
    assert not out.exists()


def test_nothing_is_written_over(tmp_path: Path, given: dict[str, Path]) -> None:
    out = tmp_path / "words.jsonl"
    out.write_text("mine")
    result = kedit(*command(given, out))
    assert result.status == 1
    assert "expected a new file to write" in result.err
    assert out.read_text() == "mine"
    with pytest.raises(KeditError, match="expected top, candidates and documents of at least 1"):
        commands.words(out=tmp_path / "other.jsonl", top=0)
    with pytest.raises(KeditError, match="expected a folder with texts"):
        read_documents(tmp_path / "nowhere", 1)
