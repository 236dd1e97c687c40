"""The frozen base model: where facts are read, vectors added and weights edited."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from kedit_lightning.edits import Site
from kedit_lightning.errors import ModelError
from kedit_lightning.models.architectures import Architecture
from kedit_lightning.models.encoding import Batch, Row, encode
from kedit_lightning.models.loading import DeviceMap, find_architecture, load
from kedit_lightning.models.offloading import device_of, not_held
from kedit_lightning.models.side_by_side import SideBySide
from kedit_lightning.models.weights import HALVES, EditableWeights
from kedit_lightning.solvers import double

Dtype = Literal["float32", "bfloat16", "float16"]
_FLOATS = (torch.float32, torch.float64, *HALVES)  # 8-bit floats are quantised weights


class _Reached(Exception):
    """Raised by a hook to end a forward pass whose later layers nobody reads."""


class LanguageModel(EditableWeights):
    """A frozen Hugging Face causal language model and its tokenizer.

    A plain object on purpose, never a registered submodule: Lightning moves, broadcasts and checkpoints what is
    registered. Only `write`, `restore`, `unedited` and `transaction` touch its weights.

    Args:
        name: A Hugging Face name or a path; ``almanac`` is the small model inside this package.
        dtype: Type of the weights. Edited matrices of a half-precision model keep a float32 master.
        architecture: Where the sub-blocks live, for a family outside the table in ``models/architectures.py``.
        attn_implementation: Attention kernel, as in transformers; default: the model's own.
        device_map: Placement of the layers, as in transformers (needs accelerate), for a model larger than one GPU:
            ``auto``, a device, or devices by names of modules, ``disk`` included. Matrices that are edited are not
            offloaded. Without it the Trainer's device is used.
        revision: Branch, tag or commit of the model on the Hub.

    Raises:
        ModelError: The model cannot be found or read, is of an unknown family, quantised or a mixture of experts.
    """

    def __init__(
        self,
        name: str = "almanac",
        dtype: Dtype = "float32",
        architecture: Architecture | None = None,
        attn_implementation: str | None = None,
        device_map: DeviceMap | None = None,
        revision: str | None = None,
    ) -> None:
        where = name
        if name == "almanac":
            from kedit_lightning import almanac

            where = str(almanac.path())
        model, tokenizer = load(where, dtype, architecture, revision, attn_implementation, device_map)
        self._wrap(model, tokenizer, architecture)
        self._placed = self._mapped = device_map is not None
        self.name_or_path = name

    @classmethod
    def wrap(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, architecture: Architecture | None = None
    ) -> LanguageModel:
        """A base model around the caller's own model and tokenizer, edited in place."""
        self = cls.__new__(cls)
        self._wrap(model, tokenizer, architecture)
        self._placed, self._mapped = True, hasattr(model, "hf_device_map")
        return self

    def _wrap(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, architecture: Architecture | None
    ) -> None:
        config = model.config.get_text_config()
        self.architecture = find_architecture(model.config, architecture)
        super().__init__(model.eval().requires_grad_(False))
        self.side_by_side = SideBySide(model)
        self.tokenizer = tokenizer
        self.name_or_path = str(model.config._name_or_path)
        # Families without position embeddings (BLOOM) name no limit.
        limit = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
        self.max_length = int(min(limit, torch.iinfo(torch.int32).max))
        try:
            self.layers: Any = model.get_submodule(self.architecture.layers)
            model.get_submodule(self.architecture.embed)
            for part in ("attn", "mlp"):
                self.module(Site(0, part))
                self.linear(Site(0, part))
        except (AttributeError, TypeError) as error:
            msg = (
                f"`base.architecture` does not fit this {config.model_type!r} model: {error}; "
                "expected the paths of a list of blocks, of the parts of a block, and of the embedding"
            )
            raise ModelError(msg) from error

    # ------------------------------------------------------------------ where things are

    @property
    def num_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.layers)

    @property
    def dtype(self) -> str:
        """Type of the weights, as `base.dtype` names it."""
        return str(next(self.layers.parameters()).dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Device that the first block runs on."""
        return device_of(self.layers[0])

    def to(self, device: torch.device) -> LanguageModel:
        """Place the model, unless a ``device_map`` (or the caller) has placed it already."""
        if not self._placed:
            self.model.to(device)  # type: ignore[arg-type]
        return self

    def check_processes(self, n: int) -> None:
        """Refuse several processes for a model that is spread over devices: each would load all of it.

        Raises:
            ModelError: There is a device map, and more than one process.
        """
        if self._mapped and n > 1:
            msg = (
                f"base.device_map: expected one process, got {n}, each of which would place the whole model on the "
                "same devices: set trainer.devices and trainer.num_nodes to 1, or leave base.device_map out"
            )
            raise ModelError(msg)

    def check_layer(self, layer: int) -> int:
        """The layer, if the model has it.

        Raises:
            ModelError: The layer is out of range.
        """
        if not 0 <= layer < self.num_layers:
            msg = f"expected a layer between 0 and {self.num_layers - 1}, got {layer}"
            raise ModelError(msg)
        return layer

    def module(self, site: Site) -> nn.Module:
        """The block, attention, MLP or up-projection whose output a site names."""
        if site.part == "mlp_in":
            return self.linear(site)
        block: nn.Module = self.layers[self.check_layer(site.layer)]
        paths = {"block": "", "attn": self.architecture.attn, "mlp": self.architecture.mlp}
        return block.get_submodule(paths[site.part])

    def linear(self, site: Site) -> nn.Module:
        """The linear map whose output is the site's: down- or up-projection, or the attention's output projection.

        Raises:
            ModelError: There is none, or it is no plain linear map (quantised, or experts).
        """
        if not (path := self._path(site)):
            msg = f"expected a site with a weight (attn, mlp or mlp_in), got {site.part}"
            if site.part == "mlp_in":
                msg = "base.architecture.mlp_in: expected the path of the MLP's up-projection from a block, got none"
            raise ModelError(msg)
        block: nn.Module = self.layers[self.check_layer(site.layer)]
        linear = block.get_submodule(path)
        if not isinstance(linear, (nn.Linear, Conv1D)) or linear.weight.dtype not in _FLOATS:
            msg = (
                f"expected a plain linear map at {path} of layer {site.layer}, got "
                f"{type(linear).__name__}: quantised and mixture-of-experts weights cannot be edited"
            )
            raise ModelError(msg)
        return linear

    def name(self, site: Site) -> str:
        """Name of the site's weight matrix among the model's parameters."""
        return f"{self.architecture.layers}.{site.layer}.{self._path(site)}.weight"

    def _path(self, site: Site) -> str:
        """Path of the site's linear map from a block; empty where it has none."""
        own = self.architecture
        return {"attn": own.attn_out, "mlp": own.mlp_out, "mlp_in": own.mlp_in}.get(site.part, "")

    def weight(self, site: Site | str) -> Tensor:
        """View of a weight matrix in math orientation, shape ``(out, in)``; by its site or by its name."""
        return super().weight(site if isinstance(site, str) else self._named(site))

    def _named(self, site: Site) -> str:
        """Name of the site's weight matrix, which can be edited."""
        self.linear(site)
        return self.name(site)

    # ------------------------------------------------------------------ reading and adding

    def encode(
        self,
        prompt: str,
        target: str | None = None,
        subject: tuple[int, int] | None = None,
        *,
        separate: bool = False,
    ) -> Row:
        """Tokenise a prompt with its continuation; see `models.encoding.encode`."""
        return encode(self.tokenizer, prompt, target, subject, max_length=self.max_length, separate=separate)

    def logits(
        self,
        batch: Batch,
        at: tuple[Tensor, Tensor] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        past: Cache | None = None,
    ) -> Tensor:
        """Next-token logits.

        Args:
            batch: b rows of t tokens.
            at: Row and position of p tokens, both of shape ``(p,)``: the model's head is run on these only.
            weights: By name, in math orientation, what this pass takes instead of the model's own weights.
            past: Keys and values of tokens that stand before the batch, whose mask covers these too.

        Returns:
            Shape ``(b, t, vocabulary)``, or ``(p, vocabulary)`` with ``at``.
        """
        batch = batch.to(self.device)
        inputs = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "position_ids": batch.position_ids,
            "past_key_values": past,
            "use_cache": past is not None,
        }
        instead = {name: self.as_parameter(name, value) for name, value in (weights or {}).items()}
        with self._head_at(at) if at else nullcontext(), self.side_by_side.rows(batch.owner), not_held(self.model):
            out = functional_call(self.model, instead, (), inputs) if instead else self.model(**inputs)
        logits: Tensor = out.logits
        return logits[0] if at else logits

    def run(self, batch: Batch, layer: int) -> None:
        """Run the model on a batch up to a layer, for what `tap` keeps."""
        with self._until(layer):
            self.logits(batch)

    @torch.no_grad()
    def read(self, batch: Batch, sites: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        """Outputs of sites at given positions; layers above the last site are not run.

        Args:
            batch: b rows.
            sites: For each site the position in every row, shape ``(b,)``.

        Returns:
            For each site the vectors in float32, shape ``(b, d)``.
        """
        with self.tap(sites) as found:
            self.run(_needed(batch, sites.values()), max(site.layer for site in sites))
        return {site: vectors.float() for site, vectors in found.items()}

    @torch.no_grad()
    def keys(self, batch: Batch, sites: Mapping[Site, Tensor | None]) -> dict[Site, Tensor]:
        """Keys, that is inputs of the sites' linear maps; layers above the last site are not run.

        Args:
            batch: b rows.
            sites: For each site the position in every row, shape ``(b,)``, or None for every real token.

        Returns:
            For each site the keys in float32, shape ``(b, k)``, or ``(tokens, k)`` for every real token.
        """
        found: dict[Site, Tensor] = {}
        batch = _needed(batch, sites.values())

        def keep(site: Site, at: Tensor | None, key: Tensor) -> None:
            key = _by_row(key, len(batch))
            where = batch.attention_mask.to(key.device) > 0 if at is None else (_rows(key), at.to(key.device))
            found[site] = key[where].float()

        with ExitStack() as stack:
            for site, at in sites.items():
                hook = self.linear(site).register_forward_pre_hook(
                    lambda _, args, site=site, at=at: keep(site, at, args[0])
                )
                stack.callback(hook.remove)
            self.run(batch, max(site.layer for site in sites))
        return found

    @contextmanager
    def tap(self, sites: Mapping[Site, Tensor]) -> Iterator[dict[Site, Tensor]]:
        """Keep what sites put out at given positions during the forward passes inside the context.

        Args:
            sites: For each site the position in every row, shape ``(b,)``.

        Yields:
            A dictionary that each forward pass fills: for each site the vectors, shape ``(b, d)``.
        """
        found: dict[Site, Tensor] = {}

        def keep(site: Site, hidden: Tensor) -> None:
            at = sites[site]
            hidden = _by_row(hidden, len(at))
            found[site] = hidden[_rows(hidden), at.to(hidden.device)]

        with ExitStack() as stack:
            for site in sites:
                hook = self.module(site).register_forward_hook(
                    lambda _, __, output, site=site: keep(site, _hidden(output))
                )
                stack.callback(hook.remove)
            yield found

    @contextmanager
    def factors(self, sites: Sequence[Site], b: int) -> Iterator[dict[Site, tuple[Tensor, Tensor]]]:
        """Keep what the gradients of weight matrices are made of during the forward passes inside the context.

        Args:
            sites: Sites with a weight matrix.
            b: Rows of the passes.

        Yields:
            A dictionary that each forward pass fills: for each site the keys, shape ``(b, t, k)``, and zeros that were
            added to what the linear map puts out, ``(b, t, d)``: a backward pass leaves its gradient in their ``grad``.
        """
        found: dict[Site, tuple[Tensor, Tensor]] = {}

        def keep(site: Site, key: Tensor, output: Tensor) -> Tensor:
            zeros = torch.zeros_like(_by_row(output, b), requires_grad=True)
            found[site] = _by_row(key, b).detach(), zeros
            return output + zeros.view_as(output)

        with ExitStack() as stack:
            for site in sites:
                hook = self.linear(site).register_forward_hook(
                    lambda _, args, output, site=site: keep(site, args[0], output)
                )
                stack.callback(hook.remove)
            yield found

    @contextmanager
    def add(self, site: Site, at: Tensor, vectors: Tensor, instead: Tensor | None = None) -> Iterator[None]:
        """Add vectors to a site's output during the forward passes inside the context.

        Args:
            site: Where.
            at: Position in every row, shape ``(b,)``.
            vectors: What is added, one vector a row, shape ``(b, d)``.
            instead: The rows in which the vectors take the place of what is there, shape ``(m,)``, while the others
                are left alone; None: they are added, in all rows.
        """

        def put(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
            flat = _hidden(output)
            hidden = _by_row(flat, len(at))
            rows = _rows(hidden) if instead is None else instead.to(hidden.device)
            where = rows, at.to(hidden.device)[rows]
            hidden = hidden.index_put(where, vectors.to(hidden)[rows], accumulate=instead is None).view_as(flat)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        hook = self.module(site).register_forward_hook(put)
        try:
            yield
        finally:
            hook.remove()

    @torch.no_grad()
    def project(self, site: Site, keys: Tensor) -> Tensor:
        """What a site's linear map makes of keys, bias included; float64, shape ``(n, d)`` from ``(n, k)``."""
        value = double(keys) @ double(self.master(self.name(site))).T
        bias = self.linear(site).bias
        return value if bias is None else value + double(bias)  # type: ignore[arg-type]

    @contextmanager
    def _head_at(self, at: tuple[Tensor, Tensor]) -> Iterator[None]:
        """Give the head, during the forward passes inside the context, one row of the hidden states at some tokens.

        What follows the head, such as a soft-cap or a scale, is thereby the model's own.
        """

        def pick(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            row, position = (index.to(args[0].device) for index in at)
            return args[0][row, position][None]

        hook = self.model.get_output_embeddings().register_forward_pre_hook(pick)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def _until(self, layer: int) -> Iterator[None]:
        """End the forward pass inside the context after a layer."""

        def stop(*_: object) -> None:
            raise _Reached

        hook = self.layers[layer].register_forward_hook(stop)
        try:
            yield
        except _Reached:
            pass
        finally:
            hook.remove()


def _needed(batch: Batch, positions: Iterable[Tensor | None]) -> Batch:
    """The rows up to the last position that is read (None: all are): what comes later changes nothing before it."""
    read = list(positions)
    ends = [int(at.max()) + 1 for at in read if at is not None]
    return batch.until(max(ends)) if len(ends) == len(read) else batch


def _hidden(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The hidden states of a sub-block's output; families return a tensor or a tuple that starts with it."""
    return output[0] if isinstance(output, tuple) else output


def _by_row(hidden: Tensor, b: int) -> Tensor:
    """Hidden states as ``(b, t, d)``; OPT runs its MLP on ``(b · t, d)``."""
    return hidden.reshape(b, -1, hidden.shape[-1]) if hidden.ndim == 2 else hidden


def _rows(hidden: Tensor) -> Tensor:
    return torch.arange(hidden.shape[0], device=hidden.device)
