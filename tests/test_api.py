import copy
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kedit_lightning import commands, edit
from kedit_lightning import delta as delta_files
from kedit_lightning.data.prompts import ContextTemplates
from kedit_lightning.delta import WeightDelta
from kedit_lightning.editors import ROME, Stage
from kedit_lightning.edits import Edit
from kedit_lightning.errors import KeditError
from kedit_lightning.metrics import Evaluation
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.statistics import Statistics
from tests.families import EDITS, corpus, save_tiny, tiny_model, tokenizer

FACTS = [
    {"prompt": "The mother tongue of {} is", "subject": "Oskel Tamrin", "target_new": "High Kestrian"},
    {"prompt": "{} plays the", "subject": "Mirabel Foss", "target_new": "flute", "target_true": "violin"},
]
FEW_STEPS: dict[str, Any] = {
    "layers": [1],
    "v_num_grad_steps": 3,
    "mom2_adjustment": False,
    "context_templates": ContextTemplates(templates=[["{}", "Yes. {}"]]),
}


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("gpt2")


@pytest.fixture
def words() -> PreTrainedTokenizerBase:
    return tokenizer("byte_bpe")


def bits(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(model: PreTrainedModel, before: dict[str, Tensor]) -> list[str]:
    return [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]


# ---------------------------------------------------------------------- what it does


def test_ten_lines_edit_a_model_in_place(
    model: PreTrainedModel, words: PreTrainedTokenizerBase, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = bits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = edit(model, words, FACTS, evaluate=Evaluation(generation=False), **FEW_STEPS)
    name = "transformer.h.1.mlp.c_proj.weight"
    assert changed(model, before) == [name]
    assert [delta.name for delta in result.delta] == [name, name]
    assert [record["subject"] for record in result.records] == ["Oskel Tamrin", "Mirabel Foss"]
    assert [record["case_id"] for record in result.records] == result.metadata["case_ids"] == [0, 1]
    for record in result.records:
        assert {"answer_before", "answer_after", "stages"} <= record.keys()
        assert record["after"]["p_new"] > record["before"]["p_new"]
    assert {"pre", "post", "protocol"} <= result.report.keys()
    assert capfd.readouterr() == ("", ""), "silent unless asked for progress"

    after = bits(model)
    result.save(tmp_path / "delta.safetensors")
    deltas, metadata = delta_files.load(tmp_path / "delta.safetensors")
    fresh = LanguageModel.wrap(tiny_model("gpt2"), words)
    delta_files.check(fresh, deltas, metadata, tmp_path)
    for delta in deltas:
        fresh.write(delta.name, delta.update)
    assert changed(fresh.model, after) == [], "the saved delta gives the same bits"


def test_top_by_name_and_rome_by_class(model: PreTrainedModel, words: PreTrainedTokenizerBase) -> None:
    settings = {key: value for key, value in FEW_STEPS.items() if key != "v_num_grad_steps"}
    settings |= {"v_num_grad_steps1": 2, "v_num_grad_steps2": 2}
    top = edit(model, words, FACTS[:1], editor="TOP", evaluate=False, rel_feat_layer=1, **settings)
    assert [stage["stage"] for stage in top.records[0]["stages"]] == ["h_r", "v"]
    assert "post" not in top.report
    rome = edit(model, words, FACTS[1:], editor=ROME, evaluate=False, **FEW_STEPS)
    assert (top.metadata["editor"], rome.metadata["editor"]) == ("TOP", "ROME")


def test_edits_objects_and_batches(model: PreTrainedModel, words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    result = edit(model, words, EDITS[:3], batch_size=3, evaluate=False, save_dir=tmp_path, **FEW_STEPS)
    assert result.metadata["case_ids"] == [one.case_id for one in EDITS[:3]]
    assert {record["commit"] for record in result.records} == {0}
    run = next((tmp_path / "edits").iterdir())
    names = {path.name for path in run.iterdir()}
    assert {"deltas", "delta.safetensors", "edits.jsonl", "metrics.json", "contexts.json"} <= names
    twice = [Edit("{} plays the", "Velora Quint", "flute"), Edit("{} lives in", "Velora Quint", "Ulm")]
    assert edit(model, words, twice, evaluate=False, **FEW_STEPS).metadata["case_ids"] == [0, 1]


def test_a_run_of_it_can_be_applied_and_reverted(words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    base = LanguageModel(str(save_tiny("gpt2", tmp_path / "base")))
    before = bits(base.model)
    edit(base.model, words, FACTS, evaluate=False, save_dir=tmp_path / "runs", **FEW_STEPS)
    after = bits(base.model)
    run = next((tmp_path / "runs" / "edits").iterdir())
    commands.apply(run, out=tmp_path / "edited")
    commands.revert(run, out=tmp_path / "pristine")
    assert changed(LanguageModel(str(tmp_path / "edited")).model, after) == []
    assert changed(LanguageModel(str(tmp_path / "pristine")).model, before) == []


@pytest.mark.parametrize("training", [True, False])
def test_the_callers_modes_come_back(model: PreTrainedModel, words: PreTrainedTokenizerBase, training: bool) -> None:
    model.train(training)
    model.transformer.h[0].eval()
    trained = {name: i % 2 == 0 for i, (name, _) in enumerate(model.named_parameters())}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])
    handler = signal.getsignal(signal.SIGINT)
    with torch.no_grad():
        edit(model, words, FACTS[:1], evaluate=False, **FEW_STEPS)
        assert not torch.is_grad_enabled()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained
    assert model.training == model.lm_head.training == training
    assert not model.transformer.h[0].training
    assert signal.getsignal(signal.SIGINT) is handler


def test_half_precision(model: PreTrainedModel, words: PreTrainedTokenizerBase) -> None:
    model.to(torch.bfloat16)
    before = bits(model)
    edit(model, words, FACTS, evaluate=False, **FEW_STEPS)
    assert changed(model, before) == ["transformer.h.1.mlp.c_proj.weight"]
    assert model.dtype == torch.bfloat16


def test_progress_is_shown_when_asked_for(
    model: PreTrainedModel, words: PreTrainedTokenizerBase, capfd: pytest.CaptureFixture[str]
) -> None:
    edit(model, words, FACTS[:1], evaluate=False, show_progress=True, **FEW_STEPS)
    out = capfd.readouterr().out
    assert "Oskel Tamrin" in out
    assert "kedit-" not in out, "no pointer into a temporary folder"


# ---------------------------------------------------------------------- all or nothing


class FailsLate(ROME):
    """Fails in the second edit, after its update was yielded and added to the weights."""

    failure: BaseException = RuntimeError("out of luck")
    writes = 0

    def write(self) -> Iterator[WeightDelta]:
        yield from super().write()
        type(self).writes += 1
        if self.batch.edits[0].subject == "Mirabel Foss":
            raise self.failure


class Interrupted(ROME):
    """Gets a real SIGINT in the middle of the second edit's optimisation."""

    def stages(self) -> Iterator[Stage]:
        yield from super().stages()
        if self.batch.edits[0].subject == "Mirabel Foss":
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("failure", [RuntimeError("out of luck"), KeyboardInterrupt(), SystemExit(3)])
def test_a_failure_gives_every_bit_back(
    model: PreTrainedModel, words: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    monkeypatch.setattr(FailsLate, "failure", failure)
    monkeypatch.setattr(FailsLate, "writes", 0)
    model.train()
    before, copied = bits(model), copy.deepcopy(model)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(type(failure)):
        edit(model, words, FACTS, editor=FailsLate, evaluate=False, **FEW_STEPS)
    assert FailsLate.writes == 2, "the first edit was committed, the second was in the weights"
    assert changed(model, before) == []
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert signal.getsignal(signal.SIGINT) is handler
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    edit(model, words, FACTS, evaluate=False, **FEW_STEPS)
    edit(copied, words, FACTS, evaluate=False, **FEW_STEPS)
    assert changed(model, bits(copied)) == [], "and it can be edited as if nothing had happened"


def test_an_interrupt_is_an_interrupt(model: PreTrainedModel, words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    before = bits(model)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        edit(model, words, FACTS, editor=Interrupted, evaluate=False, save_dir=tmp_path, **FEW_STEPS)
    assert changed(model, before) == []
    assert signal.getsignal(signal.SIGINT) is handler, "Lightning leaves it ignored"
    run = next((tmp_path / "edits").iterdir())
    assert [path.name for path in (run / "deltas").iterdir()] == ["000000.safetensors"], "what was committed stays"


# ---------------------------------------------------------------------- what cannot be used


@pytest.mark.parametrize(
    ("words_of_error", "changes"),
    [
        (
            "unknown editor 'ROMA'; there are FT, JEEP, MALMEN, MEMIT, MEND, PMET, RETS, ROME, TOP, AlphaEdit",
            {"editor": "ROMA"},
        ),
        ("unknown editor 'Editor'", {"editor": "Editor"}),
        ("ROME has no setting 'v_Ir'; did you mean v_lr", {"v_Ir": 0.1}),
        ("ROME has no setting 'zzz'; it has layers, v_num_grad_steps", {"zzz": 0.1}),
        ("TOP needs rel_feat_layer", {"editor": "TOP", "v_num_grad_steps": None}),
        ("ROME needs layers", {"layers": None}),
        ("expected a layer between 0 and 3, got 9", {"layers": [9]}),
        ("statistics.*mom2_adjustment: false", {"mom2_adjustment": True}),
        ("at least one edit", {"edits": []}),
        ("subject", {"edits": [{"prompt": "The mother tongue of Ann is", "subject": "Bob", "target_new": "Dutch"}]}),
        ("target_new", {"edits": [{"prompt": "{} is", "subject": "Bob"}]}),
        ("exactly one", {"edits": [{"prompt": "{} and {} are", "subject": "Bob", "target_new": "one"}]}),
        ("batch_size", {"batch_size": 0}),
    ],
)
def test_what_cannot_be_used_is_one_clear_line(
    model: PreTrainedModel, words: PreTrainedTokenizerBase, words_of_error: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    before = bits(model)
    model.train()
    settings = {"edits": FACTS, "evaluate": False, "save_dir": tmp_path} | FEW_STEPS | changes
    settings = {key: value for key, value in settings.items() if value is not None}
    with pytest.raises(KeditError, match=words_of_error) as error:
        edit(model, words, **settings)
    assert "\n" not in str(error.value)
    assert changed(model, before) == []
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert list(tmp_path.iterdir()) == []


def test_statistics_are_used_when_given(model: PreTrainedModel, words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(corpus()), encoding="utf-8")
    with_identity = copy.deepcopy(model)
    edit(with_identity, words, FACTS, evaluate=False, **FEW_STEPS)
    statistics = Statistics(source=str(tmp_path / "text.txt"), cache_dir=str(tmp_path / "cache"))
    edit(model, words, FACTS, evaluate=False, **FEW_STEPS | {"mom2_adjustment": True, "statistics": statistics})
    assert changed(model, bits(with_identity)) == ["transformer.h.1.mlp.c_proj.weight"]
