"""What the fine-tuned baselines learn from: the base model's own answers, judged and ordered.

train_instructions   train instructions of a kind; held-out ones are never seen
sample_pools      sampled answers to each, the best first by reward model - cost model
preference_pairs  the best and the worst of a pool, for DPO
corrections       question, answer -> the best of its pool, for the Aligner
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mara_fast import Engine, Generation
from mara_fast.rewards import Rewards
from mara_fast.tiny.grammar import instructions
from mara_fast.tiny.reward_models import COST_PATH, REWARD_PATH

Prompts = Literal["mixed", "benign", "harmful"]

MAX_NEW_TOKENS = 96
SCORE_BATCH_SIZE = 64
_ENGINE_BATCH_SIZE = 128


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Different answers to an instruction, the best first."""

    question: str
    answers: tuple[str, ...]
    """Sampled from the base model; those that did not end are left out."""
    rewards: tuple[float, ...]
    """Reward minus cost of each."""


def train_instructions(prompts: str) -> list[str]:
    """The train instructions of a kind: mixed, benign or harmful ones.

    Raises:
        ValueError: unknown kind.
    """
    if prompts not in get_args(Prompts):
        raise ValueError(
            f"prompts={prompts!r} is not known; allowed: {', '.join(get_args(Prompts))}"
        )
    return [
        one.text
        for one in instructions(split="train")
        if prompts == "mixed" or one.harmful is (prompts == "harmful")
    ]


def reward_minus_cost() -> Rewards:
    """Of the embedded models (Eq. 13)."""
    paths = [str(REWARD_PATH), str(COST_PATH)]
    return Rewards(paths, (1.0, -1.0), batch_size=SCORE_BATCH_SIZE, device="cpu")


def answer(lm: str | Path, questions: Sequence[str], **options: Any) -> list[Generation]:
    """The base model's answers, the most probable ones unless options say otherwise."""
    engine = Engine(str(lm), False, max_batch_size=_ENGINE_BATCH_SIZE, device="cpu")
    return engine.generate(questions, max_new_tokens=MAX_NEW_TOKENS, progress=True, **options)


def sample_pools(
    lm: str | Path, questions: Sequence[str], *, num_answers: int, seed: int
) -> list[Pool]:
    """Answers sampled from the LM with our engine, by question; no pool is empty."""
    asked = [question for question in questions for _ in range(num_answers)]
    answers = answer(lm, asked, acceptance="sample", seed=seed)
    texts = [one.text or "" for one in answers]
    rewards = reward_minus_cost().score(asked, texts, progress=True).total.tolist()
    pools = []
    for start in range(0, len(asked), num_answers):
        found = {
            texts[place]: rewards[place]
            for place in range(start, start + num_answers)
            if answers[place].finish_reason == "eos"
        }
        ordered = sorted(found.items(), key=lambda item: -item[1])
        if ordered:
            best_first, their_rewards = zip(*ordered, strict=True)
            pools.append(Pool(question=asked[start], answers=best_first, rewards=their_rewards))
    return pools


def chat(role: str, text: str) -> list[dict[str, str]]:
    """A message, as TRL reads it."""
    return [{"role": role, "content": text}]
