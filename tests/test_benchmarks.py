"""The benchmarks' own parts: what is counted as FLOP, the committed facts, and their commands at tiny sizes."""

from __future__ import annotations

import re
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import large_models, shapes, value_stage
from kedit_lightning.edits import Part, Site
from kedit_lightning.models import Batch, LanguageModel
from kedit_lightning.models.full import FullForward
from kedit_lightning.models.suffix import GROUP_COSTS, SuffixForward
from tests.families import tiny_base

ROW = r"\| [A-Z]"
"""How the line of an editor begins."""
TINY = {
    "gpt2-small": {"n_embd": 32, "n_head": 2, "vocab_size": 2048, "bos_token_id": 0, "eos_token_id": 0},
    "gpt-j-6b": {"n_embd": 32, "n_head": 2, "rotary_dim": 8, "vocab_size": 2048, "bos_token_id": 0, "eos_token_id": 0},
}


def test_prompts_are_cut_about_as_gpt2_cuts() -> None:
    """Subjects first, inside and last; 21 templates of ROME, with ten contexts of four tokens and ten of nine."""
    facts, contexts = shapes.prompt_set()
    words = shapes.tokenizer()
    assert len(facts) == 16
    places = {fact.prompt.startswith("{}") + 2 * fact.prompt.endswith("{}") for fact in facts}
    assert places == {0, 1, 2}
    assert [len(words.tokenize(context)) for context in contexts] == [4] * 10 + [9] * 10
    prompts = [len(words.tokenize(fact.fill("{}"))) for fact in facts]
    subjects = [len(words.tokenize(f" {fact.subject}")) for fact in facts]
    assert 9 <= sum(prompts) / len(prompts) <= 12
    assert 3.5 <= sum(subjects) / len(subjects) <= 5.5
    assert sum(len(words.tokenize(f" {fact.target_new}")) for fact in facts) <= len(facts) + 2


def counted(forward: FullForward, sites: dict[Site, Tensor], at: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Torch's own count of a forward and a backward pass."""
    added = {site: torch.zeros(len(at[0]), 32, requires_grad=True) for site in sites}
    forward.logits(added, at)
    with FlopCounterMode(display=False) as ahead:
        total = forward.logits(added, at).sum()
    with FlopCounterMode(display=False) as back:
        total.backward()
    return ahead.get_total_flops(), back.get_total_flops()


def even_rows(base: LanguageModel) -> Batch:
    """Rows without padding: what is needed is what is run."""
    b, t = 3, 11
    ids = torch.randint(5, 100, (b, t), generator=torch.Generator().manual_seed(0))
    return Batch(ids, torch.ones_like(ids), torch.full_like(ids, -100), {}, torch.full((b,), -1))


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neox"])
@pytest.mark.parametrize("part", ["mlp", "block"])
@pytest.mark.parametrize("suffix", [False, True])
def test_flop_are_those_that_torch_counts(family: str, part: Part, suffix: bool) -> None:
    base = tiny_base(family)
    base.model.set_attn_implementation("eager")  # whose products torch counts
    rows = even_rows(base)
    sites, at = {Site(1, part): torch.full((3,), 6)}, (torch.arange(3), torch.full((3,), 10))
    with mock.patch.dict(GROUP_COSTS, cpu=10**6):
        forward = (SuffixForward if suffix else FullForward)(base, rows, sites)
    ahead, back = counted(forward, sites, at)
    found = shapes.flop(base, rows, sites, at, 3, suffix=suffix, head=3)
    rotations = ahead - found.forward
    assert 0 <= rotations <= 0.02 * ahead, "rotary positions are products too"
    assert abs(found.backward - back) <= 0.02 * back
    if family == "gpt2":
        assert (found.forward, found.backward) == (ahead, back)


@pytest.mark.parametrize("shape", TINY)
def test_value_stage(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole table, every editor and both ways, at a tiny width."""
    tiny = replace(shapes.SHAPES[shape], settings=TINY[shape])
    words = f"--shape {shape} --layers 4 --rounds 1 --singles 1 --batch 2 --no-memory --threads 1"
    with mock.patch.dict(shapes.SHAPES, {shape: tiny}):
        value_stage.main(words.split())
    lines = [
        line.strip("| \n").split("|") for line in capsys.readouterr().out.splitlines() if re.match(r"\| [A-Z]", line)
    ]
    stages = [(line[0].strip(), line[1].strip()) for line in lines[::2]]
    assert stages == [
        *[("ROME", "v"), ("TOP", "h_r"), ("TOP", "v"), ("TOP", "all"), ("MEMIT", "z"), ("JEEP", "v")],
        *[("EAC(ROME)", "v_anchors"), ("EAC(ROME)", "v"), ("EAC(ROME)", "all")],
    ]
    assert [int(line[2]) for line in lines] == [1, 2] * 9
    assert all(float(line[6].strip(" ×")) > 1 for line in lines), "the suffix needs less"
    assert all(float(x) > 0 for line in lines for x in line[3:5])


def test_stages_share_the_first_pass_where_they_can() -> None:
    """EAC's second stage pays for no first pass; other stages do."""
    shape = replace(shapes.SHAPES["gpt2-small"], settings=TINY["gpt2-small"])
    base = shapes.build(shape, 4, "float32", "cpu")
    prepared = []
    runner = value_stage.Runner(shapes.editor("EAC(ROME)", base, shape, "suffix"), shapes.prompt_set()[0][:1])
    for stage in runner:
        timing = value_stage.Timing()
        runner.round(stage, timing)
        prepared.append(timing.prepared.forward)
    assert prepared[1] < 0.1 * prepared[0]


@pytest.mark.parametrize("kinds", [("MEMIT",), pytest.param(shapes.KINDS, marks=pytest.mark.slow)])
def test_large_models(kinds: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """The table, closed form included, at a tiny width."""
    tiny = replace(shapes.SHAPES["gpt-j-6b"], settings=TINY["gpt-j-6b"])
    words = "--shape gpt-j-6b --layers 4 --device cpu --dtype float32 --rounds 1 --edits 1 2 --threads 1 --editors "
    with mock.patch.dict(shapes.SHAPES, {"gpt-j-6b": tiny}):
        large_models.main([*words.split(), *kinds])
    lines = [line.strip().strip("|").split("|") for line in capsys.readouterr().out.splitlines() if re.match(ROW, line)]
    assert [(line[0].strip(), int(line[1])) for line in lines] == [(kind, n) for kind in kinds for n in (1, 2)]
    assert all(float(x) > 0 for line in lines for x in line[2:6])
    published = {line[0].strip(): line[8].strip() for line in lines}
    known = {"ROME": "4.4 (12.2)", "MEMIT": "3.2 (8.9)", "JEEP": "1.19 (3.3)"}
    assert published == {kind: known.get(kind, "") for kind in kinds}


@pytest.mark.slow
def test_large_models_at_real_widths_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    """The command that stands in for the GPU's where none is at hand: two layers of GPT-J's width."""
    words = (
        "--shape gpt-j-6b --layers 2 --device cpu --dtype float32 --rounds 1 --edits 1 --threads 2 --editors ROME MEMIT"
    )
    large_models.main(words.split())
    shown = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in shown.splitlines() if re.match(ROW, line)] == ["ROME", "MEMIT"]
