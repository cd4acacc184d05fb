"""Which stages there are, in order of value, and what each may take.

Estimates are for an H100 with 16 cores, and have not been measured yet; a stage's own seconds are
in the report. What checks comes first and runs side by side, with ahead-of-time compilation among
it, which leaves every kernel in Triton's cache; what measures runs alone.
"""

import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.gpu import readers
from benchmarks.gpu.stage import OUTPUT, Read, Stage, own

SANITIZED = "strides or splits or small_trees or every_rule_equals_torch or different_size"
"""Small cases of every kernel."""

_CORES_PER_WORKER, _CORES_PER_JOB = 2, 3
"""The kernels' tests compile most of the time."""
_COMPARED = "1,2,3,5,6,7"
"""Systems of ``mara-fast bench``: all but transformers' compiled one, which takes minutes."""


def stages_for(machine: Mapping[str, Any], *, workers: int | None = None) -> list[Stage]:
    """Of a machine as :func:`machine.describe` says it is.

    Args:
        machine: the description.
        workers: processes of pytest; None: as fits.
    """
    if machine["device"] == "cuda":
        workers = workers or max(1, machine["num_cores"] // _CORES_PER_WORKER)
        return [*_gpu_checks(machine, workers), *_gpu_measurements()]
    return _rehearsal(machine, workers or max(1, machine["num_cores"]))


def num_jobs(machine: Mapping[str, Any]) -> int:
    """Stages that run at once, of those that are not timed."""
    return max(1, min(5, machine["num_cores"] // _CORES_PER_JOB))


def _gpu_checks(machine: Mapping[str, Any], workers: int) -> list[Stage]:
    sanitizer = machine["sanitizer"]
    return [
        _compiled(machine, estimate_s=50, cap_s=150),
        _pytest("kernels", machine, workers, ("tests/kernels", "-m", "gpu"), 90, 200),
        _own("exact", 30, 100),
        _own("captured", 30, 100),
        _own("divergence", 40, 120),
        _own("learning", 20, 60),
        Stage(
            name="memory",
            command=(
                *(sanitizer or "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1"),
                *(
                    sys.executable,
                    "-m",
                    "pytest",
                    "-v",
                    "tests/kernels",
                    "-m",
                    "gpu",
                    "-k",
                    SANITIZED,
                ),
            ),
            read=readers.memory_check,
            estimate_s=90,
            cap_s=180,
            # A byte beyond a tensor is noticed only where torch does not keep memory to itself.
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            obstacle="" if sanitizer else "there is no compute-sanitizer: memory is not checked",
        ),
        _pytest(
            "engine",
            machine,
            workers,
            ("tests", "--ignore=tests/kernels", "-m", "gpu"),
            100,
            200,
        ),
    ]


def _gpu_measurements() -> list[Stage]:
    return [
        _steps("llama-3.1-8b", 120, 200),
        _decoding("llama-3.1-8b", "1,64", 110, 180),
        _kernel_speed("attention", 45, 100),
        _kernel_speed("truncate", 40, 90),
        _kernel_speed("score", 45, 100),
        _kernel_speed("cascade", 15, 50),
        _kernel_speed("bookkeeping", 20, 60),
        _kernel_speed("layers", 20, 60),
        Stage(
            name="training",
            command=(
                *_script("training_speed.py"),
                *("--device", "cuda", "--model", "llama-3.1-8b", "--new-tokens", "16"),
                *("--authors-episodes", "1", "--transitions", "4096", "--updates", "3"),
                *("--rounds", "2", "--output", OUTPUT),
            ),
            read=readers.training,
            estimate_s=70,
            cap_s=120,
            is_timed=True,
        ),
        _steps("llama-3.2-1b", 50, 100),
        _steps("llama-3.2-3b", 70, 130),
        _decoding("llama-3.2-1b", "1,64", 60, 120),
        _decoding("llama-3.2-3b", "1,64", 80, 140),
        _decoding("llama-3.2-1b", "1", 100, 180, systems="1,2,4", name="decode compiled 1b"),
        _steps("llama-3.2-1b", 50, 100, label="unfused", bodies="bookkeeping=torch,layers=torch"),
        _steps("llama-3.2-1b", 130, 300, "--compile", label="compiled"),
        _steps("llama-3.1-8b", 220, 420, "--compile", label="compiled"),
        _configs(200, 320, "--seconds", "170"),
    ]


def _rehearsal(machine: Mapping[str, Any], workers: int) -> list[Stage]:
    """The same way through on a CPU: the kernels interpreted and compiled, small sizes."""
    small = ("--small", "--device", "cpu")
    tests = ("tests/kernels", "tests/test_triton_engine.py")
    return [
        *(
            _own(name, 10, 90, *small)
            for name in ("exact", "captured", "divergence", "learning", "steps")
        ),
        Stage(
            name="decode",
            command=(
                *(sys.executable, "-m", "mara_fast.bench.cli", "--device", "cpu"),
                *("--batch-sizes", "1,2", "--input-len", "8", "--output-len", "4"),
                *("--num-iters", "1", "--prompts-per-slot", "1", "--num-serial-prompts", "1"),
                *("--output-json", OUTPUT),
            ),
            read=readers.decoding,
            estimate_s=30,
            cap_s=120,
            is_timed=True,
        ),
        Stage(
            name="training",
            command=(
                *_script("training_speed.py"),
                *("--device", "cpu", "--hidden-size", "64", "--num-prompts", "8"),
                *("--authors-episodes", "1", "--prompt-length", "4", "--new-tokens", "4"),
                *("--transitions", "1024", "--updates", "1", "--rounds", "1"),
                *("--output", OUTPUT),
            ),
            read=readers.training,
            estimate_s=30,
            cap_s=120,
            is_timed=True,
        ),
        _pytest("interpreted", machine, workers, tests, 150, 400),
        _configs(40, 200, "--compile", machine["architecture"], "--operation", "truncate"),
        _compiled(machine, estimate_s=120, cap_s=400),
    ]


def _own(name: str, estimate_s: float, cap_s: float, *options: str) -> Stage:
    """A stage of this package that is not timed."""
    command = (sys.executable, "-m", "benchmarks.gpu.one", name, *options, "--output", OUTPUT)
    return Stage(name=name, command=command, read=own, estimate_s=estimate_s, cap_s=cap_s)


def _steps(
    model: str, estimate_s: float, cap_s: float, *options: str, label: str = "", bodies: str = ""
) -> Stage:
    return Stage(
        name=" ".join(filter(None, ("steps", label, _short(model)))),
        command=(
            *(sys.executable, "-m", "benchmarks.gpu.one", "steps", "--model", model),
            *(*options, "--label", label, "--output", OUTPUT),
        ),
        read=own,
        estimate_s=estimate_s,
        cap_s=cap_s,
        is_timed=True,
        environment={"MARA_KERNELS": bodies} if bodies else {},
    )


def _decoding(
    model: str,
    batch_sizes: str,
    estimate_s: float,
    cap_s: float,
    *,
    systems: str = _COMPARED,
    name: str | None = None,
) -> Stage:
    return Stage(
        name=name or f"decode {_short(model)}",
        command=(
            *(sys.executable, "-m", "mara_fast.bench.cli", "--model", model),
            # Those of this project are for an 8B.
            *(("--targets",) if model == "llama-3.1-8b" else ()),
            *("--batch-sizes", batch_sizes, "--systems", systems, "--output-len", "32"),
            *("--num-iters", "2", "--prompts-per-slot", "2", "--num-serial-prompts", "1"),
            *("--output-json", OUTPUT),
        ),
        read=readers.decoding,
        estimate_s=estimate_s,
        cap_s=cap_s,
        is_timed=True,
    )


def _kernel_speed(operation: str, estimate_s: float, cap_s: float) -> Stage:
    return Stage(
        name=f"speed of {operation}",
        command=(
            *_script("kernel_speed.py"),
            *("--operation", operation, "--quick", "--output", OUTPUT),
        ),
        read=readers.kernel_speed,
        estimate_s=estimate_s,
        cap_s=cap_s,
        is_timed=True,
    )


def _configs(estimate_s: float, cap_s: float, *options: str) -> Stage:
    return Stage(
        name="configs",
        command=(*_script("kernel_configs.py"), *options, "--output", OUTPUT),
        read=readers.configurations,
        estimate_s=estimate_s,
        cap_s=cap_s,
        is_timed=True,
    )


def _compiled(machine: Mapping[str, Any], *, estimate_s: float, cap_s: float) -> Stage:
    return Stage(
        name="compiled",
        command=(
            *(sys.executable, "-m", "mara_kernels.aot"),
            *("--architecture", machine["architecture"], "--output", OUTPUT),
        ),
        read=readers.compilation,
        estimate_s=estimate_s,
        cap_s=cap_s,
    )


def _pytest(
    name: str,
    machine: Mapping[str, Any],
    workers: int,
    arguments: tuple[str, ...],
    estimate_s: float,
    cap_s: float,
) -> Stage:
    """Tests; a plugin that is not installed is done without."""
    extra: tuple[str, ...] = ()
    if machine["has"]["xdist"] and workers > 1:
        extra += ("-n", str(workers))
    if machine["has"]["pytest_timeout"]:
        # One that hangs costs its own process.
        extra += ("--timeout=120", "--timeout-method=thread")
    command = (sys.executable, "-m", "pytest", "-v", "--tb=short", *extra, *arguments)
    read: Read = readers.pytest_run
    return Stage(name=name, command=command, read=read, estimate_s=estimate_s, cap_s=cap_s)


def _script(name: str) -> tuple[str, str]:
    return sys.executable, f"benchmarks/{name}"


def _short(model: str) -> str:
    return model.rpartition("-")[2]
