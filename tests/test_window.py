"""The automatic shape of a step: a cost measured once, and what is cheapest by it."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mara_fast.decoder
import mara_fast.language_model
import mara_fast.step_costs
from architectures import ARCHITECTURES, random_prompt
from exactness import check_exact, random_agent
from mara_fast import Engine
from mara_fast.row_budget import StepShape
from mara_fast.step_costs import MeasuredCosts
from mara_fast.window import WINDOWS, StepCosts, steady_window, use_of
from tape import TapeCapture


def test_use_of_the_profile() -> None:
    # 0.70, 0.17, 0.08 found in the first, second, third; 0.05 after ten. A third is forced.
    one = 0.70 + 2 * 0.17 + 3 * 0.08 + 10 * 0.05
    assert use_of(1, examines_all=False) == pytest.approx((1 / 3 + 2 / 3 * one,) * 2)
    assert use_of(10, examines_all=False) == pytest.approx((1, 1 / 3 + 2 / 3 * 10))
    # Three and three and three and one; all asked for.
    assert use_of(3, examines_all=True) == pytest.approx((1 / 3 + 2 / 3 * 4, 1 / 3 + 2 / 3 * 10))
    # The first alone; after a rejection, the next two; after three, the rest in eights.
    some = use_of(8, examines_all=False, least_worth=0.4)
    steps = 1 + 0.3 + 0.05
    assert some.num_steps == pytest.approx(1 / 3 + 2 / 3 * steps)
    assert some.num_rows == pytest.approx(1 / 3 + 2 / 3 * (1 + 0.3 * 2 + 0.05 * 7))
    for examines_all in (False, True):
        found = [use_of(window, examines_all=examines_all).num_steps for window in WINDOWS]
        assert found == sorted(found, reverse=True) and found[-1] == pytest.approx(1)


def by_rows(seconds: Callable[[int], float]) -> StepCosts:
    """Costs that depend on the number of rows alone."""
    return StepCosts(lambda num_slots, shape: seconds(shape.num_rows))


def test_the_cheapest_window() -> None:
    free = by_rows(lambda rows: max(1.0, rows / 160))
    windows = [free.best_shape(slots, examines_all=False).window for slots in (1, 8, 32, 160)]
    assert windows[0] == windows[1] == 10 and 1 < windows[2] < 10 and windows[3] == 1
    assert by_rows(float).best_shape(1, examines_all=False).window == 1
    flat = by_rows(lambda rows: 1.0)
    assert flat.best_shape(64, examines_all=True).window == 10
    # Where a forced token costs one row, two are worth it sooner.
    some = by_rows({1: 1.0, 2: 1.3, 3: 9.0}.__getitem__)
    assert some.best_shape(1, examines_all=False).window == 1
    assert some.best_shape(1, examines_all=False, leaves_out=True).window == 2


def test_a_budget_where_it_is_cheaper() -> None:
    """Between free rows and dear ones: more rows than slots, and fewer than two for each."""
    costs = by_rows(lambda rows: max(1.0, rows / 160))
    uniform = costs.best_shape(128, examines_all=False)
    budget = costs.best_shape(128, examines_all=False, can_pack=True)
    assert uniform == StepShape.uniform(128, 1)
    assert budget.window == 8 and 128 < budget.num_rows < 256
    # As many for each of fewer slots, and at least one.
    fewer = costs.best_shape(100, examines_all=False, can_pack=True)
    assert fewer.num_rows == -(-budget.num_rows * 100 // 128)
    # Rows that are free, or all dear, are not handed out; nor is a budget packed at a loss.
    for seconds in (lambda rows: 1.0, float):
        for slots in (2, 128):
            shape = by_rows(seconds).best_shape(slots, examines_all=False, can_pack=True)
            assert shape.num_rows == slots * shape.window
    lossy = StepCosts(
        lambda num_slots, shape: (
            max(1.0, shape.num_rows / 160) + 9 * (shape.num_rows != num_slots * shape.window)
        )
    )
    assert lossy.best_shape(128, examines_all=False, can_pack=True) == uniform


def test_only_what_matters_is_measured_and_once() -> None:
    asked: list[tuple[int, int]] = []

    def measure(num_slots: int, shape: StepShape) -> float:
        asked.append((num_slots, shape.window))
        return float(shape.num_rows)

    costs = StepCosts(measure, {(4, StepShape.uniform(4, 1)): 4.0})
    for num_slots in (3, 4, 3):
        assert costs.best_shape(num_slots, examines_all=False).window == 1
    # By powers of two, and no wider ones once a window is far too slow.
    assert asked == [(4, 2)] or asked == [(4, 2), (4, 3)]
    assert len(costs.known) == 1 + len(asked)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mara_fast/step_costs.json"


@pytest.mark.parametrize("capture", [None, TapeCapture()])
def test_measured_once_and_kept(capture: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = Engine(ARCHITECTURES["llama"](), False).lm
    costs = MeasuredCosts(lm, capture)
    best = costs.best_shape(2, examines_all=False, can_pack=True)
    [(key, seconds)] = json.loads(cache.read_text()).items()
    assert "LlamaForCausalLM" in key and ("captured" in key) is (capture is not None)
    assert "2 1 2" in seconds and all(value > 0 for value in seconds.values())
    monkeypatch.setattr(mara_fast.step_costs, "_measure", lambda *args: pytest.fail("again"))
    again = MeasuredCosts(lm, capture)
    assert (
        again.known == costs.known
        and again.best_shape(2, examines_all=False, can_pack=True) == best
    )


@pytest.mark.parametrize(
    "content", ["", "[]", '{"KEY": 3}', '{"KEY": {"2 1": 1}}', "{", '{"KEY": {"2 1 2": NaN}}']
)
def test_what_is_damaged_is_measured_anew(content: str, cache: Path) -> None:
    lm = Engine(ARCHITECTURES["llama"](), False).lm
    cache.parent.mkdir(parents=True)
    cache.write_text(content.replace("KEY", mara_fast.step_costs._key(lm, None)))
    costs = MeasuredCosts(lm, None)
    assert not costs.known and costs.best_shape(1, examines_all=True).window in WINDOWS
    assert json.loads(cache.read_text())


def test_costs_are_of_the_way_that_steps_run(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ARCHITECTURES["llama"]()
    keys = {
        mara_fast.step_costs._key(Engine(model, False, attention=attention).lm, capture)
        for attention in ("stock", "candidate")
        for capture in (None, TapeCapture())
    }
    monkeypatch.setenv("MARA_KERNELS", "attention=torch")
    keys.add(mara_fast.step_costs._key(Engine(model, False).lm, None))
    assert len(keys) == 5


def test_processes_that_share_a_model_choose_alike(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What process 0 read and measured holds; processes with a model each ask nobody."""
    lm = Engine(ARCHITECTURES["llama"](), False).lm
    theirs = {(1, StepShape.uniform(1, 1)): 7.0}
    monkeypatch.setattr(mara_fast.step_costs, "told_by_first", lambda value: pytest.fail("asked"))
    alone = MeasuredCosts(lm, None)
    assert alone.of(1, StepShape.uniform(1, 1)) < 7 and not {7.0} & set(alone.known.values())
    monkeypatch.setattr(
        mara_fast.step_costs, "told_by_first", lambda v: theirs if isinstance(v, dict) else 5.0
    )
    monkeypatch.setattr(mara_fast.language_model, "of_first", lambda hidden: hidden)
    monkeypatch.setattr(lm, "is_sharded", True)
    costs = MeasuredCosts(lm, None)
    assert costs.known == theirs and costs.of(1, StepShape.uniform(1, 2)) == 5


def test_memory_that_does_not_suffice_is_no_choice(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = Engine(ARCHITECTURES["llama"](), False).lm
    forward = lm.hidden_states

    def limited(ids: torch.Tensor, **others: Any) -> torch.Tensor:
        if ids.numel() > 4:
            raise torch.OutOfMemoryError("so many rows")
        return forward(ids, **others)

    monkeypatch.setattr(lm, "hidden_states", limited)
    costs = MeasuredCosts(lm, None)
    assert costs.best_shape(2, examines_all=True).num_rows <= 4
    [seconds] = json.loads(cache.read_text()).values()
    assert set(seconds) <= {"2 1 2", "2 2 4"}


def test_noise_is_no_gain() -> None:
    rng = random.Random(0)
    costs = StepCosts(lambda slots, shape: max(1.0, shape.num_rows / 160) * rng.uniform(0.99, 1.0))
    found = [costs.best_shape(slots, examines_all=True).window for slots in (1, 2, 4, 8)]
    assert found == [10] * 4


def test_a_step_of_a_cpu_forwards_what_was_handed_out() -> None:
    """Dear rows: a wide window does not pay where all are padded to it, and does where not."""
    costs = by_rows(lambda rows: 4.0 + rows)
    padded = costs.best_shape(4, examines_all=True, leaves_out=True).window
    packed = costs.best_shape(4, examines_all=True, leaves_out=True, can_pack=True)
    assert packed.window > padded


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    costs = MeasuredCosts(Engine(ARCHITECTURES["llama"](), False).lm, None)
    assert costs.best_shape(1, examines_all=False).window in WINDOWS


@pytest.mark.parametrize("host_reads", [True, False])
def test_the_window_follows_the_slots(host_reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a batch empties the window widens; the tokens stay."""
    monkeypatch.setattr("mara_fast.engine._host_reads", lambda device: host_reads)
    model = ARCHITECTURES["llama"]()
    engine = Engine(model, random_agent(48), max_batch_size=4, prefill_chunk=5)
    engine._costs = by_rows(lambda rows: max(1.0, rows / 8))
    engine.lm.can_pack = False
    config = engine.config()
    windows = [engine.step_shape(config, slots).window for slots in (1, 2, 4)]
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
