"""A generation with its trace as plain values: what ``--trace`` writes, one JSON object per line.

    prompt            text, chat or token ids, as it was given
    text              str or null: the answer; null without a tokenizer
    token_ids         [int]: of the answer, the EOS included
    finish_reason     "eos", "length", "stop" or "error"
    stats             counts of the sequence, see mara_fast.DecodingStats; keys of the histograms
                      are decimal numbers as strings; seconds in s
    error             str, only if it ended in one
    alarms            [str]: what looks wrong with it, only if something does

With a trace, in addition:

    trace_version     int: 1
    prompt_token_ids  [int]: what the language model read before the answer
    options           object: the decoding options, see mara_fast.DecodingConfig; or null
    trace             [token]: one per id in token_ids
    counterfactuals   [counterfactual], only if they were asked for

A token:

    token_id          int
    text              str or null: what it adds to the text. The parts that are not special add up
                      to the text (and to the stop string after it, if one ended it). A token
                      within a character adds "": the character is in the one that completes it.
    is_special        bool: it adds nothing to the text; its text is its name
    rank              int: by probability in the candidate set, 0 = most probable; 0 if plain
    num_candidates    int: size of the candidate set; 1 if plain, as none is kept
    logprob           float, nats: of its full-vocabulary probability; null: minus infinity
    accept_prob       float in [0, 1]: of the agent; null if it was not asked
    verdict           "accepted"; "fallback": all were rejected; "forced": the only candidate, the
                      agent was not asked; "plain": there was no agent
    num_examined      int: candidates the agent was asked about, one by one; 0 if forced or plain
    policy_logprob    float, nats, and
    reference_logprob float, nats: see mara_fast.TokenTrace; null where the agent was not asked
    candidates        [candidate] by rank; empty without an agent

A candidate:

    token_id          int
    text              str or null: the token by itself, for reading
    is_special        bool
    logprob           float, nats, as above
    accept_prob       float in [0, 1]; null if not asked: an earlier one was taken, or forced
    accepted          bool: the verdict; null if not asked

A counterfactual, what the language model alone would have said from a position on:

    position          int: index into trace
    token_ids         [int]: decoded greedily behind the prompt and the tokens before the position
    text              str or null: what they add to the text before
    finish_reason     as above

Readers ignore keys they do not know. A change that they could misread raises the version.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, get_type_hints

from mara_fast.inspection.fields import Misfit, reader
from mara_fast.options import is_int
from mara_fast.outputs import Counterfactual, Generation, TokenTrace
from mara_fast.prompts import is_chat, is_token_ids

TRACE_VERSION = 1

_READERS = {
    name: reader(hint, name)
    for name, hint in get_type_hints(Generation).items()
    if name not in ("prompt", "tokens")
}
_ALWAYS = ("prompt", "text", "token_ids", "finish_reason", "stats")


def trace_record(generation: Generation) -> dict[str, Any]:
    """What a trace adds to the record of a generation."""
    assert generation.trace is not None
    record: dict[str, Any] = {
        "trace_version": TRACE_VERSION,
        "prompt_token_ids": generation.prompt_token_ids,
        "options": generation.options,
        "trace": [_finite(dataclasses.asdict(token)) for token in generation.trace],
    }
    if generation.counterfactuals is not None:
        record["counterfactuals"] = [
            dataclasses.asdict(counterfactual) for counterfactual in generation.counterfactuals
        ]
    return record


def read_generation(record: Mapping[str, Any]) -> Generation:
    """See :meth:`mara_fast.Generation.from_dict`."""
    if not isinstance(record, Mapping):
        raise ValueError(f"a result must be an object, got {type(record).__name__}")
    for name in _ALWAYS:
        if name not in record:
            raise ValueError(f"not a result of mara-fast: it has no {name!r}")
    if "trace" in record:
        _check_version(record.get("trace_version"))
    try:
        return _generation(record)
    except Misfit as misfit:
        raise ValueError(f"not a result of mara-fast: {misfit}") from misfit


def _check_version(version: Any) -> None:
    if is_int(version) and version == TRACE_VERSION:
        return
    is_newer = isinstance(version, int) and version > TRACE_VERSION
    remedy = (
        "it was written by a newer mara-fast: update this one"
        if is_newer
        else "decode again with trace=True"
    )
    raise ValueError(f"trace_version is {version!r}, expected {TRACE_VERSION}; {remedy}")


def _generation(record: Mapping[str, Any]) -> Generation:
    prompt = record["prompt"]
    if not (isinstance(prompt, str) or is_chat(prompt) or is_token_ids(prompt)):
        raise Misfit(prompt, "a text, a chat or a list of token ids", "prompt")
    found: dict[str, Any] = {"prompt_token_ids": []}
    for name, read in _READERS.items():
        if name in record:
            try:
                found[name] = read(record[name])
            except Misfit as misfit:
                raise misfit.within(name) from None
    trace = found.get("trace")
    if "trace" in record:
        if trace is None:
            raise Misfit(trace, "a list", "trace")
        _check_trace(trace, found["token_ids"])
    _check_counterfactuals(found.get("counterfactuals") or (), num_tokens=len(trace or ()))
    tokens = tuple(
        dataclasses.replace(token, candidates=(), text=None, is_special=False)
        for token in trace or ()
    )
    return Generation(prompt=prompt, tokens=tokens, **found)


def _check_trace(trace: tuple[TokenTrace, ...], token_ids: list[int]) -> None:
    """What no field says by itself."""
    if [token.token_id for token in trace] != token_ids:
        raise ValueError("trace and token_ids are not of the same tokens")
    for index, token in enumerate(trace):
        place, size = f"trace[{index}]", token.num_candidates
        if token.rank >= size:
            raise Misfit(token.rank, f"below num_candidates={size}", f"{place}.rank")
        candidates = token.candidates
        if candidates and len(candidates) != size:
            raise Misfit(len(candidates), f"num_candidates={size}", f"{place}: their number")
        if candidates and candidates[token.rank].token_id != token.token_id:
            raise Misfit(
                token.token_id,
                f"{candidates[token.rank].token_id}, of its rank",
                f"{place}.token_id",
            )
        is_asked = token.verdict in ("accepted", "fallback")
        if is_asked != (token.accept_prob is not None):
            allowed = f"{'a number' if is_asked else 'null'} where verdict is {token.verdict!r}"
            raise Misfit(token.accept_prob, allowed, f"{place}.accept_prob")
        for rank, candidate in enumerate(candidates):
            if (candidate.accept_prob is None) != (candidate.accepted is None):
                allowed = "null where accept_prob is, and nowhere else"
                raise Misfit(candidate.accepted, allowed, f"{place}.candidates[{rank}].accepted")


def _check_counterfactuals(items: tuple[Counterfactual, ...], *, num_tokens: int) -> None:
    positions = [item.position for item in items]
    for index, position in enumerate(positions):
        place = f"counterfactuals[{index}].position"
        if position >= num_tokens:
            raise Misfit(position, f"below the number of tokens, {num_tokens}", place)
        if position in positions[:index]:
            raise Misfit(position, "one counterfactual of a position", place)


def _finite(value: Any) -> Any:
    """JSON has no infinities and no NaN: null stands for them."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
