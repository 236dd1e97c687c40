import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.protocols import protocol_name, without_conflicts
from kedit_lightning.edits import Edit
from kedit_lightning.errors import DataError

ULM = Edit("{} was born in", "Ann Example", "Ulm", case_id=7, relation_id="P19")
ROME = replace(ULM, prompt="The birthplace of {} is", subject="ANN EXAMPLE", target_new="Rome", case_id=8)
OTHERS = [Edit("{} was born in", f"Person {i}", "Ulm", case_id=i, relation_id="P19") for i in range(3)]


@pytest.mark.parametrize(
    ("edits", "batch_size", "restore_every", "name"),
    [
        (1, 1, None, "single"),
        (50, 1, 1, "single"),
        (50, 1, 50, "sequential"),
        (150, 1, 100, "one by one, restored every 100"),
        (10_000, 10_000, 10_000, "one batch of 10000"),
        (30, 100, None, "one batch of 30"),
        (2000, 100, 100, "20 batches of 100, restored after each"),
        (2000, 100, None, "20 batches of 100, all kept"),
        (2000, 100, 500, "20 batches of 100, restored every 500"),
        (130, 100, 100, "2 batches of up to 100, restored after each"),
    ],
)
def test_a_protocol_has_a_name(edits: int, batch_size: int, restore_every: int | None, name: str) -> None:
    assert protocol_name(edits, batch_size, restore_every) == name


def test_the_data_module_names_its_protocol() -> None:
    data = EditDataModule(edits=[edit.as_record() for edit in OTHERS], batch_size=2, restore_every=2)
    data.setup("fit")
    assert data.protocol_name == "2 batches of up to 2, restored after each"


# ---------------------------------------------------------------------- conflicts


def test_edits_of_one_batch_that_contradict_each_other_are_named() -> None:
    with pytest.raises(DataError) as error:
        without_conflicts([ULM, *OTHERS, ROME], 5, "raise")
    assert "cases 7 and 8 ('The birthplace of ANN EXAMPLE is': Ulm or Rome)" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "conflict"),
    [
        ({}, True),
        ({"target_new": "Ulm"}, False),
        ({"relation_id": "P20"}, False),
        ({"subject": "Ann"}, False),
        ({"relation_id": None}, False),  # the templates differ
        ({"relation_id": None, "prompt": "{} was born in"}, False),  # no telling: one names its relation
    ],
)
def test_what_contradicts(change: dict[str, Any], conflict: bool) -> None:
    assert (len(without_conflicts([ULM, replace(ROME, **change)], 2, "keep_last")) == 1) == conflict


def test_without_relations_the_template_counts() -> None:
    one, other = (replace(edit, relation_id=None, prompt="{} was born in") for edit in (ULM, ROME))
    assert without_conflicts([one, other], 2, "keep_last") == [other]


def test_the_last_is_kept_and_the_others_counted(caplog: pytest.LogCaptureFixture) -> None:
    again = replace(ULM, target_new="Oslo", case_id=9)
    assert without_conflicts([ULM, OTHERS[0], ROME, again, *OTHERS[1:]], 6, "keep_last") == [
        OTHERS[0],
        again,
        *OTHERS[1:],
    ]
    (record,) = caplog.records
    assert "left out 2 of 6 edits" in record.getMessage()
    assert "cases 7 and 8" in record.getMessage()
    assert "cases 8 and 9" in record.getMessage()


def test_duplicates_are_kept() -> None:
    twice = [ULM, replace(ULM, case_id=9)]
    assert without_conflicts(twice, 2, "raise") == twice
    assert without_conflicts([*twice, ROME], 3, "keep_last") == [ROME]


@pytest.mark.parametrize(("batch_size", "refused"), [(1, False), (2, False), (3, True), (4, True)])
def test_only_within_a_batch(batch_size: int, refused: bool) -> None:
    edits = [OTHERS[0], ULM, ROME]
    if refused:
        with pytest.raises(DataError, match="cases 7 and 8"):
            without_conflicts(edits, batch_size, "raise")
    else:
        assert without_conflicts(edits, batch_size, "raise") == edits


def test_the_batches_are_those_that_were_looked_at() -> None:
    """One left out makes room for the next, which may contradict in its turn."""
    edits = [ULM, ROME, OTHERS[0], ULM]
    data = EditDataModule(edits=[edit.as_record() for edit in edits], batch_size=3, on_conflict="keep_last")
    data.setup("fit")
    assert [[[edit.case_id for edit in batch] for batch in group] for group in data.groups()] == [[[0, 7]]]


def test_many_conflicts_are_one_short_line() -> None:
    pairs = [replace(edit, subject=f"Person {i}") for i in range(50) for edit in (ULM, ROME)]
    with pytest.raises(DataError, match="and 45 more") as error:
        without_conflicts(pairs, 100, "raise")
    assert len(str(error.value)) < 800


def test_a_data_module_refuses_a_file(tmp_path: Path) -> None:
    path = tmp_path / "edits.json"
    path.write_text(json.dumps([ULM.as_record(), ROME.as_record()]))
    with pytest.raises(DataError, match="on_conflict: keep_last"):
        EditDataModule("jsonl", str(path), batch_size=2).setup("fit")
    EditDataModule("jsonl", str(path), batch_size=1).setup("fit")
