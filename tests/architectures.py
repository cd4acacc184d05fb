"""Tiny random models of many architectures for exactness tests.

Every entry of the two tables is a factory without arguments that returns a seeded float32 model in
eval mode (transformers is imported when it is called, so collecting tests stays fast).
`ARCHITECTURES` are those the engine must reproduce token by token; `OTHER_ARCHITECTURES` must be
either reproduced or refused with a clear error, and may be missing from older transformers.

What makes the models useful as test subjects:

- large initial weights, random norm weights, biases and attention sinks: attention is peaked, no
  parameter is neutral, so a row more or less in a mask changes the states visibly;
- output rows of log-normal length, scaled so that the logits spread by about 3: candidate sets
  (top-k 40, top-p 0.95) run from one token, emitted unasked, to all 40;
- sliding windows of `WINDOW` = 6 positions, shorter than any prompt of `random_prompt`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Positions a sliding layer sees, the present one included.
WINDOW = 6
# Wanted standard deviation of a row of logits.
LOGIT_SPREAD = 5.0

_SLIDING_FIRST = ["sliding_attention", "full_attention", "sliding_attention"]
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
_BASE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def random_prompt(model: PreTrainedModel, length: int = 16, seed: int = 0) -> list[int]:
    """`length` uniformly random token ids of the model's vocabulary, never ids 0 to 2."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    return torch.randint(3, vocab_size, (length,), generator=generator).tolist()


def output_head(model: PreTrainedModel) -> torch.nn.Module:
    """The module whose weight has a row per token of the vocabulary and makes the logits."""
    head = model.get_output_embeddings()
    return model.get_input_embeddings() if head is None else head


def build(model_type: str, *, seed: int = 0, drop: tuple[str, ...] = (), **settings: Any) -> Any:
    """A tiny random model: `_BASE` without the keys in `drop`, updated by `settings`.

    Returns: `PreTrainedModel`, float32, eval mode; the same weights on every call.
    Raises: what transformers raises when it does not know `model_type` or cannot build it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    shared = {name: value for name, value in _BASE.items() if name not in drop}
    config = AutoConfig.for_model(model_type, **{**shared, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        _randomise(model)
    _spread_logits(model)
    return model


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Moves vectors (norms, biases, sinks) off their neutral values; makes some states sharp."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim <= 1:
            parameter.add_(0.2 * torch.randn_like(parameter))
    weight = output_head(model).weight
    # A few strong columns: how peaked a row of logits is then depends on the state.
    weight.mul_(torch.exp(1.3 * torch.randn(1, weight.shape[1])))
    if weight is model.get_input_embeddings().weight:
        # Small next to what the layers add, or the model would only repeat its last token.
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight.mul_(0.04)


@torch.no_grad()
def _spread_logits(model: PreTrainedModel) -> None:
    """Scales the output head until a row of logits has standard deviation `LOGIT_SPREAD`.

    With tied embeddings the final norm is scaled instead, and the embeddings stay small.
    """
    prompt = torch.tensor([random_prompt(model, 32)])
    head = output_head(model).weight
    tied = head is model.get_input_embeddings().weight
    norm, offset = _final_norm(model) if tied else ([head], 0.0)
    for _ in range(3):
        factor = LOGIT_SPREAD / model(input_ids=prompt, use_cache=False).logits.std(-1).mean()
        for parameter in norm:
            parameter.copy_((parameter + offset) * factor - offset)


def _final_norm(model: PreTrainedModel) -> tuple[list[torch.nn.Parameter], float]:
    """The vectors of the norm before the head, and what the norm adds to them (Gemma: 1)."""
    norms = [
        module
        for name, module in model.named_modules()
        if getattr(module, "weight", torch.empty(0, 0)).ndim == 1
        and not any(part.isdigit() for part in name.split("."))
    ]
    offset = 1.0 if norms[-1].weight.mean() < 0.5 else 0.0
    return list(norms[-1].parameters()), offset


# GPT-2 and its kin name the sizes differently.
_N_NAMES: dict[str, Any] = {
    "drop": tuple(_BASE)[1:7],
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
}
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": partial(build, "llama", seed=1),
    "llama_llama3_rope": partial(build, "llama", seed=2, rope_parameters=_LLAMA3_ROPE),
    "llama_yarn_rope": partial(build, "llama", seed=3, rope_parameters=_YARN_ROPE),
    "llama_tied": partial(
        build, "llama", seed=4, tie_word_embeddings=True, vocab_size=200, num_key_value_heads=1
    ),
    "mistral": partial(
        build, "mistral", seed=5, sliding_window=WINDOW, num_hidden_layers=3, vocab_size=300
    ),
    "mixtral": partial(build, "mixtral", seed=6, num_local_experts=4, num_experts_per_tok=2),
    "qwen2": partial(build, "qwen2", seed=7, vocab_size=192),
    "qwen2_sliding": partial(
        build,
        "qwen2",
        seed=8,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
    ),
    "qwen3": partial(build, "qwen3", seed=9, head_dim=16),
    "qwen3_moe": partial(build, "qwen3_moe", seed=10, **_MOE),
    "gemma": partial(build, "gemma", seed=11, head_dim=16, num_key_value_heads=1),
    # Only eager attention applies the soft-cap; sdpa of some versions drops it silently.
    "gemma2": partial(
        build,
        "gemma2",
        seed=12,
        num_hidden_layers=3,
        head_dim=16,
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        layer_types=_SLIDING_FIRST,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=20.0,
        attn_implementation="eager",
    ),
    "gemma3_text": partial(
        build,
        "gemma3_text",
        seed=13,
        num_hidden_layers=3,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        layer_types=_SLIDING_FIRST,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        },
    ),
    "phi3": partial(build, "phi3", seed=14),
    "olmo": partial(build, "olmo", seed=15, clip_qkv=3.0),
    "olmo2": partial(build, "olmo2", seed=16, vocab_size=129),
    "olmo3": partial(
        build, "olmo3", seed=17, num_hidden_layers=4, sliding_window=WINDOW, vocab_size=128
    ),
    "gpt_neox": partial(build, "gpt_neox", seed=18, drop=("num_key_value_heads",)),
    "gpt2": partial(build, "gpt2", seed=19, **_N_NAMES),
    "granite": partial(
        build,
        "granite",
        seed=20,
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.7,
        attention_multiplier=0.35,
    ),
    "cohere": partial(build, "cohere", seed=21, logit_scale=0.25, use_qk_norm=True),
    "smollm3": partial(build, "smollm3", seed=22, num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0]),
    "gpt_oss": partial(
        build,
        "gpt_oss",
        seed=23,
        num_hidden_layers=3,
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=_SLIDING_FIRST,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "deepseek_v3": partial(build, "deepseek_v3", seed=24, q_lora_rank=28, **_MLA),
}

_SSM: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_d_state": 8}
_LINEAR: dict[str, Any] = {
    "head_dim": 16,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
}

OTHER_ARCHITECTURES: dict[str, Callable[[], Any]] = {
    # Rope whose frequencies depend on the largest position of the batch.
    "llama_dynamic_rope": partial(
        build,
        "llama",
        seed=101,
        max_position_embeddings=20,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    ),
    "phi3_longrope": partial(
        build,
        "phi3",
        seed=102,
        original_max_position_embeddings=20,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
        },
    ),
    # Softmax attention, most of it with a plain key-value cache.
    "afmoe": partial(
        build,
        "afmoe",
        seed=103,
        num_hidden_layers=3,
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=_SLIDING_FIRST,
        **_MOE,
    ),
    "apertus": partial(build, "apertus", seed=104),
    "arcee": partial(build, "arcee", seed=105),
    "bitnet": partial(build, "bitnet", seed=106),
    "bloom": partial(build, "bloom", seed=107, n_layer=2, n_head=4),
    "codegen": partial(build, "codegen", seed=108, rotary_dim=8, **_N_NAMES),
    "cohere2": partial(
        build,
        "cohere2",
        seed=109,
        num_hidden_layers=3,
        sliding_window=WINDOW,
        layer_types=_SLIDING_FIRST,
        logit_scale=0.25,
    ),
    "dbrx": partial(
        build,
        "dbrx",
        seed=110,
        drop=tuple(_BASE)[1:7],
        d_model=48,
        n_heads=4,
        n_layers=2,
        max_seq_len=512,
        attn_config={"kv_n_heads": 2, "clip_qkv": 4.0, "rope_theta": 10000.0},
        ffn_config={"hidden_size": 48, "ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "deepseek_v2": partial(build, "deepseek_v2", seed=111, q_lora_rank=28, **_MLA),
    "diffllama": partial(build, "diffllama", seed=112),
    "dots1": partial(build, "dots1", seed=113, n_shared_experts=1, head_dim=12, **_ROUTED),
    "ernie4_5": partial(build, "ernie4_5", seed=114, head_dim=16),
    "ernie4_5_moe": partial(
        build, "ernie4_5_moe", seed=115, moe_num_experts=4, moe_k=2, moe_intermediate_size=40
    ),
    "exaone4": partial(
        build,
        "exaone4",
        seed=116,
        num_hidden_layers=3,
        sliding_window=WINDOW,
        layer_types=_SLIDING_FIRST,
    ),
    "falcon": partial(build, "falcon", seed=117, drop=("num_key_value_heads",)),
    "falcon_alibi": partial(build, "falcon", seed=118, drop=("num_key_value_heads",), alibi=True),
    "flex_olmo": partial(build, "flex_olmo", seed=119, num_experts=4, num_experts_per_tok=2),
    "gemma3n_text": partial(
        build,
        "gemma3n_text",
        seed=120,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        head_dim=16,
        sliding_window=WINDOW,
        laurel_rank=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=256,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
    ),
    "gemma4_text": partial(
        build,
        "gemma4_text",
        seed=121,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        head_dim=16,
        global_head_dim=16,
        sliding_window=WINDOW,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=256,
    ),
    "glm": partial(build, "glm", seed=122, head_dim=16),
    "glm4": partial(build, "glm4", seed=123, head_dim=16),
    "glm4_moe": partial(build, "glm4_moe", seed=124, head_dim=12, **_ROUTED),
    "gpt_bigcode": partial(build, "gpt_bigcode", seed=125, **_N_NAMES),
    "gpt_neo": partial(
        build,
        "gpt_neo",
        seed=126,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
    ),
    "gptj": partial(build, "gptj", seed=127, rotary_dim=8, **_N_NAMES),
    "granitemoe": partial(
        build, "granitemoe", seed=128, num_local_experts=4, attention_multiplier=0.35
    ),
    "granitemoeshared": partial(
        build, "granitemoeshared", seed=129, num_local_experts=4, shared_intermediate_size=40
    ),
    "helium": partial(build, "helium", seed=130, head_dim=12),
    "hunyuan_v1_dense": partial(build, "hunyuan_v1_dense", seed=131, head_dim=12),
    "hunyuan_v1_moe": partial(
        build, "hunyuan_v1_moe", seed=132, head_dim=12, num_experts=4, moe_topk=2
    ),
    "jetmoe": partial(
        build, "jetmoe", seed=133, kv_channels=12, num_local_experts=4, num_experts_per_tok=2
    ),
    # Attention within chunks, no rope in some layers.
    "llama4_text": partial(
        build,
        "llama4_text",
        seed=134,
        head_dim=12,
        intermediate_size_mlp=80,
        num_local_experts=4,
        attention_chunk_size=8,
        no_rope_layers=[1, 0],
    ),
    # Two attentions in one layer.
    "longcat_flash": partial(
        build,
        "longcat_flash",
        seed=135,
        drop=("intermediate_size", "num_hidden_layers", "num_key_value_heads"),
        num_layers=2,
        ffn_hidden_size=80,
        q_lora_rank=28,
        kv_lora_rank=24,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        head_dim=8,
        v_head_dim=20,
        moe_topk=2,
        n_routed_experts=4,
        zero_expert_num=2,
        expert_ffn_hidden_size=40,
    ),
    "minimax_m2": partial(
        build, "minimax_m2", seed=136, head_dim=12, num_local_experts=4, num_experts_per_tok=2
    ),
    "ministral": partial(
        build,
        "ministral",
        seed=137,
        head_dim=12,
        num_hidden_layers=3,
        sliding_window=WINDOW,
        layer_types=_SLIDING_FIRST,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "ministral3": partial(build, "ministral3", seed=138),
    "mpt": partial(build, "mpt", seed=139, d_model=48, n_heads=4, n_layers=2),
    "nanochat": partial(build, "nanochat", seed=140),
    "nemotron": partial(build, "nemotron", seed=141),
    "olmoe": partial(build, "olmoe", seed=142, num_experts=4, num_experts_per_tok=2),
    "opt": partial(build, "opt", seed=143, ffn_dim=80, word_embed_proj_dim=48, init_std=0.2),
    "persimmon": partial(build, "persimmon", seed=144),
    "phi": partial(build, "phi", seed=145),
    "phimoe": partial(build, "phimoe", seed=146, num_local_experts=4),
    "qwen2_moe": partial(build, "qwen2_moe", seed=147, shared_expert_intermediate_size=40, **_MOE),
    "seed_oss": partial(build, "seed_oss", seed=148, head_dim=16),
    "stablelm": partial(build, "stablelm", seed=149, hidden_size=64),
    "starcoder2": partial(build, "starcoder2", seed=150, sliding_window=WINDOW),
    "vaultgemma": partial(
        build,
        "vaultgemma",
        seed=151,
        num_hidden_layers=3,
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=_SLIDING_FIRST,
        attn_implementation="eager",
    ),
    "xglm": partial(
        build, "xglm", seed=152, d_model=48, ffn_dim=80, num_layers=2, attention_heads=4
    ),
    # Recurrence, convolutions, linear attention: no key-value cache will do.
    "bamba": partial(build, "bamba", seed=201, attn_layer_indices=[1], **_SSM),
    "falcon_h1": partial(
        build, "falcon_h1", seed=202, mamba_d_ssm=96, mamba_chunk_size=8, head_dim=12, **_SSM
    ),
    "falcon_mamba": partial(build, "falcon_mamba", seed=203),
    "granitemoehybrid": partial(
        build,
        "granitemoehybrid",
        seed=204,
        layer_types=["mamba", "attention"],
        num_local_experts=4,
        **_SSM,
    ),
    "jamba": partial(build, "jamba", seed=205, attn_layer_period=2, attn_layer_offset=1),
    "lfm2": partial(build, "lfm2", seed=206, layer_types=["conv", "full_attention"]),
    "mamba": partial(build, "mamba", seed=207),
    "mamba2": partial(
        build, "mamba2", seed=208, num_heads=4, head_dim=24, state_size=8, n_groups=1
    ),
    "minimax": partial(build, "minimax", seed=209, num_local_experts=4, block_size=8),
    "nemotron_h": partial(
        build,
        "nemotron_h",
        seed=210,
        drop=("num_hidden_layers",),
        layers_block_type=["mamba", "attention", "moe"],
        head_dim=12,
        mamba_num_heads=4,
        mamba_head_dim=24,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=8,
        n_routed_experts=4,
        moe_intermediate_size=40,
        moe_shared_expert_intermediate_size=40,
    ),
    "olmo_hybrid": partial(
        build, "olmo_hybrid", seed=211, layer_types=["linear_attention", "full_attention"]
    ),
    "qwen3_5_text": partial(build, "qwen3_5_text", seed=212, **_LINEAR),
    "qwen3_next": partial(
        build, "qwen3_next", seed=213, shared_expert_intermediate_size=40, **_MOE, **_LINEAR
    ),
    "recurrent_gemma": partial(
        build,
        "recurrent_gemma",
        seed=214,
        num_hidden_layers=3,
        attention_window_size=WINDOW,
        lru_width=48,
    ),
    "rwkv": partial(build, "rwkv", seed=215),
    "xlstm": partial(build, "xlstm", seed=216, num_heads=4),
    "zamba2": partial(
        build,
        "zamba2",
        seed=217,
        layers_block_type=["mamba", "hybrid"],
        mamba_d_state=8,
        n_mamba_heads=4,
        chunk_size=8,
        adapter_rank=8,
    ),
}
