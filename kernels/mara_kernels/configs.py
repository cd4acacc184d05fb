"""Launch configurations by architecture and shape.

Fixed tables, nothing is tuned at run time: a captured graph replays what was compiled before. Every
entry compiles without spills and within the shared memory of its architecture
(``python -m mara_kernels.aot``); which of those that do is the fastest is for a GPU to say.
"""

from typing import NamedTuple

import torch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


class TruncateConfig(NamedTuple):
    """Launches of truncation."""

    tiles: int
    """Tiles of 2048 tokens per program of the stream over the logits."""
    stream_warps: int
    select_warps: int
    """Of the selection, for vocabularies up to 131072."""
    wide_select_warps: int
    """Above."""


_TRUNCATE = {
    "sm_80": TruncateConfig(1, 1, 8, 16),
    "sm_90": TruncateConfig(1, 1, 8, 16),
    "sm_100": TruncateConfig(1, 1, 8, 16),
    "gfx942": TruncateConfig(1, 1, 8, 8),
}


def truncate_config(architecture: str) -> TruncateConfig:
    """For any vocabulary and batch."""
    return _TRUNCATE[architecture]


class ScoreConfig(NamedTuple):
    """Launches of scoring. N states, H hidden, I inner size."""

    block_n: int
    block_i: int
    block_h: int
    splits: int
    """Programs that share H; 1: the layer norm is applied at the end of the first layer."""
    num_warps: int
    num_stages: int
    tail_block_n: int
    tail_block_i: int
    slices: int
    """Programs that share I in the second layer; 1: the score is finished there."""
    tail_warps: int
    tail_stages: int
    finish_block_n: int = 1


# By the largest number of states they serve.
_FEW = (16, 64, 16, 8, 1)
_SCORE_HALF = {
    "sm_80": {
        16: ScoreConfig(16, 64, 128, 8, 4, 4, *_FEW),
        32: ScoreConfig(32, 64, 128, 8, 4, 3, *_FEW),
        64: ScoreConfig(64, 64, 128, 8, 4, 2, *_FEW),
        256: ScoreConfig(64, 64, 128, 4, 4, 2, *_FEW),
        512: ScoreConfig(64, 64, 64, 2, 4, 3, *_FEW),
        2048: ScoreConfig(64, 128, 64, 1, 4, 3, 32, 64, 1, 4, 2),
        None: ScoreConfig(128, 128, 64, 1, 8, 3, 64, 64, 1, 8, 2),
    },
    "sm_90": {
        16: ScoreConfig(16, 64, 128, 8, 4, 4, *_FEW),
        32: ScoreConfig(32, 64, 128, 8, 4, 4, *_FEW),
        64: ScoreConfig(64, 64, 128, 8, 4, 3, *_FEW),
        256: ScoreConfig(64, 64, 128, 4, 4, 3, *_FEW),
        512: ScoreConfig(64, 64, 128, 2, 4, 3, *_FEW),
        2048: ScoreConfig(64, 128, 64, 1, 4, 4, 32, 64, 1, 4, 3),
        None: ScoreConfig(128, 128, 64, 1, 8, 4, 64, 64, 1, 8, 3),
    },
    "gfx942": {
        16: ScoreConfig(16, 64, 128, 8, 4, 2, *_FEW),
        32: ScoreConfig(32, 64, 128, 8, 4, 2, *_FEW),
        64: ScoreConfig(64, 64, 64, 8, 4, 2, *_FEW),
        256: ScoreConfig(64, 64, 64, 4, 4, 2, *_FEW),
        512: ScoreConfig(64, 64, 64, 2, 4, 2, *_FEW),
        2048: ScoreConfig(64, 128, 64, 1, 4, 2, 32, 32, 1, 4, 2),
        None: ScoreConfig(128, 128, 64, 1, 8, 2, 64, 32, 1, 8, 2),
    },
}
_SCORE_HALF["sm_100"] = _SCORE_HALF["sm_90"]

# float32 is multiplied without tensor cores, for parity with torch: smaller tiles.
_SCORE_FLOAT32 = {
    64: ScoreConfig(16, 64, 64, 8, 4, 2, 16, 32, 8, 4, 1),
    512: ScoreConfig(32, 64, 32, 4, 4, 2, 16, 32, 8, 4, 1),
    None: ScoreConfig(32, 64, 32, 1, 4, 2, 16, 32, 1, 4, 1),
}


def score_config(architecture: str, dtype: torch.dtype, num_states: int) -> ScoreConfig:
    """For any hidden size."""
    table = _SCORE_FLOAT32 if dtype == torch.float32 else _SCORE_HALF[architecture]
    return next(c for most, c in table.items() if most is None or num_states <= most)
