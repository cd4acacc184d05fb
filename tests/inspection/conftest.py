"""Generations to look at: of a tiny model, and one whose texts mean harm."""

import pytest

import speaker
from mara_fast import DecodingStats, Generation, TokenTrace
from mara_fast.outputs import CandidateTrace, Counterfactual

HOSTILE = (
    "</script><script>window.harmed = 1</script>",
    "<img src=x onerror='window.harmed = 2'>",
    "<!--<script>",
    "\x00\x1b[31m\x07\r",
    "\u202eabc\u2066",
    "مرحبا بالعالم",
    "\n\n\t",
    "🎉👩‍👩‍👧",
    "\ud83c",
    "x" * 4000,
    "{data}{script}",
    "&lt;b&gt; ${1} `",
    "\u2028\u2029\ufeff\u200b",
    "\U000e0041\u034f\u3164\u2800\xa0\u115f\uffa0\ufe01",
    "",
    "   ",
)


def candidate(token_id: int, text: str | None, accepted: bool | None) -> CandidateTrace:
    prob = None if accepted is None else 0.75 if accepted else 0.125
    return CandidateTrace(
        token_id=token_id, logprob=-1.5, accept_prob=prob, accepted=accepted, text=text
    )


def token(token_id: int, text: str | None) -> TokenTrace:
    """Accepted at rank 1, after a candidate of the same text."""
    return TokenTrace(
        token_id=token_id,
        rank=1,
        num_candidates=3,
        logprob=-1.5,
        accept_prob=0.75,
        verdict="accepted",
        num_examined=2,
        candidates=(
            candidate(7, text, False),
            candidate(token_id, text, True),
            candidate(9, text, None),
        ),
        text=text,
    )


@pytest.fixture(scope="session")
def hostile() -> Generation:
    """Every hostile text as a prompt, token, candidate and counterfactual."""
    trace = tuple(token(index, text) for index, text in enumerate(HOSTILE))
    return Generation(
        prompt=[{"role": text, "content": text} for text in HOSTILE],
        prompt_token_ids=[1],
        text="".join(HOSTILE),
        token_ids=[item.token_id for item in trace],
        finish_reason="length",
        stats=DecodingStats.of(trace, num_forwards=20, seconds=1.0),
        tokens=trace,
        trace=trace,
        options={"stop_strings": list(HOSTILE)},
        counterfactuals=tuple(
            Counterfactual(position=index, token_ids=[3], text=text, finish_reason="length")
            for index, text in enumerate(HOSTILE)
        ),
        error=HOSTILE[0],
    )


@pytest.fixture(scope="session")
def spoken() -> list[Generation]:
    """Traced generations with every verdict and counterfactuals."""
    from mara_fast.inspection import with_counterfactuals

    engine = speaker.engine()
    prompts = [speaker.PROMPTS[1], speaker.PROMPTS[3]]
    found = engine.generate(prompts, trace=True, max_new_tokens=12)
    found += engine.generate(prompts[:1], trace=True, max_new_tokens=12, top_k=6, threshold=0.8)
    found += speaker.engine(aligned=False).generate("Hi", trace=True, max_new_tokens=12)
    return with_counterfactuals(found, engine, num_tokens=6, most=3)
