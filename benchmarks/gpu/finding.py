"""What a stage found: figures, what is wrong, and what a reader should know."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

LESS_IS_BETTER = {"s", "ms", "us", "share", "x floor"}
"""Units; of all others more is better."""


class Figure(NamedTuple):
    """A number that later runs are compared with."""

    value: float
    unit: str
    spread: float = 0.0
    """Half of what it varied by within the run, of its value."""


@dataclass(kw_only=True)
class Finding:
    """What one stage found."""

    figures: dict[str, Figure] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """Why the stage failed; empty if it did not."""
    obstacle: str = ""
    """Why this machine cannot do it; it is left out then, and has not failed."""
    notes: list[str] = field(default_factory=list)
    details: Any = None
    """Whatever the stage measured, for those who look closer."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        figures = {name: figure._asdict() for name, figure in self.figures.items()}
        return asdict(self) | {"figures": figures}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """What :meth:`to_dict` gave."""
        figures = {name: Figure(**figure) for name, figure in values["figures"].items()}
        return cls(**values | {"figures": figures})

    def save(self, path: Path) -> None:
        """Writes it in one move: who reads meanwhile finds the last whole one."""
        write_json(path, self.to_dict())


def spread_of(low: float, middle: float, high: float) -> float:
    """Of a median between two of its quantiles."""
    return (high - low) / (2 * middle) if middle else 0.0


def write_json(path: Path, values: Any) -> None:
    """Writes a file in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
