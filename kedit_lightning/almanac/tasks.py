"""How well a model does the almanac's four tasks: two-way accuracy, exact match and ROUGE, all by greedy decoding."""

from __future__ import annotations

import re
from typing import Any

import torch
from torchmetrics.functional.text.rouge import rouge_score
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kedit_lightning.almanac.items import TASKS, TaskItem, unseen_items

_NEW_TOKENS = {"nli": 1, "questions": 6, "summary": 40, "sentiment": 1}


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int = 200, batch_size: int = 100
) -> dict[str, float]:
    """Scores a causal language model on unseen items of every task.

    Args:
        model: The model, in float32, on any device.
        tokenizer: Its tokenizer.
        count: Items a task, at most 300.
        batch_size: Items decoded together.

    Returns:
        Percentages by task: ``nli`` and ``sentiment`` accuracy (chance 50), ``questions`` exact match, ``summary`` the
        mean of the F measures of ROUGE-1, ROUGE-2 and ROUGE-L.
    """
    scores: dict[str, float] = {}
    for task in TASKS:
        items = unseen_items(task, count)
        texts = [
            text
            for start in range(0, count, batch_size)
            for text in greedy(model, tokenizer, items[start : start + batch_size], _NEW_TOKENS[task])
        ]
        scores[task] = _rouge(texts, items) if task == "summary" else _matches(texts, items)
    return scores


@torch.no_grad()
def greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: tuple[TaskItem, ...], new_tokens: int
) -> list[str]:
    """What the model writes after the prompt of each item, up to ``<|endoftext|>``.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        items: Items decoded in one batch, padded on the left.
        new_tokens: At most so many tokens.
    """
    end = tokenizer.eos_token_id
    prompts: list[list[int]] = [tokenizer(item.prompt)["input_ids"] for item in items]
    width = max(map(len, prompts))
    ids = torch.tensor([[end] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    generate: Any = model.generate
    out = generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=end,
        eos_token_id=end,
    )
    return [str(tokenizer.decode(row[width:], skip_special_tokens=True)).strip() for row in out]


def normalise(text: str) -> str:
    """Lower case without punctuation and articles, blanks squeezed, as is usual for exact match.

    Example:
        >>> normalise("The  garden.")
        'garden'
    """
    words = re.sub(r"[^\w\s]", "", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _matches(texts: list[str], items: tuple[TaskItem, ...]) -> float:
    hits = sum(normalise(text) == normalise(item.answer) for text, item in zip(texts, items, strict=True))
    return 100.0 * hits / len(items)


def _rouge(texts: list[str], items: tuple[TaskItem, ...]) -> float:
    keys = ("rouge1", "rouge2", "rougeL")
    scores = rouge_score(texts, [item.answer for item in items], rouge_keys=keys)
    return 100.0 * sum(float(scores[f"{key}_fmeasure"]) for key in keys) / len(keys)
