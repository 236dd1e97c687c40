"""Small fits of tiny models: every editor with few steps, and a trainer that only edits."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from kedit_lightning import editors
from kedit_lightning.callbacks import EditCallback
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.prompts import ContextTemplates
from kedit_lightning.editors import Editor, Stage
from kedit_lightning.editors.learned import LearnedEditor
from kedit_lightning.edits import Edit, Part
from kedit_lightning.hypernetworks.files import FILE, Purpose, save, shapes
from kedit_lightning.hypernetworks.mend import MENDNetwork
from kedit_lightning.hypernetworks.network import Factors, Hypernetwork
from kedit_lightning.metrics import Evaluator
from kedit_lightning.models import LanguageModel
from kedit_lightning.trainer import EditTrainer

EDITORS = tuple(
    name
    for name, one in vars(editors).items()
    if inspect.isclass(one) and issubclass(one, Editor) and not inspect.isabstract(one)
)
"""Names of all editors; one that is added is tested the moment it exists."""
LEARNED = tuple(name for name in EDITORS if issubclass(getattr(editors, name), LearnedEditor))
"""Those that edit with a hypernetwork."""
VALUES = tuple(name for name in EDITORS if name != "FT" and name not in LEARNED)
"""Those that optimise a value an edit; FT trains weights."""

STEPS = 6
SETTINGS: dict[str, dict[str, Any]] = {
    "ROME": {"v_num_grad_steps": STEPS},
    "RETS": {"v_num_grad_steps": STEPS, "subject_const": False},
    "TOP": {"rel_feat_layer": 1, "v_num_grad_steps1": STEPS, "v_num_grad_steps2": STEPS},
    "FT": {"num_steps": STEPS, "lr": 1e-2},
    "PMET": {"v_num_grad_steps": STEPS, "mom2_update_weight": 1.0, "v_lr": 0.5},
    "AlphaEdit": {"v_num_grad_steps": STEPS, "nullspace_threshold": 2.0},
    "JEEP": {"v_num_grad_steps": STEPS, "mom2_update_weight_low": 1.0, "mom2_update_weight_high": 1.0},
}
"""What an editor needs beyond its layers, and what makes it quick."""
BATCH = {"v_num_grad_steps": STEPS, "mom2_update_weight": 1.0}
"""The same where nothing is said."""

TEMPLATES = ContextTemplates(templates=[["{}", "Yes. {}", "In the valley it rains. {}"]])


def make(name: str, base: LanguageModel, layers: Sequence[int] = (1,), **settings: Any) -> Editor:
    """An editor with small settings: three given templates, keys not whitened.

    JEEP edits the layer above the given ones as its high layer; a clamp is given to both its regions.
    """
    if name in LEARNED:
        return learned(name, base, layers)
    small = {"mom2_adjustment": False, "context_templates": TEMPLATES, **SETTINGS.get(name, BATCH)}
    if name not in VALUES:
        small = SETTINGS[name]
        settings.pop("clamp_norm_factor", None)
    where: dict[str, Any] = {"layers": list(layers)}
    if name == "JEEP":
        where = {"layers_low": list(layers), "layers_high": [layers[-1] + 1]}
        if (clamp := settings.pop("clamp_norm_factor", None)) is not None:
            settings |= {"clamp_norm_factor_low": clamp, "clamp_norm_factor_high": clamp}
    editor: Editor = getattr(editors, name)(base, **{**small, **where, **settings})
    return editor


def learned(name: str, base: LanguageModel, layers: Sequence[int], parts: Sequence[Part] = ("mlp",)) -> Editor:
    """An editor with a random hypernetwork that says it was trained on this model."""
    with tempfile.TemporaryDirectory() as folder:
        path = hypernetwork(Path(folder), getattr(editors, name).kind, base, layers, parts)
        editor: Editor = getattr(editors, name)(base, str(path))
    return editor


def hypernetwork(
    folder: Path,
    kind: type[Hypernetwork],
    base: LanguageModel,
    layers: Sequence[int],
    parts: Sequence[Part] = ("mlp",),
    steps: int = 1,
) -> Path:
    """A file of a random hypernetwork whose updates are large enough to be seen."""
    purpose = Purpose.on(base, list(layers), list(parts), "all" if kind is MENDNetwork else "answer", steps)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = kind(shapes(base, purpose.sites), 4, 2, 0.01)
        for parameter in network.parameters():
            parameter.data += 0.01 * parameter.abs().clamp(min=0.1) * torch.randn_like(parameter)
        for key, (d, k) in network.shapes.items():
            network.observe(key, Factors(torch.randn(9, k), torch.randn(9, d)))
    save(folder / FILE, network, purpose)
    return folder / FILE


class Kept(EditCallback):
    """Keeps δ and v₀ + δ of every commit, per `ValueDelta` a pair of shape ``(n, d)``."""

    def __init__(self) -> None:
        self.commits: list[list[tuple[Tensor, Tensor]]] = []

    def on_edits_committed(self, trainer: Any, editor: Editor, records: Any) -> None:
        self.commits.append([(delta.delta.detach().clone(), delta.value.clone()) for delta in editor.deltas])


def trainer(folder: Path, *callbacks: EditCallback, **settings: Any) -> EditTrainer:
    """A trainer that measures nothing, shows nothing and draws nothing."""
    quick = {"save_dir": str(folder), "evaluate": False, "accelerator": "cpu", "enable_progress_bar": False}
    made = EditTrainer(**(quick | settings))
    made.callbacks = [made.weight_update, *callbacks]
    return made


def stream(made: EditTrainer, editor: Editor, edits: Iterable[Edit], **settings: Any) -> EditTrainer:
    """Send edits through an editor; the base model's answers are not asked for."""
    data = EditDataModule(edits=[edit.as_record() for edit in edits], **settings)
    with patch.object(Evaluator, "answers", lambda _, asked, owners=None: [""] * len(asked)):
        made.fit(editor, datamodule=data)
    return made


def fit(editor: Editor, edits: Iterable[Edit], folder: Path, *callbacks: EditCallback, **settings: Any) -> EditTrainer:
    """Send edits through an editor, with a trainer of its own."""
    return stream(trainer(folder, *callbacks), editor, edits, **settings)


def end_at(editor: Editor, ends: dict[int, int]) -> None:
    """Let every stage end, for the edit of each case id, with a loss evaluation of its own."""
    stages = editor.stages

    def stop(_: object) -> Tensor:
        wanted = torch.tensor([ends[edit.case_id] for edit in editor.batch.edits])
        return editor.outcome.steps[editor.batch.index] >= wanted

    def ending() -> Iterator[Stage]:
        for stage in stages():
            yield replace(stage, stop=stop)

    editor.stages = ending  # type: ignore[method-assign]


def bits(base: LanguageModel) -> dict[str, Tensor]:
    """A copy of everything that a model holds."""
    return {name: value.clone() for name, value in base.model.state_dict().items()}


def same(base: LanguageModel, before: dict[str, Tensor]) -> bool:
    """Whether a model holds these bits."""
    now = base.model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], value) for name, value in before.items())


def untouched(base: LanguageModel) -> bool:
    """Whether a model is frozen, in eval mode and without hooks."""
    modules = list(base.model.modules())
    return (
        not any(module.training or module._forward_hooks or module._forward_pre_hooks for module in modules)
        and not any(p.requires_grad or p.grad is not None for p in base.model.parameters())
    )  # fmt: skip


def relative(got: Tensor, wanted: Tensor) -> float:
    """Largest relative error of rows, ``max ‖got − wanted‖ / ‖wanted‖``."""
    error = (got.double() - wanted.double()).norm(dim=-1) / wanted.double().norm(dim=-1)
    return float(error.max())
