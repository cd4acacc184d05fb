"""Definition of candidate attention in torch: new rows over their slot's prefix and themselves.

    row t of slot b, at position length_b + depth_t, sees
        prefix key j    iff j < length_b            and  position - j < sliding_window
        new key u       iff t has u as an ancestor  and  depth_t - depth_u < sliding_window
    score = softcap * tanh(scale * q.k / softcap);  softmax over what is seen, and the sink

A window of candidates is a tree of depth 0 with the identity as ancestor mask; a prefill chunk is
a chain (lower triangle); a draft tree lies between.

Shapes: B slots, W new rows, S cached positions, Hq query heads, Hkv key heads (Hq = G Hkv),
D head size, Dv value head size.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def visibility(
    lengths: Tensor,
    ancestors: Tensor,
    depths: Tensor,
    *,
    base: int,
    sliding_window: int | None = None,
) -> Tensor:
    """Which keys each new row sees.

    Args:
        lengths: int64 [B], committed positions of the slot.
        ancestors: bool [W, W], row t sees row u; a row sees itself.
        depths: int64 [W], position of a row relative to the slot's length.
        base: row of the buffers where the new rows begin, at least every length.
        sliding_window: keys at this distance or farther are not seen.

    Returns:
        bool [B, W, base + W], over the prefix rows and the new rows.
    """
    prefix = torch.arange(base, device=lengths.device)
    sees_prefix = prefix < lengths[:, None]
    sees_prefix = sees_prefix[:, None, :].expand(-1, depths.shape[0], -1)
    if sliding_window is not None:
        position = lengths[:, None] + depths
        sees_prefix = sees_prefix & (position[..., None] - prefix < sliding_window)
        ancestors = ancestors & (depths[:, None] - depths < sliding_window)
    return torch.cat((sees_prefix, ancestors.expand(lengths.shape[0], -1, -1)), dim=-1)


def candidate_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of the new rows.

    Args:
        query: [B, Hq, W, D].
        key: [B, Hkv, S, D], prefix rows, then new rows, see :func:`visibility`.
        value: [B, Hkv, S, Dv].
        visible: bool [B, W, S]; None: every row sees every key.
        scale: multiplies q.k.
        softcap: bound of the scores, ``softcap * tanh(score / softcap)``.
        sinks: [Hq], a logit per head that takes part in the softmax and adds no value.

    Returns:
        [B, Hq, W, Dv], in the dtype of the query.
    """
    num_slots, num_heads, num_rows, _ = query.shape
    num_kv_heads, group = key.shape[1], num_heads // key.shape[1]
    # Heads that share keys become rows of one tile: the prefix is read once for all of them.
    packed = query.reshape(num_slots, num_kv_heads, group * num_rows, -1)
    mask = None if visible is None else visible[:, None]
    if mask is not None and group > 1:
        mask = mask.repeat(1, 1, group, 1)
    if softcap is None and sinks is None:
        output = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scale)
        return output.reshape(num_slots, num_heads, num_rows, -1)

    score = (packed @ key.transpose(-1, -2)).float() * scale
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(num_kv_heads, group, 1).expand(-1, -1, num_rows)
        sink = sink.reshape(1, num_kv_heads, group * num_rows, 1).expand(num_slots, -1, -1, -1)
        score = torch.cat((score, sink), dim=-1)
    prob = torch.softmax(score, dim=-1)
    if sinks is not None:
        prob = prob[..., :-1]
    return (prob.to(value.dtype) @ value).reshape(num_slots, num_heads, num_rows, -1)
