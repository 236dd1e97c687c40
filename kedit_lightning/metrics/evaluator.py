"""Evaluates edits on the model as it is now."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import cached_property
from itertools import islice, product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kedit_lightning.data.datasets import ReferenceTexts
from kedit_lightning.edits import PROMPT_LISTS, Edit
from kedit_lightning.errors import DataError
from kedit_lightning.metrics.collection import EditMetrics
from kedit_lightning.metrics.evaluation import TOP_K, Evaluation
from kedit_lightning.metrics.functional import PromptScores, fit_tfidf, tfidf_consistency
from kedit_lightning.metrics.generation import says, text_entropies
from kedit_lightning.metrics.questions import Question, Reference, edited_relations, golden, identity, questions
from kedit_lightning.metrics.scorer import Scorer
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.generation import generate, normalise

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

CHUNK = 2048
"""Edits scored together: prompts of like length share a batch, and one that comes twice is read once."""

WRITING = 32
"""Edits evaluated together where texts are written as well: few enough to show progress."""


class Evaluator:
    """Scores edits on the model as it is at the time of each call.

    Args:
        base: The model.
        settings: How edits are evaluated.
        reference_texts: For consistency: relation id → id of the new target → texts.
    """

    def __init__(
        self, base: LanguageModel, settings: Evaluation, reference_texts: ReferenceTexts | None = None
    ) -> None:
        self.base = base
        self.settings = settings
        self.reference_texts = reference_texts or {}
        self.scorer = Scorer(base, settings.max_tokens)
        self._references: dict[int, Reference] = {}

    @property
    def protocol(self) -> dict[str, Any]:
        """What every number depends on; numbers of different protocols do not compare."""
        return self.settings.protocol(self.base)

    def new(self) -> EditMetrics:
        """An empty collection of metrics, on the model's device."""
        return EditMetrics().to(self.base.device)

    def references(self, edits: Sequence[Edit]) -> list[Reference]:
        """Keep what the model says now, unedited, to prompts whose answers are to stay as they are.

        Args:
            edits: The edits that will be evaluated later.

        Returns:
            One for each edit, for `refer_to`.
        """
        found: list[Reference] = []
        for start in range(0, len(edits), CHUNK):
            part = edits[start : start + CHUNK]
            asked = [golden(edit) for edit in part]
            with self._naming(part):
                content, top = self.scorer.next_token([p for edit in part for p in edit.relation_specific_prompts])
                likeliest = self.scorer.likeliest([pair for pairs in asked for pair in pairs])
            relations, neighborhood = iter(zip(content.tolist(), top.tolist(), strict=True)), iter(likeliest)
            found += [
                Reference(
                    list(islice(relations, len(edit.relation_specific_prompts))),
                    list(islice(neighborhood, len(pairs))),
                )
                for edit, pairs in zip(part, asked, strict=True)
            ]
        self.refer_to(edits, found)
        return found

    def refer_to(self, edits: Sequence[Edit], references: Sequence[Reference]) -> None:
        """Take in what `references` gave in an earlier process."""
        self._references |= dict(zip(map(identity, edits), references, strict=True))

    def answers(self, edits: Sequence[Edit], owners: Sequence[int] | None = None) -> list[str]:
        """Greedy answers to the edit prompts on one line each, one token longer than the new target.

        Args:
            edits: The edits.
            owners: As in `update`.
        """
        with self._naming(edits):
            lengths = [len(self.base.encode(edit.text, edit.target_new).targets) + 1 for edit in edits]
        texts = generate(
            self.base,
            [edit.text for edit in edits],
            max_new_tokens=lengths,
            top_k=None,
            max_tokens=self.settings.max_tokens,
            owners=owners,
        )
        return [" ".join(text.split()) for text in texts]

    def update(
        self,
        metrics: EditMetrics,
        edits: Sequence[Edit],
        progress: Callable[[int], None] | None = None,
        edited: Sequence[Edit] | None = None,
        texts: bool = True,
        owners: Sequence[int] | None = None,
        answers: Sequence[str] | None = None,
    ) -> list[dict[str, float]]:
        """Score edits on the model as it is now.

        Args:
            metrics: Where the scores are added.
            edits: The edits to score.
            progress: Called with the number of edits done.
            edited: The edits made together, whose relations are left out of relation specificity; default: `edits`.
            texts: Whether the model is also let write, where the settings say so.
            owners: The number of each edit where they are side by side (`SideBySide`), each the only one that its rows
                know of; -1 where it was not made.
            answers: What `answers` gives for these edits, where that is known already.

        Returns:
            For each edit its values by reported name, with ``p_new`` and ``p_true``: the geometric-mean token
            probabilities of the two answers to the edit prompt. What a record cannot tell is left out.
        """
        together = edited_relations(edits if edited is None else edited)
        lines: list[dict[str, float]] = []
        texts = texts and self.settings.generation
        chunk = WRITING if texts else CHUNK
        for start in range(0, len(edits), chunk):
            part = edits[start : start + chunk]
            mine = None if owners is None else owners[start : start + chunk]
            relations = [together] * len(part) if mine is None else [edited_relations([edit]) for edit in part]
            with self._naming(part):
                probabilities = self._rewrite(metrics, part, relations, mine)
                if texts:
                    said = self.answers(part, mine) if answers is None else answers[start : start + chunk]
                    self._write(metrics, part, said, mine)
            latest = metrics.latest()
            lines += [latest[identity(edit)] | pair for edit, pair in zip(part, probabilities, strict=True)]
            if progress is not None:
                progress(len(lines))
        return lines

    def collect(
        self, edits: Sequence[Edit], lines: Sequence[Mapping[str, float]], metrics: EditMetrics | None = None
    ) -> EditMetrics:
        """Metrics of edits from what `update` returned for them, bit for bit; added to others where these are given."""
        metrics = metrics or self.new()
        metrics.add(dict(zip(map(identity, edits), lines, strict=True)))
        return metrics

    @contextmanager
    def _naming(self, edits: Sequence[Edit]) -> Iterator[None]:
        """Where a prompt cannot be read, say whose and which it is."""
        try:
            yield
        except DataError as error:
            for edit in edits:
                lists = [name for name in PROMPT_LISTS if name.endswith("_prompts")]
                prompts = [("prompt", edit.text), *((name, text) for name in lists for text in getattr(edit, name))]
                targets = {edit.target_new, edit.target_true or edit.target_new, *edit.neighborhood_targets}
                for (name, prompt), target in product(prompts, targets):
                    try:
                        self.base.encode(prompt.rstrip(), target)
                    except DataError as found:
                        raise DataError(found.reason, record=f"case {edit.case_id}, {name}") from error
            raise

    def _rewrite(
        self,
        metrics: EditMetrics,
        edits: Sequence[Edit],
        relations: Sequence[Set[tuple[str, str]]],
        owners: Sequence[int] | None,
    ) -> list[dict[str, float]]:
        """Teacher-forced metrics; returns the probabilities of the two answers to each edit prompt."""
        asked: dict[str, list[Question]] = {}
        for edit, edited in zip(edits, relations, strict=True):
            for name, found in questions(edit, self._references, edited).items():
                asked.setdefault(name, []).extend(found)
        flat = [question for found in asked.values() for question in found]
        owner = dict(zip(map(identity, edits), owners or (), strict=False))
        new, other, top = self._ask(flat, [owner[question.case] for question in flat] if owner else None)
        start = 0
        for name, found in asked.items():
            rows = slice(start, start := start + len(found))
            cases = torch.tensor([question.case for question in found])
            if name == "r_specificity":
                metrics.metric(name).update(cases, other[rows].nll_sum, new[rows].nll_max)
                metrics.metric(f"{name}/unchanged").update(cases, top[rows].token_accuracy)
                continue
            if name == "s_specificity":
                metrics.metric("locality").update(cases, top[rows].n_correct, top[rows].n_tok)
            metrics.metric(name).update(cases, new[rows].nll_mean, other[rows].nll_mean)
            answer = other[rows] if name == "s_specificity" else new[rows]
            metrics.metric(f"{name}/target").update(cases, answer.n_correct, answer.n_tok)
        # Efficacy is asked first, one question an edit.
        pairs = zip((-new.nll_mean).exp().tolist(), (-other.nll_mean).exp().tolist(), strict=True)
        named = [{"p_new": p_new, "p_true": p_true} for p_new, p_true in list(pairs)[: len(edits)]]
        return [{name: p for name, p in pair.items() if not math.isnan(p)} for pair in named]

    def _ask(
        self, asked: Sequence[Question], owners: Sequence[int] | None
    ) -> tuple[PromptScores, PromptScores, PromptScores]:
        """Scores of the new answers, the others and the former arg-maxes, nan where there is none."""
        answers = [answer for question in asked for answer in (question.new, question.other, question.top)]
        prompts = [question.prompt for question in asked for _ in range(3)]
        there = [i for i, answer in enumerate(answers) if answer is not None]
        mine = None if owners is None else [owners[i // 3] for i in there]
        scores = self.scorer.score([prompts[i] for i in there], [answers[i] for i in there], mine)  # type: ignore[misc]

        def spread(column: Tensor) -> Tensor:
            return torch.full((len(answers),), math.nan).index_put((torch.tensor(there),), column.float())

        full = PromptScores(*(spread(getattr(scores, name)) for name in PromptScores.__dataclass_fields__))
        return full[0::3], full[1::3], full[2::3]

    def _write(
        self, metrics: EditMetrics, edits: Sequence[Edit], answers: Sequence[str], owners: Sequence[int] | None
    ) -> None:
        """Metrics of free generation."""
        cases = torch.tensor([identity(edit) for edit in edits])
        hits = [says(answer, edit.target_new) for answer, edit in zip(answers, edits, strict=True)]
        metrics.metric("efficacy/generated").update(cases, torch.tensor(hits))
        keys = [(edit, i) for edit in edits for i in range(len(edit.generation_prompts))]
        seeds = [random.Random(f"{self.settings.seed}/{identity(e)}/{i}").getrandbits(63) for e, i in keys]
        generated = generate(
            self.base,
            [edit.generation_prompts[i] for edit, i in keys],
            max_length=self.settings.generation_length,
            top_k=TOP_K,
            seed=seeds,
            max_tokens=self.settings.max_tokens,
            with_prompt=True,
            owners=None if owners is None else [owners[edits.index(edit)] for edit, _ in keys],
        )
        texts: dict[int, list[str]] = {identity(edit): [] for edit in edits}
        for (edit, _), text in zip(keys, generated, strict=True):
            texts[identity(edit)].append(normalise(text))
        entropies = [text_entropies(texts[case]).mean() for case in cases.tolist()]  # nan where there is no text
        metrics.metric("fluency").update(cases, torch.stack(entropies))
        cosines = [self._consistency(edit, texts[identity(edit)]) for edit in edits]
        metrics.metric("consistency").update(cases, torch.tensor(cosines))

    def _consistency(self, edit: Edit, texts: Sequence[str]) -> float:
        """Cosine with the reference texts, nan where the edit has none."""
        samples = self.reference_texts.get(edit.relation_id or "", {}).get(edit.target_new_id or "", ())
        if not samples or not texts:
            return math.nan
        return tfidf_consistency(self._vectorizer, texts, [sample["text"] for sample in samples])

    @cached_property
    def _vectorizer(self) -> TfidfVectorizer:
        """Fitted on every reference text there is."""
        return fit_tfidf(
            [sample["text"] for objects in self.reference_texts.values() for s in objects.values() for sample in s]
        )
