"""What hypernetworks are made of: a normaliser that learns as it goes, and low-rank residual blocks. No language model.

Shapes: T tokens; a weight matrix W is ``(d, k)``, its keys (inputs) ``(T, k)`` and the gradients of what it puts out
``(T, d)``, so that ``∇W = Σ g kᵀ``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from kedit_lightning.errors import KeditError

Shared = Literal["shape", "all", "none"]
"""Which matrices have one network: those of one shape, all of them, or none."""


class Factors(NamedTuple):
    """What the gradient of a weight matrix is made of.

    Attributes:
        keys: What goes into the matrix, shape ``(T, k)``.
        grads: The gradients of what comes out, shape ``(T, d)``.
    """

    keys: Tensor
    grads: Tensor

    def chunks(self, size: int, device: torch.device) -> Iterator[Factors]:
        """The same, so many tokens at a time."""
        for keys, grads in zip(torch.split(self.keys, size), torch.split(self.grads, size), strict=True):
            yield Factors(keys.to(device), grads.to(device))


class RunningNorm(nn.Module):
    """Standardises lines by the mean and the deviation of all it has been shown (Welford; ``n − 1``).

    Args:
        width: Entries of a line.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("squares", torch.zeros(width))

    @torch.no_grad()
    def update(self, lines: Tensor) -> None:
        """Take in lines, shape ``(T, width)``."""
        if not len(lines):
            return
        before, mean = int(self.count), lines.mean(dim=0)
        share, shift = len(lines) / (before + len(lines)), mean - self.mean
        self.squares += (lines - mean).square().sum(dim=0) + shift.square() * (before * share)
        self.mean += shift * share
        self.count += len(lines)

    def forward(self, lines: Tensor) -> Tensor:
        """``(x − μ) / (σ + 1e-7)``, shape ``(T, width)``."""
        deviation = (self.squares / (self.count - 1).clamp(min=1)).sqrt()
        return (lines - self.mean) / (deviation + 1e-7)


class Block(nn.Module, ABC):
    """A residual block of low rank, with a scale and a shift for each matrix that shares it; the identity at first.

    The ReLU is a clamp, whose derivative at 0 is 1: where it is 0 a block that is the identity stays so for ever.

    Args:
        width: Entries of a line.
        rank: Rank of its map.
        members: Matrices that share it.
    """

    def __init__(self, width: int, rank: int, members: int) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(rank, width)), nn.Parameter(torch.zeros(width, rank))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale, self.shift = nn.Parameter(torch.ones(members, width)), nn.Parameter(torch.zeros(members, width))

    def mapped(self, lines: Tensor) -> Tensor:
        """``U V h + b``."""
        return lines @ self.down.T @ self.up.T + self.bias

    @abstractmethod
    def forward(self, lines: Tensor, member: int) -> Tensor:
        """Lines of one of the matrices, shape ``(T, width)``."""


class MENDBlock(Block):
    """``h + max(0, s ⊙ (U V h + b) + t)``: scaled and shifted before the ReLU."""

    def forward(self, lines: Tensor, member: int) -> Tensor:
        """Lines of one of the matrices, shape ``(T, width)``."""
        return lines + (self.scale[member] * self.mapped(lines) + self.shift[member]).clamp(min=0)


class MALMENBlock(Block):
    """``h + s ⊙ max(0, U V h + b) + t``: scaled and shifted after it."""

    def forward(self, lines: Tensor, member: int) -> Tensor:
        """Lines of one of the matrices, shape ``(T, width)``."""
        return lines + self.scale[member] * self.mapped(lines).clamp(min=0) + self.shift[member]


class Network(nn.Module):
    """Turns keys and gradients of matrices of one shape into pseudo-keys and pseudo-gradients.

    Args:
        shape: ``(d, k)`` of the matrices.
        members: How many they are.
        rank: Rank of the blocks.
        n_blocks: How many blocks.
        block: Of which kind.
    """

    def __init__(self, shape: tuple[int, int], members: int, rank: int, n_blocks: int, block: type[Block]) -> None:
        super().__init__()
        self.split = shape[1], shape[0]
        self.norm = RunningNorm(sum(shape))
        self.blocks = nn.ModuleList(block(sum(shape), rank, members) for _ in range(n_blocks))

    def forward(self, factors: Factors, member: int) -> Factors:
        """Of T tokens of one of the matrices."""
        lines = self.norm(torch.cat(factors, dim=1))
        for block in self.blocks:
            lines = block(lines, member)
        return Factors(*lines.split(self.split, dim=1))


class Hypernetwork(nn.Module, ABC):
    """Says how weight matrices change, from keys and gradients of the facts that are to be edited.

    Memory beside the factors themselves and the update does not grow with the number of tokens: they go through the
    networks in chunks, forwards and backwards.

    Args:
        shapes: ``(d, k)`` of each matrix by its name, in order.
        rank: Rank of the blocks.
        n_blocks: Blocks of a network.
        edit_lr: First step size of every matrix; each learns its own.
        networks: Which matrices have one: those of one ``shape``, ``all``, or ``none``.

    Raises:
        KeditError: Matrices of several shapes are to have one network, or a number is out of range.
    """

    block: type[Block]
    additive = False
    """Whether the update of some tokens and that of others add up to that of all."""
    chunk = 1024
    """Tokens that go through a network together."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        rank: int,
        n_blocks: int,
        edit_lr: float,
        networks: Shared = "shape",
    ) -> None:
        super().__init__()
        self.shapes = {name: (int(d), int(k)) for name, (d, k) in shapes.items()}
        groups: dict[object, list[str]] = {}
        for name, shape in self.shapes.items():
            groups.setdefault({"shape": shape, "all": "all", "none": name}[networks], []).append(name)
        if networks == "all" and len(there := set(self.shapes.values())) > 1:
            which = " and ".join(f"{d} × {k}" for d, k in sorted(there))
            msg = (
                f"networks: expected matrices of one shape for one network, got {which}; say shape, a network for each"
            )
            raise KeditError(msg)
        if min(rank, n_blocks) < 1 or not edit_lr:
            got = f"{rank}, {n_blocks} and {edit_lr}"
            msg = f"expected rank and n_blocks of at least 1 and an edit_lr other than 0, got {got}"
            raise KeditError(msg)
        self.places = {name: (i, j) for i, group in enumerate(groups.values()) for j, name in enumerate(group)}
        self.networks = nn.ModuleList(
            Network(self.shapes[group[0]], len(group), rank, n_blocks, self.block) for group in groups.values()
        )
        self.steps = nn.Parameter(torch.full((len(self.shapes),), float(edit_lr)))
        self.settings = {"rank": rank, "n_blocks": n_blocks, "edit_lr": edit_lr, "networks": networks}

    def observe(self, name: str, factors: Factors) -> None:
        """Let the normaliser of a matrix take factors in; only in training."""
        norm: RunningNorm = self.networks[self.places[name][0]].norm  # type: ignore[assignment]
        for chunk in factors.chunks(self.chunk, norm.mean.device):
            norm.update(torch.cat(chunk, dim=1))

    def step(self, name: str) -> Tensor:
        """The step size of a matrix."""
        return self.steps[list(self.shapes).index(name)]

    def pseudo(self, name: str, factors: Factors) -> Factors:
        """Pseudo-keys and pseudo-gradients of a chunk of tokens; differentiable in the network."""
        network, member = self.places[name]
        found: Factors = self.networks[network](factors, member)
        return found

    @abstractmethod
    def update(self, name: str, factors: Factors) -> tuple[Tensor, Tensor]:
        """Factors ``(d, r)`` and ``(k, r)`` of the update of a matrix, ``Δ = left rightᵀ``, in float64."""

    @abstractmethod
    def backward(self, name: str, factors: Factors, gradient: Tensor) -> None:
        """Add to the parameters' gradients what a loss's gradient in W, shape ``(d, k)``, makes of them."""
