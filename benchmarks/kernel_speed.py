"""Speed of our kernels on this GPU, against torch and against what the hardware allows.

    python benchmarks/kernel_speed.py                            # everything, about 8 minutes
    python benchmarks/kernel_speed.py --operation attention --quick --output attention.json

What is measured, against which baselines, and the bytes and operations of each case:
kernel_cases/. The ceilings are measured first, in the same run:

    floor      max(bytes / bandwidth, operations / rate)
    bandwidth  of a copy of 2 GiB on the device, bytes read + bytes written; reading alone can be a
               little faster, so that a few percent below the floor are possible
    rate       of an 8192 x 8192 x 8192 bf16 matrix product of random numbers

Timing: calls are captured into a CUDA graph after a warm-up, and its replays are timed back to back
with events. A sample is a replay's time divided by its calls, a figure the median of the samples,
with their 20th and 80th percentile. Calls rotate among input sets of three times the L2 in total,
so that none finds its inputs there. Every version of a case is timed this way, one after the other;
where a capture fails plain launches are timed, and the row says so.

Before a version is timed its output is compared. One that is wrong is reported as WRONG, has no
figures and makes the command exit with 1, as does a failure of ours; a baseline that cannot run is
left out, with the reason.

Targets: at most 1.5 times the floor where truncate has B >= 64, score N >= 1024, attention
B S >= 32768, layers N >= 4096; and faster than every baseline at each size.
"""

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from kernel_cases import SUITES, Build, Case, Version
from kernel_report import Row, header, is_faulty, line_of, remarks_on, summary, targets

from mara_fast.bench import facts
from mara_kernels import dispatch

GRAPH_MS, MOST_ROUNDS = 1.0, 64
"""Time that a graph of calls should take at least, and rounds through the inputs it may hold."""
FEWEST_REPLAYS, MOST_REPLAYS = 7, 50
QUICK_STEP = 5
"""Of every so many cases ``--quick`` takes one: a step that meets all sizes of every axis."""


class Timing(NamedTuple):
    """Microseconds per call."""

    p20: float
    p50: float
    p80: float
    by: str
    """``graph`` or ``launches``: what was timed."""


Timer = Callable[[Version], Timing]


class Ceilings(NamedTuple):
    """What this GPU does at best."""

    bytes_per_s: float
    flops_per_s: float


def capture(calls: Callable[[], None]) -> Callable[[], None]:
    """The calls as a CUDA graph, on the current stream; returns its replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        calls()
    return graph.replay


def elapsed_ms(call: Callable[[], None], repeats: int = 1) -> list[float]:
    """Milliseconds of each of several calls in a row; the host does not wait between them."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(marks)]


def time_version(version: Version, *, budget_ms: float) -> Timing:
    """Microseconds of a call, its inputs rotating; see the top of the file."""

    def one_round() -> None:
        for inputs in version.inputs:
            version.run(*inputs)

    one_round()
    round_ms = max(elapsed_ms(one_round)[0], 1e-3)
    rounds = min(MOST_ROUNDS, math.ceil(GRAPH_MS / round_ms))

    def all_rounds() -> None:
        for _ in range(rounds):
            one_round()

    try:
        replay, by = capture(all_rounds), "graph"
    except RuntimeError:
        replay, by = all_rounds, "launches"
    replay()
    replay_ms = max(elapsed_ms(replay)[0], 1e-3)
    repeats = min(MOST_REPLAYS, max(FEWEST_REPLAYS, math.ceil(budget_ms / replay_ms)))
    num_calls = rounds * len(version.inputs)
    # The queue is not empty when the first sample begins: it holds no launch latency.
    replay()
    samples = [1e3 * ms / num_calls for ms in elapsed_ms(replay, repeats)]
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(p20, statistics.median(samples), p80, by)


def measure_ceilings(device: torch.device, timer: Timer) -> Ceilings:
    """Bandwidth and rate, see the top of the file."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.bfloat16, device=device)

    source = random(1 << 30)
    target = torch.empty_like(source)
    copy = Version(name="copy", run=lambda a, b: b.copy_(a), inputs=[(source, target)])
    bytes_per_s = 2 * source.nbytes / (1e-6 * timer(copy).p50)
    factors = random(8192, 8192), random(8192, 8192)
    product = Version(name="product", run=torch.mm, inputs=[factors])
    return Ceilings(bytes_per_s, 2 * 8192**3 / (1e-6 * timer(product).p50))


def measure_case(case: Case, ceilings: Ceilings, timer: Timer) -> Row:
    """One row of the results: our figures, the floor, every baseline, and the targets met."""
    row: Row = {"operation": case.operation, "case": case.name, "unit": "us"}
    if case.cost is not None:
        row["bytes"], row["flops"] = case.cost.num_bytes, case.cost.num_flops
        row["floor"] = case.cost.floor_us(**ceilings._asdict())
    problem = case.problem(case.ours.output())
    if problem:
        return row | {"wrong": problem}
    ours = timer(case.ours)
    row["ours"] = ours._asdict()
    if case.cost is not None:
        row["times_floor"] = ours.p50 / row["floor"]
    row["baselines"] = {name: {"skipped": reason} for name, reason in case.skipped.items()}
    for version in case.baselines:
        row["baselines"][version.name] = measure_baseline(case, version, ours, timer)
    return row | {"targets": targets(case, row)}


def measure_baseline(case: Case, version: Version, ours: Timing, timer: Timer) -> Row:
    """A baseline's figures and our speed-up over it, or what was wrong."""
    try:
        problem = case.problem(version.output())
        if problem:
            return {"wrong": problem}
        timing = timer(version)
    # Whatever keeps a compiler or another library's kernel from running is no fault of ours.
    except Exception as error:
        return {"skipped": reason_of(error)}
    return timing._asdict() | {"speed_up": timing.p50 / ours.p50}


def reason_of(error: Exception) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:150] if lines else ''}"


def attempt(
    build: Build,
    device: torch.device,
    rotation_bytes: float,
    ceilings: Ceilings,
    timer: Timer,
) -> Row:
    """A case built and measured, or the row of its failure: the others should still be measured."""
    case = None
    try:
        case = build(device, rotation_bytes)
        return measure_case(case, ceilings, timer)
    except Exception as error:
        # A partial with the sizes as its keywords.
        name = case.name if case else str(getattr(build, "keywords", build))
        return {"case": name, "unit": "us", "failed": reason_of(error)}


# --- the command -----------------------------------------------------------------------------


def environment(device: torch.device, commit: str | None) -> Row:
    """Where, with what and by which command the figures were made."""
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        "command": "python " + " ".join(sys.argv),
        "date": date.today().isoformat(),
        "commit": commit or facts.commit(),
        "hardware": f"{properties.name}, {properties.multi_processor_count} multiprocessors, "
        f"{properties.total_memory / 1e9:.0f} GB, L2 {properties.L2_cache_size / 1e6:.0f} MB",
        "versions": {
            "driver": facts.output_of(
                "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
            ),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "transformers": transformers.__version__,
        },
    }


def check_bodies(operations: list[str], device: torch.device) -> str:
    """Why our side would not be the compiled kernels; empty if it would."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        return "TRITON_INTERPRET is set: interpreted kernels are not timed"
    for operation in operations:
        body = dispatch.choose(operation, device)
        if body.name != "triton":
            return f"{operation} would run as {body.name} ({body.reason}): nothing of ours to time"
    return ""


def measure_all(
    operations: list[str],
    *,
    quick: bool,
    report: Row,
    save: Callable[[], None],
    attempt_case: Callable[[Build], Row],
) -> None:
    """Appends a row per case to the report and prints it; saves after each, whatever comes next."""
    for operation in operations:
        print(f"\n{operation}\n{header()}")
        said: set[str] = set()
        for build in SUITES[operation][:: QUICK_STEP if quick else 1]:
            row = {"operation": operation} | attempt_case(build)
            report["rows"].append(row)
            # The same reason holds for many cases in a row.
            new = [remark for remark in remarks_on(row) if remark not in said]
            said.update(new)
            print("\n".join((line_of(row), *new)), flush=True)
            save()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--operation", nargs="+", choices=tuple(SUITES), default=list(SUITES), help="default: all"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"one case of {QUICK_STEP}, all operations and sizes"
    )
    parser.add_argument("--output", type=Path, help="JSON file; default: the last line printed")
    parser.add_argument("--budget-ms", type=float, default=30.0, help="GPU time per measurement")
    parser.add_argument("--commit", help="default: what git says; for copies without .git")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("kernel_speed: there is no GPU here; nothing is measured")
        return 0
    device = torch.device("cuda", torch.cuda.current_device())
    obstacle = check_bodies(options.operation, device)
    if obstacle:
        print(f"kernel_speed: {obstacle}")
        return 1
    # Graphs are captured on another stream than the default one: all of it runs there.
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        report = run(options, device)
    return int(any(map(is_faulty, report["rows"])))


def run(options: argparse.Namespace, device: torch.device) -> Row:
    """Measures, prints and saves."""
    started = time.perf_counter()

    def time_one(version: Version) -> Timing:
        return time_version(version, budget_ms=options.budget_ms)

    report = environment(device, options.commit)
    print(json.dumps(report, indent=1), flush=True)
    ceilings = measure_ceilings(device, time_one)
    report |= {"ceilings": ceilings._asdict(), "rows": []}
    print(
        f"copy {ceilings.bytes_per_s / 1e12:.2f} TB/s, "
        f"bf16 matrix product {ceilings.flops_per_s / 1e12:.0f} TFLOP/s"
    )

    def save() -> None:
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    rotation_bytes = 3.0 * torch.cuda.get_device_properties(device).L2_cache_size
    measure_all(
        options.operation,
        quick=options.quick,
        report=report,
        save=save,
        attempt_case=lambda build: attempt(build, device, rotation_bytes, ceilings, time_one),
    )
    report["summary"] = summary(report["rows"])
    report["seconds"] = time.perf_counter() - started
    save()
    print("\n" + "\n".join(report["summary"]))
    print(f"{report['seconds']:.0f} s" + (f", {options.output}" if options.output else ""))
    if options.output is None:
        print(json.dumps(report))
    return report


if __name__ == "__main__":
    sys.exit(main())
