"""Attention of candidate rows over a shared prefix."""

from mara_kernels.attention.api import candidate_attention
from mara_kernels.attention.reference import visibility
from mara_kernels.attention.rows import NewRows, Tree, chain, siblings, tree

__all__ = ["NewRows", "Tree", "candidate_attention", "chain", "siblings", "tree", "visibility"]
