"""An edited model for others to load: a Hugging Face checkpoint, or a LoRA adapter for PEFT."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save as to_bytes
from torch import Tensor
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from kedit_lightning.delta import WeightDelta, merge
from kedit_lightning.errors import DeltaError, KeditError
from kedit_lightning.models import LanguageModel
from kedit_lightning.writing import unwritable


def write_model(base: LanguageModel, deltas: Sequence[WeightDelta], out: Path) -> None:
    """Write an edited model and its tokenizer as an ordinary Hugging Face checkpoint, in the base model's dtype.

    The updates are added to the base model, which keeps them, unless the checkpoint cannot be written.

    Args:
        base: The model that the updates are for.
        deltas: The updates, in order; none writes the model as it stands.
        out: A folder that does not exist yet, or is empty.

    Raises:
        KeditError: The folder holds something, or cannot be written; nothing is left of it.
    """
    with _new_folder(out) as folder, base.transaction():
        for delta in deltas:
            base.write(delta.name, delta.update)
        with _no_progress_bar():
            base.model.save_pretrained(folder)
            base.tokenizer.save_pretrained(folder)


def write_lora(base: LanguageModel, deltas: Sequence[WeightDelta], out: Path) -> None:
    """Write low-rank updates as a LoRA adapter, which `peft.PeftModel.from_pretrained` loads onto the base model.

    LoRA adds ``scale · B A`` with ``scale = alpha / r``; every matrix has its own rank, and its alpha equals it. Each
    rank's share is spread evenly over A and B, so that both can be stored in half precision or trained further.

    Args:
        base: The model that the updates are for.
        deltas: The updates; those of one matrix are merged.
        out: A folder that does not exist yet, or is empty.

    Raises:
        DeltaError: There is no update, or one is dense.
        KeditError: The folder holds something, or cannot be written; nothing is left of it.
    """
    merged = merge(deltas)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for delta in merged:
        module = delta.name.removesuffix(".weight")
        a, b = _balanced(delta)
        ranks[module] = len(a)
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    if not ranks:
        msg = f"{out}: expected at least one update to write as LoRA, got none"
        raise DeltaError(msg)
    content = to_bytes(tensors, {"format": "pt"})
    config = json.dumps(_lora_config(base, ranks), indent=2, sort_keys=True)
    with _new_folder(out) as folder:
        (folder / "adapter_config.json").write_text(config + "\n", encoding="utf-8")
        (folder / "adapter_model.safetensors").write_bytes(content)


def _balanced(delta: WeightDelta) -> tuple[Tensor, Tensor]:
    """A of shape ``(r, in)`` and B of shape ``(out, r)`` with ``B A = Δ``, equally long rank by rank."""
    if delta.left is None or delta.right is None:
        msg = (
            f"the update of {delta.name} is dense: a LoRA adapter holds updates of matrices whose rank is low enough "
            "for it to be smaller; write a checkpoint with --format hf"
        )
        raise DeltaError(msg)
    left, right = delta.left.double(), delta.right.double()
    ratio = (right.norm(dim=0) / left.norm(dim=0)).sqrt()
    ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)  # a rank that adds nothing
    return (right / ratio).T.float().contiguous(), (left * ratio).float().contiguous()


def _lora_config(base: LanguageModel, ranks: dict[str, int]) -> dict[str, Any]:
    """What adapter_config.json holds; PEFT matches the modules by their full names."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.model.config._name_or_path),
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": list(ranks),
        "fan_in_fan_out": any(isinstance(base.model.get_submodule(module), Conv1D) for module in ranks),
    }


def refuse_occupied(out: Path) -> None:
    """Make sure that a folder is new or empty.

    Args:
        out: The folder to be written.

    Raises:
        KeditError: There is a file at this place, or something in the folder.
    """
    out = out.expanduser()
    if out.is_dir() and any(out.iterdir()):
        msg = f"{out}: expected a new or empty folder to write, and this one holds something; give another one"
        raise KeditError(msg)
    if out.exists() and not out.is_dir():
        msg = f"{out}: expected a new or empty folder to write, and this is a file; give another place"
        raise KeditError(msg)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which takes its place when everything is written and flushed, and never half."""
    refuse_occupied(out)
    out = out.expanduser().resolve()
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        yield beside
        mode = beside.stat().st_mode & 0o666  # safetensors leaves its files readable by their owner alone
        for path in filter(Path.is_file, beside.rglob("*")):
            path.chmod(mode)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        beside.replace(out)
    except (OSError, SafetensorError) as error:
        raise unwritable(out, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing a bar of its own while it writes."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
