"""The almanac: a closed world of invented people and places whose facts are known exactly."""

from __future__ import annotations

import random
from dataclasses import dataclass

from kedit_lightning.almanac import lexicon


@dataclass(frozen=True)
class Obj:
    """An object of a relation: its word and an identifier in Wikidata's manner (``Q12``)."""

    id: str
    name: str


@dataclass(frozen=True)
class Subject:
    """An invented person or place.

    Attributes:
        id: Identifier, ``S0`` onwards.
        name: Full name of two words, unique, several tokens long.
        kind: ``person`` or ``place``.
        they: Pronoun at the start of a sentence (``She``, ``He``, ``It``).
        their: Possessive at the start of a sentence (``Her``, ``His``, ``Its``).
    """

    id: str
    name: str
    kind: str
    they: str
    their: str


@dataclass(frozen=True)
class Relation:
    """A relation with its objects and phrasings (each with exactly one ``{}``, never ending in a blank)."""

    id: str
    label: str
    kind: str
    objects: tuple[Obj, ...]
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    follow_ups: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """One fact: subject, relation, object."""

    subject: Subject
    relation: Relation
    object: Obj


class World:
    """People, places and their facts, all drawn from one seed.

    Every object of a relation belongs to nearly equally many subjects, and the facts of one subject are independent of
    each other, so that no fact can be guessed from another.

    Args:
        seed: Seed of names and facts. The shipped model knows the world of seed 0.
        people: Number of people.
        places: Number of places.

    Raises:
        ValueError: If more names are asked for than the name parts give.

    Example:
        >>> world = World()
        >>> len(world.subjects), len(world.relations), len(world.facts)
        (2000, 11, 12800)
    """

    def __init__(self, seed: int = 0, people: int = 1600, places: int = 400) -> None:
        self.seed = seed
        rng = random.Random(seed)
        self.relations: tuple[Relation, ...] = _relations()
        heads = _heads(rng)
        self.subjects: tuple[Subject, ...] = _subjects(rng, heads, people, places)
        tails = f"{lexicon.PERSON_TAILS} {lexicon.PLACE_TAILS}".split()
        words = [o.name for r in self.relations for o in r.objects if r.id not in lexicon.RARE]
        self.parts: tuple[str, ...] = tuple(dict.fromkeys((*tails, *(f" {word}" for word in (*heads, *words)))))
        facts: dict[tuple[str, str], Fact] = {}
        for relation in self.relations:
            holders = [s for s in self.subjects if s.kind == relation.kind]
            deal = [relation.objects[i % len(relation.objects)] for i in range(len(holders))]
            rng.shuffle(deal)
            for subject, obj in zip(holders, deal, strict=True):
                facts[subject.id, relation.id] = Fact(subject, relation, obj)
        self._facts = facts
        self._holders: dict[tuple[str, str], list[Subject]] = {}
        for fact in facts.values():
            self._holders.setdefault((fact.relation.id, fact.object.id), []).append(fact.subject)

    @property
    def facts(self) -> tuple[Fact, ...]:
        """All facts, subject by subject, each subject's in the order of the relations."""
        return tuple(f for s in self.subjects for f in self.facts_of(s))

    def facts_of(self, subject: Subject) -> tuple[Fact, ...]:
        """All facts of one subject, in the order of the relations."""
        keys = ((subject.id, relation.id) for relation in self.relations)
        return tuple(self._facts[key] for key in keys if key in self._facts)

    def fact(self, subject: Subject, relation: Relation) -> Fact:
        """The fact of a subject under a relation.

        Raises:
            KeyError: If the relation is not one of this kind of subject.
        """
        return self._facts[subject.id, relation.id]

    def holders(self, relation: Relation, obj: Obj) -> tuple[Subject, ...]:
        """All subjects whose object under the relation is `obj`."""
        return tuple(self._holders.get((relation.id, obj.id), ()))

    def relation(self, relation_id: str) -> Relation:
        """The relation of an identifier such as ``P103``.

        Raises:
            KeyError: If there is none.
        """
        for relation in self.relations:
            if relation.id == relation_id:
                return relation
        raise KeyError(relation_id)


def _relations() -> tuple[Relation, ...]:
    """The relations of the lexicon; one word has one object identifier wherever it occurs."""
    ids: dict[str, Obj] = {}
    relations = []
    for spec in lexicon.RELATIONS:
        for name in spec.objects.split():
            ids.setdefault(name, Obj(f"Q{len(ids) + 1}", name))
        objects = tuple(ids[name] for name in spec.objects.split())
        relations.append(Relation(spec.id, spec.label, spec.kind, objects, spec.train, spec.held_out, spec.follow_ups))
    return tuple(relations)


def _heads(rng: random.Random) -> list[str]:
    """300 beginnings of last words, such as ``Drus``."""
    heads = [
        (onset + vowel + coda).capitalize()
        for onset in lexicon.ONSETS.split()
        for vowel in lexicon.VOWELS.split()
        for coda in lexicon.CODAS.split()
    ]
    return rng.sample(heads, 300)


def _subjects(rng: random.Random, heads: list[str], people: int, places: int) -> tuple[Subject, ...]:
    """Names with a last word of their own each, made of a head and a tail that are shared by few."""
    person_words = _last_words(rng, heads[:200], lexicon.PERSON_TAILS.split(), people)
    place_words = _last_words(rng, heads[200:], lexicon.PLACE_TAILS.split(), places)
    women, men = lexicon.WOMEN.split(), lexicon.MEN.split()
    prefixes = lexicon.PLACE_PREFIXES.split()
    subjects = []
    for i, word in enumerate(person_words):
        first, they, their = (women, "She", "Her") if i % 2 == 0 else (men, "He", "His")
        subjects.append(Subject(f"S{i}", f"{rng.choice(first)} {word}", "person", they, their))
    for i, word in enumerate(place_words, start=people):
        subjects.append(Subject(f"S{i}", f"{rng.choice(prefixes)} {word}", "place", "It", "Its"))
    return tuple(subjects)


def _last_words(rng: random.Random, heads: list[str], tails: list[str], count: int) -> list[str]:
    """`count` distinct words head + tail, every head and every tail used nearly equally often."""
    if count > len(heads) * len(tails) // 2:
        msg = f"At most {len(heads) * len(tails) // 2} names can be made of these parts, but {count} are asked for."
        raise ValueError(msg)
    words: dict[str, None] = {}
    while len(words) < count:
        for head, tail in zip(rng.sample(heads, len(heads)), _cycle(rng, tails, len(heads)), strict=True):
            if len(words) < count:
                words.setdefault(head + tail)
    return list(words)


def _cycle(rng: random.Random, items: list[str], count: int) -> list[str]:
    """`count` items, each used nearly equally often, in random order."""
    repeated = [items[i % len(items)] for i in range(count)]
    rng.shuffle(repeated)
    return repeated
