"""What the page says of a run: read from its directory, which stays as it is."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from kedit_lightning.errors import KeditError
from kedit_lightning.history import sequence
from kedit_lightning.html.grids import Grid, from_csv, from_rich
from kedit_lightning.hypernetworks.files import FILE
from kedit_lightning.lines import Record
from kedit_lightning.report import count
from kedit_lightning.run import COMMITS, CONFIG, CONTEXTS, RunDirectory, newest
from kedit_lightning.run import SETTINGS as BEGUN
from kedit_lightning.scaling_table import POINTS, SETTINGS, scaling_table
from kedit_lightning.show import flat, is_scaling, read
from kedit_lightning.suggesting import KEPT, SUGGESTED
from kedit_lightning.tasks.command import table as tasks_table

TASKS = "tasks.json"
OWN = {"metrics.json", BEGUN, CONTEXTS, SETTINGS, TASKS, KEPT}
"""JSON files that are no notes of a probe."""
TITLES = {"before_after": "before and after", "curve": "scores over the edits", "health": "health of the model"}
"""Names of figures, where their files' do not say it."""
PLACES = ("trainer.name", "trainer.save_dir")
"""Where a run is kept, which says nothing of it."""
ENVIRONMENT = ("python", "device", "threads", "world_size", "float32_matmul_precision", "deterministic_algorithms")
"""Beside the libraries, what run.json says of the machine."""


@dataclass(frozen=True)
class Finding:
    """A figure with what lies beside it.

    Args:
        name: Stem of its files.
        picture: As a data URI; empty if there is none.
        grid: Its table, if there is one.
        file: That table's file as a data URI; empty if there is none.
        notes: What a probe wrote beside them.
        probed: Whether a probe found it.
    """

    name: str
    picture: str
    grid: Grid | None
    file: str
    notes: Mapping[str, Any]
    probed: bool

    @property
    def title(self) -> str:
        """Its name in words."""
        words = TITLES.get(self.name, self.name.replace("_", " "))
        return words[:1].upper() + words[1:]


class Contents:
    """A run of any command, finished or not.

    Args:
        path: The run directory, or the folder of its versions (the newest with results is taken).

    Raises:
        KeditError: It is none.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            reason = "this is a file" if path.exists() else "there is no such directory"
            msg = f"{path}: expected a run directory such as lightning_logs/edits/version_0, but {reason}"
            raise KeditError(msg)
        self.asked = path
        self.scaling = is_scaling(path)
        self.path = newest(path, SETTINGS if self.scaling else "metrics.json")
        self.run = RunDirectory(self.path)
        self.report = read(self.path, scored=False) if (self.path / "metrics.json").is_file() else None
        if not self.report and not self.findings and not any(self._left()):
            msg = f"{path}: expected a run directory such as lightning_logs/edits/version_0, found no file of one"
            raise KeditError(msg)

    def _left(self) -> Iterator[Path]:
        for name in (CONFIG, BEGUN, "edits.jsonl", COMMITS, TASKS, SETTINGS):
            yield from self.path.glob(name)

    # ------------------------------------------------------------------ what it is

    @cached_property
    def text(self) -> str:
        """Its configuration as it was written; empty where there is none (from Python)."""
        try:
            return (self.path / CONFIG).read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            msg = f"{self.path / CONFIG}: expected the configuration of a run, and it cannot be read ({error})"
            raise KeditError(msg) from error

    @cached_property
    def config(self) -> Record:
        """Its configuration."""
        try:
            found = yaml.safe_load(self.text)
        except yaml.YAMLError as error:
            msg = f"{self.path / CONFIG}: expected the configuration of a run, got no valid YAML; take another copy"
            raise KeditError(msg) from error
        return found if isinstance(found, dict) else {}

    @property
    def settings(self) -> dict[str, Any]:
        """Its configuration by dotted names, but for where it is kept."""
        return {name: value for name, value in flat(self.config) if name not in PLACES}

    @property
    def label(self) -> str:
        """The editor, and the probe or the command where it was not edited only."""
        kinds = [self.config.get(block) for block in ("model", "probe")]
        paths = [kind.get("class_path") for kind in kinds if isinstance(kind, dict)]
        classes = [str(path).rpartition(".")[2] for path in paths if path]
        if self.report:
            classes[:1] = [str(self.report["editor"])]
        words = [*classes, *(["scaling"] if self.scaling else []), *(["tasks"] if self._tasks else [])]
        return " ".join(words) or self.path.name

    @property
    def base(self) -> str:
        """The base model; empty where nothing says it."""
        block = self.config.get("base")
        named = block.get("name") if isinstance(block, dict) else None
        return str(named or (self.report or {}).get("protocol", {}).get("base") or (self._begun.get("base") or ""))

    @property
    def state(self) -> str:
        """What is missing; empty for a run that has ended as it should."""
        if self.report:
            return "stopped before its last edit" if self.report.get("stopped") else ""
        if self.scaling:
            return "" if (self.path / POINTS).is_file() else "unfinished: nothing is measured yet"
        if self._is_fit:
            return f"unfinished: {count(len(sequence(self.run)))} so far; kedit fit --resume {self.path} goes on"
        if (self.path / FILE).is_file():
            return "a training, whose curves are in TensorBoard"
        if (self.path / KEPT).is_file() and not (self.path / SUGGESTED).is_file():
            return "unfinished: the same `kedit suggest` goes on"
        return "" if self.findings or self._tasks else "unfinished: nothing is found yet"

    @property
    def _is_fit(self) -> bool:
        return any(any(self.path.glob(name)) for name in (BEGUN, "edits.jsonl", COMMITS))

    @property
    def facts(self) -> dict[str, Any]:
        """Base model, edits and time, in a few words."""
        report = self.report or {}
        found = {"directory": self.path, "base model": self.base, "protocol": report.get("protocol", {}).get("name")}
        found |= {"edits": f"{report['edits']:,}" if "edits" in report else None, "rejected": report.get("rejected")}
        found |= {"seconds": report.get("seconds")}
        return {name: value for name, value in found.items() if value not in (None, "")}

    # ------------------------------------------------------------------ what it holds

    @property
    def grids(self) -> list[Grid]:
        """Its own tables: of a scaling run, and of tasks."""
        scaled = [scaling_table(self.path, 1000)] if self.scaling and not self.state else []
        return [from_rich(table) for table in [*scaled, *([tasks_table(self._tasks)] if self._tasks else [])]]

    @property
    def environment(self) -> dict[str, Any]:
        """Libraries and machine, as run.json or, where there is none, metrics.json says."""
        begun = {key.removeprefix("library "): value for key, value in self._begun.items() if _of_machine(key)}
        torch = (self.report or {}).get("protocol", {}).get("torch")
        return begun or ({"torch": torch} if torch else {})

    @property
    def lines(self) -> list[Record]:
        """Checkpoints and health."""
        return [*self.run.checkpoints.records(), *self.run.health.records()]

    @cached_property
    def findings(self) -> list[Finding]:
        """Its figures, and tables and notes that lie beside them or alone."""
        files = [file for kind in ("png", "csv", "json") for file in sorted(self.path.glob(f"[!.]*.{kind}"))]
        return [self._finding(stem) for stem in dict.fromkeys(file.stem for file in files if file.name not in OWN)]

    def _finding(self, stem: str) -> Finding:
        picture, table, notes = (self.path / f"{stem}.{kind}" for kind in ("png", "csv", "json"))
        probed = notes.is_file() and notes.name not in OWN
        return Finding(
            stem,
            data_uri(picture.read_bytes(), "image/png") if picture.is_file() else "",
            from_csv(table) if table.is_file() else None,
            data_uri(table.read_bytes(), "text/csv") if table.is_file() else "",
            dict(flat(found)) if probed and isinstance(found := self.run.read_json(notes.name), dict) else {},
            probed,
        )

    @cached_property
    def _begun(self) -> Record:
        return self.run.read_json(BEGUN) or {}

    @cached_property
    def _tasks(self) -> Record:
        return self.run.read_json(TASKS) or {}


def _of_machine(key: str) -> bool:
    return key.startswith("library ") or key in ENVIRONMENT


def data_uri(content: bytes, kind: str) -> str:
    """A file inside the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def refuse_mixed(names: Sequence[str], runs: Sequence[Contents]) -> None:
    """Refuse to compare runs of different models.

    Raises:
        KeditError: The runs are of several base models.
    """
    bases = {run.base: name for name, run in zip(names, runs, strict=True) if run.base}
    if len(bases) > 1:
        listed = ", ".join(f"{base} ({name})" for base, name in bases.items())
        msg = f"expected runs of one base model, whose numbers compare, got {listed}; make a report of each"
        raise KeditError(msg)
