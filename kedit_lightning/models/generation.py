"""Free generation: greedy or top-k, batched with left padding and a key-value cache.

Every row draws from a random stream of its own, so a text depends neither on the batch it was generated in nor on the
global generator, which is left alone. The loop is ours rather than `model.generate`, which mixes in whatever the
checkpoint's `generation_config` holds (temperature, repetition penalty, end tokens).
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kedit_lightning.errors import ModelError
from kedit_lightning.models.encoding import buckets
from kedit_lightning.models.language_model import LanguageModel


def generate(
    base: LanguageModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int | Sequence[int] | None = None,
    max_length: int | None = None,
    top_k: int | None = 5,
    seed: int | Sequence[int] = 0,
    max_tokens: int = 8192,
    with_prompt: bool = False,
    until_end: bool = False,
    end_text: str = "",
    owners: Sequence[int] | None = None,
) -> list[str]:
    """Continue prompts; the end-of-text token is a token like others, left out of the text.

    Args:
        base: The model.
        prompts: b prompts.
        max_new_tokens: Length of the continuation in tokens, one number or one a prompt.
        max_length: Length of prompt and continuation together; exactly one of the two is given. Neither goes beyond
            the model's context.
        top_k: Sample from the k likeliest tokens, renormalised, at temperature 1; None is greedy.
        seed: Seed of the sampling, one number (each row then has its own stream) or one a prompt.
        max_tokens: Budget of a batch.
        with_prompt: Return prompt and continuation rather than the continuation alone.
        until_end: Cut a continuation at its first end-of-text token.
        end_text: What then stands in that token's place.
        owners: The edit that each prompt is of, where edits are side by side (`Row.owner`).

    Returns:
        One text a prompt, special tokens left out.

    Raises:
        ValueError: Not exactly one of the two lengths is given.
        DataError: A prompt is longer than the model's context.
    """
    if (max_new_tokens is None) == (max_length is None):
        msg = f"expected either max_new_tokens or max_length, got {max_new_tokens} and {max_length}"
        raise ValueError(msg)
    rows = [base.encode(prompt).ids for prompt in prompts]
    if max_length is not None:
        wanted = [max_length - len(row) for row in rows]
    elif isinstance(max_new_tokens, int):
        wanted = [max_new_tokens] * len(rows)
    else:
        wanted = list(max_new_tokens or ())
    new = [max(0, min(n, base.max_length - len(row))) for n, row in zip(wanted, rows, strict=True)]
    seeds = _seeds(seed, len(rows)) if isinstance(seed, int) else seed
    tails = _continue(base, rows, new, top_k, seeds, max_tokens, owners)
    texts = []
    for row, tail in zip(rows, tails, strict=True):
        end = tail.index(eos) if until_end and (eos := base.tokenizer.eos_token_id) in tail else len(tail)
        texts.append(_tail_text(base, row, tail[:end]) + end_text * (end < len(tail)))
    return [prompt + text for prompt, text in zip(prompts, texts, strict=True)] if with_prompt else texts


def sample(
    base: LanguageModel, start_text: str | None, n: int, total_length: int, top_k: int = 5, seed: int = 0
) -> list[str]:
    """Sample texts that may stand before a prompt (ancestral top-k sampling, no end).

    Args:
        base: The model.
        start_text: First words; None starts from the beginning-of-text token alone (end-of-text where there is none).
        n: How many texts.
        total_length: Tokens of a text, its start included.
        top_k: Number of likeliest tokens to draw from.
        seed: Seed; the global random generator is left alone.

    Returns:
        n texts with their first words, special tokens left out, normalised by `normalise`.

    Raises:
        ModelError: There is no start text and the tokenizer has no token to begin with.
    """
    if start_text is not None:
        start = base.encode(start_text).ids
    else:
        bos, eos = base.tokenizer.bos_token_id, base.tokenizer.eos_token_id
        if bos is None and eos is None:
            msg = (
                "expected a tokenizer with a beginning- or end-of-text token to sample prefixes from, got neither; "
                "give context templates in the configuration"
            )
            raise ModelError(msg)
        start = [bos if bos is not None else eos]
    new = max(0, min(total_length, base.max_length) - len(start))
    tails = _continue(base, [start] * n, [new] * n, top_k, _seeds(seed, n), max_tokens=8192)
    return [normalise(_decode(base, start + tail)) for tail in tails]


def normalise(text: str) -> str:
    """A generated text as the released codes keep it: NFKD, an empty line turned into a space."""
    return unicodedata.normalize("NFKD", text).replace("\n\n", " ")


@torch.no_grad()
def _continue(
    base: LanguageModel,
    rows: Sequence[list[int]],
    new: Sequence[int],
    top_k: int | None,
    seeds: Sequence[int],
    max_tokens: int,
    owners: Sequence[int] | None = None,
) -> list[list[int]]:
    """Token ids that follow each row, ``new[i]`` of them."""
    tails: list[list[int]] = [[] for _ in rows]
    wanted = [i for i, steps in enumerate(new) if steps > 0]
    extra = max(new, default=0)
    for batch in buckets([len(rows[i]) for i in wanted], max_tokens, extra):
        at = [wanted[j] for j in batch]
        noise = None if top_k is None else _noise([seeds[i] for i in at], max(new[i] for i in at), top_k)
        owner = torch.tensor([-1 if owners is None else owners[i] for i in at])
        found = _steps(base, [rows[i] for i in at], torch.tensor([new[i] for i in at]), noise, owner)
        for i, tail in zip(at, found.tolist(), strict=True):
            tails[i] = tail[: new[i]]
    return tails


def _steps(base: LanguageModel, rows: Sequence[list[int]], new: Tensor, noise: Tensor | None, owner: Tensor) -> Tensor:
    """The next tokens of left-padded rows, on the CPU, shape ``(b, steps)``; of each row the first ``new[i]`` count.

    Rows that have theirs leave once they are half of those that are run.
    """
    width, device = max(len(row) for row in rows), base.device
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    position = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache: Any = None
    found = torch.zeros(len(rows), int(new.max()), dtype=torch.long, device=device)
    run = torch.arange(len(rows))
    for step in range(found.shape[1]):
        going = new[run] > step
        if 2 * int(going.sum()) <= len(run):
            run, stay = run[going], going.nonzero()[:, 0].to(device)
            ids, mask, position = ids[stay], mask[stay], position[stay]
            cache.reorder_cache(stay)
        with base.side_by_side.rows(owner[run]):
            output = base.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        cache = output.past_key_values
        ids = _choose(output.logits[:, -1].float(), None if noise is None else noise[run, step]).to(device)
        found[run, step] = ids[:, 0]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        position = (position[:, -1:] + 1).clamp(max=base.max_length - 1)
    return found.cpu()


def _choose(logits: Tensor, noise: Tensor | None) -> Tensor:
    """One token a row, shape ``(b, 1)``: arg-max, or a draw from the top-k softmax (exponential races)."""
    if noise is None:
        return logits.argmax(dim=-1, keepdim=True)
    top = logits.topk(min(noise.shape[1], logits.shape[1]), dim=-1)
    race = top.values - noise[:, : top.values.shape[1]].to(logits.device).log()
    return top.indices.gather(1, race.argmax(dim=-1, keepdim=True))


def _noise(seeds: Sequence[int], steps: int, k: int) -> Tensor:
    """Exponential variates, each row from its own stream; shape ``(b, steps, k)``."""
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.empty(steps, k).exponential_(generator=stream) for stream in streams])


def _seeds(seed: int, n: int) -> list[int]:
    """Seeds of n independent streams; a text seed is hashed, so neighbouring seeds have nothing in common."""
    return [random.Random(f"{seed}/{i}").getrandbits(63) for i in range(n)]


def _decode(base: LanguageModel, ids: list[int]) -> str:
    return str(base.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _tail_text(base: LanguageModel, row: list[int], tail: list[int]) -> str:
    """The continuation's text; decoded after its prompt, for SentencePiece drops a leading space otherwise."""
    head, whole = _decode(base, row), _decode(base, row + tail)
    return whole[len(head) :] if whole.startswith(head) else _decode(base, tail)
