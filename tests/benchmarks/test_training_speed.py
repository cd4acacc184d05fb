"""The training benchmark: its baseline does what our trainer does, one episode at a time."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mara_fast import Engine, MaraAgent
from mara_train.config import MaraConfig
from mara_train.rollout import Rollout
from mara_train.sac import Batch, Sac, SacConfig
from mara_train.token_rewards import with_final_reward

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def authors() -> ModuleType:
    return load("authors_training")


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    return load("training_speed")


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=128,
        num_attention_heads=4,
        vocab_size=97,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def test_an_episode_is_that_of_our_rollout(authors: ModuleType) -> None:
    """Same transitions and rewards, where the agent leaves nothing to chance."""
    model = small_model()
    agent = MaraAgent(64).requires_grad_(False)
    agent.output_linear.weight.mul_(1e5)
    recipe = MaraConfig.official()
    decoding = recipe.decoding.replace(max_new_tokens=12, ignore_eos=True, prompt_format="auto")
    prompt, reward = [5, 17, 40, 8], 1.7
    (episode,) = Rollout(
        Engine(model, agent), decoding, recipe.token_rewards, dtype=torch.float32
    ).episodes([prompt], [0])
    chain = episode.chain
    ours = with_final_reward(chain.token_rewards, chain.positions, reward, recipe.token_rewards)

    theirs, num_forwards = authors.explore(
        model, agent, prompt, max_new_tokens=12, final_reward=reward
    )
    assert len(theirs) > 12
    assert [bool(one.action) for one in theirs] == chain.actions.tolist()
    torch.testing.assert_close(torch.tensor([one.state for one in theirs]), chain.states)
    torch.testing.assert_close(
        torch.tensor([one.reward for one in theirs]), ours, atol=1e-5, rtol=1e-5
    )
    following = torch.tensor([one.next_state for one in theirs[:-1]])
    torch.testing.assert_close(following, chain.states[1:])
    assert [one.done for one in theirs] == [False] * (len(theirs) - 1) + [True]
    stats = episode.generation.stats
    num_candidates = sum(size * count for size, count in stats.candidate_counts.items())
    assert num_forwards == 1 + num_candidates + stats.num_decided + stats.num_forced


def test_a_gradient_step_is_that_of_our_learner(authors: ModuleType) -> None:
    torch.manual_seed(0)
    sac = Sac(MaraAgent(16, 32), SacConfig(target_interval=1))
    agent, critic, target = MaraAgent(16, 32), authors.Critic(16, 32), authors.Critic(16, 32)
    agent.load_state_dict(sac.agent.state_dict())
    critic.load_state_dict(sac.critic.official_state())
    target.load_state_dict(sac.target.official_state())
    learner = authors.Learner(agent, critic, target, SacConfig())
    states = torch.randn(41, 16)
    learner.buffer = [
        authors.Transition(state, place % 2, place / 10, following, place % 8 == 7)
        for place, (state, following) in enumerate(
            zip(states[:-1].tolist(), states[1:].tolist(), strict=True)
        )
    ]
    for _ in range(5):
        batch: list[torch.Tensor] = []

        def keep(*drawn: torch.Tensor, into: list[torch.Tensor] = batch) -> None:
            into += drawn
            authors.Learner.step(learner, *drawn)

        learner.step = keep
        learner.update(16, times=1)
        drawn, actions, rewards, following, done = batch
        sac.update(Batch(drawn, actions[:, 0], rewards[:, 0], following, done[:, 0].bool()))
    for ours, theirs in (
        (sac.agent.state_dict(), agent.state_dict()),
        (sac.critic.official_state(), critic.state_dict()),
        (sac.target.official_state(), target.state_dict()),
    ):
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(sac.log_alpha, learner.log_alpha)


def test_report(speed: ModuleType) -> None:
    def system(updates_per_episode: float, batch_size: int) -> object:
        return speed.System(
            collect=lambda: 7,
            num_episodes=1,
            draw=lambda: None,
            update=lambda times: None,
            batch_size=batch_size,
            updates_per_episode=updates_per_episode,
        )

    systems = {
        speed.AUTHORS: system(10, 4),
        speed.OURS_OFFICIAL: system(10, 4),
        speed.OURS: system(1, 2),
    }
    seconds = {
        speed.AUTHORS: {"collect": [2.0, 3.0, 9.0], "draw": [0.1] * 3, "update": [0.3] * 3},
    }
    seconds |= {
        name: {"collect": [0.1] * 3, "draw": [0.001] * 3, "update": [0.1] * 3}
        for name in (speed.OURS_OFFICIAL, speed.OURS)
    }
    found = speed.report_of(systems, seconds)
    authors = found["systems"][speed.AUTHORS]
    assert authors["collected_episodes_per_h"] == pytest.approx(1200)
    assert authors["collected_episodes_per_h_range"] == pytest.approx([400, 1800])
    assert authors["trained_episodes_per_h"] == pytest.approx(600)
    assert authors["transitions_per_episode"] == 7
    ratios = found["ratios"]
    assert list(ratios[speed.OURS_OFFICIAL].values()) == pytest.approx([30, 6 / 1.1, 100, 3])
    # Other batches: their times are not compared.
    assert list(ratios[speed.OURS].values()) == pytest.approx([30, 30])
    measured = speed.measure(systems, rounds=2, num_updates=3, device=torch.device("cpu"))
    assert {len(values) for parts in measured.values() for values in parts.values()} == {2}


def test_systems_run_and_learn(speed: ModuleType) -> None:
    """Every system as it is measured, in small."""
    setting = speed.Setting(
        model=small_model(),
        agent=MaraAgent(64, 32).requires_grad_(False),
        prompts=[[5, 17, 40, 8], [3, 3, 9, 60]],
        num_tokens=6,
        states=torch.randn(1024, 64),
    )
    systems = {
        speed.AUTHORS: speed.authors_system(setting, num_episodes=5),
        speed.OURS_OFFICIAL: speed.our_system(setting, MaraConfig.official(episodes_per_step=2)),
        speed.OURS: speed.our_system(setting, MaraConfig()),
    }
    found = speed.report_of(
        systems, speed.measure(systems, rounds=1, num_updates=1, device=torch.device("cpu"))
    )
    for name, one in found["systems"].items():
        assert systems[name].num_episodes == 2
        assert one["transitions_per_episode"] > 6 and one["update_ms"] > one["draw_ms"] > 0
    assert found["systems"][speed.OURS]["batch_size"] == 256
