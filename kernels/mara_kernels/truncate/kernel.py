"""Truncation in Triton: the definition of :mod:`reference` in two launches.

1. ``group_maxima``: streams over the logits once; stores the maximum of every group of 32 tokens,
   and of every tile of 2048 its (max, sum of exp).
2. ``select``, one program per row, with C = capacity:

       t  = C-th largest group maximum              at least C tokens are >= t
       W  = groups whose maximum is > t             fewer than C
       t' = max(t, C-th largest token of W)         the C-th largest token of the row, exactly:
                                                    every token > t lies in W
       S  = tokens of W that are > t'               fewer than C, and all that may be kept: if the
                                                    k-th ties with t', C columns may be too few
       rank by counting on (log-probability, ~id), apply the rule, store at the rank

Strictly greater, twice: this is what bounds W and S whatever the ties. Nothing depends on how the
vocabulary was cut in the first launch: maxima are exact, and sums of exp are of fixed tiles, added
in a fixed order.

Shapes: B rows, V vocabulary, G groups per row, N tiles per row, C capacity.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mara_kernels.configs import TruncateConfig, truncate_config
from mara_kernels.truncate.reference import CandidateSet

GROUP = 32
"""Tokens with one maximum."""
TILE = 2048
"""Tokens with one (max, sum of exp)."""

MIN_CAPACITY = 64
MAX_CAPACITY = 128
"""Capacities compiled: powers of two from the one to the other."""
MAX_VOCAB_SIZE = 262144

_KEY_BITS = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 32}
"""Leading bits of a float32 that tell the values of a dtype apart."""

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def group_maxima(
    logits_ptr,  # [B, V]
    maxima_ptr,  # [B, G], in the dtype of the logits
    stats_ptr,  # float32 [B, N, 2]: maximum, sum of exp((x - maximum) / temperature)
    row_stride,
    vocab_size,
    num_groups,
    num_tiles,
    inverse_temperature,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    # One axis: a grid's others end at 65535.
    programs_per_row = tl.cdiv(num_tiles, TILES)
    row = (tl.program_id(0) // programs_per_row).to(tl.int64)
    first_tile = (tl.program_id(0) % programs_per_row) * TILES
    for i in tl.static_range(TILES):
        tile = first_tile + i
        column = tile * TILE + tl.arange(0, TILE)
        # Full tiles load without a mask: whatever the vocabulary, the loads are 16 bytes wide.
        if tile * TILE + TILE <= vocab_size:
            x = tl.load(logits_ptr + row * row_stride + column).to(tl.float32)
        else:
            x = tl.load(
                logits_ptr + row * row_stride + column,
                mask=column < vocab_size,
                other=float("-inf"),
            ).to(tl.float32)
        maxima = tl.max(tl.reshape(x, (TILE // GROUP, GROUP)), axis=1)
        group = tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
        tl.store(
            maxima_ptr + row * num_groups + group,
            maxima.to(maxima_ptr.dtype.element_ty),
            mask=group < num_groups,
        )
        top = tl.max(maxima, axis=0)
        scale = inverse_temperature * _LOG2E
        # -inf - -inf is NaN; a tile without a finite logit sums to zero.
        origin = tl.where(top == float("-inf"), 0.0, top)
        # The difference first: it is exact near the maximum, however low the temperature.
        total = tl.sum(tl.exp2((x - origin) * scale), axis=0)
        at = stats_ptr + (row * num_tiles + tile) * 2
        tl.store(at, top, mask=tile < num_tiles)
        tl.store(at + 1, total, mask=tile < num_tiles)


@triton.jit
def _ordered(x):
    """float32 as int32 of the same order; both zeros become one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _nth_largest(x, rank: tl.constexpr, KEY_BITS: tl.constexpr):
    """The rank-th largest of float32 x; -inf if it has fewer. By bisection of its ordered bits."""
    key = _ordered(x)
    # An unsigned search from 0 up, in signed numbers: the highest bit is flipped.
    found = tl.full((), -2147483648, tl.int32)
    for i in tl.static_range(KEY_BITS):
        bar = found ^ (-2147483648 if i == 0 else 1 << (31 - i))
        enough = tl.sum((key >= bar).to(tl.int32), axis=0) >= rank
        found = tl.where(enough, bar, found)
    # The bits below KEY_BITS are of no value: the least value from there on is exact.
    return tl.min(tl.where(key >= found, x, float("inf")), axis=0)


@triton.jit
def select(
    logits_ptr,  # [B, V]
    maxima_ptr,  # [B, G]
    stats_ptr,  # float32 [B, N, 2]
    winners_ptr,  # int32 [B, 2C], scratch: the groups W, then the tokens S
    ids_ptr,  # int64 [B, columns]
    logprobs_ptr,  # float32 [B, columns]
    size_ptr,  # int64 [B]
    row_stride,
    vocab_size,
    num_groups,
    num_tiles,
    columns,
    top_k,
    temperature,
    tail_mass,
    CAPACITY: tl.constexpr,
    KEY_BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, CAPACITY)
    minus_infinity = float("-inf")

    # The distribution: its maximum, and the log of its sum.
    tile = tl.arange(0, TILES)
    stat_ptr = stats_ptr + (row * num_tiles + tile) * 2
    tile_top = tl.load(stat_ptr, mask=tile < num_tiles, other=minus_infinity)
    tile_sum = tl.load(stat_ptr + 1, mask=tile < num_tiles, other=0.0)
    top = tl.max(tile_top, axis=0)
    scaled_top = tl.div_rn(top, temperature)
    below = tl.div_rn(tl.where(tile_top == minus_infinity, top, tile_top), temperature) - scaled_top
    total = tl.sum(tile_sum * tl.exp2(below * _LOG2E), axis=0)
    # NaN anywhere makes the sum NaN; an infinite maximum is no distribution either.
    is_valid = (total > 0) & (total < float("inf")) & (tl.abs(scaled_top) < float("inf"))
    log_total = tl.log2(total) / _LOG2E

    # W: the groups that can hold more than the C-th largest token.
    group = tl.arange(0, GROUPS)
    maximum = tl.load(
        maxima_ptr + row * num_groups + group, mask=group < num_groups, other=minus_infinity
    ).to(tl.float32)
    bar = _nth_largest(maximum, CAPACITY, KEY_BITS)
    wins = maximum > bar
    place = tl.cumsum(wins.to(tl.int32), axis=0) - 1
    tl.store(winners_ptr + row * 2 * CAPACITY + place, group, mask=wins & (place < CAPACITY))
    num_winners = tl.sum(wins.to(tl.int32), axis=0)
    tl.debug_barrier()
    winner = tl.load(
        winners_ptr + row * 2 * CAPACITY + slot, mask=slot < num_winners, other=num_groups
    )

    # S: their tokens above the C-th largest.
    column = winner[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    column = tl.reshape(column, (CAPACITY * GROUP,))
    x = tl.load(
        logits_ptr + row * row_stride + column, mask=column < vocab_size, other=minus_infinity
    ).to(tl.float32)
    bar = tl.maximum(bar, _nth_largest(x, CAPACITY, KEY_BITS))
    wins = x > bar
    place = tl.cumsum(wins.to(tl.int32), axis=0) - 1
    scratch_ptr = winners_ptr + row * 2 * CAPACITY + CAPACITY
    tl.store(scratch_ptr + place, column, mask=wins & (place < CAPACITY))
    num_tokens = tl.sum(wins.to(tl.int32), axis=0)
    tl.debug_barrier()
    is_token = slot < num_tokens
    token = tl.load(scratch_ptr + slot, mask=is_token, other=0)
    x = tl.load(logits_ptr + row * row_stride + token, mask=is_token, other=minus_infinity)
    # In this order: subtracting the maximum first is exact where it matters.
    logprob = (tl.div_rn(x.to(tl.float32), temperature) - scaled_top) - log_total

    # Order: log-probability descending, ties by lower id.
    mine, other = logprob[:, None], logprob[None, :]
    before = (other > mine) | ((other == mine) & (token[None, :] < token[:, None]))
    before = before & is_token[None, :]
    rank = tl.sum(before.to(tl.int32), axis=1)

    # Top-k, ties inclusive. With fewer finite tokens than k, all of them.
    kth = tl.max(tl.where(is_token & (rank == top_k - 1), logprob, minus_infinity), axis=0)
    bar_logprob = (tl.div_rn(bar, temperature) - scaled_top) - log_total
    overflows = (num_tokens < top_k) | (bar_logprob >= kth)
    overflows = overflows & (bar > minus_infinity)
    is_kept = is_token & (logprob >= kth)
    # C was rounded up from the columns asked for, which these may fill.
    num_kept = tl.sum(is_kept.to(tl.int32), axis=0)
    overflows = overflows | ((num_kept >= columns) & (columns < vocab_size))

    # Top-p over what is left: the mass from a token to the tail.
    best = tl.max(logprob, axis=0)
    # Scaled up: a GPU flushes to zero what float32 could still hold below 2**-126.
    weight = tl.where(is_kept, tl.exp2((logprob - best) * _LOG2E + 24.0), 0.0)
    prob = weight / tl.sum(weight, axis=0)
    mass = tl.sum(tl.where(before, 0.0, prob[None, :]), axis=1)
    size = tl.maximum(tl.sum((is_kept & (mass > tail_mass)).to(tl.int32), axis=0), 1)
    size = tl.where(overflows, columns + 1, size)
    size = tl.where(is_valid, size, 0)
    tl.store(size_ptr + row, size.to(tl.int64))

    ids_ptr += row * columns
    logprobs_ptr += row * columns
    is_kept = is_token & (rank < tl.minimum(size, columns))
    tl.store(ids_ptr + rank, token.to(tl.int64), mask=is_kept)
    tl.store(logprobs_ptr + rank, logprob, mask=is_kept)
    # The columns behind. In a row that overflows the tied tokens are missing: call again, larger.
    is_behind = (slot >= tl.minimum(size, num_tokens)) & (slot < columns)
    tl.store(ids_ptr + slot, tl.zeros_like(slot).to(tl.int64), mask=is_behind)
    tl.store(logprobs_ptr + slot, tl.full((CAPACITY,), float("-inf"), tl.float32), mask=is_behind)


@triton.jit
def pick(
    logits_ptr,  # [B, V]
    stats_ptr,  # float32 [B, N, 2]
    id_ptr,  # int64 [B]
    logprob_ptr,  # float32 [B]
    size_ptr,  # int64 [B]
    row_stride,
    vocab_size,
    num_tiles,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    stat_ptr = stats_ptr + (row * num_tiles + tile) * 2
    tile_top = tl.load(stat_ptr, mask=tile < num_tiles, other=float("-inf"))
    tile_sum = tl.load(stat_ptr + 1, mask=tile < num_tiles, other=0.0)
    top = tl.max(tile_top, axis=0)
    below = tl.where(tile_top == float("-inf"), 0.0, tile_top - top)
    total = tl.sum(tile_sum * tl.exp2(below * _LOG2E), axis=0)
    # NaN anywhere makes the sum NaN; an infinite maximum is no distribution either.
    is_valid = (total > 0) & (total < float("inf")) & (tl.abs(top) < float("inf"))
    # The first tile that has the maximum, and in it the first token.
    best = tl.min(tl.where(tile_top == top, tile, TILES - 1), axis=0)
    column = best * TILE + tl.arange(0, TILE)
    x = tl.load(
        logits_ptr + row * row_stride + column, mask=column < vocab_size, other=float("-inf")
    ).to(tl.float32)
    token = tl.min(tl.where((x == top) & (column < vocab_size), column, vocab_size), axis=0)
    tl.store(id_ptr + row, tl.where(is_valid, token, 0).to(tl.int64))
    tl.store(logprob_ptr + row, tl.where(is_valid, -tl.log2(total) / _LOG2E, float("-inf")))
    tl.store(size_ptr + row, is_valid.to(tl.int64))


def covers(logits: Tensor, capacity: int) -> bool:
    """Whether :func:`truncate_triton` takes these."""
    vocab_size = logits.shape[1]
    return (
        logits.dtype in _KEY_BITS
        and vocab_size <= MAX_VOCAB_SIZE
        and internal_capacity(capacity, vocab_size) <= MAX_CAPACITY
    )


def internal_capacity(capacity: int, vocab_size: int) -> int:
    """C of the launch. The C-th largest token is left out: nothing must be, of a whole row."""
    needed = capacity + 1 if capacity == vocab_size else capacity
    return max(MIN_CAPACITY, triton.next_power_of_2(needed))


def truncate_triton(
    logits: Tensor,
    *,
    top_k: int,
    top_p: float,
    temperature: float,
    capacity: int,
    architecture: str,
) -> CandidateSet:
    """The two launches; arguments as those of the operation, with ``top_k <= capacity <= V``."""
    num_rows, vocab_size = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    config = truncate_config(architecture)
    columns, internal = capacity, internal_capacity(capacity, vocab_size)
    device = logits.device
    winners = torch.empty(num_rows, 2 * internal, dtype=torch.int32, device=device)
    result = CandidateSet(
        ids=torch.empty(num_rows, columns, dtype=torch.int64, device=device),
        logprobs=torch.empty(num_rows, columns, device=device),
        size=torch.empty(num_rows, dtype=torch.int64, device=device),
    )
    if not num_rows:
        return result
    maxima, stats = _stream(logits, config, temperature)
    num_groups, num_tiles = maxima.shape[1], stats.shape[1]
    select[(num_rows,)](
        logits,
        maxima,
        stats,
        winners,
        *result,
        _row_stride(logits),
        vocab_size,
        num_groups,
        num_tiles,
        columns,
        top_k,
        # A Python int would be compiled as one.
        float(temperature),
        float(1 - top_p),
        CAPACITY=internal,
        KEY_BITS=_KEY_BITS[logits.dtype],
        GROUPS=max(internal, triton.next_power_of_2(num_groups)),
        TILES=triton.next_power_of_2(num_tiles),
        GROUP=GROUP,
        num_warps=config.select_warps if num_groups <= 4096 else config.wide_select_warps,
    )
    return result


def greedy_triton(logits: Tensor, *, architecture: str) -> CandidateSet:
    """The two launches; arguments as those of the operation."""
    num_rows, vocab_size = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    device = logits.device
    result = CandidateSet(
        ids=torch.empty(num_rows, 1, dtype=torch.int64, device=device),
        logprobs=torch.empty(num_rows, 1, device=device),
        size=torch.empty(num_rows, dtype=torch.int64, device=device),
    )
    if not num_rows:
        return result
    _, stats = _stream(logits, truncate_config(architecture), 1.0)
    num_tiles = stats.shape[1]
    pick[(num_rows,)](
        logits,
        stats,
        *result,
        _row_stride(logits),
        vocab_size,
        num_tiles,
        TILES=triton.next_power_of_2(num_tiles),
        TILE=TILE,
        num_warps=4,
    )
    return result


def _stream(logits: Tensor, config: TruncateConfig, temperature: float) -> tuple[Tensor, Tensor]:
    """The first launch: maxima of groups [B, G], and (maximum, sum of exp) of tiles [B, N, 2]."""
    num_rows, vocab_size = logits.shape
    num_groups, num_tiles = triton.cdiv(vocab_size, GROUP), triton.cdiv(vocab_size, TILE)
    maxima = torch.empty(num_rows, num_groups, dtype=logits.dtype, device=logits.device)
    stats = torch.empty(num_rows, num_tiles, 2, device=logits.device)
    group_maxima[(num_rows * triton.cdiv(num_tiles, config.tiles),)](
        logits,
        maxima,
        stats,
        _row_stride(logits),
        vocab_size,
        num_groups,
        num_tiles,
        1.0 / temperature,
        TILES=config.tiles,
        TILE=TILE,
        GROUP=GROUP,
        num_warps=config.stream_warps,
    )
    return maxima, stats


def _row_stride(logits: Tensor) -> int:
    """Of a single row the stride is of no matter, and 0 is a multiple of 16."""
    return logits.stride(0) if logits.shape[0] > 1 else 0
