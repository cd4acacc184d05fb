"""``make gpu``: its stages on a CPU, what becomes of those that break, reports and comparisons."""

import copy
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mara_kernels.attention.rows
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import captured, divergence, idle, one, plan, readers, report
from benchmarks.gpu.divergence import Decision, margin_of
from benchmarks.gpu.finding import Figure, Finding
from benchmarks.gpu.options import Options
from benchmarks.gpu.runner import Runner
from benchmarks.gpu.stage import OUTPUT, Outcome, Stage, first_error, own
from mara_fast.self_check import Checked
from mara_kernels import dispatch

ROOT = command.ROOT

CPU_MACHINE: dict[str, Any] = {
    "device": "cpu",
    "name": "CPU",
    "architecture": "sm_90",
    "num_cores": 2,
    "has": {"xdist": True, "pytest_timeout": False},
    "sanitizer": None,
    "facts": {"hardware": "a CPU", "date": "2026-01-01", "commit": "abc", "versions": {}},
}
GPU_MACHINE = CPU_MACHINE | {
    "device": "cuda",
    "name": "NVIDIA H100 80GB HBM3",
    "num_cores": 16,
    "sanitizer": "/bin/compute-sanitizer",
}


# --- the stages, in small --------------------------------------------------------------------


@pytest.fixture(autouse=True)
def default_bodies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those that a CPU has; step costs measured anew."""
    monkeypatch.setenv("MARA_KERNELS", "torch")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def small(
    keep: Callable[[Finding], None] = lambda finding: None, *, compile: bool = False
) -> Options:
    return Options(
        device=torch.device("cpu"),
        small=True,
        model="nano",
        compile=compile,
        label="compiled" * compile,
        keep=keep,
    )


@pytest.mark.parametrize("name", one.STAGES)
def test_a_stage_in_small(name: str) -> None:
    kept: list[dict[str, Any]] = []
    finding = one.run(name, small(lambda finding: kept.append(finding.to_dict())))
    assert not finding.problems
    assert Finding.from_dict(json.loads(json.dumps(finding.to_dict()))) == finding
    if name == "steps":
        assert [len(found["details"]["batches"]) for found in kept] == [1, 2]
        assert {figure.unit for figure in finding.figures.values()} == {"tokens/s", "x"}
        assert all(figure.value > 0 for figure in finding.figures.values())
    if name == "learning":
        assert [figure.unit for figure in finding.figures.values()] == ["/s"]


def test_compiled_steps_in_small() -> None:
    finding = one.run("steps", small(compile=True))
    assert not finding.problems
    assert set(finding.figures) == {
        f"nano compiled B=1 {name}"
        for name in ("plain", "MARA", "MARA / plain", "plain / roofline")
    }
    assert any("what compiling took" in note for note in finding.notes)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """No row sees the last positions before it."""
    original = mara_kernels.attention.rows.visibility

    def visibility(lengths: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return original((lengths - 5).clamp(min=0), *args, **options)

    monkeypatch.setattr(mara_kernels.attention.rows, "visibility", visibility)
    # On a CPU no mask is made where all is seen.
    monkeypatch.setattr("mara_fast.engine._host_reads", lambda device: False)
    # The engine would refuse such a model.
    monkeypatch.setattr("mara_fast.language_model.check_path", lambda lm: Checked((), 1024, False))


@pytest.mark.parametrize("name", ["exact", "divergence"])
def test_a_mistake_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    assert one.run(name, small()).problems


def test_a_graph_that_goes_stale_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(captured.TapeCapture):
        """Replays nothing."""

        def __call__(self, call: Callable[[], None]) -> Callable[[], None]:
            super().__call__(call)
            return lambda: None

    monkeypatch.setattr(captured, "TapeCapture", Deaf)
    (problem,) = one.run("captured", small()).problems
    assert " captured, " in problem and " eagerly" in problem


# --- margins ---------------------------------------------------------------------------------

LOGPROBS = torch.log_softmax(torch.tensor([4.0, 3.0, 2.9, 1.0, -8.0]), dim=0)


@pytest.mark.parametrize(
    ("wanted", "got", "kind", "margin"),
    [
        # Another verdict on rank 0.
        (Decision(0, (0, 1), (0.2,)), Decision(1, (0, 1), (-0.1, 3.0)), "accept", 0.2),
        # Ranks 1 and 2 exchanged.
        (Decision(1, (0, 1, 2), (-1, 1)), Decision(2, (0, 2, 1), (-1, 1)), "order", 0.1),
        # The same verdicts over sets of two sizes: the fallback differs.
        (Decision(1, (0, 1), (-1, -1)), Decision(2, (0, 1, 2), (-1, -1, -1)), "cut", None),
        # Forced in one of them.
        (Decision(0, (0,), ()), Decision(1, (0, 1), (-1, 1)), "cut", None),
        (Decision(0, (0, 1), (1,)), Decision(1, (0, 1), (1,)), "unexplained", math.inf),
    ],
)
def test_margins(wanted: Decision, got: Decision, kind: str, margin: float | None) -> None:
    found, distance = margin_of(wanted, got, LOGPROBS)
    assert found == kind
    if margin is not None:
        assert distance == pytest.approx(margin, abs=1e-6)
    else:
        first = len(min(wanted.candidates, got.candidates, key=len))
        tail = float(LOGPROBS.exp()[first:].sum())
        gap = float(LOGPROBS[first] - LOGPROBS[-1])
        assert distance == pytest.approx(min(abs(tail - 0.05), gap), abs=1e-6)


def test_bounds_follow_the_noise() -> None:
    noise = divergence.Noise(accept_logit=0.1, logprob=0.01)
    bounds = [noise.bound(kind) for kind in ("accept", "order", "cut")]
    assert bounds == pytest.approx([0.3, 0.06, 0.03])


# --- idle time -------------------------------------------------------------------------------


def test_union_of_intervals() -> None:
    assert idle.busy_time([]) == 0
    assert idle.busy_time([(3, 5), (0, 1), (4, 9), (4, 4.5), (9, 10)]) == 8
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        starts = torch.randint(40, (12,), generator=generator)
        ends = starts + torch.randint(9, (12,), generator=generator)
        cells = {
            c for s, e in zip(starts.tolist(), ends.tolist(), strict=True) for c in range(s, e)
        }
        intervals = list(zip(starts.tolist(), ends.tolist(), strict=True))
        assert idle.busy_time(intervals) == len(cells)


def test_a_profile() -> None:
    kernels = [
        idle.Kernel("attend", 10, 20),
        idle.Kernel("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", 15, 30),
        idle.Kernel("Memcpy DtoH (Device -> Pinned)", 40, 45),
        idle.Kernel("void at::native::vectorized_elementwise_kernel<4, ...>", 55, 60),
    ]
    profile = idle.profile_of(kernels)
    assert profile.idle_share == pytest.approx(0.4)
    assert profile.parts == pytest.approx(
        {
            "attention": 10 / 35,
            "matrix products": 15 / 35,
            "copies and indexing": 5 / 35,
            idle.OTHERS: 5 / 35,
        }
    )
    with pytest.raises(ValueError, match="no kernel was recorded"):
        idle.profile_of([])


@pytest.mark.parametrize("operation", dispatch.OPERATIONS)
def test_our_kernels_are_told_by_their_names(operation: str) -> None:
    import importlib

    from triton.runtime import KernelInterface

    module = importlib.import_module(f"mara_kernels.{operation}.kernel")
    kernels = [
        name
        for name, value in vars(module).items()
        if isinstance(value, KernelInterface) and not name.startswith("_")
    ]
    assert kernels and {idle.part_of(name) for name in kernels} == {operation}


# --- the runner ------------------------------------------------------------------------------


def stage(name: str, code: str, **options: Any) -> Stage:
    defaults: dict[str, Any] = {"estimate_s": 1, "cap_s": 20, "read": own}
    return Stage(
        name=name, command=(sys.executable, "-S", "-c", code, OUTPUT), **(defaults | options)
    )


WRITES = f"""
import json, sys, time
def write(**found):
    json.dump({Finding().to_dict()} | found, open(sys.argv[1], "w"))
"""
SLEEPS = "\ntime.sleep(60)"


def outcomes_of(stages: list[Stage], folder: Path, **options: Any) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    settings: dict[str, Any] = {"budget_s": 60, "jobs": 4} | options
    runner = Runner(
        folder, environment=dict(os.environ), cwd=folder, started=time.monotonic(), **settings
    )
    runner.run(stages, lambda outcome: found.update({outcome.name: outcome}))
    return found


def test_one_stage_costs_no_other_anything(tmp_path: Path) -> None:
    figure = {"value": 2.0, "unit": "ms", "spread": 0.1}
    stages = [
        stage("passes", WRITES + f"write(figures={{'step': {figure}}})"),
        stage("raises", "print('so far')\nraise RuntimeError('illegal memory access')"),
        stage("crashes", "import os; os.abort()"),
        stage("hangs", WRITES + "write(notes=['half'])" + SLEEPS, cap_s=1),
        stage("finds", WRITES + "write(problems=['tokens differ'])"),
        stage("says nothing", "pass"),
        stage("cannot", WRITES + "write(obstacle='no such device')"),
        stage("lacks", "pass", obstacle="not installed"),
        stage("is timed", WRITES + "write()", is_timed=True),
    ]
    found = outcomes_of(stages, tmp_path)
    assert list(found) != [] and set(found) == {one.name for one in stages}
    assert {name: one.status for name, one in found.items()} == {
        "passes": "passed",
        "raises": "failed",
        "crashes": "failed",
        "hangs": "failed",
        "finds": "failed",
        "says nothing": "failed",
        "cannot": "left out",
        "lacks": "left out",
        "is timed": "passed",
    }
    assert found["passes"].finding.figures == {"step": Figure(2.0, "ms", 0.1)}
    assert found["raises"].reason == "exit status 1: RuntimeError: illegal memory access"
    assert found["crashes"].reason.startswith("signal 6")
    assert found["hangs"].reason == "stopped: not done after 1 s"
    assert found["hangs"].finding.notes == ["half"]
    assert found["finds"].reason == "tokens differ"
    assert found["says nothing"].reason == "it wrote no results"
    assert found["lacks"].reason == "not installed"


def test_time_runs_out(tmp_path: Path) -> None:
    stages = [
        stage("is begun", WRITES + "write(notes=['some'])" + SLEEPS, estimate_s=2),
        stage("comes too late", WRITES, estimate_s=30),
    ]
    found = outcomes_of(stages, tmp_path, budget_s=2, jobs=1)
    assert found["is begun"].status == "cut short" and found["is begun"].finding.notes == ["some"]
    assert found["is begun"].seconds < 2.5
    assert found["comes too late"].status == "left out"
    assert found["comes too late"].reason == "0 s left, it takes about 30"


def test_what_is_timed_runs_alone(tmp_path: Path) -> None:
    code = WRITES + "began = time.time()\ntime.sleep(0.3)\nwrite(details=[began, time.time()])"
    names = {"a": False, "b": False, "c": True, "d": False}
    stages = [stage(name, code, is_timed=timed) for name, timed in names.items()]
    found = outcomes_of(stages, tmp_path)
    times = {name: one.finding.details for name, one in found.items()}
    assert times["a"][0] < times["b"][1] and times["b"][0] < times["a"][1]
    assert max(times["a"][1], times["b"][1]) < times["c"][0]
    assert times["c"][1] < times["d"][0]


def test_children_of_a_stage_end_with_it(tmp_path: Path) -> None:
    child = "import time, pathlib; time.sleep(1.5); pathlib.Path('late').touch()"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', {child!r}])"
    outcomes_of([stage("leaves one behind", WRITES + code + "\nwrite()")], tmp_path)
    time.sleep(1.6)
    assert not (tmp_path / "late").exists()


def test_first_errors() -> None:
    assert first_error("a\nFAILED tests/x.py::t - assert 1\nValueError: b\n") == (
        "FAILED tests/x.py::t - assert 1"
    )
    log = "Traceback ...\n  File x\ntorch.AcceleratorError: CUDA error: misaligned\nDone\n"
    assert first_error(log) == "torch.AcceleratorError: CUDA error: misaligned"
    assert first_error("only this\n\n") == "only this"
    assert first_error("") == "it printed nothing"


# --- what other commands print and write -----------------------------------------------------


def test_pytest_is_read() -> None:
    whole = (
        "tests/a.py::t PASSED [50%]\nFAILED tests/a.py::u - assert\n= 1 failed, 7 passed in 3.21s ="
    )
    finding = readers.pytest_run(None, whole)
    assert finding.problems == ["tests/a.py::u - assert"]
    assert finding.notes == ["7 tests passed"]
    stopped = "[gw0] [ 3%] PASSED tests/a.py::t\n[gw1] [ 4%] FAILED tests/a.py::u \n"
    finding = readers.pytest_run(None, stopped)
    assert finding.problems == ["tests/a.py::u"]
    assert finding.notes == ["1 tests passed, until it was stopped"]
    assert readers.pytest_run(None, "== 30 skipped in 0.1s ==").problems == [
        "no test passed: == 30 skipped in 0.1s =="
    ]


def test_the_memory_checker_is_read() -> None:
    log = "========= Invalid __global__ write of size 4 bytes\n= 3 passed in 2.0s ="
    assert readers.memory_check(None, log).problems == ["Invalid __global__ write of size 4 bytes"]
    assert readers.memory_check(None, "Error: Device not supported.").obstacle


def test_kernel_figures() -> None:
    timing = {"p20": 9.0, "p50": 10.0, "p80": 11.0, "by": "graph"}
    row = {
        "operation": "truncate",
        "case": "B=64 V=32000",
        "ours": timing,
        "times_floor": 1.2,
        "targets": {"within 1.5 x floor": True},
        "baselines": {
            "topk": timing | {"p50": 30.0, "speed_up": 3.0},
            "torch.compile": timing | {"p50": 20.0, "speed_up": 2.0},
            "other": {"skipped": "not installed"},
        },
    }
    broken = {"operation": "truncate", "case": "B=1", "failed": "RuntimeError: x"}
    finding = readers.kernel_speed({"rows": [row, broken]}, "")
    assert finding.problems == ["truncate B=1: failed: RuntimeError: x"]
    assert finding.figures == {
        "truncate B=64 V=32000": Figure(10.0, "us", 0.1),
        "truncate B=64 V=32000, of its floor": Figure(1.2, "x floor", 0.1),
        "truncate B=64 V=32000, over its fastest rival": Figure(2.0, "x", pytest.approx(0.15)),
    }


def test_configurations_are_read() -> None:
    shipped = {"block_n": 64, "num_warps": 4}
    row = {"entry": "score, N 1-16", "shipped": shipped, "best": shipped, "ratio": 1, "tried": [1]}
    faster = row | {"best": shipped | {"num_warps": 8}, "ratio": 0.871, "tried": [1, 2]}
    finding = readers.configurations(
        {"rows": [row, faster], "problems": ["one: as it is: wrong"], "left_out": ["other"]}, ""
    )
    assert finding.problems == ["one: as it is: wrong"] and not finding.figures
    assert finding.notes == [
        "3 configurations beside 2 of the tables; 1 entries can be better",
        "score, N 1-16: 0.87 of the time with num_warps 4 -> 8",
        "other: no time",
    ]


@pytest.mark.parametrize(
    ("name", "read", "figure"),
    [
        ("bench_cpu", readers.decoding, "50m B=1 with refill, MARA, ours"),
        ("training_speed_cpu", readers.training, "ours, their recipe, updates"),
        ("kernels_aot", readers.compilation, None),
    ],
)
def test_committed_results_are_read(name: str, read: Any, figure: str | None) -> None:
    path = command.RESULTS / f"{name}.json"
    if not path.is_file():
        pytest.skip("results are not part of a source distribution")
    values = json.loads(path.read_text())
    finding = read(values, "")
    assert not finding.problems
    assert figure is None or finding.figures[figure].value > 0


# --- the plan and the report -----------------------------------------------------------------


@pytest.mark.parametrize("machine", [CPU_MACHINE, GPU_MACHINE])
def test_the_plan(machine: dict[str, Any]) -> None:
    stages = plan.stages_for(machine)
    assert len({one.name for one in stages}) == len(stages)
    timed = [one.is_timed for one in stages]
    if machine["device"] == "cuda":
        # What checks comes before what measures.
        assert timed == sorted(timed)
        names = [one.name for one in stages]
        assert names[0] == "compiled" and "steps 8b" in names and "decode 3b" in names
    for one_stage in stages:
        assert one_stage.estimate_s < one_stage.cap_s
        scripts = [part for part in one_stage.command if part.endswith(".py")]
        assert all((ROOT / script).is_file() for script in scripts)


def test_bench_commands_are_understood() -> None:
    """Their options exist, and the shapes and systems they name."""
    from mara_fast.bench.model import SHAPES
    from mara_fast.bench.systems import SYSTEMS

    for one_stage in plan.stages_for(GPU_MACHINE):
        words = one_stage.command
        if "--model" in words:
            assert words[words.index("--model") + 1] in SHAPES
        if "--systems" in words:
            numbers = map(int, words[words.index("--systems") + 1].split(","))
            assert all(1 <= number <= len(SYSTEMS) for number in numbers)


def outcome(name: str, status: Any = "passed", **figures: Figure) -> Outcome:
    return Outcome(name=name, status=status, seconds=3, finding=Finding(figures=figures))


def test_comparisons() -> None:
    now = {
        "faster": Figure(90, "ms", 0.01),
        "slower": Figure(120, "us", 0.02),
        "within noise": Figure(110, "ms", 0.06),
        "more": Figure(130, "tokens/s", 0.0),
        "less": Figure(70, "x", 0.0),
        "new": Figure(1, "s"),
        "other unit": Figure(100, "s"),
    }
    values = {name: Figure(100, now[name].unit, 0.05)._asdict() for name in now if name != "new"}
    values["other unit"]["unit"] = "ms"
    found = {one.name: one for one in report.compare(now, {"figures": values})}
    assert {name: one.verdict for name, one in found.items()} == {
        "faster": "better",
        "slower": "worse",
        "within noise": "",
        "more": "better",
        "less": "worse",
        "new": "",
        "other unit": "",
    }
    assert found["slower"].ratio == 1.2 and found["new"].last is found["other unit"].ratio is None


def test_a_report_is_compared_with_the_one_before() -> None:
    outcomes = [outcome("steps", step=Figure(10, "ms")), outcome("memory", "left out")]
    outcomes[1].reason = "no compute-sanitizer"
    before = report.document(GPU_MACHINE, outcomes, None, command="c", seconds=5)
    assert report.file_stem(GPU_MACHINE) == "gpu_nvidia_h100_80gb_hbm3"
    outcomes[0] = outcome("steps", step=Figure(12, "ms"))
    document = json.loads(
        json.dumps(report.document(GPU_MACHINE, outcomes, before, command="c", seconds=5))
    )
    comparisons = report.compare(report.figures_of(outcomes), before)
    text = report.table(document, outcomes, comparisons, before)
    assert "memory               left out" in text and "no compute-sanitizer" in text
    assert "1.20  worse" in text and "beyond noise: 1" in text
    assert document["figures"]["step"]["value"] == 12 and document["commit"] == "abc"


def test_stages_that_did_not_run_are_kept() -> None:
    """One part of the stages today, the others tomorrow, of another commit."""
    some = [outcome("steps", step=Figure(10, "ms")), outcome("memory", "left out")]
    last = report.document(GPU_MACHINE, some, None, command="c", seconds=5)
    machine = GPU_MACHINE | {"facts": GPU_MACHINE["facts"] | {"commit": "def"}}
    others = [outcome("steps", "left out"), outcome("speed", kernel=Figure(3, "us"))]
    document = report.document(machine, others, last, command="c", seconds=5)
    assert {name: one["value"] for name, one in document["figures"].items()} == {
        "step": 10,
        "kernel": 3,
    }
    stages = [(one["name"], one["status"], one["commit"]) for one in document["stages"]]
    assert stages == [
        ("steps", "left out", "def"),
        ("speed", "passed", "def"),
        ("steps", "passed", "abc"),
    ]
    text = report.table(document, others, [], last)
    assert "steps                passed     2026-01-01, commit abc" in text
    # A report of which every stage is of its own commit says so once.
    for one_stage in last["stages"]:
        del one_stage["date"], one_stage["commit"]
    document = report.document(machine, others, last, command="c", seconds=5)
    assert [one["commit"] for one in document["stages"]] == ["def", "def", "abc"]
    assert "2026-01-01, commit abc" in report.table(document, others, [], last)
    # What runs again replaces it, even if it fails.
    failed = [outcome("steps", "failed")]
    document = report.document(machine, failed, document, command="c", seconds=5)
    assert list(document["figures"]) == ["kernel"]
    assert [one["commit"] for one in document["stages"]] == ["def", "def"]


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    stages = [
        stage("good", WRITES + "print('hello')\nwrite(notes=['fine'])"),
        stage("bad", "raise SystemExit(3)"),
    ]
    monkeypatch.setattr(command, "look", lambda environment: copy.deepcopy(CPU_MACHINE))
    monkeypatch.setattr(command, "stages_for", lambda machine, workers: stages)
    options = ["--output", str(tmp_path / "new"), "--last", str(tmp_path)]
    assert command.main([*options, "--stages", "good"]) == 0
    assert command.main([*options, "--commit", "1234567"]) == 1
    printed = capsys.readouterr().out
    assert "rehearsed on the CPU" in printed and "exit status 3" in printed
    document = json.loads((tmp_path / "new/gpu_rehearsal.json").read_text())
    assert [one["status"] for one in document["stages"]] == ["passed", "failed"]
    assert document["commit"] == "1234567"
    assert "==== good\nhello" in (tmp_path / "new/gpu_rehearsal.log").read_text()
    # Without a folder of the last report: that of this one, if it has one.
    assert command.main(["--output", str(tmp_path / "new"), "--stages", "good"]) == 0
    document = json.loads((tmp_path / "new/gpu_rehearsal.json").read_text())
    assert [one["name"] for one in document["stages"]] == ["good", "bad"]
    for broken in ("[1]", "{}", '{"stages": []}'):
        (tmp_path / "new/gpu_rehearsal.json").write_text(broken)
        assert command.main([*options[:2], "--stages", "good"]) == 0
    with pytest.raises(SystemExit, match="no stage other; there are good, bad"):
        command.main([*options, "--stages", "other"])
    monkeypatch.setattr(command, "look", lambda environment: {"problem": "torch cannot use it"})
    assert command.main(options) == 1


ASKED_TO_END = """
import os, sys
from pathlib import Path
from benchmarks.gpu import __main__ as command
from benchmarks.gpu.stage import Stage, own

folder = Path(sys.argv[1])
# It takes its time: what it is asked again meets a command that is ending it.
code = (
    "import os, pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    f"pathlib.Path({str(folder / 'pid')!r}).write_text(str(os.getpid())); time.sleep(60)"
)
stage = Stage(
    name="long", command=(sys.executable, "-S", "-c", code), read=own, estimate_s=1, cap_s=60
)
facts = {"hardware": "a CPU", "date": "2026-01-01", "commit": "abc", "versions": {}}
machine = {"device": "cpu", "name": "CPU", "num_cores": 2, "facts": facts}
command.look = lambda environment: machine
command.stages_for = lambda machine, workers: [stage]
sys.exit(command.main(["--output", str(folder)]))
"""


def test_who_is_asked_twice_to_end_leaves_nothing_behind(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    process = subprocess.Popen([sys.executable, "-c", ASKED_TO_END, str(tmp_path)], cwd=ROOT)
    end = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.terminate()
    time.sleep(0.5)
    process.terminate()
    assert process.wait(30) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@pytest.mark.slow
def test_the_command_as_it_is(tmp_path: Path) -> None:
    """Two stages in processes of their own, on the machine as it is."""
    names = ["exact", "learning"]
    assert command.main(["--output", str(tmp_path), "--stages", *names]) == 0
    (path,) = tmp_path.glob("*.json")
    assert [one["name"] for one in json.loads(path.read_text())["stages"]] == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "0"), "--budget=0.0 is not allowed; allowed: seconds above 0"),
        (("--budget", "nan"), "--budget=nan is not allowed; allowed: seconds above 0"),
        (("--budget", "abc"), "abc"),
        (("--workers", "0"), "--workers=0 is not allowed; allowed: an integer >= 1"),
        (("--output", __file__), "is a file, expected a folder"),
        (("--output", f"{__file__}/below"), "is a file, expected a folder"),
    ],
)
def test_bad_options_are_named_before_work(
    arguments: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.parse(arguments)
    assert message in capsys.readouterr().err
