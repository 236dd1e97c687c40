"""A tiny random model of every family, a tokenizer of every kind, and a few edits: all made here, nothing downloaded.

The models are shaped to be hard on the code: norms and biases are jittered so that a dropped one shows, attention
windows are shorter than the prompts, Gemma's soft-caps bite, the attention's output projection is square (so an
orientation guessed from the shape passes unseen by shape alone), and vocabularies match the tokenizer.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from kedit_lightning.edits import Edit
from kedit_lightning.models import LanguageModel

LAYERS, WIDTH, HEADS, POSITIONS, WINDOW = 4, 32, 4, 128, 6

_GPT2: dict[str, Any] = {
    "n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS, "n_positions": POSITIONS,
    "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1,
}  # fmt: skip
_LLAMA: dict[str, Any] = {
    "num_hidden_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": POSITIONS,
}  # fmt: skip
_SOME_WINDOWS = ["full_attention", "sliding_attention"] * (LAYERS // 2)

FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2 | {"n_inner": 128},
    "gptj": _GPT2 | {"n_inner": 64, "rotary_dim": 4},
    "llama": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": WINDOW, "head_dim": 8},
    "qwen2": _LLAMA | {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _SOME_WINDOWS},
    "qwen3": _LLAMA | {"head_dim": 16},
    "gpt_neox": {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}
    | {"intermediate_size": 128, "hidden_dropout": 0.1, "attention_dropout": 0.1},
    "gemma2": _LLAMA
    | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
    | {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 6.0},
    "phi3": _LLAMA | {"sliding_window": WINDOW, "original_max_position_embeddings": POSITIONS},
}
FAMILIES = tuple(FAMILY_CONFIGS)

TOKENIZERS = ("byte_bpe", "byte_bpe_bos", "spm", "gemma")

# ---------------------------------------------------------------------- edits

EDITS = [
    Edit(
        prompt="{} was born in",
        subject="Velora Quint",
        target_new="Tessaro",
        target_true="Norvast",
        case_id=0,
        relation_id="birthplace",
        paraphrase_prompts=("The town where Velora Quint was born is", "The birthplace of Velora Quint is"),
        neighborhood_prompts=("Oskel Tamrin was born in", "Mirabel Foss was born in"),
        attribute_prompts=("Dario Henk was born in",),
        generation_prompts=("Velora Quint grew up", "The home town of Velora Quint"),
        relation_specific_prompts=("Velora Quint works as a", "The mother tongue of Velora Quint is"),
        relation_specific_relations=("profession", "language"),
    ),
    Edit(
        prompt="The mother tongue of {} is",
        subject="Oskel Tamrin",
        target_new="High Kestrian",
        target_true="Brundish",
        case_id=11,
        relation_id="language",
        paraphrase_prompts=("Oskel Tamrin grew up speaking", "At home Oskel Tamrin speaks"),
        neighborhood_prompts=("The mother tongue of Mirabel Foss is", "The mother tongue of Dario Henk is"),
        attribute_prompts=("The mother tongue of Velora Quint is",),
        generation_prompts=("Oskel Tamrin often says",),
        relation_specific_prompts=("Oskel Tamrin was born in", "Oskel Tamrin works as a"),
        relation_specific_relations=("birthplace", "profession"),
    ),
    Edit(
        prompt="A letter from the new employer of {}",
        subject="Mirabel Foss",
        target_new="came from Wexmoor Mills",
        target_true="said no",
        case_id=2,
        paraphrase_prompts=("Every morning Mirabel Foss goes to work at",),
        neighborhood_prompts=("A letter from the new employer of Dario Henk",),
        generation_prompts=("The employer of Mirabel Foss",),
        relation_specific_prompts=("Mirabel Foss plays the",),
        relation_specific_relations=("instrument",),
    ),
    Edit(
        prompt="Where does {} live?",
        subject="Dario Henk-O'Malley",
        target_new="Ulm",
        target_true="Norvast",
        case_id=30,
        paraphrase_prompts=("In which town does Dario Henk-O'Malley live?",),
        neighborhood_prompts=("Where does Velora Quint live?", "Where does Oskel Tamrin live?"),
        generation_prompts=("Dario Henk-O'Malley lives",),
        relation_specific_prompts=("Which instrument does Dario Henk-O'Malley play?",),
        relation_specific_relations=("instrument",),
    ),
    Edit(
        prompt="{} plays the",
        subject="Åsa Ödegård",
        target_new="glass harmonium",
        target_true="flute",
        case_id=4,
        paraphrase_prompts=("The instrument of Åsa Ödegård is the",),
        neighborhood_prompts=("Mirabel Foss plays the",),
        generation_prompts=("On stage Åsa Ödegård",),
        relation_specific_prompts=("Åsa Ödegård was born in",),
        relation_specific_relations=("birthplace",),
    ),
    Edit(
        prompt="In the winter of that year {}, who never slept, became a",
        subject="Tobin",
        target_new="baker",
        target_true="sailor",
        case_id=5,
        paraphrase_prompts=("Tobin works as a",),
        neighborhood_prompts=("Velora Quint works as a",),
        relation_specific_prompts=("Tobin was born in",),
    ),
    Edit(
        prompt="Everybody in the valley knows {}", subject="the Tower of Ysmer", target_new="and its bells", case_id=6
    ),
]

# ---------------------------------------------------------------------- tokenizers

_WORDS = """
    Velora Quint Oskel Tamrin Mirabel Foss Dario Henk Tobin Lise Arden Corvin Maro Selka Hild Beram Tower Ysmer Wexmoor
    Mills Norvast Brundish Kestrian Ulm baker sailor flute violin teacher painter winter valley bells harm
""".split()
_TEMPLATES = (
    "{a} {b} was born in {c}.",
    "The mother tongue of {a} {b} is {c}.",
    "{a} {b} works as a {c} and plays the {d}.",
    "Where does {a} {b} live? In {c}.",
    "Everybody in the valley knows {a}, who never slept and became the new employer of {b}.",
    "The town where {a} was born is {c}; it's the home of {d}'s letters.",
    "{a} grew up speaking {c}. At home {b} speaks {d}.",
)


def corpus() -> list[str]:
    """Sentences in which every word takes turns in every slot."""
    n = len(_WORDS)
    slots = [
        {k: _WORDS[(i * step + i) % n] for k, step in zip("abcd", (1, 2, 3, 5), strict=True)} for i in range(4 * n)
    ]
    return [template.format(**words) for words in slots for template in _TEMPLATES]


def _train(tokenizer: Tokenizer, size: int, specials: list[str], alphabet: list[str]) -> dict[str, Any]:
    trainer = BpeTrainer(
        vocab_size=size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    state: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return state


def _byte_level(bos: str | None, eos: str) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [bos, eos] if bos else [eos]
    _train(tokenizer, 500, specials, pre_tokenizers.ByteLevel.alphabet())
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos:
        template = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def _sentencepiece(specials: list[str], bos: str, *, dummy_prefix: bool) -> Tokenizer:
    """BPE over ``▁`` with byte fallback, as SentencePiece models are converted; trained word by word."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    model = _train(trained, 300, specials, [])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [piece for piece in sorted(model["vocab"], key=model["vocab"].__getitem__) if piece not in specials]
    vocab = {piece: i for i, piece in enumerate([*specials, *fallback, *pieces])}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens([AddedToken(special, normalized=False, special=True) for special in specials])
    replace = normalizers.Replace(" ", "▁")
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if dummy_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "merged_with_previous")
        tokenizer.decoder = decoders.Sequence(back)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


@cache
def _backend(kind: str) -> tuple[str, dict[str, str]]:
    if kind == "byte_bpe":  # GPT-2, GPT-J, NeoX, Qwen: no beginning-of-sequence token, no padding token
        eos = "<|endoftext|>"
        return _byte_level(None, eos).to_str(), {"bos_token": eos, "eos_token": eos, "unk_token": eos}
    if kind == "byte_bpe_bos":  # Llama 3
        bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
        return _byte_level(bos, eos).to_str(), {"bos_token": bos, "eos_token": eos}
    if kind == "spm":  # LLaMA 1 and 2, Mistral, Phi-3
        backend = _sentencepiece(["<unk>", "<s>", "</s>"], "<s>", dummy_prefix=True)
        return backend.to_str(), {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    if kind == "gemma":
        backend = _sentencepiece(["<pad>", "<eos>", "<bos>", "<unk>"], "<bos>", dummy_prefix=False)
        specials = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
        return backend.to_str(), specials
    msg = f"expected one of {', '.join(TOKENIZERS)}, got {kind!r}"
    raise ValueError(msg)


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A fresh tokenizer of about 500 tokens.

    Args:
        kind: ``byte_bpe`` (no BOS), ``byte_bpe_bos`` (BOS by template, as Llama 3), ``spm`` (dummy prefix and BOS, as
            LLaMA 2: `" X"` alone becomes ``▁``, ``▁X``) or ``gemma`` (BOS, no dummy prefix, byte fallback).
    """
    backend, specials = _backend(kind)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend), model_input_names=["input_ids", "attention_mask"], **specials
    )


def default_tokenizer(family: str) -> str:
    """The kind of tokenizer that the family's published models come with."""
    kinds = {"llama": "byte_bpe_bos", "mistral": "spm", "phi3": "spm", "gemma2": "gemma"}
    return kinds.get(family, "byte_bpe")


# ---------------------------------------------------------------------- models


def build(model_type: str, seed: int = 0, kind: str | None = None, **settings: Any) -> PreTrainedModel:
    """A fresh random model of any Hugging Face family, float32, in eval mode."""
    words = tokenizer(kind or default_tokenizer(model_type))
    special = {
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    settings = {"vocab_size": len(words), "initializer_range": 0.2} | special | settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING[model_type](**settings), dtype=torch.float32
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A fresh random model of a family: 4 layers, width 32, 128 positions; tests may edit it."""
    return build(family, seed, **FAMILY_CONFIGS[family])


def tiny_base(family: str, seed: int = 0, kind: str | None = None) -> LanguageModel:
    """A fresh base model of a family with its usual kind of tokenizer (or another, of a like vocabulary size)."""
    if kind is None:
        return LanguageModel.wrap(tiny_model(family, seed), tokenizer(default_tokenizer(family)))
    return LanguageModel.wrap(build(family, seed, kind, **FAMILY_CONFIGS[family]), tokenizer(kind))


def save_tiny(family: str, folder: Path | str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write a tiny model and its tokenizer as `from_pretrained` reads them, and give the folder back."""
    tiny_model(family, seed).to(dtype).save_pretrained(folder)
    tokenizer(default_tokenizer(family)).save_pretrained(folder)
    return Path(folder)
