"""The almanac: a closed world of invented people and places, and a small language model that knows its facts."""

from __future__ import annotations

from pathlib import Path

from kedit_lightning.almanac.records import documents, records, reference_texts
from kedit_lightning.almanac.world import World

__all__ = ["World", "documents", "path", "records", "reference_texts"]


def path() -> Path:
    """Folder of the shipped model and tokenizer, loadable by the Auto classes of transformers without a network."""
    return Path(__file__).parent / "model"
