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
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from mara_kernels.configs import ARCHITECTURES

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


@dataclass(frozen=True)
class Case:
    """A call of an operation's Triton body that production makes."""

    operation: str
    name: str
    call: Callable[[str], object]
    """Takes the architecture; its tensors are on the meta device."""


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

    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise RuntimeError("TRITON_INTERPRET is set: the kernels are interpreted, not compiled")
    compiled: list[Any] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        self.device_caches.clear()
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        compiled.append(kernel)
        return kernel

    previous = driver._active
    driver.set_active(_TargetOnly(architecture))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = launch
        driver._active = previous


def _meta(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*size, dtype=dtype, device="meta")


_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def truncate_cases() -> list[Case]:
    """Vocabularies of all sizes, one that is no multiple of anything, and the larger capacities."""
    from mara_kernels.truncate.kernel import MAX_CAPACITY, truncate_triton

    def case(num_rows: int, vocab_size: int, dtype: torch.dtype, capacity: int) -> Case:
        return Case(
            "truncate",
            f"B={num_rows} V={vocab_size} C={capacity} {_SHORT[dtype]}",
            lambda architecture: truncate_triton(
                _meta(num_rows, vocab_size, dtype=dtype),
                top_k=40,
                top_p=0.95,
                temperature=1.0,
                capacity=capacity,
                architecture=architecture,
            ),
        )

    return [
        case(num_rows, vocab_size, dtype, capacity)
        for num_rows, vocab_size, dtype, capacity in (
            (64, 32000, torch.bfloat16, 64),
            (64, 32000, torch.float16, 64),
            (64, 128256, torch.bfloat16, 64),
            (64, 128256, torch.float32, 64),
            (64, 262144, torch.bfloat16, 64),
            (64, 262144, torch.float32, 64),
            (64, 50257, torch.bfloat16, 64),
            (1, 50257, torch.bfloat16, 64),
            (64, 128256, torch.bfloat16, MAX_CAPACITY),
            (64, 262144, torch.float32, MAX_CAPACITY),
            (64, 128256, torch.float16, MAX_CAPACITY),
        )
    ]


def cascade_cases() -> list[Case]:
    """The defaults, and each choice departing from them; narrow and wide windows."""
    from mara_kernels.cascade.kernel import cascade_triton
    from mara_kernels.cascade.reference import CascadeRule, Held

    def case(window: int, rule: CascadeRule) -> Case:
        slots = _meta(64, dtype=torch.int64)
        flags = _meta(64, dtype=torch.bool)
        name = f"{rule.acceptance} {rule.strategy}/{rule.fallback} {rule.order}"
        return Case(
            "cascade",
            f"W={window} {name}",
            lambda _: cascade_triton(
                _meta(64, window),
                offset=slots,
                size=slots,
                held=Held(flags, _meta(64), _meta(64)),
                rule=rule,
                sequence=slots,
                position=slots,
            ),
        )

    rules = [
        CascadeRule(),
        CascadeRule(fallback="first"),
        CascadeRule(order="top_last"),
        CascadeRule(strategy="max_prob", fallback="max_prob"),
        CascadeRule(strategy="random"),
        CascadeRule(acceptance="sample"),
        CascadeRule(acceptance="sample", order="reverse"),
        CascadeRule(acceptance="sample", strategy="random", order="top_last"),
    ]
    return [case(window, rule) for rule in rules for window in (1, 8, 40)] + [case(512, rules[-1])]


def score_cases() -> list[Case]:
    """Every configuration, for hidden sizes of small and large models and one of no good width."""
    from mara_kernels.score.fold import FoldedParameters
    from mara_kernels.score.kernel import score_triton

    def case(num_states: int, hidden_size: int, dtype: torch.dtype, inner_size: int) -> Case:
        outer_size = inner_size // 4
        parameters = FoldedParameters(
            weight1=_meta(inner_size, -(-hidden_size // 16) * 16, dtype=dtype),
            column_sums=_meta(inner_size),
            bias1=_meta(inner_size),
            weight2=_meta(outer_size, inner_size, dtype=dtype),
            bias2=_meta(outer_size),
            weight3=_meta(outer_size),
            bias3=_meta(1),
        )
        return Case(
            "score",
            f"N={num_states} H={hidden_size} {_SHORT[dtype]}",
            lambda architecture: score_triton(
                _meta(num_states, hidden_size, dtype=dtype),
                parameters,
                norm_eps=1e-5,
                architecture=architecture,
            ),
        )

    sizes = (1, 16, 32, 64, 256, 512, 2048, 4096)
    return [
        *(case(n, 4096, torch.bfloat16, 1024) for n in sizes),
        *(case(n, 2048, torch.float16, 1024) for n in sizes),
        *(case(n, 8192, torch.bfloat16, 1024) for n in sizes),
        *(case(n, 2048, torch.float32, 1024) for n in (8, 512, 4096)),
        *(case(n, 2885, torch.bfloat16, 1024) for n in (8, 4096)),
    ]


def attention_cases() -> list[Case]:
    """Every configuration of every head size; windows, chunks and trees; windows and soft-caps."""
    from mara_kernels.attention.kernel import attention_triton
    from mara_kernels.attention.rows import NewRows, Tree

    def case(
        shape: tuple[int, int, int],
        kind: str,
        num_rows: int,
        dtype: torch.dtype = torch.bfloat16,
        window: int | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        num_splits: int = 4,
    ) -> Case:
        num_heads, num_kv_heads, head_size = shape
        tree = Tree(
            kind=kind,  # type: ignore[arg-type]
            ancestors=_meta(num_rows, num_rows, dtype=torch.bool),
            depths=_meta(num_rows, dtype=torch.int64),
            bits=_meta(num_rows, dtype=torch.int64),
        )
        rows = NewRows(lengths=_meta(8, dtype=torch.int64), tree=tree, base=4096)
        buffer = _meta(8, num_kv_heads, 4096 + 512, head_size, dtype=dtype)
        query = _meta(8, num_rows, num_heads, head_size, dtype=dtype).transpose(1, 2)
        extras = "".join((" window" * bool(window), " softcap" * bool(softcap), " sinks" * sinks))
        heads = "/".join(map(str, shape))
        return Case(
            "attention",
            f"{heads} {kind} W={num_rows} {_SHORT[dtype]}{extras}",
            lambda architecture: attention_triton(
                query,
                buffer,
                buffer,
                rows,
                scale=0.1,
                sliding_window=window,
                softcap=softcap,
                sinks=_meta(num_heads, dtype=dtype) if sinks else None,
                architecture=architecture,
                num_processors=132,
                num_splits=num_splits,
            ),
        )

    large, small = (32, 8, 128), (14, 2, 64)
    return [
        *(
            case(shape, "siblings", num_rows, num_splits=num_splits)
            for shape in (large, small, (32, 32, 80), (32, 32, 96), (16, 8, 256))
            for num_rows, num_splits in ((1, 1), (8, 4), (40, 4))
        ),
        *(
            case(shape, "chain", 512, num_splits=1)
            for shape in (large, small, (32, 32, 80), (32, 32, 96), (16, 8, 256))
        ),
        case(large, "tree", 40),
        case(small, "tree", 16),
        case((16, 8, 256), "tree", 16),
        case((16, 8, 256), "siblings", 8, window=4096, softcap=50.0),
        case((16, 8, 256), "chain", 512, window=4096, softcap=50.0, num_splits=1),
        case((64, 8, 64), "siblings", 8, window=128, sinks=True),
        case((64, 8, 64), "siblings", 8, window=128, sinks=True, num_splits=1),
        case(large, "siblings", 8, torch.float16),
        case(large, "siblings", 8, torch.float32),
        case(small, "siblings", 8, torch.float32),
        case(large, "chain", 512, torch.float32, num_splits=1),
    ]


CASES: dict[str, Callable[[], list[Case]]] = {
    "truncate": truncate_cases,
    "cascade": cascade_cases,
    "score": score_cases,
    "attention": attention_cases,
}


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
        return [resources for group in results for resources in group]


def table(found: list[Resources]) -> str:
    """As text, a line per kernel."""
    header = (
        f"{'arch':7} {'kernel':16} {'case':34} {'warps':>5} {'stages':>6} {'regs':>5} {'stack':>5} "
        f"{'spills':>6} {'shared':>7} {'instr':>6} {'matrix':>6} {'async':>5} {'wide':>5}"
    )
    lines = [header]
    for r in found:
        count = r.instructions
        lines.append(
            f"{r.architecture:7} {r.kernel:16} {r.case:34} {r.num_warps:5} {r.num_stages:6} "
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
    found = compile_all(
        tuple(arguments.architecture or ARCHITECTURES),
        tuple(arguments.operation or CASES),
        arguments.match,
        arguments.processes,
    )
    print(table(found))
    if arguments.output:
        record = {
            "command": "python -m mara_kernels.aot",
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
