"""Norms and rotations of a model that the engine runs fused, and of nobody else."""

import copy
import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM

import mara_fast.attention
import mara_fast.fused_layers
import mara_kernels.layers.kernel
from architectures import ARCHITECTURES, random_prompt
from exactness import check_exact, random_agent
from launches import Launches
from mara_fast import Engine
from mara_fast.attention import TreeContext
from mara_fast.bench.model import random_llama
from mara_fast.cache import SlotCache
from mara_fast.fused_layers import FusedLayers
from mara_kernels.attention import NewRows, siblings
from mara_kernels.layers import NormRule

NANO = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


def names_of(model: Any) -> set[str]:
    """Without the folders of modeling files."""
    found = FusedLayers(model.model if hasattr(model, "model") else model).names
    return {name.rpartition("modeling_")[2] for name in found}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("llama", {"LlamaRMSNorm.forward", "llama.apply_rotary_pos_emb"}),
        ("qwen3", {"Qwen3RMSNorm.forward", "qwen3.apply_rotary_pos_emb"}),
        ("gemma2", {"Gemma2RMSNorm.forward", "gemma2.apply_rotary_pos_emb"}),
        ("olmo2", {"Olmo2RMSNorm.forward", "olmo2.apply_rotary_pos_emb"}),
        # Layer norms; angles of half a head; interleaved pairs.
        ("gpt_neox", {"gpt_neox.apply_rotary_pos_emb"}),
        ("gpt_oss", {"GptOssRMSNorm.forward"}),
        ("cohere", set()),
        ("gpt2", set()),
    ],
)
def test_what_is_found(name: str, wanted: set[str], dtype: torch.dtype) -> None:
    assert names_of(ARCHITECTURES[name]().to(dtype)) == wanted


def test_rules_are_those_of_the_model() -> None:
    """In half precision it shows where a norm rounds."""
    for name, rule in (
        ("llama", NormRule(adds_one=False, rounds_first=True)),
        ("olmo2", NormRule(adds_one=False, rounds_first=False)),
        ("gemma2", NormRule(adds_one=True, rounds_first=False)),
    ):
        model = ARCHITECTURES[name]().to(torch.bfloat16)
        fused = FusedLayers(model)
        # Of factors that are all one every rule rounds alike, and they may be others later.
        other = ARCHITECTURES[name]().to(torch.bfloat16)
        other.model.norm.weight.data.fill_(0.0 if rule.adds_one else 1.0)
        assert FusedLayers(other).rule_of(other.model.norm) == rule
        assert fused.rule_of(model.model.norm) == rule
        assert fused.rule_of(other.model.norm) is None


class OwnNorm(nn.Module):
    """One that is a norm of ours, or not quite."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6))
        self.eps, self.factor = 1e-5, factor

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.factor * (self.weight * normed)


class InheritedNorm(OwnNorm):
    pass


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Threads that ran a fused norm."""
    seen: list[str] = []
    original = mara_fast.fused_layers.rms_norm

    def spy(*args: Any, **options: Any) -> Tensor:
        seen.append(threading.current_thread().name)
        return original(*args, **options)

    monkeypatch.setattr(mara_fast.fused_layers, "rms_norm", spy)
    return seen


def test_what_differs_is_left(spied: list[str]) -> None:
    """Of a class the modules that are norms, and no others."""
    assert FusedLayers(OwnNorm(factor=1.001)).names == ()
    norms, x = [OwnNorm(), OwnNorm(factor=2.0), OwnNorm()], torch.randn(3, 6)
    wanted = [norm(x) for norm in norms]
    # One that was made later, and a copy, are not known to be.
    fused = FusedLayers(nn.Sequential(*norms))
    with fused():
        found = [norm(x) for norm in norms]
        OwnNorm()(x)
        copy.deepcopy(norms[0])(x)
    torch.testing.assert_close(found, wanted)
    assert len(spied) == 2


def test_only_within_and_only_this_thread(spied: list[str]) -> None:
    model = ARCHITECTURES["llama"]()
    norm, kind, file = model.model.norm, type(model.model.norm), sys.modules[type(model).__module__]
    before = kind.forward, file.apply_rotary_pos_emb
    fused, x = FusedLayers(model.model), torch.randn(2, 48)
    wanted = norm(x)
    with fused():
        torch.testing.assert_close(norm(x), wanted)
        other = threading.Thread(target=norm, args=(x,), name="other")
        other.start()
        other.join()
        # Another dtype than that of the weights is the module's own business.
        norm(x.double())
        # As some call it, by its own names.
        norm(hidden_states=x)
    assert spied == ["MainThread"]
    with pytest.raises(KeyError), fused(), fused():
        raise KeyError
    norm(x)
    assert spied == ["MainThread"] and "forward" not in vars(norm)
    # Exchanged for as long as anything needs it.
    other_fused = FusedLayers(model.model)
    del fused
    assert kind.forward is not before[0]
    del other_fused
    assert (kind.forward, file.apply_rotary_pos_emb) == before


def test_another_model_within_a_forward(spied: list[str]) -> None:
    """Of the same class, and none of whose modules is a norm of ours."""
    mine, theirs, x = OwnNorm(), OwnNorm(factor=3.0), torch.randn(3, 6)
    fused, fused_theirs = FusedLayers(mine), FusedLayers(theirs)
    wanted = theirs(x)
    with fused():
        assert torch.equal(theirs(x), wanted)
        with fused_theirs():
            mine(x)
        assert not spied
        mine(x)
    assert len(spied) == 1


def test_what_a_user_puts_there_is_respected(
    spied: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    norm, x = InheritedNorm(), torch.randn(3, 6)
    fused = FusedLayers(norm)
    with fused():
        monkeypatch.setattr(OwnNorm, "forward", lambda self, x: x + 1)
        assert torch.equal(norm(x), x + 1)
    del fused
    assert torch.equal(norm(x), x + 1) and not spied


def test_rotations_of_other_shapes_are_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ARCHITECTURES["llama"]()
    fused, file = FusedLayers(model.model), sys.modules[type(model).__module__]
    monkeypatch.setattr(mara_fast.fused_layers, "rotate", lambda *_: pytest.fail())
    query, angles = torch.randn(2, 4, 3, 8), torch.randn(2, 3, 8)
    with fused():
        file.apply_rotary_pos_emb(query, query[:, :, :1], angles, angles)
        file.apply_rotary_pos_emb(query, query, angles[:, :1], angles[:, :1])
        file.apply_rotary_pos_emb(query.double(), query.double(), angles.double(), angles.double())
        file.apply_rotary_pos_emb(q=query, k=query, cos=angles, sin=angles)
        file.apply_rotary_pos_emb(query, query, angles, angles, 1)
        with pytest.raises(TypeError):
            file.apply_rotary_pos_emb(query)


def test_an_inherited_norm(spied: list[str]) -> None:
    """Its method is exchanged where it is defined; other heirs keep theirs."""
    norm, x = InheritedNorm(), torch.randn(3, 6)
    before = OwnNorm.forward
    fused, wanted = FusedLayers(nn.Sequential(norm)), norm(x)
    with fused():
        torch.testing.assert_close(norm(x), wanted)
        OwnNorm(factor=3.0)(x)
    del fused
    assert len(spied) == 1 and OwnNorm.forward is before
    assert "forward" not in vars(InheritedNorm)


def test_a_compiler_traces_the_model_as_it_is(spied: list[str]) -> None:
    model = ARCHITECTURES["llama"]()
    x, wanted = torch.randn(2, 48), model.model.norm(torch.ones(2, 48))
    fused = FusedLayers(model.model)
    with fused():
        found = torch.compile(model.model.norm, fullgraph=True, backend="eager")(torch.ones(2, 48))
        assert not spied
        model.model.norm(x)
    assert spied and torch.equal(found, wanted)


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> torch.device:
    """Our kernels, interpreted where there is no GPU."""
    monkeypatch.setenv("MARA_KERNELS", "torch,layers=triton")
    return device


def test_part_of_a_head_is_turned_by_the_model(
    triton: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Phi3Config(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        partial_rotary_factor=0.5,
    )
    torch.manual_seed(0)
    engine = Engine(Phi3ForCausalLM(config).to(triton), random_agent(48).to(triton))
    assert engine.lm.fused is not None and len(engine.lm.fused.names) == 2
    monkeypatch.setattr(mara_kernels.layers.kernel, "rotate", lambda *_: pytest.fail())
    check_exact(engine, [random_prompt(engine.lm.model, 9)], max_new_tokens=6, ignore_eos=True)


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "qwen3_moe"])
def test_tokens_are_those_of_the_cascade(name: str, triton: torch.device) -> None:
    model = ARCHITECTURES[name]().to(triton)
    engine = Engine(model, random_agent(48).to(triton), max_batch_size=2, prefill_chunk=5)
    assert engine.lm.fused is not None and len(engine.lm.fused.names) == 2
    prompts = [random_prompt(model, length, seed=length) for length in (12, 3)]
    check_exact(engine, prompts, max_new_tokens=6, window=3, ignore_eos=True)


def test_launches_of_a_layer(triton: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a decode step: the difference between models of one and of two layers."""
    counts: dict[bool, list[Counter[str]]] = {True: [], False: []}
    for is_fused in counts:
        for num_layers in (1, 2):
            model = random_llama(**NANO, num_hidden_layers=num_layers).to(triton)
            lm, launches = Engine(model, False).lm, Launches()
            assert lm.fused is not None
            if not is_fused:
                lm.fused = None
            cache = SlotCache(num_slots=1, max_length=8, scratch=1)
            token = torch.full((1, 1), 5, device=triton)
            rows = NewRows(lengths=token[0], tree=siblings(1, triton), base=8)

            def forward(lm: Any = lm, cache: Any = cache, token: Any = token, rows: Any = rows):
                cache.select(slice(0, 1), base=8)
                context = TreeContext(rows=rows)
                with torch.inference_mode():
                    lm.hidden_states(token, positions=token, cache=cache, context=context)

            forward()
            for place, name in (
                (mara_fast.fused_layers, "rms_norm"),
                (mara_fast.fused_layers, "rotate"),
                (mara_fast.attention, "candidate_attention"),
            ):
                one = launches.hidden(getattr(place, name), as_one=name)
                monkeypatch.setattr(place, name, one)
            with launches:
                forward()
            monkeypatch.undo()
            monkeypatch.setenv("MARA_KERNELS", "torch,layers=triton")
            counts[is_fused].append(Counter(launches.found))
    fused, plain = (counts[kind][1] - counts[kind][0] for kind in (True, False))
    assert fused == {
        "linear": 7,
        "rms_norm": 2,
        "rotate": 1,
        "copy_": 2,
        "candidate_attention": 1,
        "silu": 1,
        "mul": 1,
        "add": 2,
    }
    assert plain.total() >= 2 * fused.total()


def test_a_cpu_runs_the_model_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARA_KERNELS", "torch")
    assert Engine(ARCHITECTURES["llama"](), False).lm.fused is None


def zeros(x: Tensor, *args: Any, **options: Any) -> Tensor:
    return torch.zeros_like(x)


def broken(*args: Any, **options: Any) -> Tensor:
    raise RuntimeError("PTX was compiled for another architecture\nand more")


@pytest.mark.parametrize("body", [zeros, broken])
def test_kernels_that_fail_are_done_without(
    body: Callable,
    triton: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(mara_kernels.layers.kernel, "rms_norm", body)
    model = copy.deepcopy(ARCHITECTURES["llama"]()).to(triton)
    with caplog.at_level(logging.WARNING, "mara_fast"):
        engine = Engine(model, random_agent(48).to(triton))
    assert engine.lm.fused is None and engine.lm.attention == "candidate"
    (said,) = [one.message for one in caplog.records if "run as they are" in one.message]
    assert said.startswith("LlamaForCausalLM: LlamaRMSNorm.forward, ") and "\n" not in said
    check_exact(engine, [random_prompt(model, 9)], max_new_tokens=6, ignore_eos=True)
