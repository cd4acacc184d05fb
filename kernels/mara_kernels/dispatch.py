"""Which body of an operation runs, and why.

    CUDA or HIP tensor                     Triton
    CPU tensor                             the torch definition
    CPU tensor with TRITON_INTERPRET=1     Triton, interpreted: for tests, not in bfloat16
    MARA_KERNELS=torch                     the torch definition, everywhere
    MARA_KERNELS=attention=flash,score=torch    as named, the rest as above

An operation that its Triton body does not cover (a dtype, a size) also runs as its definition; each
operation's own page says which.
"""

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from mara_kernels import interpreter

VARIABLE = "MARA_KERNELS"
OPERATIONS = ("truncate", "score", "cascade", "attention", "bookkeeping", "layers")
BODIES = ("auto", "torch", "triton", "flash")

OLDEST_CUDA = 8
"""Major compute capability from which the Triton bodies run: asynchronous copies, bfloat16."""


class Body(NamedTuple):
    """What runs."""

    name: str
    """``torch``, ``triton`` or ``flash``."""
    reason: str
    """Why, for people."""


@torch.compiler.assume_constant_result
def choose(operation: str, device: torch.device) -> Body:
    """The body of an operation on a device.

    Raises:
        ValueError: :data:`VARIABLE` names an unknown operation or body, or one that cannot run
            here.
    """
    setting = os.environ.get(VARIABLE, "")
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
    return _choose(operation, device, setting, interpreted)


def check(device: torch.device | None = None) -> None:
    """Raises what :func:`choose` would; without a device only what is wrong on any."""
    parse_setting(os.environ.get(VARIABLE, ""))
    if device is not None:
        for operation in OPERATIONS:
            choose(operation, device)


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Where Triton launches on the tensor's GPU: it takes the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def is_capturing(device: torch.device) -> bool:
    """Whether work on the device is being captured into a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def can_multiply(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a Triton body can multiply in a dtype: the interpreter multiplies the bits of
    bfloat16 numbers."""
    return device.type != "cpu" or dtype != torch.bfloat16


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd is to go through an operation on these: most Triton bodies have none."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@functools.cache
def _choose(operation: str, device: torch.device, setting: str, interpreted: bool) -> Body:
    wanted = parse_setting(setting).get(operation, "auto")
    if wanted == "torch":
        return Body("torch", f"{VARIABLE}={setting}")
    obstacle = _obstacle(device, interpreted)
    if wanted == "auto":
        if obstacle:
            return Body("torch", obstacle)
        if device.type != "cpu":
            return Body("triton", architecture(device))
        interpreter.prepare()
        return Body("triton", "interpreted")
    if obstacle:
        raise ValueError(
            f"{VARIABLE}={setting} asks for the {wanted} body of {operation} on {device}: "
            f"{obstacle}. Allowed there: auto, torch"
        )
    if wanted == "flash" and importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            f"{VARIABLE}={setting} asks for flash-attn, which is not installed: "
            "pip install 'mara-fast[flash]'"
        )
    if device.type == "cpu":
        interpreter.prepare()
    return Body(wanted, f"{VARIABLE}={setting}")


def parse_setting(setting: str) -> dict[str, str]:
    """``"torch"`` or ``"attention=flash,score=torch"`` as body by operation.

    Raises:
        ValueError: an unknown operation or body.
    """
    bodies: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in setting.split(","))):
        operation, given, body = item.rpartition("=")
        named = (operation,) if given else OPERATIONS
        known = all(name in OPERATIONS for name in named) and body in BODIES
        if not known or (body == "flash" and named != ("attention",)):
            raise ValueError(
                f"{VARIABLE}={setting!r} is not understood at {item!r}; allowed: a body "
                f"({', '.join(BODIES[:-1])}) or operation=body, comma-separated, with the "
                f"operations {', '.join(OPERATIONS)}, and attention=flash"
            )
        bodies |= dict.fromkeys(named, body)
    return bodies


def _obstacle(device: torch.device, interpreted: bool) -> str:
    """Why the Triton bodies cannot run on a device; empty if they can."""
    if device.type not in ("cuda", "cpu", "meta"):
        return f"the Triton bodies run on CUDA and HIP, not on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        return "" if interpreted else "a CPU runs the torch definitions"
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < OLDEST_CUDA:
            return f"sm_{major}{minor} is older than sm_{OLDEST_CUDA}0"
    return ""


_TABLES_BY_MAJOR = {9: "sm_90", 10: "sm_100"}


@functools.cache
def architecture(device: torch.device) -> str:
    """The architecture whose tables a device uses: sm_80, sm_90, sm_100 or gfx942.

    Ada and consumer Blackwell (sm_89, sm_120) use those of sm_80, whose configurations fit their
    99 KB of shared memory. The interpreter uses those of sm_90.
    """
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    return _TABLES_BY_MAJOR.get(torch.cuda.get_device_capability(device)[0], "sm_80")


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors to fill; the interpreter pretends to have a few."""
    if device.type != "cuda":
        return 132 if device.type == "meta" else 4
    return torch.cuda.get_device_properties(device).multi_processor_count
