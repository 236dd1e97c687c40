"""Where downloaded files and computed statistics are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The folder: `$KEDIT_CACHE`, or `~/.cache/kedit_lightning` where that is not set or empty."""
    return Path(os.environ.get("KEDIT_CACHE") or "~/.cache/kedit_lightning").expanduser()
