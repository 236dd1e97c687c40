"""Files of second moments: our own, and those that others have published."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kedit_lightning.errors import StatisticsError
from kedit_lightning.tensor_files import checksum
from kedit_lightning.writing import write_beside

FORMAT = "kedit-statistics-1"
PARTIAL = "kedit-statistics-partial-1"
Moment = tuple[Tensor, int | None]
"""C of shape ``(k, k)`` and the number of keys in it, where that is known."""


def given(source: str) -> Path | None:
    """The statistics file or the folder of them that a source names, if it names one."""
    path = Path(source).expanduser()
    return path if path.suffix in (".npz", ".safetensors") or path.is_dir() else None


def save(path: Path, moment: Tensor, count: int, about: dict[str, str]) -> None:
    """Save a sum of ``k kᵀ``; the file is whole or it is not there.

    Args:
        path: A ``.safetensors`` file.
        moment: The sum, shape ``(k, k)``.
        count: Keys in it.
        about: What it was computed from, for the file's header.
    """
    tensors = {"moment": moment, "count": torch.tensor(count)}
    definition = "moment = sum of k k^T over count keys; C = moment / count"
    header = {"format": FORMAT, **about, "definition": definition, "sha256": checksum(tensors)}
    write_beside(path, lambda beside: save_file(tensors, beside, header))


def save_partial(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Save how far a pass has come; the file is whole or it is not there.

    Args:
        path: A ``.safetensors`` file.
        tensors: Its sums, on the CPU.
        about: The rest of its state, for the file's header.
    """
    write_beside(
        path, lambda beside: save_file(tensors, beside, {"format": PARTIAL, **about, "sha256": checksum(tensors)})
    )


def load_partial(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """What `save_partial` saved; None where there is no such file.

    Raises:
        StatisticsError: The file is corrupt.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            about, found = file.metadata() or {}, {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        msg = f"{path}: corrupt or truncated ({error})"
        raise StatisticsError(msg) from error
    if about.get("format") != PARTIAL or about.get("sha256") != checksum(found):
        msg = f"{path}: corrupt (the checksum does not fit)"
        raise StatisticsError(msg)
    return found, about


def load(path: Path, name: str, width: int, model: str | None = None) -> Moment:
    """Load a site's second moment.

    Args:
        path: A file that `save` wrote; a ``.safetensors`` file with the mean C under each linear map's name, and
            ``count``; a ``.npz`` file as published by ROME and MEMIT; or a folder with such files.
        name: Name of the linear map whose input the keys are, such as ``transformer.h.17.mlp.c_proj``.
        width: Width k of the keys.
        model: `fingerprint_below` of the model, compared where a file says which model it is of.

    Returns:
        C in the precision of the file, and the number of keys in it.

    Raises:
        StatisticsError: There is no such file, it is corrupt, or it is of another linear map, shape or model.
    """
    file = _find(path, name) if path.is_dir() else path
    if not file.is_file():
        msg = f"{path}: no such statistics file; expected .npz, .safetensors, or a folder with such files"
        raise StatisticsError(msg)
    try:
        mean, count = _load_npz(file, name) if file.suffix == ".npz" else _load_safetensors(file, name, model)
    except (SafetensorError, zipfile.BadZipFile, zlib.error, OSError, EOFError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        msg = f"{file}: the statistics file is corrupt, truncated or of another kind ({reason}); take another copy"
        raise StatisticsError(msg) from error
    if mean.shape != (width, width):
        msg = f"{file}: expected the second moment of {name} of shape {(width, width)}, got {tuple(mean.shape)}: "
        raise StatisticsError(msg + "it is of another model")
    if not mean.isfinite().all():
        msg = f"{file}: the second moment of {name} holds values that are not finite; take another copy"
        raise StatisticsError(msg)
    return mean, count


def _load_npz(file: Path, name: str) -> Moment:
    module = file.name.split("_float", 1)[0]
    if module != file.name and module != name:
        msg = f"{file}: expected the second moment of {name}, got that of {module}; give the folder for several layers"
        raise StatisticsError(msg)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            moment, count = torch.from_numpy(arrays["mom2.mom2"]), int(arrays["mom2.count"])
    except ValueError as error:  # numpy's word for a file that is no archive, and for pickled objects
        raise KeyError(*error.args) from error
    return moment / count, count


def _load_safetensors(file: Path, name: str, model: str | None) -> Moment:
    with safe_open(file, "pt") as tensors:
        about, keys = tensors.metadata() or {}, set(tensors.keys())
        if about.get("format") != FORMAT:
            if name not in keys:
                there = ", ".join(sorted(keys - {"count"}))
                msg = f"{file}: expected the second moment of {name}, got those of {there[:200]}"
                raise StatisticsError(msg)
            mean = tensors.get_tensor(name).clone()  # a view of the file would go bad with the file
            return mean, int(tensors.get_tensor("count")) if "count" in keys else None
        for what, got, expected in (("linear map", about["module"], name), ("model", about["model"], model)):
            if expected is not None and got != expected:
                msg = f"{file}: the second moment is of another {what}: expected {expected}, got {got}"
                raise StatisticsError(msg)
        found = {key: tensors.get_tensor(key) for key in keys}
        if checksum(found) != about["sha256"]:
            msg = "the checksum does not fit"
            raise SafetensorError(msg)
        count = int(found["count"])
        return found["moment"] / count, count


def _find(folder: Path, name: str) -> Path:
    found = [path for path in sorted(folder.rglob("*.npz")) if path.name.startswith((f"{name}_", f"{name}."))]
    found += [path for path in sorted(folder.rglob("*.safetensors")) if _holds(path, name)]
    if len(found) != 1:
        got = ", ".join(str(path.relative_to(folder)) for path in found) or "none"
        msg = (
            f"{folder}: expected one file with the second moment of {name} ({name}_*.npz, or .safetensors that holds "
            f"it), got {got}"
        )
        raise StatisticsError(msg)
    return found[0]


def _holds(path: Path, name: str) -> bool:
    try:
        with safe_open(path, "pt") as tensors:
            return name in tensors.keys() or (tensors.metadata() or {}).get("module") == name  # noqa: SIM118
    except (SafetensorError, OSError):
        return path.name.find(name) >= 0
