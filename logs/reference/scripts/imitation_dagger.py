"""A baseline: DAgger of the `imitation` library 1.0.1, on the same expert and test terrains.

It needs older packages than the project, so give it an environment of its own (Python 3.11):
    python3 -m venv imitation-venv
    imitation-venv/bin/pip install imitation==1.0.1 stable-baselines3==2.2.1 \\
        gymnasium==0.29.1 Box2D==2.3.10 torch==2.13.0 numpy==1.26.4 datasets==3.6.0 \\
        pyarrow==19.0.1 "setuptools<80"
    imitation-venv/bin/python -W ignore logs/reference/scripts/imitation_dagger.py

It runs the seeds of its row that have no scores.  Network, minibatches, draws and falling step size
are those of the default.
"""

import itertools
import math
import tempfile
import time

from common import HARDCORE, ag, merge, missing, score
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

ROW, DEFAULT = "imitation_dagger", ag.Config(n_workers=1)
ROUNDS, UNITS, LR = DEFAULT.max_iteration, DEFAULT.hidden_dim, DEFAULT.lr
BATCH, BATCHES = DEFAULT.batch_sz, math.ceil(DEFAULT.update_sz / DEFAULT.batch_sz)  # of a round
STEPS = 10_000 * ROUNDS


class Player:
    """The library's policy, as `aggrevated.play_episode` plays a learner."""

    def __init__(self, policy):
        self.policy = policy

    def act(self, state, noise):
        return self.policy.predict(state, deterministic=True)[0]


def train(seed: int, folder: str) -> tuple[Player, list[tuple]]:
    """The trained learner, and a line of evaluations.csv for the roll-ins of each round."""
    agent = ag.AggreVateDAgent(DEFAULT)  # it knows where the expert is
    torch.manual_seed(seed)
    rng, started = np.random.default_rng(seed), time.perf_counter()
    # One alone: of several, those done with a round are stepped on, uncounted, until the last is.
    env = gym.wrappers.RecordEpisodeStatistics(gym.make(HARDCORE), deque_size=STEPS)
    (venv := DummyVecEnv([lambda: env])).seed(seed)
    spaces = dict(observation_space=venv.observation_space, action_space=venv.action_space)
    expert = SACPolicy(**spaces, lr_schedule=lambda _: 0.0, net_arch=[256, 256])
    expert.load_state_dict(ag.read_sac_zip(agent.expert.path)[0])
    policy = ActorCriticPolicy(
        **spaces, lr_schedule=lambda _: 0.0, net_arch=dict(pi=[UNITS, UNITS], vf=[]),
        features_extractor_class=NormalizeFeaturesExtractor,  # standardises by round 0's states
        activation_fn=torch.nn.GELU, log_std_init=-1.0,
    )  # fmt: skip
    quiet = dict(custom_logger=logger.configure(folder, format_strs=[]))
    bc = BC(**spaces, rng=rng, policy=policy, batch_size=BATCH, device="cpu", ent_weight=0.0,
            l2_weight=0.0, optimizer_kwargs=dict(lr=LR), **quiet)  # fmt: skip
    trainer = SimpleDAggerTrainer(
        venv=venv, scratch_dir=folder, expert_policy=expert, rng=rng, bc_trainer=bc,
        beta_schedule=LinearBetaSchedule(DEFAULT.alpha_decay_iterations), **quiet,
    )  # fmt: skip
    done = itertools.count(1)

    def fall():  # linearly over the rounds, and to 0 in every one
        rounds, batches = divmod(next(done), BATCHES)
        bc.optimizer.param_groups[0]["lr"] = LR * (1 - rounds / ROUNDS) * (1 - batches / BATCHES)

    # No rollouts for the log: those are 5 uncounted episodes every 500 batches.
    updates = dict(n_batches=BATCHES, log_rollouts_venv=None, progress_bar=False, on_batch_end=fall)
    steps, lines = 0, []
    for k in range(ROUNDS):
        episodes = len(env.return_queue)
        size = dict(rollout_round_min_timesteps=STEPS * (k + 1) // ROUNDS - steps)
        trainer.train(1, **size, rollout_round_min_episodes=1, bc_train_kwargs=updates)  # one round
        steps, seconds = int(np.sum(env.length_queue)), round(time.perf_counter() - started, 1)
        mean = round(float(np.mean(list(env.return_queue)[episodes:])), 3)
        lines.append((ROW, seed, k + 1, steps, seconds, "roll_in", "", mean))
    return Player(policy), lines


if __name__ == "__main__":
    datasets.disable_progress_bars()
    for seed, terrains in missing(ROW):
        with tempfile.TemporaryDirectory() as folder:
            player, lines = train(seed, folder)
        merge("evaluations", lines)
        score(ROW, seed, terrains, {"last": player})
