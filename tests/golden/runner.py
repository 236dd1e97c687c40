"""Runs a recorded case through the same machinery as a user's run: base model, editor, data module, trainer."""

from __future__ import annotations

import io
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from lightning import Trainer
from torch import Tensor

from kedit_lightning import editors
from kedit_lightning.callbacks import EditCallback
from kedit_lightning.data.bare_prompts import BarePrompts
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.prompts import ContextTemplates
from kedit_lightning.editors import JEEP, AlphaEdit, Editor, Loss, Stage
from kedit_lightning.edits import Edit, Site
from kedit_lightning.messages import settings_of
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.statistics import Statistics
from kedit_lightning.trainer import EditTrainer
from tests.golden.cases import Case
from tests.golden.compare import labels
from tests.golden.editors import TERMS, WITHOUT_EFFECT, Recorded

PROMPTS: Mapping[str, Callable[[Edit], Sequence[str]]] = {
    "prompt": lambda edit: [edit.text],
    "paraphrase": lambda edit: edit.paraphrase_prompts,
    "neighborhood": lambda edit: edit.neighborhood_prompts,
    "relation_specificity": lambda edit: edit.relation_specific_prompts,
}


@dataclass
class Run:
    """What our run of a case gave.

    Args:
        editor: The editor; its base model is edited as it is after the last batch.
        numbers: Tensors by the recording's names.
        exact: Token ids, positions and counts by the recording's names.
        unused: Hyper-parameters of the recording that nothing of ours takes.
    """

    editor: Editor
    numbers: dict[str, Tensor] = field(default_factory=dict)
    exact: dict[str, Any] = field(default_factory=dict)
    unused: dict[str, Any] = field(default_factory=dict)


def run(case: Case, dtype: Literal["float32", "bfloat16"] = "float32") -> Run:
    """Run a case of an editor that this project has.

    Args:
        case: The case.
        dtype: Type of the base model's weights; the recordings are float32.
    """
    recorded = case.recorded
    assert recorded is not None
    base = LanguageModel(str(case.path(f"models/{case.model}")), dtype=dtype, attn_implementation="eager")
    editor, unused = build(case, recorded, base)
    result = Run(editor, unused=unused)
    size = len(case.batches[0])
    data = EditDataModule(
        "jsonl",
        edits=case.requests,
        batch_size=size,
        restore_every=None if case.meta["mode"] == "seq2" else size,
        parallel_edits=1,  # the recorder compares each commit as it is made
    )
    data.setup("fit")
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        trainer = EditTrainer(
            save_dir=folder,
            evaluate=False,
            accelerator="cpu",
            callbacks=[Recorder(case, recorded, result, data.edits)],
            enable_progress_bar=False,
        )
        trainer.fit(editor, datamodule=data)
    return result


def build(case: Case, recorded: Recorded, base: LanguageModel) -> tuple[Editor, dict[str, Any]]:
    """The editor with the case's hyper-parameters and the released preset, and the hyper-parameters left over."""
    kind: Any = getattr(editors, recorded.editor)
    takes = settings_of(kind)
    hparams: dict[str, Any] = case.meta["hparams"]
    ours: dict[str, Any] = {
        "statistics": Statistics(source=str(case.path(f"cov_{case.model}.safetensors"))),
        "context_templates": ContextTemplates(templates=case.templates),
        "preset": "released",
    }
    if "constraint" in takes:
        ours["constraint"] = BarePrompts(prompts=case.knowns)
    given = {key: value for key, value in (ours | hparams | dict(recorded.settings)).items() if key in takes}
    known = WITHOUT_EFFECT | recorded.means
    unused = {
        key: value
        for key, value in hparams.items()
        if key not in takes and not (key in known and known[key] in (..., value))
    }
    return kind(base, **given), unused


class Recorder(EditCallback):
    """Keeps what the recordings hold, under their names."""

    def __init__(self, case: Case, recorded: Recorded, result: Run, edits: Sequence[Edit]) -> None:
        self.case, self.recorded, self.result, self.edits, self.number = case, recorded, result, edits, 0
        self.steps: dict[tuple[str, int], list[list[Tensor]]] = defaultdict(list)
        self.at: dict[Site, Tensor] = {}
        self.positions: dict[str, dict[int, list[list[int]]]] = {}
        self.stages: dict[str, Stage] = {}
        self.keys: dict[Site, Tensor] = {}
        self.residuals: dict[Site, Tensor] = {}

    def on_stream_start(self, trainer: Trainer, editor: Editor, n_edits: int) -> None:
        """Listen to where and at which losses δs are added, and to the keys that the editor takes."""
        self.before = _parameters(editor.base)
        self._before(editor)
        forward_from, keys, course, solve = editor.forward_from, editor.keys, editor.course, editor.solve

        def listening_forward(rows: Any, at: Any, *args: Any, **kwargs: Any) -> Any:
            self.at |= at
            return forward_from(rows, at, *args, **kwargs)

        def listening_keys(tokens: Any, **kwargs: Any) -> Any:
            found = keys(tokens, **kwargs)
            for site, of_site in found.items():
                self.keys.setdefault(site, of_site.mean)
            return found

        def listening_solve(site: Site, residual: Tensor, *args: Any) -> Any:
            self.residuals[site] = residual
            return solve(site, residual, *args)

        def listening_course() -> Iterator[Stage]:
            for stage in course():
                self.stages[stage.name] = stage
                yield replace(stage, prepare=partial(self.listening_loss, editor, stage))

        editor.forward_from = listening_forward  # type: ignore[method-assign]
        editor.keys = listening_keys  # type: ignore[method-assign]
        editor.solve = listening_solve  # type: ignore[method-assign]
        editor.course = listening_course  # type: ignore[method-assign]

    def listening_loss(self, editor: Editor, stage: Stage) -> Callable[[], Loss]:
        """Keep the δs at which the loss is evaluated, of the edits that are not left out as done."""
        evaluate, index = stage.prepare(), editor.batch.index.tolist()
        rows = editor.batch.edit
        for j, i in enumerate(index):
            each = [self.at[delta.site] for delta in stage.deltas]  # of all rows, or of the bare prompts alone
            mine = [at[rows == j] if len(at) == len(rows) else at[j : j + 1] for at in each]
            self.positions.setdefault(stage.name, {}).setdefault(i, [at.tolist() for at in mine])

        def loss() -> Loss:
            lines = [delta.delta.detach().clone() for delta in stage.deltas]
            for j, i in enumerate(index):
                self.steps[stage.name, i].append([delta[j] for delta in lines])
            return evaluate()

        return loss

    def on_edits_committed(self, trainer: Trainer, editor: Editor, records: Sequence[Any]) -> None:
        """An edit batch is in the weights: everything on it is known."""
        case_ids = self.case.batches[self.number]
        for i, edit in enumerate(editor.edits):
            assert edit.case_id == case_ids[i]
            self._keep_edit(editor, i, f"{self._batch}req{edit.case_id}/")
            _keep_logits(self.result, editor.base, edit, f"{self._batch}req{edit.case_id}/logits_post")
        for outcome in editor.outcomes:
            together = [torch.stack(list(terms.values())).sum(dim=0).mean() for terms in outcome.curves]
            self.result.numbers["batch/steps/loss"] = torch.stack(together)
        where = f"req{case_ids[0]}/" if self.case.meta["mode"] == "single" else self._batch
        after = _parameters(editor.base)
        for name, parameter in after.items():
            if not torch.equal(parameter, self.before[name]):
                self.result.numbers[f"{where}dW/{name}"] = parameter - self.before[name]
        if self.case.meta["mode"] != "single":
            self.before = after
        if len(case_ids) == 1:
            self._keep_factors(trainer, where)
        for name, found in (("layer_ks", self.keys), ("resid", self.residuals)):
            for site, lines in found.items():
                region = ("low" if site.layer in editor.layers_low else "high") if isinstance(editor, JEEP) else "solve"
                self.result.numbers[f"{where}{region}/layer{site.layer}/{name}"] = lines.T
        for kept in (self.steps, self.at, self.positions, self.keys, self.residuals):
            kept.clear()
        if isinstance(editor, AlphaEdit):
            self._keep_projection(editor)
        self.number += 1
        if self._batch and self.number < len(self.case.batches):
            self._before(editor)

    @property
    def _batch(self) -> str:
        """Begins the names of what belongs to one batch of a sequence."""
        return f"b{self.number + 1}/" if self.case.meta["mode"] == "seq2" else ""

    def _before(self, editor: Editor) -> None:
        """Logits before the next edits: before a batch of a sequence, else before all."""
        chosen = self.case.batches[self.number] if self._batch else self.case.meta["case_ids"]
        for edit in self.edits:
            if edit.case_id in chosen:
                _keep_logits(self.result, editor.base, edit, f"{self._batch}req{edit.case_id}/logits_pre")

    def _keep_projection(self, editor: AlphaEdit) -> None:
        """P of every layer, and M as it is after this batch."""
        bases = [editor.moments[site].null_space(editor.nullspace_threshold) for site in editor.sites()]
        self.result.numbers["P"] = torch.stack([basis @ basis.T for basis in bases])
        remembered = [editor.remembered[editor.base.name(site)] for site in editor.sites()]
        self.result.numbers[f"cache_c_after_b{self.number + 1}"] = torch.stack(remembered)

    def _keep_edit(self, editor: Editor, i: int, where: str) -> None:
        """Curves, values and tokens of one edit of the batch."""
        numbers, exact = self.result.numbers, self.result.exact
        batch = next(part for part in editor.parts if i in part.index)
        of_edit = batch.edit == batch.index.tolist().index(i)
        rewriting = batch.rows.labels[of_edit & ~batch.essence]
        tokens = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(batch.rows.input_ids[of_edit], batch.rows.attention_mask[of_edit], strict=True)
        ]
        for outcome in editor.outcomes:
            stage = self.recorded.stages[outcome.stage]
            prefix = where + stage.prefix
            n = int(outcome.steps[i])
            curves = {
                TERMS[term]: torch.stack([step[term][i] for step in outcome.curves[:n]]) for term in outcome.curves[0]
            }
            curves["loss"] = torch.stack(list(curves.values())).sum(dim=0)
            numbers |= {f"{prefix}steps/{term}": curve for term, curve in curves.items()}
            exact[f"{prefix}n_loss_evaluations"] = n
            rows = slice(1) if stage.bare else slice(None)
            exact[f"{prefix}tokens"] = tokens[rows]
            exact[f"{prefix}labels"] = [labels(row) for row in rewriting[rows]]
            exact[f"{prefix}target_ids"] = [token for _, token in labels(rewriting[0])]
            steps, positions = self.steps[outcome.stage, i], self.positions[outcome.stage]
            for j, suffix in enumerate(stage.suffixes):
                numbers[f"{prefix}steps/delta{suffix}"] = torch.stack([step[j] for step in steps[:n]])
                exact[f"{prefix}lookup_idxs{suffix}"] = exact[f"{prefix}lookup_idxs"] = positions[i][j]
            for suffix, delta in zip(stage.suffixes, self.stages[outcome.stage].deltas, strict=True):
                numbers[f"{prefix}target_init{suffix}"] = delta.origin[i]
                numbers[f"{prefix}delta{suffix}"] = delta.delta[i].detach()
                numbers[f"{prefix}target{suffix}"] = delta.value[i]
        if editor.compress:
            self._keep_anchors(i, where)
        for keys in self.keys.values():
            numbers[f"{where}key/k_star_mean"] = keys[i]

    def _keep_anchors(self, i: int, where: str) -> None:
        """EAC: what both stages share, and δ on the anchors in the order of their scores."""
        numbers, exact = self.result.numbers, self.result.exact
        first, last = (stage.prefix for stage in self.recorded.stages.values())
        (anchors,) = self.stages["v" if "v" in self.stages else "z"].prepare.__self__.anchors  # type: ignore[attr-defined]
        important = anchors.score[i].argsort(descending=True)[: int(anchors.mask[i].sum())]
        numbers[f"{where}{first}steps/origin_delta"] = numbers[f"{where}{first}steps/delta"]
        numbers[f"{where}{last}steps/delta"] = numbers[f"{where}{last}steps/delta"][:, important]
        numbers[f"{where}expanded_delta"] = numbers[f"{where}{last}delta"]
        numbers[f"{where}delta"] = numbers[f"{where}expanded_delta"][important]
        numbers[f"{where}average_tensor"], numbers[f"{where}score"] = anchors.gradient[i], anchors.score[i]
        numbers[f"{where}values"] = anchors.score[i][important]
        exact[f"{where}important"] = important.tolist()
        for name in ("target", "target_init"):
            numbers[f"{where}{name}"] = numbers[f"{where}{last}{name}"]
        for name in ("tokens", "labels", "target_ids", "lookup_idxs"):
            exact[f"{where}{name}"] = exact[f"{where}{last}{name}"]

    def _keep_factors(self, trainer: Trainer, where: str) -> None:
        """Factors of a rank-one update, from the delta file."""
        assert isinstance(trainer, EditTrainer)
        _, deltas, _ = trainer.run.commits()[-1]
        if len(deltas) == 1 and deltas[0].left is not None and deltas[0].right is not None:
            norm = deltas[0].right.norm()
            for prefix in ("", *(stage.prefix for stage in self.recorded.stages.values())):
                self.result.numbers[f"{where}{prefix}left_vector"] = deltas[0].right[:, 0] / norm
                self.result.numbers[f"{where}{prefix}right_vector"] = deltas[0].left[:, 0] * norm


def _parameters(base: LanguageModel) -> dict[str, Tensor]:
    """Copies of all parameters, as Hugging Face names and orients them."""
    return {name: parameter.detach().clone() for name, parameter in base.model.named_parameters()}


@torch.no_grad()
def _keep_logits(result: Run, base: LanguageModel, edit: Edit, where: str) -> None:
    """Last-token logits by plain Hugging Face calls, prompt by prompt."""
    for name, prompts in PROMPTS.items():
        rows = [
            base.model(**base.tokenizer(prompt, return_tensors="pt")).logits[0, -1].float() for prompt in prompts(edit)
        ]
        if rows:
            result.numbers[f"{where}/{name}"] = torch.stack(rows)
