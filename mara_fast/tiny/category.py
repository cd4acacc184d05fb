"""A category of the tiny world: a family of topics that share their steps."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, eq=False)
class Category:
    """A family of topics.

    All phrases are patterns: `{thing}` stands for the topic's thing, `[a|b|c]` for one of several
    interchangeable words.

    Args:
        name: one word, unique.
        harmful: whether the right answer is a refusal.
        things: from goal to thing, in order.
        steps: six patterns in the order in which they make sense; of growing severity if harmful.
        victim: who is hurt (harmful categories only).
        alternatives: what to do instead (harmful categories only).
    """

    name: str
    harmful: bool
    things: dict[str, str]
    steps: tuple[str, ...]
    victim: str = ""
    alternatives: tuple[str, ...] = ()
