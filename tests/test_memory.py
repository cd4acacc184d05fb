"""Prompts of all lengths share the memory for keys and values, whatever it holds."""

import re
from typing import Any

import pytest
import torch

import mara_fast.cache
import mara_fast.engine
from architectures import ARCHITECTURES, random_prompt
from exactness import check_exact, random_agent
from mara_fast import Engine
from mara_fast.cache import RowKind, SlotCache
from mara_fast.decoder import Decoder
from mara_fast.memory import free_memory, plan_pools, slot_bytes, worth_reading_ahead
from mara_fast.prompts import PromptError

LENGTHS = (3, 90, 7, 200, 12, 5, 30, 150, 2)


@pytest.fixture(params=[True, False], ids=["host reads", "device only"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr("mara_fast.engine._host_reads", lambda device: request.param)
    return Engine(ARCHITECTURES["llama"](), random_agent(48), max_batch_size=4, prefill_chunk=16)


def with_room_for(slots: float, length: int, engine: Engine, monkeypatch: Any) -> int:
    each = slot_bytes(length, scratch=16, row_bytes=engine.lm.row_bytes)
    monkeypatch.setattr(mara_fast.engine, "free_memory", lambda device: int(slots * each / 0.9) + 1)
    return each


def test_rows_are_measured(engine: Engine) -> None:
    # 2 layers, keys and values, 2 heads of 12, float32
    assert engine.lm.row_bytes == 2 * 2 * 2 * 12 * 4


def test_rows_of_a_kind_lie_together() -> None:
    """They are committed in one go; what the cache was not told of lies by itself."""
    cpu, sizes = torch.device("cpu"), [(2, 4), (2, 4), (2, 4), (1, 3)]
    kinds = [RowKind(*size, cpu, torch.float32) for size in sizes]

    def filled(*kinds: RowKind) -> SlotCache:
        cache = SlotCache(num_slots=3, max_length=5, scratch=2, kinds=kinds)
        cache.select(slice(0, 3), base=5)
        states = [
            torch.full((3, heads, 2, size), float(i)) for i, (heads, size) in enumerate(sizes)
        ]
        cache.update(states[0], states[1], 0)
        cache.update(states[2], states[3], 1)
        return cache

    told, untold = filled(*kinds), filled()
    assert told.kinds == untold.kinds == tuple(kinds)
    assert told.num_bytes == untold.num_bytes == 3 * 8 * (3 * 2 * 4 + 3) * 4
    storages = [{b.untyped_storage().data_ptr() for b in buffers(c)} for c in (told, untold)]
    assert list(map(len, storages)) == [2, 4]
    for cache in (told, untold):
        # Slot 0 nothing, 1 and 2 their second new row; then 2 takes 0's place.
        cache.commit(torch.tensor([[5], [6], [6]]), torch.tensor([[7], [2], [0]]))
        cache.move(2, 0)
        cache.clear(1)
        for index, buffer in enumerate(buffers(cache)):
            assert (buffer[0, :, 0] == index).all() and not buffer[1].any()
            assert not buffer[0, :, 1:3].any() and (buffer[2, :, 5:7] == index).all()


@pytest.mark.parametrize(
    ("lengths", "slots", "expected"),
    [([64], 16, 3), ([64], 4, 2), ([64], 1, 0), ([300, 200], 16, 0), ([129], 16, 0), ([8], 64, 31)],
)
def test_how_many_are_read_ahead(lengths: list[int], slots: int, expected: int) -> None:
    """As many as fill a forward, half as many as decode at most."""
    assert worth_reading_ahead(lengths, slots) == expected


def test_ahead_is_what_memory_and_prompts_are_left_for() -> None:
    options: dict[str, Any] = {"max_slots": 6, "scratch": 0, "row_bytes": 1}

    def planned(count: int, slots: int, prompt: int = 50) -> tuple[int, int]:
        lengths = [60] * count
        [pool] = plan_pools(lengths, budget=slots * 65, prompt_lengths=[prompt] * count, **options)
        return pool.num_slots, pool.num_ahead

    assert planned(11, 11) == (6, 3) and planned(11, 8) == (6, 2) and planned(11, 6) == (6, 0)
    assert planned(7, 11) == (6, 1) and planned(6, 11) == (6, 0) and planned(11, 2) == (2, 0)
    assert planned(11, 11, prompt=60) == (6, 3) and planned(11, 11, prompt=130) == (6, 0)
    # By pool: long prompts are read alone, and the short ones of another pool together.
    lengths, prompts = [2000] * 3 + [60] * 9, [1900] * 3 + [40] * 9
    pools = plan_pools(lengths, budget=2 * 2049, prompt_lengths=prompts, **options)
    assert [(pool.num_slots, pool.num_ahead) for pool in pools] == [(6, 3), (2, 0)]
    [pool] = plan_pools([60] * 11, budget=11 * 65, **options)
    assert pool.num_ahead == 0


def test_short_prompts_are_read_together(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two ahead of four that decode, three at a time; never do more than four decode."""
    read: list[int] = []
    decoding: list[int] = []
    prefill, step = Decoder.prefill, Decoder.step

    def count(decoder: Decoder, slots: slice, *arguments: Any) -> None:
        read.append(slots.stop - slots.start)
        prefill(decoder, slots, *arguments)

    def watch(decoder: Decoder, num_decoding: int) -> None:
        decoding.append(num_decoding)
        step(decoder, num_decoding)

    monkeypatch.setattr(Decoder, "prefill", count)
    monkeypatch.setattr(Decoder, "step", watch)
    prompts = [random_prompt(engine.lm.model, 3 + index % 5, seed=index) for index in range(16)]
    check_exact(engine, prompts, max_new_tokens=9, eos_token_id=tuple(range(3, 60)))
    assert max(decoding) == 4 and sum(read) == 16
    assert read[0] == 6 and sum(size > 1 for size in read) >= len(read) - 1


def test_reading_ahead_in_chunks(engine: Engine) -> None:
    """Some have read their prompt and wait, others still read, places change hands meanwhile."""
    lengths = (3, 40, 5, 33, 2, 4, 50, 6, 3, 21, 2, 35, 7)
    prompts = [random_prompt(engine.lm.model, length, seed=length) for length in lengths]
    engine.prefill_chunk = 6
    check_exact(engine, prompts, max_new_tokens=7, window=2, eos_token_id=tuple(range(3, 70)))


@pytest.mark.parametrize("name", ["_MOST_COPY_BYTES", "_MOST_STACK_BYTES"])
def test_copies_and_stacks_are_bounded(
    name: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt's rows of all layers are gigabytes: they move in parts, with the same result."""
    monkeypatch.setattr(mara_fast.cache, name, 1)
    split: list[int] = []
    original = mara_fast.cache._Memory.parts

    def parts(memory: Any, num_rows: int) -> Any:
        for part in original(memory, num_rows):
            split.append(len(part))
            yield part

    monkeypatch.setattr(mara_fast.cache._Memory, "parts", parts)
    prompts = [random_prompt(engine.lm.model, 3 + index % 5, seed=index) for index in range(7)]
    check_exact(engine, prompts, max_new_tokens=5, window=2, eos_token_id=tuple(range(3, 60)))
    assert split and set(split) == {1}


def test_reading_ahead_makes_no_new_cache(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of short and of long prompts in turn: a cache for the longer ones serves both."""
    made: list[SlotCache] = []
    original = mara_fast.engine.SlotCache

    def count(**options: Any) -> SlotCache:
        made.append(original(**options))
        return made[-1]

    monkeypatch.setattr(mara_fast.engine, "SlotCache", count)
    for length in (4, 90, 4, 90, 4):
        prompts = [random_prompt(engine.lm.model, length, seed=index) for index in range(9)]
        check_exact(engine, prompts, max_new_tokens=2, eos_token_id=())
    assert len(made) == 2


def buffers(cache: SlotCache) -> list[torch.Tensor]:
    return [buffer for layer in cache.layers for buffer in (layer.keys, layer.values)]


@pytest.mark.parametrize("slots", [1.0, 2.5, 100.0])
def test_any_room_gives_the_same_answers(
    slots: float, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for so many slots of the longest: pools of many short and of few long ones."""
    sizes: list[tuple[int, int]] = []
    original = Engine.take_decoder

    def take(self: Engine, config: Any, pool: Any, **options: Any) -> Any:
        sizes.append((pool.num_slots, pool.max_length))
        return original(self, config, pool, **options)

    monkeypatch.setattr(Engine, "take_decoder", take)
    with_room_for(slots, 256, engine, monkeypatch)
    prompts = [random_prompt(engine.lm.model, length, seed=length) for length in LENGTHS]
    check_exact(engine, prompts, max_new_tokens=6, window=2)
    if slots == 100.0:
        assert sizes == [(4, 256)]
    else:
        # 206 and 156 positions; then 96 and less, of which more fit.
        assert sizes[-1] == (min(2, int(slots)), 256) and sizes[0][1] <= 128
        assert sizes[0][0] > sizes[-1][0] and len(sizes) >= 2
    held = engine._idle.cache.num_bytes
    # Thousands that wait cost nothing.
    engine.generate([[5, 6]] * 300, max_new_tokens=1)
    assert engine._idle.cache.num_bytes == held or slots < 100


def test_what_cannot_fit_is_said_with_the_numbers(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room_for(0.9, 256, engine, monkeypatch)
    prompts = [random_prompt(engine.lm.model, length, seed=length) for length in LENGTHS]
    message = r"prompt 3 needs 206 positions, .* GB of keys and values; there is room for .* GB: "
    for ask in (engine.generate, engine.as_completed):
        with pytest.raises(ValueError, match=message):
            ask(prompts, max_new_tokens=6)


def test_an_idle_cache_counts_as_free(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_prompt(engine.lm.model, 180, seed=0)
    before = engine.generate([prompt], max_new_tokens=6)
    monkeypatch.setattr(mara_fast.engine, "free_memory", lambda device: 10_000)
    assert engine.generate([prompt], max_new_tokens=6)[0].token_ids == before[0].token_ids


def plan(lengths: list[int], budget: int, **options: int) -> list[tuple[list[int], int, int]]:
    found = plan_pools(
        lengths, **({"max_slots": 4, "scratch": 0, "row_bytes": 1, "budget": budget} | options)
    )
    return [(pool.members, pool.num_slots, pool.max_length) for pool in found]


def test_plans() -> None:
    assert plan([10, 20, 500], 10_000) == [([0, 1, 2], 3, 512)]
    # Two of 512 fit, but four could decode: the short ones get slots of their own.
    assert plan([10, 400, 500, 20, 30], 2 * 513) == [([0, 3, 4], 3, 64), ([1, 2], 2, 512)]
    # Four of 128 fit where one of 512 does.
    assert plan([500] + [100] * 6, 520) == [([1, 2, 3, 4, 5, 6], 4, 128), ([0], 1, 512)]
    assert plan([64] * 9, 4 * 65) == [(list(range(9)), 4, 64)]
    assert plan([64] * 9, 3 * 65) == [(list(range(9)), 3, 64)]
    assert plan([], 0) == []
    with pytest.raises(PromptError, match=re.escape("prompt 1 needs 65 positions, 1.29e-07 GB")):
        plan([3, 65], 128)


def test_every_sequence_has_a_slot_that_fits() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        count = int(torch.randint(1, 30, (), generator=generator))
        lengths = torch.randint(1, 3000, (count,), generator=generator).tolist()
        options = {"max_slots": 8, "scratch": 40, "row_bytes": 3}
        budget = int(slot_bytes(3008, scratch=40, row_bytes=3) * (1 + 9 * torch.rand(()).item()))
        pools = plan_pools(lengths, budget=budget, **options)
        assert sorted(place for pool in pools for place in pool.members) == list(range(count))
        for pool in pools:
            assert 1 <= pool.num_slots <= min(8, len(pool.members))
            assert all(lengths[place] <= pool.max_length for place in pool.members)
            each = slot_bytes(pool.max_length, scratch=40, row_bytes=3)
            assert pool.num_slots * each <= budget


def test_free_memory_is_that_of_the_machine() -> None:
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50


@pytest.mark.parametrize("value", [0, -0.5, 1.5, "half", float("nan")])
def test_the_share_is_checked(value: Any) -> None:
    with pytest.raises(ValueError, match=r"memory_utilization=.* is not allowed; allowed: a n"):
        Engine(ARCHITECTURES["llama"](), False, memory_utilization=value)


def test_a_forward_of_prompts_is_bounded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many slots begin at once: those that do not fit wait a turn, and say the same."""
    monkeypatch.setattr("mara_fast.run._PREFILL_ROWS", 12)
    engine.prefill_chunk = 5
    shapes = []
    prefill = Decoder.prefill

    def watched(decoder: Any, slots: Any, ids_BT: Any, *others: Any) -> None:
        shapes.append(ids_BT.shape)
        prefill(decoder, slots, ids_BT, *others)

    monkeypatch.setattr(Decoder, "prefill", watched)
    prompts = [random_prompt(engine.lm.model, n, seed=n) for n in (12, 2, 3, 5, 7, 1)]
    check_exact(engine, prompts, max_new_tokens=5)
    assert max(rows for rows, _ in shapes) > 1
    assert all(rows * width <= 12 for rows, width in shapes)
    # One that is wider than the bound goes alone.
    engine.prefill_chunk, shapes[:] = 64, []
    check_exact(
        engine, [random_prompt(engine.lm.model, 20, seed=n) for n in (1, 2)], max_new_tokens=3
    )
    assert [tuple(shape) for shape in shapes] == [(1, 20), (1, 20)]
