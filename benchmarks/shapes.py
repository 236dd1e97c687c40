"""What the value stage is measured on: random models of published shapes, committed facts, and how FLOP are counted.

The facts of `prompts.jsonl` are invented and CounterFact-like, with subjects first, in the middle and last; its
contexts are the texts of the 21 templates of ROME (the bare prompt, ten contexts of four tokens, ten of nine). The
tokenizer is trained on their words so that it cuts about as GPT-2's does: a word is one token, a name about one for
every four letters, which makes 7 to 18 tokens a prompt.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from kedit_lightning.almanac.tokenizer import train_tokenizer
from kedit_lightning.data.prompts import ContextTemplates
from kedit_lightning.editors import JEEP, MEMIT, ROME, TOP, Editor
from kedit_lightning.editors.compression import Compression
from kedit_lightning.edits import Edit, Site
from kedit_lightning.models import Batch, LanguageModel
from kedit_lightning.models.full import Forwards, FullForward
from kedit_lightning.models.suffix import SuffixForward

PROMPTS = Path(__file__).with_name("prompts.jsonl")


@dataclass(frozen=True)
class Shape:
    """A published model's sizes, and the layers that are edited in it."""

    family: str
    settings: Mapping[str, Any]
    layers: int
    rome: int
    l_a: int
    memit: Sequence[int]
    high: Sequence[int]


_GPTJ = {"n_embd": 4096, "n_head": 16, "rotary_dim": 64, "vocab_size": 50400, "n_positions": 2048}
_LLAMA = {"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 11008, "vocab_size": 32000}
SHAPES = {
    "gpt2-small": Shape("gpt2", {"n_embd": 768, "n_head": 12, "vocab_size": 50257}, 12, 5, 7, [3, 4, 5], [8, 9]),
    "gpt-j-6b": Shape("gptj", _GPTJ, 28, 5, 10, [3, 4, 5, 6, 7, 8], [15, 16]),
    "llama-7b": Shape("llama", _LLAMA, 32, 5, 10, [5, 6, 7, 8, 9, 10], [22, 23, 24]),
}
"""By name; the layers are those of the shipped configurations, or near a published model's where there is none."""


# ---------------------------------------------------------------------- what is edited


def prompt_set() -> tuple[list[Edit], list[str]]:
    """The committed facts, and the committed contexts: ten of four tokens, then ten of nine."""
    lines = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    facts = [line for line in lines if "prompt" in line]
    return [Edit(**fact, case_id=i) for i, fact in enumerate(facts)], [x["context"] for x in lines if "context" in x]


def tokenizer() -> PreTrainedTokenizerFast:
    """Cuts the committed texts into about as many tokens as GPT-2's."""
    facts, contexts = prompt_set()
    texts = [*contexts, *(fact.prompt.replace("{}", "") + " " + fact.target_new for fact in facts), "is a . ,"]
    words = sorted({word for text in texts for word in text.split()})
    names = sorted({word for fact in facts for word in fact.subject.split()})
    pieces = [name[i : i + 4] for name in names for i in range(0, len(name), 4)]
    parts = [*words, *pieces, *(f" {word}" for word in words), *(f" {name[:4]}" for name in names)]
    return train_tokenizer([], parts, context=1024)


def build(shape: Shape, layers: int, dtype: str, device: str) -> LanguageModel:
    """A random model of a shape, cut to some layers."""
    name = "n_layer" if shape.family.startswith("gpt") else "num_hidden_layers"
    torch.manual_seed(0)
    with torch.device(device):
        config = CONFIG_MAPPING[shape.family](**shape.settings, **{name: layers})
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return LanguageModel.wrap(model, tokenizer())


class ReleasedForward(FullForward):
    """The whole model on whole rows, the head included, as the released codes run it."""

    def logits(self, added: Mapping[Site, Tensor], at: tuple[Tensor, Tensor]) -> Tensor:
        """As `FullForward.logits`."""
        with self.adding(added):
            return self.base.logits(self.rows)[at]


def editor(kind: str, base: LanguageModel, shape: Shape, forward: str) -> Editor:
    """An editor of the shape's layers, scaled to those that the model has.

    Args:
        kind: Which, one of `KINDS`.
        base: The model.
        shape: Whose layers.
        forward: ``suffix``, ``full``, or ``released``: full with the head on every token.
    """

    def scaled(layers: Sequence[int]) -> list[int]:
        return sorted({round(layer * base.num_layers / shape.layers) for layer in layers})

    contexts = [f"{context}. {{}}" for context in prompt_set()[1]]
    flat, grouped = [["{}", *contexts]], [["{}"], contexts[-5:]]
    shared: dict[str, Any] = {
        "mom2_adjustment": False,
        "forward": "suffix" if forward == "suffix" else "full",
        "max_tokens": sys.maxsize,
    }
    rome = {"context_templates": ContextTemplates(templates=flat), **shared}
    mass = {"context_templates": ContextTemplates(templates=grouped), **shared}
    (layer,), high = scaled([shape.rome]), scaled(shape.high)
    made: dict[str, Callable[[], Editor]] = {
        "ROME": lambda: ROME(base, [layer], **rome),
        "TOP": lambda: TOP(base, [layer], max(1, scaled([shape.l_a])[0] - layer), **rome),
        "MEMIT": lambda: MEMIT(base, scaled(shape.memit), **mass),
        "JEEP": lambda: JEEP(base, [x for x in scaled(shape.memit) if x < high[0]], high, **mass),
        "EAC(ROME)": lambda: ROME(base, [layer], compress=Compression(), **rome),
    }
    chosen = made[kind]()
    if forward == "released":
        chosen.forwards = Forwards(ReleasedForward)
    return chosen


KINDS = ("ROME", "TOP", "MEMIT", "JEEP", "EAC(ROME)")


# ---------------------------------------------------------------------- FLOP


@dataclass
class Flop:
    """Floating-point operations, a multiplication and an addition being two, and the tokens that a layer runs on."""

    forward: float = 0.0
    backward: float = 0.0
    tokens: int = 0


def block_sizes(base: LanguageModel, layer: int) -> tuple[int, int, int]:
    """Parameters of a block's linear maps: all, those of attention output and MLP, and the width of the attention."""
    sizes = {m: m.weight.numel() for m in base.layers[layer].modules() if isinstance(m, (nn.Linear, Conv1D))}
    out, mlp = base.linear(Site(layer, "attn")), base.module(Site(layer, "mlp"))
    late = {out, *mlp.modules()}
    width = base.weight(Site(layer, "attn")).shape[1]
    return sum(sizes.values()), sum(size for m, size in sizes.items() if m in late), width


def flop(
    base: LanguageModel,
    rows: Batch,
    sites: Mapping[Site, Tensor],
    read: tuple[Tensor, Tensor],
    last: int,
    *,
    suffix: bool,
    head: int,
) -> Flop:
    """What one evaluation takes: layers × tokens × (linear + attention) + the head where it is read.

    Only real tokens count, no padding, so both paths are held against what they would need at least. A token's linear
    maps take 2 FLOP a parameter, its attention ``4 · width`` for each key: every token of its row in the full path,
    those up to the last that is read in the suffix. Backward, gradients of activations alone: as much for linear maps
    and head, twice as much for attention, in the layers above the first vector (which is added to an MLP or a block).

    Args:
        base: The model.
        rows: b rows.
        sites: Where vectors are added: positions, shape ``(b,)``.
        read: Row and position of what is read, shape ``(p,)``.
        last: The last layer that is run.
        suffix: Layers above the first vector, from its token to the last that is read, in rows that are read; in the
            last layer the attention's output and the MLP only where it is read. Otherwise all layers and all tokens.
        head: On how many tokens the head is run.
    """
    lengths = rows.attention_mask.sum(dim=1).double().cpu()
    above = min(site.layer for site in sites) + 1
    line, position = read
    end = torch.tensor([max([0, *(position[line == i] + 1).tolist()]) for i in range(len(rows))])
    start = torch.stack([at.cpu() for at in sites.values()]).amin(dim=0)
    queries = torch.where(end > 0, end - start, 0).double() if suffix else lengths
    keys = torch.where(end > 0, end, 0).double() if suffix else lengths
    once_read = len({*zip(line.tolist(), position.tolist(), strict=True)})
    tokens, pairs, total = float(queries.sum()), float((queries * keys).sum()), Flop()
    for layer in range(above if suffix else 0, last + 1):
        every, late, width = block_sizes(base, layer)
        linear = 2 * (every * tokens - (late * (tokens - once_read) if suffix and layer == last else 0))
        total.forward += linear + 4 * width * pairs
        total.backward += linear + 8 * width * pairs if layer >= above else 0
    spent = 2 * head * base.model.get_output_embeddings().weight.numel()
    return Flop(total.forward + spent, total.backward + spent, int(tokens))


class Counting:
    """Counts what an editor's forward passes take while it is used: `prepared` without gradient, `step` with it."""

    def __init__(self, editor: Editor) -> None:
        self._forward_from = editor.forward_from
        editor.forward_from = self._watched  # type: ignore[method-assign]
        self.prepared, self.step = Flop(), Flop()
        self._known: FullForward | None = None

    def _watched(self, rows: Batch, at: Mapping[Site, Tensor], last: int | None = None) -> FullForward:
        forward = self._forward_from(rows, at, last)
        self.prepared = Flop()
        if forward is self._known:  # handed out again
            return forward
        self._known, suffix, base = forward, isinstance(forward, SuffixForward), forward.base
        if suffix:
            nothing = torch.empty(0, dtype=torch.long)
            self.prepared = flop(base, rows, at, (nothing, nothing), forward.last, suffix=False, head=0)
        logits, read = forward.logits, forward.read
        everywhere = int(rows.attention_mask.sum()) if isinstance(forward, ReleasedForward) else None

        def count(where: tuple[Tensor, Tensor], last: int, head: int) -> None:
            found = flop(base, rows, at, where, last, suffix=suffix, head=head)
            if torch.is_grad_enabled():
                self.step = found
            else:
                self.prepared.forward += found.forward

        def counted_logits(added: Mapping[Site, Tensor], where: tuple[Tensor, Tensor]) -> Tensor:
            count(where, base.num_layers - 1, everywhere or len(where[0]))
            return logits(added, where)

        def counted_read(added: Mapping[Site, Tensor], wanted: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
            line = torch.arange(len(rows)).repeat(len(wanted))
            count((line, torch.cat([place.cpu() for place in wanted.values()])), max(x.layer for x in wanted), 0)
            return read(added, wanted)

        forward.logits, forward.read = counted_logits, counted_read  # type: ignore[method-assign]
        return forward


def command(description: str | None, *, shape: str, dtype: str, device: str, rounds: int) -> argparse.ArgumentParser:
    """A command line that says which models and editors are meant, with these defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default=shape)
    parser.add_argument("--layers", type=int, help="cut the model to so many; the edited ones are scaled")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=dtype)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--editors", nargs="+", choices=KINDS, default=KINDS)
    return parser
