import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kedit_lightning import delta as delta_files
from kedit_lightning.callbacks import EditCallback
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.edits import Edit
from kedit_lightning.errors import DeltaError, KeditError
from kedit_lightning.metrics import Evaluation
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.fingerprint import fingerprint
from kedit_lightning.trainer import EditTrainer
from tests.editors.fitting import STEPS, bits, fit, make, same, stream, trainer
from tests.families import EDITS, tiny_base

THREE = EDITS[:3]


def measuring(folder: Path, *callbacks: EditCallback) -> EditTrainer:
    """A trainer that measures without writing texts, and neither shows nor draws."""
    evaluation = Evaluation(generation=False)
    made = EditTrainer(save_dir=str(folder), evaluation=evaluation, accelerator="cpu", enable_progress_bar=False)
    scoring = [callback for callback in made.callbacks if type(callback).__name__ == "Scoring"]
    made.callbacks = [made.weight_update, *scoring, *callbacks]
    return made


def data(edits: list[Edit], **settings: Any) -> EditDataModule:
    return EditDataModule(edits=[edit.as_record() for edit in edits], **settings)


@pytest.fixture
def edited(tmp_path: Path, gpt2_base: LanguageModel) -> tuple[EditTrainer, LanguageModel]:
    """Three single edits, the first two together, measured before and after."""
    made = measuring(tmp_path)
    made.fit(make("ROME", gpt2_base), datamodule=data(THREE, batch_size=1, restore_every=2))
    return made, gpt2_base


# ---------------------------------------------------------------------- one stream, many fits


def test_one_event_file_with_continuous_steps(tmp_path: Path) -> None:
    made = fit(make("TOP", tiny_base("gpt2"), (1, 2)), THREE, tmp_path)
    assert len(list(tmp_path.rglob("events.out.tfevents*"))) == 1
    events = EventAccumulator(str(made.run.path), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    assert "hp_metric" not in tags
    assert {"h_r/loss", "h_r/nll", "h_r/kl", "h_r/target_probability", "v/loss", "v/distance", "v/weight_decay"} <= {
        *tags
    }
    by_stage = {stage: [event.step for event in events.Scalars(f"{stage}/loss")] for stage in ("h_r", "v")}
    assert {len(steps) for steps in by_stage.values()} == {STEPS * 2 * 3}, "every fit runs all its steps"
    assert sorted(by_stage["h_r"] + by_stage["v"]) == list(range(2 * STEPS * 2 * 3))
    for stage in ("h_r", "v"):
        one = zip(*(events.Scalars(f"{stage}/{term}") for term in events_of(tags, stage)), strict=True)
        assert all(sum(e.value for e in terms[1:]) == pytest.approx(terms[0].value, rel=1e-4) for terms in one)
    assert any(tag.startswith("norm/update/") for tag in tags)


def events_of(tags: list[str], stage: str) -> list[str]:
    terms = sorted(tag.partition("/")[2] for tag in tags if tag.startswith(f"{stage}/"))
    return ["loss", *(term for term in terms if term not in ("loss", "target_probability"))]


def test_every_fit_runs_all_its_steps(tmp_path: Path) -> None:
    editor, counts = make("ROME", tiny_base("gpt2")), []

    class Count(EditCallback):
        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            counts.append((len(editor.outcomes[0].curves), trainer.global_step))

    made = trainer(tmp_path, Count())
    stream(made, editor, EDITS[:5])
    assert [evaluations for evaluations, _ in counts] == [STEPS] * 5
    assert [step for _, step in counts] == [(STEPS - 1) * (i + 1) for i in range(5)]


@pytest.mark.parametrize(("batch_size", "restore_every"), [(1, 1), (1, 2), (2, 2), (3, None), (1, None)])
def test_the_weights_are_the_pristine_ones_plus_the_commits_since_the_last_restoration(
    batch_size: int, restore_every: int | None, tmp_path: Path
) -> None:
    base = tiny_base("gpt2")
    before = bits(base)
    run = fit(make("ROME", base), THREE, tmp_path, batch_size=batch_size, restore_every=restore_every).run
    after = bits(base)
    group = 3 if restore_every is None else restore_every
    assert [line["group"] for line in run.records()] == [i // group for i in range(3)]
    assert [line["commit"] for line in run.records()] == [i // batch_size for i in range(3)]
    assert [line["case_id"] for line in run.records()] == [edit.case_id for edit in THREE]
    base.restore()
    assert same(base, before)
    for _, deltas, _ in run.standing():
        for delta in deltas:
            base.write(delta.name, delta.update)
    assert same(base, after)
    merged, metadata = delta_files.load(run.path / "delta.safetensors")
    assert metadata["case_ids"] == [edit.case_id for edit in THREE][(3 - 1) // group * group :]
    assert metadata["fingerprint"]["value"] == fingerprint(tiny_base("gpt2"), metadata["fingerprint"]["names"])
    base.restore()
    for delta in merged:
        base.write(delta.name, delta.update)
    name = merged[0].name
    torch.testing.assert_close(base.model.state_dict()[name], after[name])


def test_a_stream_begins_with_the_unedited_model(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    first = fit(make("ROME", base), THREE[:1], tmp_path)
    after = bits(base)
    second = fit(make("ROME", base), THREE[:1], tmp_path)
    assert same(base, after)
    assert first.run.path != second.run.path


def test_the_run_directory_holds_what_happened(tmp_path: Path, gpt2_base: LanguageModel) -> None:
    editor = make("ROME", gpt2_base)
    run = fit(editor, THREE[:2], tmp_path, batch_size=2).run
    assert json.loads((run.path / "contexts.json").read_text()) == {"templates": editor.templates}
    assert json.loads((run.path / "metrics.json").read_text())["edits"] == 2
    for i, (line, edit) in enumerate(zip(run.records(), THREE, strict=False)):
        assert (line["prompt"], line["subject"], line["target_new"]) == (edit.prompt, edit.subject, edit.target_new)
        assert line["stages"] == [{"stage": "v", "layer": 1, **editor.outcomes[0].final(i)}]
        assert {"answer_before", "answer_after", "before", "after", "seconds"} <= line.keys()


def test_callbacks_hear_of_the_stream_in_order(tmp_path: Path) -> None:
    heard: list[str] = []

    class Hear(EditCallback):
        def __getattribute__(self, name: str) -> Any:
            if name in ("on_stream_start", "on_edits_committed", "on_edits_evaluated", "on_stream_end"):
                return lambda *_: heard.append(name)
            return super().__getattribute__(name)

    fit(make("ROME", tiny_base("gpt2")), THREE, tmp_path, Hear(), restore_every=2)
    committed, evaluated = "on_edits_committed", "on_edits_evaluated"
    assert heard == ["on_stream_start", committed, committed, evaluated, committed, evaluated, "on_stream_end"]


def test_prepare_runs_once_and_before_any_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("gpt2")
    before, editor, prepared = bits(base), make("ROME", base), []
    prepare = editor.prepare
    monkeypatch.setattr(editor, "prepare", lambda: (prepared.append(same(base, before)), prepare()))
    fit(editor, THREE, tmp_path)
    assert prepared == [True]


# ---------------------------------------------------------------------- measuring


def test_fit_measures_before_and_after(edited: tuple[EditTrainer, LanguageModel]) -> None:
    made, _ = edited
    report, lines = made.report, made.run.records()
    assert json.loads((made.run.path / "metrics.json").read_text()) == json.loads(json.dumps(report))
    assert report["protocol"]["restore_every"] == 2
    assert set(report["pre"]) == set(report["post"])
    assert all(line["before"] and line["after"] for line in lines)
    efficacy = [line["before"]["efficacy"] for line in lines]
    assert report["pre"]["efficacy"]["mean"] == pytest.approx(sum(efficacy) / 3)


def test_validate_measures_the_unedited_model_and_test_an_edited_one(
    edited: tuple[EditTrainer, LanguageModel], tmp_path: Path
) -> None:
    made, base = edited
    after = bits(base)
    editor = make("ROME", base)
    pre = measuring(tmp_path).validate(editor, datamodule=data(THREE))
    assert same(base, bits(tiny_base("gpt2"))), "validate measures the pristine model, edited or not"
    assert {name: one.get("mean") for name, one in pre["pre"].items()} == pytest.approx(
        {name: one.get("mean") for name, one in made.report["pre"].items()}, nan_ok=True, abs=1e-6
    )
    assert pre["protocol"]["name"] == "unedited"
    post = measuring(tmp_path).test(editor, datamodule=data(THREE[2:]), delta=str(made.run.path))
    assert post["protocol"]["name"] == f"as edited by {made.run.path}"
    assert same(base, after), "the run ends with the third edit"
    wanted = made.run.records()[2]["after"]
    got = {name: one["mean"] for name, one in post["post"].items() if name in wanted and one["n"]}
    assert got == pytest.approx({name: wanted[name] for name in got}, rel=1e-4, nan_ok=True)
    assert got


def test_predict_shows_texts_before_and_after(edited: tuple[EditTrainer, LanguageModel], tmp_path: Path) -> None:
    made, base = edited
    editor, prompts = make("ROME", base), ["Mirabel Foss plays", "A letter from the new employer of Mirabel Foss"]
    edited_weights = bits(base)
    predicting = measuring(tmp_path)
    records = predicting.predict(
        editor, datamodule=data(THREE), delta=str(made.run.path), prompts=prompts, max_new_tokens=5
    )
    assert [record["prompt"] for record in records] == prompts
    assert records[1]["before"] != records[1]["after"]
    assert same(base, edited_weights), "the model was edited before, and is not edited twice"
    lines = (predicting.run.path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == records


def test_predict_takes_the_edit_prompts_by_default(edited: tuple[EditTrainer, LanguageModel], tmp_path: Path) -> None:
    made, base = edited
    records = measuring(tmp_path).predict(
        make("ROME", base), datamodule=data(THREE), delta=str(made.run.path), max_new_tokens=1
    )
    assert [record["prompt"] for record in records] == [edit.text for edit in THREE]


# ---------------------------------------------------------------------- what a run says of itself


def test_a_commit_holds_the_editors_settings(edited: tuple[EditTrainer, LanguageModel]) -> None:
    made, _ = edited
    for metadata in made.run.metadata():
        config = metadata["config"]
        assert (config["layers"], config["v_num_grad_steps"]) == ([1], STEPS)
        assert config["statistics"]["source"] == "almanac" if config["mom2_adjustment"] else True
        assert "base" not in config


def test_the_protocol_names_the_edits(edited: tuple[EditTrainer, LanguageModel]) -> None:
    protocol = edited[0].report["protocol"]
    assert protocol["dataset"] == "edits"
    assert (protocol["batch_size"], protocol["restore_every"], protocol["start"]) == (1, 2, 0)
    assert protocol["name"] == "one by one, restored every 2"
    assert protocol["scores"] == {
        "ES": "efficacy",
        "GS": "generalization",
        "LS": "s_specificity",
        "Score": "score3",
    }
    own = EditDataModule(dataset="zsre", path="x.json", options={"target": "alt"}, stop=3).protocol
    assert (own["dataset"], own["path"], own["options"], own["stop"]) == ("zsre", "x.json", {"target": "alt"}, 3)


@pytest.mark.parametrize(("restore_every", "asked"), [(1, 2), (None, 0)])
def test_what_the_model_holds_together_does_not_count_as_unrelated(
    restore_every: int | None, asked: int, tmp_path: Path
) -> None:
    """Two facts of one subject: after both are written, the other's relation is no longer to stay as it was."""
    prompts = {"P1": "{} speaks", "P2": "{} lives in"}
    pair = [
        replace(
            EDITS[0],
            case_id=i,
            prompt=prompt,
            relation_id=relation,
            relation_specific_prompts=tuple(p.format(EDITS[0].subject) for r, p in prompts.items() if r != relation),
            relation_specific_relations=tuple(r for r in prompts if r != relation),
        )
        for i, (relation, prompt) in enumerate(prompts.items())
    ]
    made = measuring(tmp_path)
    made.fit(make("ROME", tiny_base("gpt2")), datamodule=data(pair, batch_size=1, restore_every=restore_every))
    for when in ("pre", "post"):
        assert made.report[when].get("r_specificity", {"n": 0})["n"] == asked


# ---------------------------------------------------------------------- errors


def test_a_data_module_is_asked_for(tmp_path: Path, gpt2_base: LanguageModel) -> None:
    for command in ("fit", "validate", "predict"):
        with pytest.raises(KeditError, match=r"expected (datamodule=EditDataModule|--delta)"):
            getattr(measuring(tmp_path), command)(make("ROME", gpt2_base))


@pytest.mark.parametrize("command", ["predict", "scale", "tune_gamma"])
def test_several_processes_are_refused(tmp_path: Path, gpt2_base: LanguageModel, command: str) -> None:
    made = EditTrainer(save_dir=str(tmp_path), accelerator="cpu", devices=2)
    with pytest.raises(
        KeditError, match=rf"^{command.replace('_', '-')}: expected one process, got 2: set trainer\.devices"
    ):
        getattr(made, command)(make("ROME", gpt2_base), datamodule=data(THREE))
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_run_that_could_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor, made = make("ROME", tiny_base("gpt2")), measuring(tmp_path)

    def failing() -> None:
        assert (made.run.path / "deltas").is_dir(), "the directory is taken while statistics are collected"
        msg = "no statistics"
        raise KeditError(msg)

    monkeypatch.setattr(editor, "prepare", failing)
    with pytest.raises(KeditError, match="no statistics"):
        made.fit(editor, datamodule=data(THREE))
    assert not made.run.path.exists()


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    first, second = measuring(tmp_path), measuring(tmp_path)
    assert first.run.path == second.run.path
    with first.run.opened(), pytest.raises(KeditError, match="holds a run already"):
        second.fit(make("ROME", tiny_base("gpt2")), datamodule=data(THREE))
    assert (first.run.path / "deltas").is_dir()


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("ROME", {"v_num_grad_steps": 0}, "v_num_grad_steps: expected at least 1, got 0"),
        ("ROME", {"v_lr": -1.0}, "v_lr: expected a positive number, got -1.0"),
        ("ROME", {"v_lr": float("nan")}, "v_lr: expected a positive number, got nan"),
        ("ROME", {"clamp_norm_factor": 0.0}, "clamp_norm_factor: expected a positive number, got 0.0"),
        ("ROME", {"kl_factor": -0.5}, "kl_factor: expected at least 0, got -0.5"),
        ("TOP", {"v_num_grad_steps2": -3}, "v_num_grad_steps2: expected at least 1, got -3"),
        ("TOP", {"v_weight_decay": -1.0}, "v_weight_decay: expected at least 0, got -1.0"),
    ],
)
def test_settings_out_of_range(name: str, settings: dict[str, Any], expected: str, gpt2_base: LanguageModel) -> None:
    with pytest.raises(KeditError, match=expected):
        make(name, gpt2_base, **settings)


def test_a_layer_is_edited_once(gpt2_base: LanguageModel) -> None:
    with pytest.raises(KeditError, match=r"each once and in ascending order, got \[1, 1\]"):
        make("ROME", gpt2_base, (1, 1))


@pytest.mark.parametrize("command", ["test", "predict"])
def test_a_delta_is_asked_for(command: str, tmp_path: Path, gpt2_base: LanguageModel) -> None:
    with pytest.raises(DeltaError, match="expected --delta"):
        getattr(measuring(tmp_path), command)(make("ROME", gpt2_base), datamodule=data(THREE))


@pytest.mark.parametrize("command", ["test", "predict"])
def test_a_delta_of_another_model_is_refused(
    command: str, edited: tuple[EditTrainer, LanguageModel], tmp_path: Path
) -> None:
    made, _ = edited
    other = tiny_base("gpt2", seed=1)
    before = bits(other)
    with pytest.raises(DeltaError, match="is of another model"):
        getattr(measuring(tmp_path), command)(make("ROME", other), datamodule=data(THREE), delta=str(made.run.path))
    assert same(other, before)


def test_a_stream_that_fails_leaves_no_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = make("ROME", tiny_base("gpt2"))
    begin: Callable[..., None] = editor.begin

    def failing(edits: list[Edit], pass_: int) -> None:
        if edits[0] is editor_edits()[2]:
            msg = "boom"
            raise KeditError(msg)
        begin(edits, pass_)

    made = trainer(tmp_path)
    module = data(THREE)
    module.setup("fit")
    monkeypatch.setattr(editor, "begin", failing)

    def editor_edits() -> list[Edit]:
        return module.edits

    with pytest.raises(KeditError, match="boom"):
        made.fit(editor, datamodule=module)
    assert [line["case_id"] for line in made.run.records()] == [edit.case_id for edit in THREE[:2]]
    assert len(made.run.commits()) == 2
    assert not (made.run.path / "metrics.json").exists()
    assert not (made.run.path / "delta.safetensors").exists()


def test_numbers_of_commits_follow_each_other(edited: tuple[EditTrainer, LanguageModel]) -> None:
    numbers = [number for number, _, _ in edited[0].run.commits()]
    assert all(b == a + 1 for a, b in pairwise(numbers))
