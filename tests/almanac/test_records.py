"""Edit sets: CounterFact's fields and their invariants."""

from __future__ import annotations

import pytest

from kedit_lightning.almanac import World, documents, records, reference_texts


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def test_fields_and_invariants(world: World) -> None:
    by_name = {s.name: s for s in world.subjects}
    made = records(300)
    assert [r["case_id"] for r in made] == list(range(300))
    assert len({r["requested_rewrite"]["subject"] for r in made}) == 300
    for record in made:
        rewrite = record["requested_rewrite"]
        subject, relation = by_name[rewrite["subject"]], world.relation(rewrite["relation_id"])
        true, new = rewrite["target_true"], rewrite["target_new"]
        assert rewrite["prompt"] in relation.train
        assert rewrite["prompt"].count("{}") == 1
        assert world.fact(subject, relation).object.name == true["str"] != new["str"]
        assert true["id"] != new["id"]
        assert len(true["str"].split()) == len(new["str"].split()) == 1
        assert len(record["paraphrase_prompts"]) == 2
        for prompt in record["paraphrase_prompts"]:
            assert any(prompt.endswith(p.format(subject.name)) for p in relation.held_out)
        for field, target in (("neighborhood_prompts", true), ("attribute_prompts", new)):
            assert len(record[field]) == 10
            for prompt in record[field]:
                assert subject.name not in prompt
                owners = [s for s in by_name.values() if s.name in prompt]
                assert [world.fact(s, relation).object.name for s in owners] == [target["str"]]
                assert prompt in {p.format(owners[0].name) for p in relation.train}
        assert record["generation_prompts"]
        assert all(subject.name in p for p in record["generation_prompts"])
        prompts, relations = record["relation_specific_prompts"], record["relation_specific_relations"]
        assert len(prompts) == len(relations) >= 3
        assert relation.id not in relations
        for prompt, other in zip(prompts, relations, strict=True):
            assert prompt in {p.format(subject.name) for p in world.relation(other).train}


def test_counts() -> None:
    small = World(people=60, places=12)
    assert len(records(world=small)) == 72
    several = records(facts_per_subject=7, world=small)
    assert len(several) == 60 * 7 + 12 * 4
    pairs = {(r["requested_rewrite"]["subject"], r["requested_rewrite"]["relation_id"]) for r in several}
    assert len(pairs) == len(several)
    whole = World()
    assert sum(min(7, len(whole.facts_of(s))) for s in whole.subjects) >= 10_000


def test_seed() -> None:
    assert records(5) == records(5) != records(5, seed=1)


@pytest.mark.parametrize("arguments", [{"n": 0}, {"n": 2001}, {"facts_per_subject": 0}])
def test_bad_numbers(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="n="):
        records(**arguments)


def test_reference_texts_and_documents(world: World) -> None:
    texts = reference_texts(world)
    for relation in world.relations:
        for obj in relation.objects:
            assert texts[relation.id][obj.id]
            assert all(obj.name in item["text"] and item["name"] in item["text"] for item in texts[relation.id][obj.id])
    assert len(documents(20)) == 20
    assert documents(20) == documents(20) != documents(20, seed=1)
