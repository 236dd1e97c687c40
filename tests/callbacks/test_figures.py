"""Pictures of a finished stream, driven by a fake trainer."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from kedit_lightning.callbacks.figures import Curves, Figures, loss_curves
from kedit_lightning.editors import Outcome
from kedit_lightning.models import LanguageModel
from tests.editors.fitting import end_at, fit, make
from tests.families import EDITS


def summary(mean: float, ci95: float = 0.02) -> dict[str, float]:
    return {"mean": mean, "std": 0.1, "ci95": ci95, "n": 4}


REPORT = {
    "editor": "TOP",
    "edits": 4,
    "pre": {"efficacy": summary(0.0, 0.0), "score3": {"mean": 0.0, "n": 4}, "fluency": summary(6.2)},
    "post": {"efficacy": summary(1.0), "score3": {"mean": 0.9, "n": 4}, "fluency": summary(6.1)},
}


def outcome(stage: str, pass_: int, n: int, steps: int) -> Outcome:
    curves = [
        {"nll": torch.rand(n) + 1 / (step + 1), "weight_decay": torch.full((n,), 0.1 * step)} for step in range(steps)
    ]
    unconverged, no_target = torch.zeros(n, dtype=torch.bool), torch.full((n,), torch.nan)
    return Outcome(stage, pass_, (), torch.full((n,), steps), unconverged, no_target, curves)


def draw(path: Path, batches: list[list[Outcome]], report: dict[str, Any], logger: Any = None, **trainer: Any) -> None:
    path.mkdir(exist_ok=True)
    fake: Any = SimpleNamespace(is_global_zero=True, run=SimpleNamespace(path=path), logger=logger)
    fake.__dict__.update(trainer)
    figures = Figures()
    figures.on_stream_start(fake, None, 4)  # type: ignore[arg-type]
    for outcomes in batches:
        editor: Any = SimpleNamespace(passes=lambda: [3, 5], outcomes=outcomes)
        figures.on_edits_committed(fake, editor, [])
    figures.on_stream_end(fake, None, report)  # type: ignore[arg-type]


def is_picture(path: Path) -> bool:
    data = path.read_bytes()
    return data[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(data[16:20], "big") > 600 and len(data) > 8000


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("steps", [1, 5])
def test_pictures_in_the_run_directory(tmp_path: Path, n: int, passes: int, steps: int) -> None:
    batches = [
        [outcome(stage, pass_, n, steps + extra) for pass_ in range(passes) for stage in ("h_r", "v")]
        for extra in (0, 2)
    ]
    draw(tmp_path, batches, REPORT)
    assert is_picture(tmp_path / "before_after.png")
    assert is_picture(tmp_path / "loss_curves.png")


def test_pictures_in_tensorboard(tmp_path: Path) -> None:
    added: dict[str, int] = {}
    with SummaryWriter(str(tmp_path / "events")) as writer:
        original = writer.add_figure

        def add_figure(tag: str, figure: Any, step: int, **rest: Any) -> None:
            added[tag] = step
            original(tag, figure, step, **rest)

        writer.add_figure = add_figure  # type: ignore[method-assign]
        draw(tmp_path, [[outcome("v", 0, 4, 3)]], REPORT, SimpleNamespace(experiment=writer))
    assert added == {"before_after": 4, "loss_curves": 4}
    assert next((tmp_path / "events").iterdir()).stat().st_size > 8000


def test_nothing_measured_nothing_drawn(tmp_path: Path) -> None:
    draw(tmp_path, [], {"editor": "TOP", "edits": 0, "pre": REPORT["pre"]})
    assert not list(tmp_path.iterdir())


def test_only_the_first_process_draws(tmp_path: Path) -> None:
    draw(tmp_path, [[outcome("v", 0, 4, 3)]], REPORT, is_global_zero=False)
    assert not list(tmp_path.iterdir())


def test_a_stage_that_ended_early_stays_at_its_last_value() -> None:
    one = {"nll": torch.tensor([[4.0], [2.0]]), "kl": torch.tensor([[0.0], [1.0]])}
    two = {"nll": torch.tensor([[5.0], [4.0], [3.0]]), "kl": torch.zeros(3, 1)}
    found = Curves([one, two]).gathered()
    assert found["nll"].tolist() == [[4, 5], [2, 4], [2, 3]]
    assert found["loss"].tolist() == [[4, 5], [3, 4], [3, 3]]


def test_a_mass_edit_in_parts_has_the_curves_of_one_made_at_once(gpt2_base: LanguageModel, tmp_path: Path) -> None:
    """Its edits end at different steps."""
    found: dict[int | None, dict[str, torch.Tensor]] = {}
    for max_tokens in (None, 1):
        figures = Figures()
        figures.on_stream_end = lambda *_: None  # type: ignore[method-assign]
        editor = make("MEMIT", gpt2_base, max_tokens=max_tokens)
        end_at(editor, {edit.case_id: 2 + i for i, edit in enumerate(EDITS[:3])})
        fit(editor, EDITS[:3], tmp_path / str(max_tokens), figures, batch_size=3)
        assert len(editor.parts) == (1 if max_tokens is None else 3)
        [curves] = figures.curves.values()
        found[max_tokens] = curves.gathered()
    for term, values in found[None].items():
        assert values.shape == (4, 3)
        assert values.isfinite().all()
        torch.testing.assert_close(found[1][term], values, rtol=1e-4, atol=1e-5)
        for i, last in enumerate((1, 2, 3)):
            assert (found[1][term][last:, i] == found[1][term][last, i]).all()
    assert (found[1]["loss"][0] > found[1]["loss"][-1]).all()
    [axis] = loss_curves(figures.curves).axes
    drawn = {line.get_label(): torch.tensor(line.get_ydata()) for line in axis.lines}
    torch.testing.assert_close(drawn["loss (sum)"], found[1]["loss"].mean(dim=1))


def test_the_loss_curves_of_a_resumed_run_say_whose_they_are(tmp_path: Path, gpt2_base: LanguageModel) -> None:
    titles: list[str] = []

    class Logger:
        experiment: Any = SimpleNamespace(
            add_figure=lambda name, figure, *_, **__: titles.append(figure.get_suptitle() if "loss" in name else "")
        )

    for resumed in (0, 6):
        fake: Any = SimpleNamespace(is_global_zero=True, run=SimpleNamespace(path=tmp_path), logger=Logger())
        figures, editor = Figures(), SimpleNamespace(passes=lambda: [3], outcomes=[outcome("v", 0, 4, 3)])
        figures.on_stream_start(fake, None, 10)  # type: ignore[arg-type]
        if resumed:
            figures.on_stream_resumed(fake, None, [{}] * resumed)  # type: ignore[arg-type]
        figures.on_edits_committed(fake, editor, [])  # type: ignore[arg-type]
        figures.on_stream_end(fake, None, {"edits": 4 + resumed})  # type: ignore[arg-type]
    assert [title.partition(":")[0] for title in titles] == [
        "Loss of 4 edits",
        "Loss of 4 edits, since the run was resumed after 6",
    ]


def test_no_figure_is_left_in_pyplot(tmp_path: Path) -> None:
    draw(tmp_path, [[outcome("v", 0, 4, 3)]], REPORT)
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()
