"""Calls that production makes of the Triton bodies: every configuration, shapes of real models.

For compiling ahead of time; the tensors are on the meta device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """A call of an operation's Triton body that production makes."""

    operation: str
    name: str
    call: Callable[[str], object]
    """Takes the architecture; its tensors are on the meta device."""


def _meta(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*size, dtype=dtype, device="meta")


_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def truncate_case(
    num_rows: int,
    vocab_size: int,
    dtype: torch.dtype = torch.bfloat16,
    capacity: int = 64,
    *,
    top_k: int = 40,
    temperature: float = 1.0,
) -> Case:
    """Truncation of logits [B, V]."""
    from mara_kernels.truncate.kernel import truncate_triton

    return Case(
        "truncate",
        f"B={num_rows} V={vocab_size} C={capacity} {_SHORT[dtype]}",
        lambda architecture: truncate_triton(
            _meta(num_rows, vocab_size, dtype=dtype),
            top_k=top_k,
            top_p=0.95,
            temperature=temperature,
            capacity=capacity,
            architecture=architecture,
        ),
    )


def greedy_case(num_rows: int, vocab_size: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    """The most probable tokens of logits [B, V]."""
    from mara_kernels.truncate.kernel import greedy_triton

    return Case(
        "truncate",
        f"greedy B={num_rows} V={vocab_size} {_SHORT[dtype]}",
        lambda architecture: greedy_triton(
            _meta(num_rows, vocab_size, dtype=dtype), architecture=architecture
        ),
    )


def truncate_cases() -> list[Case]:
    """Vocabularies of all sizes, one that is no multiple of anything, the larger capacities, and
    arguments of 1, which Triton compiles as constants."""
    from mara_kernels.truncate.kernel import MAX_CAPACITY

    sets = [
        truncate_case(num_rows, vocab_size, dtype, capacity)
        for num_rows, vocab_size, dtype, capacity in (
            (64, 32000, torch.bfloat16, 64),
            (64, 32000, torch.float16, 64),
            (64, 128256, torch.bfloat16, 64),
            (64, 128256, torch.float32, 64),
            (64, 262144, torch.bfloat16, 64),
            (64, 262144, torch.float32, 64),
            (64, 50257, torch.bfloat16, 64),
            (1, 50257, torch.bfloat16, 64),
            (64, 128256, torch.bfloat16, MAX_CAPACITY),
            (64, 262144, torch.float32, MAX_CAPACITY),
            (64, 128256, torch.float16, MAX_CAPACITY),
        )
    ]
    return [
        *sets,
        truncate_case(1, 1, torch.bfloat16, 1, top_k=1, temperature=2),
        greedy_case(64, 128256),
        greedy_case(64, 262144, torch.float32),
        greedy_case(1, 50257, torch.float16),
    ]


def cascade_cases() -> list[Case]:
    """The defaults, and each choice departing from them; narrow and wide windows."""
    from mara_kernels.cascade.kernel import cascade_triton
    from mara_kernels.cascade.reference import CascadeRule, Held

    def case(window: int, rule: CascadeRule) -> Case:
        slots = _meta(64, dtype=torch.int64)
        flags = _meta(64, dtype=torch.bool)
        name = f"{rule.acceptance} {rule.strategy}/{rule.fallback} {rule.order}"
        return Case(
            "cascade",
            f"W={window} {name}",
            lambda _: cascade_triton(
                _meta(64, window),
                offset=slots,
                size=slots,
                held=Held(flags, _meta(64), _meta(64)),
                rule=rule,
                sequence=slots,
                position=slots,
                count=slots,
            ),
        )

    rules = [
        CascadeRule(),
        CascadeRule(fallback="first"),
        CascadeRule(order="top_last"),
        CascadeRule(strategy="max_prob", fallback="max_prob"),
        CascadeRule(strategy="random"),
        CascadeRule(acceptance="sample"),
        CascadeRule(acceptance="sample", order="reverse"),
        CascadeRule(acceptance="sample", strategy="random", order="top_last"),
    ]
    usual = [case(window, rule) for rule in rules for window in (1, 8, 40)]
    return [*usual, case(512, rules[-1])]


def score_case(
    num_states: int,
    hidden_size: int,
    dtype: torch.dtype = torch.bfloat16,
    inner_size: int = 1024,
) -> Case:
    """Scoring of states [N, H]."""
    from mara_kernels.score.fold import FoldedParameters
    from mara_kernels.score.kernel import score_triton

    outer_size = inner_size // 4
    parameters = FoldedParameters(
        weight1=_meta(inner_size, -(-hidden_size // 16) * 16, dtype=dtype),
        column_sums=_meta(inner_size),
        bias1=_meta(inner_size),
        weight2=_meta(outer_size, inner_size, dtype=dtype),
        bias2=_meta(outer_size),
        weight3=_meta(outer_size),
        bias3=_meta(1),
    )
    return Case(
        "score",
        f"N={num_states} H={hidden_size} {_SHORT[dtype]}",
        lambda architecture: score_triton(
            _meta(num_states, hidden_size, dtype=dtype),
            parameters,
            norm_eps=1e-5,
            architecture=architecture,
        ),
    )


def score_cases() -> list[Case]:
    """Every configuration, for hidden sizes of small and large models and one of no good width."""
    sizes = (1, 16, 32, 64, 256, 512, 2048, 4096)
    return [
        *(score_case(n, 4096) for n in sizes),
        *(score_case(n, 2048, torch.float16) for n in sizes),
        *(score_case(n, 8192) for n in sizes),
        *(score_case(n, 2048, torch.float32) for n in (8, 512, 4096)),
        *(score_case(n, 2885) for n in (8, 4096)),
        score_case(1, 1, inner_size=4),
    ]


def attention_case(
    shape: tuple[int, int, int],
    kind: str,
    num_rows: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    num_splits: int = 4,
) -> Case:
    """Attention of new rows in eight slots; shape: query heads, key heads, head size."""
    from mara_kernels.attention.kernel import attention_triton
    from mara_kernels.attention.rows import NewRows, Tree

    num_heads, num_kv_heads, head_size = shape
    tree = Tree(
        kind=kind,  # type: ignore[arg-type]
        ancestors=_meta(num_rows, num_rows, dtype=torch.bool),
        depths=_meta(num_rows, dtype=torch.int64),
        bits=_meta(num_rows, dtype=torch.int64),
    )
    rows = NewRows(lengths=_meta(8, dtype=torch.int64), tree=tree, base=4096)
    buffer = _meta(8, num_kv_heads, 4096 + 512, head_size, dtype=dtype)
    query = _meta(8, num_rows, num_heads, head_size, dtype=dtype).transpose(1, 2)
    extras = "".join((" window" * bool(window), " softcap" * bool(softcap), " sinks" * sinks))
    heads = "/".join(map(str, shape))
    return Case(
        "attention",
        f"{heads} {kind} W={num_rows} {_SHORT[dtype]}{extras}",
        lambda architecture: attention_triton(
            query,
            buffer,
            buffer,
            rows,
            scale=0.1,
            sliding_window=window,
            softcap=softcap,
            sinks=_meta(num_heads, dtype=dtype) if sinks else None,
            architecture=architecture,
            num_processors=132,
            num_splits=num_splits,
        ),
    )


def attention_cases() -> list[Case]:
    """Every configuration of every head size; windows, chunks and trees; windows and soft-caps."""
    large, small = (32, 8, 128), (14, 2, 64)
    return [
        *(
            attention_case(shape, "siblings", num_rows, num_splits=num_splits)
            for shape in (large, small, (32, 32, 80), (32, 32, 96), (16, 8, 256))
            for num_rows, num_splits in ((1, 1), (8, 4), (40, 4))
        ),
        *(
            attention_case(shape, "chain", 512, num_splits=1)
            for shape in (large, small, (32, 32, 80), (32, 32, 96), (16, 8, 256))
        ),
        attention_case((7, 1, 64), "siblings", 1, num_splits=2),
        attention_case((1, 1, 64), "tree", 1, num_splits=1),
        attention_case(large, "tree", 40),
        attention_case(small, "tree", 16),
        attention_case((16, 8, 256), "tree", 16),
        attention_case((16, 8, 256), "siblings", 8, window=4096, softcap=50.0),
        attention_case((16, 8, 256), "chain", 512, window=4096, softcap=50.0, num_splits=1),
        attention_case((64, 8, 64), "siblings", 8, window=128, sinks=True),
        attention_case((64, 8, 64), "siblings", 8, window=128, sinks=True, num_splits=1),
        attention_case(large, "siblings", 8, torch.float16),
        attention_case(large, "siblings", 8, torch.float32),
        attention_case(small, "siblings", 8, torch.float32),
        attention_case(large, "chain", 512, torch.float32, num_splits=1),
    ]


def bookkeeping_cases() -> list[Case]:
    """Every order; padded and packed windows; buffers and states of one block and of several."""
    from mara_kernels.bookkeeping import kernel
    from mara_kernels.bookkeeping.reference import Scored
    from mara_kernels.bookkeeping.slots import FORCED, Slots
    from mara_kernels.cascade.reference import Decision, Held, Order
    from mara_kernels.truncate import CandidateSet

    def ints(*size: int) -> torch.Tensor:
        return _meta(*size, dtype=torch.int64)

    flags = _meta(64, dtype=torch.bool)

    def slots_of(columns: int, hidden_size: int, dtype: torch.dtype) -> Slots:
        return Slots(
            length=ints(64),
            candidate_ids=ints(64, columns),
            candidate_logprobs=_meta(64, columns),
            size=ints(64),
            offset=ints(64),
            held_accepted=flags,
            held_preference=_meta(64),
            log_residual=_meta(64),
            held_tried=ints(64),
            held_logit=_meta(64),
            held_logprob=_meta(64),
            hidden=_meta(64, hidden_size, dtype=dtype),
            num_tokens=ints(64),
            num_forwards=ints(64),
            done=ints(64),
            record=ints(64, 128, 5),
            record_floats=_meta(64, 128, 4),
        )

    def case(
        order: Order,
        *,
        window: int = 8,
        packed: bool = False,
        columns: int = 64,
        hidden_size: int = 4096,
        dtype: torch.dtype = torch.bfloat16,
        num_eos: int = 2,
    ) -> Case:
        slots = slots_of(columns, hidden_size, dtype)
        eos_ids, count = ints(num_eos), ints(64) if packed else None
        scored = Scored(
            accept_logit=_meta(64, window),
            hidden=_meta(64 * window, hidden_size, dtype=dtype),
            place=ints(64, window) if packed else None,
            count=ints(64),
        )
        decision = Decision(
            ints(64), flags, flags, Held(flags, _meta(64), _meta(64)), _meta(64, window)
        )
        # Without an agent the buffer holds one token.
        new = CandidateSet(ints(64, min(columns, 64)), _meta(64, min(columns, 64)), ints(64))

        def call(architecture: str) -> None:
            kernel.propose(slots, window=window, count=count, last_position=4095, order=order)
            kernel.settle(
                slots,
                scored,
                decision,
                order=order,
                fallback_is_last=order == "descending",
                eos_ids=eos_ids,
            )
            kernel.admit(slots, new, flags, verdict=FORCED, order=order, eos_ids=eos_ids)

        sizes = f"W={window}{' packed' * packed} C={columns} H={hidden_size} E={num_eos}"
        return Case("bookkeeping", f"{order} {sizes} {_SHORT[dtype]}", call)

    def keeping(num_layers: int, num_heads: int, head_size: int, dtype: torch.dtype) -> Case:
        rows = _meta(num_layers, 64, num_heads, 4609, head_size, dtype=dtype)
        return Case(
            "bookkeeping",
            f"L={num_layers} {num_heads}/{head_size} {_SHORT[dtype]}",
            lambda _: kernel.keep_rows(rows, ints(64), base=4096, destination=ints(64), trash=4608),
        )

    return [
        case("descending"),
        case("descending", window=1, columns=1),
        case("descending", window=40, packed=True),
        case("descending", columns=32000, hidden_size=8192, dtype=torch.float32, num_eos=0),
        case("descending", hidden_size=2885, dtype=torch.float16),
        case("reverse"),
        case("top_last", packed=True),
        keeping(64, 8, 128, torch.bfloat16),
        keeping(32, 8, 64, torch.float16),
        keeping(48, 32, 80, torch.float32),
        keeping(1, 1, 576, torch.bfloat16),
    ]


def layers_cases() -> list[Case]:
    """Norms of small and large states and of heads, every rule; heads of all sizes."""
    from mara_kernels.layers import NormRule, kernel

    def norm(
        hidden_size: int, dtype: torch.dtype, *, adds_one: bool = False, rounds_first: bool = True
    ) -> Case:
        rule = NormRule(adds_one=adds_one, rounds_first=rounds_first)
        name = f"norm H={hidden_size} {'1+w ' * adds_one}{'rounds first ' * rounds_first}"
        return Case(
            "layers",
            name + _SHORT[dtype],
            lambda _: kernel.rms_norm(
                _meta(64, hidden_size, dtype=dtype),
                _meta(hidden_size, dtype=dtype),
                eps=1e-5,
                rule=rule,
            ),
        )

    def rotation(num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> Case:
        def states(heads: int) -> torch.Tensor:
            return _meta(64, 8, heads, head_size, dtype=dtype).transpose(1, 2)

        angles = _meta(64, 8, head_size, dtype=dtype)
        return Case(
            "layers",
            f"rotation {num_heads}/{num_kv_heads}/{head_size} {_SHORT[dtype]}",
            lambda _: kernel.rotate(states(num_heads), states(num_kv_heads), angles, angles),
        )

    return [
        norm(4096, torch.bfloat16),
        norm(2048, torch.float16),
        norm(16384, torch.float32),
        norm(2885, torch.bfloat16),
        norm(128, torch.bfloat16, rounds_first=False),
        norm(2304, torch.bfloat16, adds_one=True, rounds_first=False),
        norm(3072, torch.bfloat16, adds_one=True),
        norm(1, torch.float32),
        rotation(32, 8, 128, torch.bfloat16),
        rotation(32, 8, 64, torch.float16),
        rotation(16, 8, 256, torch.bfloat16),
        rotation(32, 32, 80, torch.bfloat16),
        rotation(7, 1, 64, torch.float32),
        rotation(128, 1, 512, torch.bfloat16),
        rotation(1, 1, 2, torch.float32),
    ]


CASES: dict[str, Callable[[], list[Case]]] = {
    "truncate": truncate_cases,
    "cascade": cascade_cases,
    "score": score_cases,
    "attention": attention_cases,
    "bookkeeping": bookkeeping_cases,
    "layers": layers_cases,
}
