"""Everything a person can get wrong is one clear line, exit status 1 or 2, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from kedit_lightning import delta as delta_files
from kedit_lightning.callbacks.figures import Figures
from kedit_lightning.models import LanguageModel
from kedit_lightning.run import RunDirectory
from tests.commandline import Result, World, done, jsonl, kedit, write
from tests.families import save_tiny
from tests.updates import bits, same_bits


class Bad(World):
    """The world, a run in it, and things that are wrong."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.rome, self.top = self.config("ROME"), self.config("TOP")
        self.run = self.fit(self.rome, name="good")
        self.delta = self.run / "delta.safetensors"
        self.other = save_tiny("gpt2", folder / "other", seed=1)

    def model(self, name: str, **config: Any) -> Path:
        """A model folder of which only the configuration is there: it must be refused before more is read."""
        path = self.folder / name
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(config))
        return path

    def damaged(self, path: Path, name: str) -> Path:
        """A copy of a file: `corrupt`, `truncated`, or `empty`."""
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        damaged = {"corrupt": bytes(content), "truncated": bytes(content[: len(content) // 2]), "empty": b""}[name]
        copy = self.folder / f"{name}-{path.name}"
        copy.write_bytes(damaged)
        return copy


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bad]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEDIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(Figures, "on_stream_end", lambda *_: None)  # half of the time, and tested elsewhere
        yield Bad(tmp_path_factory.mktemp("bad"))


@pytest.fixture(autouse=True)
def _nothing_half_written(bad: Bad) -> Iterator[None]:
    """No test leaves a temporary file anywhere, and none a damaged run directory."""
    yield
    assert not [path for path in bad.folder.rglob("*") if path.name.startswith(".") or path.suffix == ".part"]


def refused(result: Result, status: int, *words: str) -> None:
    assert result.status == status, result
    assert result.err.count("\n") == 1, result.err
    assert result.err.startswith("kedit: "), result.err
    assert result.err.endswith("\n"), result.err
    assert "Traceback" not in result.err + result.out
    assert len(result.err) < 600, result.err
    for word in words:
        assert word in result.err, (word, result.err)


@pytest.mark.parametrize("how", ["yaml", "argument"])
def test_a_setting_that_an_editor_lacks_is_explained(bad: Bad, tmp_path: Path, how: str) -> None:
    tuned = {"model": {"class_path": "FT", "init_args": {"layers": [1]}}, "base": {"name": str(bad.base)}}
    more = ["--model.compress.gamma=80"]
    if how == "yaml":
        more = ["--config", str(write(tmp_path / "more.yaml", {"model": {"init_args": {"compress": {"gamma": 80}}}}))]
    result = kedit("fit", "--config", write(tmp_path / "ft.yaml", tuned), *more)
    refused(result, 2, "kedit: model.init_args.compress: FT optimises no value", "elastic_net")


def test_the_configuration_is_good(bad: Bad) -> None:
    done("validate", "--config", bad.rome)
    done("validate", "--config", bad.top)


# ---------------------------------------------------------------------- the model

MODELS: dict[str, tuple[dict[str, Any] | None, tuple[str, ...]]] = {
    "bloom": ({"model_type": "bloom"}, ("unknown model family 'bloom'", "gpt2, gptj", "base.architecture")),
    "nonsense": ({"model_type": "no-such"}, ("cannot load the configuration", "no-such")),
    "mixtral": ({"model_type": "mixtral"}, ("expected a dense model, got a mixture of experts (mixtral)",)),
    "qwen-moe": ({"model_type": "qwen2_moe"}, ("mixture of experts",)),
    "quantised": (
        {"model_type": "gpt2", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        ("expected float weights, got a quantised model", "quantise after editing"),
    ),
    "weightless": ({"model_type": "gpt2"}, ("cannot load the", "weightless")),
    "./not-there": (None, ("there is no such folder", "not-there")),
    "someone/not-cached": (None, ("someone/not-cached", "no network", "give a Hugging Face name, a model folder")),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_cannot_be_edited(bad: Bad, name: str) -> None:
    config, words = MODELS[name]
    path = name if config is None else bad.model(name, **config)
    refused(kedit("fit", "--config", bad.rome, "--base.name", path), 1, *words)


@pytest.mark.parametrize("how", ["corrupt", "truncated", "empty"])
def test_damaged_weights(bad: Bad, how: str) -> None:
    copy = bad.folder / f"model-{how}"
    shutil.copytree(bad.base, copy, dirs_exist_ok=True)
    file = copy / "model.safetensors"
    if how == "corrupt":
        file.write_bytes(b"\xff" + file.read_bytes()[1:])
    else:
        shutil.copy(bad.damaged(file, how), file)
    refused(kedit("fit", "--config", bad.rome, "--base.name", copy), 1, "cannot load the weights", str(copy))


@pytest.mark.parametrize(
    ("editor", "key", "value", "words"),
    [
        ("rome", "layers", "[4]", "expected a layer between 0 and 3, got 4"),
        ("rome", "layers", "[-1]", "expected a layer between 0 and 3, got -1"),
        ("rome", "layers", "[]", "layers: expected at least one layer"),
        ("top", "layers", "[7]", "expected a layer between 0 and 3, got 7"),
        ("top", "rel_feat_layer", "3", "expected a layer between 0 and 3, got 4"),
        ("top", "rel_feat_layer", "-1", "rel_feat_layer: expected an offset ≥ 0"),
        ("top", "rel_feat_layer", "[1, 2]", "rel_feat_layer: expected an offset ≥ 0, or one for each of the layers"),
        ("rome", "context_templates.templates", "[['Yes. {}']]", "the bare '{}' first"),
    ],
)
def test_editors_that_do_not_fit_the_model(bad: Bad, editor: str, key: str, value: str, words: str) -> None:
    refused(kedit("fit", "--config", getattr(bad, editor), f"--model.init_args.{key}", value), 1, words)


# ---------------------------------------------------------------------- editors of whole batches

MASS: dict[str, dict[str, Any]] = {
    "MEMIT": {"layers": [1], "v_num_grad_steps": 2},
    "PMET": {"layers": [1], "v_num_grad_steps": 2},
    "AlphaEdit": {"layers": [1], "v_num_grad_steps": 2, "nullspace_threshold": 2.0},
    "JEEP": {"layers_low": [0, 1], "layers_high": [2, 3], "v_num_grad_steps": 2},
    "ROME": {"layers": [1], "v_num_grad_steps": 2, "solver": "least_squares"},
}


def mass(bad: Bad, tmp_path: Path, editor: str, **settings: Any) -> Path:
    """A configuration of an editor of whole batches."""
    content = yaml.safe_load(bad.rome.read_text())
    shared = {key: content["model"]["init_args"][key] for key in ("context_templates", "statistics")}
    content["model"] = {"class_path": editor, "init_args": {**shared, **MASS[editor], **settings}}
    content["data"]["batch_size"] = 4
    return write(tmp_path / "mass.yaml", content)


def nothing_committed(bad: Bad, name: str) -> None:
    """No commit, no delta, no metrics; a run directory may have been begun."""
    left = {path.name for path in (bad.logs / name).rglob("*") if path.is_file()}
    results = {file for file in left if file.endswith((".safetensors", ".jsonl")) or file == "metrics.json"}
    assert results <= {"before.jsonl"}, left  # what the unedited model said


@pytest.mark.parametrize("editor", MASS)
def test_the_configurations_of_whole_batches_are_good(bad: Bad, tmp_path: Path, editor: str) -> None:
    done("validate", "--config", mass(bad, tmp_path, editor))


POSITIVE = "expected a positive number, got "


@pytest.mark.parametrize(
    ("editor", "settings", "words"),
    [
        ("MEMIT", {"mom2_update_weight": 0}, f"mom2_update_weight: {POSITIVE}0"),
        ("MEMIT", {"mom2_update_weight": -3.0}, f"mom2_update_weight: {POSITIVE}-3"),
        ("PMET", {"mom2_update_weight": ".nan"}, f"mom2_update_weight: {POSITIVE}nan"),
        ("ROME", {"mom2_update_weight": 0}, f"mom2_update_weight: {POSITIVE}0"),
        ("JEEP", {"mom2_update_weight_low": 0}, f"mom2_update_weight_low: {POSITIVE}0"),
        ("JEEP", {"mom2_update_weight_high": -1}, f"mom2_update_weight_high: {POSITIVE}-1"),
        ("AlphaEdit", {"L2": 0}, f"L2: {POSITIVE}0"),
        ("AlphaEdit", {"L2": -10}, f"L2: {POSITIVE}-10"),
        ("AlphaEdit", {"nullspace_threshold": 0}, f"nullspace_threshold: {POSITIVE}0"),
        ("PMET", {"nll_loss_factor": -1}, "nll_loss_factor: expected at least 0, got -1"),
        ("MEMIT", {"clamp_norm_factor": 0}, f"clamp_norm_factor: {POSITIVE}0"),
        ("JEEP", {"clamp_norm_factor_high": -0.5}, f"clamp_norm_factor_high: {POSITIVE}-0.5"),
        ("JEEP", {"v_weight_decay_high": -0.5}, "v_weight_decay_high: expected at least 0, got -0.5"),
        ("MEMIT", {"v_num_grad_steps": 0}, "v_num_grad_steps: expected at least 1, got 0"),
        ("MEMIT", {"v_lr": 0}, f"v_lr: {POSITIVE}0"),
        ("MEMIT", {"max_tokens": 0}, "max_tokens: expected at least 1, got 0"),
        ("MEMIT", {"layers": [2, 1]}, "layers: expected at least one layer, each once and in ascending order, got [2,"),
        ("AlphaEdit", {"layers": [1, 1]}, "layers: expected at least one layer, each once and in ascending order"),
        ("PMET", {"layers": []}, "layers: expected at least one layer, each once and in ascending order, got []"),
        ("MEMIT", {"layers": [1, 4]}, "expected a layer between 0 and 3, got 4"),
        ("JEEP", {"layers_low": []}, "layers_low: expected at least one layer"),
        ("JEEP", {"layers_high": []}, "layers_high: expected at least one layer"),
        ("JEEP", {"layers_low": [1, 0]}, "layers_low: expected at least one layer, each once and in ascending order"),
        ("JEEP", {"layers_high": [3, 2]}, "layers_high: expected at least one layer, each once and in ascending order"),
        ("JEEP", {"layers_high": [1, 2]}, "layers_high: expected layers above the low ones [0, 1], got [1, 2]"),
        ("JEEP", {"layers_low": [3], "layers_high": [2]}, "layers_high: expected layers above the low ones [3], got"),
        ("JEEP", {"layers_high": [3, 4]}, "expected a layer between 0 and 3, got 4"),
        ("JEEP", {"optimize": "low", "rewrite": "both"}, "expected regions to rewrite that are optimized"),
        ("JEEP", {"optimize": "low", "rewrite": "high"}, "expected regions to rewrite that are optimized"),
        ("JEEP", {"optimize": "high", "joint": False}, "and both without joint; got high"),
    ],
)
def test_settings_of_whole_batches(bad: Bad, tmp_path: Path, editor: str, settings: dict[str, Any], words: str) -> None:
    settings = {key: float("nan") if value == ".nan" else value for key, value in settings.items()}
    refused(kedit("fit", "--config", mass(bad, tmp_path, editor, **settings), "--trainer.name", "refused"), 1, words)
    assert not (bad.logs / "refused").exists()


@pytest.mark.parametrize(
    ("editor", "settings", "words"),
    [
        ("MEMIT", {"spread": "linear"}, ("spread", "'even', 'sqrt'")),
        ("PMET", {"rewrite": "attn"}, ("rewrite", "'mlp', 'both'")),
        ("JEEP", {"optimize": "middle"}, ("optimize", "'both', 'low', 'high'")),
        ("JEEP", {"kl_prompt": "none"}, ("kl_prompt", "'essence', 'edit'")),
        ("ROME", {"solver": "lstsq"}, ("solver", "'constrained', 'least_squares'")),
        ("AlphaEdit", {"l2": 1}, ("unknown key model.init_args.l2 of AlphaEdit",)),
    ],
)
def test_words_of_whole_batches(
    bad: Bad, tmp_path: Path, editor: str, settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused(kedit("fit", "--config", mass(bad, tmp_path, editor, **settings)), 2, *words)


@pytest.mark.parametrize("editor", ["MEMIT", *(pytest.param(e, marks=pytest.mark.slow) for e in MASS if e != "MEMIT")])
def test_more_edits_than_memory_allows(bad: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, editor: str) -> None:
    """Said for how many there is room; with a machine that is too small for a single one, that."""
    k, d = 128, 32
    fixed, each = 8 * 3 * k * k, 8 * (3 * k + 4 * d)
    config = mass(bad, tmp_path, editor)
    need = "4 edits together need about 0.0 GiB for their keys and values and the solve, 0.0 GiB are free: "
    for free, words in (
        (fixed + 3 * each, "set data.batch_size to at most 3"),
        (fixed - 1, "a machine with more memory is needed"),
    ):
        monkeypatch.setattr("kedit_lightning.models.memory.free_memory", lambda _, free=free: free)
        refused(kedit("fit", "--config", config, "--trainer.name", f"small-{editor}"), 1, need, words)
    nothing_committed(bad, f"small-{editor}")


SECOND_MOMENTS: dict[str, tuple[tuple[int, float], str]] = {
    "of the wrong size": ((64, 1.0), "expected the second moment of transformer.h.1.mlp.c_proj of shape (128, 128)"),
    "singular": ((128, 0.0), "singular"),
    "with NaN": ((128, float("nan")), "not finite"),
}


@pytest.mark.parametrize("name", SECOND_MOMENTS)
@pytest.mark.parametrize(
    "editor", [e if e in ("MEMIT", "AlphaEdit") else pytest.param(e, marks=pytest.mark.slow) for e in MASS]
)
def test_second_moments_of_whole_batches(bad: Bad, tmp_path: Path, editor: str, name: str) -> None:
    (width, value), words = SECOND_MOMENTS[name]
    path, layers = tmp_path / "moments.safetensors", range(4)
    good, wrong = torch.eye(128), value * torch.eye(width)
    moments = {f"transformer.h.{layer}.mlp.c_proj": wrong if layer == 1 else good.clone() for layer in layers}
    save_file(moments | {"count": torch.tensor([1000])}, path)
    config = mass(bad, tmp_path, editor, statistics={"source": str(path)})
    args = ("fit", "--config", config, "--trainer.name", f"{name}-{editor}".replace(" ", "-"))
    if editor == "AlphaEdit" and name == "singular":  # that is what it looks for
        done(*args)
        config = mass(bad, tmp_path, editor, statistics={"source": str(path)}, layers=[0], nullspace_threshold=0.5)
        name, words = "full", "expected eigenvalues of its second moment below 0.5, got 1 as the smallest"
        args = ("fit", "--config", config, "--trainer.name", f"{name}-{editor}")
    refused(kedit(*args), 1, words)
    nothing_committed(bad, str(args[-1]))


# ---------------------------------------------------------------------- the edits

GOOD = {"prompt": "{} was born in", "subject": "Tobin", "target_new": "Ulm"}
RECORDS: dict[str, tuple[object, tuple[str, ...]]] = {
    "no slot, no subject": (GOOD | {"prompt": "Lise was born in"}, ("prompt has neither {} nor the subject 'Tobin'",)),
    "two slots": (GOOD | {"prompt": "{} and {} live in"}, ("exactly one {}", "found 2")),
    "empty target": (GOOD | {"target_new": ""}, ("target_new is empty",)),
    "blank target": (GOOD | {"target_new": "  "}, ("target_new is empty",)),
    "no target": ({"prompt": "{} was", "subject": "Tobin"}, ("field `target_new` is missing",)),
    "empty subject": (GOOD | {"subject": ""}, ("subject is empty",)),
    "open end": (GOOD | {"prompt": "{} was born in "}, ("must not end in whitespace",)),
    "wrong type": (GOOD | {"target_new": 5}, ("field `target_new` must be text",)),
    "misspelt": (
        GOOD | {"paraphrase_promts": ["Tobin came from"]},
        ("unknown field `paraphrase_promts`; did you mean `paraphrase_prompts`?",),
    ),
    "no object": ("[1, 2]", ("expected one JSON object",)),
    "broken JSON": ('{"prompt": ', ("expected one JSON object", "column 12")),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_are_named_by_file_line_and_reason(bad: Bad, tmp_path: Path, name: str) -> None:
    record, words = RECORDS[name]
    path = jsonl(tmp_path / "edits.jsonl", [GOOD, record])
    data = ["--data.edits", "null", "--data.dataset", "jsonl", "--data.path", path]
    refused(kedit("fit", "--config", bad.rome, *data), 1, f"{path}, line 2: ", *words)
    assert kedit("validate", "--config", bad.rome, *data, "--data.on_bad_record", "skip").status == 0


@pytest.mark.parametrize("name", ["two slots", "empty target", "no target", "misspelt"])
def test_edits_in_the_configuration_are_named_too(bad: Bad, name: str) -> None:
    record, words = RECORDS[name]
    refused(
        kedit("fit", "--config", bad.rome, "--data.edits", json.dumps([GOOD, record])),
        1,
        "edits, record 2 of 2",
        *words,
    )


FILES: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "missing.jsonl": (None, ("missing.jsonl: no such file",)),
    "empty.jsonl": ("", ("empty.jsonl: the file is empty",)),
    "cut.json": ('[{"prompt": "{} was"', ("cut.json: not valid JSON", "truncated")),
    "none.jsonl": ("\n\n", ("the file is empty",)),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("dataset", ["jsonl", "zsre"])
def test_data_files(bad: Bad, tmp_path: Path, name: str, dataset: str) -> None:
    content, words = FILES[name]
    if content is not None:
        write(tmp_path / name, content)
    data = ["--data.edits", "null", "--data.dataset", dataset, "--data.path", tmp_path / name]
    refused(kedit("fit", "--config", bad.rome, *data), 1, *words)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["dataset=jsonl"], "jsonl needs a path"),
        (["dataset=counterfact_rs"], "github.com/sunshower-liu/RETS"),
        (["dataset=zsre", 'options={"targt": "alt"}'], "no option 'targt'; it takes answer_prefix"),
        (["dataset=zsre", 'options={"target": "all"}'], "unknown target 'all'; expected one of answers, alt"),
        (["dataset=zsre", 'options={"loc_suffix": 3}'], "options.loc_suffix of zsre: expected str, got 3"),
        (["dataset=zsre", 'options={"answer_prefix": null}'], "options.answer_prefix of zsre: expected str, got null"),
        (["dataset=zsre", 'options={"loc_prefix": 3}'], "options.loc_prefix of zsre: expected str | null, got 3"),
        (["dataset=almanac", "size=99999"], "options.skip_subjects: With facts_per_subject=1"),
        (["dataset=almanac", 'options={"facts_per_subject": 0}'], "options.skip_subjects: Expected positive"),
        (["dataset=almanac", 'options={"facts_per_subject": "x"}'], "facts_per_subject of almanac: expected int, got"),
        (["dataset=almanac", 'options={"seed": [1]}'], "options.seed of almanac: expected int, got [1]"),
        (["dataset=counterfact", "path=http://127.0.0.1:9/cf.json"], "cannot download http://127.0.0.1:9/cf.json"),
        (["batch_size=0"], "expected batch_size ≥ 1"),
        (["restore_every=0"], "expected restore_every ≥ 1 or null, got 0"),
        (["start=-1"], "expected start ≥ 0, got -1"),
        (["stop=-3"], "expected stop ≥ 0 or null, got -3"),
        (["edits=EDITS", "size=0"], "size must be at least 1, or null for all edits; got 0"),
        (["batch_size=2", "restore_every=3"], "restore_every to be a multiple of batch_size, got 3 and 2"),
        (["edits=EDITS", "start=4"], "nothing to edit: 4 records, of which 4:None"),
        (["edits=EDITS", "snippets=not-there.json"], "not-there.json: no such file"),
    ],
)
def test_streams(bad: Bad, args: list[str], words: str) -> None:
    given = [] if "edits=EDITS" in args else ["--data.edits", "null"]
    options = [f"--data.{arg}" for arg in args if arg != "edits=EDITS"]
    refused(kedit("fit", "--config", bad.rome, *given, *options), 1, words)


def test_a_prompt_longer_than_the_context(bad: Bad) -> None:
    edit = GOOD | {"prompt": "word " * 200 + "{} was born in", "case_id": 17}
    result = kedit("fit", "--config", bad.rome, "--data.edits", json.dumps([edit]))
    refused(result, 1, "case 17, prompt: the prompt takes", "the model reads 128: shorten 'word word")


@pytest.mark.parametrize("name", ["paraphrase_prompts", "neighborhood_prompts", "relation_specific_prompts"])
def test_an_evaluation_prompt_longer_than_the_context(bad: Bad, name: str) -> None:
    edits = [GOOD, GOOD | {"case_id": 18, "target_true": "Ulm", name: ["word " * 200 + "was born in"]}]
    result = kedit("fit", "--config", bad.rome, "--data.edits", json.dumps(edits))
    refused(result, 1, f"case 18, {name}: the prompt takes", "the model reads 128: shorten 'word word")


def test_a_target_that_the_model_answers_already_is_a_warning(bad: Bad) -> None:
    answer = RunDirectory(bad.run).records()[1]["answer_before"]
    edit = bad.edits[1] | {"target_new": answer[:1]}
    result = done("fit", "--config", bad.rome, "--data.edits", json.dumps([edit]))
    assert "warning: 1 of 1 facts: the base model answers target_new before the edit (case 11" in result.out, result


# ---------------------------------------------------------------------- deltas


@pytest.mark.parametrize("how", ["corrupt", "truncated", "empty", "missing", "another", "a model", "a folder", "older"])
def test_deltas_that_cannot_be_used(bad: Bad, tmp_path: Path, how: str) -> None:
    path, words, model = bad.delta, (), bad.base
    if how in ("corrupt", "truncated", "empty"):
        path, words = bad.damaged(bad.delta, how), ("the delta file is corrupt or truncated", "edit again")
    elif how == "missing":
        path, words = bad.run / "not-there.safetensors", ("no such delta file",)
    elif how == "another":
        model, words = bad.other, ("the delta is of another model", str(bad.base))
    elif how == "a model":
        path, words = bad.base / "model.safetensors", ("expected a delta file", "safetensors file of format")
    elif how == "a folder":
        path, words = tmp_path, ("expected a run directory with deltas/",)
    else:
        path, words = tmp_path / "old.safetensors", ("expected a delta file (format",)
        save_file({"x": torch.zeros(2)}, path, {"format": "kedit-delta-0"})
    for command in ("test", "predict"):
        args = ("--config", bad.rome, "--base.name", model, "--delta", path)
        refused(kedit(command, *args), 1, str(path), *words)
    refused(kedit("apply", path, "--model", model, "--out", tmp_path / "out"), 1, str(path), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["test", "predict"])
def test_no_delta(bad: Bad, command: str) -> None:
    refused(kedit(command, "--config", bad.rome), 1, "expected --delta, a run directory or a delta file")


def test_commands_without_what_they_need(bad: Bad, tmp_path: Path) -> None:
    refused(kedit("apply", bad.run), 2, "out")
    refused(kedit("apply"), 2, "run_or_delta")
    refused(kedit("revert", tmp_path, "--out", tmp_path / "out"), 1, f"{tmp_path}: expected a run directory")
    refused(kedit("revert", bad.run, "--edit", 99, "--out", tmp_path / "out"), 1, "no edit has case id 99")
    refused(kedit("revert", bad.run, "--edit", "x", "--out", tmp_path / "out"), 1, "edit", "x")
    refused(kedit("apply", bad.run, "--out", bad.run), 1, str(bad.run))
    refused(kedit("apply", bad.run, "--out", tmp_path / "out", "--format", "gguf"), 2, "format", "gguf")
    done("show", bad.run, bad.run, "--out", bad.folder / "table.txt")
    refused(kedit("show", bad.run, tmp_path), 1, f"{tmp_path}: expected a run directory")
    refused(kedit("show"), 2, "runs")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- statistics


@pytest.fixture(scope="module")
def moments(bad: Bad) -> dict[str, Path]:
    """Statistics files of all kinds."""
    paths = {kind: bad.folder / kind for kind in ("good.npz", "wide.npz", "nan.npz", "cut.npz", "good.safetensors")}
    module, eye = "transformer.h.1.mlp.c_proj", np.eye(128, dtype=np.float32)
    for kind, moment in (("good", eye), ("wide", np.eye(64, dtype=np.float32)), ("nan", eye * np.nan)):
        np.savez(paths[f"{kind}.npz"], **{"mom2.mom2": moment, "mom2.count": 7})
    paths["cut.npz"].write_bytes(paths["good.npz"].read_bytes()[:5000])
    save_file({module: torch.eye(128)}, paths["good.safetensors"])
    paths["corrupt.safetensors"] = bad.folder / "corrupt.safetensors"
    paths["corrupt.safetensors"].write_bytes(b"\xff" * 3000)
    paths["cut.safetensors"] = bad.folder / "cut.safetensors"
    paths["cut.safetensors"].write_bytes(paths["good.safetensors"].read_bytes()[:5000])
    paths["other.safetensors"] = bad.folder / "other.safetensors"
    save_file({"transformer.h.3.mlp.c_proj": torch.eye(128)}, paths["other.safetensors"])
    paths["latin.txt"] = bad.folder / "latin.txt"
    paths["latin.txt"].write_bytes("Å".encode("latin-1"))
    paths["blank.txt"] = write(bad.folder / "blank.txt", "\n\n")
    return paths


STATISTICS = {
    "wide.npz": ("expected the second moment of transformer.h.1.mlp.c_proj of shape (128, 128), got (64, 64)",),
    "nan.npz": ("not finite",),
    "cut.npz": ("corrupt, truncated or of another kind", "take another copy"),
    "corrupt.safetensors": ("corrupt, truncated or of another kind",),
    "cut.safetensors": ("corrupt, truncated or of another kind",),
    "other.safetensors": ("expected the second moment of transformer.h.1.mlp.c_proj, got those of",),
    "missing.npz": ("no such statistics file",),
    "missing.txt": ("no such file",),
    "latin.txt": ("expected text in UTF-8",),
    "blank.txt": ("expected at least one document",),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_files(bad: Bad, moments: dict[str, Path], name: str) -> None:
    path = moments.get(name, bad.folder / name)
    for command in ("fit", "statistics") if name == "cut.npz" else ("fit",):
        result = kedit(command, "--config", bad.rome, "--model.init_args.statistics.source", path)
        refused(result, 1, str(path), *STATISTICS[name])


def test_no_network_for_the_statistics(bad: Bad) -> None:
    source = "wikimedia/wikipedia:20231101.en"
    result = kedit("fit", "--config", bad.rome, "--model.init_args.statistics.source", source)
    refused(result, 1, f"cannot read the dataset '{source}'", "without a network set `statistics.source`")


def test_a_damaged_cache_is_computed_again(bad: Bad, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = [f"--model.init_args.statistics.{key}" for key in (f"source={bad.corpus}", f"cache_dir={tmp_path}")]
    args.append("--model.init_args.statistics.tokens=200")
    done("statistics", "--config", bad.rome, *args)
    (file,) = tmp_path.iterdir()
    good = {name: tensor.clone() for name, tensor in load_file(file).items()}  # the file is mapped
    file.write_bytes(file.read_bytes()[:1000])
    done("statistics", "--config", bad.rome, *args)
    assert "computed again" in caplog.text
    assert all(torch.equal(tensor, good[name]) for name, tensor in load_file(file).items())


# ---------------------------------------------------------------------- the configuration

MISSPELT = {
    "traner": ("unknown key traner; did you mean trainer?",),
    "trainer.enable_progres_bar": (
        "unknown key trainer.enable_progres_bar",
        "did you mean trainer.enable_progress_bar?",
    ),
    "trainer.evaluation.generatoin": (
        "unknown key trainer.evaluation.generatoin of Evaluation; did you mean generation?",
    ),
    "base.dtpye": ("unknown key base.dtpye", "did you mean base.dtype?"),
    "base.architecture.layer": ("unknown key base.architecture.layer of Architecture; did you mean layers?",),
    "model.init_arg": ("unknown key model.init_arg", "did you mean init_args?"),
    "model.init_args.v_rl": ("unknown key model.init_args.v_rl of ROME; did you mean v_lr?",),
    "model.init_args.context_templates.schem": (
        "unknown key model.init_args.context_templates.schem of ContextTemplates; did you mean scheme?",
    ),
    "model.init_args.statistics.sorce": (
        "unknown key model.init_args.statistics.sorce of Statistics; did you mean source?",
    ),
    "model.init_args.compres.gamma": ("unknown key model.init_args.compres.gamma of ROME; did you mean compress?",),
    "data.batchsize": ("unknown key data.batchsize", "did you mean data.batch_size?"),
}


@pytest.mark.parametrize("how", ["yaml", "command line", "second yaml"])
@pytest.mark.parametrize("key", MISSPELT)
def test_misspelt_keys(bad: Bad, tmp_path: Path, key: str, how: str) -> None:
    content = yaml.safe_load(bad.rome.read_text())
    if how == "command line":
        result = kedit("fit", "--config", bad.rome, f"--{key}", "1")
    elif how == "yaml":
        *path, last = key.split(".")
        inner = content
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = 1
        result = kedit("fit", "--config", write(tmp_path / "c.yaml", content))
    else:
        inner = 1
        for part in reversed(key.split(".")):
            inner = {part: inner}
        result = kedit("fit", "--config", bad.rome, "--config", write(tmp_path / "c.yaml", inner))
    refused(result, 2, *MISSPELT[key])


VALUES = {
    "base.dtype": ("float64", ("base.dtype", "'float32', 'bfloat16', 'float16'", "float64")),
    "model": ("RMOE", ("model", "RMOE", "expected a class (", "ROME, TOP")),
    "model.class_path": ("RMOE", ("model", "RMOE", "expected a class (", "ROME, TOP")),
    "model.init_args.layers": ("five", ("model.init_args.layers", "five")),
    "model.init_args.v_lr": ("fast", ("model.init_args.v_lr", "fast")),
    "model.init_args.preset": ("relased", ("model.init_args.preset", "'paper', 'released'")),
    "model.init_args.statistics.tokens": ("many", ("model.init_args.statistics.tokens", "many")),
    "model.init_args.statistics.mom2_dtype": ("int8", ("model.init_args.statistics.mom2_dtype", "int8")),
    "model.init_args.context_templates.scheme": (
        "rom",
        ("model.init_args.context_templates.scheme", "'rome', 'memit'"),
    ),
    "data.dataset": ("conterfact", ("data.dataset", "'counterfact'", "conterfact")),
    "data.batch_size": ("ten", ("data.batch_size", "ten")),
    "data.on_bad_record": ("ignore", ("data.on_bad_record", "'raise', 'skip'")),
    "trainer.evaluation.generation": ("perhaps", ("trainer.evaluation.generation", "perhaps")),
}


def test_a_null_is_a_value(bad: Bad) -> None:
    null = ("--model.init_args.context_templates.templates", "null")
    assert "templates: null" in done("fit", "--config", bad.rome, *null, "--print_config").out
    refused(
        kedit("fit", "--config", bad.rome, "--model.init_args.context_templates.templates", 3),
        2,
        "model.init_args.context_templates.templates: expected list or null, got 3",
    )


@pytest.mark.parametrize("how", ["yaml", "command line"])
@pytest.mark.parametrize("key", VALUES)
def test_wrong_values(bad: Bad, tmp_path: Path, key: str, how: str) -> None:
    value, words = VALUES[key]
    if how == "command line":
        result = kedit("fit", "--config", bad.rome, f"--{key}", value)
    else:
        content = yaml.safe_load(bad.rome.read_text())
        *path, last = key.split(".")
        inner = content
        for part in path:
            inner = inner[part]
        inner[last] = value
        result = kedit("fit", "--config", write(tmp_path / "c.yaml", content))
    refused(result, 2, *words)


def test_values_that_are_of_the_right_type_but_make_no_sense(bad: Bad) -> None:
    for key, value, words in (
        ("model.init_args.statistics.tokens", "0", ("statistics.tokens: expected at least 1, got 0",)),
        ("model.init_args.statistics.ridge", "-1", ("statistics.ridge",)),
        ("trainer.evaluation.generation_length", "-5", ("evaluation.generation_length: expected at least 1, got -5",)),
        ("trainer.evaluation.max_tokens", "0", ("evaluation.max_tokens: expected at least 1, got 0",)),
        (
            "model.init_args.context_templates.context_template_length_params",
            "[[5, 10], [0, 3]]",
            ("context_template_length_params: expected pairs", "number ≥ 1, got [0, 3]"),
        ),
        ("trainer.save_dir", "/dev/null/x", ("/dev/null/x", "cannot be written (Not a directory)")),
        ("trainer.accelerator", "gpuu", ("trainer: ", "gpuu")),
        ("trainer.accelerator", "tpu", ("trainer: ",)),
        ("trainer.devices", "1.5", ("trainer: `devices`",)),
    ):
        result = kedit("fit", "--config", bad.rome, f"--{key}", value)
        refused(result, 1, *words)


def test_configuration_files(bad: Bad, tmp_path: Path) -> None:
    for name, content, words in (
        ("not-there.yaml", None, "no configuration file can be read there (No such file or directory)"),
        (".", None, "no configuration file can be read there (Is a directory)"),
        ("broken.yaml", "base: {name: [}\n", ", line 1, column 15: not valid YAML"),
        ("tab.yaml", "base:\n\tname: x\n", ", line 2, column 1: not valid YAML"),
        ("text.yaml", "just words\n", "expected the blocks base, model, data and trainer, got just words"),
        ("empty.yaml", "", "expected the blocks base, model, data and trainer, got None"),
    ):
        path = tmp_path / name
        if content is not None:
            write(path, content)
        refused(kedit("fit", "--config", path), 2, str(path), words)
        refused(kedit("fit", "--config", bad.rome, "-c", path), 2, str(path), words)
    refused(kedit("fit", "--config"), 2, "config: expected one argument")
    refused(kedit("fit"), 2, "missing: model; give --config FILE")


def test_commands_and_options(bad: Bad) -> None:
    refused(
        kedit("edit"),
        2,
        "unknown command 'edit'",
        "fit, plan, validate, test, predict, scale, tune-gamma, suggest, probe, statistics, apply, revert, log, show",
    )
    refused(kedit("fit", "--confg", bad.rome), 2, "confg")
    refused(kedit("apply", bad.run, "--outt", "x"), 2, "outt")
    for short, full in (
        ("data.sto", "data.stop"),
        ("trainer.nam", "trainer.name"),
        ("seed_everythin", "seed_everything"),
        ("model.init_args.v_num_grad_step", "v_num_grad_steps"),
    ):
        result = kedit("fit", "--config", bad.rome, f"--{short}", 1)
        refused(result, 2, f"unknown key {short}", f"did you mean {full}?")
    refused(kedit("apply", bad.run, "--ou", "x"), 2, "unknown key ou; did you mean out?")
    refused(kedit("pretrain", "--trainer.max_step", 1), 2, "unknown key trainer.max_step")
    refused(kedit("fit", "--config", bad.rome, "stray"), 2, "stray")


# ---------------------------------------------------------------------- a full disk

FULL = {
    "000001.safetensors": "deltas/000001.safetensors: cannot be written (No space left on device)",
    "edits.jsonl": "edits.jsonl: cannot be written (No space left on device)",
    "edits.journal": "edits.journal: cannot be written (No space left on device)",
    "delta.safetensors": "delta.safetensors: cannot be written (No space left on device)",
    "metrics.json": "metrics.json: cannot be written (No space left on device)",
    "config.yaml": "config.yaml: cannot be written (No space left on device)",
    "contexts.json": "contexts.json: cannot be written (No space left on device)",
}


@pytest.mark.parametrize("name", FULL)
def test_disk_full(bad: Bad, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    bases: list[LanguageModel] = []
    fsync, wrap = os.fsync, LanguageModel._wrap

    def full(descriptor: int) -> None:
        if name in Path(f"/proc/self/fd/{descriptor}").readlink().name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    def keep(self: LanguageModel, *args: Any) -> None:
        wrap(self, *args)
        bases.append(self)

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(LanguageModel, "_wrap", keep)
    result = kedit("fit", "--config", bad.rome, "--trainer.name", f"full-{name}")
    refused(result, 1, FULL[name])
    monkeypatch.undo()
    run = RunDirectory(bad.logs / f"full-{name}" / "version_0")
    expected = LanguageModel(str(bad.base))
    commits = run.standing() if (run.path / "deltas").exists() and any((run.path / "deltas").iterdir()) else []
    for _, deltas, _ in commits:
        for delta in deltas:
            expected.write(delta.name, delta.update)
    assert same_bits(bits(bases[0]), bits(expected))
    assert [record["commit"] for record in run.records()] == list(range(len(commits)))
    assert len(commits) == {"000001.safetensors": 1, "edits.jsonl": 0, "contexts.json": 0, "config.yaml": 0}.get(
        name, 4
    )
    for file in run.path.glob("*.safetensors"):
        delta_files.load(file)


def test_disk_full_when_a_model_is_written(bad: Bad, tmp_path: Path) -> None:
    from tests.updates import disk_full

    with disk_full(20_000):
        result = kedit("apply", bad.run, "--out", tmp_path / "out")
    refused(result, 1, str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())
