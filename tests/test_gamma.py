"""`kedit tune-gamma`: EAC's γ on single edits."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml

from kedit_lightning.editors import ROME
from kedit_lightning.editors.compression import Compression
from kedit_lightning.errors import KeditError
from kedit_lightning.gamma import GammaSearch, choose
from kedit_lightning.metrics import eac_names
from tests.commandline import World, done, kedit
from tests.editors.fitting import bits, make, same
from tests.families import EDITS, tiny_base
from tests.test_trainer import data, measuring


def test_the_command_measures_every_gamma_and_leaves_an_overlay(world: World) -> None:
    compress = {"v_num_grad_steps1": 2, "v_num_grad_steps2": 2}
    config = world.config("ROME", compress=compress)
    asked = ("--gammas=[50, 0, 90]", "--edits=2", "--tolerance=0.9")
    shown = done("tune-gamma", "--config", config, "--trainer.name", "gamma", *asked)
    run = world.logs / "gamma" / "version_0"
    rows = list(csv.DictReader((run / "gamma.csv").open()))
    assert [row["gamma"] for row in rows] == ["", "0.0", "50.0", "90.0"]
    assert all(row["edits"] == "2" and 0 <= float(row[name]) <= 1 for row in rows for name in eac_names())
    assert (run / "gamma.png").read_bytes()[:4] == b"\x89PNG"
    overlay = yaml.safe_load((run / "gamma.yaml").read_text())
    chosen = overlay["model"]["init_args"]["compress"]["gamma"]
    assert f"γ = {chosen:g} keeps every score" in shown.out
    assert "P90" in shown.out
    done("fit", "--config", config, "--config", run / "gamma.yaml", "--print_config")


def test_each_gamma_edits_every_fact_by_itself_and_no_weight(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    before = bits(base)
    compress = Compression(v_num_grad_steps1=2, v_num_grad_steps2=2, gamma=80)
    editor = make("ROME", base, compress=compress)
    seen: list[tuple[Any, int, bool, bool]] = []
    made = measuring(tmp_path)
    edit = made.weight_update.edit

    def listening(one: ROME, module: Any, batch: Any, fit: Any) -> Any:
        seen.append((one.compress and one.compress.gamma, len(batch), one.side_by_side, same(base, before)))
        return edit(one, module, batch, fit)

    made.weight_update.edit = listening  # type: ignore[method-assign]
    chosen = made.tune_gamma(editor, data(EDITS[:2]), gammas=[50.0, 90.0], edits=2, tolerance=0.999)
    assert seen == [(gamma, 2, True, True) for gamma in (None, 50.0, 90.0)]
    assert same(base, before)
    assert not editor.side_by_side
    assert editor.compress == compress
    assert chosen in (50.0, 90.0, None)


def test_the_largest_gamma_that_keeps_all_three() -> None:
    def row(gamma: float | None, *scores: float) -> dict[str, Any]:
        return {"gamma": gamma, **dict(zip(eac_names(), scores, strict=True))}

    rows = [row(None, 1, 0.9, 0.9), row(50, 1, 0.9, 0.95), row(80, 0.98, 0.86, 0.9), row(95, 1, 0.7, 1)]
    assert choose(rows, 0.05) == 80
    assert choose(rows, 0) == 50
    assert choose(rows, 0.2) == 95
    assert choose([rows[0], row(50, 0, 1, 1)], 0.5) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gammas": []}, "at least one percentile"),
        ({"edits": 0}, "edits 0"),
        ({"tolerance": -0.1}, "tolerance -0.1"),
        ({"gammas": [100.0]}, "below 100"),
    ],
)
def test_what_cannot_be_searched(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    asked = {"gammas": [50.0], "edits": 1, "tolerance": 0.05} | changes
    with pytest.raises(KeditError, match=message):
        GammaSearch(measuring(tmp_path), make("ROME", tiny_base("gpt2")), data(EDITS[:1]), **asked)


def test_records_without_paraphrases_are_refused(world: World, tmp_path: Path) -> None:
    bare = [{"prompt": "{} was born in", "subject": "Velora Quint", "target_new": "Tessaro"}]
    content = yaml.safe_load(world.config("ROME").read_text())
    content["data"] = {"edits": bare}
    config = tmp_path / "bare.yaml"
    config.write_text(yaml.safe_dump(content))
    refused = kedit("tune-gamma", "--config", config, "--gammas=[50]", "--edits=1")
    assert refused.status == 1
    assert "tune-gamma needs edits with prompts for generalization, locality" in refused.err
    assert refused.err.count("\n") == 1
