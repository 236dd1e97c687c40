"""The whole model on whole rows, with vectors added at tokens of sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from kedit_lightning.edits import Site
from kedit_lightning.models.encoding import Batch
from kedit_lightning.models.language_model import LanguageModel


class FullForward:
    """The whole model on whole rows: what `SuffixForward` equals.

    Args:
        base: The model.
        rows: b rows.
        sites: Where vectors will be added: for each site the position in every row, shape ``(b,)``.
        last: The last layer that will be read; None: up to the head.
    """

    def __init__(self, base: LanguageModel, rows: Batch, sites: Mapping[Site, Tensor], last: int | None = None) -> None:
        self.base, self.rows, self.sites = base, rows, sites
        self.last = base.num_layers - 1 if last is None else base.check_layer(last)

    def logits(self, added: Mapping[Site, Tensor], at: tuple[Tensor, Tensor]) -> Tensor:
        """Next-token logits, differentiable in what is added.

        Args:
            added: A vector a row for some or all of the sites, shape ``(b, d)``.
            at: Row and position of p tokens, both of shape ``(p,)``.

        Returns:
            Shape ``(p, vocabulary)``.
        """
        with self.adding(added):
            return self.base.logits(self.rows, at)

    def read(self, added: Mapping[Site, Tensor], wanted: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        """Outputs of sites, differentiable in what is added; layers above the last of them are not run.

        Args:
            added: A vector a row for some or all of the sites, shape ``(b, d)``.
            wanted: For each site that is read the position in every row, shape ``(b,)``.

        Returns:
            For each wanted site the vectors, with what is added there; shape ``(b, d)``.
        """
        with self.adding(added), self.base.tap(wanted) as found:
            self.base.run(self.rows, max(site.layer for site in wanted))
        return found

    def holds_for(self, rows: Batch, sites: Mapping[Site, Tensor], last: int | None) -> bool:
        """Whether it was made from the same."""
        mine = [self.rows.input_ids, self.rows.attention_mask, self.rows.owner, *self.sites.values()]
        other = [rows.input_ids, rows.attention_mask, rows.owner, *sites.values()]
        return self.is_between(sites, last) and all(
            torch.equal(x, y.to(x.device)) for x, y in zip(mine, other, strict=True)
        )

    def is_between(self, sites: Mapping[Site, Tensor], last: int | None) -> bool:
        """Whether it was made for these sites up to this layer, in whatever rows."""
        return list(self.sites) == list(sites) and self.last == (self.base.num_layers - 1 if last is None else last)

    def narrowed(self, rows: Batch, sites: Mapping[Site, Tensor], last: int | None) -> FullForward | None:
        """The same for some of its rows, without running anything; None where that cannot be had."""
        return None

    @contextmanager
    def adding(self, added: Mapping[Site, Tensor]) -> Iterator[None]:
        """Add vectors in the model's forward passes inside the context."""
        with ExitStack() as stack:
            for site, vectors in added.items():
                stack.enter_context(self.base.add(site, self.sites[site], vectors))
            yield


class Forwards:
    """Makes forward passes, and hands the latest out again where the same is asked for, as by EAC's two stages.

    Where fewer of its rows are, since edits are done, the latest is narrowed.

    Args:
        kind: What makes them, as `FullForward` does.
    """

    def __init__(self, kind: Callable[..., FullForward]) -> None:
        self.kind, self._latest = kind, None

    _latest: FullForward | None

    def __call__(
        self, base: LanguageModel, rows: Batch, sites: Mapping[Site, Tensor], last: int | None = None
    ) -> FullForward:
        """As `FullForward`."""
        found = latest = self._latest
        if latest is not None and not latest.holds_for(rows, sites, last):
            found = latest.narrowed(rows, sites, last)
        if found is None:
            del latest
            self.forget()  # before the next is made, for memory
            found = self.kind(base, rows, sites, last)
        self._latest = found
        return found

    def forget(self) -> None:
        """The weights are no longer what they were."""
        self._latest = None
