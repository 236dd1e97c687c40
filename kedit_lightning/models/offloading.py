"""Weights that a device map keeps in main memory or on disk, and brings to a device only while their module runs.

transformers has accelerate do this: a hook (``_hf_hook``) on each module holds a map from names to weights, and the
parameters themselves are on PyTorch's ``meta`` device, without values, whenever the module does not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kedit_lightning.errors import ModelError


def device_of(module: nn.Module) -> torch.device:
    """The device that a module runs on: that of its first parameter, or where this is brought to."""
    name, parameter = next(module.named_parameters())
    hook = _offload(module.get_submodule(name.rpartition(".")[0]))
    device: torch.device = parameter.device if hook is None else torch.device(hook.execution_device)
    return device


def value_of(module: nn.Module, name: str) -> Tensor:
    """A module's own parameter, or a copy that is read for the moment where it is offloaded.

    Raises:
        ModelError: It is offloaded, and nothing says where to.
    """
    hook, parameter = _offload(module), module.get_parameter(name)
    if hook is not None:
        value: Tensor = hook.weights_map[name]
        return value
    if parameter.is_meta:
        msg = (
            f"the {name} of a {type(module).__name__} has no values (it is on the meta device) and no hook of its own "
            "that brings them: load the model with base.device_map, or wholly into memory"
        )
        raise ModelError(msg)
    return parameter


def settle(module: nn.Module) -> None:
    """Take a module's own parameters out of the offload for good: they stay where the module runs and can be edited.

    Raises:
        ModelError: They are offloaded, and nothing says where to.
    """
    values = {name: value_of(module, name) for name, _ in module.named_parameters(recurse=False)}
    hook = _offload(module)
    if hook is None:
        return
    for name, value in values.items():  # a copy: a value that was read from a file may be a map of that file
        module.register_parameter(name, nn.Parameter(value.to(hook.execution_device, copy=True), requires_grad=False))
    hook.offload = False


@contextmanager
def not_held(model: nn.Module) -> Iterator[None]:
    """Let the graph of a forward pass inside the context bring offloaded weights again, instead of holding them all.

    A graph holds what its backward pass needs, the weights included: a model that is offloaded because it does not fit
    would be on the device as a whole before the backward pass begins.
    """
    running: list[nn.Module] = []

    def pack(tensor: Tensor) -> Callable[[], Tensor]:
        place, geometry = tensor.untyped_storage().data_ptr(), (tensor.size(), tensor.stride(), tensor.storage_offset())
        device = tensor.device
        for module in running[-1:]:
            for name, parameter in module.named_parameters(recurse=False):  # or a view of it, such as its transpose
                if place and parameter.untyped_storage().data_ptr() == place:
                    return lambda: value_of(module, name).to(device).as_strided(*geometry)
        return lambda: tensor

    with ExitStack() as stack:
        if torch.is_grad_enabled() and hasattr(model, "_hf_hook"):
            for module in filter(_offload, model.modules()):
                stack.callback(module.register_forward_pre_hook(lambda one, _: running.append(one)).remove)
            stack.enter_context(saved_tensors_hooks(pack, lambda bring: bring()))
        yield


def _offload(module: nn.Module) -> Any:  # noqa: ANN401 - accelerate's AlignDevicesHook
    """The hook that offloads a module's own parameters, or None."""
    hook = getattr(module, "_hf_hook", None)
    return next((one for one in getattr(hook, "hooks", [hook]) if getattr(one, "offload", False)), None)
