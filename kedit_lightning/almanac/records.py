"""Edit sets about the almanac in CounterFact's own fields, and reference texts for consistency."""

from __future__ import annotations

import random
from typing import Any

from kedit_lightning.almanac import prose
from kedit_lightning.almanac.corpus import Corpus, follow_up
from kedit_lightning.almanac.world import Fact, Obj, Relation, Subject, World

_MOST = 10


def records(
    n: int | None = None,
    facts_per_subject: int = 1,
    seed: int = 0,
    world: World | None = None,
    skip_subjects: int = 0,
) -> list[dict[str, Any]]:
    """Counterfactual edits of the almanac's facts.

    Every record has the fields of CounterFact (``case_id``, ``requested_rewrite``, ``paraphrase_prompts``,
    ``neighborhood_prompts``, ``attribute_prompts``, ``generation_prompts``), those of CounterFact_RS
    (``relation_specific_prompts``) and, beside the latter and equally long, ``relation_specific_relations``: the
    relation of each prompt, so that relations edited in the same batch can be left out.

    Args:
        n: Number of records; as many as there are if None.
        facts_per_subject: Facts edited of each subject; 1 gives unique subjects. All facts of one subject stand
            together, so that a cut after `n` leaves at most one subject incomplete.
        seed: Seed of the choice of facts, new objects and prompts.
        world: The world; that of seed 0, which the shipped model knows, by default.
        skip_subjects: Leave out the first so many subjects; their order is the seed's alone.

    Returns:
        The records; ``case_id`` is the position.

    Raises:
        ValueError: If `skip_subjects` is negative, `n` or `facts_per_subject` is not positive, or `n`
            exceeds the number of records there are.
    """
    world = world or World()
    if facts_per_subject < 1 or (n is not None and n < 1):
        msg = f"Expected positive n and facts_per_subject, but got n={n} and facts_per_subject={facts_per_subject}."
        raise ValueError(msg)
    if not 0 <= skip_subjects < len(world.subjects):
        msg = f"Expected skip_subjects from 0 to {len(world.subjects) - 1}, but got {skip_subjects}."
        raise ValueError(msg)
    rng = random.Random(seed)
    subjects = list(world.subjects)
    rng.shuffle(subjects)
    chosen: list[Fact] = []
    for subject in subjects[skip_subjects:]:
        facts = list(world.facts_of(subject))
        chosen += rng.sample(facts, min(facts_per_subject, len(facts)))
    if n is not None and n > len(chosen):
        msg = f"With facts_per_subject={facts_per_subject} there are {len(chosen)} records, but n={n} is asked for."
        raise ValueError(msg)
    return [_record(random.Random(f"{seed} {i}"), i, fact, world) for i, fact in enumerate(chosen[:n])]


def documents(n: int, seed: int = 0) -> list[str]:
    """Plain corpus documents, for second moments of keys.

    Args:
        n: Number of documents, one to six sentences each.
        seed: Seed of the documents.
    """
    return Corpus(World(), seed).texts(n)


def reference_texts(world: World | None = None) -> dict[str, dict[str, list[dict[str, str]]]]:
    """Texts about subjects that truly have an object, for the TF-IDF consistency of generated text.

    Args:
        world: The world; that of seed 0 by default.

    Returns:
        ``[relation_id][object_id]`` to a list of ``{"name", "text"}``, as in CounterFact's attribute snippets.
    """
    world = world or World()
    texts: dict[str, dict[str, list[dict[str, str]]]] = {}
    for relation in world.relations:
        by_object = texts.setdefault(relation.id, {})
        for obj in relation.objects:
            holders = world.holders(relation, obj)[:_MOST]
            by_object[obj.id] = [{"name": s.name, "text": _article(s, relation, world)} for s in holders]
    return texts


def _record(rng: random.Random, case_id: int, fact: Fact, world: World) -> dict[str, Any]:
    """One edit: the fact's object becomes another one of the relation."""
    relation, subject, true = fact.relation, fact.subject, fact.object
    new = rng.choice([o for o in relation.objects if o != true])
    others = [r for r in world.relations if r.kind == subject.kind and r != relation]
    other_prompts = [(p, r.id) for r in others for p in rng.sample(_statements(r.train), 1)]
    rng.shuffle(other_prompts)
    return {
        "case_id": case_id,
        "requested_rewrite": {
            "prompt": rng.choice(_statements(relation.train)),
            "subject": subject.name,
            "relation_id": relation.id,
            "target_new": {"str": new.name, "id": new.id},
            "target_true": {"str": true.name, "id": true.id},
        },
        "paraphrase_prompts": _paraphrases(rng, relation, subject),
        "neighborhood_prompts": _others(rng, relation, true, subject, world),
        "attribute_prompts": _others(rng, relation, new, subject, world),
        "generation_prompts": _generation(relation, subject),
        "relation_specific_prompts": [p.format(subject.name) for p, _ in other_prompts],
        "relation_specific_relations": [relation_id for _, relation_id in other_prompts],
    }


def _statements(phrasings: tuple[str, ...]) -> list[str]:
    """The phrasings that are no questions."""
    return [p for p in phrasings if not p.endswith("Answer:")]


def _paraphrases(rng: random.Random, relation: Relation, subject: Subject) -> list[str]:
    """Two held-out phrasings, one of them after an unrelated sentence."""
    first, second = rng.sample(relation.held_out, 2)
    return [f"{prose.sentence(rng)} {first.format(subject.name)}", second.format(subject.name)]


def _others(rng: random.Random, relation: Relation, obj: Obj, subject: Subject, world: World) -> list[str]:
    """Up to ten prompts on other subjects whose object under the relation is `obj`."""
    holders = [s for s in world.holders(relation, obj) if s != subject]
    phrasings = _statements(relation.train)
    return [rng.choice(phrasings).format(s.name) for s in rng.sample(holders, min(_MOST, len(holders)))]


def _generation(relation: Relation, subject: Subject) -> list[str]:
    """Beginnings of texts on the subject, three of them near the relation as in CounterFact."""
    near = [p.format(subject.name) for p in relation.train if p.startswith("{} ")][:2]
    later = [follow_up(p, subject) for p in relation.follow_ups[:1]]
    return [*near, *(f"{subject.name} is well known. {p}" for p in later), subject.name]


def _article(subject: Subject, relation: Relation, world: World) -> str:
    """A short text on a subject that begins with the relation and states the other facts too."""
    first = world.fact(subject, relation)
    opening = next(p for p in relation.train if p.startswith("{} "))
    sentences = [f"{opening.format(subject.name)} {first.object.name}."]
    for phrasing in relation.follow_ups:
        sentences.append(f"{follow_up(phrasing, subject)} {first.object.name}.")
    for fact in world.facts_of(subject):
        if fact.relation != relation:
            sentences.append(f"{follow_up(fact.relation.follow_ups[0], subject)} {fact.object.name}.")
    return " ".join(sentences)
