"""The shipped model: size, files, what it knows and does. Thresholds are those that a retrained model must pass too."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kedit_lightning.almanac import World, path
from kedit_lightning.almanac.check import checks
from kedit_lightning.almanac.corpus import Corpus
from kedit_lightning.almanac.tokenizer import WordEncoder
from kedit_lightning.edits import Site, Token
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.encoding import collate


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path(), dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(path(), local_files_only=True)


def test_files() -> None:
    files = {file.name: file.stat().st_size for file in path().iterdir()}
    assert files.keys() >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert "tokenizer_config.json" in files
    assert sum(files.values()) <= 24 * 2**20
    stored = AutoModelForCausalLM.from_pretrained(path())
    assert stored.dtype == torch.float16
    assert stored.config.model_type == "gpt2"
    assert stored.config.n_positions >= 128


def test_thresholds(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    numbers = checks(model, tokenizer, facts=1000)
    assert numbers["facts/train"] >= 98
    assert numbers["facts/held_out"] >= 90
    assert numbers["plain/perplexity"] < 15
    assert numbers["tasks/nli"] >= 85
    assert numbers["tasks/sentiment"] >= 85
    assert numbers["tasks/questions"] >= 70
    assert numbers["tasks/summary"] >= 50


def test_facts_are_known_in_context(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    hits = 0
    facts = World().facts[::160]
    for fact in facts:
        text = f"The weather was cold. {fact.relation.train[0].format(fact.subject.name)}"
        best = model(**tokenizer(text, return_tensors="pt")).logits[0, -1].argmax()
        hits += int(best) == tokenizer(f" {fact.object.name}")["input_ids"][0]
    assert hits / len(facts) >= 0.95


def test_facts_are_held_where_a_subject_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """After the first four blocks the last token of a name decides the answer, and no other token does."""
    base = LanguageModel.wrap(model, tokenizer)
    world = World()
    relation = world.relations[0]
    subjects = [s for s in world.subjects if s.kind == relation.kind][:120]
    asked = "The mother tongue of {} is"
    rows = [base.encode(asked.format(s.name), subject=(21, 21 + len(s.name))) for s in subjects]
    pairs = [(i, j) for i in range(0, 120, 2) for j in range(i + 1, 120) if len(rows[i].ids) == len(rows[j].ids)][:200]
    pairs = [
        (i, j) for i, j in pairs if world.fact(subjects[i], relation).object != world.fact(subjects[j], relation).object
    ]
    own, other = (collate([rows[pair[k]] for pair in pairs]) for k in range(2))
    site, end = Site(3, "block"), own.at[Token.SUBJECT_LAST]

    def follows(at: torch.Tensor) -> float:
        """Share of prompts whose answer is the other subject's once its vector is put at a position."""
        change = base.read(other, {site: at})[site] - base.read(own, {site: at})[site]
        with base.add(site, at, change):
            found = base.logits(own)[torch.arange(len(pairs)), own.at[Token.PROMPT_LAST]].argmax(-1)
        objects = [world.fact(subjects[j], relation).object.name for _, j in pairs]
        wanted = torch.tensor([tokenizer(f" {name}")["input_ids"][0] for name in objects])
        return float((found == wanted).float().mean())

    assert len(pairs) > 50
    assert follows(end) > 0.9
    assert follows(end + 1) < 0.1
    assert follows(end - 1) < 0.1


def test_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    world = World()
    text = "The mother tongue of Ada Example is"
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert set(encoded) == {"input_ids", "attention_mask", "offset_mapping"}
    assert tokenizer.decode(encoded["input_ids"]) == text
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        assert text[start:end] == tokenizer.decode(token)
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    for relation in world.relations:
        firsts = {tokenizer(f" {obj.name}")["input_ids"][0] for obj in relation.objects}
        assert len(firsts) == len(relation.objects)
    assert min(len(tokenizer(f" {s.name}")["input_ids"]) for s in world.subjects) >= 2
    encode = WordEncoder(tokenizer)
    for document in Corpus(world).texts(300):
        assert encode(document) == tokenizer(document)["input_ids"]
