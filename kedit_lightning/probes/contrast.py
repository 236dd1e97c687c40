"""How likely the original and the target answer are between the blocks (JEEP, Figs. 2 and 5)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from kedit_lightning.editors.base import Preset
from kedit_lightning.edits import Edit
from kedit_lightning.errors import KeditError
from kedit_lightning.lines import Record
from kedit_lightning.models import LanguageModel, collate
from kedit_lightning.models.encoding import Row, buckets
from kedit_lightning.models.memory import token_budget
from kedit_lightning.models.progress import steps
from kedit_lightning.probes.base import Finding, Probe, Study, usable
from kedit_lightning.probes.contrast_figure import PLACES, draw, means
from kedit_lightning.probes.lens import ANSWERS, measured, states, unembedded
from kedit_lightning.probes.word_sets import SETS, WordTokens, read_sets

LOGITS = 2**24
"""Logits that are made at a time."""
LEFT_OUT = (7, 8, 132, 376)
"""Cases of MultiCounterFact that the authors' code leaves out."""


@dataclass(frozen=True)
class Question:
    """A prompt and the first tokens of its answers.

    Args:
        edit: The edit.
        row: Its prompt.
        original: The first token of ``target_true``.
        target: The first token of ``target_new``.
    """

    edit: Edit
    row: Row
    original: int
    target: int


@dataclass(frozen=True)
class Seen:
    """What was seen at n prompts; nan where nothing was.

    Args:
        values: By whether the final norm was taken and by name, such as ``original_rank``: shape ``(n, 2, l + 1)``, at
            the two `PLACES`, of the embedding and every block.
        likeliest: The model's own likeliest next token, shape ``(n,)``; -1 where none was seen.
    """

    values: dict[bool, dict[str, Tensor]]
    likeliest: Tensor

    def select(self, prompts: Sequence[int]) -> Seen:
        """Some of the prompts."""
        values = {norm: {name: x[prompts] for name, x in columns.items()} for norm, columns in self.values.items()}
        return Seen(values, self.likeliest[prompts])


class ContrastProbe(Probe):
    """Probability and rank of the original and the target answer over the layers (JEEP, Eqs. 5 and 6, Figs. 2 and 5).

    What the first block is given (layer -1) and what every block puts out is read by the model's head, at the subject's
    last token and at the prompt's last, where the answer is predicted. Of either answer its first token counts: its
    probability, and its rank, which is the number of tokens strictly likelier (0: the likeliest); beside them the
    entropy of the distribution in nats. All are means over prompts with their normal 95 % interval.

    The first token is that of the answer behind the prompt, a space between them, as everywhere else here. Weights in
    half precision give equal logits to unequal tokens, which flatters ranks: set ``base.dtype: float32``.

    Args:
        prompts: So many of the edits' prompts, by chance; null: all (JEEP: 10,000 of MCF).
        seed: Of the choice.
        final_norm: ``no``: softmax(W h + b), as in JEEP's paper and code; ``yes``: with all that the model does behind
            its last block, so that the last layer is the model's own prediction; ``both``: a finding each.
        known: Only prompts whose likeliest next token is the original answer's; others are skipped and counted. JEEP
            takes all: ``no``.
        edited: Make each edit by itself with the editor as well, and look again.
        words: File of word sets, as `kedit words` writes it (JEEP, Fig. 5): of each set the mean rank and the summed
            probability of the distinct first tokens of its words.
        preset: ``released``: the first token of the answer tokenised alone behind the start token, without a space,
            as in the authors' code, which leaves out the cases 7, 8, 132 and 376. What its plots mix up (the embedding
            at the subject's last token as the first point of the prediction's curve; the target's curve in place of the
            factual set's) is not imitated.

    Raises:
        KeditError: The number of prompts is below 1.
    """

    def __init__(
        self,
        prompts: int | None = None,
        seed: int = 0,
        final_norm: bool | Literal["both"] = "both",
        known: bool = True,
        edited: bool = False,
        words: str | None = None,
        preset: Preset = "paper",
    ) -> None:
        if prompts is not None and prompts < 1:
            msg = f"prompts: expected at least 1 or null, got {prompts}"
            raise KeditError(msg)
        self.prompts, self.seed, self.known, self.edited, self.words = prompts, seed, known, edited, words
        self.preset: Preset = preset
        self.norms = (False, True) if final_norm == "both" else (final_norm,)

    def look(self, study: Study) -> Iterator[Finding]:
        """Yields ``contrast`` and, with word sets, ``word_sets``; with ``_final_norm`` where it is taken.

        Raises:
            KeditError: There is no prompt whose original answer is known, or of which there are word sets.
        """
        base = study.base
        sets = None if self.words is None else WordTokens(read_sets(self.words), partial(self._first_of_word, base))
        edits = study.sample(len(study.edits) if self.prompts is None else self.prompts, self.seed)
        left_out = LEFT_OUT if self.preset == "released" else ()
        asked = [edit for edit in edits if edit.case_id not in left_out]
        with_answer = usable(asked, [bool(edit.target_true) for edit in asked], "an edit with target_true")
        questions = [self._question(base, edit) for edit in with_answer]
        if sets is not None:
            there = [edit.case_id in sets for edit in with_answer]
            usable(with_answer, there, f"an edit whose case id is in {self.words}")
        base.restore()
        before = self._see(base, questions, sets)
        skipped = {"without target_true": len(asked) - len(questions)}
        if left_out:
            skipped["left out by the authors"] = len(edits) - len(asked)
        if self.known:
            right = self._said(base, questions, before.likeliest, "target_true")
            usable(with_answer, right, "the model's likeliest next token to be the first of target_true")
            skipped["not answered as expected"] = right.count(False)
            kept = [i for i, yes in enumerate(right) if yes]
            questions, before = [questions[i] for i in kept], before.select(kept)
        if sets is not None:
            skipped["without word sets"] = sum(q.edit.case_id not in sets for q in questions)
        seen = {"unedited": before}
        notes: Record = {"prompts": len(questions), "skipped": skipped, "preset": self.preset, "layer -1": "embedding"}
        notes["answers with one first token"] = sum(q.original == q.target for q in questions)
        if self.edited:
            seen["edited"] = after = self._see_edited(study, questions, sets)
            skipped["edit rejected"] = int((after.likeliest < 0).sum())
            notes["edits whose target is likeliest"] = sum(self._said(base, questions, after.likeliest, "target_new"))
        layers = sorted({site.layer for site in study.editor.sites()}) if self.edited else []
        for norm in self.norms:
            suffix = "_final_norm" if norm else ""
            yield self._finding(f"contrast{suffix}", seen, norm, (*ANSWERS, "entropy"), notes, layers)
            if sets is not None:
                yield self._finding(f"word_sets{suffix}", seen, norm, (*ANSWERS[:1], *SETS), notes, layers)

    # ------------------------------------------------------------------ questions

    def _question(self, base: LanguageModel, edit: Edit) -> Question:
        start = edit.prompt.index("{}")
        row = base.encode(edit.text, None, (start, start + len(edit.subject)))
        original, target = (self._first(base, edit.text, answer) for answer in (edit.target_true, edit.target_new))
        return Question(edit, row, original, target)

    @staticmethod
    def _said(base: LanguageModel, questions: Sequence[Question], likeliest: Tensor, answer: str) -> list[bool]:
        """Whether the likeliest next token of each prompt is the first of an answer as it is continued."""
        edits = [question.edit for question in questions]
        firsts = [base.encode(edit.text, getattr(edit, answer)).targets[0] for edit in edits]
        return [first == said for first, said in zip(firsts, likeliest.tolist(), strict=True)]

    def _first(self, base: LanguageModel, prompt: str, answer: str | None) -> int:
        """The first token of an answer to a prompt."""
        if self.preset == "released":
            return int(base.tokenizer(answer, add_special_tokens=False)["input_ids"][0])
        return base.encode(prompt, answer).targets[0]

    def _first_of_word(self, base: LanguageModel, word: str) -> int:
        """The first token of a word, which stands behind a space, or of punctuation, which does not."""
        if self.preset == "released" or any(map(str.isalnum, word)):
            return self._first(base, ".", word)
        return base.encode(f"a{word}").ids[-1]

    # ------------------------------------------------------------------ looking

    def _see_edited(self, study: Study, questions: Sequence[Question], sets: WordTokens | None) -> Seen:
        """Every prompt on the model with its own edit."""
        parts, done = list[Seen](), 0
        with study.singles.ready(), steps("Edits") as step:
            for block, owners in study.singles.blocks([q.edit for q in questions]):
                asked = questions[done : done + len(block)]
                own = [replace(q, row=replace(q.row, owner=owner)) for q, owner in zip(asked, owners, strict=True)]
                parts.append(self._see(study.base, own, sets, [owner >= 0 for owner in owners]))
                done += len(block)
                step(done, len(questions), "")
        values = {
            norm: {name: torch.cat([part.values[norm][name] for part in parts]) for name in parts[0].values[norm]}
            for norm in self.norms
        }
        return Seen(values, torch.cat([part.likeliest for part in parts]))

    def _see(
        self, base: LanguageModel, questions: Sequence[Question], sets: WordTokens | None, made: Sequence[bool] = ()
    ) -> Seen:
        """Look at prompts in batches: at all, or at those whose edit is made."""
        there = [i for i in range(len(questions)) if not made or made[i]]
        names = [
            f"{name}_{kind}"
            for name in (*ANSWERS, *(SETS if sets is not None else ()))
            for kind in ("probability", "rank")
        ]
        shape = len(questions), len(PLACES), base.num_layers + 1
        values = {norm: {name: torch.full(shape, math.nan) for name in (*names, "entropy")} for norm in self.norms}
        likeliest = torch.full(shape[:1], -1)
        batches = buckets([len(questions[i].row.ids) for i in there], token_budget(base))
        done = 0
        with steps("Prompts", watched=not made) as step:
            for batch in ([there[i] for i in places] for places in batches):
                asked = [questions[i] for i in batch]
                hidden, said = states(base, collate([q.row for q in asked]))
                likeliest[batch] = said.cpu()
                for norm in self.norms:
                    for name, found in self._measure(base, hidden, asked, sets, norm).items():
                        values[norm][name][batch] = found
                step(done := done + len(batch), len(there), "")
        return Seen(values, likeliest)

    def _measure(
        self, base: LanguageModel, hidden: Tensor, asked: Sequence[Question], sets: WordTokens | None, final_norm: bool
    ) -> dict[str, Tensor]:
        """All values of a batch, each of shape ``(b, 2, l + 1)`` on the CPU; by as many prompts as memory takes."""
        vocabulary = int(base.model.get_output_embeddings().weight.shape[0])
        at_once = max(1, LOGITS // (hidden[0, ..., 0].numel() * vocabulary))
        parts = list[dict[str, Tensor]]()
        for start in range(0, len(asked), at_once):
            chunk, some = hidden[start : start + at_once], asked[start : start + at_once]
            logits = unembedded(base, chunk.flatten(0, 2), final_norm=final_norm).view(*chunk.shape[:3], -1)
            first = torch.tensor([[q.original, q.target] for q in some], device=logits.device).T
            mask = None
            if sets is not None:
                mask = sets.mask([q.edit.case_id for q in some], first[0], logits.shape[-1]).to(logits.device)
            parts.append(measured(logits, first, mask))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    # ------------------------------------------------------------------ findings

    def _finding(
        self,
        name: str,
        seen: Mapping[str, Seen],
        final_norm: bool,
        curves: Sequence[str],
        notes: Record,
        layers: Sequence[int],
    ) -> Finding:
        """The means of some of the values, and their picture."""
        rows = [row for model, one in seen.items() for row in means(model, one.values[final_norm], curves)]
        title = f"{notes['prompts']:,} prompts, {'with' if final_norm else 'without'} the final norm"
        return Finding(name, rows, draw(rows, curves, title, layers), notes)
