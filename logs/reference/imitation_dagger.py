"""A baseline: DAgger of the `imitation` library 1.0.1 on the same expert, budget and test terrains.

It needs older packages than the project, so give it an environment of its own (Python 3.11):

    python3 -m venv /opt/imitation-venv
    /opt/imitation-venv/bin/pip install imitation==1.0.1 stable-baselines3==2.2.1 \\
        gymnasium==0.29.1 Box2D==2.3.10 torch==2.13.0 "numpy<2" "pyarrow<20" "setuptools<80"
    /opt/imitation-venv/bin/python logs/reference/imitation_dagger.py --seed 0

A run writes config.json, train.csv, policy.pt and, as study.py does, test.csv to
logs/reference/imitation_dagger_sSEED.
"""

import argparse
import csv
import io
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
from imitation.util import logger as imitation_logger
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.sac.policies import SACPolicy

ENV, HERE = "BipedalWalkerHardcore-v3", Path(__file__).resolve().parent
PACKAGES = "imitation stable-baselines3 gymnasium box2d torch numpy pyarrow datasets".split()


def parse():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, default=150_000, help="of the environment, in all")
    p.add_argument("--expert", default=HERE.parents[1] / f"rl-trained-agents/sac/{ENV}_1/{ENV}.zip")
    p.add_argument("--out", help="folder of the run")
    p.add_argument("--stream", type=int, default=8, help="of test terrains")
    p.add_argument("--test_episodes", type=int, default=500)
    p.add_argument("--round_steps", type=int, default=10_000, help="a round's, at least")
    p.add_argument("--beta_rounds", type=int, default=4, help="until the expert never acts")
    p.add_argument("--n_batches", type=int, default=200, help="Adam steps a round")
    p.add_argument("--batch_size", type=int, default=512)
    p.add_argument("--lr", type=float, default=8e-3, help="at first; linear in the steps to ...")
    p.add_argument("--final_lr", type=float, default=1e-4)
    p.add_argument("--ent_weight", type=float, default=0.0)
    p.add_argument("--l2_weight", type=float, default=0.0)
    p.add_argument("--log_std_init", type=float, default=-1.0)
    return p.parse_args()


def load_expert(path, venv):
    """The SAC policy in the zip, without unpickling anything but tensors."""
    spaces = venv.observation_space, venv.action_space
    expert = SACPolicy(*spaces, lr_schedule=lambda _: 0.0, net_arch=[256, 256])
    weights = io.BytesIO(zipfile.ZipFile(path).read("policy.pth"))
    expert.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return expert


def test(policy, stream, indices):
    """Return and length of deterministic episodes, each in an environment of its own."""
    envs, totals = {i: gym.make(ENV) for i in indices}, {i: [0.0, 0] for i in indices}
    seed = {i: int(np.random.default_rng((stream, i)).integers(2**31)) for i in indices}
    obs = {i: env.reset(seed=seed[i])[0] for i, env in envs.items()}
    while obs:
        actions, _ = policy.predict(np.stack(list(obs.values())), deterministic=True)
        for i, action in zip(list(obs), actions):
            obs[i], reward, terminated, truncated, _ = envs[i].step(action)
            totals[i][0], totals[i][1] = totals[i][0] + float(reward), totals[i][1] + 1
            if terminated or truncated:
                envs[i].close()
                del obs[i]
    return totals


def main():
    c = parse()
    out = Path(c.out or HERE / f"imitation_dagger_s{c.seed}")
    out.mkdir(parents=True, exist_ok=True)
    settings = vars(c) | {"versions": {name: version(name) for name in PACKAGES}}
    (out / "config.json").write_text(json.dumps(settings, indent=1, default=str) + "\n")
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    torch.manual_seed(c.seed)
    rng, start = np.random.default_rng(c.seed), time.perf_counter()

    # A single environment: of several, imitation goes on to step, but does not count, those that
    # are through with a round while the others finish theirs.
    env = gym.wrappers.RecordEpisodeStatistics(gym.make(ENV), deque_size=c.steps)
    venv = DummyVecEnv([lambda: env])
    venv.seed(c.seed)
    spaces = dict(observation_space=venv.observation_space, action_space=venv.action_space)
    policy = ActorCriticPolicy(
        **spaces, lr_schedule=lambda _: 0.0, net_arch=dict(pi=[128, 128], vf=[]),
        activation_fn=torch.nn.ReLU, log_std_init=c.log_std_init,
        features_extractor_class=NormalizeFeaturesExtractor,  # by round 0's states: see BC.train
    )  # fmt: skip
    quiet = imitation_logger.configure(tempfile.mkdtemp(), format_strs=[])
    bc = BC(
        **spaces, rng=rng, policy=policy, batch_size=c.batch_size, ent_weight=c.ent_weight,
        l2_weight=c.l2_weight, optimizer_kwargs=dict(lr=c.lr), device="cpu", custom_logger=quiet,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as demonstrations, open(out / "train.csv", "w") as file:
        trainer = SimpleDAggerTrainer(
            venv=venv, scratch_dir=demonstrations, expert_policy=load_expert(c.expert, venv),
            rng=rng, beta_schedule=LinearBetaSchedule(c.beta_rounds), bc_trainer=bc,
            custom_logger=quiet,
        )  # fmt: skip
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["round", "env_steps", "seconds", "roll_in_return"])
        n_rounds, steps, episodes = max(1, round(c.steps / c.round_steps)), 0, 0
        for k in range(n_rounds):
            share = k / max(1, n_rounds - 1)
            bc.optimizer.param_groups[0]["lr"] = c.lr + (c.final_lr - c.lr) * share
            trainer.train(
                1,  # that is, a single round
                rollout_round_min_timesteps=round(c.steps * (k + 1) / n_rounds) - steps,
                rollout_round_min_episodes=1,
                # Its default plays 5 more episodes, uncounted, every 500 batches to log returns.
                bc_train_kwargs=dict(n_batches=c.n_batches, log_rollouts_venv=None,
                                     progress_bar=False),
            )  # fmt: skip
            steps = int(np.sum(env.length_queue))
            seconds, new = time.perf_counter() - start, list(env.return_queue)[episodes:]
            rows.writerow([k, steps, f"{seconds:.1f}", float(np.mean(new))])
            file.flush()
            episodes = len(env.return_queue)
    torch.save(policy.state_dict(), out / "policy.pt")

    with open(out / "test.csv", "w") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["policy", "episode", "return", "length"])
        for i in range(0, c.test_episodes, 25):
            totals = test(policy, c.stream, range(i, min(i + 25, c.test_episodes)))
            rows.writerows(["last", i, *total] for i, total in totals.items())


if __name__ == "__main__":
    main()
