"""Tokens as they are decided: events, and transformers' streamers."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from mara_fast.collect import token_traces
from mara_fast.outputs import Generation, TokenEvent, TokenTrace
from mara_fast.token_text import decode_text

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

    from mara_fast.run import Run


def stream_events(run: "Run") -> Iterator[TokenEvent]:
    """Events of a run over one prompt; their texts add up to the text of the result."""
    sent, ids = "", list[int]()
    for tokens, generation in _new_tokens(run):
        last = len(tokens) - 1 if generation is not None else len(tokens)
        for token in tokens[:last]:
            ids.append(token.token_id)
            text = _settled_text(run, ids)
            # A tokenizer may rewrite what it decoded before; what was sent stands.
            text = text[len(sent) :] if text.startswith(sent) else ""
            sent += text
            yield TokenEvent(text=text, token=token)
        if generation is not None:
            yield TokenEvent(
                text=(generation.text or "")[len(sent) :],
                token=tokens[-1] if tokens else None,
                finish_reason=generation.finish_reason,
                generation=generation,
            )


def stream_to(run: "Run", streamer: "BaseStreamer") -> Generation:
    """Feeds a transformers streamer as ``model.generate`` does: the prompt, then token by token."""
    streamer.put(torch.tensor([run.requests[0].token_ids]))
    result: Generation | None = None
    try:
        for tokens, generation in _new_tokens(run):
            result = generation
            for token in tokens:
                streamer.put(torch.tensor([token.token_id]))
    finally:
        streamer.end()
    assert result is not None
    return result


def _new_tokens(run: "Run") -> Iterator[tuple[tuple[TokenTrace, ...], Generation | None]]:
    """After every step the tokens it emitted; the result with the last."""
    (request,) = run.requests
    num_seen = 0
    for finished in run.steps():
        generation = finished[0][1] if finished else None
        tokens = (
            token_traces(
                request.records[num_seen:], request.record_floats[num_seen:], config=run.config
            )
            if generation is None
            else generation.tokens[num_seen:]
        )
        num_seen += len(tokens)
        if tokens or generation is not None:
            yield tokens, generation


def _settled_text(run: "Run", ids: list[int]) -> str:
    """The text so far, less what later tokens may still complete."""
    tokenizer = run.engine.tokenizer
    if tokenizer is None:
        return ""
    text = decode_text(tokenizer, ids).rstrip("\N{REPLACEMENT CHARACTER}")
    held_back = max((len(stop) - 1 for stop in run.config.stop_strings), default=0)
    return text[: max(0, len(text) - held_back)]
