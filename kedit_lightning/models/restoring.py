"""A prompt that is run with noise on its embeddings, while parts of the clean run are restored: causal tracing's cells.

Restoring a vector at (layer l, token t) of a corrupted run changes, by causality, nothing below layer l and nothing
before token t. So the clean run and the corrupted copies are run once, together, and every cell continues the copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kedit_lightning.edits import Part, Site
from kedit_lightning.models.encoding import Row, collate
from kedit_lightning.models.language_model import LanguageModel
from kedit_lightning.models.memory import token_budget
from kedit_lightning.models.suffix import ELSEWHERE, GROUP_COSTS, similar
from kedit_lightning.models.suffix_group import SuffixGroup, keeping


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

    Attributes:
        answer: The likeliest next token of the clean run.
        high: Its probability there.
        low: Its mean probability over the corrupted copies.

    Raises:
        ModelError: The model keeps no keys and values that a cell could continue.
    """

    @torch.no_grad()
    def __init__(self, base: LanguageModel, row: Row, noise: Tensor, parts: Sequence[Part]) -> None:
        n, t, _ = noise.shape
        self.base, self.copies, self.length = base, n, t
        self._rows = collate([row] * (1 + n)).to(base.device)
        embed = base.model.get_submodule(base.architecture.embed)
        above = {Site(layer, part) for layer in range(base.num_layers) for part in ("attn", "mlp") if part in parts}
        if "mlp" in parts:  # a layer's attention does not change where its MLP is restored
            above |= {Site(layer, "attn") for layer in range(base.num_layers)}

        def corrupt(_: nn.Module, __: object, output: Tensor) -> Tensor:
            return output + torch.cat([torch.zeros_like(noise[:1]), noise]).to(output)

        everyone = torch.arange(1 + n, device=base.device)
        with ExitStack() as stack:
            stack.callback(embed.register_forward_hook(corrupt).remove)
            self._kept = stack.enter_context(keeping(base, [embed, *base.layers, *map(base.module, above)]))
            logits = base.logits(self._rows, at=(everyone, torch.full_like(everyone, t - 1)))
        self.answer = int(logits[0].argmax())
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
        together: dict[Site, list[int]] = {}
        for i, cell in enumerate(cells):
            final = cell.position == self.length - 1
            if cell.part == "block" and cell.last == self.base.num_layers - 1 and final:
                found[i] = self.high
            elif cell.position >= self._touched and (final or self._goes_on(cell)):
                together.setdefault(Site(cell.first, cell.part), []).append(i)
        most = max(1, token_budget(self.base) // (self.copies * self.length))
        costs = GROUP_COSTS.get(self.base.device.type, ELSEWHERE) // self.copies
        for site, places in together.items():
            lengths = [self.length - cells[i].position for i in places]
            for group in similar(lengths, costs):
                for start in range(0, len(group), most):
                    some = [places[k] for k in group[start : start + most]]
                    found[some] = self._restored(site, [cells[i] for i in some])
        return found

    def _goes_on(self, cell: Cell) -> bool:
        """Whether a later layer's attention sees what a cell restores."""
        return cell.first < self.base.num_layers - 1

    def _restored(self, site: Site, cells: Sequence[Cell]) -> Tensor:
        """The scores of cells that begin at a site."""
        n, device = self.copies, self.base.device
        at = torch.tensor([cell.position for cell in cells], device=device).repeat_interleave(n)
        last = torch.tensor([cell.last for cell in cells], device=device).repeat_interleave(n)
        line = torch.arange(1, n + 1, device=device).repeat(len(cells))
        every, top = torch.arange(len(at), device=device), self.base.num_layers - 1
        suffix = SuffixGroup(self.base, self._rows.select(line), {site: at}, top, self._kept, line)
        read = every, self.length - 1 - at
        with ExitStack() as stack:
            stack.enter_context(suffix.cut(every, *read, top).adding({}))
            for layer in range(site.layer, int(last.max()) + 1):
                clean = self._clean(Site(layer, site.part))[at]
                rows = torch.nonzero(last >= layer)[:, 0]
                stack.enter_context(self.base.add(Site(layer, site.part), torch.zeros_like(at), clean, instead=rows))
            found = self._probabilities(self.base.logits(suffix.rows, at=read))
        return found.view(len(cells), n).mean(dim=1)

    def _clean(self, site: Site) -> Tensor:
        """What a site puts out in the clean run, shape ``(t, d)``."""
        output = self._kept.known[self.base.module(site)]
        hidden = output[0] if isinstance(output, tuple) else output
        return hidden.reshape(1 + self.copies, self.length, -1)[0]

    def _probabilities(self, logits: Tensor) -> Tensor:
        """Of the answer, from logits of shape ``(b, vocabulary)``; float64, on the CPU."""
        return logits.float().log_softmax(dim=-1)[:, self.answer].double().exp().cpu()
