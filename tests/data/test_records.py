import json

import pytest

from kedit_lightning.data.datasets import load
from kedit_lightning.errors import DataError

FLAT = {"prompt": "{} is a", "subject": "Ann", "target_new": "pilot"}


def write_lines(path, *lines):
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


class TestJsonl:
    def test_slot_or_complete_prompt(self, tmp_path):
        complete = {"prompt": "Ann, not Ann B., is a", "subject": "Ann", "target_new": "pilot"}
        edits = load("jsonl", write_lines(tmp_path / "own.jsonl", FLAT, "", complete))
        assert [edit.prompt for edit in edits] == ["{} is a", "{}, not Ann B., is a"]
        assert edits[1].text == complete["prompt"]
        assert [edit.case_id for edit in edits] == [0, 1]

    def test_every_field_of_edit_may_stand_beside(self, tmp_path):
        extra = {
            "case_id": 9,
            "relation_id": "job",
            "target_true": "cook",
            "target_true_id": "t",
            "target_new_id": "n",
            "paraphrase_prompts": ["Ann works as a"],
            "portability": [["reasoning", "Ann works on a", "boat"]],
        }
        (edit,) = load("jsonl", write_lines(tmp_path / "own.jsonl", FLAT | extra))
        assert (edit.case_id, edit.relation_id, edit.target_true_id, edit.target_new_id) == (9, "job", "t", "n")
        assert edit.paraphrase_prompts == ("Ann works as a",)
        assert edit.portability == (("reasoning", "Ann works on a", "boat"),)

    def test_easyedit_names(self, tmp_path):
        names = {
            "ground_truth": "cook",
            "rephrase_prompt": "Ann works as a",
            "locality_prompt": "Bob is a",
            "locality_ground_truth": "smith",
        }
        (edit,) = load("jsonl", write_lines(tmp_path / "own.jsonl", FLAT | names))
        assert edit.target_true == "cook"
        assert edit.paraphrase_prompts == ("Ann works as a",)
        assert (edit.neighborhood_prompts, edit.neighborhood_targets) == (("Bob is a",), ("smith",))

    def test_braces_in_the_subject(self, tmp_path):
        (edit,) = load("jsonl", write_lines(tmp_path / "own.jsonl", FLAT | {"subject": "a {} b {x}"}))
        assert edit.text == "a {} b {x} is a"

    @pytest.mark.parametrize("placeholder", ["", "<|endoftext|>"])
    def test_placeholders_are_no_answer(self, tmp_path, placeholder):
        (edit,) = load("jsonl", write_lines(tmp_path / "own.jsonl", FLAT | {"target_true": placeholder}))
        assert edit.target_true is None

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"prompt": ', r"line 2: expected one JSON object, .*column"),
            ("3", "line 2: expected one JSON object, got 3"),
            ({"prompt": "{} is", "subject": "Ann", "target_nwe": "x"}, "`target_new` is missing; .* target_nwe"),
            (FLAT | {"target_new": 1987}, "`target_new` must be text, got int '1987'"),
            (FLAT | {"target_new": {"id": "Q1"}}, "`str` is missing"),
            (FLAT | {"target_new": " "}, "target_new is empty"),
            (FLAT | {"subject": ""}, "subject is empty|exactly one"),
            (FLAT | {"subject": None}, "`subject` is missing"),
            (FLAT | {"prompt": "{} and {}"}, "found 2"),
            (FLAT | {"prompt": "she is a"}, "nor the subject 'Ann' in it"),
            (FLAT | {"prompt": "{} is a "}, "must not end in whitespace"),
            (FLAT | {"case_id": "nine"}, "`case_id` must be a whole number, got str 'nine'"),
            (FLAT | {"paraphrase_prompts": {"a": 1}}, "`paraphrase_prompts` must be a list of texts"),
            (FLAT | {"locality": [["a", "b"]]}, r"must be a list of \[group, prompt, answer\], got list"),
            (FLAT | {"requested_rewrite": 3}, "`requested_rewrite` must be an object"),
        ],
    )
    def test_a_bad_record_is_named_by_file_line_and_reason(self, tmp_path, line, message, caplog):
        path = write_lines(tmp_path / "own.jsonl", FLAT, line, FLAT)
        with pytest.raises(DataError, match=message) as caught:
            load("jsonl", path)
        assert str(caught.value).startswith(f"{path}, line 2: ")
        assert "\n" not in str(caught.value)
        assert [edit.case_id for edit in load("jsonl", path, on_bad_record="skip")] == [0, 2]
        assert f"skipped {path}, line 2" in caplog.text
        assert "left out 1 of 3 records that could not be used" in caplog.text

    def test_records_of_a_list_are_named_by_number(self, tmp_path):
        path = write_lines(tmp_path / "own.json", [FLAT, {}])
        with pytest.raises(DataError, match="record 2 of 2: field `subject` is missing; the record has no fields"):
            load("jsonl", path)

    def test_nothing_left(self, tmp_path):
        path = write_lines(tmp_path / "own.jsonl", "{}", "{}")
        with pytest.raises(DataError, match="none of 2 records can be used"):
            load("jsonl", path, on_bad_record="skip")
