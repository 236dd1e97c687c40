"""What the shipped settings of ROME and TOP do to the shipped model: the conditions it was made for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kedit_lightning.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"


def measured(editor: str, edits: int, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Means before and after so many single edits."""
    settings: dict[str, Any] = {
        "data.stop": edits, "trainer.save_dir": folder, "trainer.evaluation.generation": "false",
        "trainer.enable_progress_bar": "false", "trainer.accelerator": "cpu",
    }  # fmt: skip
    main(["fit", "--config", str(CONFIGS / f"{editor}_almanac.yaml"), *(f"--{k}={v}" for k, v in settings.items())])
    (file,) = folder.glob(f"{editor}_almanac/*/metrics.json")
    report = json.loads(file.read_text(encoding="utf-8"))
    pre, post = ({name: found["mean"] for name, found in report[when].items()} for when in ("pre", "post"))
    return pre, post


@pytest.mark.parametrize("edits", [16, pytest.param(200, marks=pytest.mark.slow)])
def test_rome_edits_the_almanac_and_top_spares_other_relations(edits: int, tmp_path: Path) -> None:
    pre, rome = measured("rome", edits, tmp_path)
    _, top = measured("top", edits, tmp_path)
    for after in (rome, top):
        assert after["efficacy"] >= 0.95
        assert after["generalization"] >= 0.8
        assert after["s_specificity"] >= pre["s_specificity"] - 0.1
        assert after["r_specificity"] < pre["r_specificity"]
    assert top["r_specificity"] > rome["r_specificity"] + 0.2
