"""TOP's relative indirect effect: 0 against itself, what is undefined, and by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kedit_lightning.edits import Edit
from kedit_lightning.errors import KeditError
from kedit_lightning.models import LanguageModel
from kedit_lightning.probes import RelativeIndirectEffect
from kedit_lightning.probes.indirect_effect import compare, effects_of
from kedit_lightning.probes.tracing import Asked, Tracer
from tests.commandline import done
from tests.families import EDITS, tiny_base
from tests.probes.test_trace import planted, study_of

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def known() -> tuple[LanguageModel, list[Edit]]:
    """The planted model and its fact, of which the new answer is the present one."""
    base, (edit,) = planted()
    assert edit.target_true is not None
    return base, [replace(edit, target_new=edit.target_true)]


def test_a_model_against_itself_is_0(known: tuple[LanguageModel, list[Edit]]) -> None:
    (finding,) = RelativeIndirectEffect(windows=[1, 10]).look(study_of(*known))
    (rows, notes) = finding.rows, finding.notes
    assert {row["window"] for row in rows} == {1, 10}
    last = [row for row in rows if row["token"] == "ls"]
    assert [(row["rie"], row["of_maxima"], row["rie_edits"]) for row in last] == [(0.0, 0.0, 1)] * 2
    assert all(row["rie"] == 0 or math.isnan(row["rie"]) for row in rows)
    assert all(0 <= row["undefined"] <= row["cells"] for row in rows)
    assert [row["cells"] - row["undefined"] for row in last] == [1, 4], "the planted cell; all windows hold it"
    assert notes["used"] == 1
    assert finding.figure is not None


def test_no_edit_is_answered(known: tuple[LanguageModel, list[Edit]]) -> None:
    base, edits = known
    never = [replace(edit, target_new="never") for edit in edits]
    with pytest.raises(KeditError, match="no usable prompt: expected an edited model's next token"):
        list(RelativeIndirectEffect().look(study_of(base, never)))


def test_each_token_from_the_run_that_corrupts_it() -> None:
    tracer = Tracer(tiny_base("gpt2"), 0.5, 2, [("mlp", 3)])
    classes, found = effects_of(tracer, Asked(EDITS[1]))
    subject, relation = tracer(Asked(EDITS[1]), "subject"), tracer(Asked(EDITS[1]), "relation")
    assert subject is not None
    assert relation is not None
    for i, name in enumerate(classes):
        assert torch.equal(found["mlp", 3][i], (subject if name.endswith("s") else relation).effects["mlp", 3][i])


def test_by_hand() -> None:
    """Two prompts of a subject's and two relation tokens, two layers; one token has no defined cell."""
    e, kind = math.e, ("mlp", 10)
    before = torch.tensor([[0.1, 0.01], [0.1, 0.1], [0.2, 0.1]], dtype=torch.float64)
    after = torch.tensor([[0.1 * e, 0.01 * e**3], [0.1, -0.1], [0.2 / e, 0.0]], dtype=torch.float64)
    nothing = torch.tensor([[0.1, 0.1], [0.1, 0.1], [0.0, 1e-5]], dtype=torch.float64)
    pairs = [((["ls", "fr", "lr"], {kind: before}), (["ls", "fr", "lr"], {kind: x})) for x in (after, nothing)]
    rows, gap = compare(pairs, kind, 1e-4)
    found = {row["token"]: row for row in rows}
    assert list(found) == ["ls", "fr", "lr"]
    second = math.log(0.1 / 0.01)
    assert found["ls"]["rie"] == pytest.approx((3 + second) / 2), "the largest over the layers, then the mean"
    assert found["ls"]["of_maxima"] == pytest.approx((1 + math.log(2 * e**2 / 2 / e**2)) / 2)
    assert found["ls"]["rie_ci95"] == pytest.approx(1.96 * abs(3 - second) / 2 / math.sqrt(2))
    assert (found["lr"]["rie"], found["lr"]["rie_edits"]) == (pytest.approx(-1), 1)
    assert [(found[name]["cells"], found[name]["undefined"]) for name in found] == [(4, 0), (4, 1), (4, 3)]
    assert (gap["rie"]["mean"], gap["rie"]["n"]) == (pytest.approx(4), 1)


@pytest.mark.parametrize("settings", [{"floor": 0.0}, {"edits": 0}, {"windows": []}])
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(KeditError, match="expected"):
        RelativeIndirectEffect(**settings)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("editor", ["rome", "memit"])
def test_on_the_almanac(editor: str, tmp_path: Path) -> None:
    """Edits that are made: their subjects' last tokens have an RIE."""
    config = CONFIGS / f"{editor}_almanac.yaml"
    settings = ("--probe.edits", 3, "--probe.windows", "[3]", "--data.stop", 3, "--trainer.save_dir", tmp_path)
    done("probe", "--config", config, "--probe", "RelativeIndirectEffect", *settings)
    (table,) = tmp_path.rglob("relative_indirect_effect.csv")
    head, *lines = [line.split(",") for line in table.read_text().splitlines()]
    found = {line[1]: dict(zip(head, line, strict=True)) for line in lines}
    assert float(found["ls"]["rie"]) != 0
    assert table.with_suffix(".png").exists()
