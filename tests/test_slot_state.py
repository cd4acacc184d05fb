"""The struct of arrays: what is done to a slot as a whole, and what is left of it."""

import dataclasses

import pytest
import torch

from mara_fast.slot_state import Ended, SlotState


def filled(num_slots: int, *, trace: bool) -> SlotState:
    """Every element another number."""
    state = SlotState.empty(
        num_slots,
        columns=3,
        num_tokens=2,
        hidden_size=5,
        dtype=torch.float16,
        device=torch.device("cpu"),
        trace=trace,
    )
    generator = torch.Generator().manual_seed(0)
    for tensor in state.tensors().values():
        values = torch.randint(1, 100, tensor.shape, generator=generator)
        tensor.copy_(values % 2 if tensor.dtype == torch.bool else values)
    return state


def slot_of(state: SlotState, slot: int) -> dict[str, torch.Tensor]:
    """A copy of all its fields."""
    by_row = {"ints", "floats"}
    return {
        name: (tensor[:, slot] if name in by_row else tensor[slot]).clone()
        for name, tensor in state.tensors().items()
    }


def check_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("trace", [True, False])
@pytest.mark.parametrize("num_slots", [3, 4])
def test_moves_take_every_field(num_slots: int, trace: bool) -> None:
    state = filled(num_slots, trace=trace)
    before = [slot_of(state, slot) for slot in range(num_slots)]
    state.swap(0, 2)
    check_equal(slot_of(state, 0), before[2])
    check_equal(slot_of(state, 2), before[0])
    state.move(1, 0)
    for slot, wanted in ((0, before[1]), (1, before[1]), (2, before[0])):
        check_equal(slot_of(state, slot), wanted)


def test_a_reset_leaves_nothing() -> None:
    state = filled(3, trace=True)
    others = slot_of(state, 0), slot_of(state, 2)
    state.reset(1, sequence=2**62 + 3)
    check_equal(slot_of(state, 0), others[0])
    check_equal(slot_of(state, 2), others[1])
    found = slot_of(state, 1)
    assert found.pop("sequence") == 2**62 + 3 and found.pop("trace_logits").isnan().all()
    assert found.pop("ints").count_nonzero() == 1
    assert all(not tensor.any() for tensor in found.values())


@pytest.mark.parametrize("num_slots", [1, 3, 4, 7])
def test_fields_are_views_that_kernels_can_read(num_slots: int) -> None:
    state = filled(num_slots, trace=False)
    ranges = slice(0, num_slots), slice(num_slots // 2, num_slots)
    for part in (state, *(state.narrowed(slots) for slots in ranges)):
        for item in dataclasses.fields(part):
            tensor = getattr(part, item.name)
            if item.name not in ("ints", "floats"):
                assert tensor.is_contiguous(), item.name
    assert all(
        tensor.data_ptr() % 16 == 0 for name, tensor in state.tensors().items() if tensor.numel()
    )
    part = state.narrowed(ranges[1])
    part.num_tokens[:] = 1000
    assert (state.num_tokens[ranges[1]] == 1000).all() and (part.ints == 1000).any(-1).sum() == 1


def test_what_is_left_of_a_slot() -> None:
    state = filled(3, trace=True)
    copies = {name: t.clone() for name, t in Ended.tensors_of(state, 1).items()}
    wanted = slot_of(state, 1)
    state.reset(1, sequence=0)
    ended = Ended.of(**copies)
    assert ended.num_tokens == wanted["num_tokens"] and ended.done == wanted["done"]
    assert ended.num_forwards == wanted["num_forwards"]
    assert ended.sequence.tolist() == [wanted["sequence"]]
    for name in ("record", "record_floats", "trace_ids", "trace_logprobs", "trace_logits"):
        assert torch.equal(getattr(ended, name), wanted[name])
