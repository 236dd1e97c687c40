"""`kedit probe`: what it keeps, and how it ends."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kedit_lightning.callbacks.figures import blank
from kedit_lightning.editors import Editor
from kedit_lightning.edits import Site
from kedit_lightning.errors import KeditError
from kedit_lightning.probes import Finding, GradientSaliency, Probe, Study
from tests.commandline import World, done, kedit
from tests.editors.fitting import bits, make, same, trainer
from tests.families import EDITS, tiny_base
from tests.test_trainer import data

SALIENCY = ("--probe=GradientSaliency", "--probe.edits=2", "--probe.epochs=[1]")


def test_the_command_keeps_tables_figures_notes_and_its_configuration(world: World) -> None:
    shown = done("probe", "--config", world.config("ROME"), "--trainer.name=seen", *SALIENCY)
    run = world.logs / "seen" / "version_0"
    assert f"run directory {run}" in shown.out
    assert "edits_used: 2" in shown.out
    rows = list(csv.DictReader((run / "gradient_saliency_1.csv").open()))
    assert rows[0]["token"] == "rp"
    assert (run / "gradient_saliency_1.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((run / "gradient_saliency_1.json").read_text())["edits"] == 2
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["probe"]["class_path"].endswith("GradientSaliency")
    assert config["probe"]["init_args"]["edits"] == 2
    assert EventAccumulator(str(run), size_guidance={"images": 0}).Reload().Tags()["images"] == ["gradient_saliency_1"]
    left = {path.name.split(".")[0] for path in run.iterdir()}
    assert left == {"config", "events", "gradient_saliency_1"}
    again = done("probe", "--config", run / "config.yaml", "--trainer.name=again")
    assert str(world.logs / "again" / "version_0") in again.out
    table = "gradient_saliency_1.csv"
    assert (world.logs / "again" / "version_0" / table).read_text() == (run / table).read_text()


@pytest.mark.parametrize(
    ("asked", "status", "message"),
    [
        ((), 1, "expected --probe and a class, got none; there are CausalTrace, ConditionalIndependence,"),
        (("--probe=Horoscope",), 2, "Horoscope"),
        (("--probe=GradientSaliency", "--probe.epoch=[1]"), 2, "epoch"),
        (("--probe=GradientSaliency", "--probe.edits=0"), 1, "edits: expected at least 1, got 0"),
    ],
)
def test_what_cannot_be_probed_is_one_line(world: World, asked: tuple[str, ...], status: int, message: str) -> None:
    refused = kedit("probe", "--config", world.config("ROME"), "--trainer.name=refused", *asked)
    assert refused.status == status
    assert message in refused.err
    assert refused.err.count("\n") == 1
    assert not list((world.logs / "refused").glob("version_*"))


def test_an_interrupt_keeps_what_was_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    look = GradientSaliency.look

    def interrupted(self: GradientSaliency, study: Study) -> Iterator[Finding]:
        yield next(look(self, study))
        raise KeyboardInterrupt

    monkeypatch.setattr(GradientSaliency, "look", interrupted)
    stopped = kedit("probe", "--config", world.config("ROME"), "--trainer.name=stopped", *SALIENCY)
    assert stopped.status == 130
    assert "interrupted; what was found is in the run directory" in stopped.err
    found = {path.suffix for path in (world.logs / "stopped" / "version_0").glob("gradient_saliency_1.*")}
    assert found == {".csv", ".png", ".json"}


class Vandal(Probe):
    """Writes to the weights, finds something, and fails."""

    def look(self, study: Study) -> Iterator[Finding]:
        with study.singles.ready():
            for _ in study.singles.blocks(study.edits):
                name = study.base.name(Site(1, "mlp"))
                study.base.write(name, study.base.weight(name).clone())
                yield Finding("first", [{"a": 1.0, "b": None}], None, {"x": {"y": 1}})
                yield Finding("second", [], blank(2, 2))
                msg = "nothing more to see"
                raise KeditError(msg)


def test_the_model_is_left_as_it_was_found(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    before, editor = bits(base), make("ROME", base)
    made = trainer(tmp_path)
    with pytest.raises(KeditError, match="nothing more to see"):
        made.probe(editor, data(EDITS[:2]), Vandal())
    assert same(base, before)
    assert not editor.side_by_side
    kept = {path.name for path in made.run.path.iterdir() if not path.name.startswith("events")}
    assert kept == {"first.csv", "first.json", "second.png", "second.json"}
    assert (made.run.path / "first.csv").read_text() == "a,b\n1.0,\n"


@pytest.mark.parametrize(("name", "together"), [("ROME", True), ("FT", False)])
def test_single_edits_stand_while_their_block_does(tmp_path: Path, name: str, together: bool) -> None:
    """Side by side in their own rows, or one by one in the weights; each as if there were no other."""
    base = tiny_base("gpt2")
    before, seen = bits(base), list[tuple[int, list[int], bool]]()

    class Counting(Probe):
        def look(self, study: Study) -> Iterator[Finding]:
            with study.singles.ready():
                for block, owners in study.singles.blocks(study.edits):
                    seen.append((len(block), owners, same(base, before)))
            yield Finding("counted", [], None)

    editor: Editor = make(name, base)
    (finding,) = trainer(tmp_path).probe(editor, data(EDITS[:2]), Counting())
    assert finding.name == "counted"
    assert seen == ([(2, [0, 1], True)] if together else [(1, [0], False), (1, [0], False)])
    assert same(base, before)
