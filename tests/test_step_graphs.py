"""The step as graphs, which a tape plays on a CPU: the same tokens, whatever happens meanwhile."""

import contextlib
import gc
import itertools
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from architectures import ARCHITECTURES, random_prompt
from exactness import check_exact, random_agent
from mara_fast import Engine
from mara_fast.decoder import ScoredWindow
from mara_fast.step_graphs import CudaCapture, StepGraphs
from tape import Tape, TapeCapture

OPTIONS: list[dict[str, Any]] = [
    {"window": 3},
    {"window": 2, "acceptance": "sample", "seed": 7, "strategy": "max_prob", "fallback": "first"},
]


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes engines whose steps are taped, and the capture that counts."""
    monkeypatch.setattr("mara_fast.engine._host_reads", lambda device: False)

    def make(name: str = "llama", agent: Any = None) -> tuple[Engine, TapeCapture]:
        agent = random_agent(48) if agent is None else agent
        engine = Engine(ARCHITECTURES[name](), agent, max_batch_size=3, prefill_chunk=5)
        engine._capture = TapeCapture()
        return engine, engine._capture

    return make


def prompts_for(engine: Engine, num: int = 7) -> list[list[int]]:
    return [random_prompt(engine.lm.model, 1 + (5 * i) % 13, seed=i) for i in range(num)]


def test_a_tape_is_like_a_graph() -> None:
    x, y = torch.zeros(3), torch.zeros(3)

    def call() -> None:
        z = x + 1
        y[1:].add_(z[:2])

    with Tape() as tape:
        call()
    assert y.tolist() == [0, 0, 0]
    x.fill_(4)
    tape.replay()
    tape.replay()
    assert y.tolist() == [0, 10, 10]
    with pytest.raises(RuntimeError, match="capturing"), Tape():
        int(x.sum())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_replayed_steps_are_exact(name: str, options: dict[str, Any], taped: Any) -> None:
    """Slots are refilled, move, and decode in buckets of 1, 2 and 3."""
    engine, capture = taped(name)
    eos = tuple(range(3, 60))
    for _ in range(2):
        check_exact(engine, prompts_for(engine), max_new_tokens=9, eos_token_id=eos, **options)
    assert 2 <= capture.num_captured <= 3 and capture.num_replayed > 12


def test_plain_decoding_is_replayed(taped: Any) -> None:
    engine, capture = taped(agent=False)
    prompts = prompts_for(engine)
    plain = Engine(engine.lm.model, False)
    for options in ({}, {"acceptance": "sample", "seed": 3}):
        for _ in range(2):
            found = engine.generate(prompts, max_new_tokens=6, **options)
        wanted = plain.generate(prompts, max_new_tokens=6, **options)
        assert [one.token_ids for one in found] == [one.token_ids for one in wanted]
    assert capture.num_replayed > 10


def test_an_agent_trained_between_runs_is_seen(taped: Any) -> None:
    """The graphs of the first run are those of the second."""
    engine, capture = taped()
    prompts = prompts_for(engine)
    check_exact(engine, prompts, max_new_tokens=6, window=2)
    num_captured = capture.num_captured
    engine.agent.output_linear.bias[0] += 1.5
    check_exact(engine, prompts, max_new_tokens=6, window=2)
    assert capture.num_captured == num_captured


def test_a_decoder_that_is_given_up_leaves_no_memory(taped: Any) -> None:
    """The next one's cache is planned with it, and nothing may have to be collected before."""
    engine, capture = taped()
    for _ in range(2):
        engine.generate(prompts_for(engine), max_new_tokens=6, window=2)
    assert capture.num_replayed
    kept = weakref.ref(engine._idle.cache.layers[0])
    gc.collect()
    gc.disable()
    try:
        engine._idle = None
        assert kept() is None
    finally:
        gc.enable()


def test_sets_that_outgrow_the_buffer_are_captured_anew(taped: Any) -> None:
    engine, capture = taped()
    weight = engine.lm.model.lm_head.weight
    kept = weight.clone()
    options: dict[str, Any] = {"max_new_tokens": 6, "window": 40, "top_p": 1.0}
    check_exact(engine, prompts_for(engine), **options)
    num_captured = capture.num_captured
    # All logits are equal: every token of the vocabulary is a candidate.
    weight.zero_()
    check_exact(engine, prompts_for(engine, 3), **options)
    weight.copy_(kept)
    check_exact(engine, prompts_for(engine), **options)
    assert capture.num_captured > num_captured > 0


def test_an_observer_sees_every_window(taped: Any) -> None:
    """Graphs run no Python: observed steps are eager."""
    engine, capture = taped()
    prompts = prompts_for(engine, 3)
    engine.generate(prompts, max_new_tokens=6)
    seen: list[int] = []

    def observer(window: ScoredWindow) -> None:
        seen.append(int(window.decided.sum()))

    num_replayed = capture.num_replayed
    found = dict(engine.as_completed(prompts, observer=observer, max_new_tokens=6))
    assert sum(seen) >= sum(one.stats.num_decided for one in found.values()) > 0
    assert capture.num_replayed == num_replayed


def test_what_cannot_be_captured_runs_eagerly(taped: Any, caplog: pytest.LogCaptureFixture) -> None:
    engine, capture = taped()
    layer = engine.lm.model.model.layers[0]
    layer.register_forward_hook(lambda module, args, output: bool(output[0].sum()) and None)
    with caplog.at_level(logging.WARNING):
        check_exact(engine, prompts_for(engine), max_new_tokens=6, window=2)
    assert capture.num_captured == 1 and not capture.num_replayed
    (message,) = caplog.messages
    assert "without a CUDA graph" in message and "not permitted when stream is capturing" in message


def test_buckets() -> None:
    steps: list[int] = []
    capture = TapeCapture()
    graphs = StepGraphs(steps.append, capture=capture)
    for num in (1, 2, 3, 4, 5, 6):
        graphs.step(num, most=6)
    assert steps == [1, 2, 4, 4, 6, 6] and capture.num_captured == 2
    # What waits behind as many as may decode is left alone.
    graphs.step(3, most=3)
    assert steps[-1] == 3
    graphs.forget()
    graphs.step(3, most=6)
    assert steps[-1] == 4 and capture.num_captured == 2


def test_a_pool_is_not_used_again_when_its_graphs_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses that; graphs that live at the same time share one."""
    pools: list[int] = []

    class Graph:
        def replay(self) -> None: ...

    @contextlib.contextmanager
    def capturing(graph: Graph, pool: int) -> Iterator[None]:
        pools.append(pool)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", itertools.count().__next__)
    capture = CudaCapture(torch.device("cuda"))
    capture(lambda: None)
    kept = [capture(lambda: None) for _ in range(2)]
    assert pools == [0, 1, 1]
    kept.clear()
    capture(lambda: None)
    assert pools[-1] == 2


@pytest.mark.parametrize("value", ["yes", 2, None])
def test_cuda_graph_is_checked(value: Any) -> None:
    with pytest.raises(ValueError, match="allowed: True, False, 'auto'"):
        Engine(ARCHITECTURES["llama"](), False, cuda_graph=value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_graph_needs_cuda() -> None:
    with pytest.raises(ValueError, match="needs a CUDA device, the model is on cpu"):
        Engine(ARCHITECTURES["llama"](), False, cuda_graph=True)


@pytest.mark.gpu
def test_a_run_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once warm, nothing but the arrival of copies is waited for, and tokens are the oracle's."""
    model = ARCHITECTURES["llama"]().cuda()
    engine = Engine(model, random_agent(48).cuda(), max_batch_size=3, prefill_chunk=5)
    prompts = prompts_for(engine)
    options: dict[str, Any] = {"max_new_tokens": 9, "window": 3}
    wanted = check_exact(engine, prompts, **options)
    engine.generate(prompts, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = engine.generate(prompts, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [one.token_ids for one in found] == [one.token_ids for one in wanted]
