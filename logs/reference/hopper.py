"""Why Hopper's learners pass their expert: what the expert's own noise does for it.

    python logs/reference/hopper.py          writes hopper_noise.csv; about two minutes

The zoo's agent plays 100 fresh episodes with its action tanh(mean + x * std * N(0, 1)) for each x:
0 is its mean action, which the learners imitate, 1 the policy that SAC trained.
"""

import csv
from pathlib import Path

import numpy as np
import study  # it also finds aggrevated.py
import torch
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.sac.policies import SACPolicy

ag = study.aggrevated
HERE, STREAM, EPISODES, NOISE = Path(__file__).resolve().parent, 12, 100, (0, 0.25, 0.5, 1)


def play(actor, i: int, scale: float) -> tuple[float, int]:
    """Return and length of episode i."""
    env, rng, total = ag.make_env("Hopper-v5"), np.random.default_rng((STREAM, i)), 0.0
    state, _ = env.reset(seed=int(rng.integers(2**31)))
    for t in range(1000):
        with torch.inference_mode():
            mean, log_std, _ = actor.get_action_dist_params(torch.tensor(state[None]).float())
        noise = scale * torch.from_numpy(rng.standard_normal(mean.shape)).float()
        action = torch.tanh(mean + log_std.exp() * noise)[0].numpy()
        state, reward, terminated, truncated, _ = env.step(action)
        total += float(reward)
        if terminated or truncated:
            break
    return total, t + 1


def main() -> None:
    torch.set_num_threads(1)
    env, path = ag.make_env("Hopper-v5"), study.TASKS["hopper"][0]["expert_path"]
    policy = SACPolicy(env.observation_space, env.action_space, lambda _: 0.0, [256, 256])
    policy.load_state_dict(load_from_zip_file(path, load_data=False)[1]["policy"])
    with open(HERE / "hopper_noise.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(
            ("noise", "mean_return", "standard_error", "whole_episodes", "median_length")
        )
        for noise in NOISE:
            played = [play(policy.actor, i, noise) for i in range(EPISODES)]
            returns, lengths = np.array(played).T
            error = returns.std(ddof=1) / EPISODES**0.5
            row = noise, returns.mean(), error, np.mean(lengths == 1000), np.median(lengths)
            table.writerow([round(float(x), 3) for x in row])


if __name__ == "__main__":
    main()
