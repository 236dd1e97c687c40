"""Many edits of the almanac at once, or one by one, under several editors and seeds: the tables in benchmarks/*.md.

    python benchmarks/almanac_mass.py --edits 1000 MEMIT PMET JEEP AlphaEdit "ROME: {batch_size: 1}"
    python benchmarks/almanac_mass.py --edits 100 "ROME: {batch_size: 1}" "ROME: {solver: least_squares}"

A row is an editor as its configs/*_almanac.yaml has it, with settings that differ; `batch_size` is the edits solved
together, all by default. A seed chooses facts, new objects and context templates. Every run is a process of its own, so
that its peak memory is its own. Numbers are means over the seeds with half the width of their 95 % interval (Student's
t); "residual" is how far the edited model's value is from the wanted one, relative to it, "L1 drift" the mean over the
edited matrices of (‖W‖₁ − ‖W₀‖₁) / ‖W₀‖₁ in percent. Rows are printed as they come, as a Markdown table; --out keeps
every run, and runs that it holds are not repeated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import resource
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml

METRICS = {
    "ES": "efficacy",
    "GS": "generalization",
    "S-spec": "s_specificity",
    "R-spec": "r_specificity",
    "Score": "score3",
    "Score4": "score4",
}
DIGITS = {"fluency": 2, "residual": 2, "s/edit": 3, "MB": 0}
CONFIGS = Path(__file__).parent.parent / "configs"


def run(name: str, changes: dict[str, Any], edits: int, seed: int, written: int, threads: int) -> dict[str, float]:
    """One run: its metrics in percent (fluency in bits), seconds an edit and peak memory in MB."""
    from kedit_lightning import editors
    from kedit_lightning.callbacks.logs import quiet
    from kedit_lightning.data.datamodule import EditDataModule
    from kedit_lightning.data.prompts import ContextTemplates
    from kedit_lightning.editors.compression import Compression
    from kedit_lightning.metrics import Evaluation, Evaluator
    from kedit_lightning.metrics.drift import weight_drift
    from kedit_lightning.models import LanguageModel, Statistics
    from kedit_lightning.run import read_deltas
    from kedit_lightning.trainer import EditTrainer

    quiet()
    torch.set_num_threads(threads)
    changes = dict(changes)
    data = EditDataModule(options={"seed": seed}, stop=edits, batch_size=changes.pop("batch_size", edits))
    data.setup("fit")
    shipped = yaml.safe_load((CONFIGS / f"{name.lower()}_almanac.yaml").read_text(encoding="utf-8"))["model"]
    settings = {**shipped["init_args"], **changes}
    settings["context_templates"] = ContextTemplates(**settings["context_templates"], seed=seed)
    settings["statistics"] = Statistics(**settings["statistics"])
    if "compress" in settings:
        settings["compress"] = Compression(**settings["compress"])
    base = LanguageModel("almanac")
    scorer = Evaluator(base, Evaluation(generation=False))
    scorer.references(data.edits)
    with tempfile.TemporaryDirectory() as folder:
        trainer = EditTrainer(save_dir=folder, evaluate=False, accelerator="cpu", enable_progress_bar=False)
        trainer.callbacks = [c for c in trainer.callbacks if type(c).__name__ not in ("Console", "Figures")]  # type: ignore[attr-defined]
        trainer.fit(getattr(editors, name)(base, **settings), datamodule=data)
        records = trainer.run.records()
        stages = [record["stages"][-1] for record in records]
        edited = {delta.name for delta in read_deltas(trainer.run.path)[0]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    metrics = scorer.new()
    scorer.update(metrics, data.edits)
    found = {key: 100 * metrics.compute()[metric].mean for key, metric in METRICS.items()}
    if written:
        writer = Evaluator(base, Evaluation())
        writer.references([])
        texts = writer.new()
        writer.update(texts, data.edits[:written])
        found["fluency"] = texts.compute()["fluency"].mean
    # Of PMET only the MLP's value is written; its attention's is dropped.
    left = [value for stage in stages for key, value in stage.items() if re.match("residual/(?!attn)", key)]
    found["residual"] = mean(left) if left else float("nan")
    found["L1 drift"] = 100 * mean(weight_drift(base.pristine(name), base.weight(name))["l1"] for name in edited)
    return {**found, "s/edit": mean(record["seconds"] for record in records), "MB": peak / 1024}


def parse(row: str) -> tuple[str, dict[str, Any]]:
    """A row of the table from the command line: ``TOP: {solver: least_squares, layers: [2]}``."""
    ((name, changes),) = yaml.safe_load(row).items() if ":" in row else ((row, {}),)
    return name, changes or {}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--written", type=int, default=0, help="edits whose texts are written, for fluency")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSONL of all runs")
    parser.add_argument(
        "--columns", nargs="+", default=["ES", "GS", "S-spec", "R-spec", "Score", "Score4", "s/edit", "MB"]
    )
    parser.add_argument("rows", nargs="+", help="an editor as shipped, or with settings that differ")
    args = parser.parse_args()
    from kedit_lightning.metrics import interval_over_runs

    kept: dict[str, dict[str, Any]] = {}
    if args.out and args.out.is_file():
        kept = {line["run"]: line["found"] for line in map(json.loads, args.out.read_text().splitlines())}
    head: list[str] = []
    for name, changes in map(parse, args.rows):
        runs = []
        for seed in args.seeds:
            key = json.dumps([name, changes, args.edits, seed, args.written], sort_keys=True)
            if key not in kept:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    given = (name, changes, args.edits, seed, args.written, args.threads)
                    kept[key] = pool.apply(run, given)
                if args.out:
                    with args.out.open("a") as file:
                        file.write(json.dumps({"run": key, "found": kept[key]}) + "\n")
            runs.append(kept[key])
        if not head:
            head = ["editor", "settings", *args.columns]
            sys.stdout.write("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|\n")
        what = ", ".join(f"{key} {value}" for key, value in changes.items()) or "as shipped"
        cells = []
        for column in head[2:]:
            middle, half = interval_over_runs([found[column] for found in runs])
            digits = DIGITS.get(column, 1)
            cells.append(
                f"{middle:.{digits}f}" + (f" ± {half:.{digits}f}" if half == half and digits in (1, 2) else "")
            )
        sys.stdout.write(f"| {name} | {what} | {' | '.join(cells)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
