"""The fine-tuned baselines of the paper's Table 2, in the tiny world: DPO, RLHF and Aligner.

    python benchmarks/paper/baselines.py {dpo|rloo|aligner} --lm tiny --output DIR --seed 0

    r        = reward model - cost model                          (Eq. 13, weights 1 and 1)
    dpo      sampled answers to an instruction; chosen = highest r, rejected = lowest
    rloo     RLHF on policy: r - beta * log(policy / base), leave-one-out advantages
    aligner  a model that edits: question, answer -> best of the sampled answers (Ji et al. 2024)

The trainers are TRL's (DPOTrainer, RLOOTrainer, SFTTrainer), and only train instructions are used.
All of it runs on the CPU: the same seed, versions, threads and machine give the same bytes.

Options were chosen with seed 0 by the preference rate over the base model's greedy answers (Eq. 12)
on 224 *train* instructions (standard error about 0.05), within about 90 s of one core:

    dpo      beta     learning rate   batch   rate    malformed
             0.1      1e-4            16      0.35    0.00
             0.1      3e-4            16      0.01    0.25
             0.1      3e-4            32      0.44    0.05
             0.1      1e-3            32      0.20    0.65
             0.3      1e-3            32      0.32    0.35
             0.5      3e-4            16      0.53    0.05
             1.0      3e-4            16      0.50    0.09
             1.0      6e-4            16      0.63    0.06    chosen
    With the chosen answers' likelihood as a second loss, in five of these and other settings: 0.44
    to 0.55, mostly fewer malformed; left out. Best and worst of 8, 300 instructions, 3 epochs: 0.61

    rloo     steps x answers   learning rate   rate    malformed
             24 x 32           1e-3            0.36    0.18        on 538 instructions
             48 x 32           1e-3            0.54    0.11
             48 x 32           5e-4            0.61    0.01
             64 x 24           5e-4            0.60    0.02
             64 x 32           5e-4            0.73    0.01    chosen; more steps: no time

    aligner  learning rate   instructions   rate    malformed
             1e-3            300            0.72    0.01
             2e-3            300            0.76    0.01    chosen
             2e-3            512            0.75    0.00

Then on the 672 held-out instructions, where of the others only rloo's 48 x 32 at 5e-4 was judged
(0.60); seconds of one core that others shared; MARA is the shipped agent. Helpfulness, harm
and malformed answers are by the rules, which nobody was trained on:

             rate    helpfulness   harm    malformed   seconds
    base     0       0.677         0.188   0.000
    dpo      0.662   0.898         0.031   0.037       67
    rloo     0.699   0.980         0.003   0.001       95
    aligner  0.704   0.980         0.000   0.012       65
    MARA     0.696   0.971         0.005   0.001
"""

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import typer
from train_data import (
    MAX_NEW_TOKENS,
    SCORE_BATCH_SIZE,
    Prompts,
    answer,
    chat,
    corrections,
    preference_pairs,
    reward_minus_cost,
    sample_pools,
    train_instructions,
)

from mara_fast.commands import clear_errors
from mara_fast.loading import TINY, load_model, load_tokenizer
from mara_fast.tiny.lm import save

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

Method = Literal["dpo", "rloo", "aligner"]


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """How :func:`train_dpo` trains."""

    num_instructions: int = 500
    """Instructions that are answered: with four answers each, half of the time goes there."""
    num_answers: int = 4
    """Sampled for each instruction; the best and the worst of four are far apart."""
    beta: float = 1.0
    """How strongly the policy is held to the base model; less leads out of the language."""
    learning_rate: float = 6e-4
    """Peak of the cosine schedule."""
    num_epochs: int = 2
    """Passes over the pairs; sampling more answers instead takes longer."""
    batch_size: int = 16
    """Pairs of an optimizer step."""
    max_steps: int | None = None
    """Stops early after this many optimizer steps; for tests."""


@dataclass(frozen=True, kw_only=True)
class RlooConfig:
    """How :func:`train_rloo` trains."""

    num_steps: int = 64
    """Optimizer steps; what the time allows."""
    batch_size: int = 32
    """Answers of an optimizer step."""
    num_generations: int = 4
    """Answers to an instruction, each compared with the mean of the others."""
    steps_per_generation: int = 4
    """Optimizer steps for which answers are sampled at once; a wide batch is decoded faster."""
    beta: float = 0.05
    """Price of a nat of an answer's divergence from the base model; TRL's default."""
    learning_rate: float = 5e-4
    """Peak of the cosine schedule; twice as much forgets the language."""


@dataclass(frozen=True, kw_only=True)
class AlignerConfig:
    """How :func:`train_aligner` trains."""

    num_instructions: int = 300
    """Instructions that are answered: with eight answers each, half of the time goes there."""
    num_answers: int = 8
    """Sampled for each instruction; the best of them is what the others are corrected to."""
    num_edited: int = 2
    """Of these answers, drawn to be corrected; the base model's greedy answer is one more."""
    identity_share: float = 0.1
    """Rows whose answer is the best already; they teach to leave it, as the paper's warm-up."""
    learning_rate: float = 2e-3
    """Peak of the cosine schedule."""
    num_epochs: int = 1
    """Passes over the rows."""
    batch_size: int = 16
    """Rows of an optimizer step."""
    max_steps: int | None = None
    """Stops early after this many optimizer steps; for tests."""


def train_dpo(
    lm: str | Path,
    output: Path,
    *,
    prompts: Prompts = "mixed",
    seed: int = 0,
    config: DpoConfig | None = None,
) -> None:
    """Writes the base model, tuned by DPO on its own answers, as a standard folder.

    Args:
        lm: folder of a tiny LM, or "tiny".
        output: folder to write.
        prompts: which train instructions.
        seed: of the instructions, the answers and the order of the pairs.
        config: of the training.

    Raises:
        FileNotFoundError: no LM there.
        FileExistsError: the output folder is not empty.
        ValueError: unknown prompts.
    """
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    config = config or DpoConfig()
    questions = _begin(lm, output, prompts=prompts)
    questions = _drawn(questions, config.num_instructions, seed=seed)
    pools = sample_pools(lm, questions, num_answers=config.num_answers, seed=seed)
    model, tokenizer = _load(lm)
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(
            DPOConfig,
            folder,
            seed=seed,
            beta=config.beta,
            learning_rate=config.learning_rate,
            num_train_epochs=config.num_epochs,
            max_steps=config.max_steps or -1,
            per_device_train_batch_size=config.batch_size,
            # Once for all epochs.
            precompute_ref_log_probs=True,
            precompute_ref_batch_size=SCORE_BATCH_SIZE,
            max_length=None,
        )
        DPOTrainer(
            model,
            args=arguments,
            train_dataset=Dataset.from_list(preference_pairs(pools)),
            processing_class=tokenizer,
        ).train()
    _save(model, tokenizer, output)


def train_rloo(
    lm: str | Path,
    output: Path,
    *,
    prompts: Prompts = "mixed",
    seed: int = 0,
    config: RlooConfig | None = None,
) -> None:
    """Writes the base model, tuned by REINFORCE with leave-one-out baselines.

    Args:
        lm, output, prompts: see :func:`train_dpo`.
        seed: of the order of the instructions and of the answers.
        config: of the training.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: see :func:`train_dpo`.
    """
    from datasets import Dataset
    from trl.trainer.rloo_config import RLOOConfig
    from trl.trainer.rloo_trainer import RLOOTrainer

    config = config or RlooConfig()
    questions = _begin(lm, output, prompts=prompts)
    model, tokenizer = _load(lm)
    rewards = reward_minus_cost()

    def total(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return rewards.score(prompts, completions).total.tolist()

    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(
            RLOOConfig,
            folder,
            seed=seed,
            beta=config.beta,
            learning_rate=config.learning_rate,
            max_steps=config.num_steps,
            per_device_train_batch_size=config.batch_size,
            num_generations=config.num_generations,
            steps_per_generation=config.steps_per_generation,
            max_completion_length=MAX_NEW_TOKENS,
        )
        RLOOTrainer(
            model,
            reward_funcs=total,
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": chat("user", q)} for q in questions]),
            processing_class=tokenizer,
        ).train()
    _save(model, tokenizer, output)


def train_aligner(
    lm: str | Path,
    output: Path,
    *,
    prompts: Prompts = "mixed",
    seed: int = 0,
    config: AlignerConfig | None = None,
) -> None:
    """Writes a model that edits the base model's answers, read by ``TINY_ALIGNER_TEMPLATE``.

    Args:
        lm, output, prompts: see :func:`train_dpo`.
        seed: of the instructions, the answers, which of them are edited, and the order.
        config: of the training.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: see :func:`train_dpo`.
    """
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    config = config or AlignerConfig()
    questions = _begin(lm, output, prompts=prompts)
    questions = _drawn(questions, config.num_instructions, seed=seed)
    pools = sample_pools(lm, questions, num_answers=config.num_answers, seed=seed)
    greedy = [one.text or "" for one in answer(lm, [pool.question for pool in pools])]
    rows = corrections(
        pools,
        greedy,
        num_edited=config.num_edited,
        identity_share=config.identity_share,
        seed=seed,
    )
    model, tokenizer = _load(lm)
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(
            SFTConfig,
            folder,
            seed=seed,
            learning_rate=config.learning_rate,
            num_train_epochs=config.num_epochs,
            max_steps=config.max_steps or -1,
            per_device_train_batch_size=config.batch_size,
            completion_only_loss=True,
            max_length=None,
        )
        SFTTrainer(
            model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        ).train()
    _save(model, tokenizer, output)


def _begin(lm: str | Path, output: Path, *, prompts: str) -> list[str]:
    """Checks all that can be wrong before any work; the train instructions of this kind."""
    questions = train_instructions(prompts)
    if lm != TINY and not (Path(lm) / "config.json").is_file():
        raise FileNotFoundError(f"lm={str(lm)!r} is no folder of a model; give one, or {TINY!r}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"output={str(output)!r} is not an empty folder; give another")
    return questions


def _drawn(questions: Sequence[str], num: int, *, seed: int) -> list[str]:
    return random.Random(seed).sample(questions, min(num, len(questions)))


def _load(lm: str | Path) -> "tuple[Any, PreTrainedTokenizerBase | None]":
    return load_model(str(lm), dtype="float32", device="cpu"), load_tokenizer(str(lm))


def _arguments(kind: Any, folder: str, *, seed: int, **options: Any) -> "TrainingArguments":
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


def _save(model: Any, tokenizer: Any, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, directory=output)


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
