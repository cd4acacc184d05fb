"""What holds for every test: no network, one thread, and which tests run where."""

import os
import tempfile

# Before anything imports torch or transformers; subprocesses of tests inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"
# The models are tiny: a second thread costs more than it brings.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What is measured of the machine is kept there; not beside the user's own.
os.environ["XDG_CACHE_HOME"] = os.path.join(tempfile.gettempdir(), "mara-fast-tests")

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is imported: its kernels are interpreted then, where a test asks for them.
    # Everything else, in the processes that tests start too, decodes with the torch bodies.
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["MARA_KERNELS"] = "torch"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow") and "slow" not in config.getoption("markexpr"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        if slow:
            config.hook.pytest_deselected(items=slow)
            items[:] = [item for item in items if not item.get_closest_marker("slow")]
    if torch.cuda.is_available():
        # What runs the Triton bodies runs them there.
        for item in items:
            if "device" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.gpu)
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def device(run_time_ranges: None) -> torch.device:
    """Where the Triton bodies run: on a GPU if there is one, else interpreted."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def architecture(device: torch.device) -> str:
    """Whose configurations they use."""
    from mara_kernels import dispatch

    return dispatch.architecture(device)


@pytest.fixture(scope="session")
def run_time_ranges() -> None:
    """Kernels are called without going through the dispatch, which would see to it."""
    if not torch.cuda.is_available():
        from mara_kernels import interpreter

        interpreter.prepare()
