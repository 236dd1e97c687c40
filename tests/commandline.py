"""`kedit` in this process, on a tiny model on disk; no download, no text generated."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kedit_lightning.cli import main
from tests.families import EDITS, corpus, save_tiny


@dataclass(frozen=True)
class Result:
    """How a command ended: its exit status and what it printed."""

    status: int
    out: str
    err: str


def kedit(*args: object) -> Result:
    """Run a command; anything but `SystemExit` that escapes it is a bug and fails the test."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(arg) for arg in args])
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Result(status, out.getvalue(), err.getvalue())


def done(*args: object) -> Result:
    """Run a command that must work."""
    result = kedit(*args)
    assert result.status == 0, result
    return result


EDITOR: dict[str, dict[str, Any]] = {
    "ROME": {"layers": [1], "v_num_grad_steps": 4},
    "TOP": {"layers": [1], "rel_feat_layer": 1, "v_num_grad_steps1": 4, "v_num_grad_steps2": 4},
}


class World:
    """A folder with a tiny GPT-2, documents for its statistics, and configurations.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = save_tiny("gpt2", folder / "base")
        self.corpus = folder / "corpus.txt"
        self.corpus.write_text("\n".join(corpus()[:40]))
        self.logs = folder / "logs"
        self.edits = [flat(i) for i in range(4)]

    def config(self, editor: str = "ROME", **settings: Any) -> Path:
        """A configuration; settings are added to the editor's."""
        content = {
            "base": {"name": str(self.base)},
            "model": {
                "class_path": editor,
                "init_args": {
                    **EDITOR[editor],
                    "context_templates": {"templates": [["{}", "Yes. {}"]]},
                    "statistics": {"source": "identity"},
                    **settings,
                },
            },
            "data": {"edits": self.edits},
            "trainer": {
                "save_dir": str(self.logs),
                "evaluation": {"generation": False},
                "enable_progress_bar": False,
            },
        }
        return write(self.folder / f"{editor}{len(list(self.folder.glob('*.yaml')))}.yaml", content)

    def fit(self, config: Path, *args: object, name: str) -> Path:
        """Edit, and give the run directory."""
        versions = self.logs / name
        before = set(versions.glob("version_*"))
        done("fit", "--config", config, "--trainer.name", name, *args)
        (new,) = set(versions.glob("version_*")) - before
        return new


def write(path: Path, content: object) -> Path:
    """Write YAML, or text as it is."""
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def flat(i: int) -> dict[str, Any]:
    """An edit as one writes it oneself."""
    record = EDITS[i].as_record()
    rewrite = record.pop("requested_rewrite")
    targets = {name: rewrite[name]["str"] for name in ("target_new", "target_true") if name in rewrite}
    return {"prompt": rewrite["prompt"], "subject": rewrite["subject"], **targets, **record}


def jsonl(path: Path, records: Sequence[object]) -> Path:
    """Write records a line each, text as it is."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path
