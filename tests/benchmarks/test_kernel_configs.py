"""The search among launch configurations, as far as a CPU can tell: entries, neighbours, climbs."""

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mara_kernels import configs
from mara_kernels.configs import ARCHITECTURES, AttentionConfig, ScoreConfig

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
CENTRE = AttentionConfig(16, 64, 4, 3)


@pytest.fixture(scope="module")
def search() -> ModuleType:
    """kernel_configs.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("kernel_configs")


@pytest.fixture(scope="module")
def entries(search: ModuleType) -> ModuleType:
    """kernel_cases/entries.py, which it imports."""
    return importlib.import_module("kernel_cases.entries")


# --- entries and their neighbours ------------------------------------------------------------


class Asked(Exception):
    """For a configuration."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("operation", ["truncate", "score", "attention"])
def test_entries_are_those_of_the_tables(
    entries: ModuleType, architecture: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table: Any = getattr(
        configs, {"truncate": "TRUNCATE"}.get(operation, f"{operation.upper()}_HALF")
    )[architecture]
    if operation == "attention":
        table = {(size, most): one for size, rows in table.items() for most, one in rows.items()}
    wanted = list(table.values()) if isinstance(table, dict) else [table]
    found = entries.entries_of(architecture, operation)
    assert [one.config for one in found] == wanted
    assert len({one.name for one in found}) == len(found)

    look_up = getattr(configs, f"{operation}_config")

    def ask(*arguments: Any) -> None:
        raise Asked(look_up(*arguments))

    monkeypatch.setattr(f"mara_kernels.{operation}.kernel.{operation}_config", ask)
    for entry in found:
        for call in entry.calls:
            with pytest.raises(Asked) as asked:
                call.call(architecture)
            # What the entry is launched for is what the tables launch it for.
            assert asked.value.args[0] is entry.config, call.name


def test_timed_sizes_are_those_of_the_entry(entries: ModuleType) -> None:
    for entry in entries.entries_of("sm_90", "score"):
        for build in entry.builds:
            num_states = build.keywords["num_states"]
            assert configs.score_config("sm_90", torch.bfloat16, num_states) is entry.config
    for entry in entries.entries_of("sm_90", "attention"):
        for build in entry.builds:
            shape = build.keywords["shape"]
            packed = shape.num_rows * shape.num_heads // shape.num_kv_heads
            found = configs.attention_config("sm_90", torch.bfloat16, shape.head_size, packed)
            assert found is entry.config


def test_neighbours(entries: ModuleType) -> None:
    found = entries.neighbours(CENTRE)
    assert len(set(found)) == len(found)
    assert {one.block_m for one in found} == {16, 32}
    assert {one.num_stages for one in found} == {2, 3, 4}
    assert {one.programs for one in found} == {1, 2, 4}
    assert {one.precision for one in found} == {"ieee"}
    for one in found:
        assert sum(a != b for a, b in zip(one, CENTRE, strict=True)) == 1
    tail = {one.finish_block_n for one in entries.neighbours(ScoreConfig(*[16] * 12))}
    assert tail == {8, 16, 32}


@pytest.mark.parametrize("operation", ["truncate", "score", "attention"])
def test_a_configuration_is_used(entries: ModuleType, operation: str) -> None:
    module = importlib.import_module(f"mara_kernels.{operation}.kernel")
    with entries.using(operation, CENTRE):
        assert getattr(module, f"{operation}_config")("sm_90", 1, 2, 3) is CENTRE
    assert getattr(module, f"{operation}_config") is getattr(configs, f"{operation}_config")


# --- climbing --------------------------------------------------------------------------------


def entry_of(entries: ModuleType, name: str = "some", config: Any = CENTRE) -> Any:
    return entries.Entry(operation="attention", name=name, config=config, calls=(), builds=())


def cost(config: AttentionConfig) -> float:
    """Least at blocks of 64 x 32."""
    return 1 + abs(math.log2(config.block_m / 64)) + abs(math.log2(config.block_n / 32))


def run(
    search: ModuleType,
    some: list[Any],
    measure: Callable[[Any, Any], list[float]] | None,
    fault: Callable[[Any], str] = lambda config: "",
    **options: Any,
) -> tuple[list[Any], tuple[list[str], list[str]]]:
    """The climbs that came to their end, and what ``search`` returns."""
    found: list[Any] = []
    settings: dict[str, Any] = {"rounds": 9, "seconds": 60} | options
    returned = search.search(
        some,
        submit=lambda entry, config: lambda: fault(config),
        measure=measure,
        done=found.append,
        **settings,
    )
    return found, returned


def test_a_climb_ends_at_the_best(search: ModuleType, entries: ModuleType) -> None:
    def measure(entry: Any, config: Any) -> list[float]:
        return [cost(config), 3 * cost(config)]

    (climb,), returned = run(search, [entry_of(entries)], measure)
    assert returned == ([], []) and climb.best == AttentionConfig(64, 32, 4, 3)
    assert climb.ratio == pytest.approx(1 / cost(CENTRE)) and climb.num_rounds == 4
    row = json.loads(json.dumps(climb.row()))
    assert row["best"]["block_m"] == 64 and len(row["tried"]) == len(climb.tried)
    assert [str(climb.best) in line for line in climb.lines()] == [False, False, True]
    (climb,), _ = run(search, [entry_of(entries)], measure, rounds=1)
    assert cost(climb.best) == cost(CENTRE) - 1


def test_what_falls_out_is_not_taken(search: ModuleType, entries: ModuleType) -> None:
    timed = []

    def measure(entry: Any, config: Any) -> list[float]:
        timed.append(config)
        if config.num_warps == 8:
            raise ValueError("error 1 of the output")
        return [cost(config)]

    (climb,), returned = run(
        search,
        [entry_of(entries)],
        measure,
        lambda config: "attend: 8 spills" if config.block_m == 64 else "",
    )
    assert returned == ([], []) and climb.best == AttentionConfig(32, 32, 4, 3)
    assert all(config.block_m != 64 for config in timed)
    assert climb.tried[climb.best._replace(block_m=64)].fault == "attend: 8 spills"
    assert climb.tried[CENTRE._replace(num_warps=8)].fault == "ValueError: error 1 of the output"


def test_noise_is_no_gain(search: ModuleType, entries: ModuleType) -> None:
    """One that was measured fast once, and is not."""
    times = {CENTRE._replace(block_m=32): [0.5]}

    def measure(entry: Any, config: Any) -> list[float]:
        return [(times.get(config) or [1.0]).pop()]

    (climb,), _ = run(search, [entry_of(entries)], measure)
    assert climb.num_rounds > 1 and climb.best == CENTRE and climb.ratio == 1.0
    assert len(climb.lines()) == 1


def test_one_entry_costs_no_other_anything(search: ModuleType, entries: ModuleType) -> None:
    some = [entry_of(entries, name) for name in ("broken", "whole")]

    def measure(entry: Any, config: Any) -> list[float]:
        if entry.name == "broken":
            raise RuntimeError("illegal memory access")
        return [cost(config)]

    (climb,), returned = run(search, some, measure)
    assert climb.entry.name == "whole" and cost(climb.best) == 1
    assert returned == (["broken: as it is: RuntimeError: illegal memory access"], [])
    assert run(search, some, measure, seconds=-1) == ([], ([], ["broken", "whole"]))


def test_an_entry_that_breaks_when_it_is_confirmed(search: ModuleType, entries: ModuleType) -> None:
    counts = {"broken": 0, "whole": 0}

    def measure(entry: Any, config: Any) -> list[float]:
        counts[entry.name] += 1
        # Beyond the neighbours of one round and what is shipped.
        if entry.name == "broken" and counts["broken"] > 1 + len(entries.neighbours(CENTRE)):
            raise RuntimeError("out of memory")
        return [cost(config)]

    some = [entry_of(entries, name) for name in counts]
    (climb,), returned = run(search, some, measure, rounds=1)
    assert climb.entry.name == "whole"
    assert returned == (["broken: confirming it: RuntimeError: out of memory"], [])


def test_without_a_gpu_everything_is_compiled(search: ModuleType, entries: ModuleType) -> None:
    (climb,), returned = run(
        search, [entry_of(entries)], None, lambda one: "spills" * (one.num_warps == 8)
    )
    assert returned == ([], []) and set(climb.tried) == set(entries.neighbours(CENTRE))
    assert [one.ratio for one in climb.tried.values()] == [None] * len(climb.tried)
    (line,) = climb.lines()
    assert line.endswith("tried,   1 fell out")


def test_a_compilation_that_hangs_falls_out(
    search: ModuleType, entries: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import multiprocessing.pool

    monkeypatch.setattr(search, "_PATIENCE_S", 0.05)
    monkeypatch.setattr(search, "compile_config", lambda *arguments: __import__("time").sleep(0.5))
    with multiprocessing.pool.ThreadPool(1) as pool:
        ready = search.submit_to(pool, "sm_90", entry_of(entries), CENTRE)
        assert ready() == "not compiled after 0 s"


# --- compiling, and the command --------------------------------------------------------------


def command(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    ignored = ("TRITON_INTERPRET", "MARA_KERNELS")
    env = {name: value for name, value in os.environ.items() if name not in ignored}
    paths = [ROOT, ROOT / "kernels", ROOT / "train"]
    env |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, str(BENCHMARKS / "kernel_configs.py"), *arguments]
    return subprocess.run(line, env=env | variables, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_neighbours_are_compiled(tmp_path: Path) -> None:
    output = tmp_path / "configs.json"
    done = command("--compile", "sm_90", "--operation", "truncate", "--output", str(output))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(output.read_text())["rows"]
    assert len(row["tried"]) >= 5 and not any(one["fault"] for one in row["tried"])
    assert "truncate" in done.stdout and "fell out" in done.stdout


@pytest.mark.slow
def test_spills_are_told(search: ModuleType) -> None:
    """In a process of its own: here the kernels may be interpreted."""
    code = (
        "from kernel_configs import compile_config; from mara_kernels.configs import *;"
        "print(compile_config('sm_90', 'attention', 'attention, head size 128, M 65+', "
        "AttentionConfig(128, 64, 4, 3)))"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MARA_KERNELS")}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (BENCHMARKS, ROOT, ROOT / "kernels")))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "attend: " in done.stdout and "spills" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rounds", "0"), "--rounds=0 is not allowed; allowed: an integer >= 1"),
        (("--seconds", "nan"), "--seconds=nan is not allowed; allowed: a number above 0"),
        (("--operation", "cascade"), "invalid choice: 'cascade'"),
        (("--compile", "sm_70"), "invalid choice: 'sm_70'"),
        (("--output", str(BENCHMARKS)), "is a folder, expected a file"),
        (("--output", f"{__file__}/x.json"), "File exists"),
    ],
)
def test_bad_options(
    search: ModuleType,
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit, match="2"):
        search.parse(list(arguments))
    assert message in capsys.readouterr().err


def test_interpreted_kernels_are_refused(
    search: ModuleType, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="2"):
        search.parse([])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(
    search: ModuleType, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert search.main([]) == 0
    assert "there is no GPU here; --compile" in capsys.readouterr().out
