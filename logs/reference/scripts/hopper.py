"""Why Hopper's learners pass their expert: what the expert's own noise does for it.

    python logs/reference/scripts/hopper.py          writes hopper_noise.csv; about two minutes

The zoo's agent plays 100 fresh episodes with its action tanh(mean + x * std * N(0, 1)) for each x:
0 is its mean action, which the learners imitate, 1 the policy that SAC trained.
"""

import csv
import pickle

from common import HERE, HOPPER, ag, options_of
import numpy as np
import torch
from stable_baselines3.sac.policies import SACPolicy


class Noisy:
    """SAC's actor with noise, as `aggrevated.play_episode` plays a learner."""

    def __init__(self, actor):
        self.actor = actor

    @torch.inference_mode()
    def act(self, state, noise):
        mean, log_std, _ = self.actor.get_action_dist_params(torch.from_numpy(state[None]))
        return torch.tanh(mean + log_std.exp() * torch.tensor(noise))[0].float().numpy()


if __name__ == "__main__":
    agent = ag.AggreVateDAgent(ag.Config(**options_of("hopper_expert"), n_workers=1, device="cpu"))
    env = ag.make_env(agent.config)
    policy = SACPolicy(env.observation_space, env.action_space, lambda _: 0.0, [256, 256])
    policy.load_state_dict(ag.read_sac_zip(agent.expert.path)[0])
    players = pickle.dumps((Noisy(policy.actor), agent.expert))
    with open(HERE / "hopper_noise.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow("noise mean_return standard_error whole_episodes median_length".split())
        for x in (0, 0.25, 0.5, 1):
            how = players, agent.config, 0.0, x, 1000
            played = [ag.play_episode(*how, (HOPPER, i)) for i in range(100)]
            returns = np.array([t.rewards.sum() for t in played])
            lengths = np.array([len(t.rewards) for t in played])
            score = returns.mean(), returns.std(ddof=1) / 10
            line = x, *score, np.mean(lengths == 1000), np.median(lengths)
            table.writerow([round(float(value), 3) for value in line])
