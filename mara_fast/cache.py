"""Keys and values of the slots: a committed prefix, and room for undecided rows behind it."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mara_fast.row_budget import Packing
from mara_kernels.bookkeeping import keep_rows


class _View:
    """Which slots a forward works on, and where its new rows go; shared by all layers."""

    def __init__(self) -> None:
        self.slots = slice(0, 0)
        self.base = 0
        self.packing: Packing | None = None


class RowKind(NamedTuple):
    """What the rows of a buffer are: keys or values of one layer."""

    num_heads: int
    head_size: int
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, states: Tensor) -> "RowKind":
        """Of states [B, H, T, D]."""
        return cls(states.shape[1], states.shape[3], states.device, states.dtype)


_MOST_STACK_BYTES = 2**31
"""What torch indexes in one launch."""
_MOST_COPY_BYTES = 2**26
"""Of rows on their way from one place to another."""


class _Memory:
    """Buffers [slots, H, rows, D]; those of one kind lie in one tensor, to be moved in one go.

    Args:
        num_slots, num_rows: of every buffer.
        kinds: of the buffers that will be asked for; one that is not among them lies by itself.
    """

    def __init__(self, num_slots: int, num_rows: int, kinds: Iterable[RowKind]) -> None:
        self.num_slots, self.num_rows = num_slots, num_rows
        self.stacks: list[Tensor] = []
        """[N, slots, H, rows, D] each."""
        self._expected = Counter(kinds)
        self._free: dict[RowKind, list[Tensor]] = {}

    def buffer_for(self, states: Tensor) -> Tensor:
        """A buffer that such states fit in."""
        kind = RowKind.of(states)
        free = self._free.setdefault(kind, [])
        if not free:
            size = (self.num_slots, kind.num_heads, self.num_rows, kind.head_size)
            # Zeros, not empty: a masked key still enters a product, and 0 * NaN is NaN.
            most = _MOST_STACK_BYTES // (math.prod(size) * states.element_size())
            count = max(1, min(self._expected[kind], most))
            self._expected[kind] -= count
            stack = states.new_zeros(count, *size)
            self.stacks.append(stack)
            free += [stack[index] for index in reversed(range(len(stack)))]
        buffer = free.pop()
        torch._dynamo.mark_static_address(buffer)
        return buffer

    def parts(self, num_rows: int) -> Iterator[Tensor]:
        """The stacks, [N, slots, H, rows, D], in parts of which so many rows may be copied at once.

        Args:
            num_rows: of all slots together.
        """
        for stack in self.stacks:
            _, _, num_heads, _, head_size = stack.shape
            each = num_rows * num_heads * head_size * stack.element_size()
            yield from stack.split(max(1, _MOST_COPY_BYTES // max(1, each)))


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [slots, Hkv, rows, D] each."""

    is_compileable = True
    is_sliding = False

    def __init__(self, *, memory: _Memory, view: _View) -> None:
        super().__init__()
        self.memory, self.view = memory, view

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates from the first states seen: dtype, device and head counts are theirs."""
        self.keys = self.memory.buffer_for(key_states)
        self.values = self.memory.buffer_for(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Writes the new rows at the base; returns everything up to their end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.view.packing is not None:
            # Every row of the widest slot is written, lest a NaN of an earlier step stays in one.
            key_states = self.view.packing.unpack(key_states)
            value_states = self.view.packing.unpack(value_states)
        assert self.keys is not None and self.values is not None
        slots, base = self.view.slots, self.view.base
        end = base + key_states.shape[2]
        keys, values = self.keys[slots, :, :end], self.values[slots, :, :end]
        keys[:, :, base:] = key_states
        values[:, :, base:] = value_states
        return keys, values

    def get_seq_length(self) -> int:
        """0: positions are always given."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys a mask would cover."""
        return self.view.base + query_length, 0

    def get_max_length(self) -> int:
        """Rows of a slot."""
        return self.memory.num_rows

    # Its name in earlier versions of transformers (5.10).
    get_max_cache_shape = get_max_length


class SlotCache(Cache):
    """Static slots, each with its own length; a forward works on a range of them.

    A slot has ``max_length`` rows for its prefix, ``scratch`` for undecided rows where the caller
    keeps them at the end, and one trash row that commits nowhere.

    Args:
        num_slots: sequences held at once.
        max_length: positions per sequence.
        scratch: the most rows one forward adds per slot.
        kinds: of all keys and values, as another cache of the model had them, see :attr:`kinds`.
    """

    def __init__(
        self, *, num_slots: int, max_length: int, scratch: int, kinds: Iterable[RowKind] = ()
    ) -> None:
        self.num_slots, self.max_length, self.scratch = num_slots, max_length, scratch
        self.trash = max_length + scratch
        self.view = _View()
        self._memory = _Memory(num_slots, self.trash + 1, kinds)
        layer = partial(SlotLayer, memory=self._memory, view=self.view)
        super().__init__(layer_class_to_replicate=layer)

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(stack.nbytes for stack in self._memory.stacks)

    @property
    def kinds(self) -> tuple[RowKind, ...]:
        """Of the keys and values of every layer that was forwarded."""
        return tuple(
            RowKind.of(buffer)
            for layer in self.layers
            if layer.is_initialized
            for buffer in (layer.keys, layer.values)
        )

    def select(self, slots: slice, *, base: int, packing: Packing | None = None) -> None:
        """Chooses the slots of the next forward and the row where its new rows begin.

        Args:
            slots: which.
            base: at least the length of every slot.
            packing: of new rows that come as one sequence.
        """
        self.view.slots, self.view.base, self.view.packing = slots, base, packing

    def commit(self, source: Tensor, destination: Tensor) -> None:
        """Moves rows within the selected slots, all read before any is written.

        Args:
            source: int64 [B, C], rows to move.
            destination: int64 [B, C], where to; ``trash`` for nowhere.
        """
        slot = torch.arange(source.shape[0], device=source.device)[:, None]
        for part in self._memory.parts(source.numel()):
            rows = part[:, self.view.slots]
            rows[:, slot, :, destination] = rows[:, slot, :, source]

    def keep_rows(self, row: Tensor, destination: Tensor) -> None:
        """Moves one new row of each selected slot, int64 [B], to another; -1: none."""
        for stack in self._memory.stacks:
            keep_rows(
                stack[:, self.view.slots],
                row,
                base=self.view.base,
                destination=destination,
                trash=self.trash,
            )

    def commit_rows(self, slots: Tensor, source: Tensor, destination: Tensor) -> None:
        """Moves one row in some of the selected slots; all int64 [N]."""
        for part in self._memory.parts(source.numel()):
            rows = part[:, self.view.slots]
            rows[:, slots, :, destination] = rows[:, slots, :, source]

    def move(self, source: int, destination: int) -> None:
        """Copies a slot over another. All of it: behind a prefix nothing of others may stay."""
        for stack in self._memory.stacks:
            stack[:, destination] = stack[:, source]

    def swap(self, first: int, second: int) -> None:
        """Exchanges two slots."""
        for part in self._memory.parts(self.trash + 1):
            kept = part[:, first].clone()
            part[:, first] = part[:, second]
            part[:, second] = kept

    def clear_rows(self, base: int) -> None:
        """Zeroes the rows of the selected slots from ``base`` on."""
        for stack in self._memory.stacks:
            stack[:, self.view.slots, :, base:].zero_()

    def clear(self, slot: int) -> None:
        """Zeroes a slot: a NaN left in it would leak through masked products."""
        for stack in self._memory.stacks:
            stack[:, slot].zero_()
