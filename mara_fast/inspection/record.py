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
    rank              int: by probability in the candidate set, 0 = most probable
    num_candidates    int: size of the candidate set
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
from typing import Any, TypeVar

from mara_fast.options import is_int
from mara_fast.outputs import (
    CandidateTrace,
    Counterfactual,
    DecodingStats,
    Generation,
    TokenTrace,
)

TRACE_VERSION = 1

_Record = TypeVar("_Record", CandidateTrace, TokenTrace, Counterfactual, DecodingStats)


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
    try:
        trace = _trace(record)
        tokens = (dataclasses.replace(t, candidates=(), text=None, is_special=False) for t in trace)
        counterfactuals = record.get("counterfactuals")
        return Generation(
            prompt=record["prompt"],
            prompt_token_ids=list(record.get("prompt_token_ids") or ()),
            text=record["text"],
            token_ids=list(record["token_ids"]),
            finish_reason=record["finish_reason"],
            stats=_stats(record["stats"]),
            tokens=tuple(tokens),
            trace=trace if "trace" in record else None,
            options=record.get("options"),
            counterfactuals=(
                None
                if counterfactuals is None
                else tuple(_read(Counterfactual, item) for item in counterfactuals)
            ),
            error=record.get("error"),
            alarms=tuple(record.get("alarms") or ()),
        )
    except KeyError as error:
        raise ValueError(f"not a result of mara-fast: it has no {error}") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"not a result of mara-fast: {error}") from error


def _trace(record: Mapping[str, Any]) -> tuple[TokenTrace, ...]:
    if "trace" not in record:
        return ()
    version = record.get("trace_version")
    if not is_int(version) or version != TRACE_VERSION:
        is_newer = isinstance(version, int) and version > TRACE_VERSION
        remedy = (
            "it was written by a newer mara-fast: update this one"
            if is_newer
            else "decode again with trace=True"
        )
        raise ValueError(f"trace_version is {version!r}, expected {TRACE_VERSION}; {remedy}")
    trace = tuple(_token(token) for token in record["trace"])
    if [token.token_id for token in trace] != record["token_ids"]:
        raise ValueError("trace and token_ids are not of the same tokens")
    return trace


def _token(values: Mapping[str, Any]) -> TokenTrace:
    candidates = tuple(_read(CandidateTrace, _infinite(item)) for item in values["candidates"])
    return _read(TokenTrace, {**_infinite(values), "candidates": candidates})


def _stats(values: Mapping[str, Any]) -> DecodingStats:
    return _read(
        DecodingStats,
        {
            name: {int(key): count for key, count in value.items()}
            if isinstance(value, Mapping)
            else value
            for name, value in values.items()
        },
    )


def _read(record: type[_Record], values: Mapping[str, Any]) -> _Record:
    names = {field.name for field in dataclasses.fields(record)}
    return record(**{name: value for name, value in values.items() if name in names})


def _infinite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {**values, "logprob": -math.inf if values["logprob"] is None else values["logprob"]}


def _finite(value: Any) -> Any:
    """JSON has no infinities and no NaN: null stands for them."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
