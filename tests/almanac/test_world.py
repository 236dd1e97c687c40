"""The world and its corpus: sizes, determinism, and what must never be in the text."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from kedit_lightning.almanac import World
from kedit_lightning.almanac.corpus import Corpus, Mixture
from kedit_lightning.almanac.items import TASKS, unseen_items


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def texts(world: World) -> list[str]:
    return Corpus(world).texts(12_000)


def test_sizes(world: World) -> None:
    assert len(world.subjects) >= 2000
    assert len({s.name for s in world.subjects}) == len(world.subjects)
    assert len({s.name.split()[-1] for s in world.subjects}) == len(world.subjects)
    assert len(world.relations) >= 8
    assert len(world.facts) >= 10_000
    for relation in world.relations:
        assert 20 <= len(relation.objects) <= 40
        assert len(relation.train) >= 4
        assert len(relation.held_out) >= 2
        assert min(len(world.holders(relation, obj)) for obj in relation.objects) > 10


def test_phrasings_are_left_contexts(world: World) -> None:
    phrasings = [p for r in world.relations for p in (*r.train, *r.held_out)]
    assert len(set(phrasings)) == len(phrasings)
    assert all(p.count("{}") == 1 and not p.endswith(" ") for p in phrasings)
    assert any(p.endswith("{}") for p in phrasings)
    assert any("?" in p for p in phrasings)


def test_no_training_phrasing_continues_another(world: World) -> None:
    for relation in world.relations:
        for p in (*relation.train, *relation.held_out):
            longer = [q for r in world.relations for q in (*r.train, *r.follow_ups) if q.startswith(f"{p} ")]
            assert not longer or p.endswith("{}")


def test_same_seed_same_world(world: World) -> None:
    again, other = World(), World(seed=1, people=40, places=10)
    assert again.facts == world.facts
    assert other.subjects[0] != world.subjects[0]
    assert Corpus(again, seed=3).texts(50) == Corpus(world, seed=3).texts(50)
    assert Corpus(again, seed=3).texts(50) != Corpus(world, seed=4).texts(50)


def test_too_many_names() -> None:
    with pytest.raises(ValueError, match="names can be made"):
        World(people=100_000)


def test_facts_are_stated_evenly(world: World, texts: list[str]) -> None:
    text = " ".join(texts)
    counts = Counter(word for word in text.replace("?", " ").replace(".", " ").split())
    seen = [counts[s.name.split()[-1]] for s in world.subjects if s.kind == "person"]
    assert min(seen) > 0
    assert max(seen) < 10 * min(seen)


def test_curriculum_starts_with_few_subjects(world: World) -> None:
    names = {s.name for s in world.subjects}
    counts = []
    for first in (0.05, 1.0):
        text = " ".join(Corpus(world, mixture=Mixture(first=first)).texts(1000))
        counts.append(sum(name in text for name in names))
    assert counts[0] < 200 < 1000 < counts[1]


def test_held_out_phrasings_never_occur(world: World, texts: list[str]) -> None:
    last_words = {s.name.split()[-1] for s in world.subjects}
    marked = re.sub(r"\w+", lambda match: "@" if match[0] in last_words else match[0], "\n".join(texts))
    abstract = re.sub(r"\w+ @", "{}", marked)
    for relation in world.relations:
        assert all(phrasing in abstract for phrasing in relation.train)
        for phrasing in relation.held_out:
            form = rf"(?:^|[.?] |: |\n){re.escape(phrasing)} \w"
            assert not re.search(form, abstract), phrasing


@pytest.mark.parametrize("task", TASKS)
def test_task_items_are_unseen(task: str, texts: list[str]) -> None:
    items = unseen_items(task, 200)
    assert len({item.prompt for item in items}) == 200
    seen = set(texts)
    assert not any(f"{item.prompt} {item.answer}" in seen for item in items)


def test_two_way_tasks_are_balanced() -> None:
    for task in ("nli", "sentiment"):
        share = Counter(item.answer for item in unseen_items(task, 200)).most_common(1)[0][1] / 200
        assert share < 0.6


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match="tasks"):
        unseen_items("poetry")
