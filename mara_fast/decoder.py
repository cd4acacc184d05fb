"""One decode step over all slots: propose, score, select, commit, truncate.

    window    = the next undecided candidates of each slot, up to W, within the step's rows
    states    = LM(window)                      every row sees its slot's prefix and itself
    d         = agent(states)
    decision  = cascade(d)                      accepted rank, or go on with the next window
    commit the best row's keys and values; where the position is decided, append its token and
    logits(its state) -> the next candidate set; a set of one is emitted unasked

The step is device-only: no host synchronisation, static shapes. On a CPU, where reading a tensor
costs nothing, rows that cannot matter are left out.

Shapes: B slots, W window, T rows of a chunk, K candidates, C columns of the candidate buffer,
N tokens of the output buffer, R rows of the step, H hidden, V vocabulary.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from mara_fast.agent import MaraAgent
from mara_fast.attention import TreeContext
from mara_fast.cache import SlotCache
from mara_fast.config import DecodingConfig
from mara_fast.language_model import FrozenLM
from mara_fast.mixture import AgentMixture
from mara_fast.row_budget import Packing, StepShape, hand_out, survival
from mara_fast.slot_state import SlotState
from mara_fast.step_graphs import Capture, StepGraphs
from mara_kernels.attention import NewRows, Tree, chain, siblings
from mara_kernels.bookkeeping import (
    FORCED,
    PLAIN,
    Proposal,
    Scored,
    admit,
    hold,
    pending,
    propose,
    settle,
)
from mara_kernels.cascade import Held, acceptance_uniforms, cascade
from mara_kernels.truncate import CandidateSet, greedy, truncate

_SPARE_COLUMNS = 24
"""Columns beyond top_k for ties into it; a buffer too small grows."""


@dataclass(frozen=True, kw_only=True)
class ScoredWindow:
    """One window of all decoding slots, as an observer sees it before it is committed."""

    state: SlotState
    """With the held candidate of this window, its position still undecided."""
    size: Tensor
    """int64 [B], candidates of the set; 0 where a slot waits."""
    count: Tensor
    """int64 [B], candidates of the window; the columns behind them repeat the first."""
    rank: Tensor
    """int64 [B, W], probability rank."""
    accept_logit: Tensor
    """float32 [B, W]"""
    hidden: Tensor
    """[B, W, H]"""
    log_prob: Tensor
    """float32 [B, W], log π of Eq. 6; -inf behind the window."""
    decided: Tensor
    """bool [B], the position ends with this window."""


@dataclass(frozen=True, kw_only=True)
class _Window(Proposal):
    """The candidates that a step forwards, forwarded."""

    hidden: Tensor
    """[R, H]"""
    place: Tensor | None
    """int64 [B, W], row of ``hidden``; None: slot by slot."""
    base: int
    """Row of the cache where their keys and values begin."""

    def by_slot(self, rows: Tensor) -> Tensor:
        """[R, ...] as [B, W, ...]."""
        return rows.unflatten(0, self.rank.shape) if self.place is None else rows[self.place]


class Decoder:
    """Decodes slots step by step; the engine decides what is in them.

    The first ``num_decoding`` slots decode. Slots behind them may be prefilled meanwhile.

    Args:
        lm: the frozen language model.
        agent: accepts or rejects, weighted already; None for plain decoding.
        config: decoding options.
        cache: to decode in; at least ``num_slots`` slots, and scratch for every forward's rows.
        num_slots: sequences held, decoding or not.
        shapes: rows of a step, by the number of slots that decode, less one.
        eos_ids: what ends a sequence.
        host_reads: leave out rows that cannot matter, by reading tensors on the host.
        capture: replays steps as graphs, where nobody observes them and nothing is read on the
            host; None: all run eagerly.
    """

    def __init__(
        self,
        lm: FrozenLM,
        agent: MaraAgent | AgentMixture | None,
        config: DecodingConfig,
        *,
        cache: SlotCache,
        num_slots: int,
        shapes: tuple[StepShape, ...],
        eos_ids: tuple[int, ...],
        host_reads: bool,
        capture: Capture | None = None,
    ) -> None:
        self.lm, self.agent, self.config, self.shapes = lm, agent, config, shapes
        self.cache, self.host_reads, self.rule = cache, host_reads, config.cascade_rule
        self.num_slots = num_slots
        self.graphs: StepGraphs | None = None
        if capture is not None and not host_reads:
            # Weakly: in a circle with its graphs its memory would outlive it until it is collected.
            step = weakref.WeakMethod(self.step)

            def live_step(num_decoding: int) -> None:
                bound = step()
                assert bound is not None
                bound(num_decoding)

            self.graphs = StepGraphs(live_step, capture=capture)
        self.observer: Callable[[ScoredWindow], None] | None = None
        """Is shown every window that the agent scored."""
        self.is_plain_greedy = agent is None and config.acceptance == "greedy"
        vocab_size = lm.vocab_size
        top_k = min(config.top_k, vocab_size) if config.top_k else vocab_size
        self.capacity = min(vocab_size, max(64, top_k + _SPARE_COLUMNS))
        self.columns = self.capacity
        self.state = SlotState.empty(
            num_slots,
            columns=1 if agent is None else self.columns,
            num_tokens=config.max_new_tokens,
            hidden_size=lm.hidden_size,
            dtype=lm.model.dtype,
            device=lm.device,
            trace=config.trace and agent is not None,
        )
        # A tokenizer may know ids that the model never produces.
        known = [token_id for token_id in eos_ids if token_id < vocab_size]
        self.eos_ids = torch.tensor(known, dtype=torch.int64, device=lm.device)
        self._ending_ids = self.eos_ids[:0] if config.ignore_eos else self.eos_ids
        self._trees: dict[int, Tree] = {}
        # Accept logits where there is no agent.
        most = max(shape.window for shape in shapes)
        self._unasked = torch.zeros(num_slots, most, device=lm.device)
        self._survival = torch.tensor(
            survival(examines_all=config.strategy != "first"), device=lm.device
        )

    def prefill(self, slots: slice, ids_BT: Tensor, num_valid: Tensor, complete: Tensor) -> None:
        """One chunk of the prompts of some slots.

        Args:
            slots: which.
            ids_BT: int64 [B, T], right-padded.
            num_valid: int64 [B], tokens of each row that are not padding.
            complete: bool [B], the prompt ends with this chunk.
        """
        state = self.state.narrowed(slots)
        tree = chain(ids_BT.shape[1], ids_BT.device)
        depths, base = tree.depths, self._base(state)
        # Padding may point past the end; no row that counts does.
        positions = (state.length[:, None] + depths).clamp(max=self.cache.max_length - 1)
        hidden = self._forward(slots, state, ids_BT, positions, tree=tree, base=base)
        valid = depths < num_valid[:, None]
        source = (base + depths).expand_as(ids_BT)
        destination = torch.where(valid, state.length[:, None] + depths, self.cache.trash)
        if not (self.host_reads and (state.length == base).all()):
            self.cache.commit(source, destination)
        state.length += num_valid
        state.num_forwards += 1
        last = (num_valid - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[-1])
        state.hidden.copy_(hidden.gather(1, last)[:, 0])
        self._truncate(slots, state, complete)

    def start(self, observer: Callable[[ScoredWindow], None] | None) -> None:
        """Prepares a run; all slots are idle."""
        self.observer = observer
        if self.agent is not None:
            self.agent.refresh_scoring()
            if self.graphs is not None:
                # What graphs read of the agent is brought up to date by an eager call.
                self.agent.accept_logit(self.state.hidden[:1])

    def run_step(self, num_decoding: int, *, most: int) -> None:
        """One window of every decoding slot, as a graph where it can be one.

        Args:
            num_decoding: slots that decode.
            most: slots that may; between the two are idle ones.
        """
        if self.graphs is None or self.observer is not None:
            self.step(num_decoding)
        else:
            self.graphs.step(num_decoding, most=most)

    def step(self, num_decoding: int) -> None:
        """One window of every decoding slot, eagerly."""
        slots = slice(0, num_decoding)
        state = self.state.narrowed(slots)
        if self.host_reads and not pending(state).any():
            return
        shape = self.shapes[num_decoding - 1]
        window = self._propose(slots, state, shape)
        if self.host_reads and window.rank.shape[1] > 1 and window.hidden.isnan().any():
            # 0 * NaN is NaN: a masked sibling has spoilt the row beside it. One by one, then.
            self.cache.clear_rows(window.base)
            window = self._propose(slots, state, StepShape.uniform(num_decoding, 1))

        if self.agent is None:
            # Every set is one token, chosen and emitted when it was admitted.
            num_slots, width = window.rank.shape
            logit_BW = self._unasked[:num_slots, :width]
        else:
            logit_BW = window.by_slot(self.agent.accept_logit(window.hidden))
        decision = cascade(
            logit_BW,
            offset=state.offset,
            size=window.size,
            held=Held(state.held_accepted, state.held_preference, state.log_residual),
            rule=self.rule,
            sequence=state.sequence,
            position=state.num_tokens,
            count=window.count,
        )
        scored = Scored(
            accept_logit=logit_BW, hidden=window.hidden, place=window.place, count=window.count
        )
        if state.trace_logits.shape[1]:
            self._trace_logits(state, window.rank, logit_BW)
        if self.observer is not None and self.agent is not None:
            # Which is done again when it is settled.
            hold(state, scored, decision)
            self.observer(
                ScoredWindow(
                    state=state,
                    size=window.size,
                    count=window.count,
                    rank=window.rank,
                    accept_logit=logit_BW,
                    hidden=window.by_slot(window.hidden),
                    log_prob=decision.log_prob,
                    decided=decision.decided & ~decision.invalid,
                )
            )
        # The best candidate so far; a better one of a later window overwrites it.
        self._commit(decision.row, window.base, state.length)
        chosen = settle(state, scored, decision, rule=self.rule, eos_ids=self._ending_ids)
        self._truncate(slots, state, chosen)

    def grow(self) -> None:
        """Makes room for candidate sets that outgrew the buffer, which wait for it.

        Reads the state on the host: call it between steps. With ``host_reads`` no set ever waits.
        """
        capacity = self.capacity
        while (waiting := self.state.size > self.state.candidate_ids.shape[1]).any():
            capacity = self._wider(capacity)
            self._truncate(slice(None), self.state, waiting, capacity)

    def reset(self, slot: int, *, sequence: int) -> None:
        """Empties a slot for a new sequence."""
        self.state.reset(slot, sequence=sequence)
        self.cache.clear(slot)

    def move(self, source: int, destination: int) -> None:
        """Copies a slot, with its cache, over another."""
        self.cache.move(source, destination)
        self.state.move(source, destination)

    def swap(self, first: int, second: int) -> None:
        """Exchanges two slots, with their caches."""
        self.cache.swap(first, second)
        self.state.swap(first, second)

    def _propose(self, slots: slice, state: SlotState, shape: StepShape) -> "_Window":
        """The next candidates of every slot, forwarded."""
        num_slots, count = state.size.shape[0], None
        if self.host_reads or shape.num_rows < num_slots * shape.window:
            count = rows = hand_out(state.offset, pending(state), shape, self._survival)
            if self.host_reads:
                # An idle slot keeps a row of its own: of another's, a NaN would stay in its cache.
                rows = count.clamp(min=1)
                shape = StepShape(window=int(rows.max()), num_rows=int(rows.sum()))
        proposal = propose(
            state,
            window=shape.window,
            count=count,
            last_position=self.cache.max_length - 1,
            order=self.rule.order,
        )
        base, packing = self._base(state), None
        if self.lm.can_pack and shape.num_rows < num_slots * shape.window:
            packing = Packing.of(rows, shape)
        tree = self._siblings(shape.window)
        hidden = self._forward(
            slots, state, proposal.ids, proposal.positions, tree=tree, base=base, packing=packing
        )
        return _Window(
            **vars(proposal),
            hidden=hidden.flatten(0, 1),
            place=None if packing is None else packing.place,
            base=base,
        )

    def _siblings(self, width: int) -> Tree:
        """The tree of a window; made once, outside of graphs."""
        if width not in self._trees:
            self._trees[width] = siblings(width, self.lm.device)
        return self._trees[width]

    def _base(self, state: SlotState) -> int:
        """Row where the new rows begin: behind every prefix, and the best candidate behind it."""
        if not self.host_reads:
            return self.cache.max_length
        return int((state.length + (state.offset > 0)).max())

    def _forward(
        self,
        slots: slice,
        state: SlotState,
        ids_BT: Tensor,
        positions: Tensor,
        *,
        tree: Tree,
        base: int,
        packing: Packing | None = None,
    ) -> Tensor:
        """[B, T, H] of new rows behind the slots' prefixes; [1, R, H] if they are packed."""
        one_row = ids_BT.shape[1] == 1
        rows = NewRows(
            lengths=state.length,
            tree=tree,
            base=base,
            see_everything=self.host_reads and one_row and bool((state.length == base).all()),
        )
        if packing is not None:
            ids_BT = ids_BT[packing.slot, packing.column][None]
            positions = positions[packing.slot, packing.column][None]
        self.cache.select(slots, base=base, packing=packing)
        context = TreeContext(rows=rows, packing=packing)
        return self.lm.hidden_states(ids_BT, positions=positions, cache=self.cache, context=context)

    def _commit(self, row: Tensor, base: int, destination: Tensor) -> None:
        """Keeps one new row of each slot, -1: none."""
        if not self.host_reads:
            self.cache.keep_rows(row, destination)
            return
        moved = ((row >= 0) & (base + row != destination)).nonzero()[:, 0]
        if moved.numel():
            self.cache.commit_rows(moved, base + row[moved], destination[moved])

    def _truncate(
        self, slots: slice, state: SlotState, chosen: Tensor, capacity: int | None = None
    ) -> None:
        """New candidate sets from ``state.hidden`` where chosen; forced tokens are emitted.

        A set that outgrows ``capacity`` is made anew with more, or marked as waiting for it.
        """
        index: Tensor | None = None
        if self.host_reads:
            index = chosen.nonzero()[:, 0]
            if not index.numel():
                return
        at = slice(None) if index is None else index
        logits = self.lm.logits(state.hidden[at])
        if self.config.min_new_tokens and self.eos_ids.numel():
            early = state.num_tokens[at] < self.config.min_new_tokens
            at_eos = logits[:, self.eos_ids]
            logits[:, self.eos_ids] = at_eos.masked_fill(early[:, None], -torch.inf)
        capacity = capacity or self.capacity
        new = self._candidates(logits, capacity)
        while self.host_reads and new.size.max() > new.ids.shape[1]:
            capacity = self._wider(capacity)
            state = self.state.narrowed(slots)
            new = self._candidates(logits, capacity)
        if self.agent is None and not self.is_plain_greedy:
            new = _sample(new, self.config.seed, state.sequence[at], state.num_tokens[at])
        if state.trace_ids.shape[1]:
            self._trace_candidates(state, new, at, chosen)
        admit(
            state,
            new,
            chosen,
            index=index,
            verdict=PLAIN if self.agent is None else FORCED,
            order=self.rule.order,
            eos_ids=self._ending_ids,
        )

    def _candidates(self, logits: Tensor, capacity: int) -> CandidateSet:
        if self.is_plain_greedy:
            return greedy(logits)
        return truncate(
            logits,
            top_k=self.config.top_k,
            top_p=self.config.top_p,
            temperature=self.config.temperature,
            capacity=capacity,
        )

    def _wider(self, capacity: int) -> int:
        """The next larger capacity; the candidate buffers are made as wide if they are not.

        Only what outgrew a capacity is truncated with more: few rows do, and the kernels are
        fastest on few columns.
        """
        if capacity < self.columns:
            return self.columns
        self.columns = min(self.lm.vocab_size, 2 * self.columns)
        if self.agent is None:
            return self.columns
        state = self.state
        behind = {"candidate_ids": 0.0, "candidate_logprobs": -torch.inf}
        if state.trace_ids.shape[1]:
            behind |= {"trace_ids": 0.0, "trace_logprobs": -torch.inf, "trace_logits": torch.nan}
        for name, value in behind.items():
            buffer = getattr(state, name)
            spare = (0, self.columns - buffer.shape[-1])
            setattr(state, name, pad(buffer, spare, value=value))
        if self.graphs is not None:
            self.graphs.forget()
        return self.columns

    def _trace_candidates(
        self, state: SlotState, new: CandidateSet, at: Tensor | slice, chosen: Tensor
    ) -> None:
        """Keeps sets, of the slots ``at``, where chosen."""
        column = state.num_tokens[at].clamp(max=self.config.max_new_tokens - 1)
        slot = torch.arange(chosen.shape[0], device=column.device)[at]
        spare = (0, state.trace_ids.shape[-1] - new.ids.shape[1])
        for buffer, values in (
            (state.trace_ids, pad(new.ids, spare)),
            (state.trace_logprobs, pad(new.logprobs, spare, value=-torch.inf)),
        ):
            kept = torch.where(chosen[at][:, None], values, buffer[slot, column])
            buffer[slot, column] = kept

    def _trace_logits(self, state: SlotState, rank: Tensor, logit_BW: Tensor) -> None:
        column = state.num_tokens.clamp(max=self.config.max_new_tokens - 1)
        slot = torch.arange(column.shape[0], device=column.device)
        # Rows past the set repeat the first rank, with its logit.
        logit_BW = torch.where(rank == rank[:, :1], logit_BW[:, :1], logit_BW)
        traced = state.trace_logits[slot, column].scatter(1, rank, logit_BW)
        state.trace_logits[slot, column] = torch.where(
            (state.size > 0)[:, None], traced, state.trace_logits[slot, column]
        )


def _sample(
    candidates: CandidateSet, seed: int, sequence: Tensor, position: Tensor
) -> CandidateSet:
    """One token of each set by the inverse of its distribution function, as a set of one.

    A set that outgrew its columns stays one that has: it has to be made anew.
    """
    uniform, _ = acceptance_uniforms(seed, sequence, position, torch.zeros_like(position))
    mass = torch.softmax(candidates.logprobs, dim=-1).cumsum(-1)
    last = candidates.size.clamp(min=1, max=candidates.ids.shape[1]) - 1
    chosen = (mass <= uniform[:, None]).sum(-1).clamp(max=last)
    ids = candidates.ids.gather(1, chosen[:, None])
    logprobs = candidates.logprobs.gather(1, chosen[:, None])
    size = candidates.size
    outgrows = size > candidates.ids.shape[1]
    return CandidateSet(ids, logprobs, torch.where(outgrows, 2, size.clamp(max=1)))
