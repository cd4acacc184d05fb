"""The check at construction in half precision: rounding of a deep model passes, mistakes do not."""

import dataclasses

import pytest
import torch
from transformers import LlamaForCausalLM

import mara_fast.self_check
from mara_fast.bench.model import random_llama
from mara_fast.language_model import FrozenLM, UnsupportedModelError
from mara_kernels.attention import Tree


@pytest.fixture(scope="module")
def deep() -> LlamaForCausalLM:
    """Its layers carry a rounding as far as those of an 8B-shaped random model."""
    return random_llama(
        dtype=torch.bfloat16,
        hidden_size=768,
        num_hidden_layers=40,
        intermediate_size=1024,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=512,
    )


def test_rounding_is_no_mistake(deep: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    # How far it rounds is a matter of torch's version: never less than this.
    monkeypatch.setattr("mara_fast.self_check._HALF_TOLERANCE", 0.01)
    lm = FrozenLM(deep, attention="candidate")
    assert lm.can_pack
    monkeypatch.setattr("mara_fast.self_check._MOST_TOLERANCE", 0.01)
    with pytest.raises(UnsupportedModelError, match="differ from a plain forward by 0"):
        FrozenLM(deep, attention="candidate")


def test_a_wrong_position_is_one(deep: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    original = mara_fast.self_check.siblings

    def siblings(num_rows: int, device: torch.device) -> Tree:
        tree = original(num_rows, device)
        return dataclasses.replace(tree, depths=tree.depths + 1)

    monkeypatch.setattr(mara_fast.self_check, "siblings", siblings)
    with pytest.raises(UnsupportedModelError, match="differ from a plain forward"):
        FrozenLM(deep, attention="candidate")
