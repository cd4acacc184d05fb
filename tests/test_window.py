"""The automatic window: a cost measured once, and the window that is cheapest by it."""

import json
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
    StepCosts,
    forwards_per_decided,
    measured_costs,
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


def test_costs_between_and_beyond_what_was_measured() -> None:
    costs = StepCosts([1, 2, 4], [1.0, 3.0, 4.0])
    assert [costs.of(rows) for rows in (1, 2, 3, 4, 8)] == [1.0, 3.0, 3.5, 4.0, 6.0]
    # Nobody pays more for fewer rows: they can be padded.
    assert StepCosts([1, 2, 4], [5.0, 9.0, 4.0]).seconds == [4.0, 4.0, 4.0]
    for rows in ([1], [2, 1], [1, 1]):
        with pytest.raises(ValueError, match="expected two rising numbers of rows"):
            StepCosts(rows, [1.0] * len(rows))


def test_the_cheapest_window() -> None:
    free = StepCosts([1, 160, 320], [1.0, 1.0, 2.0])
    windows = [free.best_window(slots, examines_all=False) for slots in (1, 8, 32, 160)]
    assert windows[0] == windows[1] == 10 and 1 < windows[2] < 10 and windows[3] == 1
    by_row = StepCosts([1, 2], [1.0, 2.0])
    assert by_row.best_window(1, examines_all=False) == 1
    assert by_row.best_window(1, examines_all=True) in (1, 2, 5, 10)
    # Where a forced token costs one row, two are worth it sooner.
    some = StepCosts([1, 2, 3], [1.0, 1.3, 9.0])
    assert some.best_window(1, examines_all=False) == 1
    assert some.best_window(1, examines_all=False, leaves_out=True) == 2
    assert some.best_window(2, examines_all=False, leaves_out=True) == 1
    flat = StepCosts([1, 2], [1.0, 1.0])
    assert flat.best_window(64, examines_all=True) == 10


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mara_fast/step_costs.json"


@pytest.mark.parametrize("capture", [None, TapeCapture()])
def test_measured_once_and_kept(capture: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = Engine(ARCHITECTURES["llama"](), False).lm
    costs = measured_costs(lm, capture)
    assert costs.rows[0] == 1 and all(second > 0 for second in costs.seconds)
    [(key, seconds)] = json.loads(cache.read_text()).items()
    assert "LlamaForCausalLM" in key and ("captured" in key) is (capture is not None)
    monkeypatch.setattr(mara_fast.window, "_measure", lambda *args: pytest.fail("again"))
    assert (
        measured_costs(lm, capture).seconds
        == costs.seconds
        == StepCosts(costs.rows, seconds).seconds
    )


@pytest.mark.parametrize("content", ["", "[]", '{"x": 3}', "{"])
def test_what_is_damaged_is_measured_anew(content: str, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    lm = Engine(ARCHITECTURES["llama"](), False).lm
    measured_costs(lm, None)
    assert json.loads(cache.read_text())


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    measured_costs(Engine(ARCHITECTURES["llama"](), False).lm, None)


@pytest.mark.parametrize("host_reads", [True, False])
def test_the_window_follows_the_slots(host_reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a batch empties the window widens; the tokens stay."""
    monkeypatch.setattr("mara_fast.engine._host_reads", lambda device: host_reads)
    model = ARCHITECTURES["llama"]()
    engine = Engine(model, random_agent(48), max_batch_size=4, prefill_chunk=5)
    engine._costs = StepCosts([1, 8, 16], [1.0, 1.0, 2.5])
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
