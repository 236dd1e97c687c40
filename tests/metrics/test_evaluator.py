import copy
import dataclasses
import itertools
import json
import math
import re
import string

import pytest
import torch

from kedit_lightning.edits import Edit
from kedit_lightning.metrics import REPORTED, Evaluation, Evaluator, Scorer, paper_names
from kedit_lightning.metrics.functional import harmonic_mean
from kedit_lightning.metrics.questions import Reference, edited_relations, identity, questions
from kedit_lightning.models.generation import generate

TEXTS = {"P103": {"Q1": [{"name": "Old Dutch", "text": "Dutch is the tongue Ann Example lives in"}]}}
SAYS_A_WORD = "Ann Example"
"""A prompt that the tiny model happens to continue with a word: letters, then something else."""


@pytest.fixture
def evaluator(base):
    return Evaluator(base, Evaluation(generation_length=40), TEXTS)


def evaluate(evaluator, edits, **kwargs):
    metrics = evaluator.new()
    lines = evaluator.update(metrics, edits, **kwargs)
    return metrics.compute(), lines


def test_every_number_follows_from_scores_of_single_prompts(evaluator, edits):
    evaluator.references(edits)
    _, lines = evaluate(evaluator, edits)
    edit, line = edits[0], lines[0]

    def nll(prompt, target):
        return Scorer(evaluator.base).score([prompt], [target]).nll_mean.item()

    def pairs(prompts):
        return [(nll(prompt, edit.target_new), nll(prompt, edit.target_true)) for prompt in prompts]

    for name, prompts, sign in (
        ("efficacy", [edit.text], 1),
        ("generalization", edit.paraphrase_prompts, 1),
        ("s_specificity", edit.neighborhood_prompts, -1),
    ):
        wins = [float(sign * (true - new) > 0) for new, true in pairs(prompts)]
        gaps = [sign * (math.exp(-new) - math.exp(-true)) for new, true in pairs(prompts)]
        assert line[name] == pytest.approx(sum(wins) / len(wins))
        assert line[f"{name}_magnitude"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-6)
    assert line["p_new"] == pytest.approx(math.exp(-nll(edit.text, "Dutch")), abs=1e-6)
    assert line["p_true"] == pytest.approx(math.exp(-nll(edit.text, "Greek")), abs=1e-6)


def test_relation_specificity_of_the_unedited_model_is_one(evaluator, edits):
    evaluator.references(edits)
    summaries, _ = evaluate(evaluator, edits)
    assert summaries["r_specificity"].mean == 1
    assert summaries["r_specificity_unchanged"].mean == 1
    assert summaries["r_specificity"].skipped == 2


def test_relation_specificity_uses_the_references_of_the_unedited_model(evaluator, edits):
    evaluator.references(edits)
    before, _ = evaluate(evaluator, edits)
    raw = evaluator.answers(edits)[0]
    base = evaluator.base
    head = base.model.transformer.ln_f.bias
    kept = head.detach().clone()
    target = base.tokenizer(" D")["input_ids"]
    try:
        with torch.no_grad():  # push every prediction to the new target's letters
            head += 20 * base.model.lm_head.weight[base.tokenizer("D")["input_ids"] + target].sum(0)
        after, _ = evaluate(evaluator, edits)
        assert evaluator.answers(edits)[0] != raw
    finally:
        with torch.no_grad():
            head.copy_(kept)
    assert after["r_specificity_unchanged"].mean < before["r_specificity_unchanged"].mean
    assert after["r_specificity_magnitude"].mean < before["r_specificity_magnitude"].mean


def test_without_references_relation_specificity_is_skipped(evaluator, edits):
    summaries, _ = evaluate(evaluator, edits)
    assert "r_specificity" not in summaries
    assert "score4" not in summaries
    assert "score3" in summaries


def test_relations_edited_for_the_same_subject_in_the_batch_are_left_out(edits):
    references = {identity(edits[0]): Reference(relations=[(1, 1)] * 3)}
    alone = questions(edits[0], references, edited_relations(edits[:1]))["r_specificity"]
    together = questions(edits[0], references, edited_relations(edits))["r_specificity"]
    assert len(alone) == 3
    assert [q.prompt for q in together] == ["Ann Example works as", "Ann Example was born in"]
    # One's own relation never counts, and names of subjects are compared without case.
    shouted = Edit("{} is a", "ANN EXAMPLE", "nurse", relation_id="P106")
    assert len(questions(edits[0], references, edited_relations([shouted]))["r_specificity"]) == 2


def test_records_without_a_true_answer_have_accuracies_only(evaluator, edits):
    summaries, lines = evaluate(evaluator, edits[2:])
    assert "efficacy" not in lines[0]
    assert "s_specificity" not in summaries
    assert "score3" not in summaries
    expected = Scorer(evaluator.base).score(["nq question: who sang it?"], ["the band"])
    assert summaries["s_specificity_accuracy"].mean == pytest.approx(expected.token_accuracy.item())
    assert "score3_accuracy" in summaries


def test_a_batch_of_one_gives_the_numbers_of_a_batch_of_sixteen(evaluator, edits):
    many = [dataclasses.replace(edits[i % 3], case_id=100 + i) for i in range(16)]
    evaluator.references(many)
    summaries, lines = evaluate(evaluator, many, edited=many)
    metrics = evaluator.new()
    single = [line for edit in many for line in evaluator.update(metrics, [edit], edited=many)]
    for one, other in zip(lines, single, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    for name, summary in metrics.compute().items():
        assert summary == pytest.approx(summaries[name], abs=1e-5, nan_ok=True)


def test_edits_of_ones_own_may_share_a_case_id(evaluator):
    mine = [Edit("{} is in", subject, "Rome", "Oslo") for subject in ("Ann", "Bob", "Cy")]
    summaries, lines = evaluate(evaluator, mine)
    assert summaries["efficacy"].n == 3
    assert len(lines) == 3


def test_a_bare_edit_is_skipped_where_it_has_nothing_to_tell(evaluator):
    summaries, _ = evaluate(evaluator, [Edit("{} is in", "Ann", "Rome")])
    assert set(summaries) == {"efficacy_accuracy", "efficacy_exact", "efficacy_generated"}


def test_generation_can_be_left_out(base, edits):
    summaries, _ = evaluate(Evaluator(base, Evaluation(generation=False)), edits)
    assert not {"fluency", "consistency", "efficacy_generated"} & set(summaries)


def test_consistency_is_skipped_and_counted_without_reference_texts(evaluator, edits):
    summaries, _ = evaluate(evaluator, edits)
    assert (summaries["consistency"].n, summaries["consistency"].skipped) == (1, 2)
    assert 0 < summaries["consistency"].mean <= 1
    assert summaries["fluency"].n == 1


def test_a_free_answer_of_the_target_is_a_hit(evaluator):
    [answer] = generate(evaluator.base, [SAYS_A_WORD], max_new_tokens=8, top_k=None)
    word = re.match(r"[a-z]{2,}(?=\W)", answer).group()
    targets = (word, word[:-1], f"un{word}")  # as it is said, the beginning of what is said, something else
    edits = [Edit("{}", SAYS_A_WORD, target, case_id=i) for i, target in enumerate(targets)]
    summaries, lines = evaluate(evaluator, edits)
    assert [line["efficacy_generated"] for line in lines] == [1.0, 0.0, 0.0]
    assert summaries["efficacy_generated"].mean == pytest.approx(1 / 3)


def test_zsre_is_measured_as_jeep_does(evaluator):
    """Token by token, given the tokens before it (MEMIT's loop), on src, rephrase and the question of another fact."""
    base = evaluator.base

    def share(prompt, target):
        ids, tokens = base.tokenizer(prompt)["input_ids"], base.tokenizer(f" {target}")["input_ids"]
        hits = []
        for token in tokens:
            hits.append(base.model(torch.tensor([ids])).logits[0, -1].argmax().item() == token)
            ids = [*ids, token]
        return sum(hits) / len(hits)

    def partly(prompt):
        words = ("".join(letters) for letters in itertools.product(string.ascii_letters, repeat=2))
        return next(word for word in words if 0 < share(prompt, word) < 1)

    prompts = "Ann Example was born in", "Where was Ann Example born?", "nq question: who sang it?"
    answer, other = partly(prompts[0]), partly(prompts[2])
    edit = Edit("{}", prompts[0], answer, paraphrase_prompts=prompts[1:2], neighborhood_prompts=prompts[2:],
                neighborhood_targets=(other,))  # fmt: skip
    found, _ = evaluate(evaluator, [edit])
    expected = [share(prompt, target) for prompt, target in zip(prompts, (answer, answer, other), strict=True)]
    names = paper_names(found)
    assert [found[names[name]].mean for name in ("ES", "GS", "LS")] == pytest.approx(expected)
    assert found[names["Score"]].mean == pytest.approx(harmonic_mean(expected))


def test_counterfact_is_measured_as_jeep_does(evaluator, edits):
    found, _ = evaluate(evaluator, edits[:2])
    names = paper_names(found)
    assert names == {"ES": "efficacy", "GS": "generalization", "LS": "s_specificity", "Score": "score3"}
    parts = [found[names[name]].mean for name in ("ES", "GS", "LS")]
    assert found[names["Score"]].mean == pytest.approx(harmonic_mean(parts))


def test_progress_counts_edits(evaluator, edits, monkeypatch):
    monkeypatch.setattr("kedit_lightning.metrics.evaluator.CHUNK", 32)
    done = []
    many = [dataclasses.replace(edits[1], case_id=i) for i in range(70)]
    evaluator.settings = Evaluation(generation=False)
    evaluate(evaluator, many, progress=done.append)
    assert done == [32, 64, 70]


def test_evaluation_is_repeatable_and_leaves_the_random_state_alone(evaluator, edits):
    state = copy.deepcopy(torch.get_rng_state())
    evaluator.references(edits)
    first, _ = evaluate(evaluator, edits)
    second, _ = evaluate(evaluator, list(reversed(edits)))
    assert torch.equal(torch.get_rng_state(), state)
    for name, summary in first.items():
        assert summary == pytest.approx(second[name], abs=1e-5, nan_ok=True)


def test_protocol_and_summaries_are_json(evaluator, edits):
    summaries, lines = evaluate(evaluator, edits)
    assert set(summaries) <= set(REPORTED)
    text = {"protocol": evaluator.protocol, "post": {k: s.as_dict() for k, s in summaries.items()}, "lines": lines}
    json.dumps(text, allow_nan=False)
    assert evaluator.protocol["dtype"] == "float32"
