"""Prompts of the papers, and scores of fixed generations."""

import pytest

from kedit_lightning.errors import DataError
from kedit_lightning.tasks import TASKS, Answer

RTE = {"sentence1": "It rains.", "sentence2": "It is wet.", "label": "entailment"}
MMLU = {"question": "Which?", "choices": ["w", "x", "y", "z"], "answer": 2}
NQ = {"question": "who won?", "answer": ["Ann Lee", "Lee"], "output": ["Ann Lee won."]}


@pytest.mark.parametrize(
    ("name", "record", "prompt", "answer", "label"),
    [
        ("rte", RTE, "It rains. entails the It is wet.. True or False? answer:", "true", 0),
        (
            "sst2",
            {"sentence": "fine film", "label": "1"},
            "For each snippet of text,label the sentiment of the text as positive or negative.The answer should be "
            "exact 'positive' or 'negative'. text: fine film answer:",
            "positive",
            1,
        ),
        (
            "nq",
            NQ,
            "Refer to the passage below and answer the following question. Passage: Ann Lee won. Question: who won?",
            "Ann Lee",
            -1,
        ),
        (
            "samsum",
            {"dialogue": "A: Hi\nB: {Hi}", "summary": "They greet."},
            "A: Hi\nB: {Hi}\nTL;DR:",
            "They greet.",
            -1,
        ),
        ("glue_nli", RTE, "It rains. entails the It is wet. True or False? Answer:", "True", 0),
        ("glue_rte", RTE | {"label": 1}, "It rains.\nquestion: It is wet. True or False?\nanswer:", "False", 1),
        ("glue_sst", {"sentence": "fine", "label": 0}, "Review :fine\nSentiment :", "negative", 0),
        (
            "glue_cola",
            {"sentence": "Me go.", "label": 0},
            "Is this sentence linguistically acceptable?\nSentence: Me go.\nAnswer:",
            "No",
            0,
        ),
        (
            "glue_mrpc",
            RTE | {"label": 1},
            "Are the sentences paraphrases of each other.\nSentence 1: It rains.\nSentence 2: It is wet.\nAnswer:",
            "Yes",
            1,
        ),
        ("glue_mmlu", MMLU, "Question: Which?\n(A) w\n(B) x\n(C) y\n(D) z\nAnswer:", "C", 2),
    ],
)
def test_prompts(name, record, prompt, answer, label):
    item = TASKS[name].item(record)
    assert (item.prompt, item.answers[0], item.label) == (prompt, answer, label)
    assert TASKS[name].new_tokens == {"nq": 20, "samsum": 25}.get(name, 5 if name.startswith("glue") else 1)
    assert item.shot == prompt.replace("Review :", "Review : ")


def test_without_a_passage_the_question_is_asked_alone():
    item = TASKS["nq"].item({name: NQ[name] for name in ("question", "answer")})
    assert item.prompt == "Answer the following question. Question: who won?"


def test_legacy_inverts_rte_and_leaves_a_blank_after_cola():
    right, wrong = (TASKS["glue_rte"].item(RTE, legacy=legacy) for legacy in (False, True))
    assert (right.label, right.answers) == (0, ("True",))
    assert (wrong.label, wrong.answers, wrong.prompt) == (1, ("False",), right.prompt)
    assert TASKS["glue_cola"].item({"sentence": "x", "label": 1}, legacy=True).prompt.endswith("\nAnswer: ")
    for name in ("glue_nli", "rte"):
        assert TASKS[name].item(RTE, legacy=True) == TASKS[name].item(RTE)


@pytest.mark.parametrize(
    ("name", "record", "reason"),
    [
        ("rte", RTE | {"label": "neutral"}, "'label' .0 or entailment, 1 or not_entailment., got 'neutral'"),
        ("rte", RTE | {"label": -1}, "got -1"),
        ("rte", {"sentence1": "x", "label": 0}, "field 'sentence2', got no such field"),
        ("rte", RTE | {"sentence2": 7}, "field 'sentence2', got 7"),
        ("nq", NQ | {"answer": []}, "field 'answer', got \\[\\]"),
        ("nq", NQ | {"output": []}, "more entries in the lists of the fields 'output'"),
        (
            "glue_mmlu",
            MMLU | {"choices": ["a", "b"]},
            "more entries in the lists of the fields 'question' and 'choices'",
        ),
        ("glue_mmlu", MMLU | {"answer": 4}, "got 4"),
    ],
)
def test_a_record_that_cannot_be_used(name, record, reason):
    with pytest.raises(DataError, match=reason):
        TASKS[name].item(record)


def answers(name, found, legacy=False):
    return [Answer(TASKS[name].item(record, legacy), text, nll) for record, text, nll in found]


ENTAILED, NOT = RTE, RTE | {"label": 1}
GENERATED = [
    (ENTAILED, " True", (1.0, 2.0)),
    (ENTAILED, " it is true", (2.0, 1.0)),
    (NOT, " False", (3.0, 2.0)),
    (NOT, " untrue, false", (float("nan"), 2.0)),
]


@pytest.mark.parametrize(
    ("scorer", "score"), [("strict", 0.5), ("contains", 1.0), ("likelihood", 0.5), ("legacy", 1.0)]
)
def test_rte(scorer, score):
    measure, numbers = TASKS["rte"].scores(answers("rte", GENERATED), scorer)
    assert measure == f"{scorer}/accuracy"
    assert numbers[measure] == score
    assert numbers["likelihood/invalid"] == 0.25


def test_a_perfect_model_scores_nothing_on_inverted_rte():
    perfect = [(ENTAILED, " True", (1.0, 2.0)), (NOT, " False", (2.0, 1.0))]
    measure, numbers = TASKS["glue_rte"].scores(answers("glue_rte", perfect), "strict")
    assert (measure, numbers[measure], numbers["strict/mcc"]) == ("strict/f1", 1, 1)
    measure, numbers = TASKS["glue_rte"].scores(answers("glue_rte", perfect, legacy=True), "legacy")
    assert (measure, numbers[measure], numbers["legacy/mcc"], numbers["likelihood/f1"]) == ("legacy/f1", 0, -1, 0)


def test_mmlu_in_legacy_needs_a_line_break():
    found = answers(
        "glue_mmlu", [(MMLU, " C", (2.0, 2.0, 1.0, 2.0)), (MMLU | {"answer": "B"}, " B\n", (2.0, 1.0, 3.0, 3.0))]
    )
    for scorer, accuracy in (("strict", 1), ("contains", 1), ("legacy", 0.5), ("likelihood", 1)):
        assert TASKS["glue_mmlu"].scores(found, scorer)[1][f"{scorer}/accuracy"] == accuracy


@pytest.mark.parametrize(
    ("scorer", "measure", "score"),
    [
        ("strict", "strict", 1 / 3),
        ("contains", "contains", 2 / 3),
        ("likelihood", "strict", 1 / 3),
        ("legacy", "legacy", 1),
    ],
)
def test_open_questions(scorer, measure, score):
    """In legacy the passage, which holds the answer, counts as the model's."""
    found = answers("nq", [(NQ, " Lee.", ()), (NQ, " I think it was Ann Lee", ()), (NQ, " Bob", ())])
    name, numbers = TASKS["nq"].scores(found, scorer)
    assert (name, numbers[name]) == (measure, pytest.approx(score))


def test_summaries():
    record = {"dialogue": "A: Hi", "summary": "Ann and Bob greet"}
    found = answers("samsum", [(record, " Ann and Bob greet", ()), (record, " Hi", ())])
    assert TASKS["samsum"].scores(found, "strict") == (
        "rouge",
        {"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5, "rouge": 0.5},
    )
    _, numbers = TASKS["samsum"].scores(found, "legacy")  # " Ann " is left of the first, nothing of the second
    assert numbers["rouge1"] == pytest.approx((2 * 1 * 0.25 / 1.25) / 2)
    assert numbers["rouge2"] == 0


@pytest.mark.parametrize(
    ("text", "rouge"),
    [
        (" Ann and Bob greet<|endoftext|>", 1),  # whole, as it ended by itself
        (" Ann and Bob greet in the train", 1),  # its last words are cut off
        (" So. TL;DR: Ann and Bob greet<|endoftext|>", 1),
        (" A<|endoftext|>", 0),
        ("A<|endoftext|>", 0),
    ],
)
def test_a_summary_in_legacy(text, rouge):
    """What the script keeps of a generation, decoded with its end-of-text token."""
    record = {"dialogue": "A: Hi", "summary": "Ann and Bob greet"}
    _, numbers = TASKS["samsum"].scores(answers("samsum", [(record, text, ())]), "legacy")
    assert numbers["rouge"] == pytest.approx(rouge)
