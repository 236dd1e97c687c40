"""`P[o*|h_r, v]` against `P[o*|h_r]`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kedit_lightning.errors import KeditError
from kedit_lightning.probes import ConditionalIndependence
from kedit_lightning.probes.independence import agreement
from tests.editors.fitting import bits, make, same, trainer
from tests.families import EDITS, tiny_base
from tests.test_trainer import data

SHORT = [replace(edit, target_new=word) for edit, word in zip(EDITS[:2], ("of", "is"), strict=True)]
"""Targets of one token."""


@pytest.mark.parametrize("name", ["ROME", "TOP", "FT"])
def test_h_r_of_the_last_layer_says_all_and_one_below_the_edit_nothing(name: str, tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    assert all(len(base.encode(edit.text, edit.target_new).targets) == 1 for edit in SHORT)
    before, editor = bits(base), make(name, base)
    found = trainer(tmp_path).probe(editor, data(SHORT), ConditionalIndependence(layers=[0, 1, 2, 3]))
    assert same(base, before)
    rows, layers = found[0].rows, found[1].rows
    of_last = {row["case_id"]: row for row in rows if row["l_a"] == 3}
    assert set(of_last) == {0, 11}
    for edit in SHORT:
        assert of_last[edit.case_id]["p_h_r"] == pytest.approx(of_last[edit.case_id]["p_both"], rel=1e-5)
    for row in rows:
        assert row["p_both"] != pytest.approx(row["p_unedited"], rel=1e-3)
        if row["l_a"] == 0:
            assert row["p_h_r"] == pytest.approx(row["p_unedited"], rel=1e-5)
    assert [row["l_a"] for row in layers] == [0, 1, 2, 3]
    assert found[0].notes["l_a_of_the_editor"] == ([2] if name == "TOP" else [])


def test_by_default_from_the_edited_layer_to_the_last(tmp_path: Path) -> None:
    editor = make("ROME", tiny_base("llama"), layers=(2,))
    found = trainer(tmp_path).probe(editor, data(EDITS[:2]), ConditionalIndependence())
    assert [row["l_a"] for row in found[1].rows] == [2, 3]


def test_layers_that_the_model_has_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeditError, match="between 0 and 3, got 9"):
        trainer(tmp_path).probe(make("ROME", tiny_base("gpt2")), data(EDITS[:1]), ConditionalIndependence(layers=[9]))


def test_the_correlation_is_none_where_there_is_none_and_its_interval_holds_it() -> None:
    flat = [{"l_a": 1, "p_both": 0.5, "p_h_r": 0.1 * i} for i in range(5)]
    assert agreement(flat, 1)["correlation"] is None
    torch.manual_seed(0)
    p = torch.rand(40)
    noisy = (p + 0.1 * torch.randn(40)).clamp(0, 1)
    found = agreement([{"l_a": 1, "p_both": float(a), "p_h_r": float(b)} for a, b in zip(p, noisy, strict=True)], 1)
    assert found["low"] < found["correlation"] < found["high"] < 1
    assert found["difference"] == pytest.approx(float((p - noisy).abs().mean()))
