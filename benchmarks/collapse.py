"""Sequential edits of the almanac under the collapse watch: the table in benchmarks/collapse.md.

    python benchmarks/collapse.py --edits 300 "ROME: {mom2_adjustment: false}" ROME "MEMIT: {batch_size: 10}"

A row is an editor as its configs/*_almanac.yaml has it, with settings that differ, and a seed, which chooses facts, new
objects and context templates; nothing is restored. Columns: after how many edits the watch first warned and of what;
what retention had lost by then; after how many edits it had lost 20 points (checked every --every edits); and the last
check. Rows are printed as they come, as a Markdown table; --out keeps the run directories.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from typing import Any

import torch
import yaml
from almanac_mass import CONFIGS, parse

LOST = 0.2
"""The loss of retention that is to be warned of before."""


def run(name: str, changes: dict[str, Any], edits: int, seed: int, every: int, folder: str) -> list[dict[str, Any]]:
    """The checks of one run."""
    from kedit_lightning import editors
    from kedit_lightning.callbacks import CollapseWatch
    from kedit_lightning.callbacks.logs import quiet
    from kedit_lightning.data.datamodule import EditDataModule
    from kedit_lightning.data.prompts import ContextTemplates
    from kedit_lightning.models import LanguageModel, Statistics
    from kedit_lightning.trainer import EditTrainer

    quiet()
    torch.set_num_threads(1)
    changes = dict(changes)
    options = {"seed": seed, **changes.pop("options", {})}
    data = EditDataModule(options=options, stop=edits, batch_size=changes.pop("batch_size", 1))
    shipped = yaml.safe_load((CONFIGS / f"{name.lower()}_almanac.yaml").read_text(encoding="utf-8"))["model"]
    settings = {**shipped["init_args"], **changes}
    settings["context_templates"] = ContextTemplates(**settings["context_templates"], seed=seed)
    settings["statistics"] = Statistics(**settings["statistics"])
    if "compress" in settings:
        settings["compress"] = editors.Compression(**settings["compress"])
    watch = CollapseWatch(every=every)
    trainer = EditTrainer(name, folder, evaluate=False, accelerator="cpu", callbacks=[watch], enable_progress_bar=False)
    trainer.callbacks = [c for c in trainer.callbacks if type(c).__name__ not in ("Console", "Figures")]  # type: ignore[attr-defined]
    data.setup("fit")
    trainer.fit(getattr(editors, name)(LanguageModel("almanac"), **settings), datamodule=data)
    return trainer.run.health.records()


def cells(checks: list[dict[str, Any]]) -> list[str]:
    """What a row says of a run."""
    best, lost = 0.0, {0: 0.0}
    for check in checks[1:]:
        best = max(best, check["retention"])
        lost[check["edits"]] = best - check["retention"]
    warned = next((check for check in checks if check["warnings"]), None)
    of = [word for word in ("perplexity", "still answered") if warned and word in " ".join(warned["warnings"])]
    last = checks[-1]
    return [
        f"{warned['edits']} ({', '.join(of)})" if warned else "never",
        f"{100 * lost[warned['edits']]:.0f}" if warned else "–",
        next((str(edits) for edits, points in lost.items() if points > LOST - 1e-9), "never"),
        f"{100 * last['retention']:.0f} %",
        f"{last['perplexity'] / checks[0]['perplexity']:.2f}",
        *(f"{last['together'][measure]:.2f}" for measure in ("l1", "frobenius", "spectral")),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=300)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", help="where the run directories are kept")
    parser.add_argument("rows", nargs="+", help="an editor as shipped, or with settings that differ")
    args = parser.parse_args()
    head = ["editor", "settings", "seed", "warned after", "points lost by then", "20 points lost after"]
    head += ["retention", "perplexity", "L1", "Frobenius", "spectral"]
    sys.stdout.write("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|\n")
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in map(parse, args.rows):
            what = ", ".join(f"{key} {value}" for key, value in changes.items()) or "as shipped"
            for seed in args.seeds:
                checks = run(name, changes, args.edits, seed, args.every, args.out or folder)
                sys.stdout.write(f"| {name} | {what} | {seed} | {' | '.join(cells(checks))} |\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
