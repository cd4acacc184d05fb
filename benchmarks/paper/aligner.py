"""A model that edits: question, answer -> the best of the sampled answers (Ji et al. 2024).

Options were chosen with seed 0 by the preference rate over the base model's greedy answers (Eq. 12)
on 224 *train* instructions (standard error about 0.05), within about 90 s of one core:

    learning rate   instructions   rate    malformed
    1e-3            300            0.72    0.01
    2e-3            300            0.76    0.01    chosen
    2e-3            512            0.75    0.00
"""

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetuning import begin, drawn, load, trl_arguments, write
from train_data import Pool, Prompts, answer, sample_pools

from mara_fast.tiny.tokenizer import ASSISTANT, END, USER

TINY_ALIGNER_TEMPLATE = USER + "{question}" + USER + "{answer}" + ASSISTANT
"""How the tiny Aligner reads what it edits; encoded as raw text, which puts one <|bos|> in front.
Two turns of the user in a row are in no document of the corpus."""


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
    questions = begin(lm, output, prompts=prompts)
    questions = drawn(questions, config.num_instructions, seed=seed)
    pools = sample_pools(lm, questions, num_answers=config.num_answers, seed=seed)
    greedy = [one.text or "" for one in answer(lm, [pool.question for pool in pools])]
    rows = corrections(
        pools,
        greedy,
        num_edited=config.num_edited,
        identity_share=config.identity_share,
        seed=seed,
    )
    model, tokenizer = load(lm)
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl_arguments(
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
    write(model, tokenizer, output)


def corrections(
    pools: Sequence[Pool],
    greedy: Sequence[str],
    *,
    num_edited: int,
    identity_share: float,
    seed: int,
) -> list[dict[str, str]]:
    """Prompts of the Aligner and what it should answer, as TRL's rows.

    Args:
        pools: of which the best answer is the correction.
        greedy: the base model's most probable answer to each.
        num_edited: answers of a pool, drawn to be corrected; the greedy one is one more.
        identity_share: of rows whose answer is the best already.
        seed: of the draws.
    """
    rng = random.Random(seed)
    rows = []
    for pool, most_probable in zip(pools, greedy, strict=True):
        drawn = rng.sample(pool.answers, min(num_edited, len(pool.answers)))
        for edited in (most_probable, *drawn):
            if rng.random() < identity_share:
                edited = pool.answers[0]
            prompt = aligner_prompt(pool.question, edited)
            rows.append({"prompt": prompt, "completion": pool.answers[0] + END})
    return rows


def aligner_prompt(question: str, answer: str) -> str:
    """The filled :data:`TINY_ALIGNER_TEMPLATE`."""
    return TINY_ALIGNER_TEMPLATE.format(question=question, answer=answer)
