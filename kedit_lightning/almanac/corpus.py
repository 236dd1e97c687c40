"""The text of the almanac: facts in their training phrasings, short lives, plain sentences and task items."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import TypeVar

from kedit_lightning.almanac import prose
from kedit_lightning.almanac.items import SHARES, TASKS, TaskItem, train_item
from kedit_lightning.almanac.world import Fact, Subject, World

_T = TypeVar("_T")


@dataclass(frozen=True)
class Span:
    """A piece of text with the weight that its tokens have in the training loss.

    A span starts where the tokenizer cuts anyway: at a blank, at punctuation or at the start of the document.
    `name` is whose name the piece is, and `about` of whom it is an object, if it is one.
    """

    text: str
    weight: float
    name: Subject | None = None
    about: Subject | None = None


@dataclass(frozen=True)
class Weights:
    """Weights of the training loss by kind of token.

    Attributes:
        answer: Objects of facts and answers of tasks.
        summary: Words of a summary.
        echo: Words of a list said the second time.
        name: Names of subjects, which cannot be predicted.
        text: All other words.
        prompt: The words of a task item before its answer.
    """

    answer: float = 5.0
    summary: float = 2.0
    echo: float = 3.0
    name: float = 0.2
    text: float = 0.5
    prompt: float = 0.2


@dataclass(frozen=True)
class Mixture:
    """Share of documents by kind, relative to each other, and the order of learning.

    A model that sees all subjects at once learns nothing of them for a long time (the more subjects, the longer), since
    each fact returns too seldom to teach it how to read a name. In training a few subjects come first, and more with
    every round. Copying from the context is learnt late beside facts and at once without them, so reading comes first.

    Attributes:
        facts: Facts of different subjects and plain sentences, mixed.
        lives: Several facts of one subject.
        plain: Plain sentences.
        echoes: A list of words said twice, which teaches looking back.
        tasks: Task items.
        first: Share of the subjects in the first round; 1 for all of them from the start.
        growth: Growth of that share with each round.
        reading: Documents before the first fact: plain sentences, echoes and tasks only.
    """

    facts: float = 0.55
    lives: float = 0.15
    plain: float = 0.05
    echoes: float = 0.04
    tasks: float = 0.21
    first: float = 1.0
    growth: float = 0.03
    reading: int = 0


class Corpus:
    """An endless stream of documents about a world.

    Facts are dealt from a shuffled deck, each in a training phrasing drawn at random, so that the facts of a round are
    stated equally often. Held-out phrasings never occur.

    Args:
        world: The world to write about.
        seed: Seed of the stream.
        weights: Weights of the training loss.
        mixture: Shares of the kinds of document.
    """

    def __init__(
        self, world: World, seed: int = 0, weights: Weights | None = None, mixture: Mixture | None = None
    ) -> None:
        self.world = world
        self.seed = seed
        self.weights = weights or Weights()
        self.mixture = mixture or Mixture()

    def stream(self) -> Iterator[list[Span]]:
        """Documents without end, each a list of spans; the same ones for the same seed."""
        rng = random.Random(self.seed)
        mixture = self.mixture
        people = list(self.world.subjects)
        rng.shuffle(people)
        facts = _deck(rng, [fact for who in people for fact in self.world.facts_of(who)], mixture.first, mixture.growth)
        subjects = _deck(rng, people, mixture.first, mixture.growth)
        shares = (mixture.facts, mixture.lives, mixture.plain, mixture.echoes, mixture.tasks)
        for number in count():
            kind = rng.choices(range(5), shares if number >= mixture.reading else (0.0, 0.0, 0.1, 0.4, 0.5))[0]
            if kind == 0:
                yield self._facts(rng, facts)
            elif kind == 1:
                yield self._life(rng, next(subjects))
            elif kind == 2:
                yield _joined([self._plain(rng) for _ in range(rng.randint(2, 6))])
            elif kind == 3:
                yield self._echo(rng)
            else:
                yield self._task(train_item(rng, rng.choices(TASKS, SHARES)[0]))

    def texts(self, number: int) -> list[str]:
        """The first `number` documents as plain text."""
        stream = self.stream()
        return ["".join(span.text for span in next(stream)) for _ in range(number)]

    def _facts(self, rng: random.Random, facts: Iterator[Fact]) -> list[Span]:
        """One to six sentences, four of five of them facts of different subjects."""
        sentences = []
        for _ in range(rng.randint(1, 6)):
            if rng.random() < 0.8:
                fact = next(facts)
                sentences.append(self._statement(fact, rng.choice(fact.relation.train)))
            else:
                sentences.append(self._plain(rng))
        return _joined(sentences)

    def _life(self, rng: random.Random, subject: Subject) -> list[Span]:
        """Several facts of one subject, who is named in the first sentence only."""
        facts = list(self.world.facts_of(subject))
        rng.shuffle(facts)
        openings = [p for p in facts[0].relation.train if p.startswith("{} ")]
        sentences = [self._statement(facts[0], rng.choice(openings))]
        for fact in facts[1 : rng.randint(3, 5)]:
            lead = follow_up(rng.choice(fact.relation.follow_ups), subject)
            sentences.append([Span(lead, self.weights.text), *self._object(fact)])
        if rng.random() < 0.3:
            sentences.insert(0, self._plain(rng))
        return _joined(sentences)

    def _statement(self, fact: Fact, phrasing: str) -> list[Span]:
        """A fact in one phrasing, split at the name."""
        before, after = phrasing.split("{}")
        who = fact.subject
        spans = [Span(before.rstrip(), self.weights.text)] if before else []
        spans.append(Span(f" {who.name}" if before else who.name, self.weights.name, who))
        if after[:1] == "?":
            spans.append(Span("?", self.weights.text))
            after = after[1:]
        if after:
            spans.append(Span(after, self.weights.text))
        return [*spans, *self._object(fact)]

    def _object(self, fact: Fact) -> list[Span]:
        return [Span(f" {fact.object.name}", self.weights.answer, about=fact.subject), Span(".", self.weights.text)]

    def _plain(self, rng: random.Random) -> list[Span]:
        return [Span(prose.sentence(rng), self.weights.text)]

    def _echo(self, rng: random.Random) -> list[Span]:
        words = " ".join(rng.sample(prose.WORDS, rng.randint(4, 14)))
        first, again = Span(f"Say {words}.", self.weights.prompt), Span(" Again", self.weights.text)
        return [first, again, Span(f" {words}.", self.weights.echo)]

    def _task(self, item: TaskItem) -> list[Span]:
        weight = self.weights.summary if item.task == "summary" else self.weights.answer
        return [Span(item.prompt, self.weights.prompt), Span(f" {item.answer}", weight)]


def follow_up(template: str, subject: Subject) -> str:
    """A follow-up phrasing with the subject's pronouns in place."""
    return template.replace("{They}", subject.they).replace("{Their}", subject.their)


def _joined(sentences: list[list[Span]]) -> list[Span]:
    """Sentences in one line, separated by blanks."""
    spans = list(sentences[0])
    for sentence in sentences[1:]:
        head, *rest = sentence
        spans += [replace(head, text=f" {head.text}"), *rest]
    return spans


def _deck(rng: random.Random, cards: list[_T], first: float, growth: float) -> Iterator[_T]:
    """Cards in random order: a share of them first, and a few more each time those have been dealt."""
    size = first * len(cards)
    while True:
        hand = cards[: max(1, round(size))]
        rng.shuffle(hand)
        yield from hand
        size = min(size * (1 + growth), len(cards))
