"""Launch configurations of the kernels against their neighbours, on this GPU.

    python benchmarks/kernel_configs.py                                      # on a GPU: minutes
    python benchmarks/kernel_configs.py --operation score --rounds 1 --output configs.json
    python benchmarks/kernel_configs.py --compile sm_90                      # without a GPU

A climb from every entry of the tables in mara_kernels/configs.py:

    neighbours    one field halved or doubled, stages one less or more
    compiled      for this architecture, in processes side by side; what spills, needs a stack or
                  more shared memory than there is falls out
    timed         as in kernel_speed.py, on the smallest and largest sizes that the entry serves,
                  after the output was compared; its figure is the geometric mean over these of its
                  time by the shipped one's
    best          becomes the centre, for as many rounds as are asked for
    confirmed     best and shipped in turn: the least of many noisy figures is too good

The tables are not touched: what is said to be better is for a person to write there, and for
``python -m mara_kernels.aot`` to pass. With ``--compile`` the neighbours are compiled for an
architecture, which needs no GPU, and those that fall out are said; nothing is timed.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kernel_cases.case import Case
from kernel_cases.entries import OPERATIONS, Config, Entry, entries_of, neighbours, using
from kernel_report import Row
from kernel_speed import Timer, check_bodies, environment, reason_of, time_version

from mara_fast.options import check, is_int, is_number
from mara_kernels import dispatch
from mara_kernels.aot import compile_cases
from mara_kernels.configs import ARCHITECTURES

LEAST_GAIN = 0.03
"""What is faster by less is not better."""
DUELS = 5
_PATIENCE_S = 60.0
"""For a compilation that others wait for."""

Ready = Callable[[], str]
"""Waits for a compilation; returns what is wrong with it, empty if nothing."""
Submit = Callable[[Entry, Config], Ready]
"""Begins to compile."""
Measure = Callable[[Entry, Config], list[float]]
"""Microseconds of every case of an entry; raises whatever keeps it from running right."""


class Tried(NamedTuple):
    """What became of a configuration."""

    fault: str
    """Why it fell out; empty if it did not."""
    ratio: float | None = None
    """Its time by that of the shipped one; None: not timed."""


class Climb:
    """The search from one entry.

    Args:
        entry: where it begins.
        submit: begins to compile a configuration.
    """

    def __init__(self, entry: Entry, submit: Submit) -> None:
        self.entry, self.best, self.ratio, self.num_rounds = entry, entry.config, 1.0, 0
        self.tried: dict[Config, Tried] = {}
        self._submit = submit
        self._waiting: dict[Config, Ready] = {}
        self.propose()

    def propose(self) -> None:
        """Begins to compile the neighbours of the best that were not tried."""
        for config in neighbours(self.best):
            if config != self.entry.config and config not in self.tried:
                self._waiting[config] = self._submit(self.entry, config)

    def settle(self, measure: Measure | None) -> bool:
        """Times what was proposed; whether something better was found.

        Args:
            measure: None: nothing is timed.

        Raises:
            Exception: the shipped configuration cannot be measured.
        """
        self.num_rounds += 1
        shipped = measure(self.entry, self.entry.config) if measure else []
        before = self.ratio
        for config, ready in self._waiting.items():
            tried = Tried(ready())
            if measure and not tried.fault:
                try:
                    tried = Tried("", mean_ratio(measure(self.entry, config), shipped))
                # Whatever is wrong with one, there are others.
                except Exception as error:
                    tried = Tried(reason_of(error))
            self.tried[config] = tried
            if tried.ratio is not None and tried.ratio < self.ratio:
                self.best, self.ratio = config, tried.ratio
        self._waiting = {}
        return self.ratio < before - LEAST_GAIN

    def confirm(self, measure: Measure) -> None:
        """Measures the best and the shipped one in turn; the best stays if it is better."""
        if self.best == self.entry.config:
            return
        pairs = [
            [measure(self.entry, config) for config in (self.best, self.entry.config)]
            for _ in range(DUELS)
        ]
        best, shipped = (
            [statistics.median(times) for times in zip(*runs, strict=True)]
            for runs in zip(*pairs, strict=True)
        )
        self.ratio = mean_ratio(best, shipped)
        if self.ratio > 1 - LEAST_GAIN:
            self.best, self.ratio = self.entry.config, 1.0

    def row(self) -> Row:
        """For JSON."""
        return {
            "operation": self.entry.operation,
            "entry": self.entry.name,
            "shipped": self.entry.config._asdict(),
            "best": self.best._asdict(),
            "ratio": self.ratio,
            "rounds": self.num_rounds,
            "tried": [config._asdict() | one._asdict() for config, one in self.tried.items()],
        }

    def lines(self) -> list[str]:
        """For the table: what was tried, and what to write instead of the entry."""
        faulty = sum(bool(one.fault) for one in self.tried.values())
        line = f"{self.entry.name:36} {len(self.tried):4} tried, {faulty:3} fell out  "
        if any(one.ratio is not None for one in self.tried.values()):
            line += f"{self.ratio:.2f}"
        if self.best == self.entry.config:
            return [line.rstrip()]
        return [line, f"    {self.entry.config}", f" -> {self.best}"]


def mean_ratio(times: list[float], others: list[float]) -> float:
    """Geometric mean, over cases, of one's time by the other's."""
    return statistics.geometric_mean(a / b for a, b in zip(times, others, strict=True))


def search(
    entries: list[Entry],
    *,
    submit: Submit,
    measure: Measure | None,
    rounds: int,
    seconds: float,
    done: Callable[[Climb], None],
) -> tuple[list[str], list[str]]:
    """Climbs from every entry; returns what failed, and the entries that time did not suffice for.

    While one is timed, what the next ones propose is compiled.

    Args:
        entries: where to begin.
        submit: begins to compile a configuration.
        measure: times one; None: everything is compiled and nothing timed.
        rounds: at most, of an entry.
        seconds: after which no round is begun.
        done: is told of each climb that has come to its end.
    """
    ends = time.monotonic() + seconds
    climbs = [Climb(entry, submit) for entry in entries]
    problems, left_out = [], []
    while climbs:
        climb = climbs.pop(0)
        if time.monotonic() > ends:
            if not climb.num_rounds:
                left_out.append(climb.entry.name)
                continue
        else:
            try:
                is_better = climb.settle(measure)
            except Exception as error:
                problems.append(f"{climb.entry.name}: as it is: {reason_of(error)}")
                continue
            if is_better and climb.num_rounds < rounds:
                climb.propose()
                climbs.append(climb)
                continue
        try:
            if measure:
                climb.confirm(measure)
        except Exception as error:
            problems.append(f"{climb.entry.name}: confirming it: {reason_of(error)}")
            continue
        done(climb)
    return problems, left_out


# --- compiling and timing --------------------------------------------------------------------


def compile_config(architecture: str, operation: str, name: str, config: Config) -> str:
    """What is wrong with an entry's kernels in this configuration; empty if nothing."""
    entry = next(one for one in entries_of(architecture, operation) if one.name == name)
    try:
        with using(operation, config):
            found = compile_cases(architecture, list(entry.calls))
    # Compilers refuse in many ways.
    except Exception as error:
        return reason_of(error)
    faults = (f"{one.kernel}: {problem}" for one in found for problem in one.problems)
    return "; ".join(dict.fromkeys(faults))


def submit_to(pool: Any, architecture: str, entry: Entry, config: Config) -> Ready:
    """Begins to compile in a process of the pool."""
    arguments = architecture, entry.operation, entry.name, config
    job = pool.apply_async(compile_config, arguments)

    def ready() -> str:
        try:
            return job.get(_PATIENCE_S)
        except multiprocessing.TimeoutError:
            # Or its process is gone.
            return f"not compiled after {_PATIENCE_S:.0f} s"

    return ready


class Stopwatch:
    """Measures configurations; keeps the inputs of one entry.

    Args:
        device: a GPU.
        timer: as in kernel_speed.py.
    """

    def __init__(self, device: torch.device, timer: Timer) -> None:
        self.device, self.timer = device, timer
        self._name, self._cases = "", list[Case]()

    def __call__(self, entry: Entry, config: Config) -> list[float]:
        """Microseconds of every case.

        Raises:
            ValueError: an output is wrong.
        """
        if entry.name != self._name:
            # Before the next ones are made: they may not fit beside these.
            self._name, self._cases = "", []
            rotation_bytes = 3.0 * torch.cuda.get_device_properties(self.device).L2_cache_size
            self._cases = [build(self.device, rotation_bytes) for build in entry.builds]
            self._name = entry.name
        with using(entry.operation, config):
            for case in self._cases:
                problem = case.problem(case.ours.output())
                if problem:
                    raise ValueError(f"{case.name}: {problem}")
            return [self.timer(case.ours).p50 for case in self._cases]


# --- the command -----------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--operation", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--rounds", type=int, default=3, help="of a climb, at most")
    parser.add_argument("--seconds", type=float, default=240, help="after which none is begun")
    parser.add_argument("--budget-ms", type=float, default=10.0, help="GPU time per measurement")
    parser.add_argument("--compile", choices=ARCHITECTURES, help="compile for it, time nothing")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile")
    parser.add_argument("--commit", help="default: what git says; for copies without .git")
    options = parser.parse_args(arguments)
    try:
        for name in ("rounds", "processes"):
            check(f"--{name}", getattr(options, name), is_int, "an integer >= 1", minimum=1)
        for name in ("seconds", "budget_ms"):
            option = f"--{name.replace('_', '-')}"
            check(option, getattr(options, name), is_number, "a number above 0", above=0)
    except ValueError as error:
        parser.error(str(error))
    if options.output is not None:
        # Found before the run, not after its first entry.
        try:
            options.output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--output={options.output}: {error}")
        if options.output.is_dir():
            parser.error(f"--output={options.output} is a folder, expected a file")
    options.operation = list(dict.fromkeys(options.operation))
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: interpreted kernels are neither compiled nor timed")
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = parse(arguments)
    if options.compile:
        return run(options, options.compile, {}, None)
    if not torch.cuda.is_available():
        print("kernel_configs: there is no GPU here; --compile sm_90 compiles for one")
        return 0
    device = torch.device("cuda", torch.cuda.current_device())
    obstacle = check_bodies(options.operation, device)
    if obstacle:
        print(f"kernel_configs: {obstacle}")
        return 1
    timer = partial(time_version, budget_ms=options.budget_ms)
    # Graphs are captured on another stream than the default one: all of it runs there.
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        head = environment(device, options.commit)
        return run(options, dispatch.architecture(device), head, Stopwatch(device, timer))


def run(options: argparse.Namespace, architecture: str, head: Row, measure: Measure | None) -> int:
    """Searches, prints and saves; returns the command's exit status."""
    started = time.perf_counter()
    report = head | {"architecture": architecture, "rows": []}

    def save() -> None:
        report["seconds"] = time.perf_counter() - started
        if options.output is not None:
            options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    def done(climb: Climb) -> None:
        report["rows"].append(climb.row())
        print("\n".join(climb.lines()), flush=True)
        save()

    entries = [one for name in options.operation for one in entries_of(architecture, name)]
    # spawn: a forked process would inherit torch's threads.
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        report["problems"], report["left_out"] = search(
            entries,
            submit=partial(submit_to, pool, architecture),
            measure=measure,
            rounds=options.rounds,
            seconds=options.seconds,
            done=done,
        )
    save()
    left_out = [f"{name}: there was no time for it" for name in report["left_out"]]
    print("\n".join([*report["problems"], *left_out, f"{report['seconds']:.0f} s"]))
    return int(bool(report["problems"]))


if __name__ == "__main__":
    sys.exit(main())
