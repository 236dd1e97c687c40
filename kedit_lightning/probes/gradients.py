"""Watching the gradients of an editor's own loss while its stages run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from kedit_lightning.editors import Editor
from kedit_lightning.edits import Edit, Site, Token
from kedit_lightning.models import Batch, LanguageModel
from kedit_lightning.models.full import FullForward
from kedit_lightning.probes.token_classes import CLASSES, classes_of, token_classes

Prompts = Literal["bare", "all"]
"""Which of an edit's rows count: its prompt by itself, or in every context template."""

Told = Callable[[int, Tensor], None]
"""Called in a backward pass with a layer, and the gradient's norm at every token of its output, shape ``(b, t)``."""


class WatchedForward(FullForward):
    """The whole model on whole rows, which tells of the gradients of the blocks that what is added can change.

    Args:
        base: The model.
        rows: b rows.
        sites: Where vectors will be added.
        last: The last layer that will be read; None: up to the head.
        watch: Gives whom to tell of these rows.
    """

    def __init__(
        self,
        base: LanguageModel,
        rows: Batch,
        sites: Mapping[Site, Tensor],
        last: int | None = None,
        *,
        watch: Callable[[Batch], Told],
    ) -> None:
        super().__init__(base, rows, sites, last)
        self.tell = watch(rows)

    @contextmanager
    def adding(self, added: Mapping[Site, Tensor]) -> Iterator[None]:
        """As `FullForward.adding`."""
        with super().adding(added), ExitStack() as stack:
            for layer in range(self.last + 1):
                block = self.base.module(Site(layer, "block"))
                stack.callback(block.register_forward_hook(partial(self._see, layer)).remove)
            yield

    def _see(self, layer: int, _: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(  # type: ignore[no-untyped-call] # torch 2.11 gives it no types
                lambda gradient: self.tell(layer, self._norms(gradient))
            )

    def _norms(self, gradient: Tensor) -> Tensor:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        norms: Tensor = torch.linalg.vector_norm(gradient, dim=-1, dtype=wide)
        return norms.view(len(self.rows), -1).cpu()


class Gradients:
    """Norms of gradients while an editor's stages run, by edit, step, layer and token class.

    Args:
        editor: The editor.
        edits: n edits.
        steps: How many steps of each are kept.
        prompts: Which rows count.

    Attributes:
        maps: By the layer that the pass is of, and the stage: shape ``(n, steps, layers, 7)``, nan where there is none.
    """

    def __init__(self, editor: Editor, edits: Sequence[Edit], steps: int, prompts: Prompts) -> None:
        self.editor, self.prompts, self.rejected = editor, prompts, 0
        self.place = {edit: i for i, edit in enumerate(edits)}
        self.shape = len(edits), steps, editor.base.num_layers, len(CLASSES)
        self.maps: dict[tuple[int, str], Tensor] = {}
        self.classes = [classes_of(editor.base, edit) for edit in edits]
        self.prefixes = [classes.count("rp") for classes in self.classes]

    @property
    def used(self) -> int:
        """How many edits have a gradient."""
        there = [~values.isnan().flatten(1).all(dim=1) for values in self.maps.values()]
        return int(torch.stack(there).any(dim=0).sum()) if there else 0

    @property
    def missing(self) -> list[str]:
        """The token classes of which no prompt has a token."""
        return [token for token in CLASSES if not any(token in classes for classes in self.classes)]

    def drop(self, edits: Sequence[Edit]) -> None:
        """Forget edits that were rejected."""
        self.rejected += len(edits)
        for values in self.maps.values():
            values[[self.place[edit] for edit in edits]] = torch.nan

    def watch(self, rows: Batch) -> Told:
        """Whom to tell of the gradients at rows of the edits that are under way."""
        asks = torch.nonzero((rows.labels >= 0).any(dim=1).cpu())[:, 0]
        owner, prompts = rows.owner.cpu()[asks], rows.owner.cpu()[asks].bincount()
        if self.prompts == "bare":  # the first of an edit's rows
            first = torch.ones_like(owner, dtype=torch.bool)
            first[1:] = owner[1:] != owner[:-1]
            asks, owner = asks[first], owner[first]
        spans = [rows.at[token].cpu()[asks] for token in (Token.SUBJECT_FIRST, Token.SUBJECT_LAST, Token.PROMPT_LAST)]
        ends, names = spans[-1], ["", *CLASSES]
        kinds = torch.full((len(asks), rows.input_ids.shape[1]), -1)
        for line, (i, first, last, end) in enumerate(zip(owner.tolist(), *map(Tensor.tolist, spans), strict=True)):
            begin = max(0, first - self.prefixes[self.place[self.editor.edits[i]]])
            classes = token_classes(end + 1, first, last, begin)  # a subject behind a template may have other tokens
            kinds[line, : end + 1] = torch.tensor([names.index(token) - 1 for token in classes])
        below = kinds.clone()
        below[torch.arange(len(ends)), ends] = -1
        asked = torch.nonzero(prompts)[:, 0]
        share = (prompts / owner.bincount(minlength=len(prompts)))[owner]

        def tell(layer: int, norms: Tensor) -> None:
            of_row = pooled(norms[asks], below if layer == self.shape[2] - 1 else kinds) * share[:, None]
            self._add(layer, of_row.new_zeros(len(prompts), len(CLASSES)).index_add(0, owner, of_row), asked)

        return tell

    def _add(self, layer: int, found: Tensor, edits: Tensor) -> None:
        """Keep what is found of a layer, ``(m, 7)``, for those of these edits that make the step."""
        outcome = self.editor.outcome
        steps = outcome.steps[edits] - 1
        edits = edits[~outcome.converged[edits] & (steps < self.shape[1])]
        place = [self.place[self.editor.edits[i]] for i in edits.tolist()]
        stage = self.editor.layer, outcome.stage
        if stage not in self.maps:
            self.maps[stage] = torch.full(self.shape, torch.nan)
        self.maps[stage][place, outcome.steps[edits] - 1, layer] = found[edits].float()


def pooled(norms: Tensor, kinds: Tensor) -> Tensor:
    """Mean over the tokens of each class.

    Args:
        norms: Shape ``(r, t)``.
        kinds: The class of each token, by its number; -1: none; shape ``(r, t)``.

    Returns:
        Shape ``(r, 7)``, nan where a row has no token of a class.

    >>> pooled(torch.tensor([[1.0, 2.0, 4.0, 9.0]]), torch.tensor([[0, 3, 3, -1]]))[0].tolist()
    [1.0, nan, nan, 3.0, nan, nan, nan]
    """
    member = nn.functional.one_hot(kinds + 1, len(CLASSES) + 1)[..., 1:].to(norms.dtype)
    return (member * norms[..., None]).sum(dim=1) / member.sum(dim=1)
