"""The linear layers of a model that the engine runs, and of nobody else."""

import threading

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
