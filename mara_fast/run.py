"""One pass over a list of prompts by continuous batching.

    for each pool of slots, see mara_fast.memory, while work is left:
        a slot that has read its prompt decodes, if fewer than may do
        if too few have: free slots take prompts from the queue, short ones some more than needed
        one chunk of prefill for the slots that still read their prompt
        one step of decoding for the slots that have read it
        what the slots say of themselves is copied to the host
        what they said a turn ago is looked at: what ended leaves, and its slot is free

Looking a turn late, the host queues the next step while the device works on this one, and makes
texts of what ended meanwhile. A sequence that has ended idles for that turn. On a CPU nothing is
gained by waiting, and the host looks at once.

Slots are kept in the order [decoding | waiting | free], so that every forward works on one
contiguous range. What waits reads its prompt still, or has read it ahead; the latter only while as
many decode as may.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from mara_fast.collect import collect, stop_position
from mara_fast.config import DecodingConfig
from mara_fast.decoder import Decoder, ScoredWindow
from mara_fast.memory import Pool
from mara_fast.outputs import DecodingStats, Generation
from mara_fast.slot_state import Ended, SlotState
from mara_fast.transfer import HostCopy, to_device
from mara_kernels.bookkeeping import RUNNING

if TYPE_CHECKING:
    from mara_fast.engine import Engine

_RECENT = 4
"""Tokens of a slot copied every turn, of which it emits two at most: one that was asked for or
comes with the prompt, and a forced one behind it."""


_PREFILL_ROWS = 8192
"""Rows of one forward of prompts, padding included: far above the ridge of any device, and bounded,
as its activations are and the time that decoding slots wait for it."""


@dataclass(kw_only=True, eq=False)
class Request:
    """A prompt on its way through the engine."""

    index: int
    prompt: Any
    token_ids: list[int]
    sequence: int
    slot: int = -1
    num_prefilled: int = 0
    records: list[list[int]] = field(default_factory=list)
    """Of the tokens the host has seen, if it looks: rows of :attr:`SlotState.record`."""
    record_floats: list[list[float]] = field(default_factory=list)
    """Rows of :attr:`SlotState.record_floats`."""
    num_checked: int = 0
    """Tokens already searched for stop strings."""
    has_left: bool = False
    started: float = 0.0

    @property
    def is_read(self) -> bool:
        """The whole prompt is."""
        return self.num_prefilled == len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class _Snapshot:
    """What the decoding slots said of themselves after a turn."""

    requests: tuple[Request, ...]
    """By slot, as they were then."""
    counts: HostCopy
    """int64 [3, B]: why it ended, if it did; tokens emitted; candidates of the set."""
    columns: int
    """Of the candidate buffer: a larger set waits for a wider one."""
    recent: tuple[HostCopy, HostCopy] | None
    """The last ``_RECENT`` rows of both records, if the host wants tokens."""


@dataclass(frozen=True, kw_only=True)
class _Leaving:
    """A sequence that has ended; its results are on their way to the host."""

    request: Request
    stopped_after: int | None
    ended: dict[str, HostCopy]


class Run:
    """One pass over a list of requests. Iterate it once.

    Args:
        engine: decodes.
        config: decoding options.
        requests: what is decoded.
        keeps_tokens: the requests shall have their tokens turn by turn, for streaming.
        observer: is shown every window that the agent scored.
    """

    def __init__(
        self,
        engine: "Engine",
        config: DecodingConfig,
        requests: list[Request],
        *,
        keeps_tokens: bool = False,
        observer: Callable[[ScoredWindow], None] | None = None,
    ) -> None:
        self.engine, self.config, self.requests = engine, config, requests
        self.keeps_tokens = keeps_tokens or bool(config.stop_strings)
        self._pools: list[Pool] = []
        if requests:
            lengths = [len(request.token_ids) for request in requests]
            self._pools = engine.pools(config, lengths)
        self.observer = observer
        self._pool = Pool(members=[], num_slots=0, max_length=0)
        self._queue: deque[Request] = deque()
        self._waiting: list[Request] = []
        self._decoding: list[Request] = []
        self._snapshots: deque[_Snapshot] = deque()
        self._leaving: deque[_Leaving] = deque()

    def __iter__(self) -> Iterator[tuple[int, Generation]]:
        for finished in self.steps():
            yield from finished

    def steps(self) -> Iterator[list[tuple[int, Generation]]]:
        """Runs to the end, yielding after every turn what it finished."""
        if not self.config.max_new_tokens:
            yield [(request.index, self._empty(request)) for request in self.requests]
            return
        if not self.requests:
            return
        for pool in self._pools:
            members = [self.requests[place] for place in pool.members]
            decoder = self.engine.take_decoder(
                self.config,
                pool,
                longest_prompt=max(len(request.token_ids) for request in members),
                observer=self.observer,
            )
            self._pool = pool
            self._queue.extend(members)
            while self._queue or self._waiting or self._decoding or self._leaving:
                yield self._turn(decoder)
            # A run that ends early may leave anything behind, and does not hand it on.
            self.engine.return_decoder(decoder)
            del decoder

    @torch.inference_mode()
    def _turn(self, decoder: Decoder) -> list[tuple[int, Generation]]:
        self._promote(decoder)
        self._admit(decoder)
        if not all(request.is_read for request in self._waiting):
            self._prefill(decoder)
            self._promote(decoder)
        if self._decoding:
            decoder.run_step(len(self._decoding), most=self._pool.num_slots)
            self._snapshots.append(self._snapshot(decoder.state))
        num_late = 0 if decoder.host_reads or not self._decoding else 1
        while len(self._snapshots) > num_late:
            self._look(self._snapshots.popleft(), decoder)
        return self._arrived()

    def _promote(self, decoder: Decoder) -> None:
        """What has read its prompt decodes, if there is a place."""
        for request in [request for request in self._waiting if request.is_read]:
            if len(self._decoding) == self._pool.num_slots:
                break
            self._exchange(request, self._waiting[0], decoder)
            self._decoding.append(self._waiting.pop(0))

    def _admit(self, decoder: Decoder) -> None:
        if len(self._decoding) + len(self._waiting) >= self._pool.num_slots:
            return
        room = min(self._pool.num_slots + self._pool.num_ahead, decoder.num_slots)
        while self._queue and len(self._decoding) + len(self._waiting) < room:
            request = self._queue.popleft()
            request.slot = len(self._decoding) + len(self._waiting)
            decoder.reset(request.slot, sequence=request.sequence)
            request.started = time.perf_counter()
            self._waiting.append(request)

    def _prefill(self, decoder: Decoder) -> None:
        """One chunk of the first slots that read."""
        read = [request for request in self._waiting if request.is_read]
        for place, request in enumerate(read):
            self._exchange(request, self._waiting[place], decoder)
        chunks: list[list[int]] = []
        width = 0
        for request in self._waiting[len(read) :]:
            chunk = request.token_ids[request.num_prefilled :][: self.engine.prefill_chunk]
            if chunks and (len(chunks) + 1) * max(width, len(chunk)) > _PREFILL_ROWS:
                break
            chunks.append(chunk)
            width = max(width, len(chunk))
        now = self._waiting[len(read) :][: len(chunks)]
        device = self.engine.lm.device
        for request, chunk in zip(now, chunks, strict=True):
            request.num_prefilled += len(chunk)
        first = now[0].slot
        decoder.prefill(
            slice(first, first + len(chunks)),
            to_device([chunk + chunk[-1:] * (width - len(chunk)) for chunk in chunks], device),
            to_device([len(chunk) for chunk in chunks], device),
            to_device([request.is_read for request in now], device),
        )

    def _exchange(self, first: Request, second: Request, decoder: Decoder) -> None:
        """Exchanges two that wait."""
        if first is second:
            return
        decoder.swap(first.slot, second.slot)
        offset = self._waiting[0].slot
        first.slot, second.slot = second.slot, first.slot
        self._waiting[first.slot - offset] = first
        self._waiting[second.slot - offset] = second

    def _snapshot(self, state: SlotState) -> _Snapshot:
        slots = slice(0, len(self._decoding))
        recent = None
        if self.keeps_tokens:
            last = state.num_tokens[slots, None] - _RECENT
            columns = last + torch.arange(_RECENT, device=last.device)
            columns = columns.clamp(min=0)[:, :, None]
            recent = (
                HostCopy(state.record[slots].gather(1, columns.expand(-1, -1, 5))),
                HostCopy(state.record_floats[slots].gather(1, columns.expand(-1, -1, 4))),
            )
        return _Snapshot(
            requests=tuple(self._decoding),
            counts=HostCopy(
                torch.stack((state.done[slots], state.num_tokens[slots], state.size[slots]))
            ),
            columns=state.candidate_ids.shape[1],
            recent=recent,
        )

    def _look(self, snapshot: _Snapshot, decoder: Decoder) -> None:
        """Takes out what ended, makes room for what waits for it."""
        done, num_tokens, size = snapshot.counts.wait().tolist()
        recent = snapshot.recent and [part.wait().tolist() for part in snapshot.recent]
        if max(size) > snapshot.columns:
            decoder.grow()
        for slot, request in reversed(list(enumerate(snapshot.requests))):
            if request.has_left:
                continue
            stopped_after = None
            if recent:
                num_new = num_tokens[slot] - len(request.records)
                request.records += recent[0][slot][_RECENT - num_new :]
                request.record_floats += recent[1][slot][_RECENT - num_new :]
                stopped_after = self._stop(request)
            if done[slot] != RUNNING or stopped_after is not None:
                self._take_out(request, stopped_after, decoder)

    def _stop(self, request: Request) -> int | None:
        if not self.config.stop_strings:
            return None
        ids = [record[0] for record in request.records]
        num_tokens = stop_position(
            ids,
            start=request.num_checked,
            stop_strings=self.config.stop_strings,
            tokenizer=self.engine.tokenizer,
        )
        request.num_checked = len(ids)
        return num_tokens

    def _take_out(self, request: Request, stopped_after: int | None, decoder: Decoder) -> None:
        found = Ended.tensors_of(decoder.state, request.slot)
        copies = {name: HostCopy(tensor) for name, tensor in found.items()}
        self._leaving.append(_Leaving(request=request, stopped_after=stopped_after, ended=copies))
        request.has_left = True
        # The last decoding slot takes the free one's place, and the last waiting one its.
        free, last = request.slot, self._decoding[-1]
        self._decoding[free] = last
        self._decoding.pop()
        free = self._move(last, free, decoder)
        if self._waiting:
            last = self._waiting.pop()
            self._waiting.insert(0, last)
            free = self._move(last, free, decoder)
        decoder.state.size[free] = 0

    def _move(self, request: Request, slot: int, decoder: Decoder) -> int:
        """Moves a request to a free slot; returns the slot that is free now."""
        free, request.slot = request.slot, slot
        if free != slot:
            decoder.move(free, slot)
        return free

    def _arrived(self) -> list[tuple[int, Generation]]:
        """Results that have reached the host; all of them if there is nothing else to do."""
        is_idle = not (self._queue or self._waiting or self._decoding)
        finished = []
        while self._leaving:
            leaving = self._leaving[0]
            if not is_idle and not all(copy.is_ready for copy in leaving.ended.values()):
                break
            self._leaving.popleft()
            finished.append((leaving.request.index, self._generation(leaving)))
        return finished

    def _generation(self, leaving: _Leaving) -> Generation:
        request = leaving.request
        return collect(
            Ended.of(**{name: copy.wait() for name, copy in leaving.ended.items()}),
            prompt=request.prompt,
            prompt_token_ids=request.token_ids,
            stopped_after=leaving.stopped_after,
            config=self.config,
            tokenizer=self.engine.tokenizer,
            seconds=time.perf_counter() - request.started,
        )

    def _empty(self, request: Request) -> Generation:
        return Generation(
            prompt=request.prompt,
            prompt_token_ids=request.token_ids,
            text=None if self.engine.tokenizer is None else "",
            token_ids=[],
            finish_reason="length",
            stats=DecodingStats(),
            tokens=(),
            trace=() if self.config.trace else None,
            options=self.config.to_dict() if self.config.trace else None,
        )
