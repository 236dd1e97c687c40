"""Commands of the trainer that stream no edits: a plan, key statistics, scaling, EAC's γ, layers, a look inside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lightning import Trainer

from kedit_lightning.callbacks.base import EditCallback
from kedit_lightning.callbacks.console import say
from kedit_lightning.data.datamodule import EditDataModule, given
from kedit_lightning.editors import Editor
from kedit_lightning.errors import KeditError
from kedit_lightning.gamma import GAMMAS, GammaSearch
from kedit_lightning.interrupts import interrupts_passed_on
from kedit_lightning.logger import EditLogger
from kedit_lightning.models.fingerprint import fingerprint_below
from kedit_lightning.models.launching import together
from kedit_lightning.models.processes import agreed
from kedit_lightning.models.statistics import compute
from kedit_lightning.plan import Plan
from kedit_lightning.plan_table import table
from kedit_lightning.planning import plan
from kedit_lightning.probes import Finding, Probe
from kedit_lightning.probing import look
from kedit_lightning.resume import check_processes, environment
from kedit_lightning.run import Record, RunDirectory
from kedit_lightning.scaling import SEEDS, Scaling
from kedit_lightning.suggesting import Suggestion

if TYPE_CHECKING:
    from kedit_lightning.trainer import EditTrainer

T = TypeVar("T")


class Studies(Trainer):
    """What `EditTrainer` can do beside streaming edits."""

    run: RunDirectory
    edit_logger: EditLogger

    def tell(self, hook: str, *args: Any) -> None:
        """Call a hook of the edit stream on every callback that hears of it."""
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EditCallback):
                getattr(callback, hook)(self, *args)

    def _alone(self, command: str) -> None:
        """Refuse several processes where they are not supported."""
        if self.world_size > 1:
            msg = (
                f"{command}: expected one process, got {self.world_size}: set trainer.devices and trainer.num_nodes to "
                "1 (fit, validate, test and statistics take several)"
            )
            raise KeditError(msg)

    def _together(self, model: Editor, work: Callable[[], T]) -> T:
        """Do something in all processes, whose run directory is that of the first."""
        model.base.check_processes(self.world_size)

        def work_there() -> T:
            self.run = RunDirectory(Path(agreed(str(self.run.path))))
            return work()

        return together(self, work_there)

    def turn_to(self, path: Path) -> None:
        """Go on in the directory of an earlier run, with its TensorBoard stream.

        Raises:
            KeditError: There is no such directory.
        """
        if not path.is_dir():
            msg = f"{path}: expected a run directory such as lightning_logs/edits/version_0, found none"
            raise KeditError(msg)
        self.edit_logger = EditLogger(str(path.parent), name="", version=path.name, default_hp_metric=False)
        self.logger, self.run = self.edit_logger, RunDirectory(path)

    def plan(self, model: Editor, datamodule: EditDataModule | None = None) -> Plan:
        """Say what `fit` will take, before anything runs: rows, steps, memory, time, files, and whether it fits.

        One step of every stage is done and a few edits are measured; nothing is written.

        Args:
            model: The editor.
            datamodule: The edits.

        Returns:
            The plan, which is also shown.
        """
        self._alone("plan")
        found = plan(cast("EditTrainer", self), model, given(datamodule, "fit"))
        say(self, table(found))
        return found

    def statistics(self, model: Editor, datamodule: EditDataModule | None = None) -> None:
        """Collect the second moments of the keys that an editor's configuration needs; `fit` does so by itself.

        Several processes (``devices``, ``num_nodes``, torchrun) share the documents.

        Args:
            model: The editor.
            datamodule: Not used.

        Raises:
            StatisticsError: There is nothing to collect, or it cannot be kept.
        """
        base, statistics, sites = model.base, model.statistics, model.sites()
        statistics.check(base, sites)  # before processes are started
        base.check_processes(self.world_size)

        def described() -> Record:
            weights = fingerprint_below(base, max(site.layer for site in sites))
            return {**model.config, **environment(cast("EditTrainer", self)), "weights": weights}

        def work() -> None:
            check_processes(described)
            self.tell("on_statistics", compute(base.to(self.strategy.root_device), statistics, sites))

        together(self, work)

    def scale(
        self,
        model: Editor,
        datamodule: EditDataModule | None = None,
        counts: list[int] | None = None,
        seeds: list[int] = SEEDS,
    ) -> list[Record]:
        """Edit more and more facts at once, each time on the unedited model, and measure how the scores change.

        Args:
            model: The editor.
            datamodule: The edits.
            counts: How many, ascending; by default JEEP's 1, 2, 3, 6, …, 10,000 as far as there are edits.
            seeds: Of the choice of edits, a run each.

        Returns:
            A record a number of edits, as in scaling.csv.
        """
        self._alone("scale")
        scaling = Scaling(cast("EditTrainer", self), model, given(datamodule, "fit"), counts, seeds)
        with interrupts_passed_on():
            return scaling.run(partial(super().fit, model, datamodule=datamodule))

    def tune_gamma(
        self,
        model: Editor,
        datamodule: EditDataModule | None = None,
        gammas: list[float] = GAMMAS,
        edits: int = 50,
        tolerance: float = 0.05,
    ) -> float | None:
        """Choose how far EAC compresses an editor's values, on single edits (EAC, appendix A).

        Args:
            model: The editor.
            datamodule: The edits.
            gammas: Percentiles that are tried.
            edits: How many facts, each edited by itself; of the data by chance.
            tolerance: How far reliability, generalization and locality may each fall below those without compression.

        Returns:
            The largest percentile that keeps all three; None where there is none.
        """
        self._alone("tune-gamma")
        search = GammaSearch(cast("EditTrainer", self), model, given(datamodule, "fit"), gammas, edits, tolerance)
        with interrupts_passed_on():
            return search.run(partial(super().fit, model, datamodule=datamodule))

    def suggest(
        self,
        model: Editor,
        datamodule: EditDataModule | None = None,
        facts: int = 100,
        edits: int = 40,
        tried: int = 4,
        seed: int = 0,
    ) -> Path:
        """Suggest where to edit a model that nobody has tuned, on facts that it knows.

        Causal tracing says which layers' MLPs bring the answer back at the subject's last token, and JEEP's contrast
        probe in which layers above them it comes up where it is predicted. Then some facts are edited there (by ROME
        and TOP in each of the layers that the trace prefers, by TOP with several l_a, its Fig. 5) and beside the best
        of these places until none is better: that of the best harmonic score of efficacy, generalization and both
        specificities is taken.

        Args:
            model: The editor; how many layers it edits stays as it is, which ones does not count.
            datamodule: The facts, with target_true.
            facts: How many facts are looked at, by chance; those that the model does not know are left out.
            edits: How many of them are edited at every place that is tried, each by itself.
            tried: How many places are tried, and with TOP how many l_a at each; then those beside the best, until none
                is better.
            seed: Of the choice of facts.

        Returns:
            suggested.yaml in the run directory, for `kedit fit`; causal_trace_subject, contrast_final_norm and sweep
            beside it are the evidence.
        """
        self._alone("suggest")
        suggestion = Suggestion(cast("EditTrainer", self), model, given(datamodule, "fit"), facts, edits, tried, seed)
        with interrupts_passed_on():
            return suggestion.run(partial(super().fit, model, datamodule=datamodule))

    def probe(
        self, model: Editor, datamodule: EditDataModule | None = None, probe: Probe | None = None
    ) -> list[Finding]:
        """Look inside the model and its edits: the analyses of the papers.

        Args:
            model: The editor.
            datamodule: The edits.
            probe: What is looked at, a class by its name, with its settings.

        Returns:
            What was found; the run directory holds it as NAME.csv, NAME.png and NAME.json.
        """
        self._alone("probe")
        fit = partial(super().fit, model, datamodule=datamodule)
        with interrupts_passed_on():
            return look(cast("EditTrainer", self), model, given(datamodule, "fit"), probe, fit)
