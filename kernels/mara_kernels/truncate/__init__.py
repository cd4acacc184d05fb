"""Logits to the ordered candidate set."""

from mara_kernels.truncate.api import greedy, truncate
from mara_kernels.truncate.reference import CandidateSet

__all__ = ["CandidateSet", "greedy", "truncate"]
