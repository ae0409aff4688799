"""Where a cloned learner's mistakes cost something: the gap over the steps before its falls.

    python logs/reference/why.py          writes why.csv, from bc_s0/best.pt and its expert

gap = Q*(s, a_expert) - Q*(s, a_learner) in the states of 300 fresh episodes of the learner.  The
line of steps_before_fall 0 has the mean over all steps of the episodes that ended well.
"""

import csv
from pathlib import Path

import numpy as np
import study  # it also finds aggrevated.py
import torch

ag = study.aggrevated
HERE, STREAM, EPISODES, BEFORE = Path(__file__).resolve().parent, 10, 300, 150


def gaps(agent, trajectory) -> np.ndarray:
    """The gap (T,) in every state of an episode."""
    state = torch.from_numpy(trajectory.states)
    expert = torch.from_numpy(agent.expert.predict(trajectory.states))
    q = [agent.get_q_star(state, a) for a in (expert, torch.from_numpy(trajectory.actions))]
    return (q[0] - q[1])[:, 0].numpy()


def main() -> None:
    state = ag.load_checkpoint(HERE / "bc_s0" / "best.pt")
    agent = ag.AggreVateDAgent(state["config"])
    agent.load(state, policy_only=True)
    fell, well = [], []
    for t in agent.evaluate("learner", EPISODES, STREAM):
        if t.rewards[-1] == -100:
            fell.append(gaps(agent, t)[::-1][:BEFORE])  # its last steps, the fall's first
        elif t.rewards.sum() > 250:
            well.append(gaps(agent, t))
    usual = np.concatenate(well)
    with open(HERE / "why.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("steps_before_fall", "gap", "standard_error", "episodes"))
        table.writerow((0, usual.mean(), usual.std() / len(well) ** 0.5, len(well)))
        for k in range(BEFORE):
            x = np.array([g[k] for g in fell if len(g) > k])
            table.writerow((k + 1, x.mean(), x.std(ddof=1) / len(x) ** 0.5, len(x)))


if __name__ == "__main__":
    main()
