"""What the language model alone would have said from where the agent chose otherwise.

    for each position whose token is not the language model's first:
        greedy decoding without the agent behind (prompt, tokens before the position)

All of them are prompts of one batch.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mara_fast.options import check, is_int
from mara_fast.outputs import Counterfactual, Generation

if TYPE_CHECKING:
    from mara_fast.engine import Engine

# What ends a sequence is an option of the counterfactual too.
_ENDS = ("eos_token_id", "ignore_eos", "stop_strings")


def with_counterfactuals(
    generations: Sequence[Generation],
    engine: "Engine",
    *,
    num_tokens: int = 24,
    most: int = 8,
    ids: Sequence[str | int] | None = None,
) -> list[Generation]:
    """The generations with counterfactuals at the first positions that have one.

    A position so close to the end of the model's context that ``num_tokens`` do not fit has none.
    ``min_new_tokens`` is not kept: the language model may end at once.

    Args:
        generations: decoded with ``trace=True``.
        engine: of the language model that decoded them; its agent has no part in it.
        num_tokens: of each counterfactual, at most.
        most: positions of each generation.
        ids: their names, for errors; None: their indices.

    Raises:
        ValueError: a generation without a trace, or with tokens or texts that the language model
            has not.
    """
    check("num_tokens", num_tokens, is_int, "an integer >= 1", minimum=1)
    check("most", most, is_int, "an integer >= 0", minimum=0)
    check_generations(generations, ids)
    names = range(len(generations)) if ids is None else ids
    _check_engine(engine)
    changed = [changed_positions(generation) for generation in generations]
    for name, generation in zip(names, generations, strict=True):
        _check_made_by(engine, generation, name)
    # The usual case is one batch: generations of one run end alike.
    batches: dict[str, list[tuple[int, int]]] = {}
    room = math.inf if engine.max_length is None else engine.max_length - num_tokens
    for index, generation in enumerate(generations):
        last = room - len(generation.prompt_token_ids)
        fitting = [position for position in changed[index] if position <= last][:most]
        if fitting:
            batch = batches.setdefault(json.dumps(_ends(generation)), [])
            batch += [(index, position) for position in fitting]
    found: list[list[Counterfactual]] = [[] for _ in generations]
    plain = _without_agent(engine) if batches else engine
    for ends, batch in batches.items():
        prompts = [
            [*generations[index].prompt_token_ids, *generations[index].token_ids[:position]]
            for index, position in batch
        ]
        answers = plain.generate(prompts, max_new_tokens=num_tokens, **json.loads(ends))
        for (index, position), answer in zip(batch, answers, strict=True):
            found[index].append(_counterfactual(generations[index], position, answer, plain))
    return [
        dataclasses.replace(generation, counterfactuals=tuple(items))
        for generation, items in zip(generations, found, strict=True)
    ]


def check_generations(generations: Any, ids: Any) -> None:
    """Raises a ValueError unless these are generations, and there is one id for each, or None."""
    if isinstance(generations, Generation):
        raise ValueError("generations must be several, got one Generation: give [generation]")
    if not isinstance(generations, Sequence) or isinstance(generations, str):
        kind = type(generations).__name__
        raise ValueError(f"generations must be a sequence of Generations, got {kind}")
    for index, item in enumerate(generations):
        if not isinstance(item, Generation):
            kind = type(item).__name__
            raise ValueError(f"generations must be a sequence of Generations, [{index}] is {kind}")
    if ids is not None and (not isinstance(ids, Sequence) or len(ids) != len(generations)):
        raise ValueError(f"ids={ids!r} is not one id for each of {len(generations)} generations")


def changed_positions(generation: Generation) -> list[int]:
    """Positions whose token is not the most probable candidate.

    Raises:
        ValueError: the generation has no trace.
    """
    if generation.trace is None:
        raise ValueError("this generation has no trace: decode with trace=True")
    return [position for position, token in enumerate(generation.trace) if token.rank]


def _check_engine(engine: Any) -> None:
    from mara_fast.engine import Engine

    if not isinstance(engine, Engine):
        raise ValueError(f"engine must be an Engine, got {type(engine).__name__}")


def _check_made_by(engine: "Engine", generation: Generation, name: str | int) -> None:
    """Raises a ValueError if the same tokens are other texts to the engine's tokenizer."""
    from mara_fast.collect import with_texts

    trace = generation.trace or ()
    what = f"result {name!r} was made by another model than this engine's"
    largest = max(generation.token_ids, default=0)
    if largest >= engine.lm.vocab_size:
        raise ValueError(
            f"{what}: it has token {largest}, and here there are {engine.lm.vocab_size}"
        )
    if engine.tokenizer is None or any(token.text is None for token in trace):
        return
    bare = [dataclasses.replace(token, candidates=()) for token in trace]
    for position, token in enumerate(with_texts(bare, engine.tokenizer)):
        if token.text != trace[position].text:
            raise ValueError(
                f"{what}: token {token.token_id} at position {position} adds "
                f"{trace[position].text!r} there, and {token.text!r} here"
            )


def _without_agent(engine: "Engine") -> "Engine":
    from mara_fast.engine import Engine

    if engine.agent is None:
        return engine
    return Engine(
        engine.lm.model,
        False,
        engine.tokenizer or False,
        max_batch_size=engine.max_batch_size,
        max_length=engine.max_length,
    )


def _ends(generation: Generation) -> dict[str, Any]:
    options = generation.options or {}
    return {name: options[name] for name in _ENDS if name in options}


def _counterfactual(
    generation: Generation, position: int, answer: Generation, engine: "Engine"
) -> Counterfactual:
    return Counterfactual(
        position=position,
        token_ids=answer.token_ids,
        text=_continuation(generation.token_ids[:position], answer, engine),
        finish_reason=answer.finish_reason,
    )


def _continuation(before: list[int], answer: Generation, engine: "Engine") -> str | None:
    """The text of an answer behind other tokens: by itself it may lose its leading space."""
    from mara_fast.token_text import decode_text

    if engine.tokenizer is None or answer.text is None:
        return None
    # Half a character before comes with the token that completes it, as in a trace.
    prefix = decode_text(engine.tokenizer, before).rstrip("\N{REPLACEMENT CHARACTER}")
    whole = decode_text(engine.tokenizer, [*before, *answer.token_ids])
    if answer.finish_reason == "stop" or not whole.startswith(prefix):
        return answer.text
    return whole[len(prefix) :]
