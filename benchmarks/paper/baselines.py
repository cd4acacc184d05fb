"""The fine-tuned baselines of the paper's Table 2, in the tiny world: DPO, RLHF and Aligner.

    python benchmarks/paper/baselines.py {dpo|rloo|aligner} --lm tiny --output DIR --seed 0

The trainers are TRL's (DPOTrainer, RLOOTrainer, SFTTrainer), and only train instructions are used.
How their options were chosen stands beside each. On the 672 held-out instructions, where of the
options that were not chosen only rloo's 48 x 32 at 5e-4 was judged (0.60); seconds of one core that
others shared; MARA is the shipped agent. Helpfulness, harm and malformed answers are by the rules,
which nobody was trained on:

             rate    helpfulness   harm    malformed   seconds
    base     0       0.677         0.188   0.000
    dpo      0.662   0.898         0.031   0.037       67
    rloo     0.699   0.980         0.003   0.001       95
    aligner  0.704   0.980         0.000   0.012       65
    MARA     0.696   0.971         0.005   0.001
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from aligner import train_aligner
from dpo import train_dpo
from rloo import train_rloo
from train_data import Prompts

from mara_fast.commands import clear_errors
from mara_fast.loading import TINY

Method = Literal["dpo", "rloo", "aligner"]

TRAININGS: dict[str, Callable[..., None]] = {
    "dpo": train_dpo,
    "rloo": train_rloo,
    "aligner": train_aligner,
}
"""By the names that the command takes."""


@clear_errors()
def main(
    method: Annotated[Method, typer.Argument(help="Which baseline.")],
    output: Annotated[Path, typer.Option(file_okay=False, help="Folder to write; empty or new.")],
    lm: Annotated[str, typer.Option(help="Folder of a tiny LM, or tiny.")] = TINY,
    prompts: Annotated[Prompts, typer.Option(help="Which train instructions.")] = "mixed",
    seed: Annotated[int, typer.Option(min=0, help="Of everything.")] = 0,
    threads: Annotated[
        int, typer.Option(min=1, help="Of torch; another number may make another model.")
    ] = 1,
) -> None:
    """Train a baseline on the tiny world's instructions, and write it as a model's folder."""
    torch.set_num_threads(threads)
    TRAININGS[method](lm, output, prompts=prompts, seed=seed)


if __name__ == "__main__":
    typer.run(main)
