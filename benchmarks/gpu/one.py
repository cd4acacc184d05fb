"""One stage of this package: ``python -m benchmarks.gpu.one exact --output exact.json``."""

import argparse
import importlib
from pathlib import Path

import torch

from benchmarks.gpu.finding import Finding
from benchmarks.gpu.options import Options

STAGES = ("exact", "divergence", "captured", "learning", "steps")
"""Modules with a function ``run``."""


def run(name: str, options: Options) -> Finding:
    """What the stage finds."""
    return importlib.import_module(f"benchmarks.gpu.{name}").run(options)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU does in seconds")
    parser.add_argument("--model", default="llama-3.1-8b", help="shape, where one is taken")
    parser.add_argument("--compile", action="store_true", help="its steps, where one is taken")
    parser.add_argument("--label", default="", help="of figures, behind the shape")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    options = Options(
        device=torch.device(arguments.device),
        small=arguments.small,
        model=arguments.model,
        compile=arguments.compile,
        label=arguments.label,
        keep=lambda finding: finding.save(arguments.output),
    )
    finding = run(arguments.stage, options)
    finding.save(arguments.output)
    print("\n".join([*finding.notes, *(f"problem: {one}" for one in finding.problems)]))


if __name__ == "__main__":
    main()
