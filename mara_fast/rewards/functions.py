"""Reward functions: Python callables, called as in TRL.

    f(prompts=[...], completions=[...], **columns) -> list[float | None]

Sync ones are called one after the other, async ones all at once.
"""

import asyncio
import functools
import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

RewardFunction = Callable[..., Any]


def function_name(function: RewardFunction) -> str:
    """``__name__``, also of what a ``functools.partial`` calls; else the name of its class."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def check_signature(function: RewardFunction, name: str, arguments: dict[str, Any]) -> None:
    """Whether a function takes these keyword arguments.

    Raises:
        ValueError: naming the argument that it does not take, or that it wants besides.
    """
    try:
        signature = inspect.signature(function)
    # Functions that are written in C may have none.
    except ValueError:
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(
            f"reward function {name} cannot be called with {', '.join(arguments)}: {error}. "
            "Expected: f(prompts, completions, **columns)"
        ) from error


def call_functions(
    functions: dict[str, RewardFunction], arguments: dict[str, Any], num_samples: int
) -> dict[str, Tensor]:
    """What each function says of the samples.

    Args:
        functions: by name.
        arguments: keyword arguments of the call.
        num_samples: N.

    Returns:
        float64 [N] by name, NaN for None.

    Raises:
        ValueError: a function gives another number of values, or a value that is neither a finite
            number nor None.
        Exception: what a function raises, with a note that names it.
    """
    waited = {name: f for name, f in functions.items() if _is_async(f)}
    values = {}
    for name, function in functions.items():
        if name not in waited:
            with _failure_named(name):
                values[name] = function(**arguments)
    if waited:
        values.update(zip(waited, _run(_gather(waited, arguments)), strict=True))
    return {name: _column(values[name], name, num_samples) for name in functions}


def _is_async(function: RewardFunction) -> bool:
    call = getattr(function, "__call__", None)  # noqa: B004
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


async def _gather(functions: dict[str, RewardFunction], arguments: dict[str, Any]) -> list[Any]:
    async def call(name: str, function: RewardFunction) -> Any:
        with _failure_named(name):
            return await function(**arguments)

    return await asyncio.gather(*(call(name, function) for name, function in functions.items()))


@contextmanager
def _failure_named(name: str) -> Iterator[None]:
    """Adds to a function's own error which function it was, and where."""
    try:
        yield
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        error.add_note(f"raised by reward function {name} ({place.filename}, line {place.lineno})")
        raise


def _run(coroutine: Coroutine[Any, Any, list[Any]]) -> list[Any]:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    # A loop that runs cannot be waited for from inside: another one, in a thread.
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def _column(values: Any, name: str, num_samples: int) -> Tensor:
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise ValueError(
            f"reward function {name} returned {type(values).__name__}, expected a list of "
            f"{num_samples} numbers or None"
        )
    if len(values) != num_samples:
        raise ValueError(
            f"reward function {name} returned {len(values)} values for {num_samples} samples"
        )
    for index, value in enumerate(values):
        if value is None:
            continue
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(
                f"reward function {name} returned {value!r} for sample {index}; expected a finite "
                "number, or None for no opinion"
            )
    numbers_or_nan = [math.nan if value is None else float(value) for value in values]
    return torch.tensor(numbers_or_nan, dtype=torch.float64)
