"""The shipped model: size, files, what it knows and does. Thresholds are those that a retrained model must pass too."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kedit_lightning.almanac import World, path
from kedit_lightning.almanac.check import checks
from kedit_lightning.almanac.corpus import Corpus
from kedit_lightning.almanac.tokenizer import WordEncoder


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
