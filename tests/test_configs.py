"""Every shipped YAML runs by the command in its first line, on a tiny stand-in, and holds the published numbers."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from safetensors import safe_open

from kedit_lightning import editors
from kedit_lightning.callbacks.figures import Figures
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.models import LanguageModel
from kedit_lightning.run import RunDirectory
from tests.commandline import World, done, flat, jsonl, write
from tests.editors.fitting import hypernetwork
from tests.families import build, default_tokenizer, tokenizer

ROOT = Path(__file__).parent.parent
ALL = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
RUNS = [name for name in ALL if not re.search("pretrain.yaml|/(experiments|tasks|hypernetworks)/", name)]
NUMBERS = re.compile("_(gpt2-xl|gpt-neox-20b|llama-7b|llama2-13b|llama3-8b|qwen2.5-7b|qwen2.5-14b)")
"""Where a configuration says so it is GPT-J's with other numbers, which are checked here; its run takes its time."""
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
    "llama2-7b": 4096,
    "llama2-13b": 4096,
    "llama3-8b": 8192,
    "qwen2.5-7b": 4096,
    "qwen2.5-14b": 4096,
    "gpt-neox-20b": 2048,
}


def common(name: str) -> dict[str, Any]:
    return COMMON | {"statistics": {**COMMON["statistics"], "max_length": LENGTHS[name]}}


GPT2_XL, GPTJ, LLAMA_7B = "openai-community/gpt2-xl", "EleutherAI/gpt-j-6B", "huggyllama/llama-7b"
LLAMA2_7B, LLAMA2_13B = "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf"
LLAMA3_8B, NEOX = "meta-llama/Meta-Llama-3-8B", "EleutherAI/gpt-neox-20b"
QWEN_7B, QWEN_14B = "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-14B"
ROME = {  # model, layer, steps, β
    "gpt2-xl": (GPT2_XL, 17, 20, 0.5),
    "gptj": (GPTJ, 5, 20, 0.5),
    "llama-7b": (LLAMA_7B, 7, 20, 0.5),
    "llama2-13b": (LLAMA2_13B, 5, 25, 1e-3),  # not published, proposed as LLaMA-2-7B
    "llama3-8b": (LLAMA3_8B, 5, 25, 1e-3),
    "qwen2.5-7b": (QWEN_7B, 5, 25, 1e-3),
    "qwen2.5-14b": (QWEN_14B, 17, 25, 0.5),  # not published, proposed
}
TOP = {  # model, layers, l_a of each, steps of each stage, vector factor; 14B: the paper's one l_a
    "gpt2-xl": (GPT2_XL, [17, 18], [18, 19], 25, 0.1),
    "gptj": (GPTJ, [5], [10], 20, 0.06),
    "qwen2.5-7b": (QWEN_7B, [5], [10], 20, 0.1),
    "qwen2.5-14b": (QWEN_14B, [17, 18], [27, 27], 20, 0.1),
}
RETS = {  # model, layer, steps, whether C is part of the second moment
    "gpt2-xl": (GPT2_XL, 35, 25, True),
    "gptj": (GPTJ, 17, 20, True),
    "llama2-7b": (LLAMA2_7B, 22, 20, False),
    "qwen2.5-14b": (QWEN_14B, 35, 25, True),  # not published, proposed
}
# The editors of batches: several layers, all of them named.
TO_8, TO_10, TO_17 = [3, 4, 5, 6, 7, 8], [5, 6, 7, 8, 9, 10], [13, 14, 15, 16, 17]
FROM_4, FROM_6 = [4, 5, 6, 7, 8], [6, 7, 8, 9, 10]
MEMIT = {  # model, layers, steps, learning rate, β, γ, λ
    "gpt2-xl": (GPT2_XL, TO_17, 20, 0.5, 0.5, 0.75, 20_000),
    "gptj": (GPTJ, TO_8, 25, 0.5, 0.5, 0.75, 15_000),
    "llama-7b": (LLAMA_7B, TO_10, 25, 0.5, 0.5, 0.9, 4_000),  # the paper's steps, not the file's
    "llama2-7b": (LLAMA2_7B, FROM_4, 25, 0.5, 1e-3, 4, 15_000),
    "llama2-13b": (LLAMA2_13B, FROM_4, 25, 0.5, 1e-3, 4, 15_000),  # not published, proposed as LLaMA-2-7B
    "llama3-8b": (LLAMA3_8B, FROM_4, 25, 0.1, 0.5, 0.75, 15_000),
    "qwen2.5-7b": (QWEN_7B, FROM_4, 25, 0.5, 1e-3, 4, 15_000),
    "qwen2.5-14b": (QWEN_14B, TO_17, 25, 0.5, 1e-3, 4, 15_000),  # not published, proposed
    "gpt-neox-20b": (NEOX, FROM_6, 20, 0.5, 0.5, 0.8, 6_000),
}
PMET = {  # model, layers, steps, learning rate, κ, γ, λ
    "gptj": (GPTJ, TO_8, 30, 0.2, 1, 0.75, 6_000),
    "llama-7b": (LLAMA_7B, TO_10, 30, 0.5, 1, 0.9, 4_000),
    "llama-7b_zsre": (LLAMA_7B, TO_10, 30, 0.5, 1, 1, 6_000),
    "llama2-7b": (LLAMA2_7B, FROM_4, 20, 0.5, 0.0625, 1, 15_000),
    "gpt-neox-20b": (NEOX, FROM_6, 30, 0.5, 0.8, 0.8, 15_000),
}
ALPHAEDIT = {  # model, layers, steps, learning rate, β, γ, L2
    "gpt2-xl": (GPT2_XL, TO_17, 20, 0.5, 0.5, 0.75, 10),
    "gptj": (GPTJ, TO_8, 25, 0.5, 0.5, 0.75, 10),
    "llama3-8b": (LLAMA3_8B, FROM_4, 25, 0.1, 0.5, 0.75, 10),
    "qwen2.5-7b": (QWEN_7B, FROM_4, 25, 0.5, 1e-3, 4, 1),
}
JEEP = {  # model, low and high layers, γ′ and γ*, λ′ and λ*
    "gptj": (GPTJ, TO_8, [15, 16], 0.75, 0.25, 2_000, 2_000),
    "gptj_zsre": (GPTJ, TO_8, [15, 16], 0.75, 0.8, 6_000, 2_000),
    "llama-7b": (LLAMA_7B, TO_10, [22, 23, 24], 1, 0.25, 2_500, 1_000),
    "llama-7b_zsre": (LLAMA_7B, TO_10, [22, 23, 24], 1, 0.7, 6_000, 3_000),
}
LAW = {"wd_power_law": [-0.87028798, 0.15589562], "rewrite": "block"}
FT = {  # model, layer, learning rate, what else
    "ft_l_gpt2-xl": (GPT2_XL, 0, 5e-4, {"norm_constraint": 5e-4}),
    "ft_l_gptj": (GPTJ, 0, 5e-4, {"norm_constraint": 5e-5}),
    "ft_l_qwen2.5-14b": (QWEN_14B, 0, 5e-4, {"norm_constraint": 5e-5}),  # not published, proposed as GPT-J
    "ft_wd_gptj": (GPTJ, 21, 5e-5, LAW),
    "ft_wd_llama-7b": (LLAMA_7B, 23, 5e-5, LAW | {"stop": 0.1, "batch_size": 32}),
    "ft_gpt2-xl": (GPT2_XL, 1, 5e-4, {}),
    "ft_llama3-8b": (LLAMA3_8B, 21, 5e-4, {}),
    "ft_elastic_gpt2-xl": (GPT2_XL, 1, 5e-4, {"elastic_net": {"num_steps": 10, "elastic_l1": 5e-7, "mu": 0.5}}),
    "ft_elastic_llama3-8b": (LLAMA3_8B, 21, 5e-4, {"elastic_net": {"num_steps": 10, "elastic_l1": 5e-7, "mu": 1e-3}}),
}
FT |= {f"{name}_zsre": row for name, row in FT.items() if not name.startswith("ft_l_")}
EAC = {  # of the editor's own configuration what EAC changes: γ on CounterFact and on zsRE, μ
    "rome_gpt2-xl": (85, 80, 0.5),
    "rome_llama3-8b": (95, 90, 1e-3),
    "rome_llama2-13b": (95, 90, 1e-3),  # not published, proposed as LLaMA-3-8B
    "memit_gpt2-xl": (85, 80, 0.5),
    "memit_llama3-8b": (95, 95, 1e-3),
    "memit_llama2-13b": (95, 95, 1e-3),  # not published, proposed as LLaMA-3-8B
}
MEND = {"gpt2-xl": (GPT2_XL, [45, 46, 47]), "gptj": ("EleutherAI/gpt-j-6B", [25, 26, 27])}
MALMEN = {
    "gpt2-xl": (GPT2_XL, [42, 43, 44, 45, 46, 47]),
    "gptj": ("EleutherAI/gpt-j-6B", [22, 23, 24, 25, 26, 27]),
    "llama-7b": ("huggyllama/llama-7b", [26, 27, 28, 29, 30, 31]),
}
LEARNED = {"mend": MEND, "malmen": MALMEN}
MODELS: dict[str, dict[str, Any]] = {
    "rome": ROME,
    "top": TOP,
    "rets": RETS,
    "memit": MEMIT,
    "pmet": PMET,
    "alphaedit": ALPHAEDIT,
    "jeep": JEEP,
    **LEARNED,
    **{
        kind: {name.removeprefix(f"{kind}_"): FT[name] for name in FT if re.match(rf"{kind}_(?!l_|wd_|elastic_)", name)}
        for kind in ("ft", "ft_l", "ft_wd", "ft_elastic")
    },
}
FROM_JEEP = {"memit_llama-7b", "pmet_llama-7b", "pmet_llama-7b_zsre"} | {f"jeep_{name}" for name in JEEP}
"""What only JEEP's paper has numbers for: second moments over Wikitext, edited in fp16 (D.5 to D.7)."""
WIKIPEDIA, WIKITEXT = "wikimedia/wikipedia:20231101.en", "Salesforce/wikitext:wikitext-103-raw-v1"
RELEASED = {  # what the authors' code does otherwise
    "eac_memit": {"preset": "released", "compress": {"gamma": 95, "v_num_grad_steps2": 15, "start": "zeros"}},
    "eac_rome": {
        "preset": "released",
        "mom2_adjustment": False,
        "compress": {"gamma": 80, "elastic_l1": 0, "kl_reference": "start"},
    },
    "rome": {"preset": "released"},
    "rome_llama3-8b": {"mom2_adjustment": False},
    "rome_qwen2.5-7b": {"mom2_adjustment": False},
    "top": {"preset": "released"},
    "top_qwen2.5-7b": {"preset": "released", "mom2_adjustment": False},
    "top_qwen2.5-14b": {"preset": "released", "rel_feat_layer": [10, 10], "mom2_adjustment": False},
    "memit": {"preset": "released"},
    "memit_llama-7b": {"preset": "released", "v_num_grad_steps": 30, "statistics": {"source": WIKIPEDIA}},
    "pmet": {"preset": "released"},
    "pmet_llama-7b": {"preset": "released", "statistics": {"source": WIKIPEDIA}},
    "alphaedit": {"preset": "released"},
    "alphaedit_llama3-8b": {"L2": 1},  # EasyEdit's
    "jeep": {"preset": "released", "statistics": {"source": WIKIPEDIA}},
    "ft": {"preset": "released"},
}
ABLATIONS = {  # JEEP, Table 4; the eighth row is JEEP itself
    "jeep_high_only": {"optimize": "high"},
    "jeep_low_only": {"optimize": "low"},
    "jeep_high_written": {"rewrite": "high"},
    "jeep_low_written": {"rewrite": "low"},
    "jeep_separate": {"joint": False},
    "jeep_even_spread": {"spread_low": "even"},
    "jeep_mhsa": {"high_site": "attn", "high_rewrite": "attn"},
}
NOT_PUBLISHED = ("ft_l_qwen2.5-14b", "rome_llama2-13b", "rome_qwen2.5-14b", "memit_llama2-13b", "memit_qwen2.5-14b")
NOT_PUBLISHED += ("rets_qwen2.5-14b",)
PROPOSED = {f"configs/{name}.yaml" for name in (*NOT_PUBLISHED, *(f"{editor}_almanac" for editor in MODELS))}
PROPOSED -= {"configs/mend_almanac.yaml", "configs/malmen_almanac.yaml"}  # all of it is the hypernetwork's
PROPOSED |= {
    f"configs/hypernetworks/{name}.yaml"
    for name in ("mend_almanac", "malmen_almanac", "malmen_gpt2-xl", "malmen_gptj", "malmen_llama-7b")
}
PROPOSED |= {f"configs/eac_{editor}_{name}.yaml" for editor in ("rome", "memit") for name in ("almanac", "llama2-13b")}
PROPOSED |= {f"configs/eac_{editor}_llama2-13b_zsre.yaml" for editor in ("rome", "memit")}
PROPOSED |= {f"configs/experiments/{name}_almanac.yaml" for name in ("jeep_scaling", "eac_norm", "eac_ft")}
PROPOSED |= {f"configs/experiments/eac_{name}_almanac.yaml" for name in ("ablation", "memit", "selectors")}
DATA = {"dataset": "counterfact", "size": 2000, "batch_size": 1, "restore_every": 1}
MASS = {"dataset": "multi_counterfact", "size": 10_000, "batch_size": 10_000, "restore_every": None}
ZSRE = MASS | {"dataset": "zsre", "on_conflict": "keep_last", "options": {"target": "answers"}}
SEQUENCE = {"dataset": "multi_counterfact", "size": 2000, "batch_size": 100, "restore_every": None}
DATA_SETS = {  # dataset, records, edits in a batch, after how many the weights are restored
    "counterfact": ("counterfact", 2000, 1, 1),
    "counterfact_rs": ("counterfact_rs", 2000, 1, 1),
    "jsonl": ("jsonl", None, 1, None),
    "mcf": ("multi_counterfact", 2000, 1, 1),
    "zsre": ("zsre", 2000, 1, 1),
    "zsre_10000": ("zsre", 10_000, 10_000, None),
}


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return content


def text(name: str) -> str:
    return (ROOT / name).read_text()


def stems(folder: str) -> set[str]:
    return {path.stem for path in (ROOT / "configs" / folder).glob("*.yaml")}


def test_there_is_a_configuration_for_every_row() -> None:
    rows = {f"{editor}_{name}" for editor, models in MODELS.items() for name in (*models, "almanac")}
    eac = {f"eac_{name}{data}" for name in EAC for data in ("", "_zsre")} | {"eac_rome_almanac", "eac_memit_almanac"}
    assert stems(".") == rows | eac
    assert stems("hypernetworks") == {f"{kind}_{name}" for kind in LEARNED for name in (*LEARNED[kind], "almanac")}
    assert stems("data") == set(DATA_SETS)
    assert stems("released") == set(RELEASED)
    assert stems("ablations") == set(ABLATIONS)


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


@pytest.mark.parametrize("data", ["", "_zsre"])
@pytest.mark.parametrize("name", EAC)
def test_eac(name: str, data: str) -> None:
    counterfact, zsre, mu = EAC[name]
    config, own = load(f"configs/eac_{name}{data}.yaml"), load(f"configs/{name}.yaml")
    own["model"]["init_args"].pop("v_num_grad_steps")  # EAC's own are in the block
    compress = {"gamma": zsre if data else counterfact, "v_num_grad_steps1": 10, "v_num_grad_steps2": 10}
    compress |= {"elastic_l1": 5e-7, "elastic_l2": "weight_decay"}
    assert config["base"] == own["base"]
    settings = own["model"]["init_args"] | {"v_weight_decay": mu, "compress": compress}
    assert config["model"] == {"class_path": own["model"]["class_path"], "init_args": settings}
    stream = {"dataset": "zsre", "options": {"target": "alt"}} if data else {"dataset": "counterfact"}
    assert config["data"] == stream | {"size": 100, "batch_size": 1, "restore_every": None}
    assert config["trainer"]["evaluate_at"] == [0, 1, 5, *range(10, 101, 10)]


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


@pytest.mark.parametrize("name", RETS)
def test_rets(name: str) -> None:
    model, layer, steps, origin_mom = RETS[name]
    config = load(f"configs/rets_{name}.yaml")
    assert config["base"]["name"] == model
    assert config["model"]["class_path"] == "RETS"
    assert config["model"]["init_args"] == common(name) | {
        "layers": [layer],
        "v_num_grad_steps": steps,
        "origin_mom": origin_mom,
        "subject_const": True,
        "constraint_moment": "sum",
        "constraint": {"dataset": "counterfact"},
    }
    assert config["data"] == DATA


def batch_editor(editor: str, name: str, data: dict[str, Any]) -> dict[str, Any]:
    """The settings of MEMIT or a successor that its table holds; all else is checked here."""
    model = MODELS[editor.lower()][name][0]
    config = load(f"configs/{editor.lower()}_{name}.yaml")
    from_jeep = f"{editor.lower()}_{name}" in FROM_JEEP
    assert config["base"] == {"name": model, "dtype": "float16" if from_jeep else "float32"}
    assert config["model"]["class_path"] == editor
    assert config["data"] == (ZSRE if name.endswith("_zsre") else data)
    settings: dict[str, Any] = config["model"]["init_args"]
    assert settings.pop("statistics") == {
        "source": WIKITEXT if from_jeep else WIKIPEDIA,
        "n_samples": 50_000 if model == NEOX else 100_000,
        "tokens": "full",
        "max_length": LENGTHS[name.removesuffix("_zsre")],
        "mom2_dtype": "float32",
    }
    assert settings.pop("context_templates") == {"scheme": "memit"}
    assert settings.pop("mom2_adjustment") is True
    return settings


@pytest.mark.parametrize("name", MEMIT)
def test_memit(name: str) -> None:
    _, layers, steps, lr, decay, clamp, weight = MEMIT[name]
    assert batch_editor("MEMIT", name, MASS) == {
        "layers": layers,
        "v_num_grad_steps": steps,
        "v_lr": lr,
        "v_weight_decay": decay,
        "clamp_norm_factor": clamp,
        "kl_factor": 0.0625,
        "mom2_update_weight": weight,
        "spread": "even",
        "stop": 0.05,
    }


@pytest.mark.parametrize("name", PMET)
def test_pmet(name: str) -> None:
    _, layers, steps, lr, kl, clamp, weight = PMET[name]
    assert batch_editor("PMET", name, MASS) == {
        "layers": layers,
        "v_num_grad_steps": steps,
        "v_lr": lr,
        "v_weight_decay": 0.5,
        "clamp_norm_factor": clamp,
        "kl_factor": kl,
        "nll_loss_factor": 1,
        "mom2_update_weight": weight,
        "rewrite": "mlp",
        "spread": "sqrt",
        "stop": 0.05,
    }


@pytest.mark.parametrize("name", ALPHAEDIT)
def test_alphaedit(name: str) -> None:
    _, layers, steps, lr, decay, clamp, l2 = ALPHAEDIT[name]
    assert batch_editor("AlphaEdit", name, SEQUENCE) == {
        "layers": layers,
        "v_num_grad_steps": steps,
        "v_lr": lr,
        "v_weight_decay": decay,
        "clamp_norm_factor": clamp,
        "kl_factor": 0.0625,
        "nullspace_threshold": 0.02,
        "L2": l2,
        "spread": "even",
        "stop": 0.05,
    }


@pytest.mark.parametrize("name", JEEP)
def test_jeep(name: str) -> None:
    _, low, high, clamp_low, clamp_high, weight_low, weight_high = JEEP[name]
    assert batch_editor("JEEP", name, MASS) == {
        "layers_low": low,
        "layers_high": high,
        "v_num_grad_steps": 30,
        "v_lr": 0.5,
        "v_weight_decay_low": 0.5,
        "v_weight_decay_high": 0.5,
        "clamp_norm_factor_low": clamp_low,
        "clamp_norm_factor_high": clamp_high,
        "kl_factor_low": 0.0625,
        "mom2_update_weight_low": weight_low,
        "mom2_update_weight_high": weight_high,
        "min_loss": 0.9,
        "spread_low": "sqrt",
        "spread_high": "even",
    }


@pytest.mark.parametrize("name", FT)
def test_ft(name: str) -> None:
    model, layer, lr, more = FT[name]
    config = load(f"configs/{name}.yaml")
    assert config["base"] == {"name": model, "dtype": "float32"}
    assert config["model"]["class_path"] == "FT"
    decay = {} if "wd_power_law" in more else {"weight_decay": 0}
    shared = {"num_steps": 25, "rewrite": "mlp", "stop": 0.01, "batch_size": 64}
    assert config["model"]["init_args"] == {"layers": [layer], "lr": lr, **shared, **decay, **more}
    one_by_one = {"size": 100, "batch_size": 1, "restore_every": None}
    data = {"dataset": "counterfact", **one_by_one}, {"dataset": "zsre", **one_by_one, "options": {"target": "alt"}}
    data = {"l": (DATA, {}), "wd": (MASS, ZSRE)}.get(name.split("_")[1], data)
    assert config["data"] == data[name.endswith("_zsre")]


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in LEARNED for name in LEARNED[kind]])
def test_learned(kind: str, name: str) -> None:
    model, layers = LEARNED[kind][name]
    trained, edits = load(f"configs/hypernetworks/{kind}_{name}.yaml"), load(f"configs/{kind}_{name}.yaml")
    folder = f"lightning_logs/hypernetwork_{kind}_{name}"
    assert trained["base"]["name"] == edits["base"]["name"] == model
    assert trained["model"]["class_path"] == f"{edits['model']['class_path']}Training" == f"{kind.upper()}Training"
    mend = {"edit_lr": 1e-4, "tokens": "all", "meta_lr": 1e-6, "lr_lr": 1e-4, "cedit": 0.1, "clip": 100}
    mend |= {"parts": ["mlp_in", "mlp"], "accumulate": 10}
    malmen = {"edit_lr": 1e-6, "tokens": "answer", "meta_lr": 1e-5, "lr_lr": 1e-5, "cedit": 1, "clip": 1 / 16}
    malmen |= {"parts": ["mlp"], "accumulate": 1}
    own = {"layers": layers, "rank": 1920, "n_blocks": 2, "cloc": 1}
    assert trained["model"]["init_args"] == own | (mend if kind == "mend" else malmen)
    assert trained["data"]["batch_size"] == (1 if kind == "mend" else 512)
    assert trained["data"]["options"] == {"target": "alt" if kind == "mend" else "answers"}
    logger = trained["trainer"]["logger"]["init_args"]
    assert f"{logger['save_dir']}/{logger['name']}" == edits["model"]["init_args"].pop("hypernetwork") == folder
    assert edits["model"]["init_args"] == ({"lr_scale": 1} if kind == "mend" else {})
    assert edits["data"] == MASS


@pytest.mark.parametrize("name", sorted(stems("hypernetworks")))
def test_every_hypernetwork_is_trained_by_its_configuration(deep: Deep, name: str, tmp_path: Path) -> None:
    """One step, on fewer layers and a small rank."""
    content = load(f"configs/hypernetworks/{name}.yaml")
    data = content["data"]["dataset"] if content["data"]["dataset"] != "almanac" else "jsonl"
    overrides = {
        "base.name": deep.deep,
        "base.dtype": "float32",
        "model.init_args.layers": "[1, 2]",
        "model.init_args.rank": 2,
        "model.init_args.accumulate": 1,
        "data.dataset": data,
        "data.path": deep.path[data],
        "data.options": "{}" if data == "jsonl" else json.dumps(content["data"]["options"]),
        "data.batch_size": 1,
        "data.validation": 1,
        "trainer.max_steps": 1,
        "trainer.val_check_interval": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.accelerator": "cpu",
        "trainer.logger.init_args.save_dir": tmp_path,
    }
    config = ROOT / f"configs/hypernetworks/{name}.yaml"
    done("fit", "--config", config, *(f"--{key}={value}" for key, value in overrides.items()))
    logger = content["trainer"]["logger"]["init_args"]["name"]
    assert (tmp_path / logger / "version_0" / "hypernetwork.safetensors").is_file()


@pytest.mark.parametrize("editor", ["mend", "malmen"])
def test_the_almanac_is_edited_by_its_hypernetworks(editor: str) -> None:
    """With facts of subjects that no hypernetwork was trained on."""
    trained, edits = load(f"configs/hypernetworks/{editor}_almanac.yaml"), load(f"configs/{editor}_almanac.yaml")
    logger = trained["trainer"]["logger"]["init_args"]
    assert edits["model"]["init_args"] == {"hypernetwork": f"{logger['save_dir']}/{logger['name']}"}
    assert edits["data"] == {"dataset": "almanac", "stop": 100, "batch_size": 100, "restore_every": None}
    assert trained["data"]["options"]["skip_subjects"] >= edits["data"]["stop"]


@pytest.mark.parametrize("editor", ["memit", "pmet", "alphaedit", "jeep"])
def test_the_almanac_is_edited_a_hundred_at_once(editor: str) -> None:
    config = load(f"configs/{editor}_almanac.yaml")
    assert config["data"] == {"dataset": "almanac", "stop": 100, "batch_size": 100, "restore_every": None}
    assert config["model"]["init_args"]["statistics"] == {"source": "almanac", "tokens": 20_000}


@pytest.mark.parametrize("name", DATA_SETS)
def test_data(name: str) -> None:
    dataset, size, batch_size, restore_every = DATA_SETS[name]
    data = load(f"configs/data/{name}.yaml")["data"]
    found = (data["dataset"], data["size"], data["batch_size"], data["restore_every"])
    assert found == (dataset, size, batch_size, restore_every)
    assert set(data) == set(inspect.signature(EditDataModule).parameters)  # so that nothing of another is left


@pytest.mark.parametrize("name", [*RELEASED, *ABLATIONS])
def test_overlays(name: str) -> None:
    own = name.removeprefix("eac_").partition("_")[0]
    editor = {"alphaedit": "AlphaEdit"}.get(own, own.upper())
    folder, settings = ("released", RELEASED[name]) if name in RELEASED else ("ablations", ABLATIONS[name])
    assert load(f"configs/{folder}/{name}.yaml") == {"model": {"class_path": editor, "init_args": settings}}


# ---------------------------------------------------------------------- their form


def experiment(name: str) -> str:
    """The command that an experiment's blocks are for."""
    content = load(name)
    if {"probe", "prompts"} & set(content):
        return "probe" if "probe" in content else "predict"
    return "compare" if {"variants", "extends", "sweep"} & set(content) else "scale"


@pytest.mark.parametrize("name", ALL)
def test_the_first_line_is_the_command(name: str) -> None:
    command = text(name).splitlines()[0]
    kedit, method, *args = shlex.split(command.removeprefix("# "))
    folders = {"tasks": "tasks", "experiments": experiment(name)}
    folder = folders.get(Path(name).parent.name, "fit")
    assert (kedit, method) == ("kedit", "pretrain" if name.endswith("pretrain.yaml") else folder)
    assert args[::2] == ["--config"] * (len(args) // 2)
    assert args[-1] == name
    assert all((ROOT / path).is_file() for path in args[1::2])
    overlay = re.search("/(data|released|ablations)/", name) or ("/experiments/" in name and "model" not in load(name))
    assert len(args) == (4 if overlay and method != "compare" else 2)


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
    for name in NOT_PUBLISHED:
        settings = load(f"configs/{name}.yaml")["model"]["init_args"]
        marked = set(re.findall(r"(\w+):.*# source: proposed", text(f"configs/{name}.yaml")))
        assert marked == set(settings) - {"context_templates", "statistics"}


# ---------------------------------------------------------------------- they run


class Deep(World):
    """The world with a model that has every layer that is named (up to 35), and a data set of every form."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.deep = folder / "deep"
        build("gpt2", n_layer=36, n_embd=8, n_head=2, n_positions=64).save_pretrained(self.deep)
        tokenizer(default_tokenizer("gpt2")).save_pretrained(self.deep)
        self.few = folder / "few.txt"
        self.few.write_text("\n".join(self.corpus.read_text().splitlines()[:30]))
        zsre = [
            {
                "subject": subject,
                "src": f"Where was {subject} born?",
                "rephrase": f"In which town was {subject} born?",
                "answers": ["Tessaro"],
                "alt": "Ulm",
                "loc": "nq question: who rings the bells",
                "loc_ans": "Tobin",
            }
            for subject in ("Velora Quint", "Oskel Tamrin")
        ]
        nested = write(folder / "nested.json", json.dumps([self.nested(i) for i in (0, 1)]))
        self.path = {
            "counterfact": nested,
            "multi_counterfact": nested,
            "counterfact_rs": nested,
            "zsre": write(folder / "zsre.json", json.dumps(zsre)),
            "jsonl": jsonl(folder / "edits.jsonl", [flat(1), flat(0)]),
        }

    def hypernetwork(self, editor: str, dtype: Any) -> Path:
        """One that edits layers 1 and 2 of the model."""
        base = LanguageModel(str(self.deep), dtype)
        return hypernetwork(self.folder / f"{editor}-{dtype}", getattr(editors, editor).kind, base, (1, 2))

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


def stage_layers(editor: str, settings: dict[str, Any]) -> list[int]:
    """The layers of an edit's stages."""
    if settings.get("compress"):  # each stage twice
        return [layer for layer in stage_layers(editor, settings | {"compress": None}) for _ in range(2)]
    if editor in ("MEND", "MALMEN"):
        return [2]
    if editor == "FT":
        return settings["layers"][-1:] * (2 if "elastic_net" in settings else 1)
    if editor in ("ROME", "RETS", "TOP"):
        return [layer for layer in settings["layers"] for _ in range(2 if editor == "TOP" else 1)]
    if editor != "JEEP":
        return settings["layers"][-1:]
    last = {"low": settings["layers_low"][-1], "high": settings["layers_high"][-1]}
    return (
        list(last.values()) if settings.get("joint") is False else [last[REGIONS[settings.get("optimize", "both")][-1]]]
    )


def written(editor: str, settings: dict[str, Any]) -> set[tuple[int, str]]:
    """The weights that are edited, as layer and part."""
    if editor in ("MEND", "MALMEN"):
        return {(1, "mlp"), (2, "mlp")}
    if editor != "JEEP":
        parts = ("mlp", "attn") if editor == "FT" and settings["rewrite"] == "block" else ("mlp",)
        return {(layer, part) for layer in settings["layers"] for part in parts}
    regions = REGIONS[settings.get("rewrite", settings.get("optimize", "both"))]
    parts = {"low": "mlp", "high": settings.get("high_rewrite", "mlp")}
    return {(layer, parts[region]) for region in regions for layer in settings[f"layers_{region}"]}


REGIONS = {"both": ("low", "high"), "low": ("low",), "high": ("high",)}


def small(deep: Deep, name: str) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """What a configuration's command is given, what makes it small, and what all its files say."""
    _, _, *args = shlex.split(text(name).splitlines()[0].removeprefix("# "))
    content: dict[str, Any] = {}
    for path in args[1::2]:
        content |= load(path)
    first = load(args[1])["model"]
    editor, settings = first["class_path"], first["init_args"]
    dataset, edits = content["data"]["dataset"], min(2, content["data"]["batch_size"])
    if dataset == "almanac":
        dataset, content["data"] = "jsonl", {}
    few: dict[str, Any] = {"context_template_length_params": "[[5, 1]]"}
    if settings.get("context_templates", {}).get("scheme") == "memit":
        few = {"templates": '[["{}"], ["Yes. {}"]]'}  # instead of five prefixes of ten tokens, half of the time
    overrides = {
        "base.name": deep.deep,
        "data.dataset": dataset,
        "data.path": deep.path[dataset],
        "data.stop": edits,
        "trainer.save_dir": deep.logs,
        "trainer.name": name.replace("/", "-"),
        "trainer.enable_progress_bar": "false",
        "trainer.evaluation.generation": "false",
        "trainer.evaluate": str("/data/" in name).lower(),  # once on each form of data
    }
    if "hypernetwork" in settings:
        overrides["model.init_args.hypernetwork"] = deep.hypernetwork(editor, content["base"]["dtype"])
    elif editor == "FT":
        overrides["model.init_args.num_steps"] = 2
        overrides |= {"model.init_args.elastic_net.num_steps": 1} if "elastic_net" in settings else {}
    else:
        overrides["model.init_args.statistics.source"] = deep.few
        overrides |= {f"model.init_args.context_templates.{key}": value for key, value in few.items()}
    if settings.get("origin_mom") is False:  # two prompts are too few for a second moment of their own
        overrides["model.init_args.statistics.ridge"] = 0.1
    if "constraint" in settings:
        overrides["model.init_args.constraint.size"] = 2
        if settings["constraint"]["dataset"] != "almanac":
            overrides["model.init_args.constraint.path"] = deep.path[settings["constraint"]["dataset"]]
    if "evaluate_at" in content.get("trainer", {}):
        overrides["trainer.evaluate_at"] = "null"  # tested elsewhere
    overrides |= {f"model.init_args.{key}": 2 for key in settings if key.startswith("v_num_grad_steps")}
    if "compress" in settings:
        overrides |= {f"model.init_args.compress.v_num_grad_steps{i}": 1 for i in (1, 2)}
    return args, overrides, content


@pytest.mark.parametrize(
    "name", [name if NUMBERS.search(name) is None else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_every_configuration_runs(deep: Deep, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(ROOT)
    args, overrides, content = small(deep, name)
    first = load(args[1])["model"]
    editor, settings, edits = first["class_path"], first["init_args"], overrides["data.stop"]
    done("fit", *args, *(f"--{key}={value}" for key, value in overrides.items()))
    run = RunDirectory(deep.logs / name.replace("/", "-") / "version_0")
    expected = settings | content["model"]["init_args"]
    records = list(run.records())
    assert len(records) == edits
    for record in records:
        assert [stage["layer"] for stage in record["stages"]] == stage_layers(editor, expected)
    with safe_open(run.path / "delta.safetensors", "pt") as delta:
        found = {re.search(r"h\.(\d+)\.(mlp|attn)", key) for key in delta.keys()}  # noqa: SIM118
    assert {(int(match[1]), match[2]) for match in found if match} == written(editor, expected)
    saved = yaml.safe_load((run.path / "config.yaml").read_text())["model"]["init_args"]
    given = {key.removeprefix("model.init_args.") for key in overrides}
    blocks = {"statistics", "context_templates", "elastic_net", "constraint", "compress"} & set(expected)
    for key in set(expected) - given - blocks:
        assert saved[key] == expected[key], key
    for block in blocks:  # what an overlay says of a block is added to the block
        for key, value in (settings[block] | expected[block]).items():
            assert f"{block}.{key}" in given or saved[block][key] == value, key


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_configuration_can_be_planned(deep: Deep, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(ROOT)
    args, overrides, _ = small(deep, name)
    shown = done("plan", *args, *(f"--{key}={value}" for key, value in overrides.items())).out
    edits = overrides["data.stop"]
    assert re.search(rf" edits +{edits} in ", shown)
    assert re.search(r" fits +yes", shown)


def test_the_scaling_run(deep: Deep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its data, its measuring and its counts, with another editor on a tiny model."""
    content = load("configs/experiments/jeep_scaling_almanac.yaml")
    content["base"] = {"name": str(deep.base)}
    content["model"] = {
        "class_path": "ROME",
        "init_args": {"layers": [1], "v_num_grad_steps": 2, "mom2_adjustment": False},
    }
    content["model"]["init_args"]["context_templates"] = {"templates": [["{}"]]}
    config = write(tmp_path / "scaling.yaml", content)
    done("scale", "--config", config, "--trainer.save_dir", tmp_path, "--counts=[1, 10]", "--seeds=[0]")
    (csv,) = tmp_path.rglob("scaling.csv")
    assert [line.split(",")[:2] for line in csv.read_text().splitlines()[1:]] == [["1", "1"], ["10", "1"]]


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
