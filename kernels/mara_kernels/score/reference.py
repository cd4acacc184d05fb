"""Definition of scoring in torch: the accept model of MARA section 3.2.

    d = z_accept - z_reject,   z = W3 relu(W2 relu(W1 layer_norm(h) + b1) + b2) + b3

Shapes: N states, H hidden size, I inner size (1024 in the paper).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mara_kernels.linear import linear


class AgentParameters(NamedTuple):
    """The accept model's parameters. Row 0 of ``weight3``/``bias3`` is reject, row 1 accept."""

    norm_weight: Tensor
    """[H]"""
    norm_bias: Tensor
    """[H]"""
    weight1: Tensor
    """[I, H]"""
    bias1: Tensor
    """[I]"""
    weight2: Tensor
    """[I/4, I]"""
    bias2: Tensor
    """[I/4]"""
    weight3: Tensor
    """[2, I/4]"""
    bias3: Tensor
    """[2]"""
    norm_eps: float = 1e-5

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All but the epsilon."""
        return self[:8]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], norm_eps: float) -> "AgentParameters":
        """From eight tensors in order."""
        return cls(*tensors, norm_eps=norm_eps)  # type: ignore[misc, arg-type]


def score(states: Tensor, parameters: AgentParameters) -> Tensor:
    """Accept logits, float32 [N], of states [N, H]; computed in the dtype of the parameters."""
    p = parameters
    x = states.to(p.weight1.dtype)
    x = F.layer_norm(x, (x.shape[-1],), p.norm_weight, p.norm_bias, p.norm_eps)
    x = torch.relu(linear(x, p.weight1, p.bias1))
    x = torch.relu(linear(x, p.weight2, p.bias2))
    z = linear(x, p.weight3, p.bias3)
    if z.dtype != torch.float64:
        z = z.float()
    return z[..., 1] - z[..., 0]
