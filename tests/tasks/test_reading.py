"""Fixed generations, read soundly and as the papers' scripts read them."""

import pytest

from kedit_lightning.tasks.reading import (
    favourable,
    first_tested,
    first_word,
    letter_at_line_end,
    only_word,
    script_counts,
)

TRUTH, NO_YES = ("true", "false"), ("No", "Yes")


@pytest.mark.parametrize(
    ("text", "options", "first", "only"),
    [
        (" True", TRUTH, 0, 0),
        (" false.\nThe", TRUTH, 1, 1),
        ("\n\nIt is true", TRUTH, -1, 0),
        ("true or false", TRUTH, 0, -1),
        ("Untrue", TRUTH, -1, -1),
        (" not yes", NO_YES, -1, 1),
        (" nothing", NO_YES, -1, -1),
        (" NO!", NO_YES, 0, 0),
        (" (B) a club", "ABCD", 1, 1),
        (" a club", "ABCD", -1, -1),  # an article is no letter
        (" B or C", "ABCD", 1, -1),
        ("", TRUTH, -1, -1),
    ],
)
def test_soundly(text, options, first, only):
    assert first_word(text, options) == first
    assert only_word(text, options) == only


@pytest.mark.parametrize(
    ("text", "label", "read"),
    [
        (" True", 0, 0),
        (" True", 1, 0),
        ("Untrue", 0, 0),
        ("false and true", 0, 0),
        ("false and true", 1, 1),
        ("no", 0, -1),
    ],
)
def test_eac_script(text, label, read):
    """A part of a word counts, and where both options stand the right one does."""
    assert favourable(text, TRUTH, label) == read


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (" Yes", 1),
        (" not at all", 0),  # a part of a word
        (" no, yes", 1),  # yes is looked for first
        (" yes\nAnswer: no", 0),  # what follows the last marker counts
        (" maybe", -1),
    ],
)
def test_alphaedit_code(text, read):
    assert first_tested(1, "Answer:")(text, NO_YES, 0) == read


@pytest.mark.parametrize(
    ("text", "read"), [(" B\n", 1), (" B", -1), (" (B)\n", -1), ("D\nA\n", 0), (" grab\n", 1), (" E\n", -1)]
)
def test_alphaedit_mmlu(text, read):
    """The letter needs a line break right after it, a word's last letter will do, and A is looked for first."""
    assert letter_at_line_end(text, "ABCD") == read


def test_eac_script_of_open_questions():
    answers = ["Ann Lee"], ["park"], ["park"], ["red lamp"], ["red lamp"]
    texts = [
        "who? Bob said Ann Lee did",  # a span of two: counts, and from now on only the first words are looked at
        "who? it stood in a park I think",  # a word after the first: not found any more
        "park or not",  # the first word still counts
        "red lamp indeed",  # so does a span from the first word
        "it was a red lamp indeed",  # but not a later one
    ]
    assert script_counts(texts, answers) == [1, 0, 1, 1, 0]


def test_eac_script_counts_an_item_several_times():
    assert script_counts(["see park, park and a park there"], [["park"]]) == [3]


def test_eac_script_finds_the_answer_in_the_passage():
    prompt = "Refer to the passage below. Passage: Ann Lee won. Question: who won?"
    assert script_counts([f"{prompt} Nobody knows"], [["Ann Lee"]]) == [1]
    assert script_counts([f"{prompt} Answer: Nobody knows"], [["Ann Lee"]]) == [0]
