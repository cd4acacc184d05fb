"""Which body runs where, and what is said of it."""

import importlib.util

import pytest
import torch

from mara_kernels import dispatch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MARA_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for function in (dispatch._choose, dispatch.architecture, dispatch.num_processors):
        function.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A Hopper GPU, as far as the choice looks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    return monkeypatch


def test_a_cpu_runs_torch() -> None:
    for operation in dispatch.OPERATIONS:
        assert dispatch.choose(operation, CPU) == ("torch", "a CPU runs the torch definitions")


def test_a_cpu_interprets_where_triton_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose("score", CPU) == ("triton", "interpreted")


def test_a_gpu_runs_triton(gpu: pytest.MonkeyPatch) -> None:
    assert dispatch.choose("score", GPU) == ("triton", "sm_90")


@pytest.mark.parametrize(
    ("capability", "tables"),
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_80"),
    ],
)
def test_tables_by_capability(
    capability: tuple[int, int], tables: str, gpu: pytest.MonkeyPatch
) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert dispatch.architecture(GPU) == tables


def test_an_amd_gpu(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.version, "hip", "6.3")
    assert dispatch.choose("score", GPU) == ("triton", "gfx942")


def test_old_gpus_and_missing_triton_run_torch(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert dispatch.choose("score", GPU) == ("torch", "sm_75 is older than sm_80")
    gpu.setattr(importlib.util, "find_spec", lambda name: None)
    dispatch._choose.cache_clear()
    assert dispatch.choose("score", GPU) == ("torch", "Triton is not installed")
    assert dispatch.choose("score", torch.device("mps")).name == "torch"


def test_the_variable_forces(gpu: pytest.MonkeyPatch) -> None:
    gpu.setenv("MARA_KERNELS", "torch")
    for operation in dispatch.OPERATIONS:
        assert dispatch.choose(operation, GPU) == ("torch", "MARA_KERNELS=torch")
    gpu.setenv("MARA_KERNELS", "score=torch, cascade=auto")
    assert dispatch.choose("score", GPU).name == "torch"
    assert dispatch.choose("cascade", GPU).name == "triton"
    assert dispatch.choose("truncate", GPU).name == "triton"


def test_what_cannot_run_is_refused(gpu: pytest.MonkeyPatch) -> None:
    gpu.setenv("MARA_KERNELS", "triton")
    with pytest.raises(ValueError, match="asks for the triton body of score on cpu"):
        dispatch.choose("score", CPU)
    gpu.setenv("MARA_KERNELS", "attention=flash")
    gpu.setattr(importlib.util, "find_spec", lambda name: None if "flash" in name else object())
    with pytest.raises(ValueError, match="flash-attn, which is not installed"):
        dispatch.choose("attention", GPU)
    assert dispatch.choose("score", GPU).name == "triton"


@pytest.mark.parametrize(
    "setting",
    ["cuda", "score", "scores=torch", "score=flash", "flash", "score=", "a=b=c", "=torch"],
)
def test_unknown_settings_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match="is not understood at") as caught:
        dispatch.parse_setting(setting)
    assert setting in str(caught.value) and "truncate, score" in str(caught.value)


def test_an_engine_refuses_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from mara_fast import Engine

    monkeypatch.setenv("MARA_KERNELS", "attention=fast")
    with pytest.raises(ValueError, match="is not understood at 'attention=fast'"):
        Engine("a model that nobody looks for")
    monkeypatch.setenv("MARA_KERNELS", "attention=flash")
    with pytest.raises(ValueError, match="asks for the flash body of attention on cpu"):
        Engine("tiny")


def test_the_installation_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    from mara_fast.environment import environment

    monkeypatch.setenv("MARA_KERNELS", "score=torch")
    found = environment()
    assert found["score"] == "torch (MARA_KERNELS=score=torch)"
    assert all(operation in found for operation in dispatch.OPERATIONS)
    monkeypatch.setenv("MARA_KERNELS", "attention=flash")
    assert environment()["attention"].startswith("refused: MARA_KERNELS=attention=flash asks")
