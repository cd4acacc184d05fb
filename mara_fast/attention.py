"""The attention function registered with transformers, and the context it needs."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mara_kernels.attention import NewRows, candidate_attention

ATTENTION_NAME = "mara_candidate"
"""transformers gives names with "flash", "sdpa", "flex", "paged" or "/" a meaning of their own."""


@dataclass(kw_only=True)
class TreeContext:
    """What our attention needs to know of a forward.

    Travels through the language model's forward as the keyword :data:`CONTEXT_KEYWORD`.
    """

    rows: NewRows
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
        [B, W, Hq, Dv], and no attention weights.

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
    output = candidate_attention(
        query,
        key,
        value,
        mara_context.rows,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return output.transpose(1, 2).contiguous(), None


def register_attention() -> None:
    """Makes the function known to transformers; repeating it changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION_NAME, mara_attention)
    # Models look their mask function up by the same name; ours is never used, see the 4-D mask in
    # FrozenLM.hidden_states.
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
