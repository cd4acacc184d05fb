"""Slots of a batch around the language model."""

from mara_kernels.bookkeeping.api import admit, keep_rows, propose, settle
from mara_kernels.bookkeeping.reference import Proposal, Scored, hold, pending
from mara_kernels.bookkeeping.slots import (
    ACCEPTED,
    BAD_ACCEPT,
    BAD_LOGITS,
    EOS,
    FALLBACK,
    FORCED,
    LENGTH,
    PLAIN,
    RUNNING,
    Slots,
)

__all__ = [
    "ACCEPTED",
    "BAD_ACCEPT",
    "BAD_LOGITS",
    "EOS",
    "FALLBACK",
    "FORCED",
    "LENGTH",
    "PLAIN",
    "RUNNING",
    "Proposal",
    "Scored",
    "Slots",
    "admit",
    "hold",
    "keep_rows",
    "pending",
    "propose",
    "settle",
]
