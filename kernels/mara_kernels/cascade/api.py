"""The cascade: accept logits to a decision, by Triton on a GPU and by torch elsewhere."""

import torch
from torch import Tensor

from mara_kernels import dispatch
from mara_kernels.arguments import check_tensor
from mara_kernels.cascade import reference
from mara_kernels.cascade.reference import CascadeRule, Decision, Held


def cascade(
    accept_logit_BW: Tensor,
    *,
    offset: Tensor,
    size: Tensor,
    held: Held,
    rule: CascadeRule,
    sequence: Tensor,
    position: Tensor,
    count: Tensor | None = None,
) -> Decision:
    """Decides a window of candidates per slot.

        for candidate in the order tried:              MARA section 3.2, Eq. 5
            accepted?  greedy: d > logit(threshold)
                       sampled: u(seed, sequence, position, rank) < sigmoid(d - logit(threshold))
            first accepted -> chosen                   (strategy "first")
        none accepted -> fallback

    A set of size 1 is forced: its candidate is taken whatever its accept logit. A slot with
    nothing left (``offset >= size``, or size 0) decides nothing.

    Args:
        accept_logit_BW: float32 [B, W], d of the candidates tried at ``offset``, ``offset`` + 1...
        offset: int64 [B], candidates tried before this window.
        size: int64 [B], size of the candidate set.
        held: from the previous window of the position; bool, float32, float32 [B].
        rule: acceptance, strategy, fallback, order, seed.
        sequence: int64 [B], index of the sequence, keys the draw.
        position: int64 [B], index of the output token, keys the draw.
        count: int64 [B], candidates of the window that a slot really has, 0 to W; what lies in the
            columns behind them is ignored. None: W of every slot.

    Returns:
        The decision. No host synchronisation.

    Raises:
        ValueError: if the accept logits are no float32 matrix of at least a column, or another
            tensor has another shape or dtype than named here.
    """
    is_matrix = accept_logit_BW.ndim == 2 and accept_logit_BW.shape[1] >= 1
    if not is_matrix or accept_logit_BW.dtype != torch.float32:
        raise ValueError(
            "accept_logit_BW must be a float32 [B, W] tensor, W >= 1, got "
            f"{accept_logit_BW.dtype} of {tuple(accept_logit_BW.shape)}"
        )
    num_slots = accept_logit_BW.shape[0]
    for name, tensor in (
        ("offset", offset),
        ("size", size),
        ("sequence", sequence),
        ("position", position),
    ):
        check_tensor(name, tensor, (num_slots,), torch.int64)
    if count is None:
        count = torch.full_like(size, accept_logit_BW.shape[1])
    check_tensor("count", count, (num_slots,), torch.int64)
    check_tensor("held.accepted", held.accepted, (num_slots,), torch.bool)
    check_tensor("held.preference", held.preference, (num_slots,), torch.float32)
    check_tensor("held.log_residual", held.log_residual, (num_slots,), torch.float32)
    body = reference.cascade
    if dispatch.choose("cascade", accept_logit_BW.device).name == "triton":
        from mara_kernels.cascade import kernel

        fits = accept_logit_BW.shape[1] <= kernel.MAX_WINDOW
        if fits and not dispatch.needs_gradient(accept_logit_BW):
            body = kernel.cascade_triton
    with dispatch.on_device(accept_logit_BW):
        return body(
            accept_logit_BW,
            offset=offset,
            size=size,
            held=held,
            rule=rule,
            sequence=sequence,
            position=position,
            count=count,
        )
