"""Scoring against the agent's plain forward in float64."""

import pytest
import torch

from mara_fast import MaraAgent


@pytest.mark.parametrize("num_states", [1, 63, 400])
@pytest.mark.parametrize("hidden_size", [4, 48, 257])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_against_float64(num_states: int, hidden_size: int, offset: float) -> None:
    torch.manual_seed(hidden_size)
    agent = MaraAgent(hidden_size, inner_size=64).requires_grad_(False)
    states = torch.randn(num_states, hidden_size) + offset
    d = agent.accept_logit(states)
    assert d.shape == (num_states,) and d.dtype == torch.float32
    z = agent.double()(states.double())
    torch.testing.assert_close(d.double(), z[:, 1] - z[:, 0], atol=2e-5, rtol=1e-4)


def test_half_precision_states_are_computed_in_the_agents_precision() -> None:
    agent = MaraAgent(32, inner_size=64).requires_grad_(False)
    states = torch.randn(7, 32)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = states.to(dtype)
        assert torch.equal(agent.accept_logit(rounded), agent.accept_logit(rounded.float()))


def test_leading_shape_is_kept() -> None:
    agent = MaraAgent(32, inner_size=64).requires_grad_(False)
    assert agent.accept_logit(torch.randn(2, 3, 32)).shape == (2, 3)


def test_gradients_flow() -> None:
    agent = MaraAgent(32, inner_size=64)
    agent.accept_logit(torch.randn(5, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in agent.parameters())
