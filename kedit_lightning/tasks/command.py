"""`kedit tasks`: the general abilities of a model, and what an edited one keeps of them."""

from __future__ import annotations

import inspect
from contextlib import closing
from pathlib import Path
from typing import Any

from docstring_parser import parse
from lightning.fabric import Fabric
from rich import box
from rich.console import Console
from rich.table import Table

from kedit_lightning import delta as delta_files
from kedit_lightning.delta import WeightDelta
from kedit_lightning.logger import EditLogger
from kedit_lightning.models import LanguageModel
from kedit_lightning.parsing import ConfigFile, OneLineParser
from kedit_lightning.report import count
from kedit_lightning.run import RunDirectory, read_deltas
from kedit_lightning.tasks.suite import Tasks, retained, scores
from kedit_lightning.tasks.table import PERPLEXITY
from kedit_lightning.writing import write_beside

Report = dict[str, Any]
"""What tasks.json holds."""


def main(args: list[str]) -> None:
    """Run the command.

    Args:
        args: Command line, for instance ``["--config", "configs/tasks/almanac.yaml", "--delta", "RUN"]``.
    """
    described = parse(inspect.getdoc(measure) or "")
    parser = OneLineParser(prog="kedit tasks", description=described.short_description)
    parser.add_argument("-c", "--config", action=ConfigFile, help="Path of a configuration; may be given repeatedly.")
    parser.add_class_arguments(LanguageModel, "base")
    parser.add_class_arguments(Tasks, "tasks")
    parser.add_function_arguments(measure, skip={"base", "tasks", "text", "console"})
    parsed = parser.parse_args(args)
    config = parser.dump(parsed, skip_unset=False)
    given = parser.instantiate(parsed)
    measure(**{name: given[name] for name in inspect.signature(measure).parameters if name in given}, text=config)


def measure(
    base: LanguageModel,
    tasks: Tasks,
    delta: Path | None = None,
    name: str = "tasks",
    save_dir: Path = Path("lightning_logs"),
    accelerator: str = "auto",
    text: str = "",
    console: Console | None = None,
) -> Report:
    """Measure the general abilities of a model and, with a delta, of the edited model.

    The run directory gets config.yaml, tasks.json and TensorBoard scalars, the edited model's at its number of edits.

    Args:
        base: The base model.
        tasks: What is measured.
        delta: A run directory, for the model that the run ended with; or a delta file.
        name: Folder of this run's versions under ``save_dir``.
        save_dir: Where runs are kept.
        accelerator: As in Lightning.
        text: The configuration, to be kept as config.yaml.
        console: Where to print; standard output by default.

    Returns:
        The report, as in tasks.json.

    Raises:
        KeditError: A source, a record or the delta cannot be used, or the run directory cannot be written.
    """
    updates: list[WeightDelta] = []
    edits = 0
    if delta is not None:
        updates, metadata = read_deltas(delta)
        delta_files.check(base, updates, metadata, delta)
        edits = len(metadata.get("case_ids", []))
    tasks.load()
    logger = EditLogger(save_dir, name=name, default_hp_metric=False)
    run = RunDirectory(Path(logger.log_dir))
    write_beside(run.path / "config.yaml", lambda path: path.write_text(text, encoding="utf-8"))
    base.to(Fabric(accelerator=accelerator, devices=1).device)
    base.restore()
    pre = tasks.evaluate(base)
    report: Report = {"base": base.name_or_path, "delta": None if delta is None else str(delta), "edits": edits}
    report |= {"scorer": tasks.scorer, "few_shot": tasks.few_shot, "pre": pre}
    run.write_json("tasks.json", report)
    if delta is not None:
        for update in updates:
            base.write(update.name, update.update)
        report["post"] = tasks.evaluate(base)
        report["retained"] = retained(scores(pre), scores(report["post"]))
        run.write_json("tasks.json", report)
    with closing(logger):
        for when, step in (("pre", 0), ("post", edits)):
            found = scores(report.get(when, {}))
            logger.log_metrics({f"tasks/{name}": value for name, value in found.items() if value is not None}, step)
    out = console or Console(highlight=False)
    out.print(table(report))
    return report


def table(report: Report) -> Table:
    """A row a task, the scores × 100 before and after, and the share that is kept."""
    pre, post, kept = report["pre"], report.get("post", {}), report.get("retained", {})
    edited = f" and with {count(report['edits'])}" if post else ""
    found = Table(title=f"{report['base']}{edited}", title_justify="left", caption_justify="left", box=box.HORIZONTALS)
    found.caption = f"× 100, but for perplexity; answers read by {report['scorer']}"
    for column in ("", "measure", "items", "before", *(("after", "retained") if post else ())):
        found.add_column(column, justify="left" if column in ("", "measure") else "right", no_wrap=True)
    for name, score in pre.items():
        cells = [name, score["measure"], str(score["n"]), _number(name, score["score"])]
        if post:
            cells += [_number(name, post[name]["score"]), _percent(kept.get(name))]
        found.add_row(*cells)
    if "mean" in kept:
        found.add_section()
        means = [_mean(found_) for found_ in (pre, post)]
        found.add_row("mean", "", "", *(_number("mean", value) for value in means), _percent(kept["mean"]))
    return found


def _mean(found: Report) -> float:
    values: list[float] = [score["score"] for name, score in found.items() if name != PERPLEXITY]
    return sum(values) / len(values)


def _number(name: str, value: float) -> str:
    return f"{value:.2f}" if name == PERPLEXITY else f"{100 * value:.1f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
