"""Answers of mixed quality, written sentence by sentence.

    good = bernoulli(lean)
    answer = [opening of that quality]
    repeat 2 or 3 times: with probability 0.35, good = bernoulli(lean); answer += [body]
    answer += [closing of that quality]

So good sentences tend to follow good ones, yet an answer can turn at any of its sentences. Bodies
of either quality come in a fixed order, some left out: no answer says the same thing twice.
"""

import random
from abc import ABC, abstractmethod

from mara_fast.tiny.sentences import Kind, write
from mara_fast.tiny.topics import Topic

_SWITCH_PROB = 0.35
_SKIP_PROB = 0.35
_NUM_BODIES = (2, 3, 3)

Body = tuple[Kind, int]


def write_answer(topic: Topic, *, lean: float, rng: random.Random) -> str:
    """One answer to a request about the topic.

    Args:
        topic: what was asked about.
        lean: share of good sentences, in [0, 1].
        rng: where all choices come from.
    """
    writer = _SafetyWriter(topic, rng=rng) if topic.harmful else _HelpWriter(topic, rng=rng)
    good = rng.random() < lean
    stop_prob = writer.open(good=good)
    if rng.random() < stop_prob:
        return " ".join(writer.texts)
    for _ in range(rng.choice(_NUM_BODIES)):
        if rng.random() < _SWITCH_PROB:
            good = rng.random() < lean
        writer.go_on(good=good)
    writer.close(good=good)
    return " ".join(writer.texts)


class _Writer(ABC):
    """The sentences so far, and the bodies that are left of either quality."""

    def __init__(
        self, topic: Topic, *, rng: random.Random, good: list[Body], bad: list[Body]
    ) -> None:
        self.topic = topic
        self.rng = rng
        self.texts: list[str] = []
        self._left = {True: good, False: bad}

    @abstractmethod
    def open(self, *, good: bool) -> float:
        """Writes the first sentence; the probability that it is the last one, too."""

    def go_on(self, *, good: bool) -> None:
        """Writes one of the next two bodies of that quality, if any is left."""
        left = self._left[good]
        if len(left) > 1 and self.rng.random() < _SKIP_PROB:
            left.pop(0)
        if left:
            kind, index = left.pop(0)
            self.add(kind, index=index)

    @abstractmethod
    def close(self, *, good: bool) -> None:
        """Writes the last sentence, or none."""

    def add(self, kind: Kind, *, index: int = 0) -> None:
        first = len(self.texts) == 1
        self.texts.append(write(kind, topic=self.topic, rng=self.rng, index=index, first=first))

    def pick(self, **weights: float) -> Kind:
        return Kind(self.rng.choices(list(weights), list(weights.values()))[0])


class _HelpWriter(_Writer):
    """Answers to benign requests; bad ones refuse, insult, evade or stray."""

    def __init__(self, topic: Topic, *, rng: random.Random) -> None:
        bad = [(Kind.VAGUE, 0), (Kind.STRAY, 0), (Kind.SCORN, 0)]
        super().__init__(topic, rng=rng, good=_steps(topic), bad=bad)

    def open(self, *, good: bool) -> float:
        kind = Kind.OPENING if good else self.pick(refusal=0.55, rude=0.3, curt=0.15)
        self.add(kind)
        return {Kind.OPENING: 0.0, Kind.REFUSAL: 0.2, Kind.RUDE: 0.2, Kind.CURT: 0.6}[kind]

    def close(self, *, good: bool) -> None:
        if self.rng.random() < (0.85 if good else 0.6):
            self.add(Kind.CLOSING if good else Kind.DISMISSAL)


class _SafetyWriter(_Writer):
    """Answers to harmful requests; bad ones comply, half-good ones refuse curtly."""

    def __init__(self, topic: Topic, *, rng: random.Random) -> None:
        good = [(Kind.REASON, 0), (Kind.ALTERNATIVE, 0), (Kind.ALTERNATIVE, 1)]
        super().__init__(topic, rng=rng, good=good, bad=_steps(topic))

    def open(self, *, good: bool) -> float:
        kind = self.pick(refusal=0.75, curt=0.25) if good else Kind.OPENING
        self.add(kind)
        return {Kind.OPENING: 0.0, Kind.REFUSAL: 0.2, Kind.CURT: 0.7}[kind]

    def close(self, *, good: bool) -> None:
        if self.rng.random() < 0.8:
            self.add(Kind.SUPPORT if good else self.pick(cover=0.7, closing=0.3))


def _steps(topic: Topic) -> list[Body]:
    return [(Kind.STEP, index) for index in range(len(topic.category.steps))]
