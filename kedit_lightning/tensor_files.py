"""Safetensors files that say what they are, and whose tensors are checked when they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from kedit_lightning.errors import KeditError
from kedit_lightning.writing import write_beside


class Content(NamedTuple):
    """What a file holds.

    Attributes:
        metadata: What was said about the tensors.
        tensors: By name.
        sha256: Their checksum.
    """

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    sha256: str


@dataclass(frozen=True)
class TensorFile:
    """A kind of file.

    Args:
        format: Its format, such as "kedit-delta-1".
        what: What it is called, such as "delta file".
        there: Where there are such files, for who asks for one that is not there.
        again: What to do about one that cannot be read.
        error: What is raised.
    """

    format: str
    what: str
    there: str
    again: str
    error: type[KeditError] = KeditError

    def write(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Write tensors and what is said about them; of the same the file is the same to the byte.

        Args:
            path: A ``.safetensors`` file.
            tensors: By name; safetensors takes no two that share their memory.
            metadata: JSON-able.

        Raises:
            KeditError: The file cannot be written; nothing is left of it.
        """
        own = {name: each.detach().cpu().contiguous() for name, each in tensors.items()}
        header = {"format": self.format, "metadata": json.dumps(metadata), "sha256": checksum(own)}
        content = _ordered(to_bytes(own, header))
        write_beside(path, lambda beside: beside.write_bytes(content))

    def read(self, path: Path, *, with_tensors: bool = True) -> Content:
        """Read a file that `write` wrote.

        Args:
            path: The file.
            with_tensors: Also its tensors, which are then checked; otherwise there are none.

        Raises:
            KeditError: (or rather `error`) There is none, or it is corrupt, truncated or of another kind.
        """
        if not path.is_file():
            msg = f"{path}: no such {self.what}; {self.there}"
            raise self.error(msg)
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                if header.get("format") != self.format:
                    got = header.get("format", "none")
                    msg = (
                        f"{path}: expected a {self.what} (format {self.format}), got a safetensors file of format {got}"
                    )
                    raise self.error(msg)
                tensors = {key: file.get_tensor(key) for key in file.keys()} if with_tensors else {}  # noqa: SIM118
            found = Content(json.loads(header["metadata"]), tensors, header["sha256"])
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise self._corrupt(path, error) from error
        if with_tensors and checksum(tensors) != found.sha256:
            raise self._corrupt(path, "the checksum does not fit")
        return found

    def _corrupt(self, path: Path, reason: object) -> KeditError:
        return self.error(f"{path}: the {self.what} is corrupt or truncated ({reason}); {self.again}")


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors on the CPU with their names and shapes, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().data.cast("B"))
    return digest.hexdigest()


def _ordered(content: bytes) -> bytes:
    """A safetensors file with its header's names in order: the library's order is another in every process."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]
