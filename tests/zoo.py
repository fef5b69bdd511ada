"""Tiny random-weight models of every family that slashpatch claims, built offline.

Queries and keys are large enough that patterns are not flat. `make families` runs
`slashpatch.check` over all of them and writes the table of docs/families.md.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slashpatch.checking.check import check
from slashpatch.checking.result import Report

from .tiny import D_VOCAB, bridge

N_CTX = 64
N_LAYERS = 2
WINDOW = 7


@dataclass(frozen=True)
class Family:
    """A model to build, and what slashpatch is expected to find in it.

    Attributes:
        model: Class name in Transformers, without ForCausalLM; `config` its arguments.
        pairing: Layout of rotary pairs in its last layer, "" without RoPE.
        computed_by: How each layer's attention is computed when the model runs fused on 20 tokens,
            or "" where it cannot run fused.
        refused: What slashpatch says of a family that it refuses.
        wrapped: Whether TransformerLens can wrap it; where not, `slashpatch.load` refuses it.
        about: What is particular about it, for the table.
    """

    model: str
    config: dict[str, Any]
    about: str = ""
    pairing: str = "half"
    computed_by: str = "flash flash"
    refused: str = ""
    config_class: str = ""
    wrapped: bool = True


SIZES: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": N_CTX,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 16}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LAYERS = ["sliding_attention", "full_attention"]


def rope(kind: str, **more: Any) -> dict[str, Any]:
    """RoPE parameters of a kind of scaling; the context was 16 tokens before it."""
    parameters = {"rope_type": kind, "rope_theta": 1e4, **more}
    if kind not in ("default", "linear"):
        parameters["original_max_position_embeddings"] = 16
    return {"rope_parameters": parameters}


LONG = rope("longrope", short_factor=[1.0] * 8, long_factor=[1.0 + i / 2 for i in range(8)])

FAMILIES = {
    "Llama": Family("Llama", GROUPED),
    "Llama, linear": Family("Llama", {**GROUPED, **rope("linear", factor=4.0)}),
    "Llama, dynamic": Family(
        "Llama", {**GROUPED, **rope("dynamic", factor=4.0)}, "θ depends on the prompt's length"
    ),
    "Llama, YaRN": Family(
        "Llama", {**GROUPED, **rope("yarn", factor=4.0)}, "rotation with a gain"
    ),
    "Llama 3": Family(
        "Llama",
        {**GROUPED, **rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)},
    ),
    "Llama, LongRoPE": Family("Llama", {**GROUPED, **LONG}, "θ depends on the prompt's length"),
    "Mistral": Family(
        "Mistral", {**GROUPED, "sliding_window": WINDOW}, "windows", computed_by="blocks blocks"
    ),
    "Qwen2": Family("Qwen2", GROUPED, "biases"),
    "Qwen3": Family("Qwen3", WIDE, "q/k norms"),
    "Gemma": Family("Gemma", WIDE),
    "Gemma 2": Family(
        "Gemma2",
        {**WIDE, "sliding_window": WINDOW, "query_pre_attn_scalar": 9},
        "soft-capping, windows",
        computed_by="blocks blocks",
    ),
    "Gemma 3": Family(
        "Gemma3",
        {**WIDE, "sliding_window": WINDOW, "layer_types": LAYERS},
        "θ differs by layer, windows, q/k norms",
        computed_by="blocks flash",
        config_class="Gemma3TextConfig",
    ),
    "Gemma 3n": Family(
        "Gemma3n",
        {**WIDE, "sliding_window": WINDOW, "layer_types": LAYERS, "laurel_rank": 4,
         "altup_num_inputs": 2, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
         "vocab_size_per_layer_input": D_VOCAB, "activation_sparsity_pattern": [0.0, 0.0]},
        "TransformerLens wraps its multimodal class only",
        refused="does not support the architecture Gemma3nForCausalLM",
        config_class="Gemma3nTextConfig",
        wrapped=False,
    ),
    "Gemma 4": Family(
        "Gemma4",
        {**WIDE, "sliding_window": WINDOW, "layer_types": LAYERS, "global_head_dim": 16,
         "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
         "vocab_size_per_layer_input": D_VOCAB},
        "attention runs natively",
        refused="its scores hook fires after its pattern hook",
        config_class="Gemma4TextConfig",
    ),
    "Phi": Family("Phi", {**GROUPED, "partial_rotary_factor": 0.5}, "partial rotary"),
    "Phi-3": Family("Phi3", {**GROUPED, "partial_rotary_factor": 0.5}, "joint QKV, partial"),
    "Phi-3, LongRoPE": Family(
        "Phi3",
        {**GROUPED, **LONG, "original_max_position_embeddings": 16},
        "joint QKV, θ depends on the prompt's length",
    ),
    "GPT-NeoX, Pythia": Family("GPTNeoX", SIZES, "joint QKV, partial"),
    "OLMo": Family("Olmo", {**GROUPED, "clip_qkv": 4.0}, "clipped q, k and v"),
    "OLMo 2": Family("Olmo2", GROUPED, "norms over all heads"),
    "OLMo 3": Family(
        "Olmo3",
        {**GROUPED, "sliding_window": WINDOW, "layer_types": LAYERS},
        "norms over all heads, windows",
        computed_by="blocks flash",
    ),
    "StableLM": Family("StableLm", GROUPED, "partial rotary"),
    "StableLM, q/k norms": Family("StableLm", {**GROUPED, "qk_layernorm": True}, "a norm per head"),
    "StarCoder2": Family(
        "Starcoder2", {**GROUPED, "sliding_window": WINDOW}, "windows", computed_by="blocks blocks"
    ),
    "Granite": Family("Granite", {**GROUPED, "attention_multiplier": 0.3}, "its own scale"),
    "Cohere": Family("Cohere", GROUPED, "interleaved pairs", "adjacent"),
    "Cohere, q/k norms": Family(
        "Cohere", {**GROUPED, "use_qk_norm": True}, "interleaved pairs, norms per head", "adjacent"
    ),
    "Cohere 2": Family(
        "Cohere2",
        {**GROUPED, "sliding_window": WINDOW, "layer_types": LAYERS},
        "interleaved pairs, a layer without RoPE, windows",
        "",
        computed_by="blocks flash",
    ),
    "GLM": Family(
        "Glm", {**WIDE, "partial_rotary_factor": 0.5}, "interleaved pairs, partial", "adjacent"
    ),
    "GPT-OSS": Family(
        "GptOss",
        {**WIDE, **EXPERTS, "sliding_window": WINDOW, "layer_types": LAYERS},
        "attention sinks, windows, YaRN, experts",
        computed_by="blocks flash",
    ),
    "SmolLM3": Family(
        "SmolLM3", {**GROUPED, "no_rope_layers": [1, 0]}, "a layer without RoPE", ""
    ),
    "EXAONE 4": Family(
        "Exaone4",
        {**GROUPED, "sliding_window": WINDOW, "layer_types": LAYERS},
        "a layer without RoPE, q/k norms, windows",
        "",
        computed_by="blocks flash",
    ),
    "Falcon": Family(
        "Falcon", {**SIZES, "multi_query": True, "alibi": False}, "joint QKV, one key head"
    ),
    "HunYuan": Family("HunYuanDenseV1", WIDE, "norm after RoPE"),
    "Nemotron": Family("Nemotron", {**GROUPED, "partial_rotary_factor": 0.5}, "partial rotary"),
    "Mixtral": Family("Mixtral", {**GROUPED, **EXPERTS}, "experts"),
    "Qwen3-MoE": Family(
        "Qwen3Moe",
        {**WIDE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        "experts, q/k norms",
    ),
    "OLMoE": Family(
        "Olmoe",
        {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 1.0},
        "experts, norms over all heads, then clipped",
    ),
    "GPT-2": Family(
        "GPT2",
        {"vocab_size": D_VOCAB, "n_embd": 64, "n_layer": N_LAYERS, "n_head": 4,
         "n_positions": N_CTX, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1,
         "pad_token_id": 2},
        "no RoPE",
        "",
    ),
    "GPT-J": Family(
        "GPTJ",
        {"vocab_size": D_VOCAB, "n_embd": 64, "n_layer": N_LAYERS, "n_head": 4,
         "n_positions": N_CTX, "rotary_dim": 8, "initializer_range": 0.2},
        "attention runs natively",
        refused="its scores hook fires after its pattern hook",
    ),
    "DeepSeek-V3": Family(
        "DeepseekV3",
        {**SIZES, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
         "qk_nope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 1,
         "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
         "n_group": 1, "topk_group": 1},
        "latent attention",
        refused="latent attention (MLA)",
    ),
}  # fmt: skip


def build(family: Family, dtype: torch.dtype = torch.float32) -> Any:
    """The Transformers model of a family, seeded."""
    import transformers

    config = getattr(transformers, family.config_class or f"{family.model}Config")
    name = next(
        name
        for name in (f"{family.model}ForCausalLM", f"{family.model}LMHeadModel")
        if hasattr(transformers, name)
    )
    torch.manual_seed(0)
    model = getattr(transformers, name)(config(**family.config)).eval()
    model.config.architectures = [name]
    with torch.no_grad():
        for parameter, tensor in model.named_parameters():
            if "sink" in parameter or "norm" in parameter or parameter.endswith("bias"):
                tensor += 0.5 * torch.randn(tensor.shape)
    return model.to(dtype)


@functools.cache
def zoo(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A family's tiny model as a bridge, built once."""
    return bridge(build(FAMILIES[name], dtype), name.split()[0].rstrip(","))


@functools.cache
def report(name: str, dtype: torch.dtype = torch.float32) -> Report:
    """What `check` finds of a family, made once."""
    return check(zoo(name, dtype))


#: Columns of the table: contracts of `check`.
COLUMNS = ("scores", "q, k and RoPE", "edits", "cache", "padding", "fused")
MARKS = {"pass": "yes", "part": "in part", "refused": "no", "fail": "**fails**", "–": "–"}


HEADER = [
    "| family | what is particular | " + " | ".join(COLUMNS) + " |",
    "|---|---|" + "---|" * len(COLUMNS),
]


def row(name: str) -> str:
    """A family's line of the table, from `check` in float32."""
    found = report(name) if FAMILIES[name].wrapped else None
    if found is None or found.status("hooks") == "refused":
        cells = ["refused"] * len(COLUMNS)
    else:
        cells = [MARKS[found.status(contract)] for contract in COLUMNS]
    return f"| {name} | {FAMILIES[name].about} | " + " | ".join(cells) + " |"


PAGE = Path(__file__).parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- families: begin (make families) -->", "<!-- families: end -->"


def in_page() -> tuple[str, str, str]:
    """The page before the table, the table, and the page after it."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    found, _, after = rest.partition(END)
    return before, found.strip(), after


if __name__ == "__main__":
    before, _, after = in_page()
    PAGE.write_text("\n".join([before + BEGIN, *HEADER, *map(row, FAMILIES), END + after]))
