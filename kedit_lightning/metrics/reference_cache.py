"""The folder where measurements of unedited models are kept and found again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kedit_lightning import __version__
from kedit_lightning.cache import cache_dir
from kedit_lightning.edits import Edit
from kedit_lightning.errors import KeditError
from kedit_lightning.lines import Record, as_lines
from kedit_lightning.metrics.evaluator import Evaluator
from kedit_lightning.models.fingerprint import fingerprint_below
from kedit_lightning.models.processes import ranks
from kedit_lightning.writing import write_beside

About = Mapping[str, Any]
"""Everything that a measurement depends on, as plain data."""

log = logging.getLogger(__name__)


def about(evaluator: Evaluator, groups: Sequence[Sequence[Edit]], environment: Record, *, scored: bool) -> About:
    """What the bits of a measurement of an unedited model depend on.

    Args:
        evaluator: Its model, with all weights, its settings and reference texts.
        groups: The edits, those together that are scored together.
        environment: Libraries, device and threads.
        scored: Whether more than answers is measured.
    """
    base, settings = evaluator.base, asdict(evaluator.settings)
    del settings["cache"]
    return {
        "weights": fingerprint_below(base, base.num_layers - 1),
        "attention": str(base.model.config.get_text_config()._attn_implementation),
        "device_map": str(getattr(base.model, "hf_device_map", None)),
        "edits": _hash(repr([list(group) for group in groups])),
        "reference_texts": _hash(json.dumps(evaluator.reference_texts, sort_keys=True)),
        "scored": scored,
        "settings": settings,
        "protocol": evaluator.protocol,
        "environment": environment,
    }


class ReferenceCache:
    """Files of what an unedited model answers and scores, a line an edit, each named by what it depends on.

    The first line says what that is, with a hash of the others.

    Args:
        folder: Where they are; by default in the cache of kedit_lightning.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_dir() / "references"

    def path(self, about: About) -> Path:
        """The file of a measurement."""
        return self.folder / f"{_hash(json.dumps(about, sort_keys=True))[:16]}.jsonl"

    def load(self, about: About) -> list[Record] | None:
        """The lines, if they are there; of a file that is damaged or of something else it is said."""
        path = self.path(about)
        if not path.is_file():
            return None
        try:
            head, _, body = path.read_bytes().partition(b"\n")
            first = json.loads(head)
            if first["about"] == json.loads(json.dumps(about)) and first["lines"] == hashlib.sha256(body).hexdigest():
                return [json.loads(line) for line in body.splitlines()]
            reason = "it is damaged, or of another measurement"
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"it cannot be read: {error}"
        log.warning("warning: %s: %s. The unedited model is measured again.", path, reason)
        return None

    def keep(self, about: About, lines: Sequence[Record]) -> None:
        """Keep lines, once for all processes; where there is no room for them, that is said."""
        if ranks()[0] > 0:
            return
        body = as_lines(lines)
        first = {"about": about, "lines": hashlib.sha256(body).hexdigest(), "kedit_lightning": __version__}
        try:
            write_beside(self.path(about), lambda path: path.write_bytes(as_lines([first]) + body))
        except KeditError as error:
            log.warning("warning: cannot keep the measurement of the unedited model: %s. Going on without.", error)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
