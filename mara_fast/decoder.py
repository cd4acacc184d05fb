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
from mara_fast.slot_state import (
    ACCEPTED,
    BAD_ACCEPT,
    BAD_LOGITS,
    EOS,
    FALLBACK,
    FORCED,
    LENGTH,
    PLAIN,
    RUNNING,
    SlotState,
)
from mara_fast.step_graphs import Capture, StepGraphs
from mara_kernels.attention import NewRows, Tree, chain, siblings
from mara_kernels.cascade import Held, acceptance_uniforms, cascade, rank_of_tried
from mara_kernels.truncate import CandidateSet, truncate

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
class _Window:
    """The candidates that a step forwards."""

    count: Tensor
    """int64 [B], of each slot."""
    rank: Tensor
    """int64 [B, W], probability rank; columns behind the slot's candidates repeat its first."""
    hidden: Tensor
    """[R, H]"""
    place: Tensor
    """int64 [B, W], row of ``hidden``."""
    base: int
    """Row of the cache where their keys and values begin."""


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
        hidden = self._forward(slots, state, ids_BT, tree, base)
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

        # Propose. A set that outgrew the buffer waits until the host has made room.
        size = torch.where(state.size <= state.candidate_ids.shape[1], state.size, 0)
        if self.host_reads and not size.any():
            return
        shape = self.shapes[num_decoding - 1]
        window = self._propose(slots, state, size, shape)
        if self.host_reads and window.rank.shape[1] > 1 and window.hidden.isnan().any():
            # 0 * NaN is NaN: a masked sibling has spoilt the row beside it. One by one, then.
            self.cache.clear_rows(window.base)
            window = self._propose(slots, state, size, StepShape.uniform(num_decoding, 1))
        state.num_forwards += size > 0

        # Score and select.
        if self.agent is None:
            # Every set is one token, chosen and emitted when it was truncated.
            logit_BW = torch.zeros(window.rank.shape, device=size.device)
        else:
            logit_BW = self.agent.accept_logit(window.hidden)[window.place]
        decision = cascade(
            logit_BW,
            offset=state.offset,
            size=size,
            held=Held(state.held_accepted, state.held_preference, state.log_residual),
            rule=self.rule,
            sequence=state.sequence,
            position=state.num_tokens,
            count=window.count,
        )
        better, row = decision.row >= 0, decision.row.clamp(min=0)
        slot = torch.arange(row.shape[0], device=row.device)
        state.held_accepted.copy_(decision.held.accepted)
        state.held_preference.copy_(decision.held.preference)
        state.log_residual.copy_(decision.held.log_residual)
        state.held_tried.copy_(torch.where(better, state.offset + row, state.held_tried))
        state.held_logit.copy_(torch.where(better, logit_BW[slot, row], state.held_logit))
        state.held_logprob.copy_(
            torch.where(better, decision.log_prob[slot, row], state.held_logprob)
        )
        best = window.hidden[window.place[slot, row]]
        state.hidden.copy_(torch.where(better[:, None], best, state.hidden))
        if state.trace_logits.shape[1]:
            self._trace_logits(state, window.rank, logit_BW)

        decided = decision.decided & ~decision.invalid
        if self.observer is not None and self.agent is not None:
            self.observer(
                ScoredWindow(
                    state=state,
                    size=size,
                    count=window.count,
                    rank=window.rank,
                    accept_logit=logit_BW,
                    hidden=window.hidden[window.place],
                    log_prob=decision.log_prob,
                    decided=decided,
                )
            )

        # Commit the best candidate so far; a better one of a later window overwrites it.
        self._commit(better, window.base + row, state.length)
        state.done.masked_fill_(decision.invalid, BAD_ACCEPT)
        state.size.masked_fill_(decision.invalid, 0)
        asked = decided & (size > 1)
        self._emit(
            state,
            asked,
            torch.where(state.held_accepted, ACCEPTED, FALLBACK),
            policy_logprob=self._policy_logprob(state),
        )
        state.length += decided
        state.offset += window.count
        state.offset.masked_fill_(decided, 0)
        self._truncate(slots, state, decided & (state.done == RUNNING))

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

    def _propose(self, slots: slice, state: SlotState, size: Tensor, shape: StepShape) -> "_Window":
        """The next candidates of every slot, forwarded."""
        count = rows = hand_out(state.offset, size, shape, self._survival)
        if self.host_reads:
            # An idle slot keeps a row of its own: of another's, a NaN would stay in its cache.
            rows = count.clamp(min=1)
            shape = StepShape(window=int(rows.max()), num_rows=int(rows.sum()))
        num_slots, width = count.shape[0], shape.window
        column = torch.arange(width, device=count.device)
        # Beyond its own rows a slot repeats its first.
        tried = state.offset[:, None] + torch.where(column < count[:, None], column, 0)
        rank = rank_of_tried(tried, size[:, None], self.rule.order)
        rank = rank.clamp(min=0, max=state.candidate_ids.shape[1] - 1)
        ids_BW = state.candidate_ids.gather(1, rank)
        base = self._base(state)
        packing = None
        if self.lm.can_pack and shape.num_rows < num_slots * width:
            packing = Packing.of(rows, shape)
        tree = siblings(width, ids_BW.device)
        hidden = self._forward(slots, state, ids_BW, tree, base, packing)
        if packing is None:
            place = torch.arange(num_slots * width, device=count.device).view(num_slots, width)
        else:
            place = packing.place
        return _Window(count=count, rank=rank, hidden=hidden.flatten(0, 1), place=place, base=base)

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
        # Padding and idle rows may point past the end; no row that counts does.
        positions = (state.length[:, None] + tree.depths).clamp(max=self.cache.max_length - 1)
        if packing is not None:
            ids_BT = ids_BT[packing.slot, packing.column][None]
            positions = positions[packing.slot, packing.column][None]
        self.cache.select(slots, base=base, packing=packing)
        context = TreeContext(rows=rows, packing=packing)
        return self.lm.hidden_states(ids_BT, positions=positions, cache=self.cache, context=context)

    def _commit(self, chosen: Tensor, source: Tensor, destination: Tensor) -> None:
        """Keeps one new row per slot where chosen."""
        if self.host_reads:
            moved = (chosen & (source != destination)).nonzero()[:, 0]
            if moved.numel():
                self.cache.commit_rows(moved, source[moved], destination[moved])
            return
        destination = torch.where(chosen, destination, self.cache.trash)
        self.cache.commit(source[:, None], destination[:, None])

    def _truncate(
        self, slots: slice, state: SlotState, chosen: Tensor, capacity: int | None = None
    ) -> None:
        """New candidate sets from ``state.hidden`` where chosen; forced tokens are emitted.

        A set that outgrows ``capacity`` is made anew with more, or marked as waiting for it.
        """
        index: Tensor | slice = slice(None)
        if self.host_reads:
            index = chosen.nonzero()[:, 0]
            if not index.numel():
                return
        logits = self.lm.logits(state.hidden[index])
        if self.config.min_new_tokens and self.eos_ids.numel():
            early = state.num_tokens[index] < self.config.min_new_tokens
            at_eos = logits[:, self.eos_ids]
            logits[:, self.eos_ids] = at_eos.masked_fill(early[:, None], -torch.inf)
        capacity = capacity or self.capacity
        new = self._candidates(logits, capacity)
        while self.host_reads and new.size.max() > new.ids.shape[1]:
            capacity = self._wider(capacity)
            state = self.state.narrowed(slots)
            new = self._candidates(logits, capacity)
        outgrows = new.size > new.ids.shape[1]
        if self.agent is None and not self.is_plain_greedy:
            new = _sample(new, self.config.seed, state.sequence[index], state.num_tokens[index])

        mine, width = chosen[index], state.candidate_ids.shape[1]
        size = torch.where(outgrows, width + 1, new.size)
        state.size[index] = torch.where(mine, size, state.size[index])
        mine, spare = mine[:, None], (0, width - new.ids.shape[1])
        ids, logprobs = pad(new.ids, spare), pad(new.logprobs, spare, value=-torch.inf)
        state.candidate_ids[index] = torch.where(mine, ids, state.candidate_ids[index])
        state.candidate_logprobs[index] = torch.where(
            mine, logprobs, state.candidate_logprobs[index]
        )
        state.done.masked_fill_(chosen & (state.size == 0), BAD_LOGITS)
        if state.trace_ids.shape[1]:
            self._trace_candidates(state, chosen)

        state.held_tried.masked_fill_(chosen, 0)
        state.held_logit.masked_fill_(chosen, torch.nan)
        self._emit(state, chosen & (state.size == 1), PLAIN if self.agent is None else FORCED)

    def _candidates(self, logits: Tensor, capacity: int) -> CandidateSet:
        if self.is_plain_greedy:
            return _argmax(logits)
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
        names = ["candidate_ids", "candidate_logprobs"]
        if state.trace_ids.shape[1]:
            names += ["trace_ids", "trace_logprobs", "trace_logits"]
        for name in names:
            buffer = getattr(state, name)
            spare = (0, self.columns - buffer.shape[-1])
            setattr(state, name, pad(buffer, spare))
        if self.graphs is not None:
            self.graphs.forget()
        return self.columns

    def _policy_logprob(self, state: SlotState) -> Tensor:
        """[B], that the sampled cascade emits the held candidate of a position decided now.

        Eq. 6, and for the token that is the fallback also that all are rejected. An accepted token
        may be it as well, but unless it was tried last nobody knows yet what becomes of the rest.
        """
        is_fallback = ~state.held_accepted
        if self.rule.fallback == "last":
            is_fallback = is_fallback | (state.held_tried == state.size - 1)
        emitted = torch.logaddexp(state.held_logprob, state.log_residual)
        return torch.where(is_fallback, emitted, state.held_logprob)

    def _emit(
        self,
        state: SlotState,
        chosen: Tensor,
        verdict: Tensor | int,
        *,
        policy_logprob: Tensor | None = None,
    ) -> None:
        """Appends the held candidate of the pending position where chosen."""
        column = state.num_tokens.clamp(max=self.config.max_new_tokens - 1)
        slot = torch.arange(column.shape[0], device=column.device)
        rank = rank_of_tried(state.held_tried, state.size, self.rule.order)
        rank = rank.clamp(min=0, max=state.candidate_ids.shape[1] - 1)
        token = state.candidate_ids[slot, rank]
        if isinstance(verdict, int):
            verdict = torch.full_like(token, verdict)
        values = torch.stack((token, state.size, rank, state.held_tried, verdict), dim=-1)
        logprob = state.candidate_logprobs[slot, rank]
        if policy_logprob is None:
            policy_logprob = reference = torch.full_like(logprob, torch.nan)
        else:
            # Columns behind the set hold -inf.
            reference = logprob - state.candidate_logprobs.logsumexp(-1)
        floats = torch.stack((logprob, state.held_logit, policy_logprob, reference), dim=-1)
        chosen_B1 = chosen[:, None]
        state.record[slot, column] = torch.where(chosen_B1, values, state.record[slot, column])
        state.record_floats[slot, column] = torch.where(
            chosen_B1, floats, state.record_floats[slot, column]
        )
        state.num_tokens += chosen
        if not self.config.ignore_eos:
            state.done.masked_fill_(chosen & (token[:, None] == self.eos_ids).any(-1), EOS)
        full = chosen & (state.num_tokens >= self.config.max_new_tokens) & (state.done == RUNNING)
        state.done.masked_fill_(full, LENGTH)
        state.size.masked_fill_(chosen & (state.done != RUNNING), 0)

    def _trace_candidates(self, state: SlotState, chosen: Tensor) -> None:
        column = state.num_tokens.clamp(max=self.config.max_new_tokens - 1)
        slot = torch.arange(column.shape[0], device=column.device)
        for buffer, values in (
            (state.trace_ids, state.candidate_ids),
            (state.trace_logprobs, state.candidate_logprobs),
        ):
            buffer[slot, column] = torch.where(chosen[:, None], values, buffer[slot, column])

    def _trace_logits(self, state: SlotState, rank: Tensor, logit_BW: Tensor) -> None:
        column = state.num_tokens.clamp(max=self.config.max_new_tokens - 1)
        slot = torch.arange(column.shape[0], device=column.device)
        # Rows past the set repeat the first rank, with its logit.
        logit_BW = torch.where(rank == rank[:, :1], logit_BW[:, :1], logit_BW)
        traced = state.trace_logits[slot, column].scatter(1, rank, logit_BW)
        state.trace_logits[slot, column] = torch.where(
            (state.size > 0)[:, None], traced, state.trace_logits[slot, column]
        )


def _argmax(logits: Tensor) -> CandidateSet:
    """The most probable token as a set of one; equals go to the lowest id."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    ids = logprobs.argmax(dim=-1, keepdim=True)
    best = logprobs.gather(1, ids)
    return CandidateSet(ids, best, best[:, 0].isfinite().long())


def _sample(
    candidates: CandidateSet, seed: int, sequence: Tensor, position: Tensor
) -> CandidateSet:
    """One token of each set by the inverse of its distribution function, as a set of one.

    Of a set with more ties than columns the result is of no use: the set has to be made anew.
    """
    uniform, _ = acceptance_uniforms(seed, sequence, position, torch.zeros_like(position))
    mass = torch.softmax(candidates.logprobs, dim=-1).cumsum(-1)
    last = candidates.size.clamp(min=1, max=candidates.ids.shape[1]) - 1
    chosen = (mass <= uniform[:, None]).sum(-1).clamp(max=last)
    ids = candidates.ids.gather(1, chosen[:, None])
    logprobs = candidates.logprobs.gather(1, chosen[:, None])
    return CandidateSet(ids, logprobs, candidates.size.clamp(max=1))
