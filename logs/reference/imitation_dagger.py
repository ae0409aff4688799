"""A baseline: DAgger of the `imitation` library 1.0.1, on the same expert and test terrains.

It needs older packages than the project, so give it an environment of its own (Python 3.11):
    python3 -m venv imitation-venv
    imitation-venv/bin/pip install imitation==1.0.1 stable-baselines3==2.2.1 \\
        gymnasium==0.29.1 Box2D==2.3.10 torch==2.13.0 numpy==1.26.4 datasets==3.6.0 \\
        pyarrow==19.0.1 "setuptools<80"
    imitation-venv/bin/python -W ignore logs/reference/imitation_dagger.py --seed 0

Writes config.json, train.csv, policy.pt and test.csv to logs/reference/imitation_dagger_sSEED.
"""

import argparse
import csv
import io
import itertools
import json
import tempfile
import time
import zipfile
from importlib.metadata import version
from pathlib import Path

import datasets
import gymnasium as gym
import numpy as np
import torch
from imitation.algorithms.bc import BC
from imitation.algorithms.dagger import LinearBetaSchedule, SimpleDAggerTrainer
from imitation.policies.base import NormalizeFeaturesExtractor
from imitation.util import logger
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.sac.policies import SACPolicy

ENV, HERE = "BipedalWalkerHardcore-v3", Path(__file__).resolve().parent
PACKAGES = "imitation stable-baselines3 gymnasium box2d torch numpy pyarrow datasets".split()
OPTIONS = dict(
    seed=0, steps=150_000, units=128, expert=f"rl-trained-agents/sac/{ENV}_1/{ENV}.zip",
    out="", stream=15, test_episodes=500,  # folder of the run; terrains of the test
    round_steps=10_000, n_batches=147, batch_size=1024,  # of a round; every batch is an update
    beta_rounds=4, ent_weight=0.0, l2_weight=0.0, log_std_init=-1.0,  # rounds until beta is 0
    lr=1e-2,  # Adam's step size; falls linearly to 0 in every round, as the default's does
)  # fmt: skip


def load_expert(path, spaces):
    """The SAC policy in the zip, without unpickling anything but tensors."""
    expert = SACPolicy(**spaces, lr_schedule=lambda _: 0.0, net_arch=[256, 256])
    weights = io.BytesIO(zipfile.ZipFile(path).read("policy.pth"))
    expert.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    return expert


def test(policy, stream, indices):
    """{i: [return, length]} of deterministic episodes, each in an environment of its own."""
    envs, obs, totals = {i: gym.make(ENV) for i in indices}, {}, {i: [0.0, 0] for i in indices}
    for i in indices:
        obs[i], _ = envs[i].reset(seed=int(np.random.default_rng((stream, i)).integers(2**31)))
    while obs:
        actions, _ = policy.predict(np.stack(list(obs.values())), deterministic=True)
        for i, action in zip(list(obs), actions):
            obs[i], reward, terminated, truncated, _ = envs[i].step(action)
            totals[i] = [totals[i][0] + float(reward), totals[i][1] + 1]
            if terminated or truncated:
                del obs[i], envs[i]
    return totals


def train(c, file, folder):
    """The trained learner; `file` gets a row a round and `folder` the demonstrations."""
    torch.manual_seed(c.seed)
    rng, start = np.random.default_rng(c.seed), time.perf_counter()
    # One alone: of several, those done with a round are stepped on, uncounted, until the last is.
    env = gym.wrappers.RecordEpisodeStatistics(gym.make(ENV), deque_size=c.steps)
    (venv := DummyVecEnv([lambda: env])).seed(c.seed)
    spaces = dict(observation_space=venv.observation_space, action_space=venv.action_space)
    policy = ActorCriticPolicy(
        **spaces, lr_schedule=lambda _: 0.0, net_arch=dict(pi=[c.units, c.units], vf=[]),
        features_extractor_class=NormalizeFeaturesExtractor,  # standardises by round 0's states
        activation_fn=torch.nn.GELU, log_std_init=c.log_std_init,
    )  # fmt: skip
    quiet = dict(custom_logger=logger.configure(folder, format_strs=[]))
    bc = BC(**spaces, rng=rng, policy=policy, batch_size=c.batch_size, device="cpu", **quiet,
            ent_weight=c.ent_weight, l2_weight=c.l2_weight,
            optimizer_kwargs=dict(lr=c.lr))  # fmt: skip
    trainer = SimpleDAggerTrainer(
        venv=venv, scratch_dir=folder, expert_policy=load_expert(c.expert, spaces), rng=rng,
        beta_schedule=LinearBetaSchedule(c.beta_rounds), bc_trainer=bc, **quiet,
    )  # fmt: skip
    done = itertools.count(1)

    def fall():
        bc.optimizer.param_groups[0]["lr"] = c.lr * (1 - next(done) % c.n_batches / c.n_batches)

    # No rollouts for the log: those are 5 uncounted episodes every 500 batches.
    updates = dict(n_batches=c.n_batches, log_rollouts_venv=None, progress_bar=False)
    updates |= dict(on_batch_end=fall)
    rounds, n_rounds, steps = csv.writer(file), max(1, round(c.steps / c.round_steps)), 0
    rounds.writerow(["round", "env_steps", "seconds", "roll_in_return"])
    for k in range(n_rounds):
        episodes = len(env.return_queue)
        size = dict(rollout_round_min_timesteps=round(c.steps * (k + 1) / n_rounds) - steps)
        trainer.train(1, **size, rollout_round_min_episodes=1, bc_train_kwargs=updates)  # one round
        steps, returns = int(np.sum(env.length_queue)), list(env.return_queue)[episodes:]
        rounds.writerow([k, steps, round(time.perf_counter() - start, 1), np.mean(returns)])
    return policy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    c = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    (out := Path(c.out or HERE / f"imitation_dagger_s{c.seed}")).mkdir(parents=True, exist_ok=True)
    settings = vars(c) | dict(versions={name: version(name) for name in PACKAGES})
    (out / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as folder, open(out / "train.csv", "w", 1) as file:
        torch.save((policy := train(c, file, folder)).state_dict(), out / "policy.pt")
    with open(out / "test.csv", "w") as file:
        csv.writer(file).writerow(["policy", "episode", "return", "length"])
        for i in range(0, c.test_episodes, 25):
            totals = test(policy, c.stream, range(c.test_episodes)[i : i + 25])
            csv.writer(file).writerows(["last", i, *total] for i, total in totals.items())
