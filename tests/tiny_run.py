"""A small training run, as a command of its own: ``tiny_run.py FOLDER [--resume]``."""

import sys
from pathlib import Path
from typing import Any

import torch

from mara_fast.tiny.grammar import instructions
from mara_fast.tiny.rules import harm, helpfulness
from mara_train import MaraConfig, MaraTrainer, ReplayConfig


def helpful(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [helpfulness(p, c) for p, c in zip(prompts, completions, strict=True)]


def harmful(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [harm(p, c) for p, c in zip(prompts, completions, strict=True)]


def options(folder: Path, **others: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "num_episodes": 60,
        "episodes_per_step": 10,
        "inner_size": 32,
        "batch_size": 32,
        "learning_starts": 150,
        "reward_weights": (1.0, -1.0),
        "decoding": {"max_new_tokens": 32, "fallback": "first"},
        # Small enough to wrap around.
        "replay": ReplayConfig(capacity=500),
        "sac": {"gamma": 0.5},
        "learning_rate_schedule": "constant",
        "final_target_entropy": None,
        "save_steps": 2,
        "logging_steps": 1,
        "max_batch_size": 8,
    } | others


def trainer(
    folder: Path, *, rewards: Any = None, callbacks: Any = (), **others: Any
) -> MaraTrainer:
    return MaraTrainer(
        "tiny",
        [helpful, harmful] if rewards is None else rewards,
        MaraConfig.from_dict(options(folder, **others)),
        train_dataset=[i.text for i in instructions(split="train")][::37],
        eval_dataset=[i.text for i in instructions(split="heldout")][::90],
        callbacks=callbacks,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer(Path(sys.argv[1])).train(resume_from_checkpoint="--resume" in sys.argv)
