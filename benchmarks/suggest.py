"""What `kedit suggest` chooses against the best that an exhaustive search finds: the table of benchmarks/suggest.md.

    python -m benchmarks.suggest ROME TOP JEEP
    python -m benchmarks.suggest --base FOLDER --world 5 400 100 ROME TOP JEEP    # another world, and the model of it

`suggest` sees the first facts of the world. Every place that the editor could take is then measured on other facts,
each edited by itself, and with what `suggest` chose the difference to the best of them is printed: a paired bootstrap
over the facts gives its 95 % interval. The best is picked on the very facts it is measured on, so it is flattered.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import yaml
from lightning import Trainer
from torch import Tensor

from benchmarks.measuring import shipped, trainer
from kedit_lightning.almanac import World, records
from kedit_lightning.almanac.corpus import Corpus
from kedit_lightning.callbacks.logs import quiet
from kedit_lightning.data import datasets
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.editors import JEEP, TOP, Editor
from kedit_lightning.edits import Edit
from kedit_lightning.measurement import Measurement
from kedit_lightning.models import LanguageModel, Statistics
from kedit_lightning.places import Place, listed, ranked, spaced
from kedit_lightning.probes.tracing import answered
from kedit_lightning.single_edits import SingleEdits
from kedit_lightning.suggesting import Suggestion
from kedit_lightning.sweep_table import FOUR


def places(editor: Editor) -> list[Place]:
    """Every place that an editor could take, its numbers of layers kept."""
    layers = editor.base.num_layers
    if isinstance(editor, JEEP):
        low, high = len(editor.layers_low), len(editor.layers_high)
        runs = [tuple(range(first, first + low)) for first in range(layers - low - high + 1)]
        return [
            Place(run, high=tuple(range(first, first + high)))
            for run in runs
            for first in range(run[-1] + 1, layers - high + 1)
        ]
    if isinstance(editor, TOP):
        return [Place((layer,), l_a) for layer in range(layers - 1) for l_a in spaced(layer + 1, layers - 1, layers)]
    return [Place(run) for run in sorted(ranked([0.0] * layers, len(editor.layers), layers - 1))]


def score(values: Tensor) -> Tensor:
    """Harmonic mean of the four metrics' means over facts, from shape ``(…, n, 4)``."""
    return 4 / (1 / values.nanmean(dim=-2)).sum(dim=-1)


def difference(best: Tensor, chosen: Tensor, resamples: int = 4000) -> tuple[float, float, float]:
    """How much better the best is, in points, with its 95 % interval; both of shape ``(n, 4)``, of the same facts."""
    n = len(best)
    draws = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(0))
    many = 100 * (score(best[draws]) - score(chosen[draws]))
    low, high = many.quantile(torch.tensor([0.025, 0.975], dtype=many.dtype)).tolist()
    return float(100 * (score(best) - score(chosen))), low, high


def measured(
    one: Suggestion, tried: Sequence[Place], edits: Sequence[Edit], measurement: Measurement
) -> dict[Place, Tensor]:
    """The four metrics of every fact at every place, shape ``(n, 4)`` each; nan where a record has no such prompts."""
    found = dict[Place, Tensor]()
    measurement.evaluator.references(edits)
    for place in tried:
        lines = one.lines(place, edits, measurement.evaluator)
        rows = [[line.get(name, float("nan")) for name in FOUR] for line in lines]
        found[place] = torch.tensor(rows, dtype=torch.float64)
        sys.stderr.write(f"{place}: {100 * float(score(found[place])):.1f}\n")
    return found


def named(place: Place) -> str:
    """A place in words."""
    rest = f", l_a {place.l_a}" if place.l_a is not None else f" and {listed(place.high)}" if place.high else ""
    return listed(place.layers) + rest


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("editors", nargs="+")
    parser.add_argument("--base", default="almanac")
    parser.add_argument("--world", nargs=3, type=int, metavar=("SEED", "PEOPLE", "PLACES"), default=(0, 1600, 400))
    parser.add_argument("--facts", type=int, default=100, help="what suggest sees")
    parser.add_argument("--edits", type=int, default=40, help="what it edits at every place")
    parser.add_argument("--others", type=int, default=40, help="on how many other facts all places are measured")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(args.threads)
    base, world = LanguageModel(args.base), World(*args.world)
    head = (
        "editor",
        "chosen",
        "score",
        "best",
        "score",
        "behind by (95 %)",
        "trace alone",
        "score",
        "mean of all",
        "places",
    )
    sys.stdout.write("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own = records(args.facts + 3 * args.others, world=world)
        (folder / "facts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in own))
        (folder / "texts.txt").write_text("\n".join(Corpus(world, 0).texts(6000)))
        edits = datasets.load("jsonl", folder / "facts.jsonl")
        fresh = edits[args.facts :]
        others = [one.edit for one in answered(base, fresh, "target_true") if one][: args.others]
        for kind in args.editors:
            statistics = Statistics(str(folder / "texts.txt"), tokens=20_000)
            line = row(shipped(kind, base, statistics=statistics), folder, others, args)
            sys.stdout.write("| " + " | ".join(map(str, line)) + " |\n")
            sys.stdout.flush()


def row(editor: Editor, folder: Path, others: Sequence[Edit], args: argparse.Namespace) -> list[object]:
    """A line of the table."""
    runs = trainer(folder / type(editor).__name__, evaluate=True)
    data = EditDataModule(dataset="jsonl", path=str(folder / "facts.jsonl"), stop=args.facts)
    data.setup("fit")
    path = runs.suggest(editor, data, facts=args.facts, edits=args.edits)
    settings = yaml.safe_load(path.read_text())["model"]["init_args"]
    tried = places(editor)
    one = Suggestion(runs, editor, data, args.facts, args.edits, 1, 0)
    one.singles = SingleEdits(runs, editor, data, partial(Trainer.fit, runs, editor, datamodule=data))
    found = measured(one, tried, others, Measurement(runs, editor, data))
    chosen = next(place for place in tried if place.settings == settings)
    (path.parent / "seen.json").write_text(
        json.dumps({named(place): values.tolist() for place, values in found.items()})
    )
    best = max(tried, key=lambda place: float(score(found[place])))
    alone = chosen
    if (sweep := path.parent / "sweep.csv").is_file():
        with sweep.open(encoding="utf-8") as lines:
            first = next(csv.DictReader(lines))  # what the trace prefers, and of TOP's l_a the last layer
        alone = next(
            one for one in tried if (listed(one.layers), str(one.l_a or "")) == (first["layers"], first["l_a"])
        )
    points, low, high = difference(found[best], found[chosen])
    percent = {place: f"{100 * float(score(values)):.1f}" for place, values in found.items()}
    mean = sum(100 * float(score(values)) for values in found.values()) / len(found)
    behind = f"{points:.1f} ({low:.1f} to {high:.1f})"
    return [
        *(type(editor).__name__, named(chosen), percent[chosen], named(best), percent[best], behind),
        *(named(alone), percent[alone], f"{mean:.1f}", len(tried)),
    ]


if __name__ == "__main__":
    main()
