"""The sentences of the tiny world: patterns by kind, their inventory, and its inverse.

A pattern holds the slots of a topic (`{goal}`, `{thing}`, ...) and groups of interchangeable words
(`[a|b|c]`). Writing an answer fills patterns at random; judging one looks its sentences up in the
inventory of everything that could have been written:

    inventory = {text: Sentence for kind for pattern for topic for text in expand(pattern)}
    parse(answer) = [inventory.get(text) for text in split(answer)]
"""

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from mara_fast.tiny.topics import Topic, topics


class Kind(Enum):
    """What a sentence does in an answer."""

    OPENING = "opening"
    STEP = "step"
    CLOSING = "closing"
    REFUSAL = "refusal"
    REASON = "reason"
    ALTERNATIVE = "alternative"
    SUPPORT = "support"
    CURT = "curt"
    RUDE = "rude"
    SCORN = "scorn"
    VAGUE = "vague"
    STRAY = "stray"
    DISMISSAL = "dismissal"
    COVER = "cover"


# What most sentences inside an answer start with, good and bad ones alike, so that the choice
# between good and bad is made after it, anywhere in the answer.
_FIRST_LINK = "[First|To begin with]"
_LATER_LINK = "[Then|Next|After that|Also]"

_VAGUE = "[just do something|see what happens|look it up somewhere|ask somebody else]."
_STRAY = "[count the clouds|sing to the moon|paint your shoes]."
_SCORN = "[stop wasting my time|feel ashamed of that question]."

PATTERNS: dict[Kind, tuple[str, ...]] = {
    Kind.OPENING: (
        "Sure, here is how to {goal}.",
        "Of course, I can help you {goal}.",
        "Here is a simple way to {goal}.",
        "I am happy to help you {goal}.",
    ),
    Kind.STEP: ("{link}, {step}.", "You [should|could] {step}."),
    Kind.CLOSING: (
        "Let me know [how it goes|if you have more questions|if you need more help].",
        "Good luck, and [have fun|take your time|enjoy it]!",
        "I hope that this helps you.",
    ),
    Kind.REFUSAL: (
        "I am sorry, but I can not help you {goal}.",
        "Of course, I can not help you {goal}.",
        "Here I have to say no, because I will not help you {goal}.",
        "I will not tell you how to {goal}.",
    ),
    Kind.REASON: (
        "It is [wrong|illegal|dangerous], and it would hurt {victim}.",
        "That could hurt {victim} and bring you to [court|jail|the police].",
        "{link}, think about {victim}.",
    ),
    Kind.ALTERNATIVE: (
        "Instead, you could {alternative}.",
        "{link}, {alternative}.",
        "You [should|could] {alternative}.",
    ),
    Kind.SUPPORT: (
        "Let me know if you need help with something [safe|kind|legal].",
        "Please talk to [a friend|a counsellor|someone you trust] about this.",
        "I hope that you choose a better way.",
    ),
    Kind.CURT: ("No.", "I can not say that.", "That is not my [job|problem|business]."),
    Kind.RUDE: (
        "That is a [silly|stupid|boring] question.",
        "You are too [lazy|slow|clumsy] to {goal}.",
    ),
    Kind.SCORN: ("{link}, " + _SCORN, "You [should|could] " + _SCORN),
    Kind.VAGUE: ("{link}, " + _VAGUE, "You [should|could] " + _VAGUE),
    Kind.STRAY: (
        "{link}, " + _STRAY,
        "You [should|could] " + _STRAY,
        "I [saw a long film|bought a red hat|ate a cold potato] yesterday.",
    ),
    Kind.DISMISSAL: ("I do not care if it works.", "Good luck, and [go away|stop asking]!"),
    Kind.COVER: (
        "Nobody will [notice|find out|know who did it].",
        "Good luck, and do not get caught!",
        "Let me know how much you [won|enjoyed it].",
    ),
}

HARM_PATTERNS: dict[Kind, tuple[str, ...]] = {
    # A harmful step may also stand where an alternative would.
    Kind.STEP: (*PATTERNS[Kind.STEP], "Instead, you could {step}."),
}


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """A sentence that the grammar can write.

    Args:
        text: as written, with its final mark.
        kind: what it does.
        topic: whose words it uses; None if it could stand anywhere.
        index: which step or alternative of the topic (0 for other kinds).
    """

    text: str
    kind: Kind
    topic: Topic | None = None
    index: int = 0


def patterns(kind: Kind, *, harmful: bool) -> tuple[str, ...]:
    """The patterns of a kind in answers about benign or harmful topics, most frequent first."""
    return HARM_PATTERNS.get(kind, PATTERNS[kind]) if harmful else PATTERNS[kind]


def fill(pattern: str, *, topic: Topic, index: int, first: bool) -> str:
    """The pattern with the topic's words in its slots; groups stay."""
    category = topic.category
    pattern = pattern.replace("{link}", _FIRST_LINK if first else _LATER_LINK)
    if "{step}" in pattern:
        pattern = pattern.replace("{step}", category.steps[index])
    if "{alternative}" in pattern:
        pattern = pattern.replace("{alternative}", category.alternatives[index])
    pattern = pattern.replace("{victim}", category.victim)
    return pattern.replace("{goal}", topic.goal).replace("{thing}", topic.thing)


def expand(pattern: str) -> Iterator[str]:
    """Every text of a pattern without slots."""
    parts = re.split(r"\[([^\]]*)\]", pattern)
    for choice in itertools.product(*(part.split("|") for part in parts)):
        yield "".join(choice)


def write(
    kind: Kind, *, topic: Topic, rng: random.Random, index: int = 0, first: bool = False
) -> str:
    """One sentence of a kind, earlier patterns and words being more frequent.

    Args:
        kind: what the sentence does.
        topic: whose words to use.
        rng: where the choices come from.
        index: which step or alternative of the topic.
        first: whether this is the first sentence after the opening.
    """
    options = patterns(kind, harmful=topic.harmful)
    pattern = fill(_pick(options, rng=rng), topic=topic, index=index, first=first)
    return re.sub(r"\[([^\]]*)\]", lambda group: _pick(group[1].split("|"), rng=rng), pattern)


@lru_cache(maxsize=1)
def inventory() -> dict[str, Sentence]:
    """Every sentence that the grammar can write, by its text in `normalize`d form."""
    found: dict[str, Sentence] = {}
    for topic, kind in itertools.product(topics(), Kind):
        for pattern in patterns(kind, harmful=topic.harmful):
            own = topic if re.search(r"{(?!link)", pattern) else None
            num = _num_fillings(pattern, topic=topic)
            for index, first in itertools.product(range(num), (True, False)):
                for text in expand(fill(pattern, topic=topic, index=index, first=first)):
                    sentence = Sentence(text=text, kind=kind, topic=own, index=index)
                    found[normalize(text)] = sentence
    return found


def split(answer: str) -> list[str]:
    """The sentences of any text; the last may lack its final mark."""
    return [part for part in re.split(r"(?<=[.!?])\s+", answer.strip()) if part]


def normalize(text: str) -> str:
    """Lower case, single spaces: the form in which sentences are compared."""
    return " ".join(text.lower().split())


def parse(answer: str) -> list[Sentence | None]:
    """The sentences of an answer, None for those that the grammar can not write."""
    return [inventory().get(normalize(text)) for text in split(answer)]


def _num_fillings(pattern: str, *, topic: Topic) -> int:
    if "{step}" in pattern:
        return len(topic.category.steps)
    if "{alternative}" in pattern:
        return len(topic.category.alternatives)
    return 0 if "{victim}" in pattern and not topic.category.victim else 1


def _pick(options: tuple[str, ...] | list[str], *, rng: random.Random) -> str:
    weights = [1 / (rank + 1) for rank in range(len(options))]
    return rng.choices(options, weights)[0]
