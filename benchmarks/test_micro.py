"""The operations of a step and a whole step, each by itself: ``make micro``.

Sizes are those of an 8B model where there is a GPU, small ones elsewhere.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from mara_fast import DecodingConfig, Engine, MaraAgent, tiny
from mara_fast.bench.model import random_llama
from mara_fast.collect import stop_position
from mara_fast.memory import Pool
from mara_fast.token_text import decode_text
from mara_kernels.attention import NewRows, candidate_attention, siblings
from mara_kernels.cascade import CascadeRule, Held, cascade
from mara_kernels.truncate import truncate

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
BATCHES = (1, 16, 64) if ON_GPU else (1, 8)
VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD, PREFIX = (
    (128256, 4096, 32, 8, 128, 2048) if ON_GPU else (32000, 512, 8, 4, 64, 128)
)
WINDOW = 4


def timed(benchmark: BenchmarkFixture, call: Callable[[], Any]) -> None:
    """A call and, on a GPU, the wait for it."""

    def run() -> None:
        call()
        if ON_GPU:
            torch.cuda.synchronize()

    with torch.inference_mode():
        benchmark.pedantic(run, rounds=20, warmup_rounds=3)


def random(*size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*size, generator=generator).to(DEVICE, DTYPE)


@pytest.mark.parametrize("batch", BATCHES)
def test_truncate(benchmark: BenchmarkFixture, batch: int) -> None:
    logits = 4 * random(batch, VOCAB)
    timed(benchmark, lambda: truncate(logits, top_k=40, top_p=0.95, temperature=1.0, capacity=64))


@pytest.mark.parametrize("batch", BATCHES)
def test_score(benchmark: BenchmarkFixture, batch: int) -> None:
    agent = MaraAgent(HIDDEN).requires_grad_(False).to(DEVICE)
    states = random(batch, WINDOW, HIDDEN)
    timed(benchmark, lambda: agent.accept_logit(states))


@pytest.mark.parametrize("batch", BATCHES)
def test_cascade(benchmark: BenchmarkFixture, batch: int) -> None:
    d = random(batch, WINDOW).float()
    zeros = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    timed(
        benchmark,
        lambda: cascade(
            d,
            offset=zeros,
            size=zeros + 9,
            held=Held.empty(batch, DEVICE),
            rule=CascadeRule(),
            sequence=zeros,
            position=zeros,
        ),
    )


@pytest.mark.parametrize("batch", BATCHES)
def test_attention(benchmark: BenchmarkFixture, batch: int) -> None:
    query = random(batch, HEADS, WINDOW, HEAD)
    key, value = (random(batch, KV_HEADS, PREFIX + WINDOW, HEAD) for _ in range(2))
    lengths = torch.full((batch,), PREFIX - 7, device=DEVICE)
    tree = siblings(WINDOW, DEVICE)

    def call() -> torch.Tensor:
        rows = NewRows(lengths=lengths, tree=tree, base=PREFIX)
        return candidate_attention(query, key, value, rows, scale=HEAD**-0.5)

    timed(benchmark, call)


@pytest.mark.parametrize("batch", BATCHES)
def test_step(benchmark: BenchmarkFixture, batch: int) -> None:
    """Of a small model, so that what is not the model shows."""
    model = random_llama(dtype=DTYPE, device=DEVICE)
    agent = MaraAgent(model.config.hidden_size).requires_grad_(False)
    engine = Engine(model, agent, False, max_batch_size=batch)
    config = DecodingConfig(max_new_tokens=400, ignore_eos=True, window=WINDOW)
    pool = Pool(members=[], num_slots=batch, max_length=512)
    decoder = engine.take_decoder(config, pool, longest_prompt=8)
    ids = torch.full((batch, 8), 5, device=DEVICE)
    with torch.inference_mode():
        for slot in range(batch):
            decoder.state.reset(slot, sequence=slot)
        whole = torch.full((batch,), 8, device=DEVICE)
        decoder.prefill(slice(0, batch), ids, whole, whole > 0)
    timed(benchmark, lambda: decoder.run_step(batch, most=batch))


@pytest.mark.parametrize("how", ["whole text", "its end"])
def test_stop_strings(benchmark: BenchmarkFixture, how: str) -> None:
    """What looking for a stop string costs the host behind a thousand tokens."""
    _, tokenizer = tiny.load()
    ids = tokenizer("First, read the recipe twice. " * 200, add_special_tokens=False).input_ids
    ids, stop = ids[:1000], "\n\nUser:"
    look: Callable[[], Any] = partial(
        stop_position, ids, start=999, stop_strings=[stop], tokenizer=tokenizer
    )
    if how == "whole text":
        look = lambda: stop in decode_text(tokenizer, ids)  # noqa: E731
    benchmark.pedantic(look, rounds=50, warmup_rounds=3)
