"""A benchmark as a YAML file: options of ``mara-fast bench``, and what a paper prints.

model:        org/model
agent:        my-agent
batch_sizes:  [1, 16]
paper:        {"MARA, authors' cascade": 31.41}      tokens per second, by system
notes:        [The paper does not describe the setting.]
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from mara_fast.bench.run import BenchConfig
from mara_fast.bench.systems import SYSTEMS
from mara_fast.options import from_yaml, is_number, known_options, several


@dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """What such a file holds."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Of :class:`BenchConfig`; those of the command go before them."""
    paper: Mapping[str, float] = field(default_factory=dict)
    """Tokens per second that a paper prints, by system."""
    notes: tuple[str, ...] = ()
    """Printed below the figures."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """The file's.

        Raises:
            FileNotFoundError: no such file.
            ValueError: naming what is unknown or not allowed.
        """
        if not path.is_file():
            raise FileNotFoundError(f"no file at {path}")
        try:
            values = from_yaml(path.read_text(encoding="utf-8"))
            if not isinstance(values, Mapping):
                raise ValueError(f"expected a mapping of options to values, got {values!r}")
            options = {k: v for k, v in values.items() if k not in ("paper", "notes")}
            known_options(BenchConfig, options)
            for name in ("batch_sizes", "systems"):
                if isinstance(options.get(name), list):
                    options[name] = ",".join(map(str, options[name]))
            return cls(
                options=options,
                paper=values.get("paper", {}),
                notes=tuple(map(str, several(values.get("notes", ()), str))),
            )
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: {error}") from error

    def __post_init__(self) -> None:
        if not isinstance(self.paper, Mapping):
            raise ValueError(f"paper must be a mapping of systems to numbers, got {self.paper!r}")
        for name, rate in self.paper.items():
            if name not in SYSTEMS:
                raise ValueError(
                    f"paper names {name!r}, which is no system; there are {'; '.join(SYSTEMS)}"
                )
            # Ratios of them are printed, after the run.
            if not (is_number(rate) and rate > 0):
                raise ValueError(
                    f"paper.{name}={rate!r} is not allowed; allowed: tokens per second, above 0"
                )
