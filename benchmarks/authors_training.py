"""Episodes and updates as the MARA authors make them, written anew: the baseline to beat.

    episode     one at a time; at each position every candidate of the set is forwarded on its own
                (the penalty is normalised over all of them), and the chosen one once more
    transition  a tuple in a Python list, its states lists of floats
    batch       random.sample, then numpy, then torch
    update      critic, actor, α by separate networks; the target follows at the last of a call

Where theirs hands a new copy of the KV cache to every candidate, this one takes the candidate's row
off again, which is cheaper. Recorded episodes of theirs count the same forwards: one for each
candidate and each decision, one for each forced token, one for the prompt.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from mara_fast import MaraAgent
from mara_fast.bench.authors_cascade import SerialModel
from mara_train.sac import SacConfig


class Transition(NamedTuple):
    """What is put into the buffer."""

    state: list[float]
    action: int
    reward: float
    next_state: list[float]
    done: bool


@torch.inference_mode()
def explore(
    model: PreTrainedModel,
    agent: MaraAgent,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    final_reward: float,
    kl_weight: float = 0.1,
    gamma: float = 0.99,
    temperature: float = 0.8,
    top_k: int = 40,
    top_p: float = 0.95,
) -> tuple[list[Transition], int]:
    """An episode of that many tokens (EOS ignored): its transitions, and the forwards it took."""
    serial = SerialModel(model, top_k=top_k, top_p=top_p)
    logits, _ = serial.forward(prompt_ids)
    states: list[list[float]] = []
    actions: list[int] = []
    rewards: list[float] = []
    positions: list[int] = []
    for position in range(max_new_tokens):
        scores = torch.log_softmax(logits.float(), dim=-1)
        candidates = serial.candidates(scores)
        if len(candidates) == 1:
            logits, _ = serial.forward(candidates)
            continue
        hidden, accept_probs, chosen = [], [], len(candidates) - 1
        for candidate in candidates:
            _, state = serial.forward([candidate])
            serial.take_back()
            hidden.append(state[0].tolist())
            accept_probs.append(float(torch.softmax(agent(state)[0], dim=-1)[1]))
        draws = [random.random() < prob for prob in accept_probs]
        if True in draws:
            chosen = draws.index(True)
        prob = torch.tensor(accept_probs)
        reached = torch.cat((torch.ones(1), (1 - prob).cumprod(0)[:-1]))
        log_policy = torch.log_softmax(prob * reached, dim=0)
        penalty = log_policy - scores[0, candidates].cpu() / temperature
        states += hidden[: chosen + 1]
        actions += [0] * chosen + [1]
        rewards += (-kl_weight * penalty[: chosen + 1]).tolist()
        positions += [position] * (chosen + 1)
        logits, _ = serial.forward([candidates[chosen]])
    decided = sorted(set(positions))
    behind = {position: len(decided) - 1 - place for place, position in enumerate(decided)}
    for place, position in enumerate(positions[1:], start=1):
        rewards[place] += gamma ** behind[position] * final_reward
    last = len(states) - 1
    transitions = [
        Transition(state, action, reward, states[min(place + 1, last)], place == last)
        for place, (state, action, reward) in enumerate(zip(states, actions, rewards, strict=True))
    ]
    return transitions, serial.num_forwards


class Critic(nn.Module):
    """Two value heads behind one layer norm; names as in the authors' ``critic.pth``."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(hidden_size)
        for head in (1, 2):
            sizes = (hidden_size, inner_size, inner_size // 4, 2)
            for layer in (1, 2, 3):
                linear = nn.Linear(sizes[layer - 1], sizes[layer])
                self.add_module(f"linear{head}{layer}", linear)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Values of both actions by each head, [B, 2] twice."""
        x = self.ln(states)
        first, second = (self._head(x, head) for head in (1, 2))
        return first, second

    def _head(self, x: Tensor, head: int) -> Tensor:
        one, two, three = (self.get_submodule(f"linear{head}{layer}") for layer in (1, 2, 3))
        return three(F.relu(two(F.relu(one(x)))))


class Learner:
    """Discrete SAC over a buffer of Python lists.

    Args:
        agent: trained in place, where it is.
        critic, target: with the same weights, on its device.
        config: options.
    """

    def __init__(self, agent: MaraAgent, critic: Critic, target: Critic, config: SacConfig) -> None:
        self.agent, self.critic, self.target, self.config = agent, critic, target, config
        self.device = agent.ln.weight.device
        self.log_alpha = torch.tensor(
            np.log(config.initial_alpha), dtype=torch.float32, device=self.device
        )
        self.log_alpha.requires_grad_()
        self.actor_optimizer = torch.optim.Adam(agent.parameters(), config.actor_learning_rate)
        self.critic_optimizer = torch.optim.Adam(critic.parameters(), config.critic_learning_rate)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], config.alpha_learning_rate)
        self.buffer: list[Transition] = []

    def draw(self, batch_size: int) -> tuple[Tensor, ...]:
        """A batch as tensors: states, actions, rewards, next states, done."""
        columns = zip(*random.sample(self.buffer, batch_size), strict=True)
        states, actions, rewards, next_states, done = (np.array(column) for column in columns)
        batch = (
            torch.tensor(states, dtype=torch.float32),
            torch.tensor(actions, dtype=torch.int64)[:, None],
            torch.tensor(rewards, dtype=torch.float32)[:, None],
            torch.tensor(next_states, dtype=torch.float32),
            torch.tensor(done, dtype=torch.float32)[:, None],
        )
        return tuple(tensor.to(self.device) for tensor in batch)

    def update(self, batch_size: int, *, times: int) -> None:
        """So many gradient steps, each on a batch of its own, then one of the target."""
        for _ in range(times):
            self.step(*self.draw(batch_size))
        tau = self.config.tau
        for own, other in zip(self.target.parameters(), self.critic.parameters(), strict=True):
            own.data.copy_(tau * other.data + (1 - tau) * own.data)

    def step(
        self, states: Tensor, actions: Tensor, rewards: Tensor, next_states: Tensor, done: Tensor
    ) -> None:
        """One gradient step of critic, actor and α."""
        config, alpha = self.config, self.log_alpha.exp().detach()
        with torch.no_grad():
            logprob = torch.log_softmax(self.agent(next_states), dim=-1)
            value = torch.min(*self.target(next_states))
            soft = (logprob.exp() * (value - alpha * logprob)).sum(1, keepdim=True)
            wanted = rewards + config.gamma * (1 - done) * soft
        first, second = self.critic(states)
        critic_loss = (
            F.mse_loss(first.gather(1, actions), wanted)
            + F.mse_loss(second.gather(1, actions), wanted)
        ) / 2
        self._descend(self.critic_optimizer, self.critic.parameters(), critic_loss)

        with torch.no_grad():
            value = torch.min(*self.critic(states))
        logprob = torch.log_softmax(self.agent(states), dim=-1)
        prob = logprob.exp()
        entropy = -(prob * logprob).sum(1)
        actor_loss = (-alpha * entropy - (prob * value).sum(1)).mean()
        self._descend(self.actor_optimizer, self.agent.parameters(), actor_loss)

        surplus = (entropy.detach() - config.target_entropy).mean()
        self._descend(self.alpha_optimizer, [self.log_alpha], self.log_alpha.exp() * surplus)
        # They log these after every step.
        for value in (critic_loss, actor_loss, self.log_alpha.exp()):
            value.item()

    def _descend(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: "Sequence[Tensor] | object",
        loss: Tensor,
    ) -> None:
        parameters = list(parameters)  # type: ignore[call-overload]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        optimizer.step()
