"""Definitions in torch, operator by operator as the models of transformers have them, so that they
are equal to the bit.

Shapes: N rows, H hidden; B sequences, T positions, Hq query heads, Hkv key heads, D head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class NormRule:
    """What families of models do differently."""

    adds_one: bool
    """The factor is 1 + weight."""
    rounds_first: bool
    """To the dtype of the states before, not after, the factor."""


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, rule: NormRule) -> Tensor:
    """Arguments as those of the operation."""
    exact = x.float()
    normed = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    if rule.rounds_first:
        factor = 1.0 + weight if rule.adds_one else weight
        return factor * normed.to(x.dtype)
    factor = 1.0 + weight.float() if rule.adds_one else weight.float()
    return (factor * normed).to(x.dtype)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments as those of the operation."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def turned(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return (x * cos) + (torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin)

    return turned(query), turned(key)
