"""Several agents as one: against the sequential cascade, and against exact arithmetic."""

import copy
import dataclasses
import itertools
import json
import math
import pickle
import warnings
from decimal import Decimal, localcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import mara_fast
import speaker
from architectures import ARCHITECTURES, random_prompt
from exactness import check_exact, random_agent
from mara_fast import DecodingConfig, Engine, Generation, MaraAgent
from mara_fast.cli import app
from mara_fast.data_parallel import EngineOptions, ParallelEngine
from mara_fast.mixture import AgentMixture, combined
from tape import TapeCapture

HIDDEN = 48
NAN, INFINITY = float("nan"), float("inf")
COMBINATIONS = ("logit", "product", "min")
LENGTHS = (13, 3, 9, 1, 6)


@cache
def model() -> Any:
    return ARCHITECTURES["llama"]()


@cache
def agents() -> tuple[MaraAgent, ...]:
    """Three that disagree: lenient, strict, in between."""
    return tuple(
        random_agent(HIDDEN, seed=seed, accept_bias=bias)
        for seed, bias in ((0, 0.8), (1, -0.4), (2, 0.3))
    )


@cache
def memo() -> dict:
    """Forwards of the oracle."""
    return {}


def prompts() -> list[list[int]]:
    return [random_prompt(model(), length, seed=length) for length in LENGTHS]


def engine_of(*chosen: Any, **options: Any) -> Engine:
    return Engine(model(), list(chosen), **{"max_batch_size": 3, "prefill_chunk": 5} | options)


def ids_of(results: list[Generation]) -> list[list[int]]:
    return [result.token_ids for result in results]


# The same tokens as the sequential cascade

DIALS: list[dict[str, Any]] = [
    {},
    {"agent_weights": (2, 1), "window": 3},
    {"agent_weights": (0.1, 5), "window": 1, "order": "reverse"},
    {"agent_combination": "product", "window": 4},
    {"agent_combination": "product", "agent_weights": (0.5, 2), "window": 2, "threshold": 0.3},
    {"agent_combination": "product", "agent_weights": (0, 3), "window": 3},
    {"agent_combination": "min", "window": 5, "fallback": "first"},
    {"agent_combination": "min", "agent_weights": (1e-9, 1e9), "strategy": "max_prob", "top_k": 8},
    {"agent_weights": (1, 3), "acceptance": "sample", "seed": 5, "strategy": "random", "top_k": 6},
    {"agent_combination": "product", "acceptance": "sample", "seed": 2**63, "order": "top_last"},
]


@pytest.mark.parametrize("options", DIALS, ids=str)
def test_tokens_are_those_of_the_sequential_cascade(options: dict[str, Any]) -> None:
    """Each combination and weighting, over slots with refill; another window, one slot."""
    engine = engine_of(*agents()[:2])
    found = check_exact(engine, prompts(), memo=memo(), max_new_tokens=8, **options)
    alone = engine_of(*agents()[:2], max_batch_size=1).generate(
        prompts()[:2], max_new_tokens=8, **options | {"window": 7}
    )
    assert ids_of(alone) == ids_of(found)[:2]


def test_every_dial_changes_the_answers() -> None:
    """Else the test above says nothing."""
    engine = engine_of(*agents()[:2])
    settings: list[dict[str, Any]] = [
        {},
        {"agent_weights": (1, 0)},
        {"agent_weights": (0, 1)},
        {"agent_combination": "product"},
        {"agent_combination": "product", "agent_weights": (3, 3)},
        {"agent_combination": "min"},
    ]
    answers = [ids_of(engine.generate(prompts(), max_new_tokens=16, **s)) for s in settings]
    assert all(one != other for one, other in itertools.combinations(answers, 2))


def test_three_agents() -> None:
    for options in ({"agent_weights": (1, 2, 3)}, {"agent_weights": (1, 0, 2)}):
        for combination in COMBINATIONS:
            check_exact(
                engine_of(*agents()),
                prompts()[:2],
                memo=memo(),
                max_new_tokens=6,
                window=3,
                agent_combination=combination,
                **options,
            )


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_the_ends_of_the_dial_are_the_agents_alone(combination: str) -> None:
    """To the last bit; a lone weight is a share of itself."""
    both = engine_of(*agents()[:2])
    for which, weights in ((0, (1, 0)), (1, (0, 1))):
        alone = Engine(model(), agents()[which], max_batch_size=3, prefill_chunk=5)
        options: dict[str, Any] = {"max_new_tokens": 10, "window": 3}
        wanted = alone.generate(prompts(), **options)
        found = both.generate(
            prompts(), agent_weights=weights, agent_combination=combination, **options
        )
        assert [result.tokens for result in found] == [result.tokens for result in wanted]
    if combination != "product":
        found = both.generate(
            prompts(), agent_weights=(0, 0.3), agent_combination=combination, **options
        )
        assert [result.tokens for result in found] == [result.tokens for result in wanted]


def test_weights_of_a_call_are_of_that_call() -> None:
    """On one engine, back and forth, also between runs under way."""
    engine = engine_of(*agents()[:2], max_batch_size=2)
    options: dict[str, Any] = {"max_new_tokens": 8, "window": 3}
    weights: list[Any] = [(1, 0), (0, 1), None, (1, 3)]
    wanted = {
        w: ids_of(engine_of(*agents()[:2]).generate(prompts(), agent_weights=w, **options))
        for w in weights
    }
    for w in [*weights, *reversed(weights)]:
        assert ids_of(engine.generate(prompts(), agent_weights=w, **options)) == wanted[w]
    runs = {w: engine.as_completed(prompts(), agent_weights=w, **options) for w in weights[:3]}
    found: dict[Any, dict[int, list[int]]] = {w: {} for w in runs}
    while any(len(one) < len(LENGTHS) for one in found.values()):
        for w, run in runs.items():
            found[w] |= {index: result.token_ids for index, result in itertools.islice(run, 1)}
    assert all([found[w][i] for i in range(len(LENGTHS))] == wanted[w] for w in runs)


def test_equal_dials_share_a_decoder() -> None:
    engine = engine_of(*agents()[:2])
    kept = []
    for options in ({}, {}, {"agent_weights": (1, 1)}, {"agent_weights": (2, 1)}):
        engine.generate(prompts()[:1], max_new_tokens=3, **options)
        kept.append(engine._idle)
    assert kept[0] is kept[1] is not kept[2] is not kept[3]
    # No step depends on a limit.
    engine.generate(prompts()[:1], max_new_tokens=3, agent_weights=(2, 1), max_fallback_rate=None)
    assert engine._idle is kept[3]


def test_other_agents_of_the_same_engine() -> None:
    engine = engine_of(*agents()[:2])
    options: dict[str, Any] = {"max_new_tokens": 8, "window": 3}
    engine.generate(prompts(), **options)
    engine.agent = AgentMixture.of(agents()[1:])
    found = ids_of(engine.generate(prompts(), **options))
    assert found == ids_of(engine_of(*agents()[1:]).generate(prompts(), **options))


def test_every_run_looks_at_all_parameters_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the scoring kernel keeps of them may be old, however they were written."""
    engine = engine_of(*map(copy.deepcopy, agents()))
    assert isinstance(engine.agent, AgentMixture)
    refreshed: list[int] = []
    for index, agent in enumerate(engine.agent.agents):
        monkeypatch.setattr(agent, "refresh_scoring", lambda index=index: refreshed.append(index))
    for _ in range(2):
        engine.generate([[5]], max_new_tokens=1)
    assert refreshed == [0, 1, 2] * 2


def test_an_agent_of_weight_0_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(agents()[0], copy.deepcopy(agents()[1]))
    assert isinstance(engine.agent, AgentMixture)
    wanted = engine.generate(prompts(), max_new_tokens=6, agent_weights=(1, 0))
    engine.agent.agents[1].output_linear.bias.fill_(NAN)
    for combination in COMBINATIONS:
        options: dict[str, Any] = {"max_new_tokens": 6, "agent_combination": combination}
        found = engine.generate(prompts(), agent_weights=(1, 0), **options)
        assert ids_of(found) == ids_of(wanted)
        # NaN of one that is asked ends the sequence.
        for result in engine.generate(prompts(), agent_weights=(1, 1e-6), **options):
            assert result.finish_reason == "error" and "accept logit is NaN" in str(result.error)
    monkeypatch.setattr(engine.agent.agents[1], "accept_logit", pytest.fail)
    assert ids_of(engine.generate(prompts(), max_new_tokens=6, agent_weights=(5, 0))) == ids_of(
        wanted
    )


# The step as a graph


def test_replayed_steps_are_weighted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs hold the weights they were captured with; other weights are captured anew."""
    monkeypatch.setattr("mara_fast.engine._host_reads", lambda device: False)
    engine = engine_of(agents()[0], copy.deepcopy(agents()[1]))
    assert isinstance(engine.agent, AgentMixture)
    capture = engine._capture = TapeCapture()
    settings: list[dict[str, Any]] = [
        {"agent_weights": (1, 2)},
        {"agent_weights": (2, 1)},
        {"agent_weights": (0, 1)},
        {"agent_combination": "product", "threshold": 0.4},
    ]
    for options in settings:
        num_captured, num_replayed = capture.num_captured, capture.num_replayed
        for _ in range(2):
            check_exact(engine, prompts(), memo=memo(), max_new_tokens=7, window=3, **options)
        assert capture.num_captured > num_captured and capture.num_replayed > num_replayed + 10
    # An agent trained between two runs is seen by the graphs there are.
    num_captured = capture.num_captured
    before = ids_of(engine.generate(prompts(), max_new_tokens=7, window=3, **options))
    engine.agent.agents[1].output_linear.bias[0] += 2
    found = check_exact(engine, prompts(), memo=memo(), max_new_tokens=7, window=3, **options)
    assert capture.num_captured == num_captured and ids_of(found) != before


# Logits combined


def exact_product(logits: tuple[float, ...], weights: tuple[float, ...]) -> float:
    """logit(Π σ(d)^w) by definition, in 500 digits."""
    if any(math.isnan(d) for d in logits):
        return NAN
    if -INFINITY in logits:
        return -INFINITY
    with localcontext(prec=500):
        p = Decimal(1)
        for d, w in zip(logits, weights, strict=True):
            if d != INFINITY:
                p *= (1 / (1 + (-Decimal(d)).exp())) ** Decimal(w)
        return INFINITY if p == 1 else float(p.ln() - (1 - p).ln())


ADVERSARIAL = (0.0, -0.0, 1e-30, 3.0, -3.0, 7.5, 14.9, 15.1, 80.0, -80.0, 120.0, -120.0)
ALSO_INFINITE = (*ADVERSARIAL, INFINITY, -INFINITY, NAN)


@pytest.mark.parametrize("weights", [(1, 1), (0.5, 2), (1e-6, 1), (30, 1), (1e-30, 1e-20)])
def test_products_are_exact(weights: tuple[float, float]) -> None:
    pairs = list(itertools.product(ALSO_INFINITE, repeat=2))
    columns = [torch.tensor(column) for column in zip(*pairs, strict=True)]
    found = combined(columns, weights, "product")
    assert found.dtype == torch.float32
    # As the agents have them.
    rounded = zip(*(column.tolist() for column in columns), strict=True)
    wanted = torch.tensor([exact_product(pair, weights) for pair in rounded], dtype=torch.float64)
    torch.testing.assert_close(found.double(), wanted, rtol=4e-7, atol=4e-7, equal_nan=True)


def test_products_of_many() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0)) * 8
    weights = (1.0, 0.25, 3.0, 1e-3, 7.0)
    found = combined(list(logits), weights, "product")
    wanted = [exact_product(tuple(d), weights) for d in logits.T.tolist()]
    wanted_ = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(found.double(), wanted_, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", [(1, 1), (0.5, 2), (3, 1e-6), (1e308, 1e308), (1e-308, 1e-308)])
def test_means_and_minima(weights: tuple[float, float]) -> None:
    pairs = list(itertools.product(ALSO_INFINITE, repeat=2))
    columns = [torch.tensor(column) for column in zip(*pairs, strict=True)]
    first, second = (column.double() for column in columns)
    share = (weights[0] / 2) / (weights[0] / 2 + weights[1] / 2)
    mean = combined(columns, weights, "logit")
    torch.testing.assert_close(
        mean.double(), share * first + (1 - share) * second, rtol=2e-7, atol=1e-5, equal_nan=True
    )
    # Infinite logits of both signs have no mean.
    infinite = [(one, other) for one, other in pairs if -one == other == INFINITY]
    assert len(infinite) == 1 and math.isnan(mean[pairs.index(infinite[0])])
    least = combined(columns, weights, "min")
    # torch.minimum, unlike Python's min, keeps NaN.
    assert torch.equal(least.nan_to_num(nan=7), torch.minimum(*columns).nan_to_num(nan=7))
    assert least.isnan().tolist() == [any(map(math.isnan, pair)) for pair in pairs]


def test_one_weighted_agent() -> None:
    d = torch.tensor(ALSO_INFINITE)
    for combination in ("logit", "min"):
        for weight in (1.0, 0.3, 1e-300, 1e300):
            found = combined([d], [weight], combination)  # type: ignore[arg-type]
            assert torch.equal(found.nan_to_num(nan=7), d.nan_to_num(nan=7))
    assert combined([d], [1.0], "product") is d
    squared = combined([torch.tensor([0.0])], [2.0], "product")
    torch.testing.assert_close(squared, torch.tensor([math.log(0.25 / 0.75)]))


def test_shapes_dtypes_and_copies() -> None:
    mixture = AgentMixture.of([agents()[0], copy.deepcopy(agents()[1]).double()])
    states = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(0))
    for combination in COMBINATIONS:
        config = DecodingConfig(agent_combination=combination, agent_weights=(1, 2))
        dialed = mixture.with_dials(config)
        d = dialed.accept_logit(states)
        assert d.dtype == torch.float32 and d.shape == (2, 3)
        for same in (copy.deepcopy(dialed), pickle.loads(pickle.dumps(dialed))):
            assert torch.equal(same.accept_logit(states), d) and same != dialed
        assert dialed == mixture.with_dials(config) != mixture
        assert dialed.accept_logit(states[:0]).shape == (0, 3)


# What is given


def test_agents_are_folders_too(tmp_path: Path) -> None:
    for index, agent in enumerate(agents()):
        agent.save_pretrained(tmp_path / str(index))
    options: dict[str, Any] = {"max_new_tokens": 6, "agent_weights": (1, 0, 2)}
    wanted = ids_of(engine_of(*agents()).generate(prompts(), **options))
    folders: list[Any] = [tmp_path / "0", str(tmp_path / "1"), agents()[2]]
    for given in (folders, tuple(folders)):
        engine = Engine(model(), given, max_batch_size=3)
        assert ids_of(engine.generate(prompts(), **options)) == wanted
    assert ids_of(mara_fast.generate(prompts(), model(), folders, **options)) == wanted
    *_, last = mara_fast.stream([prompts()[0]], model(), folders, **options)
    assert last.generation is not None and last.generation.token_ids == wanted[0]
    ids = torch.tensor(prompts()[:1])
    found = model().generate(
        ids,
        custom_generate=mara_fast.custom_generate,
        agent=folders,
        config=DecodingConfig(agent_weights=(1, 0, 2)),
        max_new_tokens=6,
        do_sample=False,
    )
    assert found[0, ids.shape[1] :].tolist() == wanted[0]


def test_a_list_of_one_is_the_one() -> None:
    engine = engine_of(agents()[0])
    assert engine.agent is agents()[0]
    wanted = ids_of(engine.generate(prompts(), max_new_tokens=6))
    for options in ({"agent_weights": (7,)}, {"agent_combination": "min"}):
        assert ids_of(engine.generate(prompts(), max_new_tokens=6, **options)) == wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"agent=\[\] names no agent; plain decoding is agent=False"),
        ((), r"agent=\(\) names no agent"),
        ([None], "agent.0. must be a MaraAgent, a folder or a hub id, got NoneType"),
        ([False, True], "got bool"),
        ([[]], "got list"),
        ({"a": 1}, "got dict"),
        (5, "got int"),
    ],
    ids=str,
)
def test_no_agents(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(model(), given)


def test_every_agent_must_fit() -> None:
    spoilt = copy.deepcopy(agents()[0])
    spoilt.linear1.weight[0, 0] = NAN
    for other, message in (
        (MaraAgent(32, 8), " judges states of size 32, but .* has hidden size 48"),
        (spoilt, "'s linear1.weight holds NaN"),
        (5, " must be a MaraAgent, .* got int"),
    ):
        with pytest.raises(ValueError, match=rf"^agent\[1\]{message}"):
            engine_of(agents()[0], other)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=rf"^(the )?agent{message}"):
            Engine(model(), other)  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", [{1, 2}, frozenset({0.5, 1.5})], ids=str)
def test_weights_have_an_order(weights: Any) -> None:
    with pytest.raises(
        ValueError, match=r"is not allowed; allowed: .* one per agent in their order"
    ):
        DecodingConfig(agent_weights=weights)


@pytest.mark.parametrize("num_agents", [1, 2, 3])
def test_a_weight_per_agent(num_agents: int) -> None:
    engine = engine_of(*agents()[:num_agents])
    for weights in ((1,), (1, 2), (0, 1, 2), (1, 1, 1, 1)):
        if len(weights) == num_agents:
            assert engine.config(agent_weights=weights).agent_weights == weights
            continue
        counted = f"{len(weights)} weight{'s' * (len(weights) > 1)}"
        message = rf"has {counted} for {num_agents} agent.?: give one per agent"
        for call in (
            lambda w=weights: engine.config(agent_weights=w),
            lambda w=weights: engine.generate([[5]], DecodingConfig(agent_weights=w)),
            lambda w=weights: engine.stream([[5]], agent_weights=w),
            lambda w=weights: engine.check_prompts([[5]], DecodingConfig(agent_weights=w)),
        ):
            with pytest.raises(ValueError, match=message):
                call()


def test_weights_of_nobody() -> None:
    plain = Engine(model(), False)
    with pytest.warns(UserWarning, match="has no effect: there is no agent"):
        found = plain.generate([[5]], max_new_tokens=3, agent_weights=(1, 2))
    assert ids_of(found) == ids_of(plain.generate([[5]], max_new_tokens=3))


def described(index: int, **config: Any) -> MaraAgent:
    agent = copy.deepcopy(agents()[index])
    agent.config = dataclasses.replace(agent.config, **config)
    return agent


def test_defaults_are_those_of_the_first_that_has_some() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = engine_of(agents()[0], described(1, decoding={"top_k": 7}), described(2))
        assert engine.config() == DecodingConfig(top_k=7)
        same = {"decoding": {"top_k": 7}, "base_model": "org/model"}
        engine_of(described(0, **same), described(1, **same), agents()[2])
        assert engine_of(*agents()).config() == DecodingConfig()
        assert engine.config(DecodingConfig(top_p=0.5)) == DecodingConfig(top_p=0.5)


def test_contradicting_cards_are_told() -> None:
    first = described(0, decoding={"top_k": 7, "fallback": "first"})
    second = described(1, decoding={"fallback": "max_prob"})
    with pytest.warns(UserWarning) as caught:
        engine = engine_of(first, second)
    (message,) = {str(one.message) for one in caught}
    assert "options: top_k (7, 40); fallback ('first', 'max_prob'). Those" in message
    assert engine.config() == DecodingConfig(top_k=7, fallback="first")
    with pytest.warns(UserWarning, match="trained for different models: org/a, org/b"):
        engine_of(described(0, base_model="org/a"), described(1, base_model="org/b"))


# Other processes, and the command


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Folders of a language model with a tokenizer, and of two agents for it."""
    folder = tmp_path_factory.mktemp("speaker")
    lm, agent = speaker.save(folder)
    other = random_agent(speaker.model().config.hidden_size, seed=9, accept_bias=-0.5)
    other.save_pretrained(folder / "other")
    return lm, agent, folder / "other"


def answer(folders: tuple[Path, Path, Path], **options: Any) -> Generation:
    lm, *both = folders
    [result] = mara_fast.generate("Hi", str(lm), both, max_new_tokens=16, **options)
    return result


def test_flags(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    lm, agent, other = folders
    command = ["generate", "-m", lm, "-a", agent, "--agent", other, "--max-new-tokens", "16", "Hi"]
    weights = ["--agent-weight", "1", "--agent-weight", "0.25"]
    settings: list[tuple[list[str], dict[str, Any]]] = [
        ([], {}),
        (weights, {"agent_weights": (1, 0.25)}),
        (["--agent-combination", "min"], {"agent_combination": "min"}),
        ([*weights, "--agent-combination", "product"], {"agent_weights": (1, 0.25)}),
    ]
    settings[-1][1]["agent_combination"] = "product"
    texts = []
    for flags, options in settings:
        result = run(*command, *flags)
        assert result.exit_code == 0, result.output
        texts.append(answer(folders, **options).text)
        assert result.stdout_bytes.decode() == f"{texts[-1]}\n"
    assert len(set(texts)) > 2
    for name in ("agent-weight", "agent_weights"):
        (tmp_path / "dials.yaml").write_text(f"{name}: [1, 0.25]\nagent_combination: product\n")
        result = run(*command, "-c", tmp_path / "dials.yaml")
        assert result.stdout_bytes.decode() == f"{texts[-1]}\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-a", "x", "-a", "y", "--agent-weight", "1"], "has 1 weight for 2 agents"),
        (["-a", "x", "--agent-weight", "1", "--agent-weight", "2"], "has 2 weights for 1 agent:"),
        (["--no-agent", "--agent-weight", "1"], "has 1 weight for 0 agents"),
        (["-a", "x", "-a", "y", "--no-agent"], "give --agent or --no-agent, not both"),
        (["--agent-weight", "-1"], "agent_weights=[-1.0] is not allowed"),
        (["--agent-weight", "nan"], "agent_weights=[nan] is not allowed"),
        (["--agent-combination", "mean"], "allowed: logit, product, min"),
        (["-m", "tiny", "--agent-weight", "1", "--agent-weight", "2"], "2 weights for 1 agent:"),
    ],
    ids=str,
)
def test_mistaken_flags(flags: list[str], message: str) -> None:
    model_flags = [] if "-m" in flags else ["-m", "/no/such/model"]
    result = run("generate", "Hi", *model_flags, *flags)
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""


def test_results_know_their_agents(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """A file is resumed by the same agents, weights and combination, and by no others."""
    lm, agent, other = folders
    (tmp_path / "in.jsonl").write_text('{"prompt": "Hi"}\n{"prompt": "Bread"}\n')
    out = tmp_path / "out.jsonl"
    command = ["generate", "-m", lm, "-i", tmp_path / "in.jsonl", "-o", out]
    command += ["--max-new-tokens", "8"]
    both = ["-a", agent, "-a", other]
    weights = ["--agent-weight", "1", "--agent-weight", "2"]
    assert run(*command, *both, *weights).exit_code == 0
    settings = json.loads(out.with_name("out.jsonl.settings.json").read_text())
    assert settings["agent"] == [str(agent), str(other)]
    assert settings["agent_weights"] == [1, 2] and settings["agent_combination"] == "logit"
    whole = out.read_text().splitlines(keepends=True)
    out.write_text(whole[0])
    # A limit is no setting of the tokens.
    assert run(*command, *both, *weights, "--max-fallback-rate", "0.9").exit_code == 0
    [first, second] = map(json.loads, out.read_text().splitlines())
    assert second["token_ids"] == json.loads(whole[1])["token_ids"] != first["token_ids"]
    for other_flags, name in (
        ([*both], "agent_weights was [1.0, 2.0], is None"),
        ([*both, *weights[:3], "3"], "agent_weights was"),
        ([*both, *weights, "--agent-combination", "min"], "agent_combination was 'logit'"),
        ([*both[2:], *both[:2], *weights], "agent was ["),
        (["-a", agent], "agent was ["),
    ):
        result = run(*command, *other_flags)
        assert result.exit_code == 2 and name in result.stderr


def test_engines_in_other_processes(folders: tuple[Path, Path, Path]) -> None:
    """Without Ray: that the options reach them, and are checked here."""
    pytest.importorskip("ray")
    pytest.importorskip("pyarrow")
    lm, agent, other = folders
    options = EngineOptions(model=str(lm), agent=(str(agent), str(other)))
    parallel = ParallelEngine(options, num_workers=2)
    assert parallel.config(agent_weights=(1, 2)).agent_weights == (1, 2)
    with pytest.raises(ValueError, match="has 3 weights for 2 agents"):
        parallel.config(agent_weights=(1, 2, 3))
    worker = Engine(**dataclasses.asdict(pickle.loads(pickle.dumps(options))))
    [found] = worker.generate("Hi", max_new_tokens=16, agent_weights=(1, 0.25))
    assert found.text == answer(folders, agent_weights=(1, 0.25)).text
