"""What a model knows of the almanac, and how well it writes plain text."""

from __future__ import annotations

import math
import random

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kedit_lightning.almanac import prose, tasks
from kedit_lightning.almanac.world import World


def knowledge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World | None = None,
    facts: int | None = None,
    seed: int = 0,
    batch_size: int = 512,
) -> dict[str, float]:
    """Share of facts whose object's first token is the likeliest next token.

    Args:
        model: Causal language model on any device.
        tokenizer: Its tokenizer.
        world: The world that is asked about; that of seed 0 by default.
        facts: Size of a random sample; all facts if None. Every fact is asked in every phrasing.
        seed: Seed of the sample.
        batch_size: Prompts a forward pass.

    Returns:
        Percentages under ``train`` (phrasings of the corpus) and ``held_out``.
    """
    world = world or World()
    asked = list(world.facts) if facts is None else random.Random(seed).sample(world.facts, facts)
    shares: dict[str, float] = {}
    for name in ("train", "held_out"):
        prompts: list[list[int]] = []
        answers: list[int] = []
        for fact in asked:
            phrasings = fact.relation.train if name == "train" else fact.relation.held_out
            answer = tokenizer(f" {fact.object.name}")["input_ids"][0]
            texts = [phrasing.format(fact.subject.name) for phrasing in phrasings]
            prompts += tokenizer(texts)["input_ids"]
            answers += [answer] * len(texts)
        found = _next_tokens(model, prompts, batch_size)
        shares[name] = 100.0 * sum(a == b for a, b in zip(found, answers, strict=True)) / len(answers)
    return shares


@torch.no_grad()
def _next_tokens(model: PreTrainedModel, prompts: list[list[int]], batch_size: int) -> list[int]:
    """The likeliest next token of every prompt; prompts of equal length share a batch, so nothing is padded."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = [0] * len(prompts)
    start = 0
    while start < len(order):
        length = len(prompts[order[start]])
        batch = [i for i in order[start : start + batch_size] if len(prompts[i]) == length]
        ids = torch.tensor([prompts[i] for i in batch], device=model.device)
        best = model(input_ids=ids, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
        for i, token in zip(batch, best, strict=True):
            found[i] = token
        start += len(batch)
    return found


def plain_texts(count: int = 200, seed: int = 12345) -> list[str]:
    """New texts of three plain sentences each."""
    rng = random.Random(seed)
    return [" ".join(prose.sentence(rng) for _ in range(3)) for _ in range(count)]


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int = 200, seed: int = 12345
) -> float:
    """Perplexity of new plain sentences, every token but the first of a text of three sentences.

    Args:
        model: Causal language model on any device.
        tokenizer: Its tokenizer.
        count: Number of texts.
        seed: Seed of the texts.

    Returns:
        ``exp`` of the mean negative log-likelihood a token.
    """
    loss, tokens = 0.0, 0
    for text in plain_texts(count, seed):
        ids = torch.tensor([tokenizer(text)["input_ids"]], device=model.device)
        logits = model(input_ids=ids).logits[0, :-1].float()
        loss += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
    return math.exp(loss / tokens)


def checks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World | None = None,
    facts: int | None = None,
    items: int = 200,
) -> dict[str, float]:
    """All numbers the shipped model is held to: facts known, perplexity of plain text, the four tasks.

    Args:
        model: Causal language model, in float32.
        tokenizer: Its tokenizer.
        world: The world that is asked about; that of seed 0 by default.
        facts: Facts asked for; all if None.
        items: Items a task.

    Returns:
        ``facts/train``, ``facts/held_out``, ``plain/perplexity`` and ``tasks/NAME``.
    """
    numbers = {f"facts/{name}": share for name, share in knowledge(model, tokenizer, world, facts).items()}
    numbers["plain/perplexity"] = perplexity(model, tokenizer)
    return numbers | {f"tasks/{name}": score for name, score in tasks.evaluate(model, tokenizer, items).items()}
