"""The base model: architectures, tokenisation, reading, adding and writing."""

from kedit_lightning.models.architectures import ARCHITECTURES, Architecture
from kedit_lightning.models.encoding import IGNORE, Batch, Row, buckets, collate, encode
from kedit_lightning.models.language_model import LanguageModel
from kedit_lightning.models.statistics import Statistics

__all__ = [
    "ARCHITECTURES",
    "IGNORE",
    "Architecture",
    "Batch",
    "LanguageModel",
    "Row",
    "Statistics",
    "buckets",
    "collate",
    "encode",
]
