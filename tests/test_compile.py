"""Compiled decode steps: one graph without a break on every architecture, and the same tokens."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import mara_fast.attention
import mara_fast.language_model
import mara_fast.window
from architectures import ARCHITECTURES, OTHER_ARCHITECTURES, random_prompt
from exactness import FixedBudget, check_exact, random_agent
from mara_fast import Engine
from mara_fast.language_model import UnsupportedModelError
from mara_kernels.attention import NewRows, candidate_attention, siblings


@pytest.fixture(autouse=True)
def forget_graphs() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: Any, backend: Any = "aot_eager") -> Engine:
    agent = random_agent(model.get_input_embeddings().weight.shape[1])
    return Engine(model, agent, max_batch_size=2, prefill_chunk=5, compile=backend)


def prompts_for(engine: Engine) -> list[list[int]]:
    return [random_prompt(engine.lm.model, length, seed=length) for length in (12, 3, 7)]


# Those whose layers do not pass our context on by themselves, too.
INJECTED = {name: OTHER_ARCHITECTURES[name] for name in ("nemotron", "stablelm")}


QUICK = {"llama", "mixtral", "gemma2", "gpt2", "gpt_oss", "deepseek_v3", "stablelm"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in (*ARCHITECTURES, *INJECTED)
    ],
)
def test_one_graph_per_shape(name: str) -> None:
    """fullgraph: a break would be an error."""
    engine = compiled((ARCHITECTURES | INJECTED)[name]())
    torch._dynamo.utils.counters.clear()
    check_exact(engine, prompts_for(engine), max_new_tokens=6, window=3, ignore_eos=True)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    # A full batch, and the last sequence alone.
    assert 1 <= counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in {"llama", "gpt_oss"} else pytest.mark.slow)
        for name in (*ARCHITECTURES, *INJECTED)
    ],
)
def test_a_packed_step_is_one_graph_too(name: str) -> None:
    engine = compiled((ARCHITECTURES | INJECTED)[name]())
    engine._costs = FixedBudget(3, 1.5)
    torch._dynamo.utils.counters.clear()
    check_exact(engine, prompts_for(engine), max_new_tokens=6, ignore_eos=True)
    assert engine.lm.can_pack and not torch._dynamo.utils.counters["graph_break"]


def test_shapes_are_not_compiled_to_be_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = compiled(ARCHITECTURES["llama"]())
    torch._dynamo.utils.counters.clear()
    check_exact(engine, prompts_for(engine)[:1], max_new_tokens=4)
    assert (tmp_path / "mara_fast/step_costs.json").read_text()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_more_shapes_than_may_be_compiled_run_as_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(mara_fast.language_model, "_MOST_GRAPHS", 2)
    engine = compiled(ARCHITECTURES["llama"]())
    for window in (1, 2, 3, 4, 5):
        check_exact(engine, prompts_for(engine)[:1], max_new_tokens=4, window=window)
    [said] = [one.message for one in caplog.records if one.name.startswith("mara_fast")]
    assert said.startswith("LlamaForCausalLM: 2 shapes of steps are compiled")
    assert sum("recompile_limit" in record.message for record in caplog.records) == 1


def test_graphs_are_kept_between_runs() -> None:
    engine = compiled(ARCHITECTURES["llama"]())
    options: dict[str, Any] = {"max_new_tokens": 6, "window": 2, "ignore_eos": True}
    check_exact(engine, prompts_for(engine), **options)
    num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    check_exact(engine, prompts_for(engine), **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == num_graphs > 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_attention_as_one_operator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the compiler does not look inside our kernels."""
    monkeypatch.setattr(mara_fast.attention, "_OPAQUE_ON", {"cpu"})
    calls = []
    original = mara_fast.attention.candidate_attention
    monkeypatch.setattr(
        mara_fast.attention,
        "candidate_attention",
        lambda *args, **options: calls.append(1) or original(*args, **options),
    )
    engine = compiled(ARCHITECTURES[name]())
    check_exact(engine, prompts_for(engine), max_new_tokens=6, window=3, ignore_eos=True)
    assert calls


def test_the_operator_keeps_its_promises() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 3, 8, generator=generator)
    key, value = (torch.randn(2, 2, 13, 8, generator=generator) for _ in range(2))
    lengths, tree = torch.tensor([4, 9]), siblings(3, torch.device("cpu"))
    shape = (tree.ancestors, tree.depths, tree.kind, 10, 0.3)
    arguments = (query, key, value, lengths, *shape, 6, 2.0, torch.randn(4, generator=generator))
    torch.library.opcheck(mara_fast.attention.opaque_attention, arguments)
    wanted = candidate_attention(
        query,
        key,
        value,
        NewRows(lengths=lengths, tree=tree, base=10),
        scale=0.3,
        sliding_window=6,
        softcap=2.0,
        sinks=arguments[-1],
    )
    found = mara_fast.attention.opaque_attention(*arguments)
    assert found.is_contiguous() and torch.equal(found.transpose(1, 2), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_compiled_and_captured(name: str) -> None:
    model = ARCHITECTURES[name]().cuda()
    engine = Engine(model, random_agent(48).cuda(), max_batch_size=2, compile=True)
    for _ in range(2):
        check_exact(engine, prompts_for(engine), max_new_tokens=12, window=3, ignore_eos=True)
    graphs = engine._idle.graphs
    assert graphs.failure is None and graphs._graphs


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_inductor(name: str) -> None:
    """The default backend."""
    engine = compiled(ARCHITECTURES[name](), backend=True)
    check_exact(engine, prompts_for(engine), max_new_tokens=6, window=3, ignore_eos=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_copies_nothing_around_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """New rows are written into the cache itself, which attention reads, and the product behind it
    reads what attention leaves: a copy of either would be a launch per layer, or the whole cache.
    """
    from torch._inductor.utils import run_and_get_code

    monkeypatch.setattr(mara_fast.attention, "_OPAQUE_ON", {"cpu"})
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    model = ARCHITECTURES["llama"]()
    engine = compiled(model, backend=True)
    _, codes = run_and_get_code(
        lambda: engine.generate(prompts_for(engine)[:2], max_new_tokens=4, window=3)
    )
    assert codes
    for code in codes:
        calls = re.findall(
            r"(\w+) = torch\.ops\.mara_fast\.candidate_attention\.default\(\w+, "
            r"reinterpret_tensor\((arg\d+)_1.*?, reinterpret_tensor\((arg\d+)_1",
            code,
        )
        assert len(calls) == model.config.num_hidden_layers
        for returned, key, value in calls:
            assert key != value
            output = re.search(rf"(\w+) = {returned}\b", code)
            assert output and re.search(rf"mm\(reinterpret_tensor\({output[1]},", code)


def test_a_model_that_breaks_the_graph_is_refused() -> None:
    model = ARCHITECTURES["llama"]()
    model.model.layers[0].register_forward_hook(lambda *args: print(end="") or None)
    engine = compiled(model)
    with pytest.raises(UnsupportedModelError, match=r"cannot be compiled: .*; use compile=False"):
        engine.generate([[5, 6]], max_new_tokens=4)


@pytest.mark.parametrize("value", ["nvcc", 1.5, None])
def test_the_backend_is_checked(value: Any) -> None:
    with pytest.raises(ValueError, match="is not allowed; allowed: True, False, "):
        Engine(ARCHITECTURES["llama"](), False, compile=value)
