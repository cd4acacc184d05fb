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


TRUNCATE = {
    "sm_80": TruncateConfig(1, 1, 8, 16),
    "sm_90": TruncateConfig(1, 1, 8, 16),
    "sm_100": TruncateConfig(1, 1, 8, 16),
    "gfx942": TruncateConfig(1, 1, 8, 8),
}


def truncate_config(architecture: str) -> TruncateConfig:
    """For any vocabulary and batch."""
    return TRUNCATE[architecture]


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
SCORE_HALF = {
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
SCORE_HALF["sm_100"] = SCORE_HALF["sm_90"]

# float32 is multiplied without tensor cores, for parity with torch: smaller tiles.
_SCORE_FLOAT32 = {
    64: ScoreConfig(16, 64, 64, 8, 4, 2, 16, 32, 8, 4, 1),
    512: ScoreConfig(32, 64, 32, 4, 4, 2, 16, 32, 8, 4, 1),
    None: ScoreConfig(32, 64, 32, 1, 4, 2, 16, 32, 1, 4, 1),
}


def score_config(architecture: str, dtype: torch.dtype, num_states: int) -> ScoreConfig:
    """For any hidden size."""
    table = _SCORE_FLOAT32 if dtype == torch.float32 else SCORE_HALF[architecture]
    return next(c for most, c in table.items() if most is None or num_states <= most)


class AttentionConfig(NamedTuple):
    """Launch of attention. M packed rows: new rows times heads that share keys."""

    block_m: int
    block_n: int
    """Keys per step."""
    num_warps: int
    num_stages: int
    precision: str = "ieee"
    """Of float32 products."""
    programs: int = 2
    """Of a processor, that parts of the prefix shall fill."""


_AttentionTable = dict[int, dict[int | None, AttentionConfig]]

# By the largest padded head size, then by the largest M they serve.
ATTENTION_HALF: dict[str, _AttentionTable] = {
    "sm_80": {
        64: {
            16: AttentionConfig(16, 64, 4, 3),
            64: AttentionConfig(64, 64, 4, 3),
            None: AttentionConfig(128, 64, 8, 3),
        },
        128: {
            16: AttentionConfig(16, 64, 4, 2),
            64: AttentionConfig(64, 32, 8, 3),
            None: AttentionConfig(128, 32, 8, 3),
        },
        256: {16: AttentionConfig(16, 32, 4, 2), None: AttentionConfig(32, 32, 8, 2)},
    },
    "sm_90": {
        64: {
            16: AttentionConfig(16, 64, 4, 4),
            64: AttentionConfig(64, 64, 4, 4),
            None: AttentionConfig(128, 64, 8, 3),
        },
        128: {
            16: AttentionConfig(16, 64, 4, 3),
            64: AttentionConfig(64, 64, 4, 3),
            None: AttentionConfig(128, 64, 8, 3),
        },
        256: {16: AttentionConfig(16, 32, 4, 3), None: AttentionConfig(64, 32, 8, 3)},
    },
    "gfx942": {
        64: {16: AttentionConfig(16, 64, 4, 2), None: AttentionConfig(64, 64, 4, 1)},
        128: {
            16: AttentionConfig(16, 64, 4, 1),
            64: AttentionConfig(64, 32, 4, 2),
            None: AttentionConfig(128, 32, 8, 2),
        },
        256: {16: AttentionConfig(16, 32, 4, 1), None: AttentionConfig(32, 32, 4, 1)},
    },
}
ATTENTION_HALF["sm_100"] = ATTENTION_HALF["sm_90"]

# Three products of tf32 are as good as one of float32, and need far fewer registers.
_ATTENTION_FLOAT32: _AttentionTable = {
    64: {None: AttentionConfig(16, 32, 4, 2, "tf32x3")},
    128: {None: AttentionConfig(16, 32, 4, 2, "tf32x3")},
}
_ATTENTION_FLOAT32_CDNA: _AttentionTable = {
    64: {None: AttentionConfig(16, 32, 4, 1)},
    128: {None: AttentionConfig(16, 32, 4, 1)},
}


def attention_config(
    architecture: str, dtype: torch.dtype, head_size: int, num_packed: int
) -> AttentionConfig:
    """For a head size padded to a power of two, at most 256 (float32: 128), and any M."""
    if dtype != torch.float32:
        table = ATTENTION_HALF[architecture]
    elif architecture == "gfx942":
        table = _ATTENTION_FLOAT32_CDNA
    else:
        table = _ATTENTION_FLOAT32
    by_rows = next(rows for most, rows in table.items() if head_size <= most)
    return next(c for most, c in by_rows.items() if most is None or num_packed <= most)
