import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from kedit_lightning.data import datasets
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.edits import Edit
from kedit_lightning.errors import DataError


def record(i: int, **more: Any) -> dict[str, Any]:
    return {"case_id": i, "prompt": "{} was born in", "subject": f"Person {i}", "target_new": "Ulm", **more}


def module(n: int = 10, **settings: Any) -> EditDataModule:
    data = EditDataModule(edits=[record(i) for i in range(n)], **settings)
    data.setup("fit")
    return data


def cases(data: EditDataModule) -> list[list[list[int]]]:
    return [[[edit.case_id for edit in batch] for batch in group] for group in data.groups()]


# ---------------------------------------------------------------------- the stream


@pytest.mark.parametrize(
    ("batch_size", "restore_every", "groups"),
    [
        pytest.param(1, 1, [[[i]] for i in range(10)], id="single editing"),
        pytest.param(1, 4, [[[0], [1], [2], [3]], [[4], [5], [6], [7]], [[8], [9]]], id="TOP Table 5 with TOP"),
        pytest.param(4, 4, [[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9]]], id="TOP Table 5 with MEMIT"),
        pytest.param(10_000, None, [[list(range(10))]], id="JEEP"),
        pytest.param(1, None, [[[i] for i in range(10)]], id="sequential"),
        pytest.param(4, None, [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]], id="batch-sequential"),
        pytest.param(2, 4, [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9]]], id="several batches a restoration"),
        pytest.param(5, 100, [[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]], id="fewer edits than a restoration"),
    ],
)
def test_protocols(batch_size: int, restore_every: int | None, groups: list[Any]) -> None:
    data = module(batch_size=batch_size, restore_every=restore_every)
    assert cases(data) == groups
    assert cases(data) == groups, "and again"


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"start": 3}, range(3, 10)),
        ({"stop": 4}, range(4)),
        ({"start": 2, "stop": 5}, range(2, 5)),
        ({"start": 8, "stop": 100}, range(8, 10)),
    ],
)
def test_start_and_stop(settings: dict[str, int], wanted: range) -> None:
    assert [edit.case_id for edit in module(**settings).edits] == list(wanted)


def test_setup_loads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning calls it again for every fit of the stream."""
    data = module()
    monkeypatch.setattr(datasets, "inline", lambda *_, **__: pytest.fail("loaded again"))
    before = data.edits
    for stage in ("fit", "validate", "test"):
        data.setup(stage)
    assert data.edits is before


def test_the_training_loader_is_the_current_batch_without_end() -> None:
    data = module()
    for batch in (data.edits[:2], data.edits[2:4]):
        data.current = batch
        assert list(itertools.islice(data.train_dataloader(), 3)) == [batch] * 3


def test_evaluation_loaders_hold_the_edits_in_batches() -> None:
    data = module(5, batch_size=2)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert [[edit.case_id for edit in batch] for batch in loader] == [[0, 1], [2, 3], [4]]


def test_edits_stay_where_they_are() -> None:
    data = module(2)
    assert data.transfer_batch_to_device(data.edits, None, 0) is data.edits  # type: ignore[arg-type]


# ---------------------------------------------------------------------- where edits come from


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text("".join(json.dumps(record(i)) + "\n" for i in range(5)), encoding="utf-8")
    data = EditDataModule("jsonl", str(path), size=4, start=1)
    data.setup("fit")
    assert [edit.case_id for edit in data.edits] == [1, 2, 3]


def test_written_out_edits_come_before_a_data_set() -> None:
    data = EditDataModule("counterfact", "no such file", edits=[record(1, target_true="Norvast")])
    data.setup("fit")
    assert data.edits == [Edit("{} was born in", "Person 1", "Ulm", "Norvast", case_id=1)]


def test_reference_texts_are_the_almanacs_own_or_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "reference_texts", lambda source: source)
    assert EditDataModule().reference_texts() == "almanac"
    assert EditDataModule("counterfact", snippets="texts.json").reference_texts() == "texts.json"
    assert EditDataModule(edits=[record(0)]).reference_texts() is None


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size ≥ 1"),
        ({"restore_every": 0}, "restore_every ≥ 1 or null"),
        ({"start": -1}, "start ≥ 0"),
        ({"batch_size": 3, "restore_every": 4}, "multiple of batch_size, got 4 and 3"),
        ({"batch_size": 10, "restore_every": 1}, "multiple of batch_size, got 1 and 10"),
    ],
)
def test_stream_numbers_that_contradict_each_other(settings: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        EditDataModule(edits=[record(0)], **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"start": 10}, {"start": 5, "stop": 5}, {"stop": 0}])
def test_nothing_to_edit(settings: dict[str, int]) -> None:
    with pytest.raises(DataError, match="nothing to edit: 10 records, of which"):
        module(**settings)


def test_no_edits_at_all() -> None:
    with pytest.raises(DataError):
        module(0)


def test_bad_records_raise_or_are_skipped(caplog: pytest.LogCaptureFixture) -> None:
    records = [record(0), record(1, target_new=""), record(2)]
    with pytest.raises(DataError, match=r"record 2.*target_new"):
        EditDataModule(edits=records).setup("fit")
    data = EditDataModule(edits=records, on_bad_record="skip")
    data.setup("fit")
    assert [edit.case_id for edit in data.edits] == [0, 2]
    assert "target_new" in caplog.text


@pytest.mark.parametrize(("dataset", "path"), [("jsonl", "no/such/file.jsonl"), ("counterfact", "no/such/file.json")])
def test_a_missing_file_is_named(dataset: Any, path: str) -> None:
    with pytest.raises(DataError, match="no/such/file"):
        EditDataModule(dataset, path).setup("fit")
