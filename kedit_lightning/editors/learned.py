"""Editors that have learned to edit: a hypernetwork turns keys and gradients of the edits into weight updates."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, device

from kedit_lightning import objectives
from kedit_lightning.data.prompts import ContextTemplates
from kedit_lightning.delta import WeightDelta
from kedit_lightning.editors.base import Editor
from kedit_lightning.editors.stages import Loss, Stage
from kedit_lightning.edits import Edit, Site
from kedit_lightning.errors import RejectedError
from kedit_lightning.hypernetworks import files
from kedit_lightning.hypernetworks.capture import Capture, check_dtype, counted, memory, require, without_zeros
from kedit_lightning.hypernetworks.network import Factors, Hypernetwork
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.processes import share, summed
from kedit_lightning.solvers import times


class LearnedEditor(Editor):
    """An editor whose only step is one forward and backward pass over the edits, and whose update a network gives.

    `locate`: nothing. `stages`: the answers' loss, evaluated once; keys and gradients of the edited matrices are kept.
    `write`: what the hypernetwork makes of them, for each matrix. They are read in the bare prompts on the model as it
    stands before the batch, and kept in main memory, ``4 (d + k)`` bytes a token and matrix; where updates add up and
    the tokens are more than d, it is their sum that is kept.

    Args:
        base: The frozen base model.
        hypernetwork: The file that the training leaves, its folder, or that of its versions (the newest).
        scale: Factor of the update.
        max_tokens: As in `Editor`.

    Raises:
        KeditError: The hypernetwork cannot be used with this model.
    """

    kind: ClassVar[type[Hypernetwork]]
    """The hypernetwork that it edits with."""
    lacks = {"compress": "a hypernetwork optimises no value that could be compressed"}  # noqa: RUF012
    """By setting of other editors why this one does not take it."""

    def __init__(self, base: LanguageModel, hypernetwork: str, *, scale: float, max_tokens: int | None) -> None:
        check_dtype(base)
        network, self.purpose, self.checksum = files.load(Path(hypernetwork), base, self.kind)
        bare = ContextTemplates(templates=[["{}"]])
        super().__init__(
            base, self.purpose.layers, mom2_adjustment=False, context_templates=bare, max_tokens=max_tokens
        )
        self.hypernetwork, self.scale = network, scale

    @property
    def config(self) -> dict[str, Any]:
        """Its own settings as plain data, and which hypernetwork it is."""
        own = inspect.signature(type(self).__init__).parameters
        found = {key: value for key, value in super().config.items() if key in own}
        return found | {"hypernetwork_sha256": self.checksum}

    def sites(self) -> list[Site]:
        """The matrices that the hypernetwork edits."""
        return self.purpose.sites

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Nothing is trained: the hypernetwork takes no gradient."""
        return torch.optim.SGD(self.hypernetwork.parameters(), lr=0.0)

    # ------------------------------------------------------------------ the stage

    def begin(self, edits: Sequence[Edit], pass_: int = 0) -> None:
        """Get ready for one edit batch.

        Raises:
            KeditError: There are more edits than memory for their keys and gradients.
        """
        super().begin(edits, pass_)
        self.lengths = torch.zeros(len(edits), dtype=torch.long)
        for part in self.parts:
            self.lengths[part.index] = counted(part.bare_rows, self.purpose.tokens).sum(dim=1)
        self.found: dict[int, dict[Site, Factors]] = {}
        tokens, shapes = int(self.lengths.sum()), self._shapes()
        self.total: dict[Site, Tensor] = {}
        if self.kind.additive and not self.side_by_side and tokens > min(d for d, _ in shapes):
            self.total = {
                site: torch.zeros(shape, dtype=torch.float64) for site, shape in zip(self.sites(), shapes, strict=True)
            }
        else:
            require(shapes, len(edits), tokens)
        self.broken = torch.zeros(len(edits))

    def locate(self) -> None:
        """No value is optimised."""

    def stages(self) -> Iterator[Stage]:
        """The loss of the answers, once; its gradients are kept, and no parameter is there that they could move."""
        never = lambda loss: torch.zeros_like(loss.total, dtype=torch.bool)  # noqa: E731
        yield Stage("gradient", (), self._answers, 1, never, observe=self._keep, updates_last=True)

    def _answers(self) -> Callable[[], Loss]:
        m = len(self.batch)
        mine = share(m).to(self.batch.edit.device)
        rows = self.batch.bare_rows.select(mine)

        def loss() -> Loss:
            self._capture = Capture(self.base, rows, self.sites(), self.purpose.tokens)
            nll, missed = self._capture.forward()
            values = nll, (-nll.detach()).exp(), missed
            of_edits = [objectives.sum_over_rows(value.to(mine.device), mine, m) for value in values]
            return Loss({"nll": of_edits[0]}, *of_edits[1:])

        return loss

    def _keep(self, _: Tensor) -> None:
        """Take the factors of this process's edits, or add up their updates, where that is what they come to.

        One evaluation is all there is, so the stage has converged.
        """
        self.outcome.converged[self.batch.index] = True
        places = self.batch.index[share(len(self.batch))].tolist()
        lengths = self.lengths[places].tolist()
        network = self.hypernetwork.to(self.base.device)
        for site, factors in self._capture.factors().items() if places else ():
            split = zip(places, *(torch.split(each.cpu(), lengths) for each in factors), strict=True)
            for place, keys, grads in split:
                self.broken[place] += not (keys.isfinite().all() and grads.isfinite().all())
                if not self.total:
                    self.found.setdefault(place, {})[site] = Factors(keys, grads)
            if self.total:
                self.total[site] += times(*network.update(self.base.name(site), without_zeros(factors))).cpu()
        del self._capture

    def check_values(self) -> None:
        """Refuse edits with gradients that are not finite.

        Raises:
            RejectedError: There are such edits.
        """
        super().check_values()
        why = "its gradient is not finite; load the model in float32 or bfloat16"
        if places := summed(self.broken).nonzero()[:, 0].tolist():
            raise RejectedError({i: f"case {self.edits[i].case_id}: {why}" for i in places})

    # ------------------------------------------------------------------ what comes of it

    def factors(self, site: Site, edits: slice) -> Factors:
        """Keys and gradients of some edits at a matrix, from all processes; tokens that add nothing are left out."""
        d, k = self.base.weight(site).shape
        each = []
        for place in range(len(self.edits))[edits]:
            length = int(self.lengths[place])
            none = {site: Factors(torch.zeros(length, k), torch.zeros(length, d))}
            each.append(self.found.get(place, none)[site])
        return without_zeros(Factors(*(summed(torch.cat(parts)) for parts in zip(*each, strict=True))))

    def write(self) -> Generator[WeightDelta, None, None]:
        """The update of each matrix; all factors were read before the first is written."""
        network = self.hypernetwork.to(self.base.device)
        for site in self.sites():
            name = self.base.name(site)
            if self.total:
                yield WeightDelta(name, dense=(self.scale * summed(self.total.pop(site))).float(), edit=0)
                continue
            for edits in self.solved_together():
                try:
                    left, right = network.update(name, self.factors(site, edits))
                except ValueError as error:
                    raise self.unsolvable(edits.start, name, error) from error
                yield WeightDelta.low_rank(name, self.scale * left, right, edit=edits.start)
        self.found.clear()

    def update_size(self, n: int) -> int:
        """Bytes of updates of n edits at most: of a rank of their tokens, or dense."""
        return 4 * sum(min(LONG * n * (out + inner), out * inner) for out, inner in self._shapes())

    def needs(self, n: int) -> dict[device, tuple[int, int]]:
        """Factors in main memory, and the solve with one matrix."""
        k = max(self.base.weight(site).shape[1] for site in self.sites())
        return {device("cpu"): (8 * 3 * k * k, memory(self._shapes(), LONG))}

    def _shapes(self) -> list[torch.Size]:
        return [self.base.weight(site).shape for site in self.sites()]


LONG = 32
"""Tokens of an edit, for what is estimated before any is read."""
