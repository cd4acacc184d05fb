"""A stage: a command of its own, so that its crash or hang costs no other stage anything."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.gpu.finding import Finding

OUTPUT = "{output}"
"""In a command: the JSON file that it shall write."""

Status = Literal["passed", "failed", "cut short", "left out"]
"""``cut short``: the run's time was over before it was done; ``left out``: it was never begun."""

Read = Callable[[Any, str], Finding]
"""What the command found: of the JSON that it wrote, if it writes one, and all that it printed."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One thing to check or to time."""

    name: str
    command: tuple[str, ...]
    read: Read
    estimate_s: float
    """What it takes, about; it is not begun with less time left than half of this."""
    cap_s: float
    """What it may take at most; beyond it is hung, and has failed."""
    is_timed: bool = False
    """It measures: nothing else runs meanwhile."""
    environment: Mapping[str, str] = field(default_factory=dict)
    obstacle: str = ""
    """Why it cannot run here: it is left out."""


@dataclass(kw_only=True)
class Outcome:
    """What became of a stage."""

    name: str
    status: Status
    seconds: float = 0.0
    reason: str = ""
    """Of a stage that did not pass: its first error, or why it did not run to its end."""
    finding: Finding = field(default_factory=Finding)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self) | {"finding": self.finding.to_dict()}


_ERROR = re.compile(
    r"^(?:FAILED |ERROR )?.*(?:\b\w*(?:Error|Exception)\b: ?|\berror: |core dumped|Segmentation)"
)


def first_error(log: str) -> str:
    """The line of a log that says what went wrong: of a traceback its last, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    raised = [line for line in lines if _ERROR.match(line)]
    found = named[:1] or raised[:1] or lines[-1:] or ["it printed nothing"]
    return found[0][:300]


def own(values: Any, log: str) -> Finding:
    """Of a stage of this package, which writes a finding."""
    return Finding.from_dict(values)
