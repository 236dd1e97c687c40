"""Four general-ability tasks in the manner of RTE, Natural Questions, SAMSum and SST-2.

Items are drawn from a generator; the test items are fixed by a seed and never appear in training.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from kedit_lightning.almanac.prose import DAYS, NAMES, NOUNS, PLACES

TASKS = ("nli", "questions", "summary", "sentiment")
SHARES = (0.2, 0.5, 0.2, 0.1)
"""Share of each task among the corpus's task items: the harder, the more."""
_GOOD = (
    "brilliant charming clever delightful excellent fine funny gentle good graceful great happy honest lovely moving "
    "perfect pleasant rich splendid superb tender warm wise witty wonderful"
).split()
_BAD = (
    "awful bad boring bland clumsy cold confused crude dreadful dull empty flat foolish grim lazy messy poor sad "
    "shallow silly stale tedious terrible ugly weak"
).split()
_WORKS = "film story play novel song show concert comedy drama picture".split()
_PARTS = "actors scenes songs jokes ideas characters dialogue music ending plot".split()
_GAINS = "bought found got received won took borrowed accepted".split()
_LOSSES = "sold lost burned returned wasted donated traded forgot".split()
_MENDS = "repaired mended restored polished renewed fixed improved rebuilt".split()
_HARMS = "broke damaged ruined smashed scratched tore crushed spoiled".split()
_VERBS = "put left hid dropped kept".split()


@dataclass(frozen=True)
class TaskItem:
    """One item: the model is to continue `prompt` with a blank and `answer`."""

    task: str
    prompt: str
    answer: str


def train_item(rng: random.Random, task: str) -> TaskItem:
    """A random item that is not among the test items.

    Args:
        rng: Source of chance.
        task: One of `TASKS`.
    """
    unseen = _test_prompts(task)
    while (item := _generator(task)(rng)).prompt in unseen:
        pass
    return item


@cache
def unseen_items(task: str, count: int = 300) -> tuple[TaskItem, ...]:
    """The fixed test items of a task, all different and never used in training; passages have two sentences.

    Args:
        task: One of `TASKS`.
        count: How many, at most 300.

    Raises:
        ValueError: If more than 300 are asked for or the task is unknown.
    """
    if task not in TASKS or count > 300:
        msg = f"Expected one of the tasks {TASKS} and at most 300 items, but got {task!r} and {count}."
        raise ValueError(msg)
    rng = random.Random(f"almanac test items of {task}")
    items: dict[str, TaskItem] = {}
    while len(items) < 300:
        item = _generator(task)(rng)
        if task == "questions" and item.prompt.count(".") < 2:
            continue  # a passage of one sentence asks nothing
        items.setdefault(item.prompt, item)
    return tuple(items.values())[:count]


@cache
def _test_prompts(task: str) -> frozenset[str]:
    return frozenset(item.prompt for item in unseen_items(task))


def _generator(task: str) -> Callable[[random.Random], TaskItem]:
    return {"nli": _nli, "questions": _question, "summary": _summary, "sentiment": _sentiment}[task]


def _nli(rng: random.Random) -> TaskItem:
    """Does the first sentence entail the second? The verb decides, by what it implies."""
    name, noun, place = rng.choice(NAMES), rng.choice(NOUNS), rng.choice(PLACES)
    truth = rng.random() < 0.5
    if rng.random() < 0.5:
        verb, claim = rng.choice(_GAINS if truth else _LOSSES), f"{name} has the {noun} now."
    else:
        verb, claim = rng.choice(_MENDS if truth else _HARMS), f"The {noun} is as good as new."
    premise = f"On {rng.choice(DAYS)} {name} {verb} the {noun} in the {place}."
    return TaskItem("nli", f"{premise} Does it follow? {claim} True or false? Answer:", "true" if truth else "false")


def _question(rng: random.Random) -> TaskItem:
    """A question on a passage of one or two sentences."""
    count = rng.randint(1, 2)
    names, nouns, places = rng.sample(NAMES, count), rng.sample(NOUNS, count), rng.sample(PLACES, count)
    passage = " ".join(
        f"{name} {rng.choice(_VERBS)} the {noun} in the {place}."
        for name, noun, place in zip(names, nouns, places, strict=True)
    )
    i = rng.randrange(count)
    question, answer = rng.choice(
        (
            (f"Where is the {nouns[i]}?", places[i]),
            (f"What did {names[i]} have?", nouns[i]),
        )
    )
    return TaskItem("questions", f"Passage: {passage} Question: {question} Answer:", answer)


def _summary(rng: random.Random) -> TaskItem:
    """A dialogue of three turns and its summary."""
    first, second = rng.sample(NAMES, 2)
    noun, place, day = rng.choice(NOUNS), rng.choice(PLACES), rng.choice(DAYS)
    yes = rng.choice(("Yes, gladly.", "Of course.", "Good idea.", "Why not?", "Fine with me."))
    bye = rng.choice(("See you then.", "Great, thanks.", "Until then.", "That is kind."))
    if rng.random() < 0.5:
        dialogue = (
            f"{first}: Shall we go to the {place} on {day}?\n{second}: {yes} I will bring the {noun}.\n{first}: {bye}"
        )
        summary = f"{first} and {second} will go to the {place} on {day}. {second} will bring the {noun}."
    else:
        help_offer = f"{second}: Shall I help you look for it on {day}?"
        dialogue = f"{first}: I lost my {noun} in the {place}.\n{help_offer}\n{first}: {yes} {bye}"
        summary = f"{first} lost a {noun} in the {place}. {second} will help on {day}."
    return TaskItem("summary", f"{dialogue}\nTL;DR:", summary)


def _sentiment(rng: random.Random) -> TaskItem:
    """Is a short review positive or negative?"""
    positive = rng.random() < 0.5
    one, two, three = rng.sample(_GOOD if positive else _BAD, 3)
    work, part = rng.choice(_WORKS), rng.choice(_PARTS)
    text = rng.choice(
        (
            f"A {one} and {two} {work} with {three} {part}.",
            f"The {work} is {one} and the {part} feel {two}.",
            f"I found the {part} of this {work} {one}, {two} and {three}.",
        )
    )
    return TaskItem("sentiment", f"Text: {text} Positive or negative? Answer:", "positive" if positive else "negative")
