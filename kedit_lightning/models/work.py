"""What a pass runs of a model, counted as it goes, and the work that this is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kedit_lightning.edits import Site
from kedit_lightning.models.language_model import LanguageModel

Place = tuple[int, str]
"""A matrix of a block: its layer, and its name there."""


@dataclass
class Work:
    """What runs of a model.

    Attributes:
        tokens: Tokens that each matrix is multiplied with, padding included.
        graded: Matrices through which a gradient goes back.
        logits: Tokens whose logits are taken.
    """

    tokens: dict[Place, int] = field(default_factory=dict)
    graded: set[Place] = field(default_factory=set)
    logits: int = 0

    def add(self, place: Place, given: Tensor) -> None:
        """Some tokens go through a matrix, shape ``(…, in)``."""
        self.tokens[place] = self.tokens.get(place, 0) + given.numel() // given.shape[-1]
        if given.requires_grad:
            self.graded.add(place)

    @property
    def layers(self) -> tuple[int, int] | None:
        """The first and the last layer that run; None where none does."""
        layers = [layer for layer, _ in self.tokens]
        return (min(layers), max(layers)) if layers else None

    def tokens_a_layer(self, base: LanguageModel) -> float:
        """Tokens that go through a layer that runs, as a mean weighted by the matrices' sizes; 0 where none does."""
        sizes = {place: _matrices(base, place[0])[place[1]].numel() for place in self.tokens}
        return sum(n * sizes[place] for place, n in self.tokens.items()) / max(1, sum(sizes.values()))


def _linear(base: LanguageModel, layer: int) -> dict[str, nn.Linear | Conv1D]:
    """The linear maps of a block."""
    return {name: one for name, one in base.layers[layer].named_modules() if isinstance(one, nn.Linear | Conv1D)}


def _matrices(base: LanguageModel, layer: int) -> dict[str, Tensor]:
    """Their matrices."""
    return {name: one.weight for name, one in _linear(base, layer).items()}


@contextmanager
def watched(base: LanguageModel) -> Iterator[Work]:
    """Count what the passes inside the context run; blocks that hand on what is known run nothing."""
    work = Work()

    def count(_: object, __: object, logits: Tensor) -> None:
        work.logits += logits.numel() // logits.shape[-1]

    with ExitStack() as stack:
        for layer in range(base.num_layers):
            for name, linear in _linear(base, layer).items():
                hook = linear.register_forward_pre_hook(lambda _, args, place=(layer, name): work.add(place, args[0]))
                stack.callback(hook.remove)
        stack.callback(base.model.get_output_embeddings().register_forward_hook(count).remove)
        yield work


def flop(base: LanguageModel, work: Work, length: int, whole: tuple[int, int] | None = None) -> float:
    """Floating-point operations of a pass and of its gradient by what it is given: matrix products and attention.

    A token takes two for every number of a matrix and ``4 t`` for every number of its attention's output, where t is
    the length of a row; a gradient that goes back as many again.

    Args:
        base: The model.
        work: What runs.
        length: Tokens of a row.
        whole: What runs instead: so many tokens through all layers up to one, with the same gradients and logits.
    """
    head: int = base.model.get_output_embeddings().weight.numel()
    total = 4.0 * work.logits * head
    for layer in range(base.num_layers):
        for name, matrix in _matrices(base, layer).items():
            place = layer, name
            n = work.tokens.get(place, 0) if whole is None else whole[0] * (layer <= whole[1])
            of_one = 2 * matrix.numel()
            if matrix is base.linear(Site(layer, "attn")).weight:
                of_one += 4 * length * base.weight(Site(layer, "attn")).shape[1]
            total += n * of_one * (2 if place in work.graded else 1)
    return total
