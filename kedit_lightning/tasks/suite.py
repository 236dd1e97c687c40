"""General abilities of a model: the tasks that are asked, and what an edited model has kept of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from kedit_lightning.errors import DataError, KeditError
from kedit_lightning.metrics import Scorer as OptionScorer
from kedit_lightning.metrics.perplexity import perplexity
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.generation import generate
from kedit_lightning.models.progress import steps
from kedit_lightning.tasks.sources import balanced, is_dataset, records
from kedit_lightning.tasks.table import ALMANAC, PERPLEXITY, TASKS, TaskName
from kedit_lightning.tasks.task import Answer, Item, Scorer, Task

Score = dict[str, Any]
"""``score``, its ``measure``, ``n`` items, ``skipped`` ones (too long for the model), all ``numbers``, ``source``."""

CHUNK = 64
"""Items after which the display moves on."""

READ = 2048
"""Tokens of a batch at most where the logits of all are needed."""

RESERVED = 10
"""First records that examples are taken from, as AlphaEdit has it."""


class Tasks:
    """What general abilities are measured.

    Args:
        names: Tasks: the almanac's ``nli``, ``questions``, ``summary`` and ``sentiment``; ``rte``, ``nq``, ``samsum``
            and ``sst2`` as in the EAC paper; ``glue_nli``, ``glue_sst``, ``glue_cola``, ``glue_rte``, ``glue_mmlu`` and
            ``glue_mrpc`` as AlphaEdit runs them; and ``perplexity`` of held-out text.
        items: Items of each task, the first ones; null for all.
        scorer: How answers are read. ``strict``: the first word, or a whole open answer; ``contains``: the only option
            among the words, or the accepted answer side by side in them; ``likelihood``: the option with the lowest
            mean NLL (open answers are then read strictly); ``legacy``: as the papers' scripts, broken where they are.
        few_shot: Examples before each item, at most 10, as far as the model's context has room.
        sources: By task, a file or a data set instead of its own; see `tasks.sources.records`.
        max_tokens: Budget of a batch in tokens; perplexity, which needs logits at every token, takes at most 2048.

    Raises:
        KeditError: A number is out of range, or a source is given for a task that is not asked.
    """

    def __init__(
        self,
        names: Sequence[TaskName] = ALMANAC,
        items: int | None = 100,
        scorer: Scorer = "strict",
        few_shot: int = 0,
        sources: dict[str, str] | None = None,
        max_tokens: int = 8192,
    ) -> None:
        self.names: tuple[str, ...] = tuple(dict.fromkeys(names))
        self.items, self.scorer, self.few_shot, self.max_tokens = items, scorer, few_shot, max_tokens
        self.sources = {name: "almanac:texts" if name == PERPLEXITY else TASKS[name].source for name in self.names}
        if unasked := set(sources or {}) - set(self.names):
            msg = f"tasks.sources: {min(unasked)!r} is not among tasks.names ({', '.join(self.names)})"
            raise KeditError(msg)
        self.sources |= sources or {}
        if not self.names or not 0 <= few_shot <= RESERVED or (items is not None and items < 1):
            msg = (
                f"tasks: expected a task, items of at least 1 and few_shot of 0 to {RESERVED}, got "
                f"{len(self.names)} tasks, {items} and {few_shot}"
            )
            raise KeditError(msg)
        self._loaded: dict[str, tuple[list[Item], list[Item]]] = {}
        self._texts: list[str] = []

    def evaluate(self, base: LanguageModel) -> dict[str, Score]:
        """Measure the model as its weights are now.

        Args:
            base: The model.

        Returns:
            A score a task, all but perplexity between 0 and 1.

        Raises:
            DataError: A source or a record of it cannot be used, or every item is too long for the model.
        """
        self.load()
        asked = {name: self._prompts(base, name) for name in self.names if name != PERPLEXITY}
        texts = [text for text in self._texts if _length(base, text) <= base.max_length]
        done, total = 0, sum(map(len, asked.values())) + len(texts)
        found: dict[str, Score] = {}
        with steps("general abilities") as step:
            for name in self.names:

                def advance(part: int, name: str = name, start: int = done) -> None:
                    step(start + part, total, name)

                advance(0)
                if name == PERPLEXITY:
                    value = perplexity(base, texts, min(self.max_tokens, READ), progress=advance)
                    found[name] = self._score(name, value, "perplexity", len(texts), len(self._texts), {})
                    done += len(texts)
                    continue
                task, items = TASKS[name], asked[name]
                answers = self._answers(base, task, items, advance)
                measure, numbers = task.scores(answers, self.scorer)
                available = len(self._loaded[name][1])
                found[name] = self._score(name, numbers[measure], measure, len(items), available, numbers)
                done += len(items)
        return found

    def _score(
        self, name: str, value: float, measure: str, n: int, available: int, numbers: Mapping[str, float]
    ) -> Score:
        known = {key: number for key, number in numbers.items() if not math.isnan(number)}
        source = self.sources[name]
        return {
            "score": value, "measure": measure, "n": n, "skipped": available - n, "numbers": known, "source": source
        }  # fmt: skip

    # ------------------------------------------------------------------ items

    def load(self) -> None:
        """Read the records of all tasks, once; `evaluate` does so by itself.

        Raises:
            DataError: A source or a record of it cannot be used.
        """
        for name in self.names:
            if name == PERPLEXITY:
                self._texts = self._texts or [self._text(*found) for found in islice(self._records(name), self.items)]
            elif name not in self._loaded:
                self._loaded[name] = self._items(name)

    def _records(self, name: str) -> Any:  # noqa: ANN401 - an iterator with a name of its own
        return records(self.sources[name])

    def _items(self, name: str) -> tuple[list[Item], list[Item]]:
        """Examples, and the items that are asked."""
        task, source = TASKS[name], self.sources[name]
        found = self._records(name)
        if task.balanced and is_dataset(source):
            found = balanced(list(found), task.field)
        kept = RESERVED if self.few_shot else task.reserved
        end = None if self.items is None else kept + self.items
        items = []
        for where, record in islice(found, end):
            try:
                items.append(task.item(record, legacy=self.scorer == "legacy"))
            except DataError as error:
                msg = f"task {name}: {error.reason}"
                raise DataError(msg, file=source, record=where) from error
        if len(items) <= kept:
            msg = f"task {name}: expected more than {kept} records, got {len(items)}"
            raise DataError(msg + (f" (the first {kept} are kept for examples)" if kept else ""), file=source)
        return items[: self.few_shot], items[kept:]

    def _text(self, where: str, record: Mapping[str, Any]) -> str:
        text = record.get("text")
        if not isinstance(text, str):
            msg = f"perplexity: expected a text in the field 'text', got {text!r:.60}"
            raise DataError(msg, file=self.sources[PERPLEXITY], record=where)
        return text

    def _prompts(self, base: LanguageModel, name: str) -> list[Item]:
        """The items with examples before them, less those that are too long for the model."""
        examples, items = self._loaded[name]
        shots = [f"{example.shot.rstrip()} {example.answers[0]}\n" for example in examples]
        lengths = [_length(base, shot) for shot in shots]
        found = []
        for item in items:
            room = base.max_length - TASKS[name].new_tokens - _length(base, item.prompt)
            if room < 0:
                continue
            n = 0
            while n < len(shots) and sum(lengths[: n + 1]) <= room:
                n += 1
            found.append(replace(item, prompt="".join(shots[:n]) + item.prompt))
        if not found:
            msg = f"task {name}: all {len(items)} items are longer than the model's {base.max_length} tokens"
            raise DataError(msg, file=self.sources[name])
        return found

    # ------------------------------------------------------------------ answers

    def _answers(
        self, base: LanguageModel, task: Task, items: Sequence[Item], advance: Callable[[int], None]
    ) -> list[Answer]:
        """What the model makes of the items, in their order; long ones first, so that batches are of a length."""
        order = sorted(range(len(items)), key=lambda i: -len(items[i].prompt))
        scorer = OptionScorer(base, self.max_tokens)
        found: dict[int, Answer] = {}
        for start in range(0, len(order), CHUNK):
            chunk = order[start : start + CHUNK]
            prompts = [items[i].prompt for i in chunk]
            texts = generate(
                base,
                prompts,
                max_new_tokens=task.new_tokens,
                top_k=None,
                max_tokens=self.max_tokens,
                until_end=True,
                end_text=base.tokenizer.eos_token or "" if self.scorer == "legacy" else "",
            )
            pairs = [(prompt, option) for prompt in prompts for option in task.options]
            nll = scorer.score(*zip(*pairs, strict=True)).nll_mean.tolist() if pairs else []
            k = len(task.options)
            for j, (i, text) in enumerate(zip(chunk, texts, strict=True)):
                found[i] = Answer(items[i], text, tuple(nll[j * k : (j + 1) * k]))
            advance(start + len(chunk))
        return [found[i] for i in range(len(items))]


def retained(pre: Mapping[str, float | None], post: Mapping[str, float | None]) -> dict[str, float]:
    """The share that is kept of each task, and of their mean (EAC, section 5.3: "over 70 %").

    Args:
        pre: Scores of the unedited model, by task.
        post: Scores of the edited model.

    Returns:
        ``post / pre`` by task, without perplexity and without tasks that the unedited model fails wholly; ``mean``: the
        ratio of the mean scores of all of them. A score that is lost by editing (null, not finite) counts as 0.

    >>> retained({"rte": 0.5, "nq": 0.5, "sst2": 0.0, "perplexity": 3.0}, {"rte": 0.25, "nq": 0.5, "sst2": 0.0})
    {'rte': 0.5, 'nq': 1.0, 'mean': 0.75}
    """
    both = [(name, a, post[name]) for name, a in pre.items() if name in post and name != PERPLEXITY]
    kept = [(name, a, b if b is not None and math.isfinite(b) else 0.0) for name, a, b in both]
    known = [(name, a, b) for name, a, b in kept if a is not None and math.isfinite(a)]
    shares = {name: b / a for name, a, b in known if a > 0}
    before = sum(a for _, a, _ in known)
    return shares | ({"mean": sum(b for _, _, b in known) / before} if before > 0 else {})


def scores(found: Mapping[str, Score]) -> dict[str, float | None]:
    """The score of each task; null where it is no finite number."""
    return {name: each["score"] if math.isfinite(each["score"]) else None for name, each in found.items()}


def _length(base: LanguageModel, text: str) -> int:
    return len(base.tokenizer(text, verbose=False)["input_ids"])
