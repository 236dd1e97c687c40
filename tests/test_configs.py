"""Every shipped YAML runs by the command in its first line, on a tiny stand-in, and holds the published numbers."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from kedit_lightning.callbacks.figures import Figures
from kedit_lightning.run import RunDirectory
from tests.commandline import World, done, flat, jsonl, write
from tests.families import build, default_tokenizer, tokenizer

ROOT = Path(__file__).parent.parent
ALL = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
RUNS = [name for name in ALL if not name.endswith("pretrain.yaml")]
ALONE = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*.yaml"))

# ---------------------------------------------------------------------- numbers, typed from spec/editors.md, section 3

COMMON: dict[str, Any] = {
    "v_lr": 0.5,
    "v_weight_decay": 0.5,
    "clamp_norm_factor": 4,
    "kl_factor": 0.0625,
    "mom2_adjustment": True,
    "context_templates": {"scheme": "rome", "context_template_length_params": [[5, 10], [10, 10]]},
    "statistics": {
        "source": "wikimedia/wikipedia:20231101.en",
        "n_samples": 100_000,
        "tokens": "full",
        "mom2_dtype": "float32",
    },
}
LENGTHS = {  # documents are cut at the model's own limit, on Qwen2 at 4,096 (spec/editors.md 1.5)
    "gpt2-xl": 1024,
    "gptj": 2048,
    "llama-7b": 2048,
    "llama2-13b": 4096,
    "llama3-8b": 8192,
    "qwen2.5-7b": 4096,
    "qwen2.5-14b": 4096,
}


def common(name: str) -> dict[str, Any]:
    return COMMON | {"statistics": {**COMMON["statistics"], "max_length": LENGTHS[name]}}


GPT2_XL, GPTJ, LLAMA_7B = "openai-community/gpt2-xl", "EleutherAI/gpt-j-6B", "huggyllama/llama-7b"
QWEN_7B, QWEN_14B = "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-14B"
ROME = {  # model, layer, steps, β
    "gpt2-xl": (GPT2_XL, 17, 20, 0.5),
    "gptj": (GPTJ, 5, 20, 0.5),
    "llama-7b": (LLAMA_7B, 7, 20, 0.5),
    "llama2-13b": ("meta-llama/Llama-2-13b-hf", 5, 25, 1e-3),  # not published, proposed as LLaMA-2-7B
    "llama3-8b": ("meta-llama/Meta-Llama-3-8B", 5, 25, 1e-3),
    "qwen2.5-7b": (QWEN_7B, 5, 25, 1e-3),
    "qwen2.5-14b": (QWEN_14B, 17, 25, 0.5),  # not published, proposed
}
TOP = {  # model, layers, l_a of each, steps of each stage, vector factor; 14B: the paper's one l_a
    "gpt2-xl": (GPT2_XL, [17, 18], [18, 19], 25, 0.1),
    "gptj": (GPTJ, [5], [10], 20, 0.06),
    "qwen2.5-7b": (QWEN_7B, [5], [10], 20, 0.1),
    "qwen2.5-14b": (QWEN_14B, [17, 18], [27, 27], 20, 0.1),
}
RELEASED = {  # what the authors' code does otherwise
    "rome": {"preset": "released"},
    "rome_llama3-8b": {"mom2_adjustment": False},
    "rome_qwen2.5-7b": {"mom2_adjustment": False},
    "top": {"preset": "released"},
    "top_qwen2.5-7b": {"preset": "released", "mom2_adjustment": False},
    "top_qwen2.5-14b": {"preset": "released", "rel_feat_layer": [10, 10], "mom2_adjustment": False},
}
PROPOSED = {f"configs/{name}.yaml" for name in ("rome_llama2-13b", "rome_qwen2.5-14b", "rome_almanac", "top_almanac")}
DATA = {"dataset": "counterfact", "size": 2000, "batch_size": 1, "restore_every": 1}


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return content


def text(name: str) -> str:
    return (ROOT / name).read_text()


def test_there_is_a_configuration_for_every_row() -> None:
    expected = {f"configs/rome_{name}.yaml" for name in ROME} | {f"configs/top_{name}.yaml" for name in TOP}
    assert {name for name in ALONE if not name.endswith("_almanac.yaml")} == expected
    assert {Path(name).stem for name in ALL if "/data/" in name} == {
        "counterfact",
        "counterfact_rs",
        "zsre",
        "mcf",
        "jsonl",
    }
    assert {Path(name).stem for name in ALL if "/released/" in name} == set(RELEASED)


@pytest.mark.parametrize("name", ROME)
def test_rome(name: str) -> None:
    model, layer, steps, decay = ROME[name]
    config = load(f"configs/rome_{name}.yaml")
    assert config["base"]["name"] == model
    assert config["model"]["class_path"] == "ROME"
    assert config["model"]["init_args"] == common(name) | {
        "layers": [layer],
        "v_num_grad_steps": steps,
        "v_weight_decay": decay,
    }
    assert config["data"] == DATA


@pytest.mark.parametrize("name", TOP)
def test_top(name: str) -> None:
    model, layers, l_a, steps, factor = TOP[name]
    config = load(f"configs/top_{name}.yaml")
    assert config["base"]["name"] == model
    assert config["model"]["class_path"] == "TOP"
    settings = config["model"]["init_args"]
    offsets = settings.pop("rel_feat_layer")
    offsets = offsets if isinstance(offsets, list) else [offsets] * len(layers)
    assert [layer + offset for layer, offset in zip(layers, offsets, strict=True)] == l_a
    assert settings == common(name) | {
        "layers": layers,
        "v_num_grad_steps1": steps,
        "v_num_grad_steps2": steps,
        "vec_loss_factor": factor,
        "stop1": 0.02,
        "stop2": 0.05,
    }
    assert config["data"] == DATA


@pytest.mark.parametrize("name", RELEASED)
def test_released(name: str) -> None:
    editor = name.partition("_")[0].upper()
    assert load(f"configs/released/{name}.yaml") == {"model": {"class_path": editor, "init_args": RELEASED[name]}}


# ---------------------------------------------------------------------- their form


@pytest.mark.parametrize("name", ALL)
def test_the_first_line_is_the_command(name: str) -> None:
    command = text(name).splitlines()[0]
    kedit, method, *args = shlex.split(command.removeprefix("# "))
    assert (kedit, method) == ("kedit", "pretrain" if name.endswith("pretrain.yaml") else "fit")
    assert args[::2] == ["--config"] * (len(args) // 2)
    assert args[-1] == name
    assert all((ROOT / path).is_file() for path in args[1::2])
    assert len(args) == (4 if "/data/" in name or "/released/" in name else 2)


@pytest.mark.parametrize("name", ALL)
def test_nothing_that_holds_on_one_machine_only(name: str) -> None:
    for what, pattern in (
        ("device index", r"cuda|mps|devices: *\[|device: *\d"),
        ("module path", r"\b(transformer|model|gpt_neox)\.(h|layers)\b|\bmlp\.|self_attn|kedit_lightning\.[a-z]"),
        ("absolute path", r"(?m)(^|[\s\"':\[])(/|~/|[A-Z]:\\)\w"),
    ):
        content = "\n".join(line.split("#")[0] for line in text(name).splitlines())
        assert not re.search(pattern, content), what


def test_every_configuration_names_the_source_of_its_numbers() -> None:
    for name in ALONE:
        header = "".join(line for line in text(name).splitlines() if line.startswith("#"))
        assert re.search(r"Numbers: \S", header), name


def test_what_is_not_published_says_so() -> None:
    """A key whose number is our own proposal carries `source: proposed`."""
    assert {name for name in ALL if "source: proposed" in text(name)} == PROPOSED & set(ALL)
    for name in ("rome_llama2-13b", "rome_qwen2.5-14b"):
        settings = load(f"configs/{name}.yaml")["model"]["init_args"]
        marked = set(re.findall(r"(\w+):.*# source: proposed", text(f"configs/{name}.yaml")))
        assert marked == set(settings) - {"context_templates", "statistics"}


# ---------------------------------------------------------------------- they run


class Deep(World):
    """The world with a model as deep as the deepest (48 layers) and a data set of every form."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.deep = folder / "deep"
        build("gpt2", n_layer=48, n_embd=8, n_head=2, n_positions=64).save_pretrained(self.deep)
        tokenizer(default_tokenizer("gpt2")).save_pretrained(self.deep)
        self.few = folder / "few.txt"
        self.few.write_text("\n".join(self.corpus.read_text().splitlines()[:30]))
        zsre = {
            "subject": "Velora Quint",
            "src": "Where was Velora Quint born?",
            "rephrase": "In which town was Velora Quint born?",
            "answers": ["Tessaro"],
            "alt": "Ulm",
            "loc": "nq question: who rings the bells",
            "loc_ans": "Tobin",
        }
        nested = write(folder / "nested.json", json.dumps([self.nested(i) for i in (0, 1)]))
        self.path = {
            "counterfact": nested,
            "multi_counterfact": nested,
            "counterfact_rs": nested,
            "zsre": write(folder / "zsre.json", json.dumps([zsre])),
            "jsonl": jsonl(folder / "edits.jsonl", [flat(1)]),
        }

    @staticmethod
    def nested(i: int) -> dict[str, Any]:
        from tests.families import EDITS

        return EDITS[i].as_record()


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deep]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEDIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(Figures, "on_stream_end", lambda *_: None)  # half of the time, and tested elsewhere
        yield Deep(tmp_path_factory.mktemp("configs"))


@pytest.mark.parametrize("name", RUNS)
def test_every_configuration_runs(deep: Deep, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(ROOT)
    _, method, *args = shlex.split(text(name).splitlines()[0].removeprefix("# "))
    content: dict[str, Any] = {}
    for path in args[1::2]:
        content |= load(path)
    settings = load(args[1])["model"]["init_args"]
    dataset = content["data"]["dataset"]
    if dataset == "almanac":
        dataset, content["data"] = "jsonl", {}
    overrides = {
        "base.name": deep.deep,
        "data.dataset": dataset,
        "data.path": deep.path[dataset],
        "data.stop": 1,
        "trainer.save_dir": deep.logs,
        "trainer.name": name.replace("/", "-"),
        "trainer.enable_progress_bar": "false",
        "trainer.evaluation.generation": "false",
        "model.init_args.statistics.source": deep.few,
        "model.init_args.context_templates.context_template_length_params": "[[5, 1]]",
    } | {f"model.init_args.{key}": 2 for key in settings if key.startswith("v_num_grad_steps")}
    done(method, *args, *(f"--{key}={value}" for key, value in overrides.items()))
    run = RunDirectory(deep.logs / name.replace("/", "-") / "version_0")
    (record,) = run.records()
    assert [stage["layer"] for stage in record["stages"]] == [
        layer for layer in settings["layers"] for _ in range(2 if "rel_feat_layer" in settings else 1)
    ]
    saved = yaml.safe_load((run.path / "config.yaml").read_text())["model"]["init_args"]
    expected = settings | (content["model"]["init_args"] if "/released/" in name else {})
    given = {key.removeprefix("model.init_args.") for key in overrides}
    for key in set(expected) - given - {"statistics", "context_templates"}:
        assert saved[key] == expected[key], key


def test_the_pretraining_configuration_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from kedit_lightning.cli import main

    name = "configs/almanac/pretrain.yaml"
    monkeypatch.chdir(ROOT)
    read: list[Any] = []

    class Read(Exception):
        pass

    parse = LightningArgumentParser.parse_args

    def keep(self: LightningArgumentParser, *args: Any, **kwargs: Any) -> None:
        read.append(parse(self, *args, **kwargs))
        raise Read

    monkeypatch.setattr(LightningArgumentParser, "parse_args", keep)
    with pytest.raises(Read):
        main(["pretrain", "--config", name])
    found = read[0].get("fit", read[0])
    assert found["model"]["width"] == load(name)["model"]["width"]
    assert found["export"]["every"] == load(name)["export"]["every"]
