"""How fast aggrevated.py is beside its floor, the simulator: ratios measured in one run.

    python tests/benchmark.py            about two minutes on two quiet cores
    python tests/benchmark.py --quick    tiny sizes, only to see that it runs

An iteration's trajectories are stepped again without policy, expert, labels or update: the same
environments, terrains and actions, in as many processes.  That is the floor.  What is compared runs
in turn, A B then B A; a ratio is the median of the repeats' own.
"""

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import aggrevated as ag  # noqa: E402


def replay(env_name: str, share: list[tuple]) -> float:
    """Step new environments side by side through (stream, actions); the sum of all rewards."""
    envs, total = [ag.make_env(env_name) for _ in share], 0.0
    for env, (stream, _) in zip(envs, share):
        env.reset(seed=int(np.random.default_rng(stream).integers(2**31)))
    for t in range(max(len(actions) for _, actions in share)):
        for env, (_, actions) in zip(envs, share):
            if t < len(actions):
                total += float(env.step(actions[t])[1])
    return total


def seconds(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def race(a, b, repeats: int) -> tuple[float, float, float]:
    """Median seconds of a and of b, and the median ratio a / b."""
    pairs = []
    for r in range(repeats):
        if r % 2:
            second, first = seconds(b), seconds(a)
        else:
            first, second = seconds(a), seconds(b)
        pairs.append((first, second))
    a_seconds, b_seconds = (statistics.median(x) for x in zip(*pairs))
    return a_seconds, b_seconds, statistics.median(x / y for x, y in pairs)


def floor_of(agent, streams, trajectories):
    """A function that replays the trajectories by the agent's own workers, shared out as theirs."""
    episodes = [(stream, t.actions) for stream, t in zip(streams, trajectories)]
    size = -(-len(episodes) // agent.config.n_workers)
    shares = [episodes[i : i + size] for i in range(0, len(episodes), size)]
    expected = sum(float(t.rewards.sum()) for t in trajectories)

    def run():
        step = functools.partial(replay, agent.config.env_name)
        total = sum((agent.pool.map if agent.config.n_workers > 1 else map)(step, shares))
        assert abs(total - expected) < 1e-6 * abs(expected) + 1e-6, "a replay took another course"

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    sizes = dict(K=4, H=100, max_experience_len=1000, update_sz=500) if quick else {}
    repeats = 2 if quick else 7
    for n_workers in (1, 2):
        config = ag.Config(n_workers=n_workers, device="cpu", **sizes).check()
        agent = ag.AggreVateDAgent(config)
        for n in range(1, 6):  # until alpha is 0
            agent.iterate(n)
        streams = [(ag.ROLL_IN, config.seed, 5, k) for k in range(config.K)]
        for alpha in (1.0, 0.5, 0.0):
            how = alpha, config.roll_in_noise, config.H
            mixture = functools.partial(agent.simulate, streams, *how)
            trajectories = mixture()
            steps = sum(len(t.rewards) for t in trajectories)
            ours, floor, ratio = race(mixture, floor_of(agent, streams, trajectories), repeats)
            print(
                f"{n_workers} workers, alpha {alpha}: simulator {steps / floor:7.0f} steps/s, "
                f"roll-in {steps / ours:7.0f} steps/s: {ratio:.2f} x the simulator's time"
            )
        learn = seconds(lambda: (agent.label(trajectories), agent.update(6)))
        print(
            f"{n_workers} workers: an iteration is {(ours + learn) / floor:.2f} x its simulator's "
            f"time: roll-in {ours:.2f} s, labels and update {learn:.2f} s"
        )


if __name__ == "__main__":
    main()
