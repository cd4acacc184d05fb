"""What kernel_speed.py measures: the cases of each operation, with inputs, baselines, floor, check.

    truncate   floor: logits read once, 2 B V bytes
               baselines: log_softmax + topk, the same compiled, Hugging Face's warpers
    score      floor: weights and states read once, 2 (weights + N H) bytes, and multiplied,
               2 N weights operations; weights = I H + I I/4
               baselines: the definition, and compiled
    cascade    no floor: it is bound by its launches
               baselines: the definition
    attention  floor: prefix and new rows of a slot read once, queries read, output written,
               4 B D ((S + W) Hkv + W Hq) bytes; q.k and p.v, 4 B Hq D seen operations;
               seen = W (S + 1) of siblings, W S + W (W + 1) / 2 of a chunk
               baselines: SDPA with a mask over the slots; of siblings also SDPA over a copy of the
               prefix for each, and flash-attn; of a chunk SDPA told that it is causal

Fairness: every version of a case has the same inputs and gives the same result, in the form of our
operation; what a decoder prepares once per forward or per model (folded weights, masks, copies of
the prefix) is prepared outside the clock, for all of them.

Shapes: B slots, W new rows, V vocabulary, N states, H hidden, I inner size, Hq query heads, Hkv key
heads, S prefix, D head size.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import TopKLogitsWarper, TopPLogitsWarper

from mara_kernels import dispatch
from mara_kernels.attention import NewRows, candidate_attention, chain, flash, siblings
from mara_kernels.attention import reference as attention_reference
from mara_kernels.cascade import CascadeRule, Decision, Held, cascade
from mara_kernels.cascade import reference as cascade_reference
from mara_kernels.score import AgentParameters, score
from mara_kernels.score import reference as score_reference
from mara_kernels.score.fold import fold
from mara_kernels.truncate import CandidateSet, truncate
from mara_kernels.truncate import reference as truncate_reference

TOP_K, TOP_P, CAPACITY = 40, 0.95, 64
NORM_EPS = 1e-5

MOST_SETS = 256
"""Input sets of a case. Where so many fit the L2, reading one takes under 0.1 us anyway."""
MOST_COPY_BYTES = 40e9
"""Copies of prefixes for the SDPA baseline."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The least that an operation must do."""

    num_bytes: float
    num_flops: float = 0.0

    def floor_us(self, *, bytes_per_s: float, flops_per_s: float) -> float:
        """Microseconds at these ceilings: the larger of moving and multiplying."""
        return 1e6 * max(self.num_bytes / bytes_per_s, self.num_flops / flops_per_s)


@dataclass(frozen=True, kw_only=True)
class Version:
    """One way to compute an operation."""

    name: str
    run: Callable[..., Any]
    inputs: list[tuple[Any, ...]]
    """Arguments of ``run``, in sets to rotate among; the first is the one that is checked."""
    read: Callable[[Any], Any] = lambda output: output
    """What ``run`` returns, in the form of our operation."""

    def output(self) -> Any:
        """The result for the first set."""
        return self.read(self.run(*self.inputs[0]))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one size."""

    operation: str
    name: str
    cost: Cost | None
    """None: bound by its launches."""
    has_floor_target: bool
    """Large enough that a multiple of the floor is asked for."""
    ours: Version
    baselines: list[Version]
    problem: Callable[[Any], str]
    """What is wrong with an output for the first set; empty if nothing."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Baselines left out, and why."""


Build = Callable[[torch.device, float], Case]
"""Makes a case on a device, from input sets that take at least so many bytes together."""


def num_sets(set_bytes: float, rotation_bytes: float) -> int:
    """Sets of this size to rotate among."""
    return min(MOST_SETS, max(1, math.ceil(rotation_bytes / set_bytes)))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled for the one shape it is called with."""
    # Otherwise the limit of recompilations is met after a few cases.
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def add_compiled(case: Case, device: torch.device) -> Case:
    """The case, with its first baseline compiled too."""
    name, first = "torch.compile", case.baselines[0]
    if device.type == "cuda":
        case.baselines.append(
            Version(name=name, run=compiled(first.run), inputs=first.inputs, read=first.read)
        )
    else:
        case.skipped[name] = "measured on a GPU only"
    return case


def normal(generator: torch.Generator, *size: int, std: float = 1.0) -> Tensor:
    """bf16 normal numbers."""
    dtype, device = torch.bfloat16, generator.device
    return torch.randn(size, generator=generator, dtype=dtype, device=device) * std


def worst_problem(error: Tensor | float, bound: float, unit: str) -> str:
    """The complaint if an error exceeds its bound; NaN does."""
    error = float(error)
    return "" if error <= bound else f"error {error:.3g} {unit}, {bound:g} allowed"


# --- truncate --------------------------------------------------------------------------------


def peaked_logits(generator: torch.Generator, num_rows: int, vocab_size: int) -> Tensor:
    """bf16 [B, V]: a broad background, and above it 64 tokens of probabilities like 1 / rank**2."""
    logits = normal(generator, num_rows, vocab_size, std=2.0)
    rank = torch.arange(1, 65, device=generator.device)
    head = 18 - 2 * rank.log() + normal(generator, num_rows, 64)
    size = num_rows, 64
    token = torch.randint(vocab_size, size, generator=generator, device=generator.device)
    return logits.scatter_(1, token, head.to(logits.dtype))


def topk_truncate(logits: Tensor) -> CandidateSet:
    """The candidate sets by one log-softmax and one topk; ties in any order."""
    logprob_BV = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    top_BC, id_BC = logprob_BV.topk(CAPACITY, dim=-1)
    kept_BC = top_BC.masked_fill(top_BC < top_BC[:, TOP_K - 1 : TOP_K], -torch.inf)
    tail_mass_BC = kept_BC.softmax(-1).flip(-1).cumsum(-1).flip(-1)
    size_B = (tail_mass_BC > 1 - TOP_P).sum(-1).clamp(min=1)
    outside_BC = torch.arange(CAPACITY, device=logits.device) >= size_B[:, None]
    return CandidateSet(
        id_BC.masked_fill(outside_BC, 0), top_BC.masked_fill(outside_BC, -torch.inf), size_B
    )


def warper_truncate(logits: Tensor) -> CandidateSet:
    """The candidate sets by Hugging Face's two warpers, and a topk of what they leave."""
    score_BV = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    score_BV = TopKLogitsWarper(TOP_K)(None, score_BV)
    score_BV = TopPLogitsWarper(TOP_P)(None, score_BV)
    top_BC, id_BC = score_BV.topk(CAPACITY, dim=-1)
    is_kept_BC = top_BC > -torch.inf
    return CandidateSet(id_BC.masked_fill(~is_kept_BC, 0), top_BC, is_kept_BC.sum(-1))


def truncate_case(
    device: torch.device, rotation_bytes: float, *, num_rows: int, vocab_size: int
) -> Case:
    """Peaked bf16 logits to candidate sets, top-k 40 and top-p 0.95."""
    generator = torch.Generator(device).manual_seed(0)
    cost = Cost(num_bytes=2.0 * num_rows * vocab_size)
    sets = [
        (peaked_logits(generator, num_rows, vocab_size),)
        for _ in range(num_sets(cost.num_bytes, rotation_bytes))
    ]
    rule = {"top_k": TOP_K, "top_p": TOP_P, "temperature": 1.0, "capacity": CAPACITY}
    case = Case(
        operation="truncate",
        name=f"B={num_rows} V={vocab_size}",
        cost=cost,
        has_floor_target=num_rows >= 64,
        ours=Version(name="ours", run=partial(truncate, **rule), inputs=sets),
        baselines=[
            Version(name="topk", run=topk_truncate, inputs=sets),
            Version(name="Hugging Face", run=warper_truncate, inputs=sets),
        ],
        problem=partial(truncate_problem, sets[0][0]),
    )
    return add_compiled(case, device)


def truncate_problem(logits: Tensor, found: CandidateSet) -> str:
    """Compares with the definition. Tokens of equal probability may come in any order, and a size
    may differ where a tail mass equals 1 - top_p to 1e-5."""
    rule = {"top_k": TOP_K, "temperature": 1.0, "capacity": CAPACITY}
    expected = truncate_reference.truncate(logits, top_p=TOP_P, **rule)
    kept = truncate_reference.truncate(logits, top_p=1.0, **rule)
    tail_mass_BC = kept.logprobs.softmax(-1).flip(-1).cumsum(-1).flip(-1)
    is_close_B = ((tail_mass_BC - (1 - TOP_P)).abs() < 1e-5).any(-1)
    differs_B = (found.size != expected.size) & ~is_close_B
    if differs_B.any():
        return f"{int(differs_B.sum())} of {len(logits)} sizes differ"

    column = torch.arange(CAPACITY, device=logits.device)
    inside_BC = column < torch.minimum(found.size, expected.size)[:, None]
    label_BC = torch.where(inside_BC, found.ids, -1 - column).sort(-1).values
    if (label_BC[:, 1:] == label_BC[:, :-1]).any():
        return "an id occurs twice in a set"
    logprob_BV = torch.log_softmax(logits.float(), dim=-1)
    errors = [
        torch.where(inside_BC, logprobs - expected.logprobs, 0.0).abs().max()
        for logprobs in (found.logprobs, logprob_BV.gather(1, found.ids))
    ]
    return worst_problem(torch.stack(errors).max(), 1e-4, "in a log-probability")


# --- score -----------------------------------------------------------------------------------


def random_parameters(
    generator: torch.Generator, hidden_size: int, inner_size: int
) -> AgentParameters:
    """A bf16 agent whose accept logits have a spread of about 1."""
    n, outer_size = partial(normal, generator), inner_size // 4
    return AgentParameters(
        norm_weight=1 + n(hidden_size, std=0.1),
        norm_bias=n(hidden_size, std=0.1),
        weight1=n(inner_size, hidden_size, std=(2 / hidden_size) ** 0.5),
        bias1=n(inner_size, std=0.1),
        weight2=n(outer_size, inner_size, std=(2 / inner_size) ** 0.5),
        bias2=n(outer_size, std=0.1),
        weight3=n(2, outer_size, std=(2 / outer_size) ** 0.5),
        bias3=n(2, std=0.1),
        norm_eps=NORM_EPS,
    )


def score_case(
    device: torch.device,
    rotation_bytes: float,
    *,
    num_states: int,
    hidden_size: int,
    inner_size: int = 1024,
) -> Case:
    """bf16 states to accept logits; the weights rotate too, they are most of what is read."""
    generator = torch.Generator(device).manual_seed(0)
    num_weights = inner_size * hidden_size + inner_size // 4 * inner_size
    cost = Cost(
        num_bytes=2.0 * (num_weights + num_states * hidden_size),
        num_flops=2.0 * num_states * num_weights,
    )
    sets = [
        (
            normal(generator, num_states, hidden_size),
            random_parameters(generator, hidden_size, inner_size),
        )
        for _ in range(num_sets(cost.num_bytes, rotation_bytes))
    ]
    case = Case(
        operation="score",
        name=f"N={num_states} H={hidden_size}",
        cost=cost,
        has_floor_target=num_states >= 1024,
        ours=our_score(device, sets),
        baselines=[Version(name="torch", run=score_reference.score, inputs=sets)],
        problem=partial(score_problem, *sets[0]),
    )
    return add_compiled(case, device)


def our_score(device: torch.device, sets: list[tuple[Any, ...]]) -> Version:
    """The launches with folded weights; on a CPU the public operation."""
    if device.type != "cuda":
        return Version(name="ours", run=score, inputs=sets)
    from mara_kernels.score.kernel import score_triton

    return Version(
        name="ours",
        run=partial(score_triton, norm_eps=NORM_EPS, architecture=dispatch.architecture(device)),
        inputs=[(states, fold(parameters, states.dtype)) for states, parameters in sets],
    )


def score_problem(states: Tensor, parameters: AgentParameters, found: Tensor) -> str:
    """Compares with the definition in float64; bf16 products are within 0.02 of the spread."""
    exact = AgentParameters.of([t.double() for t in parameters.tensors], parameters.norm_eps)
    error = (found - score_reference.score(states.double(), exact)).abs().max()
    # One state has no spread: that of others is taken.
    generator = torch.Generator(states.device).manual_seed(1)
    others = normal(generator, 256, states.shape[1])
    spread = score_reference.score(others.double(), exact).std()
    return worst_problem(error / spread, 0.05, "of the spread of the accept logits")


# --- cascade ---------------------------------------------------------------------------------


def cascade_case(
    device: torch.device, rotation_bytes: float, *, num_slots: int, window: int
) -> Case:
    """A first window of accept logits to decisions, by the default rule."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(most: int) -> Tensor:
        return torch.randint(most, (num_slots,), generator=generator, device=device)

    def one_set() -> tuple[Tensor, dict[str, Any]]:
        return normal(generator, num_slots, window).float(), {
            "offset": torch.zeros(num_slots, dtype=torch.int64, device=device),
            "size": draw(TOP_K) + 1,
            "held": Held.empty(num_slots, device),
            "sequence": draw(1000),
            "position": draw(1000),
        }

    def by(body: Callable[..., Decision]) -> Callable[..., Decision]:
        return lambda accept_logit_BW, others: body(accept_logit_BW, rule=CascadeRule(), **others)

    # A slot has its logits, their log-probabilities, and about 60 bytes of state in and out.
    set_bytes = num_slots * (8 * window + 60)
    sets = [one_set() for _ in range(num_sets(set_bytes, rotation_bytes))]
    return Case(
        operation="cascade",
        name=f"B={num_slots} W={window}",
        cost=None,
        has_floor_target=False,
        ours=Version(name="ours", run=by(cascade), inputs=sets),
        baselines=[Version(name="torch", run=by(cascade_reference.cascade), inputs=sets)],
        problem=lambda found: cascade_problem(by(cascade_reference.cascade)(*sets[0]), found),
    )


def cascade_problem(expected: Decision, found: Decision) -> str:
    """Compares decisions exactly, log-probabilities to 1e-4."""
    for name in ("row", "decided", "invalid"):
        if not torch.equal(getattr(found, name), getattr(expected, name)):
            return f"{name} differs"
    if not torch.equal(found.held.accepted, expected.held.accepted):
        return "held.accepted differs"
    floats = {
        "held.preference": (found.held.preference, expected.held.preference),
        "held.log_residual": (found.held.log_residual, expected.held.log_residual),
        "log_prob": (found.log_prob, expected.log_prob),
    }
    for name, (mine, other) in floats.items():
        # -inf equals -inf here, which no difference would say.
        if not torch.allclose(mine, other, rtol=1e-4, atol=1e-4):
            return f"{name} differs by more than 1e-4"
    return ""


# --- attention -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Sizes of an attention case; all slots have the same length."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    length: int
    num_rows: int
    num_slots: int
    kind: Literal["siblings", "chain"] = "siblings"

    @property
    def kv_row_bytes(self) -> float:
        """Key and value of a position, of all heads."""
        return 4.0 * self.num_kv_heads * self.head_size

    @property
    def cost(self) -> Cost:
        """Prefix and new rows read once per slot, queries read, output written."""
        num_seen = self.num_rows * (self.length + 1)
        if self.kind == "chain":
            num_seen = self.num_rows * self.length + self.num_rows * (self.num_rows + 1) // 2
        keys = self.num_slots * (self.length + self.num_rows) * self.kv_row_bytes
        rows = 4.0 * self.num_slots * self.num_rows * self.num_heads * self.head_size
        num_flops = 4.0 * self.num_slots * self.num_heads * self.head_size * num_seen
        return Cost(num_bytes=keys + rows, num_flops=num_flops)

    @property
    def name(self) -> str:
        """For the table."""
        heads = f"{self.num_heads}/{self.num_kv_heads}/{self.head_size}"
        rows = f"{'chunk' if self.kind == 'chain' else 'W'}={self.num_rows}"
        return f"{heads} S={self.length} {rows} B={self.num_slots}"


def attention_inputs(
    generator: torch.Generator, shape: AttentionShape
) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 queries [B, Hq, W, D], and the slots' keys and values as the engine's cache lays them
    out: the prefix, the new rows, one row more.

    A new row's key resembles its queries so that it weighs about as much as the whole prefix: an
    attention that forgets it is found out at any length.
    """
    s, length = shape, shape.length
    group = s.num_heads // s.num_kv_heads
    query = normal(generator, s.num_slots, s.num_rows, s.num_heads, s.head_size).transpose(1, 2)
    size = s.num_slots, s.num_kv_heads, length + s.num_rows + 1, s.head_size
    key, value = normal(generator, *size), normal(generator, *size)
    grouped = query.reshape(s.num_slots, s.num_kv_heads, group, s.num_rows, s.head_size)
    own_key = grouped.float().sum(2) * (math.log(length) / s.head_size**0.5)
    key[:, :, length : length + s.num_rows] = own_key.to(key.dtype)
    return query, key, value


def attention_case(device: torch.device, rotation_bytes: float, *, shape: AttentionShape) -> Case:
    """New rows over prefixes of one length."""
    generator = torch.Generator(device).manual_seed(0)
    length, num_rows, scale = shape.length, shape.num_rows, shape.head_size**-0.5
    tree = (chain if shape.kind == "chain" else siblings)(num_rows, device)
    lengths = torch.full((shape.num_slots,), length, device=device)
    rows = NewRows(lengths=lengths, tree=tree, base=length)
    sets = [
        attention_inputs(generator, shape)
        for _ in range(num_sets(shape.cost.num_bytes, rotation_bytes))
    ]

    def masked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        end, visible = length + num_rows, rows.visible(None)
        return attention_reference.candidate_attention(
            query, key[:, :, :end], value[:, :, :end], visible, scale=scale
        )

    case = Case(
        operation="attention",
        name=shape.name,
        cost=shape.cost,
        has_floor_target=shape.num_slots * length >= 32 * 1024,
        ours=Version(
            name="ours", run=partial(candidate_attention, rows=rows, scale=scale), inputs=sets
        ),
        baselines=[Version(name="SDPA, mask", run=masked, inputs=sets)],
        problem=partial(attention_problem, sets[0], rows, scale),
    )
    if shape.kind == "chain":
        case.baselines.append(causal_version(shape, sets))
    else:
        add_copies(case, shape, sets, rotation_bytes)
        add_flash(case, rows, sets, scale)
    return case


def causal_version(shape: AttentionShape, sets: list[tuple[Any, ...]]) -> Version:
    """SDPA of a chunk, told that it is causal instead of by a mask."""
    end = shape.length + shape.num_rows
    bias = causal_lower_right(shape.num_rows, end)
    # Our scale, the inverse root of the head size, is SDPA's default.
    return Version(
        name="SDPA, causal",
        run=lambda query, key, value: F.scaled_dot_product_attention(
            query, key[:, :, :end], value[:, :, :end], attn_mask=bias, enable_gqa=True
        ),
        inputs=sets,
    )


def add_copies(
    case: Case, shape: AttentionShape, sets: list[tuple[Any, ...]], rotation_bytes: float
) -> None:
    """Adds SDPA where every candidate has its own copy of prefix and itself, without a mask."""
    s, name = shape, "SDPA, copies"
    copy_bytes = s.num_slots * s.num_rows * (s.length + 1) * s.kv_row_bytes
    if copy_bytes > MOST_COPY_BYTES:
        case.skipped[name] = f"the copies would take {copy_bytes / 1e9:.0f} GB"
        return

    def copies(buffer: Tensor) -> Tensor:
        prefix = buffer[:, None, :, : s.length].expand(-1, s.num_rows, -1, -1, -1)
        own = buffer[:, :, s.length : s.length + s.num_rows].transpose(1, 2)[:, :, :, None]
        return torch.cat((prefix, own), dim=3).flatten(0, 1)

    def packed(query: Tensor) -> Tensor:
        # Heads that share keys are rows of one tile, as in our definition.
        return query.transpose(1, 2).reshape(
            s.num_slots * s.num_rows, s.num_kv_heads, -1, s.head_size
        )

    used = sets[: num_sets(copy_bytes, rotation_bytes)]
    case.baselines.append(
        Version(
            name=name,
            run=F.scaled_dot_product_attention,
            inputs=[(packed(query), copies(key), copies(value)) for query, key, value in used],
            read=lambda output: output.reshape(
                s.num_slots, s.num_rows, s.num_heads, s.head_size
            ).transpose(1, 2),
        )
    )


def add_flash(case: Case, rows: NewRows, sets: list[tuple[Any, ...]], scale: float) -> None:
    """Adds flash-attn with the merge of the own row, if it is installed."""
    if importlib.util.find_spec("flash_attn") is None:
        case.skipped["flash-attn"] = "not installed"
        return
    run = partial(flash.attention_flash, rows=rows, scale=scale, sliding_window=None, softcap=None)
    case.baselines.append(Version(name="flash-attn", run=run, inputs=sets))


def attention_problem(
    inputs: tuple[Tensor, Tensor, Tensor], rows: NewRows, scale: float, found: Tensor
) -> str:
    """Compares with the definition in float32, slot by slot; bf16 is within 0.02 of the output."""
    query, key, value = inputs
    end = rows.base + query.shape[2]
    visible = rows.visible(None)
    expected = torch.cat(
        [
            attention_reference.candidate_attention(
                query[[slot]].float(),
                key[[slot], :, :end].float(),
                value[[slot], :, :end].float(),
                visible[[slot]],
                scale=scale,
            )
            for slot in range(len(query))
        ]
    )
    error = (found.float() - expected).abs().max() / expected.square().mean().sqrt()
    return worst_problem(error, 0.05, "of the output's root mean square")


# --- what is measured ------------------------------------------------------------------------


def attention_shapes() -> list[AttentionShape]:
    """Windows of candidates over short to long prefixes, and chunks of a prefill."""
    heads = [
        {"num_heads": 32, "num_kv_heads": 8, "head_size": 128},
        {"num_heads": 14, "num_kv_heads": 2, "head_size": 64},
    ]
    windows = [
        AttentionShape(**sizes, length=length, num_rows=num_rows, num_slots=num_slots)
        for sizes in heads
        for length in (512, 2048, 8192, 16384)
        for num_rows in (1, 8, 40)
        for num_slots in (1, 8, 64)
    ]
    chunks = [
        AttentionShape(**sizes, length=2048, num_rows=512, num_slots=num_slots, kind="chain")
        for sizes in heads
        for num_slots in (1, 8)
    ]
    return windows + chunks


SUITES: dict[str, list[Build]] = {
    "truncate": [
        partial(truncate_case, num_rows=num_rows, vocab_size=vocab_size)
        for vocab_size in (32000, 128256, 262144)
        for num_rows in (1, 8, 64, 256)
    ],
    "score": [
        partial(score_case, num_states=num_states, hidden_size=hidden_size)
        for hidden_size in (2048, 4096, 8192)
        for num_states in (1, 8, 40, 160, 512, 1024, 4096)
    ],
    "cascade": [
        partial(cascade_case, num_slots=num_slots, window=window)
        for window in (1, 8, 40)
        for num_slots in (1, 64, 256)
    ],
    "attention": [partial(attention_case, shape=shape) for shape in attention_shapes()],
}
