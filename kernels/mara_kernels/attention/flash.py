"""Candidate attention over flash-attn, for windows of siblings.

    prefix:  flash_attn_with_kvcache over the committed rows, with its log-sum-exp
    self:    s = q.k of the row's own key
    merge:   w = sigmoid(s - lse);   output = (1 - w) * prefix + w * own value

The rows of a window are folded into the heads, so that each is a query of length one: flash-attn
aligns windows and causality per query row, which candidates at one position must not have.
"""

import torch
from torch import Tensor

from mara_kernels.attention.rows import NewRows


def covers(query: Tensor, key: Tensor, value: Tensor, rows: NewRows, sinks: Tensor | None) -> bool:
    """Whether :func:`attention_flash` takes these."""
    return (
        rows.tree.kind == "siblings"
        and sinks is None
        and rows.base > 0
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and key.stride(-1) == 1
        and value.stride(-1) == 1
    )


def attention_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: NewRows,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """Arguments as those of the operation."""
    from flash_attn import flash_attn_with_kvcache

    num_slots, num_heads, num_rows, head_size = query.shape
    num_kv_heads, base = key.shape[1], rows.base
    group = num_heads // num_kv_heads
    # [B, 1, Hq W, D]: of each key head the group, of each of its heads the rows.
    folded = query.reshape(num_slots, 1, num_heads * num_rows, head_size)
    # The query stands one before the candidates, on the last committed key: it sees one key fewer.
    # A window of one is the row itself; flash-attn reads -1 as no window.
    left = -1 if sliding_window is None else max(sliding_window - 2, 0)
    prefix, lse, *_ = flash_attn_with_kvcache(
        folded,
        key[:, :, :base].transpose(1, 2),
        value[:, :, :base].transpose(1, 2),
        cache_seqlens=rows.lengths.int(),
        softmax_scale=scale,
        causal=False,
        window_size=(left, -1),
        softcap=softcap or 0.0,
        return_softmax_lse=True,
    )
    own_key = key[:, :, None, base : base + num_rows].float()
    own_value = value[:, :, None, base : base + num_rows].float()
    grouped = query.reshape(num_slots, num_kv_heads, group, num_rows, head_size)
    score = (grouped.float() * own_key).sum(-1) * scale
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    # An empty prefix has a log-sum-exp of +inf, and whatever output.
    is_empty = (rows.lengths == 0)[:, None, None, None]
    if sliding_window == 1:
        is_empty = torch.ones_like(is_empty)
    lse = lse.reshape(num_slots, num_kv_heads, group, num_rows)
    weight = torch.sigmoid(score - lse).masked_fill(is_empty, 1.0)[..., None]
    prefix = prefix.reshape(num_slots, num_kv_heads, group, num_rows, head_size).float()
    prefix = prefix.masked_fill(is_empty[..., None], 0.0)
    output = (1 - weight) * prefix + weight * own_value
    return output.to(query.dtype).reshape(num_slots, num_heads, num_rows, head_size)
