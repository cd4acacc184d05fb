"""Several rewards at once: names, weights, opinions, and what is refused before any work."""

import asyncio
import functools
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import LlamaForSequenceClassification

from mara_fast.rewards import RewardModel, Rewards

PROMPTS = ["one", "three", "fifteen"]
COMPLETIONS = ["a", "bbb", "cc"]
HEAD = torch.randn(1, 16, generator=torch.Generator().manual_seed(1))
NAN = math.nan


def length(prompts: list, completions: list, **columns: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def prompt_length(prompts: list, **columns: Any) -> list[int]:
    return [len(prompt) for prompt in prompts]


def sometimes(completions: list, **columns: Any) -> list[float | None]:
    return [None if completion == "bbb" else 10.0 for completion in completions]


async def slow_length(prompts: list, completions: list, **columns: Any) -> list[float]:
    await asyncio.sleep(0)
    return length(prompts, completions)


class Judge:
    async def __call__(self, prompts: list, completions: list) -> list[float]:
        return [0.5 for _ in prompts]


def forbidden(**arguments: Any) -> list[float]:
    raise AssertionError("called before the arguments were checked")


@pytest.fixture
def path(save_llama: Callable[..., Path]) -> Path:
    return save_llama("mine", {"score.weight": HEAD}, {"pad_token_id": 3})


# The weighted sum


def test_weighted_sum_over_opinions() -> None:
    scores = Rewards([length, prompt_length, sometimes], [1.0, -1, 0.5]).score(PROMPTS, COMPLETIONS)
    assert list(scores.by_name) == ["length", "prompt_length", "sometimes"]
    assert scores.by_name["length"].tolist() == [1, 3, 2]
    assert scores.by_name["prompt_length"].tolist() == [3, 5, 7]
    assert scores.by_name["sometimes"].isnan().tolist() == [False, True, False]
    assert scores.total.tolist() == [1 - 3 + 5, 3 - 5, 2 - 7 + 5]
    assert {tensor.dtype for tensor in [scores.total, *scores.by_name.values()]} == {torch.float64}


def test_weights_are_one_by_default() -> None:
    rewards = Rewards([length, sometimes])
    assert rewards.weights == (1.0, 1.0)
    assert rewards.score(PROMPTS, COMPLETIONS).total.tolist() == [11, 3, 12]
    assert Rewards(length).score(PROMPTS, COMPLETIONS).total.tolist() == [1, 3, 2]


def test_a_sample_without_any_opinion() -> None:
    with pytest.raises(ValueError, match=r"on sample 1 \(1 of 3 samples in all\).*sometimes"):
        Rewards([sometimes, sometimes]).score(PROMPTS, COMPLETIONS)


def test_models_and_functions_together(path: Path) -> None:
    alone = Rewards(str(path)).score(PROMPTS, COMPLETIONS).total
    loaded = LlamaForSequenceClassification.from_pretrained(path, num_labels=1)
    rewards = Rewards([path, loaded, length, RewardModel.from_pretrained(path)], [1, 2, 3, 4])
    assert rewards.names == ["mine", "mine_2", "length", "mine_3"]
    scores = rewards.score(PROMPTS, COMPLETIONS)
    expected = 7 * alone + 3 * torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(scores.total, expected)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 64])
def test_scores_do_not_depend_on_the_batch(path: Path, batch_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 40, (20,), generator=generator).tolist()
    prompts = [f"{index}?" for index in range(20)]
    completions = [chr(97 + index) * size for index, size in enumerate(sizes)]
    model = RewardModel.from_pretrained(path)
    alone = [model.score([row]) for row in model.encode(prompts, completions)]
    scores = Rewards(model, batch_size=batch_size).score(prompts, completions).total
    torch.testing.assert_close(scores, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_longest_texts_go_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    forward = RewardModel._forward

    def watched(self: RewardModel, rows: list) -> torch.Tensor:
        seen.append([len(row["input_ids"]) for row in rows])
        return forward(self, rows)

    monkeypatch.setattr(RewardModel, "_forward", watched)
    Rewards(path, batch_size=2).score(["p"] * 5, ["a", "aaaa", "aa", "aaaaa", "aaa"])
    assert seen == [[7, 6], [5, 4], [3]]


def test_progress_is_shown_on_demand(path: Path, capsys: pytest.CaptureFixture) -> None:
    rewards = Rewards([path, length])
    capsys.readouterr()
    rewards.score(PROMPTS, COMPLETIONS)
    assert capsys.readouterr().err == ""
    rewards.score(PROMPTS, COMPLETIONS, progress=True)
    shown = capsys.readouterr().err
    assert "mine: 100%" in shown and "3/3" in shown and "length" not in shown


# Functions


def test_functions_get_the_columns() -> None:
    def correct(prompts: list, completions: list, solution: list, **columns: Any) -> list[float]:
        assert columns == {"source": (1, 2, 3)}
        pairs = zip(completions, solution, strict=True)
        return [float(completion == wanted) for completion, wanted in pairs]

    scores = Rewards(correct).score(
        PROMPTS, COMPLETIONS, solution=["a", "b", "cc"], source=(1, 2, 3)
    )
    assert scores.total.tolist() == [1, 0, 1]


def test_functions_get_chats_as_they_are() -> None:
    chat = [{"role": "user", "content": "x"}]
    answer = [{"role": "assistant", "content": "y"}]

    def same(prompts: list, completions: list) -> list[bool]:
        return [prompts[0] is chat and completions[0] is answer]

    assert Rewards(same).score([chat], [answer]).total.tolist() == [1]


@pytest.mark.parametrize(
    "values",
    [
        numpy.array([1, 2, 3]),
        torch.tensor([1.0, 2.0, 3.0]),
        (1, numpy.float32(2), True + 2),
    ],
    ids=["numpy", "torch", "tuple"],
)
def test_numbers_of_every_kind(values: Any) -> None:
    def given(**arguments: Any) -> Any:
        return values

    assert Rewards(given).score(PROMPTS, COMPLETIONS).total.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], "given returned 2 values for 3 samples"),
        ([1.0, NAN, 2.0], "given returned nan for sample 1; expected a finite number, or None"),
        ([1.0, 2.0, -math.inf], "given returned -inf for sample 2"),
        ([1.0, "2", 3.0], "given returned '2' for sample 1"),
        ([1.0, [2.0], 3.0], r"given returned \[2.0\] for sample 1"),
        (torch.tensor([1.0, NAN, 1.0]), "given returned nan for sample 1"),
        (torch.ones(3, 1), r"given returned \[1.0\] for sample 0"),
        (torch.tensor(1.0), "given returned float, expected a list of 3"),
        (None, "given returned NoneType, expected a list of 3 numbers or None"),
        ("abc", "given returned str"),
        ({0: 1.0}, "given returned dict"),
    ],
)
def test_functions_that_return_something_else(values: Any, message: str) -> None:
    def given(**arguments: Any) -> Any:
        return values

    async def awaited(**arguments: Any) -> Any:
        return values

    with pytest.raises(ValueError, match=message):
        Rewards(given).score(PROMPTS, COMPLETIONS)
    with pytest.raises(ValueError, match=message.replace("given", "awaited")):
        Rewards(awaited).score(PROMPTS, COMPLETIONS)


def test_errors_of_functions_are_theirs() -> None:
    def broken(**arguments: Any) -> list[float]:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Rewards(broken).score(PROMPTS, COMPLETIONS)


@pytest.mark.parametrize(
    ("function", "columns", "message"),
    [
        (lambda prompts, completions: [], {"extra": [1, 2, 3]}, "unexpected keyword argument"),
        (lambda prompts, completions, solution: [], {}, "missing a required argument: 'solution'"),
        (lambda texts: [], {}, r"Expected: f\(prompts, completions, \*\*columns\)"),
    ],
)
def test_functions_that_take_something_else(
    function: Callable, columns: dict[str, list], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Rewards([forbidden, function]).score(PROMPTS, COMPLETIONS, **columns)


def test_names() -> None:
    rewards = Rewards(
        [length, length, functools.partial(length, solution=None), lambda **c: [], Judge(), length]
    )
    assert rewards.names == ["length", "length_2", "length_3", "<lambda>", "Judge", "length_4"]


# Async functions


def test_async_functions_run_at_once() -> None:
    events: list[asyncio.Event] = []

    async def first(**arguments: Any) -> list[float]:
        events.append(asyncio.Event())
        await asyncio.wait_for(events[0].wait(), timeout=10)
        return [1.0] * 3

    async def second(**arguments: Any) -> list[float]:
        events[0].set()
        return [2.0] * 3

    scores = Rewards([first, length, second, Judge()]).score(PROMPTS, COMPLETIONS)
    assert list(scores.by_name) == ["first", "length", "second", "Judge"]
    assert scores.total.tolist() == [4.5, 6.5, 5.5]


def test_async_functions_inside_a_running_loop() -> None:
    threads = []

    async def where(**arguments: Any) -> list[float]:
        threads.append(threading.get_ident())
        return [1.0] * 3

    async def notebook() -> torch.Tensor:
        return Rewards([where, slow_length]).score(PROMPTS, COMPLETIONS).total

    assert asyncio.run(notebook()).tolist() == [2, 4, 3]
    assert threads[0] != threading.get_ident()


def test_errors_of_async_functions_are_theirs() -> None:
    async def broken(**arguments: Any) -> list[float]:
        raise KeyError("mine")

    start = time.perf_counter()
    with pytest.raises(KeyError, match="mine") as caught:
        Rewards([broken, slow_length]).score(PROMPTS, COMPLETIONS)
    assert "raised by reward function broken (" in caught.value.__notes__[0]
    assert time.perf_counter() - start < 5


# What is refused


@pytest.mark.parametrize(
    ("funcs", "options", "message"),
    [
        ([], {}, "funcs is empty"),
        ([length, 5], {}, r"funcs\[1\] is 5, expected a hub id or path, a PreTrainedModel"),
        (None, {}, r"funcs\[0\] is None"),
        (length, {"weights": [1.0, 2.0]}, "got 2 weights for 1 rewards"),
        (length, {"weights": [NAN]}, r"weights\[0\]=nan is not allowed"),
        ([length, length], {"weights": [1, math.inf]}, r"weights\[1\]=inf"),
        (length, {"weights": ["1"]}, r"weights\[0\]='1'"),
        (length, {"weights": [None]}, r"weights\[0\]=None"),
        (length, {"processing_classes": []}, "got 0 processing_classes for 1 rewards"),
        (length, {"processing_classes": ["x"]}, "must be None: it takes none"),
        (length, {"batch_size": 0}, "batch_size=0 is not allowed"),
        (length, {"batch_size": 2.0}, "batch_size=2.0"),
        (length, {"batch_size": True}, "batch_size=True"),
    ],
)
def test_bad_options(funcs: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rewards(funcs, **options)


def test_options_without_effect_warn() -> None:
    with pytest.warns(UserWarning, match="device='cpu' has no effect"):
        Rewards(length, device="cpu")
    with pytest.warns(UserWarning, match="dtype='float32' has no effect"):
        Rewards(length, dtype="float32")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"device": "gpu5"}, "device='gpu5' is not known"), ({"dtype": "int8"}, "dtype='int8'")],
)
def test_bad_options_of_models(path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rewards(path, **options)


def test_max_length_reaches_the_models(path: Path) -> None:
    with pytest.warns(UserWarning, match="mine: 1 of 3 texts are longer than max_length=9"):
        scores = Rewards(path, max_length=9).score(PROMPTS, COMPLETIONS)
    cut = Rewards(path).score(["fifteen"], ["c"])
    torch.testing.assert_close(scores.total[2:], cut.total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("prompts", "completions", "columns", "message"),
    [
        ([], [], {}, "are empty"),
        (["a"], [], {}, "got 1 prompts and 0 completions"),
        (["a", "b"], ["c"], {}, "got 2 prompts and 1 completions"),
        ("a", ["b"], {}, "prompts must be a list of texts or chats, got str"),
        (["a"], None, {}, "completions must be a list of texts or chats, got NoneType"),
        ([5], ["b"], {}, r"prompts\[0\] must be a text or a chat .* got int"),
        (["a"], [None], {}, r"completions\[0\] must be a text or a chat .* got NoneType"),
        ([{"role": "user", "content": "a"}], ["b"], {}, r"prompts\[0\] must be a text or a chat"),
        (["a"], ["b"], {"solution": []}, "column solution has 0 values for 1 samples"),
        (["a"], ["b"], {"solution": [1, 2]}, "column solution has 2 values for 1 samples"),
        (["a"], ["b"], {"solution": "x"}, "column solution must be a list of 1 values, got 'x'"),
        (["a"], ["b"], {"solution": 5}, "column solution must be a list of 1 values, got 5"),
    ],
)
def test_bad_samples_are_refused_before_any_work(
    prompts: Any, completions: Any, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Rewards([forbidden, Judge()]).score(prompts, completions, **columns)


def test_formats_are_checked_before_any_work(path: Path) -> None:
    model = RewardModel.from_pretrained(path)
    chats = [[{"role": "user", "content": "a"}] * 2]
    with pytest.raises(ValueError, match="sample 0 has messages of user, user, assistant"):
        Rewards([forbidden, model]).score(chats, ["b"])
