"""What a GPU does in a captured step, and how long it does nothing, from a profile of its kernels.

    idle share    = 1 - union of the kernels' intervals / (first start to last end)
    share by part = time of the kernels of its names / time of all kernels

The profiler records each kernel of a replayed graph. It may delay their starts by a fraction of a
microsecond each, which makes the idle share an upper bound.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

PARTS: dict[str, str] = {
    "attention": r"^(attend|combine)(_\w+)?$",
    "truncate": r"^(group_maxima|select|pick)(_\w+)?$",
    "score": r"^(row_stats|first_layer|other_layers|finish)(_\w+)?$",
    "cascade": r"^decide(_\w+)?$",
    "bookkeeping": r"^(proposing|settling|admitting|keeping)(_\w+)?$",
    "layers": r"^(normalizing|rotating)(_\w+)?$",
    "matrix products": r"gemm|gemv|nvjet|cutlass|cublas|splitK|matmul",
    "copies and indexing": r"(?i)memcpy|memset|copy|index|gather|scatter",
}
"""Names of kernels by part of the step, the first that matches; ours by their whole names,
to which a version of Triton may add how they were specialised."""
OTHERS = "activations, others"


class Kernel(NamedTuple):
    """A run of a kernel, or of a copy."""

    name: str
    start_us: float
    end_us: float


class Profile(NamedTuple):
    """Of some steps."""

    idle_share: float
    parts: dict[str, float]
    """Shares of the busy time."""


def busy_time(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def profile_of(kernels: list[Kernel]) -> Profile:
    """Of the kernels of some steps.

    Raises:
        ValueError: there are none.
    """
    if not kernels:
        raise ValueError("no kernel was recorded: the profiler saw nothing of the GPU")
    span = max(one.end_us for one in kernels) - min(one.start_us for one in kernels)
    busy = busy_time((one.start_us, one.end_us) for one in kernels)
    seconds: dict[str, float] = {}
    for one in kernels:
        part = part_of(one.name)
        seconds[part] = seconds.get(part, 0.0) + one.end_us - one.start_us
    total = sum(seconds.values())
    return Profile(1 - busy / span, {part: spent / total for part, spent in seconds.items()})


def part_of(name: str) -> str:
    """Of the step, by a kernel's name."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name)), OTHERS)


def record(run: Callable[[], object]) -> list[Kernel]:
    """The kernels of a run on the current GPU, which is waited for."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]
