"""From a name to a model and its tokenizer: what cannot be edited is refused before its weights are read."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kedit_lightning.errors import ModelError
from kedit_lightning.models.architectures import ARCHITECTURES, Architecture
from kedit_lightning.models.quiet import quiet

DeviceMap = str | dict[str, int | str]
"""A placement of layers as transformers takes it: a device, a strategy, or devices by the names of modules."""
_GIVE = "give a Hugging Face name, a model folder, or `almanac`"
_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def load(
    name: str,
    dtype: str,
    architecture: Architecture | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    device_map: DeviceMap | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer; the model's own code is never run.

    Args:
        name: A Hugging Face name or a path.
        dtype: Type of the weights.
        architecture: Where the sub-blocks of an unknown family live.
        revision: Branch, tag or commit on the Hub.
        attn_implementation: As in transformers; None: the model's own.
        device_map: As in transformers; None: on the CPU.

    Raises:
        ModelError: The model cannot be found or read, its weights are incomplete, or it cannot be edited; the device
            map names what this machine or the model does not have.
    """
    _check_devices(device_map)
    device_map = {"": "disk"} if device_map == "disk" else device_map  # which transformers takes by module only
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": False}  # None would ask at the terminal
    placement = {"attn_implementation": attn_implementation, "device_map": device_map}
    given = {key: value for key, value in placement.items() if value is not None}
    part = "configuration"
    try:
        if Path(name).expanduser().is_dir() and name:
            name = str(Path(name).expanduser())
        elif _is_path(name):
            msg = f"there is no such folder; {_GIVE}"
            raise FileNotFoundError(msg)
        with quiet("transformers", "huggingface_hub", "accelerate"):  # what matters of what they say is raised
            config = AutoConfig.from_pretrained(name, **where)
            find_architecture(config, architecture)
            part = "tokenizer"
            tokenizer = AutoTokenizer.from_pretrained(name, **where)
            part = "weights"
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name,
                config=config,
                dtype=getattr(torch, dtype),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                **where,
                **given,
            )
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        msg = f"cannot load the {part} of {name!r}: {_reason(error)}"
        raise ModelError(msg) from error
    model, info = loaded
    if isinstance(device_map, dict):
        _check_modules(model, device_map)
    mismatched = {key for key, *_ in info["mismatched_keys"]}
    if wrong := sorted({*info["missing_keys"], *mismatched}):
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        msg = f"the weights of {name!r} do not fit its config.json: {wrong[0]}{more} missing or of another shape"
        raise ModelError(msg)
    return model, tokenizer


def find_architecture(config: PreTrainedConfig, architecture: Architecture | None = None) -> Architecture:
    """Where the sub-blocks of a model live, by its family.

    Args:
        config: The model's configuration.
        architecture: The caller's own answer, which wins over the table.

    Raises:
        ModelError: The weights are quantised or a mixture of experts, or the family is unknown.
    """
    if getattr(config, "quantization_config", None) is not None:
        msg = "expected float weights, got a quantised model: load the original weights, quantise after editing"
        raise ModelError(msg)
    config = config.get_text_config()
    if any("expert" in key and type(value) is int and value > 1 for key, value in config.to_dict().items()):
        msg = f"expected a dense model, got a mixture of experts ({config.model_type}), whose weights cannot be edited"
        raise ModelError(msg)
    architecture = architecture or ARCHITECTURES.get(config.model_type)
    if architecture is None:
        msg = (
            f"unknown model family {config.model_type!r}; known are {', '.join(ARCHITECTURES)}. "
            "Give `base.architecture` the six module paths of this family"
        )
        raise ModelError(msg)
    return architecture


def _check_devices(device_map: DeviceMap | None) -> None:
    """Refuse a device map whose devices are not there, before weights are read."""
    if device_map is None:
        return
    if find_spec("accelerate") is None:
        msg = "base.device_map needs accelerate: pip install 'kedit_lightning[device_map]'"
        raise ModelError(msg)
    found = torch.accelerator.current_accelerator(check_available=True)
    there = [f"{found.type}:{i}" for i in range(torch.accelerator.device_count())] if found else []
    known = {"cpu", "disk", *there, *range(len(there)), *([found.type] if found else [])}
    if isinstance(device_map, str):
        known |= {*_STRATEGIES}
        device_map = {"": device_map}
    if wrong := [device for device in device_map.values() if device not in known]:
        places = ", ".join(["cpu", "disk", *there])
        msg = (
            f"base.device_map: expected {', '.join(_STRATEGIES)}, a device of this machine ({places}), or devices by "
            f"the names of modules, got {wrong[0]!r}"
        )
        raise ModelError(msg)


def _check_modules(model: PreTrainedModel, device_map: dict[str, int | str]) -> None:
    """Refuse names of modules that transformers would pass over."""
    modules = dict(model.named_modules())
    if wrong := [name for name in device_map if name not in modules]:
        few = list(modules)[1:4]
        msg = f"base.device_map: expected names of modules of this model such as {', '.join(few)}, got {wrong[0]!r}"
        raise ModelError(msg)


def _is_path(name: str) -> bool:
    """Whether a name can only be a path: Hub names are ``name`` or ``owner/name``."""
    return not name or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _reason(error: Exception) -> str:
    """The first line of an error, in words of our own where transformers' mislead."""
    text = str(error).strip().split("\n")[0].rstrip(". ")
    if "couldn't connect" in text:
        return f"there is no such folder, no copy in the cache, and no network to look on the Hub; {_GIVE}"
    if "custom code" in text or "remote code" in text:
        return "it comes with code of its own, which is never run here; use a family that transformers itself knows"
    if isinstance(error, SafetensorError):
        return f"the file is corrupt or truncated ({text})"
    if "offload_folder" in text:
        return "only weights in safetensors files can be offloaded to disk: save the model in that format first"
    if "on the meta device, we need" in text:
        return "base.device_map names a module and, elsewhere, a part of it (or a weight tied to it): name all parts"
    if "backend tokenizer" in text:
        return "there is no tokenizer.json"
    if "does not recognize" in text:
        return text.split(". ")[0]
    return text or type(error).__name__
