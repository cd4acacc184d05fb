"""Truncation against the definition in float64-free plain Python, and its corner cases."""

import pytest
import torch

import oracle
from mara_kernels.truncate import truncate


def rows(kind: str, vocab_size: int, generator: torch.Generator) -> torch.Tensor:
    logits = 3 * torch.randn(3, vocab_size, generator=generator)
    if kind == "ties":
        return logits.round()
    if kind == "bf16":
        return logits.bfloat16()
    if kind == "mostly -inf":
        keep = torch.rand(3, vocab_size, generator=generator) < 0.05
        keep[:, vocab_size // 2] = True
        return logits.masked_fill(~keep, -torch.inf)
    if kind == "peaked":
        logits[:, vocab_size - 1] = 60.0
    if kind == "equal":
        return torch.full_like(logits, -7.25)
    return logits


@pytest.mark.parametrize("kind", ["normal", "ties", "bf16", "mostly -inf", "peaked", "equal"])
@pytest.mark.parametrize("vocab_size", [1, 63, 1000, 50257])
@pytest.mark.parametrize(("top_k", "top_p"), [(40, 0.95), (1, 1.0), (8, 0.5), (40, 0.0), (5, 1.0)])
def test_against_the_oracle(kind: str, vocab_size: int, top_k: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(vocab_size + top_k)
    logits = rows(kind, vocab_size, generator)
    capacity = 64
    found = truncate(logits, top_k=top_k, top_p=top_p, temperature=0.8, capacity=capacity)
    while (found.size > min(capacity, vocab_size)).any():
        capacity *= 4
        found = truncate(logits, top_k=top_k, top_p=top_p, temperature=0.8, capacity=capacity)
    for row in range(3):
        expected = oracle.truncate(logits[row].float(), top_k=top_k, top_p=top_p, temperature=0.8)
        size = int(found.size[row])
        assert size == len(expected.ids)
        assert found.ids[row, :size].tolist() == list(expected.ids)
        assert found.logprobs[row, :size].tolist() == list(expected.logprobs)
        assert (found.ids[row, size:] == 0).all()
        assert (found.logprobs[row, size:] == -torch.inf).all()


def test_rows_are_independent_and_strides_do_not_matter() -> None:
    logits = 2 * torch.randn(5, 4000, generator=torch.Generator().manual_seed(0))
    wide = torch.full((5, 8000), 50.0)
    wide[:, ::2] = logits
    together = truncate(wide[:, ::2], top_k=40, top_p=0.95)
    for row in range(5):
        alone = truncate(logits[row : row + 1], top_k=40, top_p=0.95)
        assert torch.equal(together.ids[row], alone.ids[0])
        assert together.size[row] == alone.size[0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_without_a_distribution_have_size_zero(bad: float) -> None:
    logits = torch.randn(3, 500)
    logits[1, 77] = bad
    logits[2] = -torch.inf
    assert truncate(logits, top_k=40, top_p=0.95).size.tolist()[1:] == [0, 0]
    assert truncate(logits, top_k=40, top_p=0.95).size[0] > 0


def test_top_k_zero_keeps_the_vocabulary() -> None:
    logits = torch.randn(1, 300)
    assert int(truncate(logits, top_k=0, top_p=1.0, capacity=300).size) == 300
    assert int(truncate(logits, top_k=10**9, top_p=1.0, capacity=300).size) == 300


def test_capacity_below_top_k_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity=8 is too small for top_k=40"):
        truncate(torch.randn(1, 300), top_k=40, top_p=0.95, capacity=8)
