"""The systems that are compared. Each decodes the same prompts to the same number of tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from mara_fast.agent import MaraAgent
from mara_fast.bench.authors_cascade import authors_cascade
from mara_fast.config import DecodingConfig
from mara_fast.engine import Engine
from mara_fast.outputs import Generation

OURS, OUR_PLAIN, OUR_ALIGNER = "MARA, ours", "plain, ours", "Aligner, our engine"
TRANSFORMERS, STATIC = "plain, transformers", "plain, transformers static + compile"
ALIGNER, CASCADE = "Aligner, transformers", "MARA, authors' cascade"
SYSTEMS = (OURS, OUR_PLAIN, TRANSFORMERS, STATIC, CASCADE, ALIGNER, OUR_ALIGNER)

_PREFIX, _BETWEEN, _SUFFIX = 27, 2, 5
"""Tokens, about, of the Aligner's prompt before the question, before the answer and behind it:
"BEGINNING OF CONVERSATION: USER: Edit the following Question-Answer pair to make it more helpful
and harmless: {question} | {answer} ASSISTANT:"."""

Decode = Callable[[], list[list[int]]]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What all systems are given."""

    model: PreTrainedModel
    agent: MaraAgent
    aligner: PreTrainedModel
    """The Aligner's second model."""
    num_tokens: int
    """New tokens per prompt; the end of a sequence is ignored."""
    engine_options: dict[str, Any]
    """Of our engines."""


def systems_of(
    subject: Subject, prompts: list[list[int]], *, batch_size: int, names: tuple[str, ...]
) -> dict[str, Decode]:
    """The named systems, decoding these prompts, so many at once.

    Args:
        subject: models, agent, tokens.
        prompts: token ids.
        batch_size: prompts at once; the authors' cascade knows only one.
        names: of :data:`SYSTEMS`.
    """
    config = DecodingConfig(max_new_tokens=subject.num_tokens, ignore_eos=True)

    def engine(model: PreTrainedModel, agent: MaraAgent | bool) -> Engine:
        return Engine(model, agent, False, max_batch_size=batch_size, **subject.engine_options)

    def make(name: str) -> Decode:
        if name in (OURS, OUR_PLAIN):
            ours = engine(subject.model, subject.agent if name == OURS else False)
            return lambda: _ids(ours.generate(prompts, config))
        if name == CASCADE:
            return lambda: [
                authors_cascade(
                    subject.model,
                    subject.agent.accept_logit,
                    prompt,
                    max_new_tokens=subject.num_tokens,
                )[0]
                for prompt in prompts
            ]
        if name == OUR_ALIGNER:
            first, second = engine(subject.model, False), engine(subject.aligner, False)
            return lambda: _ids(
                second.generate(
                    _to_correct(prompts, _ids(first.generate(prompts, config)), subject.aligner),
                    config,
                )
            )
        options = {"cache_implementation": "static"} if name == STATIC else {}

        def generate(model: PreTrainedModel, inputs: list[list[int]]) -> list[list[int]]:
            produced: list[list[int]] = []
            for start in range(0, len(inputs), batch_size):
                produced += _generate(
                    model, inputs[start : start + batch_size], subject.num_tokens, options
                )
            return produced

        if name == ALIGNER:
            return lambda: generate(
                subject.aligner,
                _to_correct(prompts, generate(subject.model, prompts), subject.aligner),
            )
        return lambda: generate(subject.model, prompts)

    return {name: make(name) for name in names}


def _generate(
    model: PreTrainedModel, prompts: list[list[int]], num_tokens: int, options: dict[str, Any]
) -> list[list[int]]:
    length = max(map(len, prompts))
    inputs, mask = (
        torch.tensor([[0] * (length - len(row)) + row for row in rows], device=model.device)
        for rows in (prompts, [[1] * len(row) for row in prompts])
    )
    output = model.generate(
        inputs,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        pad_token_id=0,
        **options,
    )
    return output[:, inputs.shape[1] :].tolist()


def _to_correct(
    prompts: list[list[int]], answers: list[list[int]], aligner: PreTrainedModel
) -> list[list[int]]:
    """The Aligner's prompts: as many tokens as its template, question and answer have."""
    fixed = [list(range(3, 3 + size)) for size in (_PREFIX, _BETWEEN, _SUFFIX)]
    vocab_size = aligner.config.vocab_size
    return [
        [
            *fixed[0],
            *(token % vocab_size for token in prompt),
            *fixed[1],
            *(token % vocab_size for token in answer),
            *fixed[2],
        ]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _ids(results: list[Generation]) -> list[list[int]]:
    return [result.token_ids for result in results]
