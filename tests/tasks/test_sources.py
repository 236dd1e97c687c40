import json
import random

import datasets
import pytest

from kedit_lightning.errors import DataError
from kedit_lightning.tasks.sources import balanced, records

TSV = 'index\tsentence1\tsentence2\tlabel\n0\tHe said "no.\tHe spoke.\tentailment\r\n\n1\tx\ty\tnot_entailment\n'
ROWS = [{"sentence": f"s{i}", "label": i % 2} for i in range(4)]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.jsonl",
            "".join(f"{json.dumps(row)}\n" for row in ROWS),
            [(f"line {i + 1}", r) for i, r in enumerate(ROWS)],
        ),
        ("a.json", json.dumps(ROWS), [(f"record {i + 1} of 4", row) for i, row in enumerate(ROWS)]),
        ("a.txt", "one\n\n  two \n", [("line 1", {"text": "one"}), ("line 3", {"text": "two"})]),
    ],
)
def test_files(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    assert list(records(str(tmp_path / name))) == expected


def test_tables_are_not_quoted(tmp_path):
    (tmp_path / "a.tsv").write_text(TSV)
    (one, first), (two, second) = records(str(tmp_path / "a.tsv"))
    assert (one, two) == ("line 2", "line 4")
    assert first == {"index": "0", "sentence1": 'He said "no.', "sentence2": "He spoke.", "label": "entailment"}
    assert second["label"] == "not_entailment"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.tsv", "a\tb\n1\t2\n1\n", r"a\.tsv, line 3: expected 2 fields between tabs \(a, b\), got 1"),
        ("a.tsv", "", r"a\.tsv: the file is empty"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"a\.jsonl, line 2: expected one JSON object"),
        ("a.json", "[1, 2", r"a\.json: not valid JSON"),
        ("a.json", "[7]", r"a\.json, record 1 of 1: expected one JSON object, got 7"),
    ],
)
def test_a_bad_file_is_named_with_its_record(tmp_path, name, content, reason):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=reason):
        list(records(str(tmp_path / name)))


@pytest.mark.parametrize("name", ["b.tsv", "b.txt", "b.jsonl"])
def test_a_file_that_is_not_there(tmp_path, name):
    with pytest.raises(DataError, match="no such file"):
        list(records(str(tmp_path / name)))


def test_a_data_set_by_name(monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((*args, *kwargs.items()))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [row for _, row in records("nyu-mll/glue:sst2:validation@abc")] == ROWS
    assert next(iter(records("own/set")))[0] == "row 0"
    assert asked == [
        ("nyu-mll/glue", "sst2", ("split", "validation"), ("revision", "abc")),
        ("own/set", None, ("split", "test"), ("revision", None)),
    ]


def test_a_data_set_that_cannot_be_reached(monkeypatch):
    def load(*args, **kwargs):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match="'own/set': no network; without a network give a local file"):
        list(records("own/set"))


def test_the_almanac():
    found = [record for _, record in records("almanac:nli")]
    assert len(found) == 300
    assert {record["answer"] for record in found} == {"true", "false"}
    assert len(list(records("almanac:texts"))) == 200


def test_classes_take_turns():
    """As AlphaEdit: each class shuffled by seed 37 in the order in which classes come first, all of the smaller one."""
    found = [(str(i), {"label": int(i not in (1, 4, 5))}) for i in range(8)]
    rng, ones, zeros = random.Random(37), [0, 2, 3, 6, 7], [1, 4, 5]
    rng.shuffle(ones)
    rng.shuffle(zeros)
    expected = [str(i) for pair in zip(ones, zeros, strict=False) for i in pair]
    assert [where for where, _ in balanced(found, "label")] == expected
