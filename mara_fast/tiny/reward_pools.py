"""What the reward models learn from: answers of many sources, and groups of them to compare.

    pool  = per instruction: answers drawn from the LM, written by the grammar, corrupted
    group = a few answers of a pool, all of which are compared with each other

A policy that is trained against a reward model goes where the model errs. So a pool holds more
than what the LM is likely to say: hot samples, what cascades say whose agents toss a coin, and
answers repeated (in other words, too), cut off, shuffled, mixed, joined, garbled, spliced or meant
for another topic.
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mara_fast.tiny.grammar import Instruction, sample_answer
from mara_fast.tiny.sentences import Kind, parse, split, write
from mara_fast.tiny.topics import topics

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Text = list[str]
Edit = Callable[[Text, Text, Text, random.Random], Text]

_MAX_NEW_TOKENS = 96
_BATCH_SIZE = 256
_SECOND_EDIT_PROB = 0.2
_WORDED = (Kind.STEP, Kind.ALTERNATIVE)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How answers are drawn from the LM.

    Args:
        share: answers per instruction, at most 1; a fraction draws for some instructions only.
        temperature: of the logits, before truncation.
        accept_prob: of each candidate in a cascade whose agent tosses a coin; None samples plainly.
    """

    share: float
    temperature: float = 1.0
    accept_prob: float | None = None


DRAWS = {
    "sampled": Draw(share=0.5),
    "hot": Draw(share=0.25, temperature=1.5),
    "coin": Draw(share=0.5, accept_prob=0.5),
    "picky": Draw(share=0.5, accept_prob=0.2),
}
"""The sources that decode. An untrained agent is like a coin; a picky one goes down to the last
candidates, as far from the LM as a cascade gets."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer and its source: a name in `DRAWS`, "grammar" or a name in `EDITS`."""

    text: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Pool:
    """An instruction and several answers to it."""

    instruction: Instruction
    answers: tuple[Answer, ...]


def make_pools(
    instructions: Sequence[Instruction],
    *,
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    seed: int,
    num_written: int = 2,
    num_edited: int = 4,
) -> list[Pool]:
    """A pool for each instruction; a pure function of the arguments.

    Args:
        instructions: what is asked.
        model: the tiny LM.
        tokenizer: its tokenizer.
        seed: of all draws and choices.
        num_written: answers per instruction written by the grammar, of any lean.
        num_edited: corrupted answers per instruction, made from those above.
    """
    rng = random.Random(seed)
    found: list[list[Answer]] = [[] for _ in instructions]
    for source, draw in DRAWS.items():
        places = sorted(rng.sample(range(len(found)), math.ceil(draw.share * len(found))))
        texts = _decode(
            [instructions[place].text for place in places],
            model=model,
            tokenizer=tokenizer,
            draw=draw,
            seed=rng.getrandbits(32),
        )
        for place, text in zip(places, texts, strict=True):
            found[place].append(Answer(text=text, source=source))
    for instruction, answers in zip(instructions, found, strict=True):
        for _ in range(num_written):
            text = sample_answer(instruction, seed=rng.getrandbits(32), lean=rng.random())
            answers.append(Answer(text=text, source="grammar"))
    return [
        Pool(
            instruction=instruction,
            answers=(
                *answers,
                *(
                    edit_answer(
                        rng.choice(answers).text,
                        other=rng.choice(answers).text,
                        stranger=rng.choice(rng.choice(found)).text,
                        rng=rng,
                    )
                    for _ in range(num_edited)
                ),
            ),
        )
        for instruction, answers in zip(instructions, found, strict=True)
    ]


def make_groups(pools: Sequence[Pool], *, num: int, size: int, seed: int) -> list[Pool]:
    """`num` pools of `size` answers each, drawn from the given ones; all have their turn.

    Args:
        pools: answers by instruction, `size` of them at least.
        num: of the groups.
        size: answers of a group, 2 or more.
        seed: of their choice and order.
    """
    fewest = min((len(pool.answers) for pool in pools), default=0)
    if not 2 <= size <= fewest:
        raise ValueError(
            f"size={size} is not allowed; allowed: from 2 to {fewest}, the answers of the "
            "smallest pool"
        )
    rng = random.Random(seed)
    groups: list[Pool] = []
    while len(groups) < num:
        for pool in rng.sample(list(pools), min(len(pools), num - len(groups))):
            chosen = tuple(rng.sample(pool.answers, size))
            groups.append(Pool(instruction=pool.instruction, answers=chosen))
    return groups


def edit_answer(text: str, *, other: str, stranger: str, rng: random.Random) -> Answer:
    """A corrupted answer, named after its first edit.

    Args:
        text: what is corrupted.
        other: another answer to the same instruction.
        stranger: an answer to any instruction.
        rng: where the choices come from.
    """
    num = 2 if rng.random() < _SECOND_EDIT_PROB else 1
    names = rng.choices(list(EDITS), [weight for weight, _ in EDITS.values()], k=num)
    own = split(text)
    for name in names:
        own = EDITS[name][1](own, split(other), split(stranger), rng)
    return Answer(text=" ".join(own), source=names[0])


def _repeat(own: Text, other: Text, stranger: Text, rng: random.Random) -> Text:
    place = rng.randrange(len(own)) if own else 0
    later = rng.randint(place, len(own))
    copies = own[place : place + rng.choice((1, 1, 2))]
    if rng.random() < 0.5:
        copies = [_reworded(text, rng) for text in copies]
    return own[:later] + copies + own[later:]


def _reworded(text: str, rng: random.Random) -> str:
    """The same step or alternative in words drawn anew; any other text as it is."""
    (sentence,) = parse(text) or [None]
    if sentence is None or sentence.topic is None or sentence.kind not in _WORDED:
        return text
    return write(sentence.kind, topic=sentence.topic, rng=rng, index=sentence.index)


def _cut(own: Text, other: Text, stranger: Text, rng: random.Random) -> Text:
    text = " ".join(own)
    return split(text[: rng.randint(0, len(text))])


def _drop(own: Text, other: Text, stranger: Text, rng: random.Random) -> Text:
    kept = rng.sample(range(len(own)), rng.randint(0, len(own)))
    return [own[place] for place in sorted(kept)]


def _shuffle(own: Text, other: Text, stranger: Text, rng: random.Random) -> Text:
    return rng.sample(own, len(own))


def _stray(own: Text, other: Text, stranger: Text, rng: random.Random) -> Text:
    place = rng.randint(0, len(own))
    return own[:place] + rng.sample(stranger, min(len(stranger), 1)) + own[place:]


def _elsewhere(own: Text, other: Text, stranger: Text, rng: random.Random) -> Text:
    return stranger


def _retopic(own: Text, other: Text, stranger: Text, rng: random.Random) -> Text:
    """Some or all sentences speak of another thing of the same category."""
    named = [
        topic
        for topic in topics()
        if any(topic.thing in one.split() or f"{topic.thing}." in one.split() for one in own)
    ]
    if not named:
        return own
    topic = rng.choice(named)
    goal, thing = rng.choice(
        [pair for pair in topic.category.things.items() if pair[0] != topic.goal]
    )
    share = rng.choice((0.3, 1.0))
    return [
        re.sub(rf"\b{topic.thing}\b", thing, one.replace(topic.goal, goal))
        if rng.random() < share
        else one
        for one in own
    ]


def _mix(own: Text, other: Text, stranger: Text, rng: random.Random) -> Text:
    return own[: rng.randint(0, len(own))] + other[rng.randint(0, len(other)) :]


def _join(own: Text, other: Text, stranger: Text, rng: random.Random) -> Text:
    return own + other


def _garble(own: Text, other: Text, stranger: Text, rng: random.Random) -> Text:
    """Words lost, replaced or broken off, and what follows them lost at times."""
    words = " ".join(own).split()
    foreign = " ".join(stranger).split() or ["and"]
    for _ in range(min(len(words), rng.randint(1, 2))):
        if not words:
            break
        place = rng.randrange(len(words))
        kept = words[place][: rng.randint(1, 4)]
        end = place + rng.choice((1, 1, 2, 3))
        words[place:end] = rng.choice(([], [rng.choice(foreign)], [kept], [kept]))
    return split(" ".join(words))


def _splice(own: Text, other: Text, stranger: Text, rng: random.Random) -> Text:
    """A sentence that goes over into another one in the middle, or falls back on itself."""
    if not own:
        return other
    place = rng.randrange(len(own))
    first, second = own[place], rng.choice((own[place], *own, *other))
    end, start = rng.randint(1, len(first)), rng.randint(0, len(second) - 1)
    joint = rng.choice(("", " "))
    return split(" ".join((*own[:place], first[:end] + joint + second[start:], *own[place + 1 :])))


EDITS: dict[str, tuple[float, Edit]] = {
    "repeat": (1.5, _repeat),
    "cut": (1.0, _cut),
    "drop": (1.0, _drop),
    "shuffle": (1.0, _shuffle),
    "stray": (1.0, _stray),
    "elsewhere": (1.0, _elsewhere),
    "retopic": (1.0, _retopic),
    "mix": (1.0, _mix),
    "join": (0.5, _join),
    "garble": (1.5, _garble),
    "splice": (2.0, _splice),
}
"""The corruptions and how often each is chosen."""


def _decode(
    prompts: list[str],
    *,
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    draw: Draw,
    seed: int,
) -> list[str]:
    import torch

    from mara_fast.agent import MaraAgent
    from mara_fast.engine import Engine

    agent: Any = False
    if draw.accept_prob is not None:
        agent = MaraAgent(model.config.hidden_size).requires_grad_(False).eval()
        agent.output_linear.weight.zero_()
        logit = math.log(draw.accept_prob / (1 - draw.accept_prob))
        agent.output_linear.bias.copy_(torch.tensor([0.0, logit]))
    results = Engine(model, agent, tokenizer, max_batch_size=_BATCH_SIZE).generate(
        prompts,
        acceptance="sample",
        temperature=draw.temperature,
        max_new_tokens=_MAX_NEW_TOKENS,
        seed=seed,
    )
    return [result.text or "" for result in results]
