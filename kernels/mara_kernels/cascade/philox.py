"""Philox4x32-10 in torch: random numbers that are a function of their address.

The draw for a candidate is keyed by (seed, sequence, position, rank) and by nothing else, so a
sampled decision does not depend on window, slot, batch or step. Source: Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox_words(seed: int, sequence: Tensor, position: Tensor, rank: Tensor) -> Tensor:
    """Four random 32-bit words per address.

    Args:
        seed: key, 0 <= seed < 2**64.
        sequence, position, rank: int64, broadcastable; 0 <= sequence < 2**63, the others < 2**32.

    Returns:
        int64 [..., 4], values in [0, 2**32).
    """
    sequence, position, rank = torch.broadcast_tensors(sequence, position, rank)
    c0, c1, c2, c3 = rank, position, sequence & _MASK, sequence >> 32
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(10):
        # int64 products wrap around, which leaves their low 64 bits, all that is needed, intact.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def acceptance_uniforms(
    seed: int, sequence: Tensor, position: Tensor, rank: Tensor
) -> tuple[Tensor, Tensor]:
    """Two independent uniforms in [0, 1) with 24 bits per address.

    Returns:
        float32 pair: the draw compared with the accept probability, and the key by which the
        strategy ``random`` picks among the accepted.
    """
    words = philox_words(seed, sequence, position, rank)
    uniforms = (words[..., :2] >> 8).to(torch.float32) * 2.0**-24
    return uniforms[..., 0], uniforms[..., 1]
