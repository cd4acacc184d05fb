"""The attention function registered with transformers, and the context it needs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mara_fast.row_budget import Packing
from mara_kernels.attention import NewRows, Tree, candidate_attention

ATTENTION_NAME = "mara_candidate"
"""transformers gives names with "flash", "sdpa", "flex", "paged" or "/" a meaning of their own."""


@dataclass(kw_only=True)
class TreeContext:
    """What our attention needs to know of a forward.

    Travels through the language model's forward as the keyword :data:`CONTEXT_KEYWORD`.
    """

    rows: NewRows
    packing: Packing | None = None
    """The model sees the rows of all slots as one sequence; None: as a batch of slots."""
    windows_seen: dict[int, int | None] | None = None
    """Sliding window by layer index, collected if not None."""


CONTEXT_KEYWORD = "mara_context"


def mara_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    mara_context: TreeContext | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over :func:`candidate_attention`.

    Scale, window, soft-cap and sinks are what the layer hands over.

    Returns:
        [B, W, Hq, Dv], and no attention weights. Of packed rows [1, R, Hq, Dv].

    Raises:
        RuntimeError: the context did not arrive: the model was called by someone else while the
            engine had it, or its layers do not pass keywords on.
    """
    if mara_context is None:
        raise RuntimeError(
            f"{type(module).__name__} was called without the decoding context of mara_fast"
        )
    if mara_context.windows_seen is not None:
        mara_context.windows_seen[getattr(module, "layer_idx", -1)] = sliding_window
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows, packing = mara_context.rows, mara_context.packing
    if packing is not None:
        query = packing.unpack(query)
    if torch.compiler.is_compiling() and query.device.type in _OPAQUE_ON:
        output = opaque_attention(
            query,
            key,
            value,
            rows.lengths,
            rows.tree.ancestors,
            rows.tree.depths,
            rows.tree.kind,
            rows.base,
            scale,
            sliding_window,
            softcap,
            s_aux,
        ).transpose(1, 2)
    else:
        output = candidate_attention(
            query,
            key,
            value,
            rows,
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=s_aux,
        )
    if packing is not None:
        output = packing.pack(output)
    return output.transpose(1, 2).contiguous(), None


_OPAQUE_ON = {"cuda"}
"""Where a compiler must not look inside: our kernels choose their launches in Python."""


@torch.library.custom_op("mara_fast::candidate_attention", mutates_args=())
def opaque_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    ancestors: Tensor,
    depths: Tensor,
    kind: str,
    base: int,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """:func:`candidate_attention` as one operator of torch; arguments as there.

    Returns:
        [B, W, Hq, Dv], contiguous: as our kernel leaves it and as the next product reads it. What
        an operator promises of its strides has to hold for every body.
    """
    shape = Tree(kind=kind, ancestors=ancestors, depths=depths)  # type: ignore[arg-type]
    output = candidate_attention(
        query,
        key,
        value,
        NewRows(lengths=lengths, tree=shape, base=base),
        scale=scale,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=sinks,
    )
    return output.transpose(1, 2).contiguous()


@opaque_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    num_slots, num_heads, num_rows, _ = query.shape
    return query.new_empty(num_slots, num_rows, num_heads, value.shape[-1])


def register_attention() -> None:
    """Makes the function known to transformers; repeating it changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION_NAME, mara_attention)
    # Models look their mask function up by the same name; ours is never used, see the 4-D mask in
    # FrozenLM.hidden_states.
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
