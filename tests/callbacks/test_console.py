"""The terminal: lines, warnings, table, and `kedit show`; driven by a fake trainer."""

from __future__ import annotations

import io
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rich.console
import torch

from kedit_lightning.callbacks import rows
from kedit_lightning.callbacks.console import Console
from kedit_lightning.callbacks.logs import SAID, quiet
from kedit_lightning.errors import KeditError
from kedit_lightning.models.progress import DISPLAY
from kedit_lightning.report import cell, table
from kedit_lightning.show import show

PROTOCOL = {"dtype": "float32", "base": "almanac", "dataset": "almanac", "batch_size": 1, "restore_every": 1}
LOSS = SimpleNamespace(curves=[{"nll": torch.tensor([1.25])}])
EDITOR: Any = SimpleNamespace(outcomes=[LOSS], edits=[None], pass_=0, passes=lambda: [3], optimised=0)


def summary(mean: float, ci95: float = 0.02) -> dict[str, float]:
    return {"mean": mean, "std": 0.1, "ci95": ci95, "n": 20}


def report(**changes: Any) -> dict[str, Any]:
    pre = {"efficacy": summary(0.005), "efficacy_accuracy": summary(0.0), "score3": {"mean": 0.1, "n": 20}}
    post = {"efficacy": summary(1.0, 0.0), "efficacy_accuracy": summary(1.0), "score3": {"mean": 0.9, "n": 20}}
    pre["fluency"], post["fluency"] = summary(6.225), summary(6.11)
    return {"editor": "TOP", "edits": 20, "protocol": PROTOCOL, "pre": pre, "post": post} | changes


def record(case: int, before: str = "French ,", after: str = "English .", efficacy: float = 1.0) -> dict[str, Any]:
    return {
        "case_id": case,
        "prompt": "The mother tongue of {} is",
        "subject": "Orla [bold]Venn",
        "target_new": "English",
        "target_true": "French",
        "answer_before": before,
        "answer_after": after,
        "seconds": 0.5,
        "after": {"efficacy": efficacy},
    }


def stream(
    records: list[dict[str, Any]], *, width: int = 100, terminal: bool = False, group: int = 1, **trainer: Any
) -> str:
    """What a stream of these edits writes."""
    file = io.StringIO()
    console = Console(rich.console.Console(file=file, width=width, force_terminal=terminal, highlight=False))
    path = Path("lightning_logs/top/version_0")
    fake: Any = SimpleNamespace(is_global_zero=True, show_progress=True, run=SimpleNamespace(path=path))
    fake.__dict__.update(trainer)
    console.on_stream_start(fake, EDITOR, len(records))
    console.on_evaluation_start(fake, "before", len(records))
    console.on_evaluation_progress(fake, len(records))
    console.on_evaluation_end(fake)
    for start in range(0, len(records), group):
        part = records[start : start + group]
        for each in part:
            console.on_train_batch_end(fake, EDITOR, None, None, 0)
            console.on_train_end(fake, EDITOR)
            console.on_edits_committed(fake, EDITOR, [each])
        console.on_evaluation_start(fake, "after", len(part))
        console.on_evaluation_progress(fake, len(part))
        console.on_evaluation_end(fake)
        console.on_edits_evaluated(fake, EDITOR, part)
    protocol = PROTOCOL | {"restore_every": group}
    console.on_stream_end(fake, EDITOR, report(edits=len(records), protocol=protocol))
    return file.getvalue()


def test_few_edits_have_a_line_each() -> None:
    text = stream([record(0), record(1, after="French and", efficacy=0.0), record(2, after="Danish and")])
    assert "✓ The mother tongue of Orla [bold]Venn is: “French ,” → “English .”, wanted “English”\n" in text
    assert "✗ The mother tongue of Orla [bold]Venn is: “French ,” → “French and”, wanted “English”\n" in text
    assert "→ “Danish and”, wanted “English” (likelier now than “French”)\n" in text
    assert "warning" not in text


def test_a_prompt_that_ends_in_a_colon_has_no_other() -> None:
    text = stream([record(0) | {"prompt": "Q: Which language does {} speak? A:"}])
    assert "speak? A: “French ,” → “English .”" in text


@pytest.mark.parametrize(
    ("stage", "why"),
    [
        (
            {"steps": 20, "converged": False, "nll": 3.14},
            "; its values were not found (stage v: nll 3.1 after 20 steps)",
        ),
        (
            {"steps": 9, "converged": True, "nll": 0.03, "delta/mlp": 0.6, "residual/mlp": 0.54},
            "; its values were found and hardly written (about 90% of the change is missing)",
        ),
        ({"steps": 9, "converged": True, "nll": 0.03, "delta/mlp": 0.6, "residual/mlp": 0.02}, ""),
    ],
)
def test_an_edit_that_failed_says_where(stage: dict[str, Any], why: str) -> None:
    stages = {"stages": [{"stage": "v", "layer": 3, **stage}]}
    text = stream([record(0, after="French and", efficacy=0.0) | stages, record(1) | stages])
    failed, worked = (line for line in text.splitlines() if line[:1] in "✗✓" and line)
    assert failed.endswith(f"wanted “English”{why}")
    assert worked.endswith("wanted “English”")


def test_many_edits_have_none() -> None:
    text = stream([record(i) for i in range(40)], group=10)
    assert "✓" not in text
    assert "20 of 40 edits, 0.5 s an edit\n" in text


def mass_edit(*, terminal: bool, passes: int = 1, **trainer: Any) -> str:
    """What is written while a batch of 40 edits is made in four parts and two layers, without control characters."""
    file = io.StringIO()
    console = Console(rich.console.Console(file=file, width=100, force_terminal=terminal, highlight=False))
    console.rows.live = terminal
    fake: Any = SimpleNamespace(is_global_zero=True, show_progress=True)
    fake.__dict__.update(trainer)
    editor: Any = SimpleNamespace(**vars(EDITOR) | {"edits": [None] * 40})
    editor.passes, editor.names = lambda: list(range(passes)), lambda: ["h.0", "h.1"]
    console.on_stream_start(fake, editor, 40)
    for editor.pass_ in range(passes):
        for editor.optimised in (0, 10, 20, 30, 40):
            nll = torch.full((40,), torch.nan)  # of those that have not been evaluated
            nll[: editor.optimised + 10] = 0.5
            editor.outcomes = [SimpleNamespace(curves=[{"nll": nll}])]
            console.on_train_batch_end(fake, editor, None, None, 0)
            if console.rows._progress:
                console.rows._progress.refresh()
        console.on_train_end(fake, editor)
        for layer in range(editor.pass_, 2, passes):
            console.on_update_written(fake, editor, SimpleNamespace(name=f"h.{layer}"))  # type: ignore[arg-type]
            if console.rows._progress:
                console.rows._progress.refresh()
    console.on_edits_committed(fake, editor, [record(i) for i in range(40)])
    console.close()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n")


@pytest.mark.parametrize("passes", [1, 2])
def test_a_mass_edit_moves_with_its_parts(passes: int) -> None:
    text = mass_edit(terminal=True, passes=passes)
    shown = [int(done) for done in re.findall(r"editing .* (\d+)/40 ", text)]
    assert shown == sorted(shown)
    assert set(shown) == set(range(0, 41, 10 // passes))
    assert re.search(r"editing .* 20/40 .*loss 0\.50", text)
    assert re.search(r"writing weights .* 1/2 ", text)
    assert re.search(r"✓ writing weights .* 2/2 ", text)


def test_a_long_mass_edit_says_something_in_a_file_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "editing:" not in mass_edit(terminal=False)
    monkeypatch.setattr(rows, "MINUTE", 0.0)
    text = mass_edit(terminal=False)
    assert re.search(r"^editing: 30 of 40 · \d:\d\d:\d\d left · loss 0\.50$", text, re.MULTILINE)
    assert "writing weights: 1 of 2\n" in text
    assert "editing:" not in mass_edit(terminal=False, show_progress=False)


def test_a_row_that_begins_again_has_a_new_clock() -> None:
    console = rich.console.Console(file=io.StringIO())
    clock = iter(range(1000))
    console.get_time = lambda: float(next(clock))  # type: ignore[method-assign]
    made = rows.Rows(console)
    for done in range(4):
        made.show("writing weights", done, 3)
    assert made._progress is not None
    [task] = made._progress.tasks
    assert task.finished
    before = task.elapsed or 0.0
    made.show("writing weights", 0, 3)
    assert not task.finished
    assert (task.elapsed or 0.0) < before


def test_without_progress_nothing_shows_the_steps_of_statistics(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(rich.console.Console(file=io.StringIO(), force_terminal=True))
    before = [(logging.getLogger(name), logging.getLogger(name).level) for name in SAID]
    quiet()
    for shown in (True, False):
        console.on_stream_start(SimpleNamespace(is_global_zero=True, show_progress=shown), EDITOR, 1)  # type: ignore[arg-type]
        display = DISPLAY.get()
        assert display is not None, "else a terminal has a bar of its own"
        display("second moments, tokens", 1, 2, "")
        logging.getLogger(SAID[0]).info("256 tokens")  # bars redirect standard error
        console.close()
        written = console.out.file.getvalue() + capsys.readouterr().err  # type: ignore[attr-defined]
        assert ("second moments" in written) == ("256 tokens" in written) == shown
        console.out.file = io.StringIO()
    assert DISPLAY.get() is None
    for logger, level in before:
        logger.setLevel(level)
        logger.handlers.clear()


def test_ends_with_table_and_places() -> None:
    text = stream([record(i) for i in range(3)], group=2)
    assert re.search(r"Efficacy: the edited prompt +0\.5 ± +2\.0 +100\.0 ± +0\.0 +\+99\.5", text)
    assert re.search(r"Fluency: n-gram entropy +622\.5 .* 611\.0 .* -11\.5", text)
    assert "tokens answered" not in text  # an accuracy beside its comparison
    assert "kedit apply lightning_logs/top/version_0 --model almanac --out edited-model" in text
    assert "tensorboard --logdir lightning_logs/top/version_0" in text
    assert "delta.safetensors (the last 1 of 3 edits: restore_every is 2)" in text
    assert "2 edits a second" in text


def test_base_model_that_knows_otherwise_is_warned_about() -> None:
    text = stream([record(0), record(1, before="foo bar"), record(2, before="Danish"), record(3, before="English and")])
    assert "2 of 4 facts: the base model does not answer target_true (case 1: “foo bar” instead of “French”)" in text
    assert "1 of 4 facts: the base model answers target_new before the edit (case 3: “English”)" in text


@pytest.mark.parametrize("before", ["French", "Fre", "French and so"])
def test_right_or_cut_off_answers_are_not(before: str) -> None:
    assert "warning" not in stream([record(0, before=before)])


def test_unknown_true_target_is_no_reason_to_warn() -> None:
    assert "warning" not in stream([record(0) | {"target_true": None}])


def test_files_get_no_control_characters() -> None:
    text = stream([record(0, after="a\x1b[31mb\nc\r\x07")])
    assert "“a�[31mb c �”" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)


@pytest.mark.parametrize("width", [20, 40, 75, 76, 80, 200])
@pytest.mark.parametrize("group", [1, 2])
def test_terminals_of_any_width(width: int, group: int) -> None:
    text = stream([record(i) for i in range(4)], width=width, terminal=True, group=group)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "editing" in text
    if width >= 40:
        assert ("measuring after" in text) == (group > 1)  # an edit measured alone has no bar of its own
    ruled = [line for line in text.splitlines() if "──" in line]
    assert max(map(len, ruled)) <= width


def test_without_progress_the_result_remains() -> None:
    text = stream([record(0, before="foo")], terminal=True, show_progress=False)
    assert "→" not in text
    assert "editing" not in text
    assert "warning" in text
    assert "100.0" in text


def test_only_the_first_process_writes() -> None:
    assert stream([record(0)], terminal=True, is_global_zero=False) == ""


def test_bars_are_taken_away_when_something_breaks() -> None:
    file = io.StringIO()
    console = Console(rich.console.Console(file=file, force_terminal=True))
    fake: Any = SimpleNamespace(is_global_zero=True)
    console.on_stream_start(fake, EDITOR, 3)
    console.on_exception(fake, EDITOR, KeyboardInterrupt())
    assert file.getvalue().rfind("\x1b[?25h") > file.getvalue().rfind("\x1b[?25l") >= 0


def test_predictions_show_the_difference() -> None:
    console = Console(rich.console.Console(file=io.StringIO(), record=True, width=20, force_terminal=True))
    texts = {"prompt": "She speaks", "before": " French at home", "after": " Frisian at home"}
    console.on_predictions(SimpleNamespace(is_global_zero=True), [texts])  # type: ignore[arg-type]
    text = console.out.export_text(styles=True)
    assert "\x1b[31mFrench at home" in text
    assert "\x1b[32mFrisian at home" in text


def test_quiet() -> None:
    quiet()
    assert logging.getLogger("lightning.pytorch").getEffectiveLevel() == logging.ERROR


# ---------------------------------------------------------------------- kedit show


def test_cell() -> None:
    assert cell({"mean": 1.0, "ci95": 0.0, "n": 1}).strip() == "100.0"  # one edit has no interval
    assert cell({"mean": float("nan")}) == "–"


def test_zsre_shows_accuracies() -> None:
    only = {"efficacy_accuracy": summary(0.3)}
    console = rich.console.Console(record=True, width=100, file=io.StringIO())
    console.print(table([("ROME", report(pre=only, post=only))]))
    assert "Efficacy: tokens answered" in console.export_text()


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(report(**changes)), encoding="utf-8")
    return folder


def shown(*runs: Path, out: Path | None = None) -> str:
    console = rich.console.Console(file=io.StringIO(), record=True, width=120)
    show(list(runs), out=out, console=console)
    return console.export_text()


def test_show_puts_runs_beside_one_raw_column(tmp_path: Path) -> None:
    rome, top = write(tmp_path / "a", editor="ROME"), write(tmp_path / "b")
    text = shown(rome, top, out=tmp_path / "table.txt")
    assert re.search(r"raw +ROME +TOP", text)
    assert "differ" not in text
    assert re.search(r"raw +ROME +TOP", (tmp_path / "table.txt").read_text(encoding="utf-8"))


def test_the_table_names_the_protocol(tmp_path: Path) -> None:
    named = PROTOCOL | {"name": "one batch of 20", "scores": {"ES": "efficacy"}}
    text = shown(write(tmp_path / "a", protocol=named))
    assert "TOP, 20 edits: one batch of 20" in text
    assert "ES efficacy" not in text, "those names stand in the table of a scaling run only"
    other = named | {"name": "20 edits otherwise", "batch_size": 20}
    text = shown(tmp_path / "a", write(tmp_path / "b", protocol=other, editor="ROME"))
    assert "batch_size (1, 20)." in text
    assert re.search(r"raw +TOP +ROME", text)


def test_show_names_runs_of_one_editor_apart(tmp_path: Path) -> None:
    text = shown(write(tmp_path / "x" / "version_0"), write(tmp_path / "x" / "version_1"))
    assert re.search(r"raw +TOP version_0 +TOP version_1", text)


def configured(run: Path, **settings: Any) -> Path:
    editor = {"class_path": "kedit_lightning.editors.TOP", "init_args": {"layers": [3], "v_lr": 0.5, **settings}}
    (run / "config.yaml").write_text(json.dumps({"model": editor}), encoding="utf-8")
    return run


def test_show_lists_the_settings_that_differ(tmp_path: Path) -> None:
    runs = [
        configured(write(tmp_path / "x" / "version_0"), statistics={"source": "almanac", "tokens": None}),
        configured(write(tmp_path / "x" / "version_1"), v_lr=0.1, statistics={"source": "almanac", "tokens": 900}),
    ]
    text = shown(*runs)
    assert "Settings that differ" in text
    assert re.search(r"v_lr +0\.5 +0\.1", text)
    assert re.search(r"statistics\.tokens +none +900", text)
    assert "layers" not in text
    assert "statistics.source" not in text
    assert "Settings" not in shown(runs[0], runs[0])
    (runs[0] / "config.yaml").unlink()
    assert "Settings" not in shown(*runs), "it is not known"


@pytest.mark.parametrize(("width", "intervals"), [(80, False), (120, True)])
def test_two_runs_stand_side_by_side_on_a_narrow_terminal(tmp_path: Path, width: int, intervals: bool) -> None:
    runs = write(tmp_path / "a", editor="ROME"), write(tmp_path / "b", protocol=PROTOCOL | {"dtype": "bfloat16"})
    console = rich.console.Console(file=io.StringIO(), record=True, width=width)
    show(list(runs), console=console)
    text = console.export_text()
    assert text.count("Efficacy: the edited prompt") == 1
    assert re.search(r"ROME raw +ROME +TOP raw +TOP", text)
    assert ("±" in text) == intervals


def test_show_says_where_protocols_differ(tmp_path: Path) -> None:
    runs = write(tmp_path / "a", editor="ROME"), write(tmp_path / "b", protocol=PROTOCOL | {"dtype": "bfloat16"})
    text = shown(*runs)
    assert "The protocols differ" in text
    assert "dtype (float32, bfloat16)" in text
    assert re.search(r"ROME raw +ROME +TOP raw +TOP", text)


def test_show_keeps_one_raw_column_over_streams(tmp_path: Path) -> None:
    runs = write(tmp_path / "a", editor="ROME"), write(tmp_path / "b", protocol=PROTOCOL | {"restore_every": None})
    text = shown(*runs)
    assert "restore_every (1, none)" in text
    assert re.search(r"raw +ROME +TOP", text)


def test_show_refuses_one_raw_column_for_different_edits(tmp_path: Path) -> None:
    text = shown(write(tmp_path / "a", editor="ROME"), write(tmp_path / "b", edits=30))
    assert "The runs are of different edits" in text
    assert "ROME raw" in text


def test_show_of_a_measured_base_model(tmp_path: Path) -> None:
    run = write(tmp_path / "a")
    kept = report()
    del kept["post"]
    (run / "metrics.json").write_text(json.dumps(kept), encoding="utf-8")
    text = shown(run)
    assert "before" in text
    assert "change" not in text


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"editor": "TOP", "edits": 1, "protocol": {}}'])
def test_show_of_something_else_is_one_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.json").write_text(content, encoding="utf-8")
    with pytest.raises(KeditError, match=r"^[^\n]*expected [^\n]*$"):
        shown(tmp_path)


def test_show_of_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(KeditError, match="there is no such directory"):
        shown(tmp_path / "none")
