"""A prompt that is run with noise on its embeddings, while parts of the clean run are restored: causal tracing's cells.

Restoring a vector at (layer l, token t) of a corrupted run changes, by causality, nothing below layer l and nothing
before token t. So the clean run and the corrupted copies are run once, together, and every cell continues the copies.
Of cells that begin together, those with fewer layers continue the one with the most, from where they end.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kedit_lightning.edits import Part, Site
from kedit_lightning.models.encoding import Row, collate
from kedit_lightning.models.language_model import LanguageModel
from kedit_lightning.models.memory import token_budget
from kedit_lightning.models.suffix import ELSEWHERE, GROUP_COSTS, similar
from kedit_lightning.models.suffix_group import Kept, SuffixGroup, first_layer, hidden_of, keeping, unchanged


@dataclass(frozen=True)
class Cell:
    """What is restored: the outputs of one part of some layers, at one token.

    Args:
        position: The token.
        part: The part.
        first: The first of the layers.
        last: The last of them.
    """

    position: int
    part: Part
    first: int
    last: int


class CorruptedRun:
    """A prompt, run once as it is and several times with noise added to its token embeddings (ROME, section 2.1).

    Args:
        base: The model.
        row: The prompt.
        noise: What is added to the output of the token embedding in each copy, shape ``(n, t, d)``.
        parts: The parts of layers that will be restored.
        answer: The token that is asked for; null: the likeliest next one of the clean run.

    Attributes:
        answer: The token that is asked for.
        high: Its probability there.
        low: Its mean probability over the corrupted copies.

    Raises:
        ModelError: The model keeps no keys and values that a cell could continue.
    """

    @torch.no_grad()
    def __init__(
        self, base: LanguageModel, row: Row, noise: Tensor, parts: Sequence[Part], answer: int | None = None
    ) -> None:
        n, t, _ = noise.shape
        self.base, self.copies, self.length = base, n, t
        self._rows = collate([row] * (1 + n)).to(base.device)
        embed = base.model.get_submodule(base.architecture.embed)
        sites = [Site(layer, part) for layer in range(base.num_layers) for part in parts]
        modules = dict.fromkeys(module for site in sites for module in unchanged(base, [site]))

        def corrupt(_: nn.Module, __: object, output: Tensor) -> Tensor:
            return output + torch.cat([torch.zeros_like(noise[:1]), noise]).to(output)

        everyone = torch.arange(1 + n, device=base.device)
        with ExitStack() as stack:
            stack.callback(embed.register_forward_hook(corrupt).remove)
            self._kept = stack.enter_context(keeping(base, modules))
            logits = base.logits(self._rows, at=(everyone, torch.full_like(everyone, t - 1)))
        self.answer = int(logits[0].argmax()) if answer is None else answer
        found = self._probabilities(logits)
        self.high, self.low = float(found[0]), float(found[1:].mean())
        touched = noise.ne(0).any(dim=2).any(dim=0).nonzero()
        self._touched = int(touched[0]) if len(touched) else t

    @torch.no_grad()
    def scores(self, cells: Sequence[Cell]) -> Tensor:
        """The answer's mean probability over the copies, with each of some cells restored.

        Args:
            cells: m cells.

        Returns:
            Shape ``(m,)``, float64, on the CPU.
        """
        found = torch.full((len(cells),), self.low, dtype=torch.float64)
        wanted: dict[Cell, list[int]] = {}
        for i, cell in enumerate(cells):
            final, top = cell.position == self.length - 1, self.base.num_layers - 1
            if cell.part == "block" and cell.last == top and final:
                found[i] = self.high
            elif cell.position >= self._touched and (final or cell.first < top):  # a later attention layer sees it
                wanted.setdefault(cell if final else replace(cell, last=min(cell.last, top - 1)), []).append(i)
        together: dict[Site, dict[int, list[Cell]]] = {}
        for cell in wanted:
            together.setdefault(Site(cell.first, cell.part), {}).setdefault(cell.position, []).append(cell)
        most = max(1, token_budget(self.base) // (self.copies * self.length))
        costs = GROUP_COSTS.get(self.base.device.type, ELSEWHERE) // self.copies
        for site, tokens in together.items():
            positions = list(tokens)
            for group in similar([self.length - position for position in positions], costs):
                for start in range(0, len(group), most):
                    some = [cell for k in group[start : start + most] for cell in tokens[positions[k]]]
                    for cell, score in self._restored(site, some).items():
                        found[wanted[cell]] = score
        return found

    def _restored(self, site: Site, cells: Sequence[Cell]) -> dict[Cell, float]:
        """The scores of cells that begin at a site."""
        n, device, top = self.copies, self.base.device, self.base.num_layers - 1
        most = {cell.position: cell.last for cell in sorted(cells, key=lambda cell: cell.last)}
        first = [cell for cell in cells if cell.last >= min(most[cell.position], top - 1)]
        at = torch.tensor([cell.position for cell in first], device=device).repeat_interleave(n)
        line = torch.arange(1, n + 1, device=device).repeat(len(first))
        suffix = _Suffix(self.base, self._rows.select(line), {site: at}, top, self._kept, line)
        rest: dict[Site, list[Cell]] = {}
        for cell in (cell for cell in cells if cell not in first):
            rest.setdefault(Site(cell.last + 1, cell.part), []).append(cell)
        with keeping(self.base, {module for end in rest for module in unchanged(self.base, [end])}) as kept:
            scores = self._run(suffix, site, first, torch.arange(len(at), device=device))
        place = {cell.position: n * i for i, cell in enumerate(first)}
        for end, some in rest.items():
            begin = torch.tensor([place[cell.position] for cell in some], device=device)
            lines = (begin[:, None] + torch.arange(n, device=device)).flatten()
            scores |= self._run(suffix.begun(end, kept), end, some, lines)
        return scores

    def _run(self, suffix: SuffixGroup, site: Site, cells: Sequence[Cell], lines: Tensor) -> dict[Cell, float]:
        """The scores of cells, whose copies are some lines of a suffix; from a site on."""
        n, top, every = self.copies, self.base.num_layers - 1, torch.arange(len(lines), device=lines.device)
        at, last = (
            torch.tensor(values, device=lines.device).repeat_interleave(n)
            for values in ([cell.position for cell in cells], [cell.last for cell in cells])
        )
        read = every, self.length - 1 - at
        cut = suffix.cut(lines, *read, top)
        with ExitStack() as stack:
            stack.enter_context(cut.adding({}))
            for layer in range(site.layer, int(last.max()) + 1):
                clean = self._clean(Site(layer, site.part))
                clean = clean[at.to(clean.device)]
                rows = torch.nonzero(last >= layer)[:, 0]
                stack.enter_context(self.base.add(Site(layer, site.part), torch.zeros_like(at), clean, instead=rows))
            found = self._probabilities(self.base.logits(cut.rows, at=read))
        return dict(zip(cells, found.view(len(cells), n).mean(dim=1).tolist(), strict=True))

    def _clean(self, site: Site) -> Tensor:
        """What a site puts out in the clean run, shape ``(t, d)``."""
        hidden = hidden_of(self._kept.known[self.base.module(site)])
        return hidden.reshape(1 + self.copies, self.length, -1)[0]

    def _probabilities(self, logits: Tensor) -> Tensor:
        """Of the answer, from logits of shape ``(b, vocabulary)``; float64, on the CPU."""
        return logits.float().log_softmax(dim=-1)[:, self.answer].double().exp().cpu()


class _Suffix(SuffixGroup):
    """Suffixes that can be gone on with from a later site."""

    def begun(self, site: Site, kept: Kept) -> SuffixGroup:
        """The same from a site on, before which all is as it was kept when they ran."""
        some, below = copy(self), self.base.layers[: first_layer(site)]
        outputs = {module: kept.known[module] for module in unchanged(self.base, [site])}
        some._known = {module: output for module, output in outputs.items() if hidden_of(output).ndim == 3}
        some._known |= {block: some._known[below[-1]] for block in below}
        return some
