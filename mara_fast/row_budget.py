"""The rows of a step: a budget for all slots together, handed out by what a row is worth.

    worth of a slot's row j = P(the cascade asks for candidate offset + j | it asks for ``offset``)
                            = 1 for j = 0;  survival[offset + j] / survival[offset];  0 past the set
    the rows that are worth most are forwarded

Every row that the cascade asks for is one less to forward later, so this is the most that a step
of so many rows can do. What a slot gets changes when its candidates are tried, never which one is
chosen.

Rows that are not the same number in every slot are packed: the model sees one sequence of R rows,
attention sees them unpacked, slot by slot, up to the widest.

Shapes: B slots, W most rows of a slot, R rows.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ACCEPTED_FRACS = (0.70, 0.17, 0.08)
"""Of the decided positions: where rank 0, 1, 2 is accepted (paper, Figure 3: 66 to 75 %, more than
95 % within three). The rest is examined to the end."""


def survival(*, examines_all: bool) -> tuple[float, ...]:
    """Probability that a cascade of the paper's profile asks for a candidate, by index tried; the
    last stands for all behind it.

    Args:
        examines_all: the whole set is scored whatever is accepted.
    """
    if examines_all:
        return (1.0,)
    left = [1.0]
    for accepted in ACCEPTED_FRACS:
        left.append(left[-1] - accepted)
    return tuple(left)


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """Rows of a step."""

    window: int
    """The most of one slot."""
    num_rows: int
    """Of all slots together, at least one for each."""

    @classmethod
    def uniform(cls, num_slots: int, window: int) -> "StepShape":
        """As many rows as every slot may want."""
        return cls(window=window, num_rows=num_slots * window)


def hand_out(offset: Tensor, size: Tensor, shape: StepShape, survival: Tensor) -> Tensor:
    """How many of its next candidates each slot forwards. No host synchronisation.

    Args:
        offset: int64 [B], candidates tried.
        size: int64 [B], candidates of the set; 0 where there is nothing to forward.
        shape: the step's.
        survival: float32 [N], see :func:`survival`.

    Returns:
        int64 [B], 0 where ``size`` is, else 1 to W; at most R together.
    """
    num_slots, window = offset.shape[0], shape.window
    if shape.num_rows >= num_slots * window:
        return (size - offset).clamp(0, window)
    tried = offset[:, None] + torch.arange(window, device=offset.device)
    left = survival[tried.clamp(max=survival.shape[0] - 1)]
    worth = (left / left[:, :1]).masked_fill(tried >= size[:, None], -1.0)
    # Every slot goes on: nobody starves for those who would use more.
    worth[:, 0] += 1
    chosen = worth.flatten().topk(shape.num_rows).indices
    is_chosen = torch.zeros_like(worth, dtype=torch.bool).flatten()
    is_chosen = is_chosen.scatter(0, chosen, True).view_as(worth)
    # topk may choose any of equals: within a slot only how many counts, and processes that share a
    # model run the same kernel on the same numbers.
    return (is_chosen & (worth > 0)).sum(-1)


class Packing(NamedTuple):
    """Rows of slots, [B, W], as one sequence, [R], and back."""

    place: Tensor
    """int64 [B, W], where a slot's row is in the sequence; beyond its own it repeats its first."""
    slot: Tensor
    """int64 [R]"""
    column: Tensor
    """int64 [R]; rows beyond those handed out repeat some other."""

    @classmethod
    def of(cls, count: Tensor, shape: StepShape) -> "Packing":
        """Slot by slot.

        Args:
            count: int64 [B], rows of each slot.
            shape: the step's.
        """
        num_slots, device = count.shape[0], count.device
        end = count.cumsum(0)
        start = end - count
        column = torch.arange(shape.window, device=device)
        place = start[:, None] + torch.where(column < count[:, None], column, 0)
        row = torch.arange(shape.num_rows, device=device)
        slot = torch.searchsorted(end, row, right=True).clamp(max=num_slots - 1)
        return cls(
            place=place.clamp(max=shape.num_rows - 1),
            slot=slot,
            column=(row - start[slot]).clamp(max=shape.window - 1),
        )

    def unpack(self, packed: Tensor) -> Tensor:
        """[1, H, R, D] to [B, H, W, D]."""
        return packed[0][:, self.place].transpose(0, 1)

    def pack(self, rows: Tensor) -> Tensor:
        """[B, H, W, D] to [1, H, R, D]."""
        return rows[self.slot, :, self.column].transpose(0, 1)[None]
