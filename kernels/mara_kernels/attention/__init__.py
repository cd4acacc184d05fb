"""Attention of candidate rows over a shared prefix."""

from mara_kernels.attention.reference import candidate_attention, visibility

__all__ = ["candidate_attention", "visibility"]
