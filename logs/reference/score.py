"""Score a run's best and last policy and its expert on fresh episodes; writes test.csv beside it.

    python logs/reference/score.py logs/reference/default_s0 --episodes 500

The terrains are the same for every policy and every run, and were seen neither in training nor in
validation; actions are the means.
"""

import argparse
import csv
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import aggrevated  # noqa: E402


def score(run: Path, episodes: int) -> None:
    """Write run/test.csv: policy, episode, return, length."""
    states = {who: aggrevated.load_checkpoint(run / f"{who}.pt") for who in ("best", "last")}
    agent = aggrevated.AggreVateDAgent(replace(states["best"]["config"], n_workers=2))
    agent.workers = aggrevated.Workers(agent.config)
    rows = []
    try:
        for who in ("expert", "best", "last"):
            if who != "expert":
                agent.policy.load_state_dict(states[who]["policy"])
            player = "expert" if who == "expert" else "learner"
            played = agent.evaluate(player, episodes, aggrevated.TEST)
            rows += [(who, i, t.episode_return, len(t)) for i, t in enumerate(played)]
    finally:
        agent.close()
    with open(run / "test.csv", "w", newline="") as file:
        csv.writer(file).writerows([("policy", "episode", "return", "length"), *rows])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--episodes", type=int, default=500)
    args = parser.parse_args()
    for run in args.runs:
        score(run, args.episodes)
        print(f"{run}/test.csv")
