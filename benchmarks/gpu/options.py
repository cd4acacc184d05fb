"""What a stage of this package is told."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.gpu.finding import Finding


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of one stage."""

    device: torch.device
    small: bool
    """A rehearsal: the same way through, with sizes that a CPU does in seconds."""
    model: str
    """Shape of a random model, where the stage takes one."""
    compile: bool
    """The language model's steps are compiled, where the stage decodes with one."""
    label: str
    """Of its figures, behind the shape."""
    keep: Callable[[Finding], None]
    """Is given what is found so far, lest it be lost."""
