"""The tables of the tiny world: maps of states, agents behind them, what is printed and drawn."""

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from mara_fast import Engine, MaraAgent, tiny
from mara_fast.tiny.grammar import sample_dialogues

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("tiny_tables")


@pytest.fixture(scope="module")
def judge() -> Any:
    return SimpleNamespace(base=Engine("tiny", False))


@pytest.fixture(scope="module")
def texts(judge: Any) -> list[str]:
    return [
        judge.base.tokenizer.apply_chat_template(
            [
                {"role": "user", "content": one.instruction},
                {"role": "assistant", "content": one.answer},
            ],
            tokenize=False,
        )
        for one in sample_dialogues(num=20, seed=3)
    ]


def test_states_are_found_by_the_ends_of_tokens(
    tables: ModuleType, judge: Any, texts: list[str]
) -> None:
    (states,) = tables.states_by_end(judge, texts[:1])
    assert max(states) == len(texts[0])
    ids = judge.base.tokenizer(texts[0], add_special_tokens=False).input_ids
    assert len(states) == len(ids)
    hidden = judge.base.lm.model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    torch.testing.assert_close(torch.stack([states[end] for end in sorted(states)]), hidden)


def test_a_map_finds_the_other_models_states(
    tables: ModuleType, judge: Any, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another LM whose states are a rotation and a shift of ours, and with fewer ends."""
    torch.manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(128, 128))
    shift = torch.randn(128)
    ours, other = tables.states_by_end(judge, texts), SimpleNamespace()

    def states_by_end(asked: Any, given: list[str]) -> list[dict[int, torch.Tensor]]:
        if asked is judge:
            return ours
        return [
            {end: state @ rotation + shift for end, state in part.items() if end % 3} | {-1: shift}
            for part in ours
        ]

    monkeypatch.setattr(tables, "states_by_end", states_by_end)
    weight, explained = tables.fit_map(other, judge, texts)
    assert weight.shape == (129, 128) and explained > 0.999
    agent = MaraAgent(128, 32).requires_grad_(False)
    mapped = tables.MappedAgent(agent, weight)
    state = torch.stack(list(ours[0].values()))
    torch.testing.assert_close(
        mapped.accept_logit(state @ rotation + shift), agent.accept_logit(state), atol=1e-3, rtol=0
    )


def test_a_mapped_agent_decodes(tables: ModuleType) -> None:
    agent = MaraAgent.from_pretrained(tiny.AGENT_PATH).float().requires_grad_(False)
    weight = torch.cat((torch.eye(128), torch.zeros(1, 128)))
    prompts = ["How do I bake bread?", "How do I steal a bicycle?"]
    texts = [
        [one.token_ids for one in Engine("tiny", each).generate(prompts, max_new_tokens=24)]
        for each in (agent, tables.MappedAgent(agent, weight))
    ]
    assert texts[0] == texts[1]


def test_report(tables: ModuleType, tmp_path: Path) -> None:
    rates = {"helpful": 0.5, "harmless": -0.25, "preference": 0.125}
    common = {
        "over": {"greedy": rates, "sampled": rates},
        "helpfulness": 0.75,
        "harm": 0.062,
        "malformed": 0.01,
        "rank0_accepted": 0.7,
    }
    shared = {"trained_on": "own", "map": None, "explained": None} | common
    mapped = {"map": "least squares", "explained": 0.875}
    base = {how: {"helpfulness": 0.5, "harm": 0.2} for how in ("greedy", "sampled")}
    report = {
        "instructions": 7,
        "base": {"own": base},
        "table 5": [{"ratio": ratio} | common for ratio in tables.RATIOS],
        "table 3": [shared | {"decodes": "own"}, shared | {"decodes": "independent"} | mapped],
    }
    console = Console(width=400, record=True, file=(tmp_path / "out").open("w"))
    tables._print(console, report)
    text = console.export_text()
    for part in ("+50.0 -25.0 +12.5", "0.75", "0.062", "2:1", "R² 0.88", "own LM"):
        assert part in text
    tables.plot(report, tmp_path / "tables.png")
    assert (tmp_path / "tables.png").read_bytes().startswith(b"\x89PNG")
