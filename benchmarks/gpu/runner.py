"""Stages in order of value, each in its own process, within a budget of seconds.

while stages are left:
    those in front that are not timed run together, as many at once as there are jobs
    a timed one runs alone
    less time left than half of what a stage takes: it is left out
    at its cap, or when the budget is spent: all its processes are killed
after every stage: the report is written anew
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from benchmarks.gpu.finding import Finding
from benchmarks.gpu.stage import OUTPUT, Outcome, Stage, first_error

_POLL_S = 0.05
_GRACE_S = 3.0
"""From asking a process to end to killing it."""


@dataclass(frozen=True, kw_only=True)
class _Running:
    stage: Stage
    process: subprocess.Popen
    log: TextIO
    started: float
    deadline: float
    is_cut: bool
    """It has less time than its cap."""


class Runner:
    """Runs stages.

    Args:
        folder: for what they write and print: ``<name>.json`` and ``<name>.log``.
        budget_s: seconds for all.
        environment: of every command.
        jobs: stages that run at once, of those that are not timed.
        cwd: where commands run.
        started: ``time.monotonic()`` when the budget began.
    """

    def __init__(
        self,
        folder: Path,
        *,
        budget_s: float,
        environment: Mapping[str, str],
        jobs: int,
        cwd: Path,
        started: float,
    ) -> None:
        self.folder, self.environment, self.jobs, self.cwd = folder, environment, jobs, cwd
        self._end = started + budget_s
        self._running: list[_Running] = []

    def run(self, stages: Sequence[Stage], done: Callable[[Outcome], None]) -> None:
        """Runs all; ``done`` is told of each as soon as its outcome is known."""
        waiting = list(stages)
        try:
            while waiting or self._running:
                self._start(waiting, done)
                time.sleep(_POLL_S)
                for running in list(self._running):
                    outcome = self._outcome(running)
                    if outcome is not None:
                        self._running.remove(running)
                        done(outcome)
        finally:
            for running in self._running:
                kill(running.process)
                running.log.close()

    def _start(self, waiting: list[Stage], done: Callable[[Outcome], None]) -> None:
        """Starts what may run now."""
        while waiting:
            stage = waiting[0]
            alone = stage.is_timed or any(one.stage.is_timed for one in self._running)
            if len(self._running) >= (1 if alone else self.jobs):
                return
            waiting.pop(0)
            if stage.obstacle:
                done(Outcome(name=stage.name, status="left out", reason=stage.obstacle))
                continue
            left = self._end - time.monotonic()
            if left < stage.estimate_s / 2:
                reason = f"{max(0, left):.0f} s left, it takes about {stage.estimate_s:.0f}"
                done(Outcome(name=stage.name, status="left out", reason=reason))
                continue
            self._running.append(self._launch(stage, left))

    def _launch(self, stage: Stage, left: float) -> _Running:
        command = [part.replace(OUTPUT, str(self._file(stage, "json"))) for part in stage.command]
        log = self._file(stage, "log").open("w+", encoding="utf-8", errors="replace")
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**self.environment, **stage.environment},
            cwd=self.cwd,
            # A group of its own, so that what it starts ends with it.
            start_new_session=True,
        )
        now = time.monotonic()
        return _Running(
            stage=stage,
            process=process,
            log=log,
            started=now,
            deadline=now + min(stage.cap_s, left),
            is_cut=left < stage.cap_s,
        )

    def _outcome(self, running: _Running) -> Outcome | None:
        """What became of it; None while it runs and may."""
        stage, status = running.stage, running.process.poll()
        now = time.monotonic()
        if status is None and now < running.deadline:
            return None
        # Also what a finished command has left behind.
        kill(running.process)
        running.log.close()
        log = self._file(stage, "log").read_text(encoding="utf-8", errors="replace")
        finding = self._finding(stage, log, has_ended=status == 0)
        outcome = Outcome(
            name=stage.name, status="passed", seconds=now - running.started, finding=finding
        )
        if finding.obstacle:
            outcome.status, outcome.reason = "left out", finding.obstacle
        elif finding.problems:
            outcome.status, outcome.reason = "failed", finding.problems[0]
        elif status is None and running.is_cut:
            outcome.status, outcome.reason = "cut short", "the time for all stages is over"
        elif status is None:
            outcome.status, outcome.reason = (
                "failed",
                f"stopped: not done after {stage.cap_s:.0f} s",
            )
        elif status:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            outcome.status, outcome.reason = "failed", f"{how}: {first_error(log)}"
        return outcome

    def _finding(self, stage: Stage, log: str, *, has_ended: bool) -> Finding:
        values: Any = None
        if OUTPUT in stage.command:
            try:
                values = json.loads(self._file(stage, "json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                # Of one that broke or was stopped nothing can be expected.
                return Finding(problems=["it wrote no results"] if has_ended else [])
        try:
            return stage.read(values, log)
        # What a stage wrote may be anything; it costs no other stage its figures.
        except Exception as error:
            return Finding(
                problems=[f"its results cannot be read: {type(error).__name__}: {error}"]
            )

    def _file(self, stage: Stage, kind: str) -> Path:
        return self.folder / f"{stage.name.replace(' ', '_').replace('.', '_')}.{kind}"


def kill(process: subprocess.Popen) -> None:
    """Ends a process and all that it started; asks first, so that it can free a device."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        end = time.monotonic() + _GRACE_S
        while process.poll() is None and time.monotonic() < end:
            time.sleep(_POLL_S)
