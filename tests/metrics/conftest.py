import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from kedit_lightning.edits import Edit
from kedit_lightning.models import LanguageModel


def tiny(**config) -> LanguageModel:
    """A random GPT-2 of four layers over single bytes, with an end-of-text token and no other special one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    torch.manual_seed(0)
    settings = {"n_positions": 128, "n_embd": 32, "n_layer": 4, "n_head": 2, "initializer_range": 0.2, **config}
    settings |= {"bos_token_id": None, "eos_token_id": fast.eos_token_id}
    return LanguageModel.wrap(GPT2LMHeadModel(GPT2Config(vocab_size=len(fast), **settings)), fast)


@pytest.fixture(scope="session")
def base():
    return tiny()


@pytest.fixture
def edits():
    return [
        Edit(
            "The mother tongue of {} is",
            "Ann Example",
            "Dutch",
            "Greek",
            case_id=7,
            relation_id="P103",
            target_new_id="Q1",
            paraphrase_prompts=("Ann Example spoke the language", "Of old. Ann Example speaks"),
            neighborhood_prompts=("Bob Other is a native speaker of", "The mother tongue of Cy is", "Di speaks"),
            generation_prompts=("Ann Example lives in", "Ann Example lives in"),
            relation_specific_prompts=("Ann Example works as", "Ann Example plays the", "Ann Example was born in"),
            relation_specific_relations=("P106", "P1303", "P19"),
        ),
        Edit("{} plays the", "Ann Example", "cello", "oboe", case_id=8, relation_id="P1303"),
        Edit(
            "What is the capital of {}?",
            "Nowhere",
            "Tree Hill",
            case_id=9,
            paraphrase_prompts=("Which city is Nowhere's capital?",),
            neighborhood_prompts=("nq question: who sang it?",),
            neighborhood_targets=("the band",),
        ),
    ]
