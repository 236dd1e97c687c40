"""Where an editor may work, and the rules by which `kedit suggest` chooses among the places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from kedit_lightning.editors import Editor
from kedit_lightning.lines import Record

Layers = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where an editor works.

    Args:
        layers: The layers it edits, of JEEP the low ones.
        l_a: The block of TOP's relation feature.
        high: JEEP's high layers.
    """

    layers: Layers
    l_a: int | None = None
    high: Layers = ()

    @property
    def settings(self) -> Record:
        """The editor's settings that say so.

        >>> Place((2,), l_a=7).settings, Place((0, 1), high=(5,)).settings
        ({'layers': [2], 'rel_feat_layer': 5}, {'layers_low': [0, 1], 'layers_high': [5]})
        """
        if self.high:
            return {"layers_low": list(self.layers), "layers_high": list(self.high)}
        if self.l_a is None:
            return {"layers": list(self.layers)}
        offsets = [self.l_a - layer for layer in self.layers]
        return {"layers": list(self.layers), "rel_feat_layer": offsets if len(offsets) > 1 else offsets[0]}

    @property
    def is_ordered(self) -> bool:
        """Whether no layer is below 0, and JEEP's high ones are above the low ones."""
        return self.layers[0] >= 0 and (not self.high or self.layers[-1] < self.high[0])

    @contextmanager
    def taken(self, editor: Editor) -> Iterator[None]:
        """Let an editor work there for a while; it has to be prepared anew."""
        there: dict[str, Any] = {"layers": [*self.layers, *self.high]}
        if self.l_a is not None:
            there["l_a"] = dict.fromkeys(self.layers, self.l_a)
        if self.high:
            there |= {"layers_low": list(self.layers), "layers_high": list(self.high)}
        given = {name: getattr(editor, name) for name in there}
        vars(editor).update(there)
        try:
            yield
        finally:
            vars(editor).update(given)


def beside(place: Place, last: int) -> list[Place]:
    """The places one layer below and above: with TOP's l_a moved, or the edited layers, JEEP's low or its high ones.

    Args:
        place: The place.
        last: The last layer that may be part of one.

    >>> [beside.layers for beside in beside(Place((0, 1)), 7)], [beside.l_a for beside in beside(Place((2,), 4), 7)]
    ([(1, 2)], [3, 5])
    >>> [(beside.layers, beside.high) for beside in beside(Place((0, 1), high=(3,)), 3)]
    [((1, 2), (3,)), ((0, 1), (2,))]
    """
    if place.l_a is not None:
        return [replace(place, l_a=l_a) for l_a in (place.l_a - 1, place.l_a + 1) if place.layers[-1] < l_a <= last]
    found = [replace(place, layers=layers) for layers in _moved(place.layers)]
    found += [replace(place, high=high) for high in _moved(place.high)]
    return [other for other in found if other.is_ordered and max(other.layers + other.high) <= last]


def _moved(layers: Layers) -> list[Layers]:
    return [tuple(layer + by for layer in layers) for by in (-1, 1)] if layers else []


def ranked(effects: Sequence[float], width: int, last: int) -> list[Layers]:
    """Runs of layers by the sum of their MLPs' indirect effects, largest first; of equals the lower.

    Args:
        effects: The mean indirect effect at the subject's last token, a layer each.
        width: Layers of a run.
        last: The last layer that may be part of one.

    >>> ranked([0.1, 0.4, 0.3, 0.0], 1, 2), ranked([0.1, 0.4, 0.3, 0.0], 2, 3)
    ([(1,), (2,), (0,)], [(1, 2), (0, 1), (2, 3)])
    """
    runs = [tuple(range(first, first + width)) for first in range(last + 2 - width)]
    return sorted(runs, key=lambda run: -sum(effects[layer] for layer in run))


def steepest(p: Sequence[float], width: int, below: int) -> Layers:
    """The run of layers over which a probability rises most; of equals the lowest.

    Args:
        p: The probability before the first layer, and after every one.
        width: Layers of the run.
        below: A layer that all of them lie above.

    >>> steepest([0.0, 0.5, 0.5, 0.6, 0.9, 0.9], 2, below=0), steepest([0.0, 0.5, 0.5, 0.6], 1, below=0)
    ((2, 3), (2,))
    """
    runs = [tuple(range(first, first + width)) for first in range(below + 1, len(p) - width)]
    return max(runs, key=lambda run: p[run[-1] + 1] - p[run[0]])


def spaced(first: int, last: int, n: int) -> list[int]:
    """At most n layers from the last one down to the first, both among them, evenly spaced.

    >>> spaced(3, 7, 3), spaced(6, 7, 4), spaced(3, 7, 1)
    ([7, 5, 3], [7, 6], [7])
    """
    n = min(n, last + 1 - first)
    return [round(last - i * (last - first) / max(1, n - 1)) for i in range(n)]


def listed(layers: Sequence[int]) -> str:
    """Layers in words, such as ``2`` or ``0, 1, 2``."""
    return ", ".join(map(str, layers))
