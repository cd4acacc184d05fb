"""The tiny world made anew for every fold: how the recipe does where nobody looked.

    python benchmarks/tiny_folds.py --folder FOLDER --output benchmarks/results/tiny_folds.json

The recipe was chosen on the held-out instructions of fold 0. For each other fold everything (LM,
reward and cost model, agent) is trained from nothing, and judged on that fold's instructions.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mara_fast.bench.facts import cpu_facts
from mara_fast.tiny.grammar import NUM_FOLDS

SYSTEMS = ("agent", "base, greedy", "base, sampled", "untrained, seed 0")


def main(
    folder: Annotated[Path, typer.Option(help="Of the worlds; those it has are not made again.")],
    output: Annotated[Path | None, typer.Option(help="JSON.")] = None,
) -> None:
    """Make the worlds that are missing, print and write what was found, and the medians."""
    judgements: dict[int, dict[str, dict[str, float]]] = {}
    for fold in track(range(1, NUM_FOLDS), description="folds", console=Console(stderr=True)):
        world = folder / f"fold-{fold}"
        if not (world / "run/judgement.json").is_file():
            command = [sys.executable, "-m", "mara_train.tiny", "--make-world"]
            options = {"fold": fold, "world": world, "output": world / "run", "num-controls": 1}
            for name, value in options.items():
                command += [f"--{name}", str(value)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        judgements[fold] = json.loads((world / "run/judgement.json").read_text(encoding="utf-8"))
    medians = {
        system: {
            name: statistics.median(each[system][name] for each in judgements.values())
            for name in judgements[1][system]
        }
        for system in SYSTEMS
    }
    _print(judgements, medians)
    if output is not None:
        report: dict[str, Any] = {
            **cpu_facts(os.cpu_count() or 1, "transformers", "trl"),
            "folds": judgements,
            "medians": medians,
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _print(
    judgements: dict[int, dict[str, dict[str, float]]], medians: dict[str, dict[str, float]]
) -> None:
    console = Console()
    for system in SYSTEMS:
        table = Table(title=f"{system}, held-out instructions by fold", title_justify="left")
        table.add_column("")
        for title in (*map(str, judgements), "median"):
            table.add_column(title, justify="right")
        for name, median in medians[system].items():
            values = [found[system][name] for found in judgements.values()]
            table.add_row(name, *(f"{value:.3f}" for value in (*values, median)))
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
