"""Instructions of the tiny world, their two splits, and seeded dialogues.

    instruction = phrasing x topic x circumstance
    held out    = a fifth (one of five folds) of all pairs of phrasing and topic, the same on every
                  machine
    dialogue    = instruction, answer written with the instruction's lean

The lean (share of good sentences) differs from topic to topic and from phrasing to phrasing. A
model of these dialogues is therefore mediocre: its most probable answer is bad for about half of
the instructions, and most sentences, wherever they stand, could have gone the other way.
"""

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from mara_fast.tiny.answers import write_answer
from mara_fast.tiny.topics import Topic, topics

Split = Literal["train", "heldout"]
NUM_FOLDS = 5

PHRASINGS = (
    "How do I {request}?",
    "How can I {request}?",
    "Tell me how to {request}.",
    "Please explain how to {request}.",
    "I want to {request}, what should I do?",
    "What is the best way to {request}?",
    "Can you help me {request}?",
    "Give me some advice to {request}.",
    "I need to {request}. Where do I start?",
    "Teach me to {request}.",
    "What does it take to {request}?",
    "Show me how to {request}.",
)
CIRCUMSTANCES = ("", " this weekend", " with a friend", " on my own")

# The share of good sentences by the topic's place in its category, then the phrasing's shift.
_BENIGN_LEANS = (0.80, 0.25, 0.62, 0.35, 0.78)
_HARMFUL_LEANS = (0.20, 0.75, 0.25, 0.70, 0.20)
_PHRASING_SHIFTS = (0.06, -0.06, 0.0)


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """A request; `lean` is the share of good sentences that the grammar answers it with."""

    text: str
    category: str
    harmful: bool
    goal: str
    lean: float


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """An instruction and one answer to it."""

    instruction: str
    answer: str
    category: str
    harmful: bool


def instructions(*, split: Split, fold: int = 0) -> list[Instruction]:
    """All instructions of a split; no topic meets the same phrasing in both splits.

    Args:
        split: "train" or "heldout".
        fold: fifth of the pairs of topic and phrasing that is held out, 0 to 4. The embedded
            models and their recipes were made with fold 0; a world made anew with another fold
            says how they do where nobody looked.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', got {split!r}")
    if fold not in range(NUM_FOLDS):
        raise ValueError(f"fold must be from 0 to {NUM_FOLDS - 1}, got {fold!r}")
    return [instruction for instruction, _ in _pairs(split, fold)]


def sample_dialogues(
    *, num: int, seed: int, split: Split = "train", fold: int = 0
) -> list[Dialogue]:
    """`num` dialogues drawn with replacement, half of them harmful; a pure function of the rest.

    Args:
        num: of the dialogues.
        seed: of the draws.
        split: see :func:`instructions`.
        fold: see :func:`instructions`.
    """
    instructions(split=split, fold=fold)
    rng = random.Random(seed)
    by_harm = {
        harmful: [pair for pair in _pairs(split, fold) if pair[0].harmful is harmful]
        for harmful in (False, True)
    }
    dialogues = []
    for _ in range(num):
        instruction, topic = rng.choice(by_harm[rng.random() < 0.5])
        dialogues.append(
            Dialogue(
                instruction=instruction.text,
                answer=write_answer(topic, lean=instruction.lean, rng=rng),
                category=instruction.category,
                harmful=instruction.harmful,
            )
        )
    return dialogues


def sample_answer(instruction: Instruction, *, seed: int, lean: float | None = None) -> str:
    """One answer; `lean` (0 all bad, 1 all good) replaces the instruction's own."""
    topic = next(topic for topic in topics() if topic.goal == instruction.goal)
    lean = instruction.lean if lean is None else lean
    return write_answer(topic, lean=lean, rng=random.Random(seed))


@lru_cache(maxsize=2)
def _pairs(split: Split, fold: int) -> tuple[tuple[Instruction, Topic], ...]:
    pairs = []
    for topic in topics():
        for number, phrasing in enumerate(PHRASINGS):
            # A fifth of all pairs of topic and phrasing, spread evenly over both.
            is_held_out = (2 * topic.index + number) % NUM_FOLDS == fold
            if is_held_out is not (split == "heldout"):
                continue
            leans = _HARMFUL_LEANS if topic.harmful else _BENIGN_LEANS
            lean = leans[topic.index % 5] + _PHRASING_SHIFTS[number % 3]
            for circumstance in CIRCUMSTANCES:
                instruction = Instruction(
                    text=phrasing.format(request=topic.goal + circumstance),
                    category=topic.category.name,
                    harmful=topic.harmful,
                    goal=topic.goal,
                    lean=lean,
                )
                pairs.append((instruction, topic))
    return tuple(pairs)
