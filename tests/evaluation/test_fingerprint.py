"""What is told apart by its contents, and what is the same."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mara_fast import MaraAgent, tiny
from mara_fast.evaluation.fingerprint import Fingerprints


def of(source: Any) -> Any:
    """Anew, as another run does."""
    return Fingerprints().of(source)


def weighted(weight: float, prompts: list[Any], completions: list[str]) -> list[float]:
    return [weight] * len(completions)


def of_closure(weight: float) -> Callable[..., Any]:
    notes: list[int] = []

    def reward(prompts: list[Any], completions: list[str]) -> list[float]:
        notes.append(len(completions))
        return [weight] * len(completions)

    return reward


class Counted:
    """A reward that is an object."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, prompts: list[Any], completions: list[str]) -> list[float]:
        return [self.weight] * len(completions)


def compiled(text: str) -> Any:
    """A function without a source file."""
    names: dict[str, Any] = {"__name__": "typed"}
    exec(f"f = {text}", names)
    return names["f"]


MAKERS: dict[str, Callable[[float], Any]] = {
    "partial": lambda weight: functools.partial(weighted, weight),
    "closure": of_closure,
    "object": Counted,
    "method": lambda weight: Counted(weight).__call__,
    "default": lambda weight: lambda prompts, completions, w=weight: w,
    "typed": lambda weight: compiled(f"lambda prompts, completions: {weight}"),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_functions_by_what_is_bound_to_them(make: Callable[[float], Any]) -> None:
    assert of(make(1.0)) == of(make(1.0)) != of(make(2.0))


def test_functions_by_module_name_and_source() -> None:
    one, other = (lambda x: x), (lambda x: -x)
    assert of(one) != of(other)
    assert of(weighted).startswith(f"{__name__}:weighted sha256:")
    noted = of_closure(1.0)
    before = of(noted)
    noted([], [])
    assert of(noted) == before


def test_folders_by_their_files(tmp_path: Path) -> None:
    first, second = tmp_path / "a/agent", tmp_path / "b/agent"
    for folder in (first, second):
        shutil.copytree(tiny.AGENT_PATH, folder)
    assert of(str(first)) == of(str(second)) and of(str(first)).startswith("agent sha256:")
    agent = MaraAgent.from_pretrained(second)
    with torch.no_grad():
        agent.ln.bias[0] += 1
    agent.save_pretrained(second)
    assert of(str(first)) != of(str(second))
    assert of("org/agent") == "org/agent"
    assert of([str(first), "org/agent"]) == [of(str(first)), "org/agent"]
    assert of(None) is of(False) is False


def test_loaded_modules_by_their_weights() -> None:
    one, other = (MaraAgent.from_pretrained(tiny.AGENT_PATH) for _ in range(2))
    assert of(one) == of(other)
    with torch.no_grad():
        other.output_linear.bias[0] += 1e-3
    assert of(one) != of(other)
    model, _ = tiny.load()
    before = of(model)
    assert of(tiny.load()[0]) == before != of(tiny.load(dtype="float64")[0])
    model.generation_config.eos_token_id = 5
    assert of(model) != before


def test_large_files_by_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mara_fast.evaluation.fingerprint._BLOCK", 16)
    weights = bytearray(range(256)) * 40
    (tmp_path / "model.safetensors").write_bytes(weights)
    found = [of(str(tmp_path))]
    # Its head, its end, every weight a little, one more.
    for changed in (
        b"x" + weights[1:],
        weights[:-1] + b"x",
        bytes((byte + 1) % 256 for byte in weights),
        weights + b"x",
    ):
        (tmp_path / "model.safetensors").write_bytes(changed)
        found.append(of(str(tmp_path)))
    assert len(set(found)) == 5
