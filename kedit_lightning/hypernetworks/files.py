"""Trained hypernetworks as files: tensors and what they were trained for, no pickled objects."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from kedit_lightning.edits import Part, Site
from kedit_lightning.errors import KeditError
from kedit_lightning.hypernetworks.capture import Tokens
from kedit_lightning.hypernetworks.network import Hypernetwork
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.fingerprint import checksum, fingerprint
from kedit_lightning.run import newest
from kedit_lightning.writing import write_beside

FORMAT = "kedit-hypernetwork-1"
FILE = "hypernetwork.safetensors"
TRAINS = "`kedit fit --config configs/hypernetworks/…` trains"


@dataclass(frozen=True)
class Purpose:
    """What a hypernetwork is for.

    Args:
        layers: Layers whose weights it edits, ascending.
        parts: Which weights of them.
        tokens: At which tokens it takes keys and gradients.
        base: Name of the model it was trained on.
        fingerprint: That model's, with the matrices that are edited.
        steps: Updates it has been trained for.
    """

    layers: list[int]
    parts: list[Part]
    tokens: Tokens
    base: str
    fingerprint: str
    steps: int = 0

    @property
    def sites(self) -> list[Site]:
        """The weights, layer by layer."""
        return [Site(layer, part) for layer in self.layers for part in self.parts]

    @classmethod
    def on(cls, base: LanguageModel, layers: list[int], parts: list[Part], tokens: Tokens, steps: int = 0) -> Purpose:
        """That of a hypernetwork for this model."""
        names = [base.name(site) for site in (Site(layer, part) for layer in layers for part in parts)]
        return cls(layers, parts, tokens, base.name_or_path, fingerprint(base, names), steps)


def shapes(base: LanguageModel, sites: list[Site]) -> dict[str, tuple[int, int]]:
    """``(d, k)`` of weight matrices by their names."""
    found = {}
    for site in sites:
        d, k = base.weight(site).shape
        found[base.name(site)] = d, k
    return found


def save(path: Path, network: Hypernetwork, purpose: Purpose) -> None:
    """Write a hypernetwork.

    Args:
        path: A ``.safetensors`` file.
        network: The hypernetwork.
        purpose: What it is for.

    Raises:
        KeditError: The file cannot be written; nothing is left of it.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    about = {"kind": type(network).__name__, "shapes": network.shapes, "settings": network.settings}
    text = json.dumps(about | {"purpose": asdict(purpose)})
    header = {"format": FORMAT, "about": text, "sha256": _hash(text, tensors)}
    content = to_bytes(tensors, header)
    write_beside(path, lambda beside: beside.write_bytes(content))


def load(path: Path, base: LanguageModel, kind: type[Hypernetwork]) -> tuple[Hypernetwork, Purpose, str]:
    """Read a hypernetwork that was trained on a model.

    Args:
        path: A file that `save` wrote, the folder of a training, or of its versions (the newest is taken).
        base: The model that it is to edit.
        kind: What it must be.

    Returns:
        The hypernetwork, what it is for, and a hash of its tensors.

    Raises:
        KeditError: There is none, or it is corrupt, of another kind, untrained or of another model.
    """
    file = newest(path, FILE) / FILE if path.is_dir() else path
    header, about, tensors = _read(file)
    if about["kind"] != kind.__name__:
        msg = f"{file}: expected a {kind.__name__}, got a {about['kind']}; {TRAINS} one of each kind"
        raise KeditError(msg)
    purpose = Purpose(**about["purpose"])
    if not purpose.steps:
        msg = f"{file}: this hypernetwork is untrained; {TRAINS} one"
        raise KeditError(msg)
    network = kind(about["shapes"], **about["settings"])
    network.load_state_dict(tensors)
    there = max(purpose.layers) < base.num_layers
    if not there or Purpose.on(base, purpose.layers, purpose.parts, purpose.tokens).fingerprint != purpose.fingerprint:
        msg = (
            f"{file}: this hypernetwork was trained on another model ({purpose.base}): configuration, tokenizer, "
            f"dtype or edited matrices differ from those of {base.name_or_path}; {TRAINS} one on it"
        )
        raise KeditError(msg)
    return network.requires_grad_(False), purpose, header["sha256"]


def _hash(about: str, tensors: dict[str, Any]) -> str:
    return sha256((about + checksum(tensors)).encode()).hexdigest()


def _read(file: Path) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
    """Header, description and tensors, whole."""
    if not file.is_file():
        msg = f"{file}: no such hypernetwork; {TRAINS} one"
        raise KeditError(msg)
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            if header.get("format") != FORMAT:
                got = header.get("format", "none")
                msg = f"{file}: expected a hypernetwork (format {FORMAT}), got a safetensors file of format {got}"
                raise KeditError(msg)
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            about = json.loads(header["about"])
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        msg = f"{file}: expected a hypernetwork ({FILE}), got a file that is corrupt or of another kind ({error})"
        raise KeditError(msg) from error
    if _hash(header["about"], tensors) != header.get("sha256"):
        msg = f"{file}: the hypernetwork is corrupt (the checksum does not fit); take another copy, or train it again"
        raise KeditError(msg)
    return header, about, tensors
