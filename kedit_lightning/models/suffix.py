"""Forward passes with vectors added, whole or reduced to what the vectors can change.

A vector added at (layer l, token s) changes, by causality, nothing below layer l and nothing before token s. So
`SuffixForward` runs the whole rows once without gradient, keeps what does not change, and then repeats the rest alone.
It is the model's own forward that runs, on each row's last tokens against a cache of the first ones, while the blocks
below hand on what they are known to put out: masks, windows, positions, scales and soft-caps stay the family's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kedit_lightning.edits import Site
from kedit_lightning.errors import ModelError
from kedit_lightning.models.encoding import Batch
from kedit_lightning.models.language_model import LanguageModel

Output = Tensor | tuple[Tensor, ...]
"""What a block puts out: hidden states, shape ``(b, t, d)``, or a tuple that starts with them."""


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
        with self._adding(added):
            return self.base.logits(self.rows, at)

    def read(self, added: Mapping[Site, Tensor], wanted: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        """Outputs of sites, differentiable in what is added; layers above the last of them are not run.

        Args:
            added: A vector a row for some or all of the sites, shape ``(b, d)``.
            wanted: For each site that is read the position in every row, shape ``(b,)``.

        Returns:
            For each wanted site the vectors, with what is added there; shape ``(b, d)``.
        """
        with self._adding(added), self.base.tap(wanted) as found:
            self.base.run(self.rows, max(site.layer for site in wanted))
        return found

    @contextmanager
    def _adding(self, added: Mapping[Site, Tensor]) -> Iterator[None]:
        with ExitStack() as stack:
            for site, vectors in added.items():
                stack.enter_context(self.base.add(site, self.sites[site], vectors))
            yield


class SuffixForward(FullForward):
    """Only the layers and tokens that can change; holds for the weights as they are at construction.

    Rows start at different tokens: what stands before is padded on the left, the rest on the right. A row's own tokens
    thereby stay side by side, and attention windows keep their width.

    Args:
        base: The model.
        rows: b rows.
        sites: Where vectors will be added: for each site the position in every row, shape ``(b,)``. A row's start is
            the first of its positions.
        last: The last layer that will be read; None: up to the head.

    Raises:
        ModelError: The model keeps no keys and values that a suffix could attend to.
    """

    @torch.no_grad()
    def __init__(self, base: LanguageModel, rows: Batch, sites: Mapping[Site, Tensor], last: int | None = None) -> None:
        rows = rows.to(base.device)
        at = torch.stack([position.to(base.device) for position in sites.values()])
        self._start, self._end = at.amin(dim=0), rows.attention_mask.sum(dim=1)
        super().__init__(base, rows, dict(zip(sites, at - self._start, strict=True)), last)
        self._first = min(map(_first_layer, sites))
        self._width = int((at - self._start).max()) + 1

        cache, entering = DynamicCache(), list[Output]()
        with ExitStack() as stack:
            stack.enter_context(_called_with(base.model, past_key_values=cache, use_cache=True))
            for block in base.layers[: self._first][-1:]:
                hook = block.register_forward_hook(lambda _, __, output: entering.append(output))
                stack.callback(hook.remove)
            base.run(rows, self.last)
        t = rows.input_ids.shape[1]
        if [cache.get_seq_length(layer) for layer in range(len(cache))] != [t] * (self.last + 1):
            msg = "this model keeps no plain cache of keys and values in every layer: set `forward: full`"
            raise ModelError(msg)

        before = torch.arange(-int(self._start.max()), 0, device=base.device) + self._start[:, None]
        after = torch.arange(int((self._end - self._start).max()), device=base.device) + self._start[:, None]
        after = after.clamp(max=t - 1)
        layers: list[Any] = cache.layers[self._first :]
        for layer in layers:
            where = before.clamp(min=0)[:, None, :, None].to(layer.keys.device)
            layer.keys, layer.values = (x.take_along_dim(where, dim=2) for x in (layer.keys, layer.values))
        # Masks are sized by the cache of the first layer, even where that layer is not run.
        self._past = layers[:1] * self._first + layers
        self._entering = [
            _map(output, lambda hidden: hidden.take_along_dim(after[..., None].to(hidden.device), dim=1))
            for output in entering
        ]
        self._ids, self._position_ids, self._before = rows.input_ids.gather(1, after), after, before >= 0

    def logits(self, added: Mapping[Site, Tensor], at: tuple[Tensor, Tensor]) -> Tensor:
        """As `FullForward.logits`.

        Raises:
            ValueError: A position is outside its row's suffix, or the layers end below the head.
        """
        if self.last < self.base.num_layers - 1:
            msg = f"expected sites up to layer {self.last} to be read, as was said at construction, got logits"
            raise ValueError(msg)
        row = at[0].to(self._start.device)
        position = self._shift(row, at[1])
        with self._suffix(position):
            return super().logits(added, (row, position))

    def read(self, added: Mapping[Site, Tensor], wanted: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        """As `FullForward.read`.

        Raises:
            ValueError: A position is outside its row's suffix, or a site outside the layers that are run.
        """
        for site in wanted:
            if _first_layer(site) < self._first or site.layer > self.last:
                msg = f"expected sites from where vectors are added up to layer {self.last}, got {site}"
                raise ValueError(msg)
        every = torch.arange(len(self.rows), device=self._start.device)
        wanted = {site: self._shift(every, position) for site, position in wanted.items()}
        with self._suffix(torch.cat(list(wanted.values()))):
            return super().read(added, wanted)

    def _shift(self, row: Tensor, position: Tensor) -> Tensor:
        """Positions counted from their rows' starts."""
        position, start, end = position.to(row.device), self._start[row], self._end[row]
        if len(outside := ((position < start) | (position >= end)).nonzero()):
            i = int(outside[0])
            where = f"from {int(start[i])}, where a vector is added first, to its last, {int(end[i]) - 1}"
            msg = f"expected positions of row {int(row[i])} {where}; got {int(position[i])}"
            raise ValueError(msg)
        return position - start

    @contextmanager
    def _suffix(self, position: Tensor) -> Iterator[None]:
        """Reduce the model's forward passes inside the context to the suffixes, up to the last position asked for."""
        q = max([self._width, *(position + 1).tolist()])
        ids, past = self._ids[:, :q], DynamicCache()
        past.layers = [copy(layer) for layer in self._past]  # a layer's tensors are replaced as it grows, never changed
        with ExitStack() as stack:
            given = _called_with(
                self.base.model,
                input_ids=ids,
                position_ids=self._position_ids[:, :q],
                # Padding on the right comes after all that is read: causality hides it.
                attention_mask=torch.cat([self._before, torch.ones_like(ids)], dim=1),
                past_key_values=past,
                use_cache=True,
            )
            stack.enter_context(given)
            for entering in self._entering:
                output = _map(entering, lambda hidden: hidden[:, :q])
                for block in self.base.layers[: self._first]:
                    stack.enter_context(_returning(block, output))
            yield


def _first_layer(site: Site) -> int:
    """The first layer that runs for a vector added at a site: its own, or the next one where it is the block's end."""
    return site.layer + (site.part == "block")


def _map(output: Output, function: Callable[[Tensor], Tensor]) -> Output:
    """A block's output with other hidden states, in a tuple where the family has one."""
    return (function(output[0]),) if isinstance(output, tuple) else function(output)


@contextmanager
def _called_with(model: nn.Module, **given: object) -> Iterator[None]:
    """Replace keyword arguments of a model's calls inside the context."""
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | given), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _returning(block: nn.Module, output: Output) -> Iterator[None]:
    """Let a block return what is known already; its hooks run on that."""
    own = vars(block).get("forward")  # a device map puts one there
    block.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own
