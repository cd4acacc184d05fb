"""Norms and rotations of a language model, in bf16, as Llama has them.

    floor      norm: states read and written, the weight read, 2 (2 N H + H) bytes; rotation: heads
               read and written, angles read, 2 N D (2 (Hq + Hkv) + 2) bytes
    baselines  the definition, which is how transformers computes it, and compiled; of the norm
               also torch's own, which rounds once less

Shapes: N rows, H hidden; Hq query heads, Hkv key heads, D head size.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernel_cases.case import (
    Build,
    Case,
    Cost,
    Version,
    add_compiled,
    normal,
    num_sets,
    worst_problem,
)
from mara_kernels.layers import NormRule, reference, rms_norm, rotate

_NORM: dict[str, Any] = {"eps": 1e-5, "rule": NormRule(adds_one=False, rounds_first=True)}
_HEADS = 32, 8, 128


def norm_case(
    device: torch.device, rotation_bytes: float, *, num_rows: int, hidden_size: int
) -> Case:
    """RMS norm of states."""
    generator = torch.Generator(device).manual_seed(0)
    cost = Cost(num_bytes=2.0 * (2 * num_rows + 1) * hidden_size)
    sets = [
        (normal(generator, num_rows, hidden_size), 1 + normal(generator, hidden_size, std=0.1))
        for _ in range(num_sets(cost.num_bytes, rotation_bytes))
    ]
    case = Case(
        operation="layers",
        name=f"norm N={num_rows} H={hidden_size}",
        cost=cost,
        has_floor_target=num_rows >= 4096,
        ours=Version(name="ours", run=partial(rms_norm, **_NORM), inputs=sets),
        baselines=[
            Version(name="torch", run=partial(reference.rms_norm, **_NORM), inputs=sets),
            Version(
                name="F.rms_norm",
                run=lambda x, weight: F.rms_norm(x, weight.shape, weight, _NORM["eps"]),
                inputs=sets,
            ),
        ],
        problem=partial(_problem, [reference.rms_norm(*(t.float() for t in sets[0]), **_NORM)]),
    )
    return add_compiled(case, device)


def rotation_case(device: torch.device, rotation_bytes: float, *, num_rows: int) -> Case:
    """Rotary embedding of one position of each sequence, as a decode step has them."""
    generator = torch.Generator(device).manual_seed(0)
    num_heads, num_kv_heads, head_size = _HEADS
    cost = Cost(num_bytes=2.0 * num_rows * head_size * (2 * (num_heads + num_kv_heads) + 2))

    def one_set() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        angle = normal(generator, num_rows, 1, head_size, std=3.0).float()
        query, key = (
            normal(generator, num_rows, 1, heads, head_size).transpose(1, 2)
            for heads in (num_heads, num_kv_heads)
        )
        return query, key, angle.cos().bfloat16(), angle.sin().bfloat16()

    sets = [one_set() for _ in range(num_sets(cost.num_bytes, rotation_bytes))]
    case = Case(
        operation="layers",
        name=f"rotation N={num_rows} {'/'.join(map(str, _HEADS))}",
        cost=cost,
        has_floor_target=num_rows >= 4096,
        ours=Version(name="ours", run=rotate, inputs=sets),
        baselines=[Version(name="torch", run=reference.rotate, inputs=sets)],
        problem=partial(_problem, list(reference.rotate(*(t.float() for t in sets[0])))),
    )
    return add_compiled(case, device)


def _problem(expected: list[Tensor], found: Tensor | tuple[Tensor, ...]) -> str:
    """Compares with the definition in float32; bf16 is within 0.01 of the largest element."""
    tensors = [found] if isinstance(found, Tensor) else list(found)
    errors = [
        (mine.float() - other).abs().max() / other.abs().max()
        for mine, other in zip(tensors, expected, strict=True)
    ]
    return worst_problem(torch.stack(errors).max(), 0.02, "of the largest element")


SUITE: list[Build] = [
    build
    for num_rows in (1, 64, 256, 4096)
    for build in (
        partial(norm_case, num_rows=num_rows, hidden_size=4096),
        partial(rotation_case, num_rows=num_rows),
        partial(norm_case, num_rows=num_rows, hidden_size=2048),
    )
]
