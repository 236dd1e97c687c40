"""The `suggest` command: where to edit a model that nobody has tuned, and why there."""

from __future__ import annotations

import hashlib
import json
import random
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from kedit_lightning.callbacks.console import say
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.editors import JEEP, MEMIT, RETS, ROME, TOP, Editor
from kedit_lightning.edits import Edit, Site
from kedit_lightning.errors import KeditError
from kedit_lightning.lines import Record
from kedit_lightning.measurement import Measurement
from kedit_lightning.metrics import Evaluator
from kedit_lightning.models.fingerprint import fingerprint_below
from kedit_lightning.models.progress import steps
from kedit_lightning.places import Place, beside, ranked, spaced, steepest
from kedit_lightning.probes import CausalTrace, ContrastProbe, Finding, Study
from kedit_lightning.probes.base import Probe
from kedit_lightning.probes.tracing import of_original
from kedit_lightning.probing import keep_finding
from kedit_lightning.resume import environment, settings
from kedit_lightning.run import CONFIG, RunDirectory, newest
from kedit_lightning.single_edits import SingleEdits
from kedit_lightning.sweep_table import FOUR, draw, row_of, table
from kedit_lightning.writing import write_beside, write_csv

if TYPE_CHECKING:
    from kedit_lightning.trainer import EditTrainer

SUGGESTED, KEPT = "suggested.yaml", "suggest.json"
BLOCKS = ("seed_everything", "base", "model", "data", "trainer")
"""What `kedit fit` takes of a configuration."""


class Suggestion:
    """Looks where a model keeps its facts, tries what that suggests, and writes a configuration; see `Studies.suggest`.

    Args:
        trainer: The trainer.
        editor: The editor; how many layers it edits stays as it is, which ones does not count.
        datamodule: The facts.
        facts: How many of them are traced, by chance.
        edits: How many of those that the model knows are edited in the sweep.
        tried: How many places, and of TOP how many l_a at each, are tried in the sweep; then those one layer below and
            above the best (of TOP with its l_a moved), until none is better.
        seed: Of the choices.

    Raises:
        KeditError: A number is below 1, or the editor edits no MLP for what is read at the subject's last token.
    """

    def __init__(
        self, trainer: EditTrainer, editor: Editor, datamodule: EditDataModule, facts: int, edits: int, tried: int,
        seed: int,
    ) -> None:  # fmt: skip
        if min(facts, edits, tried) < 1:
            msg = f"suggest: expected at least one fact, edit and place to try, got {facts}, {edits}, {tried}"
            raise KeditError(msg)
        if not isinstance(editor, ROME | MEMIT | JEEP) or isinstance(editor, RETS):
            msg = f"suggest: expected ROME, TOP, MEMIT, PMET, AlphaEdit or JEEP, got {type(editor).__name__}"
            raise KeditError(msg)
        self.trainer, self.editor, self.datamodule, self.base = trainer, editor, datamodule, editor.base
        self.facts, self.edits, self.tried, self.seed = facts, edits, tried, seed
        self.measurement = Measurement(trainer, editor, datamodule)
        asked = {"facts": facts, "edits": edits, "tried": tried, "seed": seed, "generator": torch.initial_seed()}
        depends = settings(editor, datamodule, self.measurement) | environment(trainer)
        depends["weights"] = fingerprint_below(self.base, self.base.num_layers - 1)  # every layer is looked at
        depends["subjects"] = hashlib.sha256(repr(datamodule.subjects).encode()).hexdigest()
        self.kept: Record = json.loads(json.dumps({"settings": depends, "asked": asked}))
        self._go_on()
        self.why: list[str] = []

    def run(self, fit: Callable[[], None]) -> Path:
        """Look, try, and write.

        Args:
            fit: Runs one `Trainer.fit`.

        Returns:
            The configuration that was written.
        """
        trainer, editor = self.trainer, self.editor
        rounds = self.tried ** (1 + isinstance(editor, TOP)) if isinstance(editor, ROME) else 1
        self.singles = SingleEdits(trainer, editor, self.datamodule, fit)
        with closing(trainer.edit_logger), trainer.run.begun(), trainer.run.locked():
            if self.goes_on:
                say(trainer, f"goes on in {trainer.run.path}, which was interrupted", close=False)
                (trainer.run.path / CONFIG).unlink(missing_ok=True)  # this command's is written next
            trainer.tell("on_stream_start", editor, rounds * self.edits)
            self.base.to(trainer.strategy.root_device)
            editor.restore()
            known = self._known()
            places = self._places(self._study(known))
            place = self._sweep(places, random.Random(self.seed).sample(known, min(self.edits, len(known))))
            path = self._write(place)
        say(trainer, *self.why, f"{path}: {place.settings}")
        return path

    # ------------------------------------------------------------------ what is found is kept

    def _go_on(self) -> None:
        """Take up the newest version, if it was interrupted and all that its results depend on is the same."""
        found = newest(Path(self.trainer.edit_logger.root_dir), KEPT)
        kept = RunDirectory(found).read_json(KEPT)
        same = isinstance(kept, dict) and {name: kept.get(name) for name in self.kept} == self.kept
        self.goes_on = same and not (found / SUGGESTED).is_file()
        if self.goes_on:
            self.trainer.turn_to(found)
            self.kept = kept

    def _once(self, what: str, find: Callable[[], Any]) -> Any:  # noqa: ANN401 - JSON
        """What was found before, or is found and kept now."""
        if what not in self.kept:
            self.kept[what] = find()
            self.trainer.run.write_json(KEPT, self.kept)
        return self.kept[what]

    # ------------------------------------------------------------------ looking

    def _study(self, edits: Sequence[Edit]) -> Study:
        return Study(self.editor, edits, self.singles, self.datamodule.subjects)

    def _known(self) -> list[Edit]:
        """The facts that the model knows."""
        known, found = of_original(self._study(self.datamodule.edits), self.facts, self.seed)
        self.why.append(
            f"{len(known)} of {found['edits']} facts were used: those that the model knows: its likeliest next token "
            "is the whole target_true"
        )
        return [one.edit for one in known]

    def _places(self, study: Study) -> list[Place]:
        """What the probes suggest, the likeliest first; of several layers at once only that."""
        editor, layers = self.editor, self.base.num_layers
        high = len(editor.layers_high) if isinstance(editor, JEEP) else 0
        above = high or isinstance(editor, TOP)
        width = len(editor.layers) - high
        window = max(1, layers // 5)  # the papers' 10 of GPT2-XL's 48
        n = len(study.edits)
        trace = CausalTrace(n, corrupt=["subject"], parts=["mlp"], windows=[window], cases=0, seed=self.seed)
        effects = {row["layer"]: row for row in self._look(trace, study) if row["token"] == "ls"}
        runs = ranked([effects[layer]["mean"] for layer in range(layers)], width, layers - 1 - above)
        if not runs:
            msg = f"suggest: expected a model of more than {width + above - 1} layers, got {layers}; edit fewer layers"
            raise KeditError(msg)
        first = ", ".join(f"{row['mean']:.3f} ± {row['ci95']:.3f}" for row in (effects[layer] for layer in runs[0]))
        self.why.append(
            f"layers {list(runs[0])}: what their MLPs put out at the subject's last token brings back most of the "
            f"answer, an indirect effect of {first} (causal_trace_subject)"
        )
        if isinstance(editor, TOP):
            return [
                Place(run, l_a) for run in runs[: self.tried] for l_a in spaced(run[-1] + 1, layers - 1, self.tried)
            ]
        if isinstance(editor, ROME):
            return [Place(run) for run in runs[: self.tried]]
        if not high:
            return [Place(runs[0])]
        contrast = self._look(ContrastProbe(seed=self.seed, final_norm=True, known=False), study)
        p = [row["original_probability"] for row in contrast if row["position"] == "prediction"]
        best = steepest(p, high, runs[0][-1])
        self.why.append(
            f"high layers {list(best)}: over them the original answer's probability at the prediction rises most, "
            f"from {p[best[0]]:.3f} to {p[best[-1] + 1]:.3f} (contrast_final_norm)"
        )
        return [Place(runs[0], high=best)]

    def _look(self, probe: Probe, study: Study) -> Sequence[Record]:
        """The rows of a probe's finding, which is kept."""

        def look() -> Sequence[Record]:
            (finding,) = probe.look(study)
            keep_finding(self.trainer, finding, len(study.edits))
            return finding.rows

        rows: Sequence[Record] = self._once(type(probe).__name__, look)
        return rows

    # ------------------------------------------------------------------ trying

    def _sweep(self, places: Sequence[Place], edits: Sequence[Edit]) -> Place:
        """Edit the same facts at every place, each by itself, then beside the best until none is better; the best."""
        evaluator = self.measurement.evaluator
        evaluator.references(edits)
        sites = sorted({Site(layer, "mlp") for place in places for layer in place.layers}, key=lambda site: site.layer)
        self.editor.statistics.second_moments(self.base, sites)  # of all in one pass; found again later
        rows, last = list[Record](), self.base.num_layers - 1
        with steps("places") as step:
            for place in (places := list(places)):  # which grows

                def tried(place: Place = place) -> Record:
                    return row_of(place, evaluator.collect(edits, self.lines(place, edits, evaluator)))

                rows.append(self._once(json.dumps(place.settings), tried))
                write_csv(self.trainer.run.path / "sweep.csv", rows)  # after an interrupt what there is
                best = max(range(len(rows)), key=lambda i: rows[i]["score"])  # of equals the one that the trace prefers
                if len(rows) == len(places):
                    places += [other for other in beside(places[best], last) if other not in places]
                step(len(rows), len(places), "")
        missing = [name for name in FOUR if name not in rows[0]]
        chosen = places[best]
        more = f" with l_a {chosen.l_a}" if chosen.l_a is not None else f" and {list(chosen.high)}" * bool(chosen.high)
        self.why.append(
            f"layers {list(chosen.layers)}{more}: of {len(places)} places tried on {len(edits)} facts, each "
            f"edited by itself, the best harmonic score, {100 * rows[best]['score']:.1f} (sweep)"
        )
        self.why += [f"the records have no prompts for {', '.join(missing)}: not part of that score"] * bool(missing)
        keep_finding(self.trainer, Finding("sweep", rows, draw(rows), {"why": self.why}), len(edits))
        say(self.trainer, table(rows, best))
        return chosen

    def lines(self, place: Place, edits: Sequence[Edit], evaluator: Evaluator) -> list[dict[str, float]]:
        """Edit facts at a place, each by itself.

        Args:
            place: The place.
            edits: The facts, whose references the evaluator holds.
            evaluator: What measures them.

        Returns:
            A record an edit, as `Evaluator.update` gives it; one that was rejected counts as changing nothing.
        """
        lines, metrics = list[dict[str, float]](), evaluator.new()
        with place.taken(self.editor), self.singles.ready():
            for block, owners in self.singles.blocks(edits):
                lines += evaluator.update(metrics, block, owners=owners, texts=False)
        return lines

    # ------------------------------------------------------------------ writing

    def _write(self, place: Place) -> Path:
        """The run's configuration with other layers; without one (from Python) editor and layers."""
        folder = self.trainer.run.path
        config, path = folder / CONFIG, folder / SUGGESTED
        given: Mapping[str, Any] = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
        content = {name: given[name] for name in BLOCKS if name in given}
        model = content.get("model", {"class_path": type(self.editor).__name__})
        content["model"] = {**model, "init_args": {**model.get("init_args", {}), **place.settings}}
        head = [f"kedit fit --config {shlex.quote(str(path))}", "Layers by `kedit suggest`; evidence beside this file:"]
        text = "".join(f"# {line}\n" for line in [*head, *self.why]) + yaml.safe_dump(content, sort_keys=False)
        write_beside(path, lambda beside: beside.write_text(text, encoding="utf-8"))
        return path
