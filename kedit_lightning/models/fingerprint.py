"""What identifies a base model: hashes of its configuration, its tokenizer and its unedited weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kedit_lightning.models.language_model import LanguageModel

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PROBE = "The 3 rivers of  Åsa's ﬁrst VALLEY\n\tran 1947km, didn't they? 川は流れる… 🙂 (x_1 != y2)"
"""A text with something in it for every rule of a tokenizer; its ids show normalisation and special tokens."""


def fingerprint(base: LanguageModel, names: Sequence[str]) -> str:
    """Hash of the configuration, the tokenizer and the full unedited values of some weight matrices.

    It stays the same when the model is saved and loaded again, when it is loaded with more precision than its file
    has, and while it is being edited.

    Args:
        base: The base model.
        names: Names of weight matrices among its parameters; their order does not matter.

    Returns:
        The SHA-256 as hexadecimal digits.
    """
    digest = _describe(base)
    for name in sorted(set(names)):
        _add(digest, name, base.pristine(name))
    return digest.hexdigest()


def fingerprint_below(base: LanguageModel, layer: int) -> str:
    """Hash of all that a layer's keys depend on: configuration, tokenisation and the parameters up to that layer.

    Of each parameter it takes the sums of the entries' bits along every axis, as integers: these are exact on every
    device, show any change of an entry, and take a large model a moment where a hash of all its bytes takes minutes.

    Args:
        base: The base model.
        layer: The last layer that counts.

    Returns:
        The SHA-256 as hexadecimal digits.
    """
    digest = _describe(base)
    digest.update(json.dumps(base.tokenizer(PROBE)["input_ids"]).encode())
    above = tuple(f"{base.architecture.layers}.{i}." for i in range(layer + 1, base.num_layers))
    for name, parameter in sorted(base.model.named_parameters()):
        if name.startswith(above):
            continue
        value = base.pristine(name)
        _add_sums(digest, name, value[:, 0] if parameter.ndim == 1 else value)
    return digest.hexdigest()


def state(base: LanguageModel, names: Sequence[str]) -> str:
    """Hash of what weights hold now, edits included: of the sums of the bits of each, as `fingerprint_below`.

    Args:
        base: The base model.
        names: Names of weight matrices among its parameters.
    """
    digest = hashlib.sha256()
    for name in names:
        _add_sums(digest, name, base.weight(name))
    return digest.hexdigest()


def _add_sums(digest: hashlib._Hash, name: str, value: Tensor) -> None:
    digest.update(f"{name} {(*value.shape, value.dtype)}".encode())
    bits = value.detach().view(_INTEGERS[value.element_size()])
    for axis, size in enumerate(bits.shape):
        digest.update(bits.movedim(axis, 0).reshape(size, -1).sum(dim=1).cpu().numpy().data)


def _describe(base: LanguageModel) -> hashlib._Hash:
    """A digest that has taken in the configuration and the vocabulary.

    The vocabulary stands for the tokenizer: the rest of ``tokenizer.json`` changes with the version that wrote it, and
    for some families (qwen2) transformers replaces it when it loads a tokenizer.
    """
    config = _steady(base.model.config.get_text_config().to_diff_dict(), _VOLATILE)
    text = json.dumps([config, base.tokenizer.get_vocab()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode())


_VOLATILE = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "problem_type",
    }
)
"""Fields of a configuration that say how a model was loaded or is called, not what it computes."""


def _steady(config: Any, volatile: Iterable[str]) -> Any:  # noqa: ANN401 - JSON
    if not isinstance(config, dict):
        return config
    return {key: _steady(value, volatile) for key, value in config.items() if key not in volatile}


def _add(digest: hashlib._Hash, label: str, value: Tensor) -> None:
    digest.update(label.encode())
    digest.update(value.detach().to("cpu", torch.float32).reshape(-1).numpy().data)
