"""A running batch on the device, as far as the operations of this folder know it.

Shapes: B slots, C columns of the candidate buffer, N tokens of the output buffer, H hidden.
"""

from dataclasses import dataclass

from torch import Tensor

RUNNING, EOS, LENGTH, BAD_LOGITS, BAD_ACCEPT = range(5)
"""Values of ``Slots.done``."""

FORCED, ACCEPTED, FALLBACK, PLAIN = range(4)
"""Values of the verdict column of ``Slots.record``."""


@dataclass(kw_only=True)
class Slots:
    """A struct of arrays, one row per slot, every one contiguous. A slot of size 0 is idle."""

    length: Tensor
    """int64 [B], committed positions."""
    candidate_ids: Tensor
    """int64 [B, C], probability order."""
    candidate_logprobs: Tensor
    """float32 [B, C]"""
    size: Tensor
    """int64 [B], candidates at the pending position."""
    offset: Tensor
    """int64 [B], candidates tried before the next window."""
    held_accepted: Tensor
    """bool [B], with the next five: the best candidate of the windows so far."""
    held_preference: Tensor
    """float32 [B]"""
    log_residual: Tensor
    """float32 [B]"""
    held_tried: Tensor
    """int64 [B]"""
    held_logit: Tensor
    """float32 [B], its accept logit."""
    held_logprob: Tensor
    """float32 [B], log π of Eq. 6 of it."""
    hidden: Tensor
    """[B, H], state of the best candidate; of the last token where no window ran yet."""
    num_tokens: Tensor
    """int64 [B], tokens emitted."""
    num_forwards: Tensor
    """int64 [B]"""
    done: Tensor
    """int64 [B], RUNNING or why it ended."""
    record: Tensor
    """int64 [B, N, 5]: token id, set size, probability rank, index tried, verdict."""
    record_floats: Tensor
    """float32 [B, N, 4]: log-probability, accept logit; log-probabilities of the policy and of the
    language model renormalised over the set, NaN where nobody was asked."""
