import math

import pytest
import torch

from kedit_lightning.errors import DataError
from kedit_lightning.metrics.perplexity import perplexity

TEXTS = ("A text of some length.", "Short.", "x", "Another one, neither short nor long")


def reference(base, texts):
    """Token by token, each predicted from a row of its own."""
    nll = []
    for text in texts:
        ids = base.tokenizer(text)["input_ids"]
        for i in range(1, len(ids)):
            logits = base.model(input_ids=torch.tensor([ids[:i]])).logits[0, -1]
            nll.append(-float(logits.log_softmax(-1)[ids[i]]))
    return math.exp(sum(nll) / len(nll))


@pytest.mark.parametrize("max_tokens", [1, 40, 8192])
def test_every_token_after_the_first_counts_alike_in_whatever_batches(base, max_tokens):
    seen = []
    assert perplexity(base, TEXTS, max_tokens, seen.append) == pytest.approx(reference(base, TEXTS), rel=1e-5)
    assert seen[-1] == len(TEXTS)


def test_it_follows_the_weights_and_overflows_to_infinity(base):
    before = perplexity(base, TEXTS)
    head = base.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, __, out: out * 1e6)
    try:
        assert perplexity(base, TEXTS) == math.inf
    finally:
        hook.remove()
    assert perplexity(base, TEXTS) == before


@pytest.mark.parametrize("texts", [[], ["x"]])
def test_a_text_of_one_token_says_nothing(base, texts):
    with pytest.raises(DataError, match="two tokens"):
        perplexity(base, texts)
