"""The bookkeeping of a step, by Triton on a GPU and by torch elsewhere.

Slots are tensors that stay where they are and are written in place. Nothing is read on the host.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mara_kernels import dispatch
from mara_kernels.arguments import check_tensor
from mara_kernels.bookkeeping import reference
from mara_kernels.bookkeeping.reference import Proposal, Scored
from mara_kernels.bookkeeping.slots import Slots
from mara_kernels.cascade import CascadeRule, Decision, Order
from mara_kernels.truncate import CandidateSet


def _body(device: torch.device) -> Any:
    """The module whose functions run there."""
    if dispatch.choose("bookkeeping", device).name == "triton":
        from mara_kernels.bookkeeping import kernel

        return kernel
    return reference


def propose(
    slots: Slots, *, window: int, count: Tensor | None = None, last_position: int, order: Order
) -> Proposal:
    """The next candidates of every slot.

    Args:
        slots: the batch; is not written.
        window: W, most candidates of a slot.
        count: int64 [B], of each slot; None: as many as are left, up to W.
        last_position: that a token can have; an idle slot may be full.
        order: in which candidates are tried.

    Returns:
        What to forward. A set that outgrew the buffer counts as none: it waits for room.

    Raises:
        ValueError: ``count`` has another shape or dtype.
    """
    if count is not None:
        check_tensor("count", count, slots.size.shape, torch.int64)
    with dispatch.on_device(slots.size):
        return _body(slots.size.device).propose(
            slots, window=window, count=count, last_position=last_position, order=order
        )


def settle(
    slots: Slots, scored: Scored, decision: Decision, *, rule: CascadeRule, eos_ids: Tensor
) -> Tensor:
    """Holds each slot's best candidate so far; where the position is decided, emits it.

    A token is appended to the records unless it was the only one, which was emitted when it was
    admitted. The sequence ends with one of ``eos_ids``, or when its record is full; an invalid
    decision ends it too.

    Args:
        slots: the batch.
        scored: the window.
        decision: of the cascade over it.
        rule: of the cascade.
        eos_ids: int64 [E]; may be empty.

    Returns:
        bool [B], where the next candidate set is wanted.

    Raises:
        ValueError: a tensor of the window or the decision is not of these slots.
    """
    matrix = slots.size.shape[0], scored.accept_logit.shape[1]
    check_tensor("scored.accept_logit", scored.accept_logit, matrix, torch.float32)
    check_tensor("scored.count", scored.count, slots.size.shape, torch.int64)
    if scored.place is not None:
        check_tensor("scored.place", scored.place, matrix, torch.int64)
    check_tensor("decision.row", decision.row, slots.size.shape, torch.int64)
    check_tensor("decision.log_prob", decision.log_prob, matrix, torch.float32)
    with dispatch.on_device(slots.size):
        return _body(slots.size.device).settle(
            slots,
            scored,
            decision,
            order=rule.order,
            fallback_is_last=rule.fallback == "last",
            eos_ids=eos_ids,
        )


def admit(
    slots: Slots,
    new: CandidateSet,
    chosen: Tensor,
    *,
    index: Tensor | None = None,
    verdict: int,
    order: Order,
    eos_ids: Tensor,
) -> None:
    """Gives slots their next candidate set; the token of a set of one is emitted unasked.

    A set that outgrew its columns is marked by a size beyond the buffer. An empty one ends the
    sequence.

    Args:
        slots: the batch.
        new: the sets, at most as wide as the buffer.
        chosen: bool [B], the slots that take one.
        index: int64 [M], the chosen slots, if ``new`` has sets of these only; None: of all.
        verdict: of a token emitted unasked.
        order: in which candidates are tried.
        eos_ids: int64 [E]; may be empty.

    Raises:
        ValueError: ``chosen`` has another shape or dtype, or the sets are wider than the buffer.
    """
    check_tensor("chosen", chosen, slots.size.shape, torch.bool)
    if new.ids.shape[1] > slots.candidate_ids.shape[1]:
        raise ValueError(
            f"new.ids has {new.ids.shape[1]} columns; allowed: those of the candidate buffer, "
            f"{slots.candidate_ids.shape[1]}"
        )
    if index is not None:
        body = partial(reference.admit, index=index)
    else:
        body = _body(slots.size.device).admit
    with dispatch.on_device(slots.size):
        body(slots, new, chosen, verdict=verdict, order=order, eos_ids=eos_ids)


def keep_rows(rows: Tensor, row: Tensor, *, base: int, destination: Tensor, trash: int) -> None:
    """Moves one new row of keys and values of each slot to its prefix.

    Args:
        rows: [L, B, K, S, D], of layers, slots, heads; the last stride is 1.
        row: int64 [B], behind ``base``; -1: none.
        base: row of S where the new ones begin.
        destination: int64 [B], row of S.
        trash: row of S that may be overwritten.

    Raises:
        ValueError: a tensor has another shape, dtype or last stride.
    """
    if rows.ndim != 5 or rows.stride(-1) != 1:
        raise ValueError(
            f"rows must be [L, B, K, S, D] with a last stride of 1, got {tuple(rows.shape)} with "
            f"strides {rows.stride()}"
        )
    check_tensor("row", row, rows.shape[1:2], torch.int64)
    check_tensor("destination", destination, rows.shape[1:2], torch.int64)
    with dispatch.on_device(rows):
        _body(rows.device).keep_rows(rows, row, base=base, destination=destination, trash=trash)
