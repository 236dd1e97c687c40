"""Evaluation, ours against the plain way: time and peak memory, as a Markdown table.

    python benchmarks/evaluation.py > benchmarks/evaluation.md

Teacher forcing: every prompt of CounterFact-like cases with the new answer, the true one and, for locality, the answer
that is read for its arg-maxes. Plain is a row a prompt and answer, 32 rows a batch in the order of the data, padded,
the head on every token; ours is `Scorer.score`. Generation: to 100 tokens, greedy; plain is `model.generate` on 32
prompts a batch in the order of the data, ours `generate`. Both see the same texts, of the almanac; the GPT-2-small
shape has random weights and 50,257 tokens, of which the texts use the first. Runs alternate; peaks are above
what the loaded model takes, each in a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from solvers import machine, occupied, peak
from transformers import GPT2Config, GPT2LMHeadModel

from kedit_lightning import __version__
from kedit_lightning.data import datasets
from kedit_lightning.edits import Edit
from kedit_lightning.metrics import Scorer
from kedit_lightning.metrics.questions import golden
from kedit_lightning.metrics.scorer import Forced
from kedit_lightning.models import LanguageModel, collate
from kedit_lightning.models.generation import generate

ROWS = 32
LENGTH = 100
ENDING = "of the old town"
"""Makes an answer of one token one of five, as other tokenizers and zsRE have them."""

EDITS = {
    "almanac": {"scores, answers of one token": 100, "scores, answers of five tokens": 100, "generation": 100},
    "gpt2-small": {"scores, answers of one token": 12, "scores, answers of five tokens": 12, "generation": 8},
}

Asked = tuple[list[str], list[str | Forced]]


def model(shape: str) -> LanguageModel:
    """The almanac, or a random model of GPT-2 small's shape that reads its texts."""
    base = LanguageModel("almanac")
    if shape == "almanac":
        return base
    torch.manual_seed(0)
    return LanguageModel.wrap(GPT2LMHeadModel(GPT2Config()), base.tokenizer)


def asked(base: LanguageModel, edits: Sequence[Edit], ending: str) -> Asked:
    """Prompts and the answers that are scored, in the order of the data."""
    pairs: list[tuple[str, str | Forced]] = []
    for edit in edits:
        prompts = (edit.text, *edit.paraphrase_prompts, *edit.neighborhood_prompts, *edit.relation_specific_prompts)
        for prompt in prompts:
            pairs += [(prompt, f"{answer} {ending}".strip()) for answer in (edit.target_new, edit.target_true)]
        for prompt, answer in golden(edit):
            answer = f"{answer} {ending}".strip()
            pairs.append((prompt, Forced(answer, tuple(base.encode(prompt, answer).targets))))
    return [prompt for prompt, _ in pairs], [answer for _, answer in pairs]


@torch.no_grad()
def plain_scores(base: LanguageModel, prompts: Sequence[str], answers: Sequence[str | Forced]) -> torch.Tensor:
    """-log p of the answers."""
    texts = [answer.text if isinstance(answer, Forced) else answer for answer in answers]
    rows = [base.encode(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    found = []
    for start in range(0, len(rows), ROWS):
        batch = collate(rows[start : start + ROWS])
        log_p = base.logits(batch).log_softmax(dim=-1)
        known = batch.labels >= 0
        found.append(-(log_p.gather(2, batch.labels.clamp(min=0)[..., None])[..., 0] * known).sum(dim=1))
    return torch.cat(found)


def our_scores(base: LanguageModel, prompts: Sequence[str], answers: Sequence[str | Forced]) -> torch.Tensor:
    """-log p of the answers."""
    return Scorer(base).score(prompts, answers).nll_sum


@torch.no_grad()
def plain_texts(base: LanguageModel, prompts: Sequence[str]) -> list[str]:
    """Greedy texts."""
    found = []
    for start in range(0, len(prompts), ROWS):
        inputs = base.tokenizer(
            list(prompts[start : start + ROWS]), return_tensors="pt", padding=True, padding_side="left"
        )
        # As the released code: until the longest has its length, end of text or not; the rest is cut off.
        output = base.model.generate(**inputs, do_sample=False, max_length=LENGTH, eos_token_id=-1, pad_token_id=0)
        ids = output[:, inputs["input_ids"].shape[1] :]
        found += [base.tokenizer.decode(tail, skip_special_tokens=True) for tail in ids]
    return found


def our_texts(base: LanguageModel, prompts: Sequence[str]) -> list[str]:
    """Greedy texts."""
    return generate(base, prompts, max_length=LENGTH, top_k=None)


def task(shape: str, kind: str, n: int) -> dict[str, Callable[[], object]]:
    """The two ways of a task."""
    base, edits = model(shape), datasets.almanac()[:n]
    if kind == "generation":
        prompts = [prompt for edit in edits for prompt in edit.generation_prompts]
        return {"plain": partial(plain_texts, base, prompts), "ours": partial(our_texts, base, prompts)}
    pairs = asked(base, edits, ENDING if "five" in kind else "")
    return {"plain": partial(plain_scores, base, *pairs), "ours": partial(our_scores, base, *pairs)}


def memory(shape: str, kind: str, n: int, way: str) -> float:
    """MB above the loaded model."""
    call = task(shape, kind, n)[way]
    before = occupied("cpu")
    call()
    return (peak("cpu") - before) / 1e6


def measure(shape: str, kind: str, n: int, runs: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of each way's runs, which alternate, and how far the results are apart (texts: the share)."""
    ways = task(shape, kind, n)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    results: dict[str, Any] = {}
    for _ in range(runs):
        for way, call in ways.items():
            start = time.perf_counter()
            results[way] = call()
            seconds[way].append(time.perf_counter() - start)
    one, other = results["plain"], results["ours"]
    if isinstance(one, torch.Tensor):
        return seconds, float((one - other).abs().max())
    return seconds, statistics.mean(a != b for a, b in zip(one, other, strict=True))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=EDITS, nargs="+", default=list(EDITS))
    parser.add_argument("--runs", type=int, default=5, help="of each way, alternating")
    parser.add_argument("--edits", type=int, help="in place of each row's own number")
    args = parser.parse_args()
    say = sys.stdout.write
    say(
        f"# Evaluation\n\n`{' '.join(['python', 'benchmarks/evaluation.py', *sys.argv[1:]])}`\n\n{machine('cpu')}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"kedit_lightning {__version__}. Float32. Medians of {args.runs} alternating runs. Plain: 32 rows a batch in "
        "the order of the data, padded; a row a prompt and answer and the head on every token, or `model.generate` to "
        f"{LENGTH} tokens. MB: the peak above the loaded model. Apart: the largest difference of an answer's -log p, "
        "or the share of texts that differ.\n\n"
        "| model | task | edits | plain, s | ours, s | faster | plain, MB | ours, MB | apart |\n"
        "|---|---|---:|---:|---:|---:|---:|---:|---:|\n"
    )
    processes = multiprocessing.get_context("spawn")
    for shape in args.shapes:
        for kind, own in EDITS[shape].items():
            n = args.edits or own
            with processes.Pool(1) as pool:
                seconds, apart = pool.apply(measure, (shape, kind, n, args.runs))
            peaks = {}
            for way in seconds:
                with processes.Pool(1) as pool:
                    peaks[way] = pool.apply(memory, (shape, kind, n, way))
            plain, ours = (statistics.median(seconds[way]) for way in ("plain", "ours"))
            say(
                f"| {shape} | {kind} | {n} | {plain:.2f} | {ours:.2f} | {plain / ours:.1f}× | {peaks['plain']:.0f} "
                f"| {peaks['ours']:.0f} | {apart:.0e} |\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
