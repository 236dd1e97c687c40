"""Single edits of the almanac under many settings of ROME, TOP, RETS: the table in kedit_lightning/almanac/README.md.

    python benchmarks/almanac_sweep.py --edits 200 ROME TOP
    python benchmarks/almanac_sweep.py --edits 20 "ROME: {layers: [1]}" "TOP: {layers: [1], rel_feat_layer: 5}"

Every row is a run of `EditTrainer` with batch_size = restore_every = 1; statistics and templates as in the shipped
configurations. Generation is left out. Rows are printed as they come, as a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from kedit_lightning.callbacks.logs import quiet
from kedit_lightning.data.bare_prompts import BarePrompts
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.prompts import ContextTemplates
from kedit_lightning.editors import RETS, ROME, TOP
from kedit_lightning.metrics import Evaluation
from kedit_lightning.models import LanguageModel, Statistics
from kedit_lightning.trainer import EditTrainer

METRICS = ("efficacy", "generalization", "s_specificity", "r_specificity", "r_specificity_unchanged", "score4")
CONFIGS = Path(__file__).parent.parent / "configs"


def shipped(name: str) -> dict[str, Any]:
    """Editor settings of a shipped configuration."""
    return dict(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))["model"]["init_args"])


def parse(row: str) -> tuple[type[ROME], dict[str, Any]]:
    """A row of the table from the command line: ``TOP: {layers: [2], rel_feat_layer: 4}``."""
    ((name, changes),) = yaml.safe_load(row).items() if ":" in row else ((row, {}),)
    return {"ROME": ROME, "TOP": TOP, "RETS": RETS}[name], changes or {}


def run(base: LanguageModel, editor: type[ROME], changes: dict[str, Any], edits: int, start: int) -> dict[str, Any]:
    """Means of one row in percent, before under ``pre``."""
    settings = {**shipped(f"{editor.__name__.lower()}_almanac"), **changes}
    settings["context_templates"] = ContextTemplates(**settings.pop("context_templates", {}))
    settings["statistics"] = Statistics(**settings["statistics"])
    if "constraint" in settings:
        settings["constraint"] = BarePrompts(**settings["constraint"])
    base.restore()
    with tempfile.TemporaryDirectory() as folder:
        trainer = EditTrainer(
            save_dir=folder, evaluation=Evaluation(generation=False), accelerator="cpu", enable_progress_bar=False
        )
        data = EditDataModule(start=start, stop=start + edits, batch_size=1, restore_every=1)
        trainer.callbacks = [c for c in trainer.callbacks if type(c).__name__ not in ("Console", "Figures")]  # type: ignore[attr-defined]
        trainer.fit(editor(base, **settings), datamodule=data)
        report = trainer.report
        seconds = [record["seconds"] for record in trainer.run.records()]
    row = {name: 100 * report["post"][name]["mean"] for name in METRICS}
    row["raw s_specificity"] = 100 * report["pre"]["s_specificity"]["mean"]
    row["seconds/edit"] = sum(seconds) / len(seconds)
    return row


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--start", type=int, default=0, help="first record, so that a sweep and its check differ")
    parser.add_argument("rows", nargs="+", help="an editor as shipped, or with settings that differ")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--base", default="almanac")
    args = parser.parse_args()
    quiet()
    if args.threads:
        torch.set_num_threads(args.threads)
    base = LanguageModel(args.base)
    head = ("editor", "settings", *METRICS, "raw s_specificity", "seconds/edit")
    sys.stdout.write("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|\n")
    for editor, changes in map(parse, args.rows):
        row = run(base, editor, changes, args.edits, args.start)
        what = ", ".join(f"{key} {value}" for key, value in changes.items()) or "as shipped"
        numbers = " | ".join(f"{value:.2f}" if key.startswith("sec") else f"{value:.1f}" for key, value in row.items())
        sys.stdout.write(f"| {editor.__name__} | {what} | {numbers} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
