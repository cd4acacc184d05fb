"""Layers of language models that are many launches."""

from mara_kernels.layers import reference
from mara_kernels.layers.api import rms_norm, rotate
from mara_kernels.layers.reference import NormRule

__all__ = ["NormRule", "reference", "rms_norm", "rotate"]
