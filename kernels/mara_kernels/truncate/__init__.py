"""Logits to the ordered candidate set."""

from mara_kernels.truncate.reference import CandidateSet, truncate

__all__ = ["CandidateSet", "truncate"]
