"""Where the stages will run: found out by a process of its own, which may break."""

import importlib.util
import json
import os
import shutil
import subprocess
from typing import Any

import torch

from mara_fast.bench import facts
from mara_kernels import dispatch

_LISTINGS = (("nvidia-smi", "-L"), ("rocminfo",))
"""Commands that succeed where there is a GPU, whatever torch says."""


def describe() -> dict[str, Any]:
    """The device, its name and architecture, what is installed; or what is wrong."""
    has_cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if has_cuda else torch.device("cpu")
    found: dict[str, Any] = {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if has_cuda else "CPU",
        "architecture": dispatch.architecture(device),
        "num_cores": os.cpu_count() or 1,
        "has": {
            name: importlib.util.find_spec(name) is not None for name in ("xdist", "pytest_timeout")
        },
        "sanitizer": shutil.which("compute-sanitizer"),
        "facts": facts.facts_of(
            device, torch.bfloat16 if has_cuda else torch.float32, "transformers"
        ),
    }
    if has_cuda:
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["driver"] = facts.output_of(*query)
        found["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    elif any(_succeeds(*command) for command in _LISTINGS):
        found["problem"] = (
            "this machine has a GPU but its torch cannot use it: torch "
            f"{torch.__version__} for CUDA {torch.version.cuda}"
        )
    return found


def _succeeds(*command: str) -> bool:
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    print(json.dumps(describe()))
