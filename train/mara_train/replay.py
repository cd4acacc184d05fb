"""Replay: a ring of transitions, filled and emptied by whole episodes.

    capacity rows:   [ ... | oldest episode ... newest episode | free ... ]      modulo capacity
    transition i   = (state_i, action_i, reward_i, state_(i+1), done_i)

Each state is stored once: the next one of its chain is the next row. Behind the last row of an
episode lies another episode's first, which ``done`` keeps out.

Shapes: T transitions of an episode, H hidden, B batch.
"""

import shutil
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mara_fast.memory import free_memory
from mara_fast.options import check, check_choices, is_int
from mara_train.sac import Batch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_FILE_NAME = "states.bin"
_ROW_BYTES = 1 + 4 + 1
"""Action, reward, done."""


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """Where and how transitions are kept."""

    capacity: int = 1_000_000
    """Transitions kept at most."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of the stored states."""
    storage: Literal["device", "cpu", "file"] = "device"
    """``device``: where it learns; ``cpu``: memory; ``file``: a memory-mapped file."""

    def __post_init__(self) -> None:
        check_choices(self)
        check("capacity", self.capacity, is_int, "an integer >= 1", minimum=1)


class Replay:
    """The transitions of the last episodes.

    Args:
        config: size and place.
        hidden_size: H.
        device: where batches go, and the storage if that is ``device``.
        folder: of the memory-mapped file.

    Raises:
        ValueError: it does not fit what is free there.
    """

    def __init__(
        self,
        config: ReplayConfig,
        hidden_size: int,
        *,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
    ) -> None:
        self.config, self.device = config, torch.device(device)
        dtype = DTYPES[config.dtype]
        place = self.device if config.storage == "device" else torch.device("cpu")
        self.num_bytes = config.capacity * (hidden_size * dtype.itemsize + _ROW_BYTES)
        _check_room(self.num_bytes, config, place, folder)
        size = config.capacity, hidden_size
        if config.storage == "file":
            assert folder is not None
            folder.mkdir(parents=True, exist_ok=True)
            states = torch.from_file(
                str(folder / _FILE_NAME), shared=True, size=size[0] * size[1], dtype=dtype
            ).view(size)
        else:
            states = torch.empty(size, dtype=dtype, device=place)
        self.states = states
        self.actions = torch.zeros(config.capacity, dtype=torch.bool, device=place)
        self.rewards = torch.zeros(config.capacity, device=place)
        self.done = torch.zeros(config.capacity, dtype=torch.bool, device=place)
        self.start = 0
        """Row of the oldest transition."""
        self.lengths: deque[int] = deque()
        """Transitions of each episode, oldest first."""
        self.num_transitions = 0

    def __len__(self) -> int:
        return self.num_transitions

    def add(self, states: Tensor, actions: Tensor, rewards: Tensor) -> None:
        """Appends an episode; the oldest ones make room.

        Args:
            states: [T, H], in order.
            actions: [T], 1 = accept.
            rewards: float [T].

        Raises:
            ValueError: an episode longer than the whole ring, or tensors of different lengths.
        """
        length, capacity = len(states), self.config.capacity
        if actions.shape != (length,) or rewards.shape != (length,):
            raise ValueError(
                f"{length} states need as many actions and rewards, got {tuple(actions.shape)} and "
                f"{tuple(rewards.shape)}"
            )
        if length > capacity:
            raise ValueError(f"an episode of {length} transitions exceeds the replay's {capacity}")
        if not length:
            return
        while self.num_transitions + length > capacity:
            oldest = self.lengths.popleft()
            self.start = (self.start + oldest) % capacity
            self.num_transitions -= oldest
        first = (self.start + self.num_transitions) % capacity
        # In two pieces where the ring begins anew.
        head = min(length, capacity - first)
        done = torch.zeros(length, dtype=torch.bool)
        done[-1] = True
        for target, source in (
            (self.states, states),
            (self.actions, actions),
            (self.rewards, rewards),
            (self.done, done),
        ):
            target[first : first + head].copy_(source[:head])
            target[: length - head].copy_(source[head:])
        self.lengths.append(length)
        self.num_transitions += length

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Transitions drawn uniformly, with replacement.

        Args:
            batch_size: B.
            generator: of the CPU; a replay of the same content draws the same from it, wherever
                it is stored.
        """
        if not self.num_transitions:
            raise ValueError("the replay is empty")
        drawn = torch.randint(self.num_transitions, (batch_size,), generator=generator)
        rows = ((self.start + drawn) % self.config.capacity).to(self.states.device)
        next_rows = (rows + 1) % self.config.capacity
        return Batch(
            states=self.states[rows].to(self.device, non_blocking=True),
            actions=self.actions[rows].to(self.device, torch.int64),
            rewards=self.rewards[rows].to(self.device),
            next_states=self.states[next_rows].to(self.device, non_blocking=True),
            done=self.done[rows].to(self.device),
        )

    def state_dict(self) -> dict[str, Any]:
        """Its content, oldest first; see :meth:`load_state_dict`."""
        rows = self._rows()
        return {
            "states": self.states[rows].cpu(),
            "actions": self.actions[rows].cpu(),
            "rewards": self.rewards[rows].cpu(),
            "lengths": torch.tensor(list(self.lengths), dtype=torch.int64),
            "start": self.start,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the content of a replay of the same capacity, row by row.

        Raises:
            ValueError: it holds more than fits here, states of another size or dtype, or episodes
                whose lengths do not add up.
        """
        states, lengths = state["states"], state["lengths"].tolist()
        if states.shape[1:] != self.states.shape[1:] or states.dtype != self.states.dtype:
            raise ValueError(
                f"the saved replay has {states.dtype} states of {states.shape[1]}, this one "
                f"{self.states.dtype} of {self.states.shape[1]}"
            )
        if len(states) > self.config.capacity:
            raise ValueError(
                f"the saved replay has {len(states)} transitions, this one room for "
                f"{self.config.capacity}"
            )
        if sum(lengths) != len(states):
            raise ValueError(
                f"the saved replay has {len(states)} transitions, and episodes of {sum(lengths)}"
            )
        self.start, self.num_transitions = state["start"], len(states)
        self.lengths = deque(lengths)
        rows = self._rows()
        for name in ("states", "actions", "rewards"):
            target = getattr(self, name)
            target[rows] = state[name].to(target.device)
        last = torch.tensor(lengths, dtype=torch.int64).cumsum(0) - 1
        self.done[rows] = False
        self.done[rows[last.to(rows.device)]] = True

    def _rows(self) -> Tensor:
        """The rows in use, oldest first."""
        rows = torch.arange(self.num_transitions, device=self.states.device)
        return (rows + self.start) % self.config.capacity


def _check_room(
    num_bytes: int, config: ReplayConfig, place: torch.device, folder: Path | None
) -> None:
    if config.storage == "file":
        if folder is None:
            raise ValueError("a replay in a file needs a folder")
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free, where = shutil.disk_usage(existing).free, f"the disk of {folder}"
        # A resumed run writes into the file that is there.
        if (file := folder / _FILE_NAME).exists():
            free += file.stat().st_blocks * 512
    elif place.type == "cuda":
        free, where = torch.cuda.mem_get_info(place)[0], str(place)
    else:
        free, where = free_memory(torch.device("cpu")), "memory"
    if num_bytes > free:
        raise ValueError(
            f"a replay of {config.capacity:,} transitions in {config.dtype} takes "
            f"{num_bytes / 1e9:.2f} GB; {where} has {free / 1e9:.2f} GB free: lower capacity, or "
            "choose another dtype or storage"
        )
