"""The learner: its rules by hand, what it must not read, and that it learns."""

import copy
import math
from pathlib import Path

import pytest
import torch

from host_reads import ForbidHostReads
from mara_fast import MaraAgent
from mara_train.critic import TwinCritic
from mara_train.sac import METRICS, Batch, Sac, SacConfig

HIDDEN = 16


def learner(**options: object) -> Sac:
    torch.manual_seed(0)
    return Sac(MaraAgent(HIDDEN, 32), SacConfig(**options))


def batch(size: int = 40, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        states=torch.randn(size, HIDDEN, generator=generator),
        actions=torch.randint(2, (size,), generator=generator),
        rewards=torch.randn(size, generator=generator),
        next_states=torch.randn(size, HIDDEN, generator=generator),
        done=torch.rand(size, generator=generator) < 0.3,
    )


def test_the_critics_heads_are_two_networks_behind_one_norm() -> None:
    critic = TwinCritic(HIDDEN, 32)
    state = critic.official_state()
    x = torch.randn(5, HIDDEN)
    normed = torch.nn.functional.layer_norm(x, (HIDDEN,), state["ln.weight"], state["ln.bias"])
    for head in (1, 2):
        y = normed
        for layer in (1, 2, 3):
            name = f"linear{head}{layer}"
            y = torch.nn.functional.linear(y, state[f"{name}.weight"], state[f"{name}.bias"])
            y = y.relu() if layer < 3 else y
        torch.testing.assert_close(critic(x)[head - 1], y)
    other = TwinCritic(HIDDEN, 32)
    other.load_official_state(state)
    assert torch.equal(other(x), critic(x))
    with pytest.raises(ValueError, match=r"not a critic of this size.*linear11\.weight"):
        other.load_official_state(TwinCritic(HIDDEN, 64).official_state())


def test_the_target_moves_in_its_turn() -> None:
    sac = learner(target_interval=3, tau=0.5)
    before = copy.deepcopy(sac.target.state_dict())
    for step in range(1, 4):
        sac.update(batch(seed=step))
        moved = any(not torch.equal(a, before[k]) for k, a in sac.target.state_dict().items())
        assert moved == (step == 3)
    for name, tensor in sac.target.state_dict().items():
        expected = (before[name] + sac.critic.state_dict()[name]) / 2
        torch.testing.assert_close(tensor, expected)


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_what_lies_behind_the_last_transition_does_not_matter(gamma: float) -> None:
    """Another episode's state, or memory that was never written."""
    states = []
    for behind in (0.0, torch.nan):
        sac, one = learner(gamma=gamma), batch()
        unread = one.done | (gamma == 0)
        sac.update(one._replace(next_states=one.next_states.masked_fill(unread[:, None], behind)))
        states.append(sac.state_dict())
    for name in ("agent", "critic"):
        for key, tensor in states[0][name].items():
            assert torch.equal(tensor, states[1][name][key])


def test_targets_by_hand() -> None:
    sac, one = learner(gamma=0.9, initial_alpha=0.3), batch(3)
    logits = sac.agent(one.next_states).detach()
    logprob = torch.log_softmax(logits, -1)
    value = sac.target(one.next_states).amin(0)
    soft = (logprob.exp() * (value - 0.3 * logprob)).sum(-1)
    expected = one.rewards + 0.9 * soft * ~one.done
    torch.testing.assert_close(sac._targets(one, torch.tensor(0.3)), expected)


def test_the_critics_loss_of_the_paper() -> None:
    """Eq. 10 squares the error of the mean of both heads."""
    one = batch()
    losses = {}
    for kind in ("separate", "mean"):
        sac = learner(critic_loss=kind, gamma=0.0)
        taken = sac.critic(one.states)[:, torch.arange(40), one.actions].detach()
        losses[kind] = sac.update(one)[METRICS.index("critic_loss")].item()
        error = taken - one.rewards
        wanted = error.square().mean() if kind == "separate" else error.mean(0).square().mean()
        assert losses[kind] == pytest.approx(float(wanted), rel=1e-5)
    assert losses["mean"] < losses["separate"]


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_an_update_reads_nothing_on_the_host(gamma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sac = learner(gamma=gamma)
    for optimizer in sac.optimizers.values():
        # On a CPU it counts its steps on the host; on a GPU it is told not to.
        monkeypatch.setattr(optimizer, "step", lambda: None)
    with ForbidHostReads():
        sac.gradient_step(batch())
        sac.move_target()


def test_it_learns_which_states_to_accept() -> None:
    """Reward 1 for the right action, decided by the sign of the first feature."""
    sac = learner(
        gamma=0.0,
        actor_learning_rate=3e-3,
        critic_learning_rate=3e-3,
        alpha_learning_rate=1e-2,
        target_entropy=0.1,
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        states = torch.randn(128, HIDDEN, generator=generator)
        actions = torch.randint(2, (128,), generator=generator)
        right = (states[:, 0] > 0).long()
        rewards = (actions == right).float()
        sac.update(Batch(states, actions, rewards, states, torch.ones(128, dtype=torch.bool)))
    states = torch.randn(1000, HIDDEN, generator=generator)
    states = states[states[:, 0].abs() > 0.3]
    agreed = (sac.agent.accept_logit(states) > 0) == (states[:, 0] > 0)
    assert agreed.float().mean() > 0.95


def test_alpha_follows_the_entropy() -> None:
    """Too little entropy raises α, too much lowers it."""
    for target_entropy, rises in ((math.log(2) + 0.1, True), (0.01, False)):
        sac = learner(target_entropy=target_entropy, alpha_learning_rate=0.1)
        before = sac.log_alpha.item()
        sac.update(batch())
        assert (sac.log_alpha.item() > before) == rises
        # It is moved while the learner learns.
        sac = learner(target_entropy=0.3, alpha_learning_rate=0.1)
        sac.target_entropy.fill_(target_entropy)
        sac.update(batch())
        assert (sac.log_alpha.item() > before) == rises


def test_gradients_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    sac = learner(max_grad_norm=1e-3)
    sac.update(batch()._replace(rewards=torch.full((40,), 1e3)))
    norms = [p.grad.norm() for p in sac.critic.parameters() if p.grad is not None]
    assert float(torch.stack(norms).norm()) <= 1.001e-3


def test_state_goes_through_a_file(tmp_path: Path) -> None:
    first = learner(gamma=0.9)
    for seed in range(4):
        first.update(batch(seed=seed))
    first.target_entropy.fill_(0.1)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = learner(gamma=0.9)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for seed in range(4, 8):
        assert torch.equal(first.update(batch(seed=seed)), second.update(batch(seed=seed)))
    assert second.num_steps == first.num_steps == 8


def test_decoding_sees_what_was_learnt() -> None:
    """The scoring kernel's folded parameters follow the optimizer."""
    sac = learner(actor_learning_rate=0.1)
    states = torch.randn(3, HIDDEN)
    with torch.inference_mode():
        before = sac.agent.accept_logit(states)
    sac.update(batch())
    with torch.inference_mode():
        assert not torch.equal(sac.agent.accept_logit(states), before)


def test_bad_options_are_named() -> None:
    for options, message in (
        ({"gamma": 1.5}, r"gamma=1.5 is not allowed; allowed: a number in \[0, 1\]"),
        ({"critic_loss": "both"}, "critic_loss='both' is not known; allowed: separate, mean"),
        ({"target_interval": 0}, "target_interval=0 is not allowed"),
        ({"initial_alpha": 0.0}, "initial_alpha=0.0 is not allowed; allowed: a number > 0"),
        ({"actor_learning_rate": math.nan}, "actor_learning_rate=nan is not allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            SacConfig(**options)


def test_learning_rates_can_be_scaled() -> None:
    sac = learner(actor_learning_rate=0.1, critic_learning_rate=0.2, alpha_learning_rate=0.3)
    sac.scale_learning_rates(0.5)
    rates = {name: each.param_groups[0]["lr"] for name, each in sac.optimizers.items()}
    assert rates == {"actor": 0.05, "critic": 0.1, "alpha": 0.3}


@pytest.mark.gpu
def test_a_captured_update_is_the_plain_one() -> None:
    """On a GPU updates are replayed from a graph: also after learning rates and target moved."""

    def on_gpu() -> Sac:
        torch.manual_seed(0)
        return Sac(MaraAgent(HIDDEN, 32), SacConfig(gamma=0.9, target_interval=2), device="cuda")

    captured, plain = on_gpu(), on_gpu()
    for step in range(12):
        if step == 7:
            for sac in (captured, plain):
                sac.scale_learning_rates(0.1)
                sac.target_entropy.fill_(0.05)
        on_device = Batch(*(tensor.cuda() for tensor in batch(seed=step)))
        found = captured.update(on_device)
        expected = plain.gradient_step(on_device)
        if step % 2:
            plain.move_target()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert captured._graph is not None
    for name, tensor in captured.agent.state_dict().items():
        torch.testing.assert_close(tensor, plain.agent.state_dict()[name], atol=1e-5, rtol=1e-4)
