"""Truncation: logits to an ordered candidate set, by Triton on a GPU and by torch elsewhere."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from mara_kernels import dispatch
from mara_kernels.truncate import reference
from mara_kernels.truncate.reference import CandidateSet

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6


def truncate(
    logits: Tensor, *, top_k: int, top_p: float, temperature: float = 1.0, capacity: int = 64
) -> CandidateSet:
    """The candidate set of each row of logits.

        logprob = log_softmax(logits / temperature)            over the full vocabulary, float32
        top-k:  keep every token >= the k-th largest           ties are inclusive
        top-p:  keep a token iff the mass from it to the tail of the kept is > 1 - top_p
        order:  probability descending, ties by lower id

    Equals transformers' ``TopKLogitsWarper`` followed by ``TopPLogitsWarper`` on the log-softmax,
    with equal probabilities ordered by id. The Triton body reads the logits once and needs
    capacities of at most 128, vocabularies of at most 262144 and bf16, fp16 or float32 logits; the
    rest is done by the torch body, and what needs a gradient.

    Args:
        logits: [B, V], any floating dtype; computed in float32.
        top_k: tokens kept before top-p; 0 or anything above V means all.
        top_p: probability mass kept of the renormalised top-k, in [0, 1].
        temperature: divides the logits; beyond [1e-6, 1e6] they would leave the range of float32.
        capacity: columns C of the result, at least ``min(top_k, V)``; capped at V.

    Returns:
        The set, see :class:`CandidateSet`. No host synchronisation.

    Raises:
        ValueError: if the logits are no matrix of floats, a number is out of its bounds, or
            capacity is smaller than the top-k asked for.
    """
    _check_logits(logits)
    for name, value, least in (("top_k", top_k, 0), ("capacity", capacity, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r} is not allowed; allowed: an integer >= {least}")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p={top_p!r} is not allowed; allowed: in [0, 1]")
    if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise ValueError(
            f"temperature={temperature!r} is not allowed; allowed: in "
            f"[{MIN_TEMPERATURE}, {MAX_TEMPERATURE}]"
        )
    vocab_size = logits.shape[1]
    top_k = min(top_k, vocab_size) if top_k > 0 else vocab_size
    capacity = min(capacity, vocab_size)
    if capacity < top_k:
        raise ValueError(f"capacity={capacity} is too small for top_k={top_k}: give at least that")
    body: Callable[..., CandidateSet] = reference.truncate
    if dispatch.choose("truncate", logits.device).name == "triton":
        from mara_kernels.truncate import kernel

        if kernel.covers(logits, capacity) and not dispatch.needs_gradient(logits):
            architecture = dispatch.architecture(logits.device)
            body = partial(kernel.truncate_triton, architecture=architecture)
    with dispatch.on_device(logits):
        return body(logits, top_k=top_k, top_p=top_p, temperature=temperature, capacity=capacity)


def greedy(logits: Tensor) -> CandidateSet:
    """The most probable token of each row of logits; of equal ones that of the lowest id.

    The Triton body reads the logits once; it covers what that of :func:`truncate` does.

    Args:
        logits: [B, V], any floating dtype; the log-probability is computed in float32.

    Returns:
        Sets of one, C = 1; of size 0 where a row has no distribution.

    Raises:
        ValueError: if the logits are no matrix of floats.
    """
    _check_logits(logits)
    body: Callable[..., CandidateSet] = reference.greedy
    if dispatch.choose("truncate", logits.device).name == "triton":
        from mara_kernels.truncate import kernel

        if kernel.covers(logits, 1) and not dispatch.needs_gradient(logits):
            architecture = dispatch.architecture(logits.device)
            body = partial(kernel.greedy_triton, architecture=architecture)
    with dispatch.on_device(logits):
        return body(logits)


def _check_logits(logits: Tensor) -> None:
    if logits.ndim != 2 or not logits.is_floating_point() or not logits.shape[1]:
        raise ValueError(
            "logits must be a floating [B, V] tensor, V >= 1, got "
            f"{logits.dtype} of {tuple(logits.shape)}"
        )
