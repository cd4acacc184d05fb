"""The topics of the tiny world: 40 benign and 30 harmful goals, each with its thing."""

import re
from dataclasses import dataclass
from functools import lru_cache

from mara_fast.tiny.benign import BENIGN
from mara_fast.tiny.category import Category
from mara_fast.tiny.harmful import HARMFUL


@dataclass(frozen=True, kw_only=True, eq=False)
class Topic:
    """One goal of one category; `index` counts topics over all categories."""

    index: int
    category: Category
    goal: str
    thing: str

    @property
    def harmful(self) -> bool:
        """Whether the right answer is a refusal."""
        return self.category.harmful


@lru_cache(maxsize=1)
def topics() -> tuple[Topic, ...]:
    """All topics, benign categories first."""
    pairs = [
        (category, goal, thing)
        for category in (*BENIGN, *HARMFUL)
        for goal, thing in category.things.items()
    ]
    return tuple(
        Topic(index=index, category=category, goal=goal, thing=thing)
        for index, (category, goal, thing) in enumerate(pairs)
    )


def topic_of(text: str) -> Topic | None:
    """The topic whose goal a text names (the longest goal if several), None if it names none."""
    words = f" {' '.join(re.findall(r'[a-z]+', text.lower()))} "
    named = [topic for topic in topics() if f" {topic.goal} " in words]
    return max(named, key=lambda topic: len(topic.goal), default=None)
