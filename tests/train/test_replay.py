"""The ring of transitions against a list of episodes, whatever is added in which order."""

import copy
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mara_train.replay as replay_module
from mara_train.replay import DTYPES, Replay, ReplayConfig

HIDDEN = 2
STORAGES = ("device", "cpu", "file")
Row = tuple[float, int, float]


class ListReplay:
    """The definition: episodes of (number, action, reward); the oldest go as wholes."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.episodes = capacity, list[list[Row]]()

    def add(self, episode: list[Row]) -> None:
        if episode:
            self.episodes.append(episode)
        while sum(map(len, self.episodes)) > self.capacity:
            self.episodes.pop(0)

    def transitions(self) -> list[tuple[Row, float | None]]:
        """Each with the number of the next state; None where the episode is done."""
        return [
            (row, episode[i + 1][0] if i + 1 < len(episode) else None)
            for episode in self.episodes
            for i, row in enumerate(episode)
        ]


def make(capacity: int = 10, folder: Path | None = None, **options: Any) -> Replay:
    config = ReplayConfig(capacity=capacity, **({"dtype": "fp32"} | options))
    return Replay(config, HIDDEN, folder=folder)


def episode(first: int, length: int) -> list[Row]:
    return [(float(i), i % 3 % 2, i / 8) for i in range(first, first + length)]


def add(replay: Replay, rows: list[Row]) -> None:
    states = torch.tensor([[number, -number] for number, _, _ in rows]).reshape(-1, HIDDEN)
    actions = torch.tensor([action for _, action, _ in rows], dtype=torch.bool)
    replay.add(states, actions, torch.tensor([reward for _, _, reward in rows]))


def all_of(replay: Replay, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Row, float | None]]:
    """Every transition once, oldest first, through the way that batches come."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", lambda n, size, generator: torch.arange(n))
        batch = replay.sample(len(replay), torch.Generator())
    assert batch.actions.dtype == torch.int64 and batch.done.dtype == torch.bool
    assert torch.equal(batch.states[:, 1], -batch.states[:, 0])
    found = []
    for state, action, reward, after, done in zip(*(t.tolist() for t in batch), strict=True):
        found.append(((state[0], action, reward), None if done else after[0]))
    return found


@pytest.fixture(scope="module")
def patch() -> Any:
    with pytest.MonkeyPatch.context() as context:
        yield context


@settings(max_examples=80, deadline=None)
@given(
    capacity=st.integers(1, 12),
    lengths=st.lists(st.integers(0, 12), max_size=12),
    move_at=st.integers(0, 12),
)
def test_equals_a_list_of_episodes(
    patch: pytest.MonkeyPatch, capacity: int, lengths: list[int], move_at: int
) -> None:
    """Wrap-around, eviction, done and next states; also when it is saved and loaded in between."""
    replay, wanted, number = make(capacity), ListReplay(capacity), 0
    # What was never written must not be seen.
    replay.states.fill_(torch.nan)
    for index, length in enumerate(lengths):
        if index == move_at:
            state, replay = replay.state_dict(), make(capacity)
            replay.load_state_dict(state)
        rows = episode(number, min(length, capacity))
        number += length
        add(replay, rows)
        wanted.add(rows)
        assert len(replay) == len(wanted.transitions())
        assert list(replay.lengths) == list(map(len, wanted.episodes))
        if len(replay):
            assert all_of(replay, patch) == wanted.transitions()


def test_an_episode_as_long_as_the_ring(patch: pytest.MonkeyPatch) -> None:
    replay = make(5)
    add(replay, episode(0, 3))
    add(replay, episode(3, 5))
    assert [row[0][0] for row in all_of(replay, patch)] == [3, 4, 5, 6, 7]
    with pytest.raises(ValueError, match="an episode of 6 transitions exceeds the replay's 5"):
        add(replay, episode(8, 6))
    assert len(replay) == 5


def test_samples_are_uniform_over_what_is_stored() -> None:
    replay = make(10)
    for first, length in ((0, 4), (4, 3), (7, 4)):
        add(replay, episode(first, length))
    batch = replay.sample(14_000, torch.Generator().manual_seed(0))
    counts = Counter(batch.states[:, 0].tolist())
    assert counts.keys() == set(map(float, range(4, 11)))
    # 2000 expected of each; five standard deviations.
    assert all(abs(count - 2000) < 5 * 41 for count in counts.values())


def test_every_storage_gives_the_same_samples(tmp_path: Path) -> None:
    batches = []
    for storage in STORAGES:
        replay = make(9, tmp_path / storage, storage=storage)
        for first, length in ((0, 4), (4, 3), (7, 4)):
            add(replay, episode(first, length))
        batches.append(replay.sample(64, torch.Generator().manual_seed(1)))
    for batch in batches[1:]:
        assert all(torch.equal(one, other) for one, other in zip(batches[0], batch, strict=True))


def test_a_file_holds_the_states(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "replay"
    replay = make(4, folder, storage="file", dtype="bf16")
    add(replay, episode(0, 3))
    assert (folder / "states.bin").stat().st_size == 4 * HIDDEN * 2
    stored = torch.from_file(str(folder / "states.bin"), size=8, dtype=torch.bfloat16)
    assert stored.view(4, HIDDEN)[:3, 0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="a replay in a file needs a folder"):
        make(4, storage="file")


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_are_rounded_and_nothing_else(dtype: str) -> None:
    replay = make(3, dtype=dtype)
    exact = torch.tensor([[1 / 3, -1 / 3], [1e-3, 3e4]])
    rewards = torch.tensor([1 / 3, 1e-9])
    replay.add(exact, torch.tensor([1, 0]), rewards)
    batch = replay.sample(32, torch.Generator().manual_seed(0))
    assert batch.states.dtype == batch.next_states.dtype == DTYPES[dtype]
    first = batch.actions == 1
    assert torch.equal(batch.states[first][0], exact[0].to(DTYPES[dtype]))
    assert torch.equal(batch.next_states[first][0], exact[1].to(DTYPES[dtype]))
    assert batch.rewards[first][0] == rewards[0] and batch.rewards[~first][0] == rewards[1]


@pytest.mark.parametrize("storage", STORAGES)
def test_a_copy_goes_on_alike(tmp_path: Path, storage: str) -> None:
    original = make(10, tmp_path / "one", storage=storage)
    for first, length in ((0, 4), (4, 5), (9, 4)):
        add(original, episode(first, length))
    state = copy.deepcopy(original.state_dict())
    torch.save(state, tmp_path / "replay.pt")
    other = make(10, tmp_path / "other", storage=storage)
    # What it held before is gone.
    add(other, episode(100, 7))
    other.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True))
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    for step in range(3):
        batches = [r.sample(40, g) for r, g in zip((original, other), generators, strict=True)]
        for name, one, two in zip(batches[0]._fields, *batches, strict=True):
            # Behind the last transition lies whatever was there: nobody reads it.
            read = ~batches[0].done if name == "next_states" else slice(None)
            assert torch.equal(one[read], two[read]), name
        for replay in (original, other):
            add(replay, episode(20 + 3 * step, 3))


def test_states_of_other_replays_are_refused() -> None:
    replay = make(10)
    add(replay, episode(0, 6))
    state = replay.state_dict()
    with pytest.raises(ValueError, match="has 6 transitions, this one room for 5"):
        make(5).load_state_dict(state)
    with pytest.raises(ValueError, match=r"torch.float32 states of 2, this one torch.float16 of 2"):
        make(10, dtype="fp16").load_state_dict(state)
    wider = Replay(ReplayConfig(capacity=10, dtype="fp32"), 3)
    with pytest.raises(ValueError, match=r"states of 2, this one torch.float32 of 3"):
        wider.load_state_dict(state)
    short = state | {"lengths": torch.tensor([4])}
    with pytest.raises(ValueError, match="has 6 transitions, and episodes of 4"):
        make(10).load_state_dict(short)


def test_an_empty_replay() -> None:
    replay = make()
    with pytest.raises(ValueError, match="the replay is empty"):
        replay.sample(1, torch.Generator())
    add(replay, [])
    assert len(replay) == 0 and not replay.lengths
    other = make()
    other.load_state_dict(replay.state_dict())
    assert len(other) == 0


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_module, "free_memory", lambda device: 7_999_999_999)
    wanted = "a replay of 1,000,000,000 transitions in fp16 takes 10.00 GB; memory has 8.00 GB free"
    with pytest.raises(ValueError, match=re.escape(wanted) + ".*lower capacity, or choose another"):
        make(10**9, dtype="fp16")
    assert make(10**6).num_bytes == 10**6 * (HIDDEN * 4 + 6)
    where = re.escape(f"the disk of {tmp_path / 'new'} has ")
    with pytest.raises(ValueError, match=where):
        make(10**15, tmp_path / "new", storage="file")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, "capacity=0 is not allowed"),
        ({"capacity": 1.5}, "capacity=1.5 is not allowed"),
        ({"capacity": True}, "capacity=True is not allowed"),
        ({"dtype": "int8"}, "dtype='int8' is not known; allowed: bf16, fp16, fp32"),
        ({"storage": "tape"}, "storage='tape' is not known; allowed: device, cpu, file"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ReplayConfig(**options)


@pytest.mark.parametrize("convert", [torch.Tensor.clone, lambda t: t.to(torch.float64)])
def test_what_is_added_is_copied(convert: Callable[[Tensor], Tensor]) -> None:
    replay = make()
    states = convert(torch.ones(2, HIDDEN))
    replay.add(states, torch.ones(2, dtype=torch.bool), torch.ones(2))
    states.zero_()
    assert bool((replay.sample(4, torch.Generator()).states == 1).all())
