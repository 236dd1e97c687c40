"""The suffixes of rows: their last tokens, in the layers that can change, against what is kept of the rest.

It is the model's own forward that runs, on each row's last tokens against a cache of the first ones, while the modules
before hand on what they are known to put out: masks, windows, positions, scales and soft-caps stay the family's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kedit_lightning.edits import Site
from kedit_lightning.errors import ModelError
from kedit_lightning.models.encoding import Batch
from kedit_lightning.models.full import FullForward
from kedit_lightning.models.language_model import LanguageModel

Output = Tensor | tuple[Any, ...]
"""What a module puts out: hidden states, shape ``(b, t, d)``, or a tuple that starts with them."""


@dataclass(frozen=True)
class Kept:
    """What is kept of a forward pass on whole rows.

    Args:
        known: What modules put out.
        cache: Keys and values of every layer.
    """

    known: dict[nn.Module, Output]
    cache: DynamicCache


@contextmanager
def keeping(base: LanguageModel, modules: Iterable[nn.Module]) -> Iterator[Kept]:
    """Keep what modules put out, and all keys and values, in a forward pass inside the context."""
    kept = Kept({}, DynamicCache())

    def keep(module: nn.Module, _: object, output: Output) -> None:
        kept.known[module] = _map(output, Tensor.clone)  # Falcon adds to it in place

    with ExitStack() as stack:
        stack.enter_context(_called_with(base.model, past_key_values=kept.cache, use_cache=True))
        for module in modules:
            stack.callback(module.register_forward_hook(keep).remove)
        yield kept


class SuffixGroup(FullForward):
    """The suffixes of b rows, and what does not change in them.

    Rows start at different tokens: what stands before is padded on the left, the rest on the right. A row's own tokens
    thereby stay side by side, and attention windows keep their width. `cut` says what is read, before anything runs.

    Args:
        base: The model.
        rows: b rows.
        sites: Where vectors will be added: for each site the position in every row, shape ``(b,)``.
        last: The last layer that will be read.
        kept: What is kept of a forward pass already, so that none is run.
        line: Of each row the row of that pass that it continues, shape ``(b,)``.

    Raises:
        ModelError: The model keeps no keys and values that a suffix could attend to.
    """

    @torch.no_grad()
    def __init__(
        self,
        base: LanguageModel,
        rows: Batch,
        sites: Mapping[Site, Tensor],
        last: int,
        kept: Kept | None = None,
        line: Tensor | None = None,
    ) -> None:
        start, end = start_of(sites), rows.attention_mask.sum(dim=1)
        super().__init__(base, rows, {site: at - start for site, at in sites.items()}, last)
        t, first = rows.input_ids.shape[1], min(map(first_layer, sites))
        before = torch.arange(-int(start.max()), 0, device=base.device) + start[:, None]
        after = torch.arange(int((end - start).max()), device=base.device) + start[:, None]
        after = after.clamp(max=t - 1)
        if kept is None:
            with keeping(base, unchanged(base, sites)) as kept:
                base.run(rows, last)
        cache = kept.cache
        if [cache.get_seq_length(layer) for layer in range(len(cache))] != [t] * (last + 1):
            msg = (
                "this model keeps no plain cache of keys and values in every layer: editors can do without (set "
                "`forward: full`), causal traces cannot"
            )
            raise ModelError(msg)

        def some(x: Tensor, where: Tensor, dim: int) -> Tensor:
            return (x if line is None else x[line.to(x.device)]).take_along_dim(where.to(x.device), dim=dim)

        self._known = {
            module: _map(kept.known[module], lambda x: some(x, after[..., None], 1))
            for module in unchanged(base, sites)
            if hidden_of(kept.known[module]).ndim == 3  # not OPT's MLP, which runs on flattened rows
        }
        layers: list[Any] = cache.layers[first:] if line is None else [copy(layer) for layer in cache.layers[first:]]
        for layer in layers:
            where = before.clamp(min=0)[:, None, :, None]
            layer.keys, layer.values = (some(x, where, 2) for x in (layer.keys, layer.values))
        # Masks are sized by the cache of the first layer, even where that layer is not run.
        self._past = layers[:1] * first + layers
        for block in base.layers[: max(first - 1, 0)]:
            self._known[block] = self._known[base.layers[first - 1]]  # whatever it hands on, that one puts this out
        # Padding on the right comes after all that is read: causality hides it.
        self._mask = torch.cat([before >= 0, torch.ones_like(after, dtype=torch.bool)], dim=1).long()
        self._ids, self._position_ids = rows.input_ids.gather(1, after), after
        self._read: tuple[int, int, Tensor]  # the last layer, of how many tokens, and which of them in each row

    def select(self, lines: Tensor) -> SuffixGroup:
        """The same for some of its rows, shape ``(n,)``."""
        some = copy(self)
        some.rows = self.rows.select(lines)
        some.sites = {site: at[lines] for site, at in self.sites.items()}
        some._ids, some._position_ids, some._mask = (x[lines] for x in (self._ids, self._position_ids, self._mask))
        some._known = {
            m: _map(output, lambda hidden: hidden[lines.to(hidden.device)]) for m, output in self._known.items()
        }
        past = {id(layer): copy(layer) for layer in self._past}
        for layer in past.values():
            layer.keys, layer.values = (x[lines.to(x.device)] for x in (layer.keys, layer.values))
        some._past = [past[id(layer)] for layer in self._past]
        return some

    def cut(self, lines: Tensor, line: Tensor, position: Tensor, layer: int) -> SuffixGroup:
        """What is needed to read some tokens.

        Args:
            lines: The rows that run, ascending.
            line: Of each token that is read its row, counted in ``lines``; shape ``(p,)``.
            position: Its position in the suffix, shape ``(p,)``.
            layer: The last layer that is read. Its attention's output and its MLP are made for these tokens alone.
        """
        cut = copy(self) if len(lines) == len(self.rows) else self.select(lines)
        q = int(torch.stack([position.max(), *(at.max() for at in cut.sites.values())]).max()) + 1
        p = cut._mask.shape[1] - cut._ids.shape[1] + q
        cut._ids, cut._position_ids, cut._mask = cut._ids[:, :q], cut._position_ids[:, :q], cut._mask[:, :p]
        cut._known = {m: _map(output, lambda hidden: hidden[:, :q]) for m, output in cut._known.items()}
        read = torch.zeros_like(cut._ids, dtype=torch.bool)
        read[line, position] = True
        most = int(read.sum(dim=1).max())
        cut._read = layer, q, read.byte().argsort(dim=1, descending=True)[:, :most]
        return cut

    @contextmanager
    def adding(self, added: Mapping[Site, Tensor]) -> Iterator[None]:
        """Add vectors, and reduce the model's forward passes inside the context to the suffixes."""
        past = DynamicCache()
        past.layers = [copy(layer) for layer in self._past]  # a layer's tensors are replaced as it grows, never changed
        with ExitStack() as stack:
            given = _called_with(
                self.base.model,
                input_ids=self._ids,
                position_ids=self._position_ids,
                attention_mask=self._mask,
                past_key_values=past,
                use_cache=True,
            )
            stack.enter_context(given)
            for module, output in self._known.items():
                stack.enter_context(_returning(module, output))
            layer, q, read = self._read
            if read.shape[1] < q:
                block = self.base.layers[layer]
                for path in (self.base.architecture.attn_out, self.base.architecture.mlp):
                    stack.enter_context(_only_at(block.get_submodule(path), read, q))
            stack.enter_context(super().adding(added))
            yield


def start_of(sites: Mapping[Site, Tensor]) -> Tensor:
    """The first position of each row at which a vector is added."""
    return torch.stack(list(sites.values())).amin(dim=0)


def first_layer(site: Site) -> int:
    """The first layer that runs for a vector added at a site: its own, or the next one where it is the block's end."""
    return site.layer + (site.part == "block")


def unchanged(base: LanguageModel, sites: Iterable[Site]) -> list[nn.Module]:
    """The last block below or the embedding, and the modules above it that put out what they always do."""
    first = min(map(first_layer, sites))
    parts = {site.part for site in sites if first_layer(site) == first}
    whole = [base.layers[first - 1] if first else base.model.get_submodule(base.architecture.embed)]
    if "block" not in parts:
        whole.append(base.module(Site(first, "attn")))
        if parts == {"mlp"}:
            whole.append(base.module(Site(first, "mlp")))
    return whole


def hidden_of(output: Output) -> Tensor:
    """The hidden states of a module's output."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _map(output: Output, function: Callable[[Tensor], Tensor]) -> Output:
    """A module's output with other hidden states, and nothing else, in a tuple as long where the family has one."""
    return (function(output[0]), *[None] * (len(output) - 1)) if isinstance(output, tuple) else function(output)


@contextmanager
def _only_at(module: nn.Module, at: Tensor, t: int) -> Iterator[None]:
    """Let a module that treats tokens one by one run at some of t tokens, and put zeros out at the others.

    Args:
        module: The module; left alone where it runs on flattened rows (OPT's MLP).
        at: Which tokens of each row, shape ``(b, r)``.
        t: Of how many.
    """

    def take(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            x.take_along_dim(at[..., None].to(x.device), dim=1)
            if torch.is_tensor(x) and x.shape[:2] == (len(at), t) and x.ndim == 3
            else x
            for x in args
        )

    def put(_: nn.Module, __: object, output: Output) -> Output:
        hidden = hidden_of(output)
        if hidden.ndim < 3 or hidden.shape[1] == t:
            return output
        where = at[..., None].to(hidden.device).expand_as(hidden)
        hidden = hidden.new_zeros(len(at), t, hidden.shape[-1]).scatter(1, where, hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hooks = module.register_forward_pre_hook(take), module.register_forward_hook(put)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _called_with(model: nn.Module, **given: object) -> Iterator[None]:
    """Replace keyword arguments of a model's calls inside the context."""
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | given), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _returning(module: nn.Module, output: Output) -> Iterator[None]:
    """Let a module return what is known already; its hooks run on that."""
    own = vars(module).get("forward")  # a device map puts one there
    module.forward = lambda *_, **__: _map(output, Tensor.clone)  # Falcon adds to it in place
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
