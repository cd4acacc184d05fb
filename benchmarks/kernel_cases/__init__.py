"""What kernel_speed.py measures: by operation its cases, each with inputs, baselines, floor, check.

Fairness: every version of a case has the same inputs and gives the same result, in the form of our
operation; what a decoder prepares once per forward or per model (folded weights, masks, copies of
the prefix) is prepared outside the clock, for all of them.
"""

from kernel_cases import attention, bookkeeping, cascade, layers, score, truncate
from kernel_cases.case import Build, Case, Version

__all__ = ["SUITES", "Build", "Case", "Version"]

SUITES: dict[str, list[Build]] = {
    "truncate": truncate.SUITE,
    "score": score.SUITE,
    "cascade": cascade.SUITE,
    "attention": attention.SUITE,
    "bookkeeping": bookkeeping.SUITE,
    "layers": layers.SUITE,
}
