"""Rows handed out by worth, packed into one sequence: any hand-out gives the tokens of all."""

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import mara_fast.decoder
from architectures import ARCHITECTURES, random_prompt
from exactness import FixedBudget, check_exact, random_agent
from host_reads import ForbidHostReads
from mara_fast import Engine
from mara_fast.cache import SlotCache
from mara_fast.row_budget import Packing, StepShape, hand_out, survival
from mara_kernels.cascade import FALLBACKS, ORDERS, STRATEGIES
from tape import TapeCapture

PROFILE = torch.tensor(survival(examines_all=False))


def counts(offset: list[int], size: list[int], shape: StepShape, left: Tensor = PROFILE) -> Any:
    return hand_out(torch.tensor(offset), torch.tensor(size), shape, left).tolist()


def test_survival_of_the_profile() -> None:
    assert survival(examines_all=False) == pytest.approx((1.0, 0.30, 0.13, 0.05))
    assert survival(examines_all=True) == (1.0,)


def test_rows_go_where_they_are_worth_most() -> None:
    # Behind rejections the next rows are likelier to be asked for: after three, all of them.
    assert counts([0, 1, 3], [10, 10, 10], StepShape(window=8, num_rows=6)) == [1, 1, 4]
    assert counts([0, 1, 3], [10, 10, 10], StepShape(window=8, num_rows=10)) == [1, 2, 7]
    assert counts([0, 1, 3], [10, 10, 5], StepShape(window=8, num_rows=7)) == [2, 3, 2]
    # A forced token takes one row, an idle slot none; nobody gets rows past the set.
    assert counts([0, 0, 0], [1, 0, 3], StepShape(window=4, num_rows=8)) == [1, 0, 3]
    # As many rows as anyone may want: no one is preferred.
    assert counts([0, 2, 0], [9, 3, 2], StepShape.uniform(3, 4)) == [4, 1, 2]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_hand_out_is_fair_and_greedy(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=9), "sizes")
    offsets = [data.draw(st.integers(0, max(size - 1, 0))) for size in sizes]
    window = data.draw(st.integers(1, 9), "window")
    num_rows = data.draw(st.integers(len(sizes), len(sizes) * window), "rows")
    found = counts(offsets, sizes, StepShape(window=window, num_rows=num_rows))
    wanted = [min(window, size - offset) for size, offset in zip(sizes, offsets, strict=True)]
    assert sum(found) == min(num_rows, sum(wanted))
    profile = PROFILE.tolist()

    def worth(slot: int, row: int) -> float:
        left = [profile[min(offsets[slot] + r, len(profile) - 1)] for r in (0, row)]
        return left[1] / left[0]

    for slot, (count, most) in enumerate(zip(found, wanted, strict=True)):
        assert min(1, most) <= count <= most
        for other, (theirs, their_most) in enumerate(zip(found, wanted, strict=True)):
            if count > 1 and theirs < their_most:
                assert worth(slot, count - 1) >= worth(other, theirs)


def test_packed_and_back() -> None:
    count = torch.tensor([2, 0, 3, 1])
    packing = Packing.of(count, StepShape(window=3, num_rows=8))
    rows = torch.arange(4 * 2 * 3 * 5).view(4, 2, 3, 5)
    packed = packing.pack(rows)
    assert packed.shape == (1, 2, 8, 5)
    held = [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2), (3, 0)]
    for place, (slot, column) in enumerate(held):
        assert torch.equal(packed[0, :, place], rows[slot, :, column])
    unpacked = packing.unpack(packed)
    for slot, column in held:
        assert torch.equal(unpacked[slot, :, column], rows[slot, :, column])
    for slot, column in ((0, 2), (3, 1), (3, 2)):
        assert torch.equal(unpacked[slot, :, column], rows[slot, :, 0])


@cache
def model_of(name: str, device: str = "cpu") -> Any:
    return ARCHITECTURES[name]().to(device)


@cache
def memo_of(name: str) -> dict:
    return {}


def engine_with(name: str, costs: FixedBudget, device: str = "cpu", **options: Any) -> Engine:
    model = model_of(name, device)
    agent = random_agent(model.get_input_embeddings().weight.shape[1]).to(device)
    engine = Engine(model, agent, **options)
    engine._costs = costs
    return engine


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_packs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_with(name, FixedBudget(4, 1.5), max_batch_size=3, prefill_chunk=7)
    assert engine.lm.can_pack
    monkeypatch.setattr("mara_fast.engine._host_reads", lambda device: False)
    prompts = [random_prompt(model_of(name), length, seed=length) for length in (16, 3, 9, 5)]
    check_exact(engine, prompts, memo=memo_of(name), max_new_tokens=8, top_k=8)


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_budget(data: st.DataObject) -> None:
    check_any_budget(data)


@pytest.mark.gpu
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_budget_on_a_gpu(data: st.DataObject) -> None:
    check_any_budget(data, "cuda")


def check_any_budget(data: st.DataObject, device: str = "cpu") -> None:
    name = data.draw(st.sampled_from(("llama", "gemma2", "gpt_oss", "gpt2")), "architecture")
    costs = FixedBudget(
        data.draw(st.integers(1, 9), "widest"), data.draw(st.floats(1, 6), "rows per slot")
    )
    num_slots = data.draw(st.integers(1, 5), "slots")
    engine = engine_with(name, costs, device, max_batch_size=num_slots, prefill_chunk=3)
    lengths = data.draw(st.lists(st.integers(1, 14), min_size=1, max_size=7), "lengths")
    prompts = [random_prompt(model_of(name, device), n, seed=i) for i, n in enumerate(lengths)]
    options = {
        "top_k": data.draw(st.sampled_from([2, 5, 40]), "top_k"),
        "acceptance": data.draw(st.sampled_from(["greedy", "sample"]), "acceptance"),
        "threshold": data.draw(st.sampled_from([0.5, 0.9]), "threshold"),
        "strategy": data.draw(st.sampled_from(STRATEGIES), "strategy"),
        "fallback": data.draw(st.sampled_from(FALLBACKS), "fallback"),
        "order": data.draw(st.sampled_from(ORDERS), "order"),
        "eos_token_id": data.draw(st.sampled_from([(1,), tuple(range(3, 60))]), "eos"),
        "trace": data.draw(st.booleans(), "trace"),
    }
    with pytest.MonkeyPatch.context() as patch:
        host_reads = device == "cpu" and data.draw(st.booleans(), "host reads")
        patch.setattr("mara_fast.engine._host_reads", lambda device: host_reads)
        if device == "cpu" and not host_reads and data.draw(st.booleans(), "captured"):
            engine._capture = TapeCapture()
        check_exact(engine, prompts, memo=memo_of(name), max_new_tokens=6, **options)


@pytest.mark.parametrize("rows_per_slot", [1.0, 1.5])
def test_a_packed_step_reads_nothing_on_the_host(
    rows_per_slot: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mara_fast.engine._host_reads", lambda device: False)
    engine = engine_with("llama", FixedBudget(4, rows_per_slot), max_batch_size=4)
    seen = []
    step = mara_fast.decoder.Decoder.step

    def watched(decoder: Any, num_decoding: int) -> None:
        with ForbidHostReads():
            step(decoder, num_decoding)
        seen.append(num_decoding)

    monkeypatch.setattr(mara_fast.decoder.Decoder, "step", watched)
    prompts = [random_prompt(model_of("llama"), length, seed=length) for length in (5, 3, 9, 4)]
    check_exact(engine, prompts, memo=memo_of("llama"), max_new_tokens=6)
    assert max(seen) == 4


def test_no_row_of_an_earlier_step_stays() -> None:
    """Where masked keys still enter products, a NaN in a row that nobody writes would spread."""
    cache = SlotCache(num_slots=2, max_length=5, scratch=3)
    cache.select(slice(0, 2), base=4)
    rows = torch.full((2, 1, 3, 2), torch.nan)
    cache.update(rows, rows, 0)
    packing = Packing.of(torch.tensor([1, 2]), StepShape(window=3, num_rows=3))
    cache.select(slice(0, 2), base=4, packing=packing)
    packed = torch.arange(6.0).view(1, 1, 3, 2)
    for found in cache.update(packed, packed, 0):
        assert found[0, 0, 4:].tolist() == [[0, 1]] * 3
        assert found[1, 0, 4:].tolist() == [[2, 3], [4, 5], [2, 3]]


def test_a_model_that_does_not_pack_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(packing: Packing, packed: Tensor) -> Tensor:
        raise RuntimeError("rows of another batch")

    monkeypatch.setattr(Packing, "unpack", refuses)
    with caplog.at_level("INFO", logger="mara_fast.self_check"):
        engine = Engine(model_of("llama"), False)
    assert not engine.lm.can_pack and "rows of another batch" in caplog.text
