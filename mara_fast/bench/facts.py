"""Where, when, with what and by which command figures were made."""

import platform
import shlex
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import mara_fast


def cpu_facts(threads: int, *packages: str) -> dict[str, Any]:
    """The head of a report of figures of this machine's CPU, in float32."""
    return facts(f"{_cpu_name()}, {threads} threads, float32", *packages)


def facts_of(device: torch.device, dtype: torch.dtype, *packages: str) -> dict[str, Any]:
    """The head of a report of figures of a device."""
    kind = str(dtype).removeprefix("torch.")
    if device.type == "cpu":
        return facts(f"{_cpu_name()}, {torch.get_num_threads()} threads, {kind}", *packages)
    name = torch.cuda.get_device_name(device)
    return facts(f"{name}, CUDA {torch.version.cuda}, {kind}", "triton", *packages)


def facts(hardware: str, *packages: str) -> dict[str, Any]:
    """The head of any report."""
    return {
        "command": shlex.join(_command()),
        "date": date.today().isoformat(),
        "hardware": hardware,
        "versions": {"mara-fast": mara_fast.__version__}
        | {name: version(name) for name in ("torch", *packages)},
        "commit": commit(),
    }


def _command() -> list[str]:
    """As it is typed; an installed command without the folder that it lies in."""
    program, *rest = sys.argv
    module = sys.modules["__main__"].__spec__
    if module is not None:
        return ["python", "-m", module.name.removesuffix(".__main__"), *rest]
    if not program.endswith(".py"):
        return [Path(program).name, *rest]
    return ["python", Path(program).name if Path(program).is_absolute() else program, *rest]


def commit() -> str:
    """What git calls the state of this code."""
    return output_of("git", "describe", "--always", "--dirty", "--exclude=*")


def output_of(*command: str) -> str:
    """First line that a command prints, run beside this file; ``unknown`` if it cannot."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().partition("\n")[0] or "unknown"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
