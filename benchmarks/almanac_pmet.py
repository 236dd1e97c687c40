"""Why PMET stands behind MEMIT on the almanac: its values written in many ways (benchmarks/almanac_mass.md).

    python benchmarks/almanac_pmet.py

For each seed PMET's values of 1,000 facts are optimised once, as configs/pmet_almanac.yaml has it, and then written
with other layers, other λ, another spread, the attention too; MEMIT's values and way of writing stand beside them.
"residual" is how far the edited MLP's (MEMIT: block's) value is from the wanted one, relative to it. Means over the
seeds with half the width of their 95 % interval (Student's t).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import yaml

from kedit_lightning import editors
from kedit_lightning.callbacks.logs import quiet
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.prompts import ContextTemplates
from kedit_lightning.metrics import Evaluation, Evaluator, interval_over_runs
from kedit_lightning.models import LanguageModel, Statistics
from kedit_lightning.trainer import EditTrainer

METRICS = {"ES": "efficacy", "GS": "generalization", "S-spec": "s_specificity", "R-spec": "r_specificity"}
METRICS |= {"Score": "score3"}
CONFIGS = Path(__file__).parent.parent / "configs"
WAYS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "λ 1": {"mom2_update_weight": 1.0},
    "λ 5": {"mom2_update_weight": 5.0},
    "λ 100": {"mom2_update_weight": 100.0},
    "even spread": {"rule": "even"},
    "layers 1 to 3": {"layers": [1, 2, 3]},
    "layers 2, 3": {"layers": [2, 3]},
    "layer 3": {"layers": [3]},
    "attention too": {"rewrite": ("attn", "mlp")},
    "attention too, λ 1": {"rewrite": ("attn", "mlp"), "mom2_update_weight": 1.0},
}
"""Ways of writing PMET's values; attributes of the editor."""


def optimised(name: str, base: LanguageModel, data: EditDataModule, seed: int, **changes: Any) -> Any:  # noqa: ANN401
    """An editor with the values of all facts."""
    shipped = yaml.safe_load((CONFIGS / f"{name.lower()}_almanac.yaml").read_text(encoding="utf-8"))["model"]
    settings = {**shipped["init_args"], **changes}
    settings["context_templates"] = ContextTemplates(**settings["context_templates"], seed=seed)
    settings["statistics"] = Statistics(**settings["statistics"])
    editor = getattr(editors, name)(base, **settings)
    with tempfile.TemporaryDirectory() as folder:
        trainer = EditTrainer(save_dir=folder, evaluate=False, accelerator="cpu", enable_progress_bar=False)
        trainer.callbacks = [c for c in trainer.callbacks if type(c).__name__ not in ("Console", "Figures")]  # type: ignore[attr-defined]
        trainer.fit(editor, datamodule=data)
    return editor


@torch.no_grad()
def written(editor: Any, scorer: Evaluator, data: EditDataModule, **way: Any) -> dict[str, float]:  # noqa: ANN401
    """The scores after the values are written in one way onto the unedited model."""
    base, before = editor.base, {name: getattr(editor, name) for name in way}
    base.restore()
    for name, value in way.items():
        setattr(editor, name, value)
    with closing(editor.write()) as updates:
        for delta in updates:
            base.write(delta.name, delta.update)
    editor.settle()
    for name, value in before.items():
        setattr(editor, name, value)
    metrics = scorer.new()
    scorer.update(metrics, data.edits)
    found = {key: 100 * metrics.compute()[metric].mean for key, metric in METRICS.items()}
    residual = editor.outcomes[-1].residual
    return {**found, "residual": float(residual["mlp" if "mlp" in residual else "block"].mean())}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        base = LanguageModel("almanac")
        data = EditDataModule(options={"seed": seed}, stop=args.edits, batch_size=args.edits)
        data.setup("fit")
        scorer = Evaluator(base, Evaluation(generation=False))
        scorer.references(data.edits)
        pmet = optimised("PMET", base, data, seed, rewrite="both")
        pmet.rewrite = ("mlp",)
        for name, way in WAYS.items():
            runs.setdefault(f"PMET, {name}", []).append(written(pmet, scorer, data, **way))
            sys.stderr.write(f"seed {seed}, {name}: {runs[f'PMET, {name}'][-1]}\n")
        base.restore()
        memit = optimised("MEMIT", base, data, seed)
        runs.setdefault("MEMIT, as shipped", []).append(written(memit, scorer, data))
    head = ["", *METRICS, "residual"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, found in runs.items():
        cells = []
        for column in head[1:]:
            middle, half = interval_over_runs([one[column] for one in found])
            digits = 2 if column == "residual" else 1
            cells.append(f"{middle:.{digits}f} ± {half:.{digits}f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
