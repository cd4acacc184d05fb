"""How the Triton bodies are run in tests."""

from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture
def run_twice(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Runs a body twice over poisoned outputs; both must be complete and equal to the bit."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*size, **options)
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        # Integers that are ids, sizes and offsets: a value that fits none.
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 2**30 - 1)

    def run(body: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", poisoned)
            first, second = body(), body()
        for a, b in zip(_tensors(first), _tensors(second), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        return first

    return run


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)]
