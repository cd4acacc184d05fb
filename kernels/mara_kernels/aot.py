"""Compiles every production configuration ahead of time and reads its resources from the binary.

    python -m mara_kernels.aot [--architecture sm_90] [--output aot.json]

No GPU is needed: the operations' own launch code runs on meta tensors, with a driver that knows a
target and launches nothing, so what is compiled is what would run, specialisations included.
Registers, stack and spills come from cuobjdump (NVIDIA) or the assembly's metadata (AMD),
instructions from the disassembly.
"""

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from mara_kernels.configs import ARCHITECTURES
from mara_kernels.production import CASES, Case

SHARED_BYTES = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
"""Shared memory of a program, by architecture."""

_INSTRUCTIONS = {
    # Matrix units: Ampere's, Hopper's, Blackwell's, and CDNA's.
    "matrix": r"\b(?:[HQI]MMA|HGMMA|UTCHMMA|UTCQMMA|v_mfma\w*)\b",
    # Copies to shared memory that do not wait: Ampere's, Hopper's.
    "async_copy": r"\b(?:LDGSTS|UBLKCP|UTMALDG|(?:buffer|global)_load_lds\w*)\b",
    # Loads of 16 bytes a thread.
    "wide_load": r"\bLDG\.E\.(?:\w+\.)*128|\b(?:global|buffer)_load_dwordx4",
    # Loads of 1 or 2 bytes a thread.
    "narrow_load": r"\bLDG\.E\.(?:\w+\.)*[US](?:8|16)|\b(?:global|buffer)_load_[us](?:byte|short)",
    "local": r"\b(?:LDL|STL|scratch_(?:load|store)\w*)\b",
    "barrier": r"\b(?:BAR\.SYNC|s_barrier)",
}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a compiled kernel takes."""

    architecture: str
    operation: str
    case: str
    """Shape and dtype it was launched for."""
    kernel: str
    num_warps: int
    num_stages: int
    registers: int
    """Per thread; on AMD vector registers, accumulation registers among them."""
    stack_bytes: int
    spills: int
    """Loads and stores of local memory in the code (NVIDIA), spilled registers (AMD)."""
    shared_bytes: int
    num_instructions: int
    instructions: dict[str, int]
    """Counts by kind; see ``_INSTRUCTIONS``."""

    @property
    def problems(self) -> list[str]:
        """Why it must not ship."""
        found = []
        if self.stack_bytes:
            found.append(f"{self.stack_bytes} bytes of stack")
        if self.spills:
            found.append(f"{self.spills} spills")
        limit = SHARED_BYTES[self.architecture]
        if self.shared_bytes > limit:
            found.append(f"{self.shared_bytes} bytes of shared memory, {limit} allowed")
        return found


def compile_cases(architecture: str, cases: list[Case]) -> list[Resources]:
    """Every kernel that the cases launch, compiled for an architecture; each once."""
    found: dict[tuple[str, ...], Resources] = {}
    with _compiling_for(architecture) as compiled:
        for case in cases:
            compiled.clear()
            case.call(architecture)
            for kernel in compiled:
                resources = _resources(architecture, case, kernel)
                key = (case.operation, kernel.name, kernel.hash)
                found.setdefault(key, resources)
    return list(found.values())


def _resources(architecture: str, case: Case, kernel: Any) -> Resources:
    if architecture.startswith("sm_"):
        text, usage = _read_cubin(kernel.asm["cubin"])
        instruction = r"^\s+/\*[0-9a-f]{4,}\*/"
    else:
        text, instruction = kernel.asm["amdgcn"], r"^\t[a-z]+_\w+"
        usage = {
            name: int(re.search(rf"\.{key}:\s*(\d+)", text)[1])  # type: ignore[index]
            for name, key in (
                ("registers", "vgpr_count"),
                ("stack_bytes", "private_segment_fixed_size"),
                ("spills", "vgpr_spill_count"),
            )
        }
    counts = {name: len(re.findall(pattern, text)) for name, pattern in _INSTRUCTIONS.items()}
    return Resources(
        architecture=architecture,
        operation=case.operation,
        case=case.name,
        kernel=kernel.name,
        num_warps=kernel.metadata.num_warps,
        num_stages=kernel.metadata.num_stages,
        shared_bytes=kernel.metadata.shared,
        num_instructions=len(re.findall(instruction, text, re.MULTILINE)),
        instructions=counts,
        **({"spills": counts["local"]} | usage),
    )


def _read_cubin(cubin: bytes) -> tuple[str, dict[str, int]]:
    """Disassembly, and registers and stack as the linker sees them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, text = (
            subprocess.run([*command, file.name], check=True, capture_output=True, text=True).stdout
            for command in (
                (knobs.nvidia.cuobjdump.path, "--dump-resource-usage"),
                (knobs.nvidia.nvdisasm.path, "--print-code"),
            )
        )
    return text, {
        name: int(re.search(rf"\b{key}:(\d+)", usage)[1])  # type: ignore[index]
        for name, key in (("registers", "REG"), ("stack_bytes", "STACK"))
    }


class _TargetOnly:
    """A Triton driver that knows what to compile for, and no device."""

    def __init__(self, architecture: str) -> None:
        from triton.backends.compiler import GPUTarget

        if architecture.startswith("sm_"):
            self.target = GPUTarget("cuda", int(architecture[3:]), 32)
        else:
            self.target = GPUTarget("hip", architecture, 64)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _compiling_for(architecture: str) -> Iterator[list[Any]]:
    """Launches compile for the architecture instead; yields the list of what they compiled."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    _check_compiling()
    compiled: list[Any] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        self.device_caches.clear()
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        compiled.append(kernel)
        return kernel

    previous = dict(vars(driver))
    driver.set_active(_TargetOnly(architecture))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = launch
        vars(driver).update(previous)


def _check_compiling() -> None:
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise RuntimeError("TRITON_INTERPRET is set: the kernels are interpreted, not compiled")


def compile_operation(architecture: str, operation: str, match: str = "") -> list[Resources]:
    """The production cases of one operation whose names match, for one architecture."""
    cases = [case for case in CASES[operation]() if re.search(match, case.name)]
    return compile_cases(architecture, cases)


def compile_all(
    architectures: tuple[str, ...] = ARCHITECTURES,
    operations: tuple[str, ...] | None = None,
    match: str = "",
    processes: int | None = None,
) -> list[Resources]:
    """Everything, in several processes."""
    wanted = [(a, o, match) for o in operations or tuple(CASES) for a in architectures]
    # spawn: a forked process would inherit torch's threads.
    with ProcessPoolExecutor(processes or os.cpu_count(), get_context("spawn")) as pool:
        results = pool.map(compile_operation, *zip(*wanted, strict=True))
        groups = tqdm(results, total=len(wanted), desc="operations", disable=None)
        return [resources for group in groups for resources in group]


def table(found: list[Resources]) -> str:
    """As text, a line per kernel."""
    width = max((len(resources.case) for resources in found), default=4)
    header = (
        f"{'arch':7} {'kernel':13} {'case':{width}} {'warps':>5} {'stages':>6} {'regs':>5} "
        f"{'stack':>5} {'spills':>6} {'shared':>7} {'instr':>6} {'matrix':>6} {'async':>5} "
        f"{'wide':>5}"
    )
    lines = [header]
    for r in found:
        count = r.instructions
        lines.append(
            f"{r.architecture:7} {r.kernel:13} {r.case:{width}} {r.num_warps:5} {r.num_stages:6} "
            f"{r.registers:5} {r.stack_bytes:5} {r.spills:6} {r.shared_bytes:7} "
            f"{r.num_instructions:6} {count['matrix']:6} {count['async_copy']:5} "
            f"{count['wide_load']:5}" + "".join(f"  <- {problem}" for problem in r.problems)
        )
    return "\n".join(lines)


def main() -> None:
    """The command."""
    import triton

    parser = argparse.ArgumentParser(
        prog="python -m mara_kernels.aot",
        description="Compile every production kernel ahead of time and list its resources.",
    )
    parser.add_argument("--architecture", choices=ARCHITECTURES, action="append")
    parser.add_argument("--operation", choices=tuple(CASES), action="append")
    parser.add_argument("--match", default="", metavar="REGEX", help="only cases of such names")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--processes", type=int, help="default: one per CPU core")
    arguments = parser.parse_args()
    _check_compiling()
    found = compile_all(
        tuple(arguments.architecture or ARCHITECTURES),
        tuple(arguments.operation or CASES),
        arguments.match,
        arguments.processes,
    )
    if not found:
        parser.error(f"--match {arguments.match!r} names no case of what is left")
    print(table(found))
    if arguments.output:
        record = {
            "command": shlex.join(["python", "-m", "mara_kernels.aot", *sys.argv[1:]]),
            "date": datetime.now(UTC).date().isoformat(),
            "triton": triton.__version__,
            "platform": platform.machine(),
        }
        lines = ",\n".join(f"  {json.dumps(asdict(resources))}" for resources in found)
        # A line per kernel: what changed is then what a diff shows.
        text = json.dumps(record, indent=1).removesuffix("\n}")
        text += f',\n "kernels": [\n{lines}\n ]\n}}\n'
        arguments.output.write_text(text, encoding="utf-8")
    broken = sum(bool(resources.problems) for resources in found)
    sys.exit(f"{broken} kernels must not ship" if broken else 0)


if __name__ == "__main__":
    main()
