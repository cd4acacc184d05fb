"""Hidden states to accept logits."""

from mara_kernels.score.reference import AgentParameters, score

__all__ = ["AgentParameters", "score"]
