"""Locate-then-edit knowledge editing of language models on PyTorch Lightning.

`kedit fit --config …` edits from the command line, `kedit_lightning.edit` from Python. Importing this package loads
neither torch nor transformers.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kedit_lightning.api import edit as edit

__all__ = ["__version__", "edit"]

try:
    __version__ = version("kedit_lightning")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0.0.0"


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    """Import `edit` on first use, so that `kedit --help` and `import kedit_lightning` stay quick."""
    if name == "edit":
        from kedit_lightning.api import edit

        return edit
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
