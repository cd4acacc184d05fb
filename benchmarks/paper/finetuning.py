"""What the fine-tuned baselines have in common: checks, loading, TRL's arguments, writing.

All of it runs on the CPU: the same seed, versions, threads and machine give the same bytes.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_data import train_instructions

from mara_fast.loading import TINY, load_model, load_tokenizer
from mara_fast.tiny.lm import save

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments


def begin(lm: str | Path, output: Path, *, prompts: str) -> list[str]:
    """Checks all that can be wrong before any work; the train instructions of this kind.

    Raises:
        FileNotFoundError: no LM there.
        FileExistsError: the output folder is not empty.
        ValueError: unknown prompts.
    """
    questions = train_instructions(prompts)
    if lm != TINY and not (Path(lm) / "config.json").is_file():
        raise FileNotFoundError(f"lm={str(lm)!r} is no folder of a model; give one, or {TINY!r}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"output={str(output)!r} is not an empty folder; give another")
    return questions


def drawn(questions: Sequence[str], num: int, *, seed: int) -> list[str]:
    """So many of the instructions, or all of fewer."""
    return random.Random(seed).sample(questions, min(num, len(questions)))


def load(lm: str | Path) -> "tuple[Any, PreTrainedTokenizerBase | None]":
    """The base model in float32, and its tokenizer."""
    return load_model(str(lm), dtype="float32", device="cpu"), load_tokenizer(str(lm))


def trl_arguments(kind: Any, folder: str, *, seed: int, **options: Any) -> "TrainingArguments":
    """TRL's, with what all three have in common: nothing is kept, logged or moved to a GPU."""
    return kind(
        output_dir=folder,
        seed=seed,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        optim="adamw_torch_fused",
        adam_beta2=0.98,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        **options,
    )


def write(model: Any, tokenizer: Any, output: Path) -> None:
    """A standard folder, as an engine loads it."""
    output.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, directory=output)
