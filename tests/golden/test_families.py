"""The command on model families of which no recording is at hand: the recordings are made by the slow reference.

Nothing of GPT-2 may be taken for granted: blocks and maps of other families, a tokenizer that puts a BOS token first,
one that gives a leading space a token of its own, targets of several tokens, subjects anywhere in the prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.families import EDITS, FAMILY_CONFIGS, build, corpus, tokenizer
from tests.golden import reference
from tests.golden.__main__ import main
from tests.golden.cases import find, read_json
from tests.golden.compare import relative
from tests.golden.extract import DATA

CONTEXTS = ("{}", "The bells of the valley. {}", "Therefore {}")
HPARAMS: dict[str, Any] = {
    "layers": [1],
    "v_lr": 0.5,
    "v_weight_decay": 0.5,
    "clamp_norm_factor": 4,
    "kl_factor": 0.0625,
    "mom2_adjustment": True,
    "fact_token": "subject_last",
    "nll_loss_factor": 1,
}
ROME = {"v_num_grad_steps": 8}
TOP = {"rel_feat_layer": 2, "v_num_grad_steps1": 8, "v_num_grad_steps2": 7, "vec_loss_factor": 0.1}


def _requests(numbers: tuple[int, ...]) -> list[dict[str, Any]]:
    return [
        {
            "case_id": edit.case_id,
            "prompt": edit.prompt,
            "subject": edit.subject,
            "target_new": {"str": edit.target_new},
            "target_true": {"str": edit.target_true},
            "paraphrase_prompts": list(edit.paraphrase_prompts),
            "neighborhood_prompts": list(edit.neighborhood_prompts),
            "relation_specificity_prompts": list(edit.relation_specific_prompts),
        }
        for edit in (EDITS[i] for i in numbers)
    ]


def record(
    folder: Path, editor: str, family: str, kind: str, numbers: tuple[int, ...] = (0, 1, 4), **changes: Any
) -> None:
    """Record a case with a random model of a family and a tokenizer of a kind."""
    model, words = build(family, 3, kind, **FAMILY_CONFIGS[family]), tokenizer(kind)
    hparams = HPARAMS | {"ROME": ROME, "TOP": TOP}[editor]
    hparams |= changes
    slow = reference.Slow(model, words, CONTEXTS, hparams)
    moment = reference.second_moment(slow, corpus()[:60]) if hparams["mom2_adjustment"] else None
    name = f"{family}-{kind}".replace("_", "-")
    reference.write_case(folder, editor, name, model, words, _requests(numbers), CONTEXTS, hparams, moment)


@pytest.mark.parametrize("editor", ["ROME", "TOP"])
def test_reference_gives_what_the_authors_code_gave(editor: str) -> None:
    """On GPT-2; what it says about other families can be trusted as far as it knows nothing of ours."""
    (case,) = find(DATA, editor)
    model = AutoModelForCausalLM.from_pretrained(DATA / "models" / case.model, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(DATA / "models" / case.model)
    slow = reference.Slow(model, words, case.templates[0], case.meta["hparams"])
    moment = load_file(DATA / f"cov_{case.model}.safetensors")[slow.down_name]
    request = case.requests[2]
    slow.edit(editor, request | {"relation_specificity_prompts": request["relation_specific_prompts"]}, moment)
    ours = {"logits_post/prompt", "key/k_star_mean", f"dW/{slow.down_name}.weight"}
    ours |= {name.split("/", 1)[1] for name in slow.numbers if name.endswith(("/delta", "loss", "/left_vector"))}
    assert len(ours) >= 8
    for name in ours:
        assert relative(slow.numbers[f"req2/{name}"], case.numbers()[f"req2/{name}"]) < 5e-5, name


@pytest.mark.parametrize(
    ("family", "kind"), [("gptj", "byte_bpe"), ("llama", "byte_bpe"), ("llama", "byte_bpe_bos"), ("llama", "spm")]
)
def test_other_families(tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, kind: str) -> None:
    """Targets of one and of several tokens; one is longer than its "{} is a"."""
    for editor in ("ROME", "TOP"):
        record(tmp_path, editor, family, kind, (1, 5))
    assert main([str(tmp_path)]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(("editor", "first"), [("ROME", ""), ("TOP", "/stage1")])
def test_early_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str], editor: str, first: str) -> None:
    """On the trained tiny GPT-2: a random model never gets near the thresholds."""
    (case,) = find(DATA, editor)
    model = AutoModelForCausalLM.from_pretrained(DATA / "models" / case.model, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(DATA / "models" / case.model)
    requests = read_json(DATA / "requests.json")["requests"][2:3]
    hparams = case.meta["hparams"] | {"v_weight_decay": 1e-3, "kl_factor": 0.0, "vec_loss_factor": 0.04}
    hparams |= {key: 60 for key in ("v_num_grad_steps", "v_num_grad_steps1") if key in hparams}
    moments = load_file(DATA / f"cov_{case.model}.safetensors")
    moment = moments["transformer.h.2.mlp.c_proj"], int(moments["count"])
    reference.write_case(tmp_path, editor, case.model, model, words, requests, CONTEXTS[:1], hparams, moment)
    evaluations = read_json(tmp_path / f"{editor}_{case.model}.json")["values"]
    assert 1 < evaluations[f"req2{first}"]["n_loss_evaluations"] < 60
    assert main([str(tmp_path)]) == 0, capsys.readouterr().out


def test_without_second_moment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, "TOP", "gptj", "byte_bpe", (4,), mom2_adjustment=False)
    assert main([str(tmp_path)]) == 0, capsys.readouterr().out
