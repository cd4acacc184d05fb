"""The linear layers of a model that the engine runs, and of nobody else."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mara_fast.linear_layers
from architectures import ARCHITECTURES, random_prompt
from exactness import check_exact, random_agent
from mara_fast import Engine
from mara_fast.linear_layers import fast_linear
from mara_kernels import linear as products


def test_only_within_and_only_this_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mara_fast.linear_layers, "has_onednn", lambda: True)
    seen: list[str] = []

    def spy(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(threading.current_thread().name)
        return torch.zeros(())

    monkeypatch.setattr(mara_fast.linear_layers, "linear", spy)
    torchs, layer, input = F.linear, nn.Linear(3, 2), torch.ones(1, 3)
    layer(input)
    with fast_linear():
        layer(input)
        other = threading.Thread(target=layer, args=(input,), name="other")
        other.start()
        other.join()
    assert F.linear is torchs and seen == ["MainThread"]
    with pytest.raises(KeyError), fast_linear():
        raise KeyError
    assert F.linear is torchs
    layer(input)
    assert len(seen) == 1


def test_what_others_put_there_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mara_fast.linear_layers, "has_onednn", lambda: True)
    before = F.linear

    def theirs(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return before(input, weight, bias) + 1

    layer, input = nn.Linear(3, 2), torch.ones(1, 3)
    wanted = layer(input)
    with fast_linear():
        monkeypatch.setattr(F, "linear", theirs)
    assert F.linear is theirs
    with fast_linear():
        torch.testing.assert_close(layer(input), wanted)
    assert F.linear is theirs and torch.equal(layer(input), wanted + 1)


def test_an_engine_within_a_forward_of_another() -> None:
    """A hook in the head that asks another engine, say."""
    model, inner = ARCHITECTURES["llama"](), Engine(ARCHITECTURES["gemma2"](), False)
    answers = []

    def ask(*_: object) -> None:
        if not answers:
            answers.append(None)
            answers.append(inner.generate([[3, 4]], max_new_tokens=2, ignore_eos=True))

    engine = Engine(model, random_agent(48), max_batch_size=2)
    hook = model.lm_head.register_forward_hook(ask)
    worker = threading.Thread(
        target=lambda: answers.append(engine.generate([[3, 4, 5]], max_new_tokens=2)), daemon=True
    )
    worker.start()
    worker.join(60)
    hook.remove()
    assert not worker.is_alive() and len(answers) == 3


def test_another_thread_compiles_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which function is looked up is part of what a compiler guards on."""
    monkeypatch.setattr(mara_fast.linear_layers, "has_onednn", lambda: True)
    model = ARCHITECTURES["llama"]()
    engine = Engine(model, random_agent(48), compile="eager")
    step = engine.lm._compiled_step

    def beside_another(inputs: dict[str, Any]) -> Tensor:
        entered, leave = threading.Event(), threading.Event()

        def other() -> None:
            with fast_linear():
                entered.set()
                leave.wait(60)

        thread = threading.Thread(target=other)
        thread.start()
        entered.wait(60)
        try:
            return step(inputs)
        finally:
            leave.set()
            thread.join()

    prompts = [random_prompt(model, 4, seed=0)]
    for compiled_step in (step, beside_another, step):
        monkeypatch.setattr(engine.lm, "_compiled_step", compiled_step)
        check_exact(engine, prompts, max_new_tokens=5, window=2, ignore_eos=True)


@pytest.mark.skipif(not products.has_onednn(), reason="needs torch with MKL and oneDNN")
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2", "gpt2"])
def test_tokens_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer that may, by oneDNN, at any size."""
    monkeypatch.setattr(products, "_LEAST_WEIGHTS", 1)
    counted = []
    theirs = torch.ops.mkldnn._linear_pointwise

    def count(*arguments: object) -> Tensor:
        counted.append(arguments)
        return theirs(*arguments)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", count)
    model = ARCHITECTURES[name]()
    engine = Engine(model, random_agent(model.config.hidden_size), max_batch_size=3)
    prompts = [random_prompt(model, length, seed=length) for length in (3, 9, 4, 12)]
    check_exact(engine, prompts, max_new_tokens=8, window=3, ignore_eos=True)
    assert counted
