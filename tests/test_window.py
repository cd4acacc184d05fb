"""The automatic window: a cost measured once, and the window that is cheapest by it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mara_fast.decoder
import mara_fast.window
from architectures import ARCHITECTURES, random_prompt
from exactness import check_exact, random_agent
from mara_fast import Engine
from mara_fast.window import (
    WINDOWS,
    MeasuredCosts,
    StepCosts,
    forwards_per_decided,
    steady_window,
)
from tape import TapeCapture


def test_forwards_of_the_profile() -> None:
    # 0.70, 0.17, 0.08 found in the first, second, third; 0.05 after ten.
    one = 0.70 + 2 * 0.17 + 3 * 0.08 + 10 * 0.05
    assert forwards_per_decided(1, examines_all=False) == pytest.approx(one)
    assert forwards_per_decided(10, examines_all=False) == pytest.approx(1)
    assert forwards_per_decided(4, examines_all=True) == 3
    for examines_all in (False, True):
        found = [forwards_per_decided(window, examines_all=examines_all) for window in WINDOWS]
        assert found == sorted(found, reverse=True) and found[-1] == pytest.approx(1)


def by_rows(seconds: Callable[[int], float]) -> StepCosts:
    """Costs that depend on the number of rows alone."""
    return StepCosts(lambda num_slots, window: seconds(num_slots * window))


def test_the_cheapest_window() -> None:
    free = by_rows(lambda rows: max(1.0, rows / 160))
    windows = [free.best_window(slots, examines_all=False) for slots in (1, 8, 32, 160)]
    assert windows[0] == windows[1] == 10 and 1 < windows[2] < 10 and windows[3] == 1
    assert by_rows(float).best_window(1, examines_all=False) == 1
    flat = by_rows(lambda rows: 1.0)
    assert flat.best_window(64, examines_all=True) == 10
    # Where a forced token costs one row, two are worth it sooner.
    some = by_rows({1: 1.0, 2: 1.3, 3: 9.0}.__getitem__)
    assert some.best_window(1, examines_all=False) == 1
    assert some.best_window(1, examines_all=False, leaves_out=True) == 2


def test_only_what_matters_is_measured_and_once() -> None:
    asked: list[tuple[int, int]] = []

    def measure(num_slots: int, window: int) -> float:
        asked.append((num_slots, window))
        return float(num_slots * window)

    costs = StepCosts(measure, {(4, 1): 4.0})
    for num_slots in (3, 4, 3):
        assert costs.best_window(num_slots, examines_all=False) == 1
    # By powers of two, and no wider ones once a window is far too slow.
    assert asked == [(4, 2)] or asked == [(4, 2), (4, 3)]
    assert costs.num_measured == len(asked)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mara_fast/step_costs.json"


@pytest.mark.parametrize("capture", [None, TapeCapture()])
def test_measured_once_and_kept(capture: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = Engine(ARCHITECTURES["llama"](), False).lm
    costs = MeasuredCosts(lm, capture)
    best = costs.best_window(2, examines_all=False)
    [(key, seconds)] = json.loads(cache.read_text()).items()
    assert "LlamaForCausalLM" in key and ("captured" in key) is (capture is not None)
    assert "2x1" in seconds and all(value > 0 for value in seconds.values())
    monkeypatch.setattr(mara_fast.window, "_measure", lambda *args: pytest.fail("again"))
    again = MeasuredCosts(lm, capture)
    assert again.known == costs.known and again.best_window(2, examines_all=False) == best


@pytest.mark.parametrize("content", ["", "[]", '{"KEY": 3}', '{"KEY": {"2": 1}}', "{"])
def test_what_is_damaged_is_measured_anew(content: str, cache: Path) -> None:
    lm = Engine(ARCHITECTURES["llama"](), False).lm
    cache.parent.mkdir(parents=True)
    cache.write_text(content.replace("KEY", mara_fast.window._key(lm, None)))
    costs = MeasuredCosts(lm, None)
    assert not costs.known and costs.best_window(1, examines_all=True) in WINDOWS
    assert json.loads(cache.read_text())


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    costs = MeasuredCosts(Engine(ARCHITECTURES["llama"](), False).lm, None)
    assert costs.best_window(1, examines_all=False) in WINDOWS


@pytest.mark.parametrize("host_reads", [True, False])
def test_the_window_follows_the_slots(host_reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a batch empties the window widens; the tokens stay."""
    monkeypatch.setattr("mara_fast.engine._host_reads", lambda device: host_reads)
    model = ARCHITECTURES["llama"]()
    engine = Engine(model, random_agent(48), max_batch_size=4, prefill_chunk=5)
    engine._costs = by_rows(lambda rows: max(1.0, rows / 8))
    config = engine.config()
    windows = [engine.window(config, slots) for slots in (1, 2, 4)]
    assert windows[0] > windows[1] > windows[2] >= 1
    used = set()
    original = mara_fast.decoder.siblings

    def siblings(num_rows: int, device: Any) -> Any:
        used.add(num_rows)
        return original(num_rows, device)

    monkeypatch.setattr(mara_fast.decoder, "siblings", siblings)
    prompts = [random_prompt(model, length, seed=length) for length in (3, 9, 4, 12, 5, 7)]
    check_exact(engine, prompts, max_new_tokens=8, eos_token_id=tuple(range(3, 90)))
    assert len(used) > 1


def test_a_steady_window_measures_nothing() -> None:
    assert [steady_window(n, examines_all=False, on_cpu=True) for n in (1, 2, 64)] == [3, 1, 1]
    found = [steady_window(n, examines_all=False, on_cpu=False) for n in (1, 8, 9, 33, 65, 101)]
    assert found == [8, 8, 4, 3, 2, 1]
    assert steady_window(8, examines_all=True, on_cpu=False) == 20
