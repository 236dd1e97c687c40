"""Where attention, MLP and embeddings live in each Hugging Face model family: one line a family."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Architecture:
    """Module paths of one model family.

    Args:
        layers: The list of decoder blocks, from the causal language model.
        attn: The attention sub-block, from a block.
        mlp: The MLP sub-block, from a block.
        attn_out: The attention's output projection, from a block.
        mlp_out: The MLP's down-projection, from a block.
        embed: The token embedding, from the causal language model.
        mlp_in: The MLP's up-projection, from a block; only what edits it (MEND) needs it.
    """

    layers: str
    attn: str
    mlp: str
    attn_out: str
    mlp_out: str
    embed: str
    mlp_in: str = ""


_LLAMA = Architecture(
    "model.layers", "self_attn", "mlp", "self_attn.o_proj", "mlp.down_proj", "model.embed_tokens", "mlp.up_proj"
)  # fmt: skip
ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture("transformer.h", "attn", "mlp", "attn.c_proj", "mlp.c_proj", "transformer.wte", "mlp.c_fc"),
    "gptj": Architecture("transformer.h", "attn", "mlp", "attn.out_proj", "mlp.fc_out", "transformer.wte", "mlp.fc_in"),
    "gpt_neox": Architecture(
        "gpt_neox.layers",
        "attention",
        "mlp",
        "attention.dense",
        "mlp.dense_4h_to_h",
        "gpt_neox.embed_in",
        "mlp.dense_h_to_4h",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _LLAMA,
    "phi3": replace(_LLAMA, mlp_in="mlp.gate_up_proj"),
}
