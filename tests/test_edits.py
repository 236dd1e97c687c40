import json

import pytest

from kedit_lightning.data.records import edit_from_record
from kedit_lightning.edits import Edit, Site, Token
from kedit_lightning.errors import DataError, KeditError

FULL = Edit(
    prompt="The mother tongue of {} is",
    subject="Ann Example",
    target_new="Dutch",
    target_true="Greek",
    case_id=7,
    relation_id="P103",
    target_new_id="Q1",
    target_true_id="Q2",
    paraphrase_prompts=("Ann Example grew up speaking",),
    neighborhood_prompts=("Bob Other speaks", "Cas Third speaks"),
    neighborhood_targets=("Greek", "Latin"),
    attribute_prompts=("Dee Fourth speaks",),
    generation_prompts=("Ann Example lives in",),
    relation_specific_prompts=("Ann Example works as a",),
    relation_specific_relations=("profession",),
    portability=(("reasoning", "The country of Ann Example's mother tongue is", "Belgium"),),
    locality=(("forgetting", "Ann Example was born in", "Athens"),),
)


def test_text_fills_the_slot():
    assert FULL.text == "The mother tongue of Ann Example is"


def test_text_leaves_braces_of_the_subject_alone():
    assert Edit("{} was written by", "The {} Operator {0}", "Ann").text == "The {} Operator {0} was written by"


def test_fill_puts_prompt_and_subject_into_the_template():
    assert FULL.fill("It rained. {}") == "It rained. The mother tongue of Ann Example is"
    assert Edit("{} is", "a {} b", "c").fill("x {}") == "x a {} b is"


@pytest.mark.parametrize("template", ["no slot", "{} and {}"])
def test_fill_refuses_templates_without_exactly_one_slot(template):
    with pytest.raises(DataError, match=r"template must hold exactly one \{\}"):
        FULL.fill(template)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "no slot"}, r"exactly one \{\} .* found 0"),
        ({"prompt": "{} and {} are"}, r"exactly one \{\} .* found 2"),
        ({"prompt": "{} is "}, "must not end in whitespace"),
        ({"prompt": "the town of {}", "subject": "Ann "}, "must not end in whitespace"),
        ({"subject": "  "}, "subject is empty"),
        ({"target_new": " "}, "target_new is empty"),
        ({"target_new": " Dutch"}, "must not begin or end in whitespace"),
        ({"neighborhood_prompts": ("a", "b"), "neighborhood_targets": ("c",)}, r"as long as .* \(2\), got 1"),
        ({"relation_specific_relations": ("c",)}, r"as long as relation_specific_prompts \(0\), got 1"),
    ],
)
def test_unusable_edits_are_refused_in_one_line(changes, message):
    with pytest.raises(DataError, match=message) as caught:
        Edit(**{"prompt": "{} is", "subject": "Ann", "target_new": "Dutch"} | changes)
    assert isinstance(caught.value, KeditError)
    assert "\n" not in str(caught.value)


def test_record_survives_json_and_comes_back_equal():
    assert edit_from_record(json.loads(json.dumps(FULL.as_record()))) == FULL


def test_record_of_a_bare_edit_holds_nothing_empty():
    assert Edit("{} is", "Ann", "Dutch", case_id=3).as_record() == {
        "case_id": 3,
        "requested_rewrite": {
            "prompt": "{} is",
            "relation_id": None,
            "subject": "Ann",
            "target_new": {"str": "Dutch", "id": None},
        },
    }


def test_edits_and_sites_can_be_keys():
    assert len({FULL, FULL, Site(3), Site(3, "mlp"), Site(3, "attn")}) == 3


def test_tokens_carry_the_fields_names():
    assert [str(token) for token in Token] == ["subject_last", "last", "subject_first", "subject_first_after_last"]


def test_data_error_names_file_and_record():
    error = DataError("is empty", file="facts.json", record="line 3")
    assert str(error) == "facts.json, line 3: is empty"
    assert (error.reason, str(error.file), error.record) == ("is empty", "facts.json", "line 3")
