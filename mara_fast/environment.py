"""What this installation runs on."""

import importlib.metadata
import platform
import sys

import torch

from mara_fast import __version__
from mara_kernels import dispatch

_PACKAGES = ("transformers", "triton", "flash-attn", "numpy", "safetensors", "huggingface_hub")


def environment() -> dict[str, str]:
    """Versions, devices and the body each kernel uses, as texts by name."""
    found = {
        "mara-fast": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} CPU threads",
    }
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found[f"cuda:{index}"] = (
                f"{properties.name}, sm_{properties.major}{properties.minor}, "
                f"{properties.total_memory / 2**30:.0f} GiB"
            )
    else:
        found["cuda"] = "no device"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for operation in dispatch.OPERATIONS:
        try:
            body = dispatch.choose(operation, device)
            found[operation] = f"{body.name} ({body.reason})"
        # Whoever asks may be looking for just this.
        except ValueError as error:
            found[operation] = f"refused: {error}"
    return found
