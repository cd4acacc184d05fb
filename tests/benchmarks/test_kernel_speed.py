"""The GPU benchmark of the kernels, as far as a CPU can tell: cases, checks, floors, reports."""

import argparse
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from mara_kernels.attention import candidate_attention

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cases() -> ModuleType:
    """kernel_cases."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("kernel_cases")


@pytest.fixture(scope="module")
def speed(cases: ModuleType) -> ModuleType:
    """kernel_speed.py, which imports it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("kernel_speed")


@pytest.fixture(scope="module")
def report(speed: ModuleType) -> ModuleType:
    """kernel_report.py, which that imports."""
    return importlib.import_module("kernel_report")


@pytest.fixture(autouse=True)
def torch_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our side is the torch bodies, through the public operations."""
    monkeypatch.setenv("MARA_KERNELS", "torch")


def small_shape(cases: ModuleType, **sizes: Any) -> Any:
    """Two slots of eight positions."""
    defaults = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 8,
        "length": 8,
        "num_rows": 3,
        "num_slots": 2,
    }
    return cases.attention.AttentionShape(**(defaults | sizes))


BUILDS: dict[str, Callable[[ModuleType], Any]] = {
    "truncate": lambda cases: cases.truncate.truncate_case(CPU, 1000, num_rows=2, vocab_size=300),
    "score": lambda cases: cases.score.score_case(
        CPU, 5000, num_states=3, hidden_size=32, inner_size=16
    ),
    "score-one": lambda cases: cases.score.score_case(
        CPU, 0, num_states=1, hidden_size=32, inner_size=16
    ),
    "cascade": lambda cases: cases.cascade.cascade_case(CPU, 1000, num_slots=4, window=3),
    "attention": lambda cases: cases.attention.attention_case(CPU, 3000, shape=small_shape(cases)),
    "chunk": lambda cases: cases.attention.attention_case(
        CPU, 0, shape=small_shape(cases, num_rows=5, kind="chain")
    ),
    "norm": lambda cases: cases.layers.norm_case(CPU, 0, num_rows=3, hidden_size=32),
    "rotation": lambda cases: cases.layers.rotation_case(CPU, 0, num_rows=3),
} | {
    name: lambda cases, name=name: cases.bookkeeping.bookkeeping_case(
        CPU, 0, step=getattr(cases.bookkeeping, name), num_slots=2
    )
    for name in ("proposing", "settling", "admitting", "keeping")
}


def corruptions(operation: str, output: Any) -> list[Any]:
    """The output, with one thing wrong in each."""
    if operation == "truncate":
        ids, logprobs = output.ids.clone(), output.logprobs.clone()
        ids[0, 0], logprobs[1, 0] = (ids[0, 0] + 1) % 300, torch.nan
        return [
            output._replace(size=output.size + 1),
            output._replace(ids=ids),
            output._replace(ids=output.ids[:, :1].expand_as(output.ids)),
            output._replace(logprobs=logprobs),
        ]
    if operation == "cascade":
        held = output.held
        return [
            output._replace(row=output.row + 1),
            output._replace(decided=~output.decided),
            output._replace(held=held._replace(accepted=~held.accepted)),
            output._replace(held=held._replace(log_residual=held.log_residual + 0.01)),
            output._replace(log_prob=output.log_prob + 0.01),
        ]
    if operation in ("bookkeeping", "layers") and not isinstance(output, torch.Tensor):
        found = []
        for index, tensor in enumerate(output):
            other = tensor.clone()
            other.view(-1)[-1] = ~other.view(-1)[-1] if other.dtype == torch.bool else 77
            found.append([*output[:index], other, *output[index + 1 :]])
        return found
    wrong, broken = output.clone(), output.clone()
    wrong.view(-1)[-1] += 1
    broken.view(-1)[0] = torch.nan
    return [wrong, broken]


@pytest.mark.parametrize("build", BUILDS)
def test_every_version_of_a_case_passes_its_check(cases: ModuleType, build: str) -> None:
    case = BUILDS[build](cases)
    assert case.problem(case.ours.output()) == ""
    assert case.baselines
    for version in case.baselines:
        assert case.problem(version.output()) == "", version.name


@pytest.mark.parametrize("build", BUILDS)
def test_a_corrupted_output_fails_the_check(cases: ModuleType, build: str) -> None:
    case = BUILDS[build](cases)
    for number, wrong in enumerate(corruptions(case.operation, case.ours.output())):
        assert case.problem(wrong), number


def test_inputs_rotate_and_are_checked_by_the_first(cases: ModuleType) -> None:
    case = BUILDS["truncate"](cases)
    assert len(case.ours.inputs) == 1
    case = cases.truncate.truncate_case(CPU, 2 * 600 * 3, num_rows=2, vocab_size=300)
    assert len(case.ours.inputs) == 6 // 2
    assert len({inputs[0].data_ptr() for inputs in case.ours.inputs}) == 3
    other = case.ours.read(case.ours.run(*case.ours.inputs[1]))
    assert case.problem(other)
    assert cases.case.num_sets(1, 1e9) == cases.case.MOST_SETS
    # The copies of the prefix are larger than the slots: fewer sets of them.
    case = BUILDS["attention"](cases)
    [copies] = [version for version in case.baselines if version.name == "SDPA, copies"]
    assert 1 <= len(copies.inputs) < len(case.ours.inputs)


def test_attention_that_forgets_the_own_row_is_found_out(cases: ModuleType) -> None:
    case = cases.attention.attention_case(
        CPU, 0, shape=small_shape(cases, length=16384, head_size=16)
    )
    query, key, value = case.ours.inputs[0]
    rows = case.ours.run.keywords["rows"]
    value = value.clone()
    value[:, :, rows.base :] = 0
    assert case.problem(candidate_attention(query, key, value, rows, scale=0.25))


def test_tied_tokens_may_swap_but_not_replace_each_other(cases: ModuleType) -> None:
    logits = torch.linspace(-10, 0, 300)[None].clone()
    logits[:, 100:103] = 5
    right = cases.truncate.topk_truncate(logits)
    assert right.size.item() == 3
    ids = right.ids.clone()
    ids[:, :3] = torch.tensor([102, 100, 101])
    assert cases.truncate.truncate_problem(logits, right._replace(ids=ids)) == ""
    ids[:, :3] = torch.tensor([102, 102, 101])
    assert "twice" in cases.truncate.truncate_problem(logits, right._replace(ids=ids))


def test_floors_by_hand(cases: ModuleType) -> None:
    # One state of 4096 and 1024 x 4096 + 256 x 1024 weights, two bytes each.
    case = cases.score.score_case(CPU, 0, num_states=1, hidden_size=4096)
    assert case.cost.num_bytes == 2 * (4096 + 4_456_448) == 8_921_088
    assert case.cost.num_flops == 8_912_896
    assert case.cost.floor_us(bytes_per_s=4e12, flops_per_s=8e14) == pytest.approx(2.230272)
    assert case.cost.floor_us(bytes_per_s=4e12, flops_per_s=1e12) == pytest.approx(8.912896)
    assert BUILDS["truncate"](cases).cost.num_bytes == 2 * 2 * 300
    assert BUILDS["cascade"](cases).cost is None

    # Two slots of 8 + 3 positions, keys and values of 2 heads of 8; 3 rows of 4 heads in and out.
    cost = small_shape(cases).cost
    assert cost.num_bytes == 2 * (2 * 11 * 2 * 2 * 8) + 2 * (2 * 2 * 3 * 4 * 8)
    assert cost.num_flops == 2 * 2 * (2 * 4 * 8) * (3 * 9)
    # Five rows of a chunk see 9, 10, ... 13 positions.
    cost = small_shape(cases, num_rows=5, kind="chain").cost
    assert cost.num_flops == 2 * 2 * (2 * 4 * 8) * (9 + 10 + 11 + 12 + 13)


def test_the_suites_have_the_sizes_asked_for(cases: ModuleType, speed: ModuleType) -> None:
    counts = {operation: len(builds) for operation, builds in cases.SUITES.items()}
    assert counts == {
        "truncate": 12,
        "score": 21,
        "cascade": 9,
        "attention": 76,
        "bookkeeping": 16,
        "layers": 12,
    }
    for operation, axis, num_values in (
        ("truncate", "vocab_size", 3),
        ("score", "hidden_size", 3),
    ):
        quick = cases.SUITES[operation][:: speed.QUICK_STEP]
        assert len({build.keywords[axis] for build in quick}) == num_values
    quick = cases.SUITES["bookkeeping"][:: speed.QUICK_STEP]
    assert len({b.keywords["step"] for b in quick}) == 4
    assert len({b.keywords["num_slots"] for b in quick}) == 4
    quick = [b.keywords["shape"] for b in cases.SUITES["attention"][:: speed.QUICK_STEP]]
    assert {shape.num_rows for shape in quick} >= {1, 8, 40}
    assert {shape.num_slots for shape in quick} == {1, 8, 64}
    assert {shape.length for shape in quick} == {512, 2048, 8192, 16384}


def test_without_a_gpu_nothing_is_measured(
    speed: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "figures.json"
    assert speed.main(["--quick", "--operation", "score", "cascade", "--output", str(output)]) == 0
    assert capsys.readouterr().out == "kernel_speed: there is no GPU here; nothing is measured\n"
    assert not output.exists()


def test_other_bodies_than_the_compiled_kernels_are_refused(
    speed: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "MARA_KERNELS=torch" in speed.check_bodies(["score"], CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" in speed.check_bodies(["score"], CPU)


def timer_of(speed: ModuleType, **microseconds: float) -> Callable[[Any], Any]:
    """A timer that knows the answers."""

    def timer(version: Any) -> Any:
        p50 = microseconds[version.name]
        return speed.Timing(p50 - 1, p50, p50 + 1, "graph")

    return timer


def test_a_row_has_ratios_and_targets(
    cases: ModuleType, speed: ModuleType, report: ModuleType
) -> None:
    case = cases.truncate.truncate_case(CPU, 0, num_rows=64, vocab_size=300)
    # 38400 bytes take 9.6 us.
    ceilings = speed.Ceilings(bytes_per_s=4e9, flops_per_s=1e12)
    timer = timer_of(speed, ours=12.0, topk=30.0, **{"Hugging Face": 6.0})
    row = speed.measure_case(case, ceilings, timer)
    assert row["floor"] == pytest.approx(9.6) and row["times_floor"] == pytest.approx(1.25)
    assert row["ours"] == {"p20": 11.0, "p50": 12.0, "p80": 13.0, "by": "graph"}
    assert row["baselines"]["topk"]["speed_up"] == 2.5
    assert row["baselines"]["Hugging Face"]["speed_up"] == 0.5
    assert "GPU" in row["baselines"]["torch.compile"]["skipped"]
    assert row["targets"] == {report.WITHIN_FLOOR: True, report.FASTEST: False}
    assert not report.is_faulty(row)
    assert "1.25x" in report.line_of(row) and "topk 30.0 (2.50x)" in report.line_of(row)
    row["baselines"]["topk"]["by"] = "launches"
    assert "topk 30.0 (2.50x by launches)" in report.line_of(row)
    [remark] = report.remarks_on(row)
    assert "torch.compile skipped" in remark
    assert report.summary([row]) == [
        f"truncate, {report.WITHIN_FLOOR}: 1 of 1",
        f"truncate, {report.FASTEST}: 0 of 1",
        "    not B=64 V=300: 0.50 x the fastest baseline",
    ]


def test_what_is_wrong_gets_no_figures(
    cases: ModuleType, speed: ModuleType, report: ModuleType
) -> None:
    ceilings = speed.Ceilings(bytes_per_s=4e9, flops_per_s=1e12)
    timer = timer_of(speed, ours=1.0, torch=2.0)
    case = BUILDS["cascade"](cases)
    right = case.ours.run
    wrong = cases.Version(
        name="torch",
        run=lambda *inputs: corruptions("cascade", right(*inputs))[0],
        inputs=case.ours.inputs,
    )
    case.baselines[:] = [wrong]
    row = speed.measure_case(case, ceilings, timer)
    assert row["baselines"]["torch"] == {"wrong": "row differs"} and row["targets"] == {}
    assert report.line_of(row).endswith("torch WRONG: row differs")
    assert report.is_faulty(row) and report.summary([row]) == ["faulty: cascade B=4 W=3"]

    row = speed.measure_case(cases.Case(**(vars(case) | {"ours": wrong})), ceilings, timer)
    assert row["wrong"] == "row differs" and "ours" not in row and "baselines" not in row
    assert report.line_of(row).endswith("WRONG: row differs") and report.is_faulty(row)


def test_failures_are_reported_and_the_rest_goes_on(
    cases: ModuleType, speed: ModuleType, report: ModuleType
) -> None:
    def fails(*arguments: Any) -> Any:
        raise RuntimeError("no such kernel\nand a trace")

    ceilings = speed.Ceilings(bytes_per_s=4e9, flops_per_s=1e12)
    row = speed.attempt(fails, CPU, 0, ceilings, timer_of(speed))
    assert row["failed"] == "RuntimeError: no such kernel"
    case = BUILDS["cascade"](cases)
    case.baselines[:] = [cases.Version(name="torch", run=fails, inputs=case.ours.inputs)]
    row = speed.attempt(lambda *_: case, CPU, 0, ceilings, timer_of(speed, ours=1.0))
    assert row["baselines"]["torch"] == {"skipped": "RuntimeError: no such kernel"}
    assert not report.is_faulty(row)


class FakeEvent:
    """An event on a clock that a fake kernel moves."""

    now_ms = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at_ms = FakeEvent.now_ms

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.at_ms - self.at_ms


@pytest.mark.parametrize("can_capture", [True, False])
def test_the_timer_counts_calls(
    cases: ModuleType, speed: ModuleType, monkeypatch: pytest.MonkeyPatch, can_capture: bool
) -> None:
    seen: list[int] = []

    def kernel(index: int) -> None:
        seen.append(index)
        FakeEvent.now_ms += 0.02 * (index + 1)

    def capture(calls: Callable[[], None]) -> Callable[[], None]:
        if not can_capture:
            raise RuntimeError("not permitted when stream is capturing")
        return calls

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(speed, "capture", capture)
    version = cases.Version(name="ours", run=kernel, inputs=[(0,), (1,), (2,)])
    timing = speed.time_version(version, budget_ms=20)
    # 20, 40 and 60 us in turn.
    assert [timing.p20, timing.p50, timing.p80] == pytest.approx([40, 40, 40])
    assert timing.by == ("graph" if can_capture else "launches")
    assert seen == [0, 1, 2] * (len(seen) // 3)
    # Rounds of 0.12 ms fill a graph of 1 ms with nine, of which 19 are 20 ms.
    assert len(seen) == 3 * (2 + 9 * (3 + 19))


def test_the_whole_run_but_for_the_gpu(
    cases: ModuleType,
    speed: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    timer = timer_of(
        speed,
        ours=2.0,
        torch=4.0,
        topk=3.0,
        **{"Hugging Face": 5.0, "SDPA, mask": 1.0},
        **{"SDPA, copies": 9.0},
    )
    suites = {name: [lambda *_, name=name: BUILDS[name](cases)] for name in cases.SUITES}
    ceilings = speed.Ceilings(bytes_per_s=4e12, flops_per_s=8e14)
    monkeypatch.setattr(speed, "SUITES", suites)
    monkeypatch.setattr(speed, "environment", lambda device, commit: {"commit": commit})
    monkeypatch.setattr(speed, "measure_ceilings", lambda *_: ceilings)
    monkeypatch.setattr(speed, "time_version", lambda version, budget_ms: timer(version))
    properties = SimpleNamespace(L2_cache_size=60e6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    output = tmp_path / "results" / "figures.json"
    options = speed.parse(["--output", str(output), "--commit", "abc"])
    assert isinstance(options, argparse.Namespace)
    report = speed.run(options, CPU)
    assert [row["operation"] for row in report["rows"]] == list(cases.SUITES)
    assert json.loads(output.read_text(encoding="utf-8")) == report
    assert report["commit"] == "abc"
    printed = capsys.readouterr().out
    assert "attention, faster than every baseline: 0 of 1" in printed
    assert "score, faster than every baseline: 1 of 1" in printed
    speed.run(speed.parse(["--operation", "score"]), CPU)
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last)["rows"][0]["operation"] == "score"
