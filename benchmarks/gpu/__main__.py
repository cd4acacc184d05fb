"""Checks and times everything on this machine's GPU, and compares with the last run.

    python -m benchmarks.gpu                                  # everything that eight minutes allow
    python -m benchmarks.gpu --stages "steps 8b" captured     # some of it
    python -m benchmarks.gpu --list

Run from the repository. Every stage is a process of its own; whatever becomes of one, the others
run, and the files are written anew after each: ``gpu_<device>.json``, ``.txt`` (the table) and
``.log`` (all that the stages printed). What the last report has of stages that do not run stays in
the JSON: a short lease can be spent on some of them, the next on others.

Without a GPU the same stages are rehearsed on the CPU: the kernels interpreted and compiled ahead
of time, everything else with small sizes; its figures say nothing.

Exits with 1 if a stage failed. What there was no time for is said, and is no failure.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import report
from benchmarks.gpu.finding import write_json
from benchmarks.gpu.plan import num_jobs, stages_for
from benchmarks.gpu.runner import Runner
from benchmarks.gpu.stage import Outcome, Stage
from mara_fast.options import check, is_int, is_number

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = "benchmarks/results"
RESULTS = ROOT / DEFAULT
_NOT_INHERITED = ("TRITON_INTERPRET", "MARA_KERNELS")
"""What would change which bodies run."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    description = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=description)
    parser.add_argument("--budget", type=float, default=480, help="seconds for all stages")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--list", action="store_true", help="name the stages and leave")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the report")
    parser.add_argument(
        "--last", type=Path, help=f"folder of the last report; default: --output, else {DEFAULT}"
    )
    parser.add_argument("--workers", type=int, help="processes of pytest")
    parser.add_argument("--commit", help="default: what git says; for copies without .git")
    options = parser.parse_args(arguments)
    try:
        check("--budget", options.budget, is_number, "seconds above 0", above=0)
        if options.workers is not None:
            check("--workers", options.workers, is_int, "an integer >= 1", minimum=1)
    except ValueError as error:
        parser.error(str(error))
    # Said now, not when the first stage is done and its results have no place.
    taken = next(one for one in (options.output, *options.output.parents) if one.exists())
    if not taken.is_dir():
        parser.error(f"argument --output: {taken} is a file, expected a folder")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    started = time.monotonic()
    options = parse(arguments)
    signal.signal(signal.SIGTERM, leave)
    with tempfile.TemporaryDirectory(prefix="mara-gpu-") as folder:
        environment = environment_for(Path(folder))
        machine = look(environment)
        if "problem" in machine:
            print(f"make gpu: {machine['problem']}")
            return 1
        if options.commit is not None:
            machine["facts"]["commit"] = options.commit
        stages = chosen(stages_for(machine, workers=options.workers), options.stages)
        if options.list:
            for stage in stages:
                print(
                    f"{stage.name:20} about {stage.estimate_s:.0f} s, at most {stage.cap_s:.0f} s"
                )
            return 0
        if machine["device"] == "cpu":
            print("make gpu: no GPU on this machine; its stages are rehearsed on the CPU")
        runner = Runner(
            Path(folder),
            budget_s=options.budget,
            environment=environment,
            jobs=num_jobs(machine),
            cwd=ROOT,
            started=started,
        )
        run = Report(machine, options, Path(folder), started)
        runner.run(stages, run.add)
    print(f"\n{run.text}{run.stem}.json, .txt, .log in {options.output}")
    return int(any(outcome.status == "failed" for outcome in run.outcomes))


def leave(*_: Any) -> None:
    """When asked to end: ends what runs, too."""
    # Asked again, as by a shell and by make, it would leave the rest running.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


class Report:
    """The files of a run, written anew after every stage."""

    def __init__(
        self, machine: Mapping[str, Any], options: argparse.Namespace, logs: Path, started: float
    ) -> None:
        self.machine, self.logs, self.started = machine, logs, started
        self.output, self.stem = options.output, report.file_stem(machine)
        self.outcomes: list[Outcome] = []
        self.text = ""
        # Before this run writes over it.
        places = [options.output, RESULTS] if options.last is None else [options.last]
        found = (read(place / f"{self.stem}.json") for place in places)
        self.last = next((one for one in found if one is not None), None)

    def add(self, outcome: Outcome) -> None:
        """Takes in a stage's outcome."""
        self.outcomes.append(outcome)
        print(report.stage_line(outcome), flush=True)
        command = shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])
        seconds = time.monotonic() - self.started
        document = report.document(
            self.machine, self.outcomes, self.last, command=command, seconds=seconds
        )
        comparisons = report.compare(report.figures_of(self.outcomes), self.last)
        document["compared"] = [one._asdict() for one in comparisons if one.verdict]
        self.text = report.table(document, self.outcomes, comparisons, self.last)
        write_json(self.output / f"{self.stem}.json", document)
        (self.output / f"{self.stem}.txt").write_text(self.text, encoding="utf-8")
        with (self.output / f"{self.stem}.log").open("w", encoding="utf-8") as log:
            for path in sorted(self.logs.glob("*.log"), key=lambda path: path.stat().st_mtime):
                text = path.read_text(encoding="utf-8", errors="replace")
                log.write(f"==== {path.stem}\n{text}\n")


def look(environment: Mapping[str, str]) -> dict[str, Any]:
    """What a process of its own says of the machine."""
    command = [sys.executable, "-m", "benchmarks.gpu.machine"]
    done = subprocess.run(
        command, cwd=ROOT, env=dict(environment), capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"problem": f"torch cannot be used here:\n{done.stderr.strip()}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def chosen(stages: list[Stage], names: Sequence[str] | None) -> list[Stage]:
    """Those named, in the plan's order; all without names.

    Raises:
        SystemExit: a name that no stage has.
    """
    if names is None:
        return stages
    unknown = set(names) - {stage.name for stage in stages}
    if unknown:
        known = ", ".join(stage.name for stage in stages)
        sys.exit(f"make gpu: no stage {', '.join(sorted(unknown))}; there are {known}")
    return [stage for stage in stages if stage.name in names]


def environment_for(folder: Path) -> dict[str, str]:
    """Of every stage: our packages and test helpers, no network, and step costs measured anew."""
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    paths = [ROOT, ROOT / "kernels", ROOT / "train", ROOT / "tests"]
    return environment | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }


def read(path: Path) -> dict[str, Any] | None:
    """The last run's report; None: there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_report = isinstance(found, dict) and {"date", "commit", "figures", "stages"} <= found.keys()
    return found if is_report else None


if __name__ == "__main__":
    sys.exit(main())
