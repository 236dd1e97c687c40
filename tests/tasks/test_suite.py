import json
import math
from dataclasses import replace

import pytest
import torch

from kedit_lightning.almanac import check
from kedit_lightning.almanac import tasks as almanac
from kedit_lightning.errors import DataError, KeditError
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.generation import generate
from kedit_lightning.tasks import ALMANAC, TASKS, Tasks, retained, scores
from tests.families import tiny_base


@pytest.fixture(scope="module")
def base():
    return LanguageModel()


def rows(n, label=lambda i: i % 2):
    return [{"sentence": f"film {i} was fine", "label": label(i)} for i in range(n)]


def file(path, found):
    path.write_text(json.dumps(found))
    return str(path)


def test_the_almanac_scores_as_its_own_check_does(base):
    found = scores(Tasks(items=8).evaluate(base))
    own = almanac.evaluate(base.model, base.tokenizer, 8)
    assert list(found) == list(ALMANAC)
    assert {name: 100 * found[name] for name in own} == pytest.approx(own)
    assert found["perplexity"] == pytest.approx(check.perplexity(base.model, base.tokenizer, 8), rel=1e-5)


def test_a_harmed_model_scores_worse_and_nan_is_no_answer(base):
    """A negative control: the scores follow the weights."""
    tasks, whole = Tasks(["nli", "questions", "perplexity"], items=10), None
    whole = scores(tasks.evaluate(base))
    weight = base.model.get_output_embeddings().weight
    before = weight.clone()
    try:
        weight.mul_(-1)
        harmed = scores(tasks.evaluate(base))
        weight.fill_(math.nan)
        broken = tasks.evaluate(base)
    finally:
        weight.copy_(before)
    assert harmed["nli"] == harmed["questions"] == 0
    assert harmed["perplexity"] > 100 * whole["perplexity"]
    assert broken["nli"]["numbers"]["likelihood/invalid"] == 1
    assert scores(broken)["perplexity"] is None
    assert retained(whole, harmed) == {"nli": 0, "questions": 0, "mean": 0}
    assert retained(whole, whole) == {"nli": 1, "questions": 1, "mean": 1}


def test_every_family_is_asked(family, tmp_path):
    base = tiny_base(family)
    tasks = Tasks(["glue_sst"], items=3, few_shot=1, sources={"glue_sst": file(tmp_path / "a.json", rows(13))})
    found = tasks.evaluate(base)["glue_sst"]
    assert (found["n"], found["skipped"], found["measure"]) == (3, 0, "strict/f1")
    assert found["numbers"]["likelihood/invalid"] == 0


def asked(monkeypatch, base, tasks):
    """The prompts that the model is given."""
    seen = []

    def keep(base, prompts, **settings):
        seen.extend(prompts)
        assert settings["max_new_tokens"] == 5
        return generate(base, prompts, **settings)

    monkeypatch.setattr("kedit_lightning.tasks.suite.generate", keep)
    return tasks.evaluate(base), seen


def test_examples_come_from_the_first_ten_records_as_far_as_there_is_room(monkeypatch, tmp_path):
    base = tiny_base("gpt2")  # 128 tokens
    source = file(tmp_path / "a.json", rows(14))
    name = "glue_sst"
    _, prompts = asked(monkeypatch, base, Tasks([name], items=2, sources={name: source}))
    assert prompts == [f"Review :film {i} was fine\nSentiment :" for i in (10, 11)]
    _, prompts = asked(monkeypatch, base, Tasks([name], few_shot=2, sources={name: source}))
    shots = "Review : film 0 was fine\nSentiment : negative\nReview : film 1 was fine\nSentiment : positive\n"
    assert prompts == [f"{shots}Review :film {i} was fine\nSentiment :" for i in range(10, 14)]
    _, prompts = asked(monkeypatch, base, Tasks([name], items=1, few_shot=10, sources={name: source}))
    length = len(base.encode(prompts[0]).ids)
    one = len(base.encode("Review : film 0 was fine\nSentiment : negative\n").ids)
    assert 128 - 5 - one - 2 <= length <= 128 - 5
    assert prompts[0].startswith("Review : film 0 ")  # the first ones are those that are taken


def test_items_that_are_too_long_are_left_out_and_counted(tmp_path):
    base = tiny_base("gpt2")
    found = rows(12)
    found[11]["sentence"] = "long " * 200
    source = {"glue_sst": file(tmp_path / "a.json", found)}
    score = Tasks(["glue_sst"], sources=source).evaluate(base)["glue_sst"]
    assert (score["n"], score["skipped"]) == (1, 1)
    found[10]["sentence"] = "long " * 200
    file(tmp_path / "a.json", found)
    with pytest.raises(DataError, match=r"a\.json: task glue_sst: all 2 items are longer than the model's 128 tokens"):
        Tasks(["glue_sst"], sources=source).evaluate(base)


def test_a_batch_changes_no_score(base):
    found = [scores(Tasks(["questions"], items=12, max_tokens=n).evaluate(base)) for n in (1, 8192)]
    assert found[0] == found[1]


def test_a_bad_record_is_named_and_later_ones_are_not_read(tmp_path):
    source = {"sst2": file(tmp_path / "a.json", rows(6, lambda i: 7 if i == 4 else 0))}
    Tasks(["sst2"], items=4, sources=source).load()
    with pytest.raises(DataError, match=r"a\.json, record 5 of 6: task sst2: expected a class .*, got 7"):
        Tasks(["sst2"], items=5, sources=source).load()
    with pytest.raises(DataError, match=r"expected more than 10 records, got 6 \(the first 10 are kept for examples\)"):
        Tasks(["sst2"], few_shot=1, sources={"sst2": file(tmp_path / "b.json", rows(6))}).load()
    with pytest.raises(DataError, match=r"c\.json, record 1 of 1: perplexity: expected a text in the field 'text'"):
        Tasks(["perplexity"], sources={"perplexity": file(tmp_path / "c.json", [{"t": 1}])}).load()


@pytest.mark.parametrize(
    "settings", [{"names": []}, {"items": 0}, {"few_shot": 11}, {"few_shot": -1}, {"sources": {"rte": "a.tsv"}}]
)
def test_settings_that_cannot_be_used(settings):
    with pytest.raises(KeditError, match="tasks"):
        Tasks(**settings)


def test_what_is_retained():
    pre = {"rte": 0.5, "nq": 0.25, "sst2": 0.25, "perplexity": 3.0}
    post = {"rte": 0.25, "nq": 0.0, "sst2": 0.45, "perplexity": 9.0}
    assert retained(pre, post) == pytest.approx({"rte": 0.5, "nq": 0.0, "sst2": 1.8, "mean": 0.7})
    assert retained({"nq": 0.0}, {"nq": 0.5}) == {}
    assert retained({"nq": 0.5, "rte": 0.5}, {"nq": None, "rte": 0.5}) == {"nq": 0.0, "rte": 1.0, "mean": 0.5}


def test_the_end_of_a_text_ends_an_answer(base):
    """The almanac ends its answers; more tokens would change an exact match."""
    texts = generate(base, ["Passage: Ann hid the key in the park. Question: Where is the key? Answer:"],
                     max_new_tokens=12, top_k=None, until_end=True)  # fmt: skip
    assert len(texts[0].split()) == 1
    marked = generate(base, ["Passage: Ann hid the key in the park. Question: Where is the key? Answer:", "The"],
                      max_new_tokens=[12, 1], top_k=None, until_end=True, end_text="<end>")  # fmt: skip
    assert marked[0] == f"{texts[0]}<end>"
    assert not marked[1].endswith("<end>"), "it has not ended"
    ends = {}
    for scorer in ("legacy", "strict"):
        tasks = Tasks(["questions"], items=3, scorer=scorer)
        tasks.load()
        task, (_, items) = replace(TASKS["questions"], new_tokens=12), tasks._items("questions")
        found = tasks._answers(base, task, items, lambda _: None)
        ends[scorer] = {answer.text.endswith(base.tokenizer.eos_token) for answer in found}
    assert ends == {"legacy": {True}, "strict": {False}}
    assert torch.is_grad_enabled()
