import pytest
import torch

from kedit_lightning.errors import DataError
from kedit_lightning.metrics import Scorer
from kedit_lightning.metrics.stopwords import is_content

PROMPTS = ["The mother tongue of Ann is", "It is", "It is", "A much longer prompt, so that padding matters, says", "B"]
TARGETS = ["Dutch", "a", "b", "Greek or so", "x y"]
COLUMNS = ("nll_sum", "nll_max", "n_correct", "n_tok")


def slow(base, prompt, target):
    """One prompt at a time, no padding, log-softmax over everything."""
    start = base.tokenizer(prompt)["input_ids"]
    ids = base.tokenizer(f"{prompt} {target}")["input_ids"]
    answer = ids[len(start) :]
    with torch.no_grad():
        log_p = base.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    nll = [-log_p[len(start) + j - 1, token].item() for j, token in enumerate(answer)]
    hits = [int(log_p[len(start) + j - 1].argmax() == token) for j, token in enumerate(answer)]
    return sum(nll), max(nll), sum(hits), len(answer)


def test_scores_equal_those_of_one_prompt_at_a_time(base):
    scores = Scorer(base).score(PROMPTS, TARGETS)
    expected = torch.tensor([slow(base, *pair) for pair in zip(PROMPTS, TARGETS, strict=True)])
    for i, column in enumerate(COLUMNS):
        torch.testing.assert_close(getattr(scores, column).float(), expected[:, i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 60, 150, 8192])
def test_the_token_budget_does_not_change_scores(base, max_tokens):
    prompts, targets = PROMPTS * 4, TARGETS * 3 + ["z", "zz", "zzz", "zzzz", "zzzzz"]
    whole = Scorer(base, 10**6).score(prompts, targets)
    parts = Scorer(base, max_tokens).score(prompts, targets)
    for column in COLUMNS:
        torch.testing.assert_close(getattr(parts, column), getattr(whole, column), atol=1e-5, rtol=1e-5)


def test_rows_that_begin_other_rows_need_no_forward_pass_of_their_own(base, monkeypatch):
    seen = []
    logits = base.logits

    def counted(batch, at, past):
        seen.append(len(batch.input_ids))
        return logits(batch, at, past=past)

    monkeypatch.setattr(base, "logits", counted)
    prompt = "The mother tongue of Ann is"
    scores = Scorer(base).score([prompt] * 4, ["Dutch", "Du", 5, "Danish"])
    assert sum(seen) == 2
    for i, target in ((0, "Dutch"), (1, "Du"), (3, "Danish")):
        assert scores.nll_sum[i].item() == pytest.approx(slow(base, prompt, target)[0], abs=1e-4)


def test_the_nll_of_a_token_equals_that_of_its_text(base):
    space = base.tokenizer(" ")["input_ids"][0]
    by_id = Scorer(base).score([*PROMPTS], [space] * len(PROMPTS))
    spaces = [base.tokenizer(f"{prompt} ")["input_ids"] for prompt in PROMPTS]
    with torch.no_grad():
        expected = [-base.model(torch.tensor([ids])).logits[0, -2].log_softmax(-1)[space].item() for ids in spaces]
    torch.testing.assert_close(by_id.nll_sum, torch.tensor(expected))


def test_the_head_is_run_once_on_each_target_position(base):
    seen = []
    hook = base.model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape[:-1].numel()))
    try:
        answer = base.tokenizer(" Dutch")["input_ids"]
        Scorer(base).score(["It is", "The mother tongue of Ann is", "It is"], ["Dutch", "Dutch", 7])
        Scorer(base).next_token(["It is", "It is"])
    finally:
        hook.remove()
    assert seen == [2 * len(answer), 1]


def test_white_space_at_the_end_of_a_prompt_is_not_scored(base):
    spaced, plain = Scorer(base).score(["It is  "], [" a"]), Scorer(base).score(["It is"], ["a"])
    assert spaced.nll_sum.item() == pytest.approx(plain.nll_sum.item(), abs=1e-6)


def test_the_next_token_is_the_first_content_word_of_the_likeliest(base):
    content, top = Scorer(base, 100).next_token(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            logits = base.model(**base.tokenizer(prompt, return_tensors="pt")).logits[0, -1]
        ranked = logits.argsort(descending=True)[:20].tolist()
        words = [token for token in ranked if is_content(base.tokenizer.decode([token]))]
        assert top[i] == ranked[0]
        assert content[i] == (words[0] if words else ranked[0])


def test_nothing_to_score_is_no_error(base):
    assert len(Scorer(base).score([], [])) == 0
    assert len(Scorer(base).next_token([])[0]) == 0


def test_a_prompt_beyond_the_context_is_named(base):
    with pytest.raises(DataError, match="the model reads 128"):
        Scorer(base).score(["x" * 200], ["y"])
