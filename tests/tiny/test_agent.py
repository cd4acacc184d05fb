"""The embedded agent: untrained, small, and accepting rank 0 about as often as its card says."""

import random

import pytest

from mara_fast import DecodingStats, Engine, MaraAgent, tiny
from mara_fast.tiny.calibrate import CalibrationConfig, calibrate
from mara_fast.tiny.grammar import instructions


def test_card_says_what_it_is():
    card = (tiny.AGENT_PATH / "README.md").read_text(encoding="utf-8")
    assert "**Untrained.**" in card
    assert "70 %" in card
    assert "only demonstrates the" in card


def test_embedded_agent_accepts_rank_0_about_seven_times_in_ten():
    chosen = instructions(split="heldout")
    # Not the instructions that it was calibrated on.
    random.Random(1).shuffle(chosen)
    engine = Engine("tiny", max_batch_size=48)
    assert engine.agent is not None
    results = engine.generate([one.text for one in chosen[:48]], max_new_tokens=64)
    stats = sum((result.stats for result in results), DecodingStats())
    assert 0.55 < stats.rank0_accepted_frac < 0.85
    assert 0 < stats.num_all_rejected < stats.num_decided
    assert len(stats.accepted_ranks) >= 3


def test_calibration_reaches_its_target_and_is_deterministic():
    config = CalibrationConfig(target=0.5, num_instructions=12, num_bisections=7, max_new_tokens=24)
    agents: list[MaraAgent] = []
    for _ in range(2):
        agent, stats = calibrate(*tiny.load(), config=config)
        assert stats.rank0_accepted_frac == pytest.approx(0.5, abs=0.15)
        agents.append(agent)
    first, second = (agent.state_dict() for agent in agents)
    assert all(first[name].equal(second[name]) for name in first)
    assert all(tensor.half().float().equal(tensor) for tensor in first.values())
