"""The boundary between what is recalled before and after edits: of known mixtures, and of a real run."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kedit_lightning.edits import Site, Token
from kedit_lightning.models.encoding import collate
from kedit_lightning.probes.value_pca import (
    EDITED,
    ORIGINAL,
    boundary,
    components,
    draw,
    masked,
    read_keys,
    separability,
)
from tests.commandline import World, done, jsonl, kedit
from tests.families import FAMILIES, tiny_base


def mixture(distance: float, n: int = 400) -> tuple[dict[str, Tensor], Tensor]:
    """Sets in 20 dimensions that lie side by side along a hidden direction, and which points are held out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        direction = torch.nn.functional.normalize(torch.randn(20), dim=0).double()
        noise = 0.1 * torch.randn(n, 20, dtype=torch.float64) + torch.randn(n, 1, dtype=torch.float64) * direction
    shares = {ORIGINAL: 0.0, "half": 0.5, EDITED: 1.0}
    return {name: noise + share * distance * direction for name, share in shares.items()}, torch.arange(n) % 2 == 1


@pytest.mark.parametrize(("distance", "expected"), [(0.0, 0.5), (2.0, 0.841), (10.0, 1.0)])
def test_the_boundary_of_a_known_mixture(distance: float, expected: float) -> None:
    """Two normal distributions of variance 1 at a distance d: the best boundary is right in Φ(d / 2) of the cases."""
    sets, out = mixture(distance)
    points, explained = components(sets)
    assert explained[0] > 10 * explained[1]
    line = boundary(points[ORIGINAL][~out], points[EDITED][~out])
    told = separability(points, out, line)
    assert told[EDITED]["accuracy"] == pytest.approx(expected, abs=0.06)
    assert told[ORIGINAL]["accuracy"] == pytest.approx(0.5)
    assert told[ORIGINAL]["beyond"] <= told["half"]["beyond"] + 0.01
    assert told["half"]["beyond"] <= told[EDITED]["beyond"] + 0.01
    axis = draw(points, line, told).axes[0]
    assert len(axis.collections) == 3 + 1  # a set each, and the boundary


def test_held_out_points_are_those_the_boundary_has_not_seen() -> None:
    """Of pure chance a boundary explains what it has seen, and no more."""
    sets, out = mixture(0.0)
    points, _ = components(sets)
    flipped = {**points, EDITED: points[EDITED].clone()}
    flipped[EDITED][~out] += 100  # only what it is fitted to lies elsewhere
    line = boundary(flipped[ORIGINAL][~out], flipped[EDITED][~out])
    assert separability(flipped, out, line)[EDITED]["accuracy"] == pytest.approx(0.5, abs=0.01)
    assert separability(flipped, ~out, line)[EDITED]["accuracy"] == 1.0


def test_masking_leaves_out_what_it_says() -> None:
    update = torch.arange(1.0, 61.0).view(6, 10)
    for mask, axis in (("columns", 0), ("rows", 1)):
        kept = (masked(update, 50, mask) != 0).all(dim=axis)  # type: ignore[arg-type]
        assert int(kept.sum()) == (5 if mask == "columns" else 3)
        assert torch.equal(kept, (masked(update, 50, mask) != 0).any(dim=axis))  # type: ignore[arg-type]
    assert torch.equal(masked(update, 0), update)
    assert not masked(update, 100).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_those_that_the_model_puts_out(family: str) -> None:
    base, site = tiny_base(family), Site(2, "mlp")
    rows = [base.encode(text) for text in ("The town where Velora was born is", "Tobin", "Where does Tobin live?")]
    keys = read_keys(base, rows, site)
    for row, key in zip(rows, keys, strict=True):
        batch = collate([row])
        alone = base.keys(batch, {site: batch.at[Token.PROMPT_LAST]})[site][0]
        torch.testing.assert_close(key, alone, rtol=1e-4, atol=1e-5)
    expected = keys.double() @ base.weight(site).double().T
    bias = base.linear(site).bias
    torch.testing.assert_close(base.project(site, keys), expected if bias is None else expected + bias)  # type: ignore[operator]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    names = ("Velora Quint", "Oskel Tamrin", "Mirabel Foss", "Dario Henk", "Tobin")
    prompts = [f"Where does {name} live{end}" for name in names for end in ("?", " in winter?")]
    return jsonl(tmp_path / "questions.jsonl", [{"prompt": prompt, "answer": "Ulm"} for prompt in prompts])


def test_the_command(world: World, tmp_path: Path, questions: Path) -> None:
    config = world.config("ROME")
    run = world.fit(config, "--data.restore_every", "null", "--data.stop", 3, name="pca")

    def probe(**settings: Any) -> tuple[str, ...]:
        given = {"run": run, "source": questions} | settings
        args = (f"--probe.{name}={value}" for name, value in given.items())
        return ("probe", "--config", str(config), "--probe", "ValuePCA", *args, f"--trainer.save_dir={tmp_path}")

    done(*probe())
    (found,) = tmp_path.rglob("value_pca_separability.csv")
    with found.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["set"] for row in rows] == [ORIGINAL, *(f"{share} % zeroed" for share in (80, 60, 40, 20)), EDITED]
    assert [float(row["zeroed"]) for row in rows] == [100, 80, 60, 40, 20, 0]
    with (found.parent / "value_pca.csv").open() as file:
        points = list(csv.DictReader(file))
    assert len(points) == 6 * 10
    assert sum(row["held_out"] == "True" for row in points) == 6 * 5
    assert (found.parent / "value_pca.png").read_bytes()[:4] == b"\x89PNG"
    for settings, message in (
        ({"run": "nowhere"}, "nowhere: no such delta file"),
        ({"layer": 2}, "expected a run that edits layer 2, got one that edits 1"),
        ({"prompts": 2}, "at least 4"),
        ({"zeroed": "[100]"}, "zeroed between 0 and 100"),
        ({"source": jsonl(tmp_path / "few.jsonl", [{"prompt": "Who?", "answer": "I"}])}, "expected at least 4 prompts"),
    ):
        refused = kedit(*probe(**settings))
        assert (refused.status, refused.err.count("\n")) == (1, 1), refused
        assert message in refused.err
