"""What holds for every test: no network, one thread, and which tests run where."""

import os

# Before anything imports torch or transformers; subprocesses of tests inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"
# The models are tiny: a second thread costs more than it brings.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow") and "slow" not in config.getoption("markexpr"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        if slow:
            config.hook.pytest_deselected(items=slow)
            items[:] = [item for item in items if not item.get_closest_marker("slow")]
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not has_gpu():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
