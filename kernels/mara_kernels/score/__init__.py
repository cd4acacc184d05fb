"""Hidden states to accept logits."""

from mara_kernels.score.api import score
from mara_kernels.score.fold import FoldCache
from mara_kernels.score.reference import AgentParameters

__all__ = ["AgentParameters", "FoldCache", "score"]
