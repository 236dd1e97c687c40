"""Trained hypernetworks as files: tensors and what they were trained for, no pickled objects."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from kedit_lightning.edits import Part, Site
from kedit_lightning.errors import KeditError
from kedit_lightning.hypernetworks.capture import Tokens
from kedit_lightning.hypernetworks.network import Hypernetwork
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.fingerprint import fingerprint
from kedit_lightning.run import newest
from kedit_lightning.tensor_files import TensorFile

FILE = "hypernetwork.safetensors"
TRAINS = "`kedit fit --config configs/hypernetworks/…` trains"
KIND = TensorFile("kedit-hypernetwork-2", "hypernetwork", f"{TRAINS} one", "take another copy, or train it again")


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
    about = {"kind": type(network).__name__, "shapes": network.shapes, "settings": network.settings}
    KIND.write(path, network.state_dict(), about | {"purpose": asdict(purpose)})


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
    about, tensors, sha256 = KIND.read(file)
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
    return network.requires_grad_(False), purpose, sha256
