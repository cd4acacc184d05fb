"""What the stages decode with: random models in published shapes, made where they run."""

from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM
from transformers.utils import logging

from mara_fast import DecodingConfig, MaraAgent, tiny
from mara_fast.bench.model import SHAPES, calibrate, random_llama
from mara_fast.prompts import encode_prompts
from mara_fast.tiny.grammar import instructions

NANO = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 500,
}
"""Sizes for a rehearsal on a CPU."""

_PROFILED = 8
"""Prompts that an agent's profile is measured on."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, its agent, and prompts as token ids."""

    name: str
    model: LlamaForCausalLM
    agent: MaraAgent
    prompts: list[list[int]]


def random_subject(
    shape: str, *, device: torch.device, dtype: torch.dtype, num_prompts: int, length: int = 64
) -> Subject:
    """A random model with an agent of the paper's profile.

    Args:
        shape: one of the benchmark's, or ``"nano"``.
        device: where both are made.
        dtype: of the model.
        num_prompts: of random tokens.
        length: tokens of each.
    """
    logging.set_verbosity_error()
    sizes = NANO if shape == "nano" else SHAPES[shape]
    model = random_llama(dtype=dtype, device=device, **sizes)
    generator = torch.Generator().manual_seed(1)
    size = (max(num_prompts, _PROFILED), length)
    prompts = torch.randint(sizes["vocab_size"], size, generator=generator).tolist()
    agent = calibrate(model, prompts[:_PROFILED], forced=0.33).to(device)
    return Subject(name=shape, model=model, agent=agent, prompts=prompts[:num_prompts])


def tiny_subject(*, device: torch.device, num_prompts: int) -> Subject:
    """The embedded model, trained, with its agent and instructions of its world; float32."""
    model, tokenizer = tiny.load()
    texts = [one.text for one in instructions(split="heldout")[:num_prompts]]
    encoded = encode_prompts(
        texts,
        tokenizer=tokenizer,
        prompt_format=DecodingConfig().prompt_format,
        vocab_size=model.config.vocab_size,
    )
    agent = MaraAgent.from_pretrained(tiny.AGENT_PATH)
    return Subject(
        name="tiny",
        model=model.to(device),
        agent=agent.to(device),
        prompts=[ids for _, ids in encoded],
    )
