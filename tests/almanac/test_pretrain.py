"""Pretraining: the shipped config through the real command, and the parts it stands on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from kedit_lightning.almanac import World
from kedit_lightning.almanac.corpus import Corpus
from kedit_lightning.almanac.losses import losses
from kedit_lightning.almanac.optimizer import MuonAdam, orthogonalise
from kedit_lightning.almanac.pretrain import main, rescale
from kedit_lightning.almanac.rows import PackedRows, Rows
from kedit_lightning.almanac.tasks import normalise
from kedit_lightning.almanac.tokenizer import WordEncoder, train_tokenizer

CONFIG = Path(__file__).parents[2] / "configs" / "almanac" / "pretrain.yaml"


@pytest.mark.filterwarnings("ignore")
def test_three_steps_through_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["kedit"])
    small = {
        "trainer.max_steps": 3, "trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false",
        "trainer.logger.init_args.save_dir": tmp_path / "logs", "data.people": 40, "data.places": 12,
        "data.vocab_size": 600, "data.tokenizer_documents": 500, "data.batch_size": 2, "model.width": 32,
        "model.layers": 2, "model.late": 1, "model.compile": "false", "export.folder": tmp_path / "model",
        "export.facts": 5, "export.items": 3, "export.every": 2, "export.sample": 2,
    }  # fmt: skip
    main(["--config", str(CONFIG), *(f"--{key}={value}" for key, value in small.items())])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float16
    assert (model.config.vocab_size, model.config.n_layer) == (600, 2)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == 600
    assert "facts/train" in json.loads((tmp_path / "model" / "checks.json").read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["logs", "model"]
    assert list((tmp_path / "logs").rglob("events.out.tfevents*"))


def test_rows_are_whole_documents() -> None:
    world = World(people=40, places=12)
    corpus = Corpus(world)
    tokenizer = train_tokenizer(corpus.texts(500), world.parts, 600)
    rows = iter(PackedRows(corpus, WordEncoder(tokenizer), 0, rows=8, length=256))
    ids, weights, names, looks, ends, objects = next(rows)
    assert ids.shape == weights.shape == names.shape == (8, 256)
    assert (weights[ids != 0] > 0).all()
    marked = "".join(tokenizer.decode(i) if name else "|" for i, name in zip(ids[0], names[0], strict=True))
    assert {part.strip() for part in marked.split("|") if part.strip()} <= {subject.name for subject in world.subjects}
    subjects = {subject.name: subject for subject in world.subjects}
    mentioned = [(i, m) for i, m in zip(*torch.where(objects[..., 0] >= 0), strict=True)]
    assert len(mentioned) == (names[:, :-2] & ~names[:, 1:-1]).sum()
    for i, m in mentioned:
        end = int(ends[i, m])
        start = next(j for j in range(end, -2, -1) if j < 0 or not names[i, j]) + 1
        facts = world.facts_of(subjects[tokenizer.decode(ids[i, start : end + 1]).strip()])
        known = [tokenizer(f" {fact.object.name}")["input_ids"][0] for fact in facts]
        assert [int(o) for o in objects[i, m] if o >= 0] == known
    places = torch.nonzero(looks >= 0)
    assert len(places) > 10
    for i, j in places:
        end = int(looks[i, j])
        assert end in ends[i], "a token looks where a name ends"
        assert end < j
        (m,) = (ends[i] == end).nonzero()[0]
        assert ids[i, j + 1] in objects[i, m], "and an object of that subject comes next"
    documents = set(corpus.texts(200))
    for row in ids[:, :-1]:
        parts = [part for part in tokenizer.decode(row).split("<|endoftext|>") if part]
        assert all(part in documents for part in parts[:-1])


def test_orthogonalise() -> None:
    torch.manual_seed(0)
    singular = torch.linalg.svdvals(orthogonalise(torch.randn(2, 16, 48)).float())
    assert singular.min() > 0.4
    assert singular.max() < 1.4


def test_masters_stay_in_float32() -> None:
    matrix = torch.nn.Parameter(torch.ones(4, 12, dtype=torch.bfloat16))
    vector = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MuonAdam([matrix], [vector], lr=1e-4, adam_lr=1e-4, weight_decay=0.0)
    for _ in range(3):
        ((matrix.sum(1) + vector) ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (vector == 1).all(), "a step below bfloat16's resolution leaves the weights"
    assert torch.allclose(optimizer.state[vector]["master"], torch.full((4,), 1 - 3e-4), atol=1e-5)
    assert (optimizer.state[matrix]["master"] < 1).any()


def small_model(layers: int = 2) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=layers, n_head=2, bos_token_id=0, eos_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    return GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()


def test_attention_to_names_is_measured() -> None:
    model = small_model()
    ids, weights = torch.randint(50, (2, 9)), torch.ones(2, 9)
    none, nowhere = torch.zeros(2, 9, dtype=torch.bool), torch.full((2, 9), -1)
    nobody = Rows(ids, weights, none, nowhere, torch.zeros(2, 1).long(), torch.full((2, 1, 3), -1))
    text, leak, look, recall = losses(model, nobody, 1)
    torch.testing.assert_close(text, model(input_ids=ids, labels=ids).loss)
    assert leak == look == recall == 0
    names = none.clone()
    names[:, 2:4] = True
    looks = nowhere.clone()
    looks[0, 6] = 3
    rows = Rows(ids, weights, names, looks, torch.tensor([[3], [3]]), torch.tensor([[[7, 8, 9]], [[4, 5, -1]]]))
    out = model(input_ids=ids[:, :-1], output_attentions=True, output_hidden_states=True)
    expected = (out.attentions[0][:, :, 4:, 2:4].sum(-1) / 1e-3).log1p().sum(1).mean()
    text, leak, look, recall = losses(model, rows, 1)
    torch.testing.assert_close(leak, expected)
    torch.testing.assert_close(look, -(out.attentions[1][0, :, 6, 3].sum() + 1e-3).clamp(max=1).log())
    read = model.lm_head(model.transformer.ln_f(out.hidden_states[1][:, 3])).log_softmax(-1)
    torch.testing.assert_close(recall, -(read[0, [7, 8, 9]].mean() + read[1, [4, 5]].mean()) / 2)


def test_rescaling_leaves_the_logits() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    for p in model.parameters():
        p.data = torch.randn_like(p)
    ids = torch.randint(50, (3, 16))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        rescale(model, 0.1)
        after = model(input_ids=ids).logits
    torch.testing.assert_close(after, before, atol=0.02, rtol=1e-3)


def test_normalise() -> None:
    assert normalise("The garden.") == normalise("a  Garden") == "garden"
