import json
import logging

import pytest

from kedit_lightning import almanac
from kedit_lightning.data import datasets
from kedit_lightning.data.datasets import LOADERS, inline, load, reference_texts
from kedit_lightning.edits import Edit
from kedit_lightning.errors import DataError

COUNTERFACT = {
    "case_id": 40,
    "pararel_idx": 11,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "Dutch", "id": "Q1"},
        "target_true": {"str": "Greek", "id": "Q2"},
        "subject": "Ann Example",
    },
    "paraphrase_prompts": ["Ann Example grew up speaking"],
    "neighborhood_prompts": ["Bob Other is a native speaker of", "Cas Third speaks"],
    "attribute_prompts": [],
    "generation_prompts": ["Ann Example lives in"],
}
ZSRE = {
    "subject": "Ann",
    "src": "What was the job of Ann, daughter of Ann?",
    "rephrase": "What did Ann do?",
    "alt": "sailor",
    "answers": ["river pilot", "pilot"],
    "loc": "nq question: who sang in the old town",
    "loc_ans": "the choir",
}
FLAT = {"prompt": "{} is a", "subject": "Ann", "target_new": "pilot"}


def write(path, records):
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def write_lines(path, *lines):
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def fact(subject="Ann Example", new="Dutch", relation="P103", prompt="The mother tongue of {} is"):
    rewrite = {"prompt": prompt, "subject": subject, "target_new": {"str": new}, "relation_id": relation}
    return {"requested_rewrite": rewrite}


class TestCounterfact:
    def test_reads_every_field(self, tmp_path):
        (edit,) = load("counterfact", write(tmp_path / "cf.json", [COUNTERFACT]))
        assert edit.text == "The mother tongue of Ann Example is"
        assert (edit.target_new, edit.target_true) == ("Dutch", "Greek")
        assert (edit.case_id, edit.relation_id, edit.target_new_id, edit.target_true_id) == (40, "P103", "Q1", "Q2")
        assert edit.paraphrase_prompts == ("Ann Example grew up speaking",)
        assert len(edit.neighborhood_prompts) == 2
        assert edit.neighborhood_targets == edit.attribute_prompts == ()
        assert edit.generation_prompts == ("Ann Example lives in",)

    def test_missing_optional_fields_and_plain_targets(self, tmp_path):
        first, second = fact(), fact("Bob")
        second["requested_rewrite"]["target_new"] = " Latin "
        edits = load("counterfact", write(tmp_path / "cf.json", [first, second]))
        assert [edit.case_id for edit in edits] == [0, 1]
        assert edits[1].target_new == "Latin"
        assert edits[1].target_true is None

    def test_size_counts_edits(self, tmp_path):
        path = write(tmp_path / "cf.json", [fact(f"S{i}") for i in range(5)])
        assert [edit.subject for edit in load("counterfact", path, size=2)] == ["S0", "S1"]

    def test_conflicts_stay(self, tmp_path):
        assert len(load("counterfact", write(tmp_path / "cf.json", [fact(), fact(new="Latin")]))) == 2


class TestMultiCounterfact:
    def test_first_of_a_subject_and_relation_is_kept_and_the_rest_counted(self, tmp_path, caplog):
        records = [
            fact(),
            fact("ann example", "Latin", prompt="{} speaks"),
            fact(relation="P19", prompt="{} was born in"),
            fact("Bob"),
        ]
        edits = load("multi_counterfact", write(tmp_path / "mcf.json", records))
        assert [edit.case_id for edit in edits] == [0, 2, 3]
        assert "left out 1 of 4 records that conflicted with an earlier one" in caplog.text

    def test_template_stands_in_for_a_missing_relation(self, tmp_path):
        records = [
            fact(relation=None),
            fact(new="Latin", relation=None),
            fact(relation=None, prompt="{} was born in"),
        ]
        assert len(load("multi_counterfact", write(tmp_path / "mcf.json", records))) == 2

    def test_size_counts_what_is_left(self, tmp_path):
        path = write(tmp_path / "mcf.json", [fact(), fact(new="Latin"), fact("Bob"), fact("Cas")])
        assert [edit.subject for edit in load("multi_counterfact", path, size=2)] == ["Ann Example", "Bob"]


def test_counterfact_rs_reads_relation_specific_prompts(tmp_path):
    record = COUNTERFACT | {
        "relation_specific_prompts": ["Ann Example works as a"],
        "relation_specific_relations": ["profession"],
    }
    (edit,) = load("counterfact_rs", write(tmp_path / "rs.json", [record]))
    assert edit.relation_specific_prompts == ("Ann Example works as a",)
    assert edit.relation_specific_relations == ("profession",)


class TestZsre:
    def test_only_the_first_occurrence_of_the_subject_is_the_slot(self, tmp_path):
        (edit,) = load("zsre", write(tmp_path / "zsre.json", [ZSRE]))
        assert edit.prompt == "What was the job of {}, daughter of Ann?"
        assert edit.text == ZSRE["src"]
        assert (edit.target_new, edit.target_true, edit.case_id) == ("river pilot", None, 0)
        assert edit.paraphrase_prompts == ("What did Ann do?",)
        assert edit.neighborhood_prompts == ("nq question: who sang in the old town?",)
        assert edit.neighborhood_targets == ("the choir",)

    def test_options(self, tmp_path):
        path = write(tmp_path / "zsre.json", [ZSRE])
        (edit,) = load("zsre", path, target="alt", answer_prefix="a ", loc_prefix="Q: ", loc_suffix="? A:")
        assert (edit.target_new, edit.target_true) == ("a sailor", "a river pilot")
        assert edit.neighborhood_prompts == ("Q: who sang in the old town? A:",)
        assert edit.neighborhood_targets == ("a the choir",)

    def test_records_without_an_alternative_are_left_out_and_counted(self, tmp_path, caplog):
        path = write(tmp_path / "zsre.json", [ZSRE | {"alt": ""}, ZSRE])
        assert [edit.case_id for edit in load("zsre", path, target="alt")] == [1]
        assert "left out 1 of 2 records that had no alternative answer" in caplog.text

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"answers": []}, "field `answers` is missing"),
            ({"answers": [3]}, "field `answers` must be a list of texts"),
            ({"subject": "Bob"}, "nor the subject 'Bob'"),
            ({"loc": None}, "field `loc` is missing"),
        ],
    )
    def test_unusable_records(self, tmp_path, changes, message):
        with pytest.raises(DataError, match=message):
            load("zsre", write(tmp_path / "zsre.json", [ZSRE | changes]))

    def test_unknown_target(self, tmp_path):
        with pytest.raises(DataError, match="unknown target 'pred'; expected one of answers, alt"):
            load("zsre", write(tmp_path / "zsre.json", [ZSRE]), target="pred")


class TestArguments:
    def test_unknown_name(self):
        with pytest.raises(DataError, match="unknown data set 'cf'; expected one of almanac, counterfact, "):
            load("cf")

    def test_unknown_option(self, tmp_path):
        with pytest.raises(DataError, match="'jsonl' has no option 'target'; it takes none"):
            load("jsonl", tmp_path, target="alt")

    @pytest.mark.parametrize("size", [0, -3])
    def test_size(self, tmp_path, size):
        with pytest.raises(DataError, match=f"size must be at least 1, .* got {size}"):
            load("jsonl", tmp_path, size=size)

    def test_on_bad_record(self, tmp_path):
        with pytest.raises(DataError, match="unknown on_bad_record 'ignore'; expected one of raise, skip"):
            load("jsonl", tmp_path, on_bad_record="ignore")

    @pytest.mark.parametrize(
        ("name", "message"), [("counterfact_rs", "github.com/sunshower-liu/RETS"), ("jsonl", "path")]
    )
    def test_names_without_an_address(self, name, message):
        with pytest.raises(DataError, match=message):
            load(name)

    def test_almanac_takes_no_path(self, tmp_path):
        with pytest.raises(DataError, match="is generated and takes no path"):
            load("almanac", tmp_path)


def test_almanac_hands_its_options_on(monkeypatch):
    asked = {}

    def records(**options):
        asked.update(options)
        return [FLAT]

    monkeypatch.setattr(almanac, "records", records, raising=False)
    assert load("almanac", size=3, facts_per_subject=2, seed=5)[0].text == "Ann is a"
    assert asked == {"n": 3, "facts_per_subject": 2, "seed": 5, "skip_subjects": 0}


class TestInline:
    def test_reads_what_jsonl_reads(self):
        assert inline([FLAT, COUNTERFACT])[0] == Edit("{} is a", "Ann", "pilot")

    def test_names_records_by_number(self):
        with pytest.raises(DataError, match=r"^edits, record 2 of 2: field `subject` is missing"):
            inline([FLAT, {}])

    def test_skips(self):
        assert len(inline([FLAT, {}], on_bad_record="skip")) == 1


class TestReferenceTexts:
    def test_by_relation_and_target(self, tmp_path):
        one = {"relation_id": "P1", "target_id": "Q1", "samples": [{"name": "A", "text": "a"}, {"text": "b"}]}
        path = write(tmp_path / "snippets.json", [one, one | {"target_id": "Q2", "samples": []}])
        assert reference_texts(path) == {"P1": {"Q1": [{"text": "a"}, {"text": "b"}], "Q2": []}}

    def test_none(self):
        assert reference_texts(None) is None

    def test_almanac(self, monkeypatch):
        monkeypatch.setattr(almanac, "reference_texts", lambda: {"r": {"t": []}}, raising=False)
        assert reference_texts("almanac") == {"r": {"t": []}}

    @pytest.mark.parametrize(
        ("record", "message"),
        [
            ({"relation_id": "P1", "target_id": "Q1"}, "record 1 of 1: field `samples` must be a list"),
            ({"relation_id": "P1", "samples": []}, "field `target_id` is missing"),
            ({"relation_id": "P1", "target_id": "Q1", "samples": [{}]}, "field `text` is missing"),
        ],
    )
    def test_bad_records(self, tmp_path, record, message):
        with pytest.raises(DataError, match=message):
            reference_texts(write(tmp_path / "snippets.json", [record]))


def test_every_loader_stands_under_its_own_name():
    assert list(LOADERS) == ["almanac", "counterfact", "multi_counterfact", "counterfact_rs", "zsre", "jsonl"]


@pytest.mark.parametrize("name", ["counterfact", "multi_counterfact", "zsre"])
def test_released_files_have_an_address(name, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "read", lambda source: asked.append(source) or [])
    with pytest.raises(DataError, match="none of 0 records"):
        load(name)
    assert asked[0].startswith("https://")


def test_warnings_go_through_logging_only(tmp_path, caplog, capsys):
    load("jsonl", write_lines(tmp_path / "own.jsonl", FLAT, "{}"), on_bad_record="skip")
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert capsys.readouterr().out == ""
