"""Candidate attention against a loop over rows in float64."""

import itertools
import math

import pytest
import torch

from mara_kernels.attention.reference import candidate_attention, visibility
from trees import small_trees


def loop_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    lengths: list[int],
    ancestors: torch.Tensor,
    depths: list[int],
    base: int,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Row by row, key by key, as the definition reads."""
    num_slots, num_heads, num_rows, _ = query.shape
    group = num_heads // key.shape[1]
    output = torch.zeros(num_slots, num_heads, num_rows, value.shape[-1], dtype=torch.float64)
    for slot, head, row in itertools.product(*map(range, (num_slots, num_heads, num_rows))):
        position = lengths[slot] + depths[row]
        seen = [(j, j) for j in range(lengths[slot])]
        seen += [
            (base + u, lengths[slot] + depths[u]) for u in range(num_rows) if ancestors[row, u]
        ]
        if sliding_window is not None:
            seen = [(j, at) for j, at in seen if position - at < sliding_window]
        weights, total = [], 0.0
        for j, _ in seen:
            score = scale * float(
                query[slot, head, row].double() @ key[slot, head // group, j].double()
            )
            if softcap is not None:
                score = softcap * math.tanh(score / softcap)
            weights.append(math.exp(score))
        total = sum(weights) + (math.exp(float(sinks[head])) if sinks is not None else 0.0)
        for weight, (j, _) in zip(weights, seen, strict=True):
            output[slot, head, row] += weight / total * value[slot, head // group, j].double()
    return output


@pytest.mark.parametrize("sliding_window", [None, 1, 2, 4])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_all_small_trees(
    sliding_window: int | None, softcap: float | None, with_sinks: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    for num_rows, head_size, value_size in ((1, 8, 8), (3, 12, 5), (4, 8, 8)):
        lengths, base = [0, 3, 5], 6
        size = (3, 2, base + num_rows)
        query = torch.randn(3, 4, num_rows, head_size, generator=generator)
        key = torch.randn(*size, head_size, generator=generator)
        value = torch.randn(*size, value_size, generator=generator)
        sinks = torch.randn(4, generator=generator) if with_sinks else None
        for tree in small_trees(num_rows):
            visible = visibility(
                torch.tensor(lengths),
                tree.ancestors,
                tree.depths,
                base=base,
                sliding_window=sliding_window,
            )
            output = candidate_attention(
                query, key, value, visible, scale=0.3, softcap=softcap, sinks=sinks
            )
            expected = loop_attention(
                query,
                key,
                value,
                lengths=lengths,
                ancestors=tree.ancestors,
                depths=tree.depths.tolist(),
                base=base,
                scale=0.3,
                sliding_window=sliding_window,
                softcap=softcap,
                sinks=sinks,
            )
            torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


def test_no_mask_means_all() -> None:
    query, key = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8)
    everything = torch.ones(2, 1, 9, dtype=torch.bool)
    for softcap in (None, 2.0):
        torch.testing.assert_close(
            candidate_attention(query, key, key, None, scale=1.0, softcap=softcap),
            candidate_attention(query, key, key, everything, scale=1.0, softcap=softcap),
        )
