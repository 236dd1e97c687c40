"""What a probe is given, and what it gives."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kedit_lightning.editors import Editor
from kedit_lightning.edits import Edit
from kedit_lightning.errors import KeditError
from kedit_lightning.lines import Record
from kedit_lightning.models import LanguageModel
from kedit_lightning.single_edits import SingleEdits

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Finding:
    """A table and its picture.

    Args:
        name: Stem of its files, such as ``causal_trace_subject``.
        rows: Lines of NAME.csv; all have the same keys.
        figure: NAME.png, and TensorBoard's; None: there is none to draw.
        notes: What a reader must know beside it, such as how many edits were used and skipped, and why; NAME.json.
    """

    name: str
    rows: Sequence[Record]
    figure: Figure | None
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """What a probe looks at.

    Args:
        editor: The editor, on the unedited model.
        edits: The edits of the data module.
        singles: Makes edits side by side.
        subjects: All subjects of the data set, each once, also those that the data module leaves out.
    """

    editor: Editor
    edits: Sequence[Edit]
    singles: SingleEdits
    subjects: Sequence[str]

    @property
    def base(self) -> LanguageModel:
        """The model."""
        return self.editor.base

    def sample(self, n: int, seed: int) -> list[Edit]:
        """Some of the edits by chance, as many as there are at most."""
        return random.Random(seed).sample(list(self.edits), min(n, len(self.edits)))


class Probe(ABC):
    """A look inside the model. A subclass's signature is its configuration: ``--probe CausalTrace --probe.seed 5``."""

    @abstractmethod
    def look(self, study: Study) -> Iterator[Finding]:
        """Look; yield each finding when it is there. Long work is shown by `models.progress.steps`.

        Args:
            study: What is looked at. The model is left as it was found.

        Raises:
            KeditError: There is nothing to look at, such as no prompt that the model answers as expected.
        """


def usable(edits: Sequence[Edit], answered: Sequence[bool], what: str) -> list[Edit]:
    """The edits whose prompts a model answers as a probe expects.

    Args:
        edits: n edits.
        answered: Which of them.
        what: What was expected, for the message, such as "the model's next token to be target_true".

    Raises:
        KeditError: There is none.
    """
    found = [edit for edit, yes in zip(edits, answered, strict=True) if yes]
    if not found:
        msg = f"no usable prompt: expected {what}, got none such among {len(edits)} edits; give other or more edits"
        raise KeditError(msg)
    return found
