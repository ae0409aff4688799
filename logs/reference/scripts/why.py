"""Where a cloned learner's mistakes cost something: the gap over the steps before its falls.

    python logs/reference/scripts/why.py          writes why.csv, from policies/bc_s0.pt

gap = -A*(s, a_learner) in the states of 300 fresh episodes of the learner.  The line of
steps_before_fall 0 has the mean over all steps of the episodes that ended well.
"""

import csv

from common import FAILED, HERE, WHY, ag
import numpy as np

EPISODES, BEFORE = 300, 150


if __name__ == "__main__":
    state = ag.load_checkpoint(HERE / "policies" / "bc_s0.pt")
    agent = ag.AggreVateDAgent(state["config"], state)
    fell, well = [], []
    streams = [(WHY, i) for i in range(EPISODES)]
    for t in agent.play(streams, 0.0, 0.0, agent.horizon, "playing"):
        gap = agent.gap(agent.label([t]))[:, 0].numpy()
        if t.rewards[-1] == -100:
            fell.append(gap[::-1][:BEFORE])  # its last steps, the fall's first
        elif t.rewards.sum() > FAILED:
            well.append(gap)
    columns = [np.concatenate(well)]
    columns += [np.array([g[k] for g in fell if len(g) > k]) for k in range(BEFORE)]
    with open(HERE / "why.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("steps_before_fall", "gap", "standard_error", "episodes"))
        for k, x in enumerate(columns):
            n = len(x) if k else len(well)
            table.writerow((k, f"{x.mean():.4f}", f"{x.std(ddof=1) / n**0.5:.4f}", n))
