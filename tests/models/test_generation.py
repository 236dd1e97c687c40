import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from kedit_lightning.errors import DataError, ModelError
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.generation import generate, normalise, sample

PROMPTS = ["The mother tongue of Ann is", "It", "A much longer prompt, so that padding matters, says"]


def bytewise(**special):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, *special.values()])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(fast), n_positions=64, n_embd=32, n_layer=4, n_head=2, initializer_range=0.2,
        bos_token_id=None, eos_token_id=fast.eos_token_id,
    )  # fmt: skip
    return LanguageModel.wrap(GPT2LMHeadModel(config), fast)


@pytest.fixture(scope="module")
def base():
    return bytewise(eos_token="<|endoftext|>")


def greedy(base, prompt, steps):
    """No cache, no padding, no batch."""
    ids = base.tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(steps):
        with torch.no_grad():
            ids = [*ids, base.model(torch.tensor([ids])).logits[0, -1].argmax().item()]
    return base.tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("max_tokens", [1, 8192])
def test_greedy_text_equals_one_token_at_a_time(base, max_tokens):
    texts = generate(base, PROMPTS, max_new_tokens=8, top_k=None, max_tokens=max_tokens)
    assert texts == [greedy(base, prompt, 8) for prompt in PROMPTS]


def test_greedy_text_equals_that_of_transformers(base):
    inputs = base.tokenizer(PROMPTS[0], return_tensors="pt")
    ids = base.model.generate(**inputs, do_sample=False, max_new_tokens=10, pad_token_id=0, eos_token_id=-1)
    expected = base.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert generate(base, PROMPTS, max_new_tokens=10, top_k=None)[0] == expected


def test_total_length_counts_the_prompt_and_stays_within_the_context(base):
    texts = generate(base, PROMPTS, max_length=40, top_k=None)
    assert texts == [greedy(base, prompt, max(0, 40 - len(prompt))) for prompt in PROMPTS]
    assert texts[2] == ""
    longest = generate(base, PROMPTS, max_length=1000, top_k=None)
    assert longest == [greedy(base, prompt, 64 - len(prompt)) for prompt in PROMPTS]


def test_lengths_may_differ_by_prompt(base):
    texts = generate(base, PROMPTS, max_new_tokens=[0, 3, 6], top_k=None)
    assert texts == [greedy(base, prompt, n) for prompt, n in zip(PROMPTS, (0, 3, 6), strict=True)]


def test_rows_that_are_done_leave(base):
    seen = []
    hook = base.model.register_forward_pre_hook(
        lambda _, __, given: seen.append(len(given["input_ids"])), with_kwargs=True
    )
    prompts, lengths = [*PROMPTS, "Ann"], [1, 6, 2, 9]
    try:
        texts = generate(base, prompts, max_new_tokens=lengths, seed=[1, 2, 3, 4])
    finally:
        hook.remove()
    assert seen == [4, 4, 2, 2, 2, 2, 1, 1, 1]
    alone = zip(prompts, lengths, (1, 2, 3, 4), strict=True)
    assert texts == [generate(base, [prompt], max_new_tokens=n, seed=[seed])[0] for prompt, n, seed in alone]


def test_sampled_texts_depend_on_their_seed_alone(base):
    state = torch.get_rng_state()
    together = generate(base, PROMPTS, max_length=40, seed=[1, 2, 3])
    assert torch.equal(torch.get_rng_state(), state)
    alone = [generate(base, [prompt], max_length=40, seed=[i + 1])[0] for i, prompt in enumerate(PROMPTS)]
    assert together == alone
    assert generate(base, ["It"] * 2, max_length=40)[0] != generate(base, ["It"] * 2, max_length=40)[1]
    assert generate(base, ["It"], max_length=40, seed=0) != generate(base, ["It"], max_length=40, seed=1)


def test_sampling_draws_from_the_renormalised_top_k(base):
    with torch.no_grad():
        top = base.model(torch.tensor([base.tokenizer("It")["input_ids"]])).logits[0, -1].topk(5)
    n = 4000
    texts = generate(base, ["It"] * n, max_new_tokens=1, top_k=5)
    assert len(set(texts)) <= 5
    expected = {}  # two tokens may be the same text
    for token, p in zip(top.indices.tolist(), top.values.softmax(0).tolist(), strict=True):
        expected[base.tokenizer.decode([token])] = expected.get(base.tokenizer.decode([token]), 0) + p
    for text, p in expected.items():
        assert texts.count(text) / n == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5)


def test_end_of_text_is_a_token_like_others(base):
    eos = base.tokenizer.eos_token_id
    head = base.model.lm_head.weight
    kept = head.detach().clone()
    try:
        with torch.no_grad():
            head[eos] = 0
            head[:eos] *= 0
            base.model.transformer.ln_f.bias += 1
            head[eos] += 1
        assert generate(base, ["It"], max_new_tokens=5, top_k=None, with_prompt=True) == ["It"]
    finally:
        with torch.no_grad():
            head.copy_(kept)
            base.model.transformer.ln_f.bias -= 1


def test_with_prompt_keeps_the_prompt(base):
    whole = generate(base, PROMPTS, max_new_tokens=4, seed=7, with_prompt=True)
    tails = generate(base, PROMPTS, max_new_tokens=4, seed=7)
    assert whole == [prompt + tail for prompt, tail in zip(PROMPTS, tails, strict=True)]


def test_exactly_one_length_is_needed(base):
    with pytest.raises(ValueError, match="either max_new_tokens or max_length"):
        generate(base, PROMPTS)


def test_a_prompt_beyond_the_context_is_named(base):
    with pytest.raises(DataError, match="the model reads 64"):
        generate(base, ["x" * 70], max_length=100)


def test_prefixes_start_from_the_start_token_and_count_it(base, monkeypatch):
    seen = []
    decode = base.tokenizer.decode
    monkeypatch.setattr(base.tokenizer, "decode", lambda ids, **kwargs: seen.append(ids) or decode(ids, **kwargs))
    texts = sample(base, None, 4, 10)
    assert len(texts) == len(set(texts)) == 4
    assert all(len(ids) == 10 and ids[0] == base.tokenizer.eos_token_id for ids in seen)
    assert texts == sample(base, None, 4, 10)
    assert texts[:2] == sample(base, None, 2, 10)
    assert texts != sample(base, None, 4, 10, seed=1)
    assert all(text.startswith("The") for text in sample(base, "The", 2, 10))


def test_a_beginning_token_is_preferred_to_an_end_token(monkeypatch):
    base = bytewise(bos_token="<s>", eos_token="</s>")
    seen = []
    decode = base.tokenizer.decode
    monkeypatch.setattr(base.tokenizer, "decode", lambda ids, **kwargs: seen.append(ids) or decode(ids, **kwargs))
    assert all("<s>" not in text for text in sample(base, None, 2, 6))
    assert seen[0][0] == base.tokenizer.bos_token_id


def test_sampling_without_any_start_token_says_what_to_do():
    with pytest.raises(ModelError, match="give context templates"):
        sample(bytewise(), None, 1, 5)


def test_normalised_text():
    assert normalise("ﬁne\n\ntext") == "fine text"
