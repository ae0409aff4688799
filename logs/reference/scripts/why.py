"""Where a cloned learner's mistakes cost something: the gap over the steps before its falls.

    python logs/reference/scripts/why.py          writes why.csv, from policies/bc_s0.pt

gap = Q*(s, a_expert) - Q*(s, a_learner) in the states of 300 fresh episodes of the learner.  The
line of steps_before_fall 0 has the mean over all steps of the episodes that ended well.
"""

import csv

from common import FAILED, HERE, WHY, ag
import numpy as np

EPISODES, BEFORE = 300, 150


def gaps(agent, trajectory) -> np.ndarray:
    """The gap (T,) in every state of an episode."""
    data = agent.label([trajectory])
    return (data["q_target"] - agent.get_q_star(data["state"], data["action"]))[:, 0].numpy()


if __name__ == "__main__":
    state = ag.load_checkpoint(HERE / "policies" / "bc_s0.pt")
    agent = ag.AggreVateDAgent(state["config"], state)
    fell, well = [], []
    for t in agent.evaluate("learner", EPISODES, WHY, bar="playing"):
        if t.rewards[-1] == -100:
            fell.append(gaps(agent, t)[::-1][:BEFORE])  # its last steps, the fall's first
        elif t.rewards.sum() > FAILED:
            well.append(gaps(agent, t))
    columns = [np.concatenate(well)]
    columns += [np.array([g[k] for g in fell if len(g) > k]) for k in range(BEFORE)]
    with open(HERE / "why.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("steps_before_fall", "gap", "standard_error", "episodes"))
        for k, x in enumerate(columns):
            n = len(x) if k else len(well)
            table.writerow((k, f"{x.mean():.4f}", f"{x.std(ddof=1) / n**0.5:.4f}", n))
