"""The attention function registered with transformers, and the context it needs."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mara_kernels.attention import candidate_attention, visibility

ATTENTION_NAME = "mara_candidate"
"""transformers gives names with "flash", "sdpa", "flex", "paged" or "/" a meaning of their own."""


@dataclass(kw_only=True)
class TreeContext:
    """Where the rows of one forward stand: in their slots, and to each other.

    Travels through the language model's forward as the keyword :data:`CONTEXT_KEYWORD`.
    """

    lengths: Tensor
    """int64 [B], committed positions of each slot."""
    ancestors: Tensor
    """bool [W, W], row t sees row u."""
    depths: Tensor
    """int64 [W], position of a row relative to its slot's length."""
    base: int
    """Row of the cache where the new rows lie; at least every length."""
    see_everything: bool = False
    """Known to the host: no key is hidden from any row, unless by a sliding window."""
    windows_seen: dict[int, int | None] | None = None
    """Sliding window by layer index, collected if not None."""
    _visible: dict[int | None, Tensor] = field(default_factory=dict, repr=False)

    def visible(self, sliding_window: int | None) -> Tensor | None:
        """bool [B, W, base + W], one per window size and forward; None if all is seen."""
        if self.see_everything and (sliding_window is None or sliding_window > self.base):
            return None
        if sliding_window not in self._visible:
            self._visible[sliding_window] = visibility(
                self.lengths,
                self.ancestors,
                self.depths,
                base=self.base,
                sliding_window=sliding_window,
            )
        return self._visible[sliding_window]


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
        mara_context.visible(sliding_window),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
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


def chain(num_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ancestors and depths of a prefill chunk: each row follows the one before."""
    ancestors = torch.ones(num_rows, num_rows, dtype=torch.bool, device=device).tril()
    return ancestors, torch.arange(num_rows, device=device)


def siblings(num_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ancestors and depths of a window of candidates: all at the same position."""
    ancestors = torch.eye(num_rows, dtype=torch.bool, device=device)
    return ancestors, torch.zeros(num_rows, dtype=torch.int64, device=device)
