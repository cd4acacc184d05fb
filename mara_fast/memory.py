"""Memory for keys and values: how much is free, and which prompts share what.

    pool = slots of one length, as many as fit the memory       long prompts, few slots
    the next pool takes its place when it is done               short ones, many

Only the prompts that are being decoded have keys and values, and a few short ones that are read
ahead of their turn; those that wait have none.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mara_fast.prompts import PromptError

_LENGTH_STEP = 64
"""Slot lengths are rounded up to this, so that a cache serves several runs."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Prompts that are decoded together."""

    members: list[int]
    """Their places in what was planned for."""
    num_slots: int
    """Sequences decoded at once."""
    max_length: int
    """Positions of a slot."""
    num_ahead: int = 0
    """Slots beyond, for prompts that are read before there is a place for them."""


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated there without swapping."""
    if device.type == "cuda":
        # What torch holds and does not use is free, too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def slot_bytes(length: int, *, scratch: int, row_bytes: int) -> int:
    """Of a slot of so many positions, with its scratch and its trash row."""
    return (length + scratch + 1) * row_bytes


def rounded(length: int) -> int:
    """The length of the slots for a sequence of so many positions."""
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP


_ROWS_WORTH_A_FORWARD = 256
"""Of prompts: fewer take as long on a GPU, and per row much longer on a CPU."""


def plan_pools(
    lengths: Sequence[int],
    *,
    max_slots: int,
    scratch: int,
    row_bytes: int,
    budget: int,
    prompt_lengths: Sequence[int] | None = None,
) -> list[Pool]:
    """Pools for sequences, those of short ones first.

    Sequences go into one pool as long as the slots of the longest leave room for as many of them as
    may be decoded at once; the rest, shorter by half at least, get a pool with more slots.

    Args:
        lengths: positions that each sequence needs.
        max_slots: sequences decoded at once.
        scratch: rows of a slot beyond its length.
        row_bytes: keys and values of a position, all layers.
        budget: bytes of a pool; at least a slot of the longest has to fit.
        prompt_lengths: tokens of their prompts, of which short ones are read ahead where memory is
            left; None: none are.

    Raises:
        PromptError: not even one slot of its length fits, with the numbers.
    """
    waiting = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    pools: list[Pool] = []
    while waiting:
        longest = rounded(lengths[waiting[0]])
        each = slot_bytes(longest, scratch=scratch, row_bytes=row_bytes)
        fitting = budget // each
        if not fitting:
            raise PromptError(
                waiting[0],
                f" needs {lengths[waiting[0]]} positions, {each / 1e9:.3g} GB "
                f"of keys and values; there is room for {budget / 1e9:.3g} GB: shorten it, lower "
                "max_new_tokens or prefill_chunk, raise memory_utilization, or free memory",
            )
        if fitting >= min(max_slots, len(waiting)):
            members, waiting = waiting, []
        else:
            members = [place for place in waiting if 2 * rounded(lengths[place]) > longest]
            waiting = waiting[len(members) :]
        num_slots = min(max_slots, fitting, len(members))
        num_ahead = min(fitting, len(members)) - num_slots
        if prompt_lengths is None:
            num_ahead = 0
        else:
            prompts = [prompt_lengths[place] for place in members]
            num_ahead = min(num_ahead, worth_reading_ahead(prompts, num_slots))
        pools.append(
            Pool(
                members=sorted(members),
                num_slots=num_slots,
                max_length=longest,
                num_ahead=num_ahead,
            )
        )
    return pools[::-1]


def worth_reading_ahead(prompt_lengths: Sequence[int], num_slots: int) -> int:
    """How many prompts to read with the one that there is a place for: as many as fill a forward,
    and no more than half of those that decode.

    Args:
        prompt_lengths: tokens of each prompt.
        num_slots: sequences decoded at once.
    """
    together = _ROWS_WORTH_A_FORWARD * len(prompt_lengths) // max(1, sum(prompt_lengths))
    return max(0, min(together - 1, num_slots // 2))
