"""A training step where it will run, against the same on a CPU, and how many make a second.

On a GPU the step is replayed from a graph after the first few. Both learners begin alike and see
the same batches, in float32.
"""

import time

import torch

from benchmarks.gpu.finding import Figure, Finding
from benchmarks.gpu.options import Options
from mara_fast import MaraAgent
from mara_fast.bench.measure import synchronise
from mara_train.sac import METRICS, Batch, Sac, SacConfig

ALLOWED = 1e-2
"""Difference of a metric, of its size or of 1. float32 sums of 4096 terms differ in the sixth
digit; Adam's first steps divide by the sizes of gradients and carry that on."""


def run(options: Options) -> Finding:
    """Steps both learners, compares what they report, and times the one on the device."""
    hidden, inner, size = (64, 32, 32) if options.small else (4096, 1024, 1024)
    num_steps = 4 if options.small else 8
    config = SacConfig(target_interval=2)

    def learner(device: torch.device | str) -> Sac:
        torch.manual_seed(0)
        return Sac(MaraAgent(hidden, inner), config, device=device)

    def batch(seed: int, device: torch.device) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        states, next_states = torch.randn(2, size, hidden, generator=generator)
        return Batch(
            states=states.to(device),
            actions=torch.randint(2, (size,), generator=generator).to(device),
            rewards=torch.randn(size, generator=generator).to(device),
            next_states=next_states.to(device),
            done=(torch.rand(size, generator=generator) < 0.1).to(device),
        )

    finding = Finding()
    here, there = learner(options.device), learner("cpu")
    for step in range(num_steps):
        found = here.update(batch(step, options.device)).cpu()
        expected = there.update(batch(step, torch.device("cpu")))
        off = (found - expected).abs() / expected.abs().clamp(min=1.0)
        for name, value in zip(METRICS, off.tolist(), strict=True):
            # NaN is off, too.
            if not value <= ALLOWED:
                finding.problems.append(f"step {step}: {name} is {value:.2g} off")
    if options.device.type == "cuda" and here._graph is None:
        finding.problems.append("the step was not captured")

    one = batch(0, options.device)
    num_timed = 2 if options.small else 100
    synchronise(options.device)
    started = time.perf_counter()
    for _ in range(num_timed):
        here.update(one)
    synchronise(options.device)
    rate = num_timed / (time.perf_counter() - started)
    finding.figures[f"SAC updates, {size} of H={hidden}, drawn already"] = Figure(rate, "/s", 0.05)
    return finding
