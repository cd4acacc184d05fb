"""The running batch on the device: a struct of arrays, one row per slot.

Shapes: B slots, C columns of the candidate buffer, N tokens of the output buffer, H hidden.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

RUNNING, EOS, LENGTH, BAD_LOGITS, BAD_ACCEPT = range(5)
"""Values of ``SlotState.done``."""

FORCED, ACCEPTED, FALLBACK, PLAIN = range(4)
"""Values of the verdict column of ``SlotState.record``."""


@dataclass(kw_only=True)
class SlotState:
    """The running batch, one row per slot. A slot whose ``size`` is 0 is idle."""

    length: Tensor
    """int64 [B], committed positions."""
    sequence: Tensor
    """int64 [B], keys the draws."""
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
    trace_ids: Tensor
    """int64 [B, N, C], candidate sets if traced, else [B, 0, 0]."""
    trace_logprobs: Tensor
    """float32 [B, N, C]"""
    trace_logits: Tensor
    """float32 [B, N, C], accept logits by rank; NaN: not asked."""

    @classmethod
    def empty(
        cls,
        num_slots: int,
        *,
        columns: int,
        num_tokens: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        trace: bool,
    ) -> "SlotState":
        """All slots idle."""

        def ints(*size: int) -> Tensor:
            return torch.zeros(num_slots, *size, dtype=torch.int64, device=device)

        def floats(*size: int) -> Tensor:
            return torch.zeros(num_slots, *size, device=device)

        traced = (num_tokens, columns) if trace else (0, 0)
        return cls(
            length=ints(),
            sequence=ints(),
            candidate_ids=ints(columns),
            candidate_logprobs=floats(columns),
            size=ints(),
            offset=ints(),
            held_accepted=ints().bool(),
            held_preference=floats(),
            log_residual=floats(),
            held_tried=ints(),
            held_logit=floats(),
            held_logprob=floats(),
            hidden=torch.zeros(num_slots, hidden_size, dtype=dtype, device=device),
            num_tokens=ints(),
            num_forwards=ints(),
            done=ints(),
            record=ints(num_tokens, 5),
            record_floats=floats(num_tokens, 4),
            trace_ids=ints(*traced),
            trace_logprobs=floats(*traced),
            trace_logits=floats(*traced),
        )

    def narrowed(self, slots: slice) -> "SlotState":
        """Views of a range of slots."""
        return SlotState(**{name: tensor[slots] for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """All fields by name."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}

    def reset(self, slot: int, *, sequence: int) -> None:
        """Empties a slot for a new sequence."""
        for tensor in self.tensors().values():
            tensor[slot] = 0
        self.sequence[slot] = sequence
        self.trace_logits[slot] = torch.nan

    def move(self, source: int, destination: int) -> None:
        """Copies a slot over another."""
        for tensor in self.tensors().values():
            tensor[destination] = tensor[source]

    def swap(self, first: int, second: int) -> None:
        """Exchanges two slots."""
        for tensor in self.tensors().values():
            kept = tensor[first].clone()
            tensor[first] = tensor[second]
            tensor[second] = kept
