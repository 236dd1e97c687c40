"""`kedit show`: the results of runs side by side, and how their settings differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kedit_lightning.errors import KeditError
from kedit_lightning.report import Report, differences, side_by_side, table
from kedit_lightning.run import newest
from kedit_lightning.scaling_table import SETTINGS, scaling_table
from kedit_lightning.writing import write_beside

LONGEST = 40
"""Characters of a setting that are shown."""


def show(runs: Sequence[Path], *, out: Path | None = None, console: Console | None = None) -> None:
    """Print the results of runs side by side, and the settings of their editors that differ.

    Args:
        runs: Run directories, or folders of their versions (the newest is taken); of `kedit scale` too.
        out: A file that the table is written to as well.
        console: Where to print; standard output by default.

    Raises:
        KeditError: A path is no run directory, or has no results.
    """
    runs = [Path(run) for run in runs]
    scaled = [run for run in runs if is_scaling(run)]
    runs = [run for run in runs if run not in scaled]
    reports = [read(run) for run in runs]
    if not reports and not scaled:
        msg = "expected at least one run directory, such as lightning_logs/edits/version_0"
        raise KeditError(msg)
    named = list(zip(names(runs, reports), reports, strict=True))
    settings = differing([_settings(run) for run in runs])

    def write(console: Console) -> None:
        for run in scaled:
            console.print(scaling_table(newest(run, SETTINGS), console.width))
        for part in side_by_side(named, console.width):
            console.print(table(part, console.width))
        if settings:
            console.print(settings_table([name for name, _ in named], settings))
        if reports and (note := differences(named)):
            console.print(Text(note, "yellow"))

    write(console or Console(highlight=False))
    if out is not None:

        def to_file(path: Path) -> None:
            with path.open("w", encoding="utf-8") as file:
                write(Console(file=file, width=160, highlight=False, force_terminal=False))

        write_beside(out, to_file)


def is_scaling(run: Path) -> bool:
    """Whether a path is of a scaling run, and of no other."""
    return not (newest(run, "metrics.json") / "metrics.json").is_file() and (newest(run, SETTINGS) / SETTINGS).is_file()


def read(run: Path, *, scored: bool = True) -> Report:
    """The metrics.json of a run.

    Args:
        run: A run directory, or the folder of its versions.
        scored: Whether it must hold scores; those of a run with ``trainer.evaluate: false`` are not there.

    Raises:
        KeditError: There is none, it is damaged, or it has no scores.
    """
    path = newest(run, "metrics.json") / "metrics.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = "it has no metrics.json (unfinished?)" if run.is_dir() else "there is no such directory"
        msg = f"{run}: expected a run directory such as lightning_logs/edits/version_0, but {reason}"
        raise KeditError(msg) from error
    except ValueError as error:
        msg = f"{path}: expected JSON as a run leaves it, got {error}"
        raise KeditError(msg) from error
    missing = [key for key in ("editor", "edits", "protocol") if not isinstance(report, dict) or key not in report]
    if missing or (scored and not {"pre", "post"} & set(report)):
        why = missing[0] if missing else "scores, as of one with trainer.evaluate false; see `kedit log`"
        msg = f"{path}: expected the results of a run, found no {why}"
        raise KeditError(msg)
    found: Report = report
    return found


def names(runs: Sequence[Path], reports: Sequence[Report]) -> list[str]:
    """The editors' names; with as much of the path as tells them apart."""
    editors = [str(report["editor"]) for report in reports]

    def choices() -> Iterator[list[str]]:
        yield editors
        yield [f"{editor} {run.name}" for editor, run in zip(editors, runs, strict=True)]

    return next((names for names in choices() if len(set(names)) == len(names)), [str(run) for run in runs])


# ---------------------------------------------------------------------- settings


def _settings(run: Path) -> dict[str, Any]:
    """The editor's settings of a run by their dotted names; none where it has no config.yaml (from Python)."""
    try:
        config = yaml.safe_load((newest(run, "metrics.json") / "config.yaml").read_text(encoding="utf-8"))
        editor = config["model"]
        return dict(flat({"editor": editor["class_path"].rpartition(".")[2], **editor.get("init_args", {})}))
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return {}


def flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a tree by their dotted names."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def differing(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """By name the settings that are not the same in all runs, in words; ``–`` where a run has no such setting.

    >>> differing([{"layers": [3], "v_lr": 0.5}, {"layers": [3, 4], "v_lr": 0.5, "L2": 10}])
    {'layers': ['[3]', '[3, 4]'], 'L2': ['–', '10']}
    """
    if not all(settings):
        return {}
    every = dict.fromkeys(key for one in settings for key in one)
    found = {key: [_short(one[key]) if key in one else "–" for one in settings] for key in every}
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def settings_table(names: Sequence[str], settings: Mapping[str, Sequence[str]]) -> Table:
    """The table of `differing`, a column a run."""
    found = Table(title="Settings that differ", title_justify="left", box=box.HORIZONTALS)
    for name in ("", *names):
        found.add_column(name, overflow="fold")
    for key, values in settings.items():
        found.add_row(*map(Text, (key, *values)))
    return found
