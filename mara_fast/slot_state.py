"""The running batch on the device: a struct of arrays, one row per slot.

Shapes: B slots, C columns of the candidate buffer, N tokens of the output buffer, H hidden.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mara_kernels.bookkeeping import Slots

_INTS = (
    "length",
    "sequence",
    "size",
    "offset",
    "held_tried",
    "num_tokens",
    "num_forwards",
    "done",
)
_FLOATS = ("held_preference", "log_residual", "held_logit", "held_logprob")


@dataclass(kw_only=True)
class SlotState(Slots):
    """Also what keys the draws, and what is traced.

    Numbers of a slot are views of two matrices: what is done to a slot as a whole is a launch for
    all of them.
    """

    sequence: Tensor
    """int64 [B], keys the draws."""
    trace_ids: Tensor
    """int64 [B, N, C], candidate sets if traced, else [B, 0, 0]."""
    trace_logprobs: Tensor
    """float32 [B, N, C]"""
    trace_logits: Tensor
    """float32 [B, N, C], accept logits by rank; NaN: not asked."""
    ints: Tensor
    """int64 [8, B], fields of one number per slot."""
    floats: Tensor
    """float32 [4, B]"""

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

        def zeros(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        b, whole = num_slots, torch.int64
        traced = (num_tokens, columns) if trace else (0, 0)
        # Every field begins at a multiple of 16 bytes, which is what kernels are compiled for.
        padded = -(-b // 4) * 4
        ints = zeros(len(_INTS), padded, dtype=whole)[:, :b]
        floats = zeros(len(_FLOATS), padded)[:, :b]
        return cls(
            candidate_ids=zeros(b, columns, dtype=whole),
            candidate_logprobs=zeros(b, columns),
            held_accepted=zeros(b, dtype=torch.bool),
            hidden=zeros(b, hidden_size, dtype=dtype),
            record=zeros(b, num_tokens, 5, dtype=whole),
            record_floats=zeros(b, num_tokens, 4),
            trace_ids=zeros(b, *traced, dtype=whole),
            trace_logprobs=zeros(b, *traced),
            trace_logits=zeros(b, *traced),
            ints=ints,
            floats=floats,
            **dict(zip(_INTS, ints, strict=True)),
            **dict(zip(_FLOATS, floats, strict=True)),
        )

    def narrowed(self, slots: slice) -> "SlotState":
        """Views of a range of slots."""
        matrices = {"ints": self.ints[:, slots], "floats": self.floats[:, slots]}
        rest = {n: tensor[slots] for n, tensor in self.tensors().items() if n not in matrices}
        return SlotState(**rest, **matrices)

    def tensors(self) -> dict[str, Tensor]:
        """All fields by name."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}

    def reset(self, slot: int, *, sequence: int) -> None:
        """Empties a slot for a new sequence."""
        for tensor in self._by_slot():
            tensor[slot] = 0
        self.sequence[slot] = sequence
        self.trace_logits[slot] = torch.nan

    def move(self, source: int, destination: int) -> None:
        """Copies a slot over another."""
        for tensor in self._by_slot():
            tensor[destination] = tensor[source]

    def swap(self, first: int, second: int) -> None:
        """Exchanges two slots."""
        for tensor in self._by_slot():
            kept = tensor[first].clone()
            tensor[first] = tensor[second]
            tensor[second] = kept

    def _by_slot(self) -> Iterator[Tensor]:
        """[B, ...], everything there is, once."""
        yield self.ints.t()
        yield self.floats.t()
        for name, tensor in self.tensors().items():
            if name not in (*_INTS, *_FLOATS, "ints", "floats") and tensor.numel():
                yield tensor


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What is left of a slot whose sequence has ended."""

    num_tokens: int
    num_forwards: int
    done: int
    """Why."""
    sequence: Tensor
    """int64 [1]"""
    record: Tensor
    """int64 [N, 5], with the others as in :class:`SlotState`."""
    record_floats: Tensor
    """float32 [N, 4]"""
    trace_ids: Tensor
    """int64 [N, C]"""
    trace_logprobs: Tensor
    """float32 [N, C]"""
    trace_logits: Tensor
    """float32 [N, C]"""

    @staticmethod
    def tensors_of(state: SlotState, slot: int) -> dict[str, Tensor]:
        """What it is made of, views of a batch; for :meth:`of`, wherever they were brought."""
        names = "record", "record_floats", "trace_ids", "trace_logprobs", "trace_logits"
        return {"ints": state.ints[:, slot]} | {name: getattr(state, name)[slot] for name in names}

    @classmethod
    def of(cls, *, ints: Tensor, **others: Tensor) -> "Ended":
        """Of tensors on the host."""
        found = dict(zip(_INTS, ints, strict=True))
        return cls(
            num_tokens=int(found["num_tokens"]),
            num_forwards=int(found["num_forwards"]),
            done=int(found["done"]),
            sequence=found["sequence"][None],
            **others,
        )
