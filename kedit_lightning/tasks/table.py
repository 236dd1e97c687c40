"""The tasks: the almanac's own, those of EAC, and GLUE and MMLU as AlphaEdit runs them.

Prompts and their quirks are those of the released codes (spec: EAC arXiv 2502.11177 and the task files of
Model-Editing-Hurt; AlphaEdit arXiv 2410.02355, `glue_eval`). Data sets name the public originals of their files.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

from kedit_lightning.tasks.reading import favourable, first_tested, letter_at_line_end
from kedit_lightning.tasks.task import Cloze, Question, Summarisation, Task

AlmanacName = Literal["nli", "questions", "summary", "sentiment"]
EACName = Literal["rte", "nq", "samsum", "sst2"]
GlueName = Literal["glue_nli", "glue_sst", "glue_cola", "glue_rte", "glue_mmlu", "glue_mrpc"]
PERPLEXITY = "perplexity"
TaskName = Literal[AlmanacName, EACName, GlueName, "perplexity"]

ALMANAC: tuple[TaskName, ...] = (*get_args(AlmanacName), "perplexity")

_TRUTH, _FEELING, _ENTAILS = ("true", "false"), ("negative", "positive"), ("entailment", "not_entailment")
_EAC_SST = (
    "For each snippet of text,label the sentiment of the text as positive or negative."
    "The answer should be exact 'positive' or 'negative'. text: {sentence} answer:"
)
_PASSAGE = "Refer to the passage below and answer the following question. Passage: {output[0]} Question: {question}"
_COLA = "Is this sentence linguistically acceptable?\nSentence: {sentence}\nAnswer:"
_RTE = "{sentence1}\nquestion: {sentence2} True or False?\nanswer:"
_NLI = "{sentence1} entails the {sentence2} True or False? Answer:"
_MRPC = "Are the sentences paraphrases of each other.\nSentence 1: {sentence1}\nSentence 2: {sentence2}\nAnswer:"
_LETTERS = "".join(f"\n({letter}) {{choices[{i}]}}" for i, letter in enumerate("ABCD"))
_MMLU = f"Question: {{question}}{_LETTERS}\nAnswer:"


def _glue(
    source: str, template: str, says: tuple[str, ...], classes: tuple[str, ...], first: int = 1, **rest: object
) -> Cloze:
    """A task as AlphaEdit runs it: 5 new tokens, the first 10 records kept for examples, weighted F1."""
    settings = {
        "field": "label",
        "new_tokens": 5,
        "reserved": 10,
        "measure": "f1",
        "balanced": True,
        "script": first_tested(first, template.rpartition("\n")[2]),
        **rest,
    }
    return Cloze(source, template, says=says, classes=classes, **settings)  # type: ignore[arg-type]


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "nli": Cloze("almanac:nli", "{prompt}", "answer", 1, says=_TRUTH, classes=_TRUTH),
        "questions": Question("almanac:questions", "{prompt}", "answer", 6),
        "summary": Summarisation("almanac:summary", "{prompt}", "answer", 40),
        "sentiment": Cloze("almanac:sentiment", "{prompt}", "answer", 1, says=_FEELING, classes=_FEELING),
        # EAC
        "rte": Cloze(
            "nyu-mll/glue:rte:train",
            "{sentence1} entails the {sentence2}. True or False? answer:",
            "label",
            1,
            says=_TRUTH,
            classes=_ENTAILS,
            script=favourable,
        ),
        "nq": Question(
            "google-research-datasets/nq_open:nq_open:validation",
            _PASSAGE,
            "answer",
            20,
            otherwise="Answer the following question. Question: {question}",
        ),
        "samsum": Summarisation("knkarthick/samsum", "{dialogue}\nTL;DR:", "summary", 25),
        "sst2": Cloze(
            "nyu-mll/glue:sst2:validation", _EAC_SST, "label", 1, says=_FEELING, classes=_FEELING, script=favourable
        ),
        # AlphaEdit
        "glue_nli": _glue(
            "nyu-mll/glue:rte:train",
            _NLI,
            ("True", "False"),
            _ENTAILS,
            0,
            balanced=False,
            script=first_tested(0, "True or False? Answer:"),
        ),
        "glue_sst": _glue(
            "nyu-mll/glue:sst2:validation",
            "Review :{sentence}\nSentiment :",
            _FEELING,
            _FEELING,
            shot="Review : {sentence}\nSentiment :",
        ),
        "glue_cola": _glue(
            "nyu-mll/glue:cola:validation", _COLA, ("No", "Yes"), ("unacceptable", "acceptable"), tail=" "
        ),
        "glue_rte": _glue("nyu-mll/glue:rte:validation", _RTE, ("True", "False"), _ENTAILS, inverted=True),
        "glue_mmlu": _glue(
            "cais/mmlu:all:validation",
            _MMLU,
            ("A", "B", "C", "D"),
            ("A", "B", "C", "D"),
            field="answer",
            script=letter_at_line_end,
        ),
        "glue_mrpc": _glue("nyu-mll/glue:mrpc:validation", _MRPC, ("No", "Yes"), ("not_equivalent", "equivalent")),
    }
)
"""All tasks but perplexity, by name."""
