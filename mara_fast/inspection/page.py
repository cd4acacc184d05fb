"""A page that shows how each token was chosen, in one file that loads nothing.

    template: page.html    look: page.css    what it does: page.js, then popup.js

Texts of models and prompts reach the page as JSON in an element that no browser executes, and from
there as text nodes only. The page's policy lets it run this script and nothing else, and fetch
nothing.
"""

import base64
import hashlib
import html
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from mara_fast import __version__
from mara_fast.inspection.counterfactual import check_generations
from mara_fast.inspection.unseen import unseen_pattern
from mara_fast.outputs import CandidateTrace, Generation, TokenTrace


def html_page(
    generations: Sequence[Generation],
    *,
    ids: Sequence[str | int] | None = None,
    settings: Mapping[str, Any] | None = None,
    path: "str | os.PathLike[str] | None" = None,
) -> str:
    """The page of one generation, or of several to choose from.

    Args:
        generations: decoded with ``trace=True``.
        ids: their names.
        settings: what is shown before the decoding options, by name: the model, the agent.
        path: also write it there.

    Raises:
        ValueError: no generations, one without a trace, or another number of ids.
    """
    check_generations(generations, ids)
    if not generations:
        raise ValueError("there is no generation to show")
    names: Sequence[str | int | None] = ids if ids is not None else [None] * len(generations)
    results = [
        _result(generation, name, settings or {})
        for generation, name in zip(generations, names, strict=True)
    ]
    script = f"{_source('page.js')}\n{_source('popup.js')}"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        "style": _source("page.css"),
        "version": html.escape(__version__),
        "data": _json({"results": results, "unseen": unseen_pattern()}),
        "script": script,
    }
    text = _source("page.html")
    before, *rest = text.split("{")
    # One pass: what is filled in is not searched for further names.
    filled = before + "".join(parts[name] + after for name, after in map(_at_brace, rest))
    if path is not None:
        Path(path).write_text(filled, encoding="utf-8")
    return filled


def frame(text: str) -> str:
    """A page as an element of another, such as a notebook, that cannot touch it."""
    return (
        f'<iframe srcdoc="{html.escape(text)}" sandbox="allow-scripts" title="Inside each token" '
        'style="width: 100%; height: 640px; border: 0"></iframe>'
    )


def _at_brace(text: str) -> tuple[str, str]:
    name, _, after = text.partition("}")
    return name, after


def _source(name: str) -> str:
    return files("mara_fast.inspection").joinpath(name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """JSON that ends no element and starts no comment; only ASCII, so that any text is valid."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _result(
    generation: Generation, name: str | int | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    if generation.trace is None:
        raise ValueError("this generation has no trace: decode with trace=True")
    options = {**settings, **(generation.options or {})}
    return {
        "id": None if name is None else str(name),
        "prompt": _prompt(generation.prompt),
        "error": generation.error,
        "alarms": list(generation.alarms),
        "is_first": options.get("strategy", "first") == "first",
        "finish_reason": generation.finish_reason,
        "stats": {
            "num_tokens": generation.stats.num_tokens,
            "num_decided": generation.stats.num_decided,
            "num_forced": generation.stats.num_forced,
            "num_examined": generation.stats.num_examined,
            "num_all_rejected": generation.stats.num_all_rejected,
            "num_forwards": generation.stats.num_forwards,
            "accepted_ranks": generation.stats.accepted_ranks,
        },
        "options": [[key, _shown(value)] for key, value in options.items()],
        "tokens": [_token(token) for token in generation.trace],
        "counterfactuals": {
            item.position: {
                "text": item.text,
                "token_ids": item.token_ids,
                "finish_reason": item.finish_reason,
            }
            for item in generation.counterfactuals or ()
        },
    }


def _token(token: TokenTrace) -> dict[str, Any]:
    return {
        "token_id": token.token_id,
        "text": token.text,
        "is_special": token.is_special,
        "rank": token.rank,
        "num_candidates": token.num_candidates,
        "prob": _prob(token.logprob),
        "accept_prob": _rounded(token.accept_prob),
        "verdict": token.verdict,
        "candidates": [_candidate(candidate) for candidate in token.candidates],
    }


def _candidate(candidate: CandidateTrace) -> list[Any]:
    # A list: a page holds thousands of them.
    return [
        candidate.token_id,
        candidate.text,
        candidate.is_special,
        _prob(candidate.logprob),
        _rounded(candidate.accept_prob),
        candidate.accepted,
    ]


def _prob(logprob: float) -> float | None:
    # Less than a float can hold is not impossible.
    smallest = sys.float_info.min if math.isfinite(logprob) else 0.0
    return _rounded(max(smallest, math.exp(min(logprob, 0.0))))


def _rounded(value: float | None) -> float | None:
    """To what is shown, but never to certainty: "100.0%, rejected" would be no reason."""
    if value is None or not math.isfinite(value):
        return None
    rounded = float(f"{value:.5g}")
    return 0.99999 if value < 1 <= rounded else rounded


def _prompt(prompt: Any) -> Any:
    """As JSON: a text, messages, or token ids of any integer type."""
    if isinstance(prompt, str):
        return prompt
    return [dict(item) if isinstance(item, Mapping) else int(item) for item in prompt]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
