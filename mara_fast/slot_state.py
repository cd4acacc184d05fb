"""The running batch on the device: a struct of arrays, one row per slot.

Shapes: B slots, C columns of the candidate buffer, N tokens of the output buffer, H hidden.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from mara_kernels.bookkeeping import Slots


@dataclass(kw_only=True)
class SlotState(Slots):
    """Also what keys the draws, and what is traced."""

    sequence: Tensor
    """int64 [B], keys the draws."""
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
