"""Where the gradient of an editor's loss is large (TOP, section 3.2 and appendix A, Figs. 2 and 8)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kedit_lightning.callbacks.figures import STYLE, blank, headline
from kedit_lightning.editors.checks import ascending, at_least
from kedit_lightning.edits import Edit
from kedit_lightning.errors import KeditError
from kedit_lightning.lines import Record
from kedit_lightning.metrics.functional import summarize
from kedit_lightning.models.full import Forwards
from kedit_lightning.probes.base import Finding, Probe, Study
from kedit_lightning.probes.gradients import Gradients, Prompts, WatchedForward
from kedit_lightning.probes.token_classes import CLASSES
from kedit_lightning.report import count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EPOCHS = [1, 5, 10, 15, 20]
"""Those of TOP's Fig. 8; the first alone is Fig. 2."""


class GradientSaliency(Probe):
    """The norm of the loss's gradient at every block's output, by layer and token class.

    ``G(i, l) = ‖∂L/∂h_i^l‖₂`` (TOP, Eq. 5), where L is the loss that the editor itself optimises, at the δ of each of
    its steps: mean over the tokens of a class, over the optimisation steps 1 to E, then over the edits. An edit that
    ended before E counts with the steps that it took; a stage's last loss evaluation is followed by no update, and has
    no gradient. Every stage has a map of its own. Left out are the rows of the KL, and the last token in the last
    layer, which the head reads.

    Args:
        edits: How many edits, by chance of those there are.
        epochs: The Es, a table and a figure each.
        prompts: ``bare``: the prompt by itself; ``all``: in every context template. The loss being a mean over these,
            gradients are times their number.
        seed: Of the choice of edits.

    Raises:
        KeditError: A setting is out of range.
    """

    def __init__(self, edits: int = 100, epochs: list[int] = EPOCHS, prompts: Prompts = "bare", seed: int = 0) -> None:
        at_least(1, edits=edits, epochs=min(epochs, default=0))
        self.edits, self.epochs, self.prompts, self.seed = edits, ascending(epochs=epochs), prompts, seed

    def look(self, study: Study) -> Iterator[Finding]:
        """A finding an E, ``gradient_saliency_E``: the mean gradient with its 95 % interval over the edits.

        Raises:
            KeditError: The editor optimises no value, or no edit has a gradient.
        """
        editor, edits = study.editor, study.sample(self.edits, self.seed)
        name = type(editor).__name__
        if "compress" not in editor.config:
            msg = f"GradientSaliency: expected an editor that optimises a value, got {name}, which optimises none"
            raise KeditError(msg)
        gradients = self._gradients(study, edits)
        if not gradients.used:
            msg = (
                f"GradientSaliency: expected edits that take a step, got none among {len(edits)}: they were rejected, "
                "or their stages end at the first loss evaluation; give other edits or more steps"
            )
            raise KeditError(msg)
        notes = {
            "editor": name,
            "prompts": self.prompts,
            "edits": len(edits),
            "edits_used": gradients.used,
            "edits_rejected": gradients.rejected,
            "token_classes_that_never_occur": gradients.missing,
        }
        for epochs in self.epochs:
            rows = [row for place, values in gradients.maps.items() for row in summary(values, epochs, *place)]
            title = f"{name}, {count(gradients.used)}: gradients of " + (
                f"steps 1 to {epochs}" if epochs > 1 else "step 1"
            )
            yield Finding(f"gradient_saliency_{epochs}", rows, draw(rows, title), {"epochs": epochs, **notes})

    def _gradients(self, study: Study, edits: Sequence[Edit]) -> Gradients:
        """Make the edits, by forward passes whose gradients are watched."""
        editor, given = study.editor, study.editor.forwards
        gradients = Gradients(editor, edits, self.epochs[-1], self.prompts)
        editor.forwards = Forwards(partial(WatchedForward, watch=gradients.watch))
        try:
            with study.singles.ready():
                for block, owners in study.singles.blocks(edits):
                    gradients.drop([edit for edit, owner in zip(block, owners, strict=True) if owner < 0])
        finally:
            editor.forwards = given
        return gradients


def summary(values: Tensor, epochs: int, edit_layer: int, stage: str) -> list[Record]:
    """The map of a stage as rows, a row a layer and token class.

    Args:
        values: Of every edit and step, shape ``(n, steps, layers, 7)``, nan where there is none.
        epochs: How many steps are averaged.
        edit_layer: The layer that the pass is of.
        stage: The stage.
    """
    of_edit = values[:, :epochs].double().nanmean(dim=1)
    layers = torch.nonzero((~of_edit.isnan()).any(dim=2).any(dim=0))[:, 0].tolist()
    found = {(layer, token): summarize(of_edit[:, layer, i]) for layer in layers for i, token in enumerate(CLASSES)}
    return [
        {
            **{"edit_layer": edit_layer, "stage": stage, "layer": layer, "token": token},
            **{"gradient": mean.mean, "ci95": mean.ci95, "edits": mean.n},
        }
        for (layer, token), mean in found.items()
    ]


def draw(rows: Sequence[Record], title: str) -> Figure:
    """A heat map a stage: layers from left to right, token classes from top to bottom; grey: there is none."""
    from matplotlib import colormaps, rc_context

    stages = list(dict.fromkeys((row["edit_layer"], row["stage"]) for row in rows))
    with rc_context(STYLE):
        figure = blank(max(6.4, 5.2 * len(stages)), 3.6)
        colours = colormaps["Blues"].with_extremes(bad=STYLE["grid.color"])
        for axis, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
            mine = [row for row in rows if (row["edit_layer"], row["stage"]) == stage]
            layers = sorted({row["layer"] for row in mine})
            values = torch.tensor([row["gradient"] for row in mine]).view(len(layers), len(CLASSES)).T
            image = axis.imshow(values.numpy(), cmap=colours, vmin=0, aspect="auto", extent=_extent(layers))
            axis.set_yticks(range(len(CLASSES)), [f"{name} ({token})" for token, name in CLASSES.items()])
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.set_xlabel("layer (grey: no such token, or no gradient)" if values.isnan().any() else "layer")
            axis.set_title("stage {1}, edited layer {0}".format(*stage), loc="left")
            axis.tick_params(length=0)
            figure.colorbar(image, ax=axis, label="‖∂L/∂h‖₂")
        headline(figure, title)
    return figure


def _extent(layers: Sequence[int]) -> tuple[float, float, float, float]:
    return layers[0] - 0.5, layers[-1] + 0.5, len(CLASSES) - 0.5, -0.5
