"""The oracle itself: its parts against known answers, the whole against the authors' records."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

import golden
from architectures import ARCHITECTURES, OTHER_ARCHITECTURES, WINDOW, random_prompt
from oracle import (
    AcceptLogits,
    Memo,
    OracleRun,
    accept_mlp,
    greedy_plain,
    philox4x32,
    plain_forward,
    ranks_tried,
    sequential_cascade,
    truncate,
    uniform_words,
)

INF = math.inf
ONES = 0xFFFFFFFF
needs_golden = pytest.mark.skipif(golden.golden_folder() is None, reason=golden.MISSING)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Philox


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    assert philox4x32(counter, key) == words


def test_draws_are_keyed_by_all_64_bits_of_seed_and_sequence():
    seed, sequence = 0x123456789ABCDEF0, 0x0FEDCBA987654321
    words = philox4x32((7, 11, 0x87654321, 0x0FEDCBA9), (0x9ABCDEF0, 0x12345678))
    assert uniform_words(seed, sequence, position=11, rank=7) == (words[0] >> 8, words[1] >> 8)


# Truncation


def test_truncation_equals_the_warpers_of_transformers():
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    generator = torch.Generator().manual_seed(0)
    compared = 0
    for case in range(300):
        vocab_size = (30, 64, 257)[case % 3]
        top_k, top_p = ((40, 0.95), (10, 0.8), (3, 0.99), (40, 0.5))[case % 4]
        logits = (
            torch.randn(vocab_size, generator=generator) * (0.3, 1.0, 4.0, 12.0, 40.0)[case % 5]
        )
        ours = truncate(logits, top_k=top_k, top_p=top_p, temperature=0.7)
        if ours.margin < 1e-6:
            continue
        scores = TopKLogitsWarper(top_k=top_k)(None, logits[None] / 0.7)
        scores = TopPLogitsWarper(top_p=top_p)(None, scores)[0]
        theirs = scores.isfinite().nonzero()[:, 0]
        assert sorted(ours.ids) == theirs.tolist()
        assert list(ours.ids) == theirs[scores[theirs].argsort(descending=True)].tolist()
        torch.testing.assert_close(
            torch.tensor(ours.logprobs), (logits / 0.7).log_softmax(-1)[list(ours.ids)]
        )
        compared += 1
    assert compared > 280


@pytest.mark.parametrize(
    ("logits", "options", "ids"),
    [
        # Ties at the k-th value all stay; equal ones in order of id.
        ([0.0] * 8, {"top_k": 3, "top_p": 1.0}, range(8)),
        ([0.0] * 8, {"top_k": 3, "top_p": 0.7}, range(6)),
        ([1.0, 3.0, 2.0, 3.0, 2.0], {"top_k": 3, "top_p": 1.0}, [1, 3, 2, 4]),
        # No top-k: none wanted, or more than there are tokens.
        ([1.0, 2.0, 3.0], {"top_k": None, "top_p": 1.0}, [2, 1, 0]),
        ([1.0, 2.0, 3.0], {"top_k": 0, "top_p": 1.0}, [2, 1, 0]),
        ([1.0, 2.0, 3.0], {"top_k": 99, "top_p": 1.0}, [2, 1, 0]),
        # At least one token, and no token without mass.
        ([1.0, 1.0, 1.0], {"top_k": 3, "top_p": 0.0}, [0]),
        ([-INF, 0.0, -INF, 0.0], {"top_k": 3, "top_p": 1.0}, [1, 3]),
        ([-INF, 5.0, -INF], {"top_k": 40, "top_p": 1.0}, [1]),
        ([0.0, 200.0, 0.0], {"top_k": 40, "top_p": 1.0}, [1]),
        # Masked tokens have no mass, and the others share all of it.
        ([9.0, 1.0, 1.0, 9.0], {"masked_ids": (0, 3), "top_p": 0.9}, [1, 2]),
        # p is compared with the mass of the tail: 0.1 (dropped), then 0.3, then 1.
        ([math.log(0.7), math.log(0.2), math.log(0.1)], {"top_p": 0.8}, [0, 1]),
        # After top-k the masses are renormalised: 0.2 / 0.9 < 0.25.
        ([math.log(0.7), math.log(0.2), math.log(0.1)], {"top_k": 2, "top_p": 0.75}, [0]),
    ],
)
def test_truncation_of_adversarial_rows(logits, options, ids):
    result = truncate(torch.tensor(logits), **options)
    assert list(result.ids) == list(ids)
    assert all(math.isfinite(logprob) for logprob in result.logprobs)


@pytest.mark.parametrize(
    "logits", [[0.0, math.nan, 1.0], [-INF, -INF], [0.0, INF, 1.0], [INF, INF]]
)
def test_truncation_refuses_rows_without_probabilities(logits):
    assert truncate(torch.tensor(logits)) is None


def test_margin_of_a_truncation_is_its_nearest_flip():
    logprobs = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    # Nucleus: the tail masses 0.5, 0.2 and 0.05 against 0.1 (0.05 and 0.1 away).
    assert truncate(logprobs, top_p=0.9).margin == pytest.approx(0.05, abs=1e-6)
    # Order: the nearest neighbours are ln(5/3) apart, top-k cuts ln(2) above the third.
    assert truncate(logprobs, top_k=2, top_p=1.0).margin == pytest.approx(math.log(5 / 3), abs=1e-6)
    near = torch.tensor([1.0, 1.0 - 1e-6, -5.0])
    assert truncate(near, top_p=1.0).margin < 2e-6
    assert truncate(torch.tensor([1.0, 1.0, -5.0]), top_p=1.0).margin > 1.0
    # Different logits, equal log-probs: any other rounding may order them either way.
    rounded = torch.tensor([1e-9, 2e-9, -5.0])
    assert rounded.log_softmax(-1)[0] == rounded.log_softmax(-1)[1]
    assert truncate(rounded, top_p=1.0).margin == 0.0
    assert truncate(rounded, top_k=1, top_p=1.0).margin == 0.0


@needs_golden
def test_truncation_equals_every_golden_case():
    logits, cases = golden.truncation()
    for case in cases:
        result = truncate(logits[case["row"]], top_k=case["topk"], top_p=case["topp"])
        label = f"row {case['row']}, top_k {case['topk']}, top_p {case['topp']}"
        assert len(result.ids) == case["n"], label
        assert list(result.logprobs) == pytest.approx(case["logp"], abs=1e-5), label
        if case["set_defined"]:
            assert sorted(result.ids) == sorted(case["cand"]), label
        if case["set_defined"] and case["order_defined"]:
            assert list(result.ids) == case["cand"], label
    assert len(cases) >= 500


# The cascade on a scripted model


class ScriptedModel:
    """A causal LM given as tables: logits by last token, and a state that is that token's id."""

    def __init__(self, rows: dict[int, list[float]]):
        self.rows = rows
        self.prefixes: list[list[int]] = []

    def __call__(self, input_ids, use_cache, output_hidden_states):
        assert not use_cache
        assert output_hidden_states
        self.prefixes.append(input_ids[0].tolist())
        last = self.prefixes[-1][-1]
        logits = torch.tensor(self.rows.get(last, self.rows[-1])).repeat(1, input_ids.shape[1], 1)
        states = input_ids[..., None].float()
        return SimpleNamespace(logits=logits, hidden_states=(states - 1000, states))


def by_token(table: dict[int, float], rest: float = -1.0) -> AcceptLogits:
    """Accept logits by token id, for the states of `ScriptedModel`."""
    return lambda states: torch.tensor([table.get(int(state), rest) for state in states[:, 0]])


# Token 4 always is most probable, then 2, 0, 3; 1 never is a candidate.
ROW = [1.0, -INF, 2.0, 0.5, 3.0]


def decide(accept: dict[int, float], **options) -> OracleRun:
    return sequential_cascade(
        ScriptedModel({-1: ROW}),
        by_token(accept),
        [0],
        **{"max_new_tokens": 1, "top_p": 1.0, **options},
    )


@pytest.mark.parametrize(
    ("order", "ranks"),
    [
        ("descending", [0, 1, 2, 3]),
        ("reverse", [3, 2, 1, 0]),
        ("top_last", [1, 2, 3, 0]),
    ],
)
def test_orders(order, ranks):
    assert ranks_tried(4, order) == ranks
    model = ScriptedModel({-1: ROW})
    sequential_cascade(model, by_token({}), [0], max_new_tokens=1, top_p=1.0, order=order)
    # The prompt, then every candidate once in the order tried, alone behind the whole prefix.
    assert model.prefixes == [[0], *([0, [4, 2, 0, 3][rank]] for rank in ranks)]


@pytest.mark.parametrize(
    ("options", "accept", "token", "rank", "tried", "examined"),
    [
        ({}, {2: 0.5, 0: 9.0}, 2, 1, 1, 2),
        ({"order": "reverse"}, {2: 0.5, 0: 9.0}, 0, 2, 1, 2),
        ({"order": "top_last"}, {4: 9.0, 3: 0.5}, 3, 3, 2, 3),
        ({"order": "top_last"}, {4: 9.0}, 4, 0, 3, 4),
        ({"strategy": "max_prob"}, {2: 0.5, 0: 9.0}, 0, 2, 2, 4),
        ({"strategy": "max_prob"}, {0: 9.0, 3: 9.0}, 0, 2, 2, 4),
        ({"strategy": "max_prob", "order": "reverse"}, {0: 9.0, 3: 9.0}, 3, 3, 0, 4),
        ({"threshold": 0.9}, {2: 2.0, 0: 2.5}, 0, 2, 2, 3),
        ({"threshold": 0.1}, {4: -2.5, 2: -2.0}, 2, 1, 1, 2),
        # Strictly greater: a d of exactly 0 is a rejection.
        ({}, {4: 0.0, 2: 1e-30}, 2, 1, 1, 2),
    ],
)
def test_choice_among_the_accepted(options, accept, token, rank, tried, examined):
    run = decide(accept, **options)
    (step,) = run.steps
    assert run.token_ids == (token,)
    assert (step.token_id, step.rank, step.tried, step.examined) == (token, rank, tried, examined)
    assert step.accepted is True
    assert (step.set_size, step.candidates) == (4, (4, 2, 0, 3))
    assert step.logprobs == pytest.approx(torch.tensor(ROW).log_softmax(-1)[[4, 2, 0, 3]].tolist())
    assert len(step.accept_logits) == examined


@pytest.mark.parametrize(
    ("options", "token", "tried"),
    [
        ({"fallback": "last"}, 3, 3),
        ({"fallback": "first"}, 4, 0),
        ({"fallback": "max_prob"}, 0, 2),
        ({"fallback": "last", "order": "reverse"}, 4, 3),
        ({"fallback": "first", "order": "reverse"}, 3, 0),
        ({"fallback": "max_prob", "order": "reverse"}, 0, 1),
        ({"fallback": "last", "order": "top_last"}, 4, 3),
        ({"fallback": "first", "order": "top_last"}, 2, 0),
        ({"fallback": "max_prob", "order": "top_last"}, 0, 1),
    ],
)
@pytest.mark.parametrize("strategy", ["first", "max_prob", "random"])
def test_fallback_when_all_are_rejected(strategy, options, token, tried):
    run = decide({0: -0.25, 3: -0.5}, strategy=strategy, **options)
    (step,) = run.steps
    assert (step.token_id, step.tried, step.examined, step.accepted) == (token, tried, 4, False)


def test_equal_accept_logits_fall_back_to_the_first_tried():
    assert decide({}, fallback="max_prob").token_ids == (4,)
    assert decide({}, fallback="max_prob", order="reverse").token_ids == (3,)
    # What is no number is rejected, and never the largest.
    assert decide({4: math.nan, 0: -0.5}, fallback="max_prob").token_ids == (0,)


def test_random_takes_the_largest_second_word_of_the_accepted():
    accept = {2: 1.0, 0: 1.0, 3: 1.0}
    for seed in range(20):
        lots = [uniform_words(seed, 5, 0, rank)[1] for rank in (1, 2, 3)]
        run = decide(accept, strategy="random", seed=seed, sequence=5, order="reverse")
        assert run.steps[0].rank == 1 + lots.index(max(lots))
        assert run.steps[0].examined == 4


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_sampled_acceptance_draws_by_position_and_rank(threshold):
    # Accept probabilities sigmoid(d - logit(threshold)) of ranks 0 to 3.
    prob = {4: 0.2, 2: 0.5, 0: 0.7, 3: 0.05}
    accept = {token: math.log(p / (1 - p)) for token, p in prob.items()}
    shift = math.log(threshold / (1 - threshold))
    options = {"acceptance": "sample", "threshold": threshold, "order": "top_last"}
    examined = 0
    for seed in range(12):
        run = decide(accept, seed=seed, sequence=2**33 + 1, max_new_tokens=6, **options)
        for position, step in enumerate(run.steps):
            verdicts = []
            for rank in (1, 2, 3, 0):
                d = accept[step.candidates[rank]] - shift
                draw = uniform_words(seed, 2**33 + 1, position, rank)[0] / 2**24
                verdicts.append(draw < 1 / (1 + math.exp(-d)))
                if verdicts[-1]:
                    break
            assert step.examined == len(verdicts)
            assert step.accepted == any(verdicts)
            examined += step.examined
    assert examined > 100


def test_sampled_acceptance_has_the_right_rate():
    run = decide(
        dict.fromkeys(range(5), math.log(3 / 7)), acceptance="sample", max_new_tokens=700, seed=3
    )
    share = sum(step.tried == 0 and step.accepted is True for step in run.steps) / 700
    assert share == pytest.approx(0.3, abs=0.06)


def test_a_single_candidate_is_emitted_unasked():
    def nobody(states):
        raise AssertionError("asked about a forced token")

    run = sequential_cascade(ScriptedModel({-1: ROW}), nobody, [0], max_new_tokens=3, top_k=1)
    assert run.token_ids == (4, 4, 4)
    assert run.finish_reason == "length"
    for step in run.steps:
        assert (step.set_size, step.rank, step.tried, step.examined) == (1, 0, 0, 0)
        assert step.accepted is None
        assert step.accept_logits == ()


def test_the_accepted_candidate_is_the_next_prefix():
    model = ScriptedModel({-1: ROW, 2: [0.0, 9.0, -INF, 8.0, -INF]})
    run = sequential_cascade(model, by_token({2: 1.0, 3: 1.0}), [7, 5], max_new_tokens=2, top_p=1.0)
    assert run.token_ids == (2, 3)
    assert model.prefixes == [
        [7, 5],
        [7, 5, 4],
        [7, 5, 2],
        [7, 5, 2, 1],
        [7, 5, 2, 3],
    ]


@pytest.mark.parametrize("options", [{"fallback": "first"}, {"fallback": "max_prob"}])
def test_a_fallback_goes_on_from_its_own_forward(options):
    # The last candidate asked is not the one taken, and leads elsewhere.
    model = ScriptedModel({-1: ROW, 3: [0.0, 9.0, -INF, -INF, -INF]})
    agent = by_token({4: -0.5})
    run = sequential_cascade(model, agent, [0], max_new_tokens=3, top_p=1.0, **options)
    assert run.token_ids == (4, 4, 4)
    assert run.steps[1].candidates == (4, 2, 0, 3)


def test_stops_at_an_eos_and_keeps_it():
    accept = {2: 1.0}
    run = decide(accept, max_new_tokens=5, eos_token_ids=(2, 1))
    assert (run.token_ids, run.finish_reason) == ((2,), "eos")
    # The last token wins over the limit.
    assert decide(accept, max_new_tokens=1, eos_token_ids=(2,)).finish_reason == "eos"
    run = decide(accept, max_new_tokens=3, eos_token_ids=(2,), ignore_eos=True)
    assert (run.token_ids, run.finish_reason) == ((2, 2, 2), "length")


def test_min_new_tokens_masks_the_eos_before_probabilities():
    run = decide({2: 1.0, 0: 1.0}, max_new_tokens=5, eos_token_ids=(2,), min_new_tokens=2)
    assert (run.token_ids, run.finish_reason) == ((0, 0, 2), "eos")
    assert run.steps[0].candidates == (4, 0, 3)
    masked = torch.tensor([1.0, -INF, -INF, 0.5, 3.0]).log_softmax(-1)[[4, 0, 3]]
    assert run.steps[0].logprobs == pytest.approx(masked.tolist())


def test_no_tokens_wanted():
    model = ScriptedModel({-1: ROW})
    run = sequential_cascade(model, by_token({}), [0], max_new_tokens=0)
    assert (run.token_ids, run.finish_reason, run.margin) == ((), "length", INF)
    assert run.error_position is None
    assert model.prefixes == []


@pytest.mark.parametrize("bad", [[math.nan] * 5, [-INF] * 5, [0.0, INF, 0.0, 0.0, 0.0]])
def test_log_probs_that_are_no_numbers_end_the_run(bad):
    model = ScriptedModel({-1: ROW, 0: bad})
    # Only behind a prefix that was taken: candidate 0 is asked at the first position already.
    run = sequential_cascade(
        model, by_token({0: 1.0}), [3], max_new_tokens=4, top_p=1.0, eos_token_ids=(2,)
    )
    assert (run.token_ids, run.finish_reason, run.error_position) == ((0,), "error", 1)
    assert len(run.steps) == 1
    run = sequential_cascade(model, by_token({0: 1.0}), [0], max_new_tokens=4)
    assert (run.token_ids, run.finish_reason, run.error_position) == ((), "error", 0)


def test_masking_all_that_is_left_ends_the_run():
    model = ScriptedModel({-1: [-INF, 0.0, -INF]})
    run = sequential_cascade(
        model, by_token({}), [0], max_new_tokens=3, min_new_tokens=1, eos_token_ids=(1,)
    )
    assert (run.finish_reason, run.error_position) == ("error", 0)


def test_margin_is_the_nearest_flip_of_any_decision():
    assert decide({4: -0.125, 2: 0.25}).margin == 0.125
    assert decide({4: 0.25}, threshold=0.75).margin == pytest.approx(0.5, abs=1e-6)
    # A rank beyond the accepted one is not asked and cannot flip.
    assert decide({4: 0.25, 2: 1e-9}).margin == 0.25
    assert decide({4: 0.25, 2: 0.3125}, strategy="max_prob").margin == pytest.approx(0.0625)
    assert decide({4: -0.25, 2: -0.375}, fallback="max_prob").margin == 0.125
    run = decide({4: 0.0}, acceptance="sample", seed=1)
    assert run.margin <= abs(0.5 - uniform_words(1, 0, 0, 0)[0] / 2**24)


@pytest.mark.parametrize(
    "options", [{"strategy": "best"}, {"fallback": "none"}, {"order": "v1"}, {"acceptance": "all"}]
)
def test_unknown_choices_are_refused(options):
    with pytest.raises(ValueError, match="choose one of"):
        decide({}, **options)


# Tiny random models


@pytest.fixture(scope="module")
def architecture() -> Callable[[str], object]:
    models: dict[str, object] = {}

    def load(name: str):
        if name not in models:
            models[name] = ARCHITECTURES[name]()
        return models[name]

    return load


def random_agent(hidden_size: int, seed: int = 0) -> AcceptLogits:
    """A small accept model whose logits spread around 0."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [("linear1", 32, hidden_size), ("linear2", 16, 32), ("output_linear", 2, 16)]
    weights = {"ln.weight": torch.ones(hidden_size), "ln.bias": torch.zeros(hidden_size)}
    for name, rows, columns in sizes:
        scale = 2.0 / columns**0.5
        weights[f"{name}.weight"] = scale * torch.randn(rows, columns, generator=generator)
        weights[f"{name}.bias"] = torch.zeros(rows)
    return accept_mlp(weights)


def test_accept_mlp_is_the_network_of_the_paper():
    torch.manual_seed(0)
    ln, linear1, linear2, output_linear = (
        torch.nn.LayerNorm(12),
        torch.nn.Linear(12, 8),
        torch.nn.Linear(8, 6),
        torch.nn.Linear(6, 2),
    )
    torch.nn.init.normal_(ln.weight)
    torch.nn.init.normal_(ln.bias)
    layers = {"ln": ln, "linear1": linear1, "linear2": linear2, "output_linear": output_linear}
    weights = torch.nn.ModuleDict(layers).state_dict()
    states = torch.randn(5, 12)
    with torch.no_grad():
        z = output_linear(torch.relu(linear2(torch.relu(linear1(ln(states))))))
        probs = torch.softmax(z, dim=-1)[:, 1]
        torch.testing.assert_close(torch.sigmoid(accept_mlp(weights)(states)), probs)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_last_hidden_states_are_those_after_the_final_norm(name, architecture):
    from transformers import PreTrainedModel

    model = architecture(name)
    (base,) = (child for child in model.children() if isinstance(child, PreTrainedModel))
    input_ids = torch.tensor([random_prompt(model, 20)])
    with torch.no_grad():
        output = model(input_ids=input_ids, use_cache=False, output_hidden_states=True)
        states = base(input_ids=input_ids, use_cache=False).last_hidden_state
        logits, state = plain_forward(model, tuple(input_ids[0].tolist()))
    assert torch.equal(output.hidden_states[-1], states)
    assert torch.equal(state, states[0, -1])
    assert torch.equal(logits, output.logits[0, -1])
    assert states.dtype == torch.float32


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_exercise_the_cascade(name, architecture):
    """Sets of many sizes, all parts of the prompt matter, and the same weights every time."""
    model = architecture(name)
    steps = []
    for seed in range(3):
        prompt = random_prompt(model, 16, seed)
        agent = random_agent(model.config.hidden_size, seed)
        steps += sequential_cascade(model, agent, prompt, max_new_tokens=6, fallback="first").steps
    sizes = [step.set_size for step in steps]
    assert min(sizes) < 8 < max(sizes) <= 40, sizes
    assert any(step.accepted and step.rank > 0 for step in steps)

    _, state = plain_forward(model, tuple(prompt))
    for index in (-1, -2, -WINDOW + 1):
        other = list(prompt)
        other[index] = 3 if prompt[index] != 3 else 4
        _, changed = plain_forward(model, tuple(other))
        assert (state - changed).abs().max() > 1e-3 * state.abs().max(), index
    assert torch.equal(state, plain_forward(ARCHITECTURES[name](), tuple(prompt))[1])


@pytest.mark.parametrize(
    "name", ["mistral", "qwen2_sliding", "gemma2", "gemma3_text", "olmo3", "gpt_oss"]
)
def test_sliding_windows_are_shorter_than_prompts(name, architecture):
    model = architecture(name)
    assert model.config.sliding_window == WINDOW
    prompt = tuple(random_prompt(model, 16))
    wide = ARCHITECTURES[name]()
    wide.load_state_dict(model.state_dict())
    for module in wide.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = WINDOW + 1
    wide.config.sliding_window = WINDOW + 1
    difference = plain_forward(model, prompt)[1] - plain_forward(wide, prompt)[1]
    assert difference.abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_ARCHITECTURES)
def test_other_architectures_run(name):
    try:
        model = OTHER_ARCHITECTURES[name]()
    except (ImportError, ValueError) as error:
        pytest.skip(f"not in this transformers: {error}")
    agent = random_agent(model.config.hidden_size)
    run = sequential_cascade(model, agent, random_prompt(model, 16), max_new_tokens=3)
    assert len(run.token_ids) == 3
    assert math.isfinite(run.margin)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_greedy_decoding_of_transformers_is_the_same(name, architecture):
    model = architecture(name)
    prompt = random_prompt(model, 16)
    token_ids = greedy_plain(model, prompt, max_new_tokens=12)
    generated = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=12,
        min_new_tokens=12,
        eos_token_id=None,
    )
    assert generated[0, len(prompt) :].tolist() == token_ids
    # An agent that accepts everything, and one candidate, come to the same.
    everything = sequential_cascade(model, lambda s: torch.ones(1), prompt, max_new_tokens=12)
    single = sequential_cascade(model, None, prompt, max_new_tokens=12, top_k=1)
    assert list(everything.token_ids) == list(single.token_ids) == token_ids


def test_greedy_plain_stops_and_masks():
    model = ScriptedModel({-1: ROW, 4: [0.0, 1.0, 1.0, 0.0, 0.0]})
    assert greedy_plain(model, [0], max_new_tokens=3) == [4, 1, 4]
    assert greedy_plain(model, [0], max_new_tokens=3, eos_token_ids=(1,)) == [4, 1]
    assert greedy_plain(model, [0], max_new_tokens=3, eos_token_ids=(1,), min_new_tokens=2) == [
        4,
        2,
        4,
    ]
    assert greedy_plain(model, [0], max_new_tokens=3, eos_token_ids=(1,), ignore_eos=True) == [
        4,
        1,
        4,
    ]
    assert greedy_plain(model, [0], max_new_tokens=0) == []


def test_a_memo_changes_nothing(architecture):
    model = architecture("llama")
    prompt = random_prompt(model, 16)
    agent = random_agent(model.config.hidden_size)
    options = {"max_new_tokens": 8, "strategy": "max_prob", "acceptance": "sample", "seed": 7}
    memo: Memo = {}
    without = sequential_cascade(model, agent, prompt, **options)
    assert sequential_cascade(model, agent, prompt, memo=memo, **options) == without
    assert sequential_cascade(model, agent, prompt, memo=memo, **options) == without
    assert len(memo) == 1 + sum(max(step.examined, 1) for step in without.steps)


# The authors' records


def replay(name: str, run: dict, memo: Memo, max_new_tokens: int | None = None) -> None:
    """Asserts that the oracle decides as recorded, up to `max_new_tokens`."""
    model = golden.load_model(name)
    prompt = golden.input_ids(name)[run["prompt"]]
    shared = {"eos_token_ids": golden.eos_token_ids(name), "memo": memo}
    label = f"{run['run']} on {run['prompt']}"
    if not golden.is_cascade(run):
        limit = len(run["ids"]) if max_new_tokens is None else max_new_tokens
        token_ids = greedy_plain(model, prompt, max_new_tokens=limit, **shared)
        assert token_ids == run["ids"][:max_new_tokens], label
        return

    options = golden.decoding_options(run)
    if max_new_tokens is not None:
        options["max_new_tokens"] = min(max_new_tokens, options["max_new_tokens"])
    agent = accept_mlp(golden.actor_weights(name, run["actor"]))
    sign = golden.accept_sign(run)
    result = sequential_cascade(model, lambda s: sign * agent(s), prompt, **options, **shared)
    assert list(result.token_ids) == run["ids"][:max_new_tokens], label
    for step, (size, tried, scored) in zip(result.steps, run["steps"], strict=False):
        assert step.set_size == size, label
        assert (None if step.accepted is None else step.tried) == tried, label
        if not golden.asks_all(run):
            assert step.examined == scored, label


def one_run_of_each_kind() -> list:
    kinds: dict[tuple[str, str], dict] = {}
    for name in golden.model_names():
        for run in golden.runs(name):
            kinds.setdefault((name, run["run"]), run)
    return [pytest.param(name, run, id=f"{name}-{kind}") for (name, kind), run in kinds.items()]


@needs_golden
@pytest.mark.parametrize(("name", "run"), one_run_of_each_kind())
def test_replays_the_start_of_each_kind_of_golden_run(name, run):
    replay(name, run, {}, max_new_tokens=10)


@needs_golden
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "prompt"),
    [(name, prompt) for name in golden.model_names() for prompt in golden.input_ids(name)],
)
def test_replays_all_golden_runs_of_a_prompt(name, prompt):
    memo: Memo = {}
    for run in golden.runs(name):
        if run["prompt"] == prompt:
            replay(name, run, memo)


@needs_golden
@pytest.mark.parametrize("name", golden.model_names())
def test_states_and_accept_probabilities_equal_the_golden_trace(name):
    model = golden.load_model(name)
    agent = accept_mlp(golden.actor_weights(name))
    records, tensors = golden.trace(name)
    for record in records:
        for position in record["positions"][:8]:
            if "forced" in position:
                continue
            prefix = (*record["input_ids"], *record["ids"][: position["t"]])
            logits, _ = plain_forward(model, prefix)
            candidates = truncate(logits, top_k=record["topk"], top_p=record["topp"])
            assert list(candidates.ids) == position["cand"]
            logprobs = [logprob / record["temperature"] for logprob in candidates.logprobs]
            assert logprobs == pytest.approx(position["logp_div_T"], abs=2e-5)
            if position.get("hidden"):
                states = [plain_forward(model, (*prefix, token))[1] for token in position["cand"]]
                hidden = torch.stack(states)
                torch.testing.assert_close(hidden, tensors[position["hidden"]], atol=2e-5, rtol=0)
                probs = torch.sigmoid(agent(hidden))
                torch.testing.assert_close(
                    probs, torch.tensor(position["p_accept"]), atol=5e-6, rtol=0
                )
