"""What is measured: random models in the shapes of published ones, and agents of a known profile.

A random model with a random agent decodes nothing that makes sense, as fast as a trained one
does. What speed depends on beside the shape is how often a position has a single candidate, and
which rank is accepted; both are set, and measured with every figure.
"""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mara_fast.agent import MaraAgent
from mara_fast.engine import Engine
from mara_fast.outputs import DecodingStats, Generation

VOCAB_SIZE = 32000
SHAPES: dict[str, dict[str, int]] = {
    "50m": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": VOCAB_SIZE,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-3.2-3b": {
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "mistral-7b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32768,
    },
    "aligner-7b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
}
"""Sizes by name. Heads are not tied to embeddings here: the head is scaled by itself."""

_MAX_POSITIONS = 32768


def random_llama(
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **sizes: Any,
) -> LlamaForCausalLM:
    """A random Llama whose states vary with the text.

    Args:
        seed: of the weights.
        dtype: of the weights.
        device: where they are made.
        sizes: of :class:`LlamaConfig`, over those of the shape "50m".
    """
    sizes = SHAPES["50m"] | sizes
    config = LlamaConfig(
        max_position_embeddings=_MAX_POSITIONS,
        initializer_range=0.05,
        tie_word_embeddings=False,
        **sizes,
    )
    default = torch.get_default_dtype()
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=devices), torch.device(device):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


def calibrate(
    model: LlamaForCausalLM, prompts: list[list[int]], *, forced: float, rank0: float = 0.7
) -> MaraAgent:
    """Scales the head, and makes an agent, to a profile that the engine measures.

    Args:
        model: whose head is scaled in place.
        prompts: token ids that the profile is measured on.
        forced: share of the positions with a single candidate.
        rank0: share of the others where rank 0 is accepted.
    """
    weight = model.lm_head.weight
    generator = torch.Generator().manual_seed(0)
    head = weight.clone()
    # Rows of unequal length: some states then have one clear successor, others many.
    lengths = torch.exp(0.35 * torch.randn(len(weight), 1, generator=generator))
    head *= lengths.to(weight)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        agent = MaraAgent(model.config.hidden_size).requires_grad_(False)
    agent.output_linear.weight.mul_(30)
    agent.output_linear.bias[1] += 20
    engine = Engine(model, agent, False, max_batch_size=len(prompts))

    def decode(**options: Any) -> list[Generation]:
        return engine.generate(prompts, max_new_tokens=32, ignore_eos=True, window=1, **options)

    low, high = 0.5, 32.0
    for _ in range(10):
        scale = (low + high) / 2
        weight.copy_(head * scale)
        stats = sum((result.stats for result in decode()), DecodingStats())
        share = stats.num_forced / stats.num_tokens
        if abs(share - forced) < 0.01:
            break
        low, high = (scale, high) if share < forced else (low, scale)

    # Which text is decoded depends on the bias, so approach it in a few steps.
    for _ in range(4):
        accept_probs = [
            token.candidates[0].accept_prob
            for result in decode(trace=True)
            for token in result.trace or ()
            if token.verdict != "forced"
        ]
        accept_logits = torch.tensor(accept_probs, dtype=torch.float64).logit()
        agent.output_linear.bias[1] -= accept_logits.quantile(1 - rank0).item()
    return agent
