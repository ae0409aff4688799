"""What an agent's critics say, Q*(s, a), beside the discounted return that then came."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from train_sac import FALL

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aggrevated import AggreVateDAgent

AUDIT = 9  # the random stream of its episodes, which neither training nor any validation uses
BEFORE_FALL = (0, 5), (5, 10), (10, 20), (20, 40), (40, 80), (80, 150)  # steps; 0 is the fall
TAIL = 500  # steps before a time limit that are left out: 0.99^500 is less than 0.01


def returns_to_go(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """Discounted sum of the rewards (T,) from each step on."""
    result = np.array(rewards, dtype=np.float64)
    for t in reversed(range(len(rewards) - 1)):
        result[t] += gamma * result[t + 1]
    return result


def q_star(expert, states: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Q*(s, a) (N,): the least that the critics say, or those that were evaluated."""
    q = expert.q_values(torch.from_numpy(states), torch.from_numpy(actions))
    return q[:, q.shape[1] // 2 if expert.evaluated else 0 :].amin(dim=1).numpy()


def what_came(agent: AggreVateDAgent, episodes: list[tuple], price: Callable) -> tuple:
    """(states, actions, returns, steps to the fall) of all steps that count, (N, ...) each.

    An episode is a Trajectory and its first step that counts.  `price(rewards, actions, fell)` pays
    as the critics know it; `fell` is a mask.
    """
    columns = []
    for t, first in episodes:
        end = len(t.rewards)
        cut_off = end == agent.horizon
        fell = t.rewards[-1] <= FALL and not cut_off
        to_fall = np.arange(end)[::-1] if fell else np.full(end, np.inf)
        rewards = np.array(price(t.rewards, t.actions, to_fall == 0))
        if cut_off:  # what would still have come is taken from Q*: little, in the steps that count
            (rewards[-1],) = q_star(agent.expert, t.states[-1:], t.actions[-1:])
            end = max(end - TAIL, end // 4)
        returns = returns_to_go(rewards, agent.expert.gamma)
        columns.append([x[first:end] for x in (t.states, t.actions, returns, to_fall)])
    return tuple(np.concatenate(x) for x in zip(*columns, strict=True))


def audit(agent: AggreVateDAgent, came: tuple) -> dict:
    """Q* of the agent's critics against what came: all in all, before falls and elsewhere."""
    states, actions, returns, to_fall = came
    q = q_star(agent.expert, states, actions)

    def said_and_came(rows) -> dict:
        means = float(q[rows].mean()), float(returns[rows].mean())
        return dict(zip(("steps", "q", "return"), (int(rows.sum()), *means), strict=True))

    near = {f"{a}-{b}": (a <= to_fall) & (to_fall < b) for a, b in BEFORE_FALL}
    elsewhere = to_fall >= BEFORE_FALL[-1][1]
    return dict(
        steps=len(q),
        mean_q=float(q.mean()),
        mean_return=float(returns.mean()),
        bias=float((q - returns).mean()),
        correlation=float(np.corrcoef(q, returns)[0, 1]),
        falls=int((to_fall == 0).sum()),
        before_fall={name: said_and_came(rows) for name, rows in near.items() if rows.any()},
        elsewhere=said_and_came(elsewhere) if elsewhere.any() else None,
    )
