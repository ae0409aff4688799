"""Train a SAC expert with Stable-Baselines3, from nothing, in one stretch on one core.

    python rl-trained-agents/train_sac.py     2.5 hours; with --resume, on from where it stopped

SAC itself is SB3's.  Added: a share of each batch is drawn from before falls; falls and torque are
priced in stages; late, terrains with falls come again; checkpoints hold mean weights, to average.
"""

import argparse
import copy
import csv
import io
import json
import os
import pickle
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from unittest import mock

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

FALL, TORQUE = -100.0, 0.028  # BipedalWalker's pay for a fall, and price of a step's full torque
COLUMNS = "updates env_steps minutes sampled_return average_return standard_error".split()


@dataclass
class Settings:
    """What the recipe decides, each an option; all else is SB3's default (gamma 0.99)."""

    updates: int = 600_000  # gradient steps in all
    n_envs: int = 32  # side by side ...
    gradient_steps: int = 4  # ... and updates per step of them all
    units: int = 256  # in each of two hidden layers
    learning_rate: float = 3e-4
    batch_size: int = 128
    n_steps: int = 3  # of the n-step returns
    buffer_size: int = 1_000_000  # transitions
    learning_starts: int = 10_000  # environment steps of random actions
    fall_reward: float = -10.0  # paid for a fall; with -100 it long learns to stand still
    torque_updates: int = 300_000  # it crosses the course; from then on ...
    torque_cost: float = 4.0  # ... torque costs so many times what the environment charges
    late_updates: int = 450_000  # it seldom falls; from then on ...
    late_fall_reward: float = -40.0  # ... what a fall pays ...
    late_retries: int = 3  # ... and how often a terrain is tried again after a fall
    failure_share: float = 0.4  # of each batch, drawn from the steps before falls
    failure_window: int = 120  # steps before a fall that count
    checkpoint_every: int = 25_000  # updates

    def stage(self, updates: int) -> tuple[float, float, int]:
        """What a fall pays, times what torque costs, and retries, after so many updates."""
        torque = self.torque_cost if updates >= self.torque_updates else 1.0
        late = self.late_fall_reward, torque, self.late_retries
        return late if updates >= self.late_updates else (self.fall_reward, torque, 0)


class Retry(gym.Wrapper):
    """Plays a terrain again `retries` times after a fall, between as many fresh terrains."""

    retries, failed = 0, []

    def reset(self, *, seed=None, options=None):
        self.rng = np.random.default_rng(seed) if seed is not None else self.rng
        again = self.failed and self.rng.random() < 0.5
        self.terrain = self.failed.pop(0) if again else int(self.rng.integers(2**31))
        return self.env.reset(seed=self.terrain, options=options)

    def step(self, action):
        result = self.env.step(action)
        if result[1] == FALL:
            self.failed = (self.failed + [self.terrain] * self.retries)[-50:]
        return result


def reprice(rewards, actions, fell, fall_reward: float | None, torque_cost=1.0) -> np.ndarray:
    """What critics learn instead of rewards (...), for actions (..., A); `fell` (...) is a mask.

    Without a `fall_reward` a fall pays what it pays.
    """
    rewards = rewards - (torque_cost - 1) * TORQUE * np.abs(actions).sum(axis=-1)
    fall_reward = rewards if fall_reward is None else fall_reward
    return np.where(fell, fall_reward, rewards).astype(np.float32)


class FailureReplayBuffer(NStepReplayBuffer):
    """SB3's n-step buffer, repriced; a share of each batch is drawn from the steps before falls:
    equally likely are the last `failure_window` of all episodes that ended in one."""

    def __init__(self, *args, failure_share: float, failure_window: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.failure_share, self.failure_window = failure_share, failure_window
        self.unpriced, self.prices = np.zeros_like(self.rewards), (FALL, 1.0)
        self.added = 0  # rows ever written; row r lies at r % buffer_size
        self.age = np.zeros(self.n_envs, dtype=int)  # steps of each running episode
        self.falls = np.empty((0, 3), dtype=int)  # (row of the fall, environment, steps that count)

    def add(self, obs, next_obs, action, reward, done, infos) -> None:
        self.unpriced[row := self.pos] = reward
        super().add(obs, next_obs, action, reward, done, infos)
        self.age += 1
        fell = np.flatnonzero(self.price(row))
        count = self.age[fell].clip(max=self.failure_window)
        new = np.stack([np.full_like(fell, self.added), fell, count], axis=1)
        self.added += 1
        self.age[done.astype(bool)] = 0
        first_row = self.falls[:, 0] - self.falls[:, 2] + 1
        kept = self.falls[first_row >= self.added - self.buffer_size]  # not yet overwritten
        self.falls = np.concatenate([kept, new])

    def price(self, rows=slice(None)) -> np.ndarray:
        """Put `prices`, (fall_reward, torque_cost), on these rows; where they are falls."""
        fell = (self.unpriced[rows] == FALL) & (self.dones[rows] > self.timeouts[rows])
        self.rewards[rows] = reprice(self.unpriced[rows], self.actions[rows], fell, *self.prices)
        return fell

    def cut_episodes(self) -> None:
        """End the running episodes at the newest row, as a time limit does (for a resume)."""
        dones, timeouts = self.dones[self.pos - 1], self.timeouts[self.pos - 1]
        timeouts[dones == 0] = 1.0
        dones[:], self.age[:] = 1.0, 0

    def sample(self, batch_size: int, env=None):
        rows, columns = np.random.randint([[self.size()], [self.n_envs]], size=(2, batch_size))
        if len(self.falls):
            n, ends = round(self.failure_share * batch_size), self.falls[:, 2].cumsum()
            draw = np.random.randint(ends[-1], size=n)
            fall = np.searchsorted(ends, draw, side="right")
            before = ends[fall] - 1 - draw  # 0 is the fall itself
            rows[batch_size - n :] = (self.falls[fall, 0] - before) % self.buffer_size
            columns[batch_size - n :] = self.falls[fall, 1]
        return self.gather(rows, columns)

    def gather(self, rows, columns):
        with mock.patch("numpy.random.randint", return_value=columns):  # SB3 draws these anew
            return self._get_samples(rows)


class Checkpoints(BaseCallback):
    """Every `checkpoint_every` updates: mean and last weights, an evaluation, a resume point."""

    def __init__(self, env_name: str, settings: Settings, run_dir: Path, rows: list[dict]):
        super().__init__()
        self.settings, self.run_dir, self.rows, self.stage = settings, run_dir, rows, None
        self.env, self.sums, self.n_sums = make_vec_env(env_name, n_envs=16), 0, 0

    def _on_training_start(self) -> None:
        self.started = time.monotonic() - (60 * self.rows[-1]["minutes"] if self.rows else 0)
        self.bar = tqdm(initial=self.model._n_updates, total=self.settings.updates, unit=" updates")

    def _on_step(self) -> bool:
        """Called before each round of updates; the weights are those after the round before."""
        s, updates, buffer = self.settings, self.model._n_updates, self.model.replay_buffer
        if self.stage != (stage := s.stage(updates)):  # at the start and at a switch
            self.stage, buffer.prices = stage, stage[:2]
            buffer.price()
            self.training_env.set_attr("retries", stage[2])
        if updates == self.bar.n:  # nothing was updated yet
            return True
        self.bar.update(updates - self.bar.n)
        weights = parameters_to_vector(self.model.policy.parameters()).detach().double()
        self.sums, self.n_sums = self.sums + weights, self.n_sums + 1
        if updates % s.checkpoint_every == 0:
            self.checkpoint()
        return updates < s.updates

    def checkpoint(self) -> None:
        """Write {updates}.pt, then evaluations.csv anew, then the resume point."""
        policy, updates = self.model.policy, self.model._n_updates
        last = copy.deepcopy(policy.state_dict())
        vector_to_parameters((self.sums / self.n_sums).float(), policy.parameters())
        average, self.sums, self.n_sums = copy.deepcopy(policy.state_dict()), 0, 0
        self.env.seed(10_000)  # the same terrains at every evaluation
        returns, _ = evaluate_policy(policy, self.env, 32, return_episode_rewards=True)
        policy.load_state_dict(last)
        sampled = np.mean([e["r"] for e in self.model.ep_info_buffer])
        minutes, error = (time.monotonic() - self.started) / 60, np.std(returns, ddof=1) / 32**0.5
        values = updates, self.num_timesteps, minutes, sampled, np.mean(returns), error
        self.rows.append(row := {k: round(float(v), 2) for k, v in zip(COLUMNS, values)})
        torch.save(row | dict(last=last, average=average), self.run_dir / f"{updates:07d}.pt")
        with open(self.run_dir / "evaluations.csv", "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *(row.values() for row in self.rows)])
        self.model.save(model := io.BytesIO())
        state = dict(model=model.getvalue(), buffer=self.model.replay_buffer, rows=self.rows)
        (self.run_dir / "resume.new").write_bytes(pickle.dumps(state))
        os.replace(self.run_dir / "resume.new", self.run_dir / "resume.pkl")  # all or nothing


def build(env_name: str, s: Settings, seed: int) -> SAC:
    """A fresh agent on its environments."""
    buffer = {k: getattr(s, k) for k in ("n_steps", "failure_share", "failure_window")}
    return SAC(
        "MlpPolicy", make_vec_env(env_name, s.n_envs, seed, wrapper_class=Retry), s.learning_rate,
        s.buffer_size, s.learning_starts, s.batch_size, gradient_steps=s.gradient_steps, seed=seed,
        device="cpu", replay_buffer_class=FailureReplayBuffer, replay_buffer_kwargs=buffer,
        policy_kwargs=dict(net_arch=[s.units, s.units], optimizer_kwargs=dict(fused=True)),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--env_name", default="BipedalWalkerHardcore-v3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run_dir", type=Path, help="by default runs/ENV_sSEED, beside this file")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    for f in fields(Settings):
        parser.add_argument(f"--{f.name}", type=f.type, help=f"default {f.default}")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    run_dir = args.run_dir or Path(__file__).with_name("runs") / f"{args.env_name}_s{args.seed}"
    run_dir.mkdir(parents=True, exist_ok=args.resume)
    saved = json.loads((run_dir / "settings.json").read_text()) if args.resume else {}
    given = {k: v for k, v in vars(args).items() if hasattr(Settings, k) and v is not None}
    settings, rows = Settings(**saved | given), []
    model = build(args.env_name, settings, args.seed)
    if args.resume:
        state = pickle.loads((run_dir / "resume.pkl").read_bytes())
        model = SAC.load(io.BytesIO(state["model"]), env=model.get_env(), device="cpu")
        model.set_random_seed(args.seed + model._n_updates)  # not the first terrains again
        model.replay_buffer, rows = state["buffer"], state["rows"]
        model.replay_buffer.cut_episodes()
    (run_dir / "settings.json").write_text(json.dumps(asdict(settings), indent=1))
    model.set_logger(configure(str(run_dir), ["tensorboard"]))
    callback = Checkpoints(args.env_name, settings, run_dir, rows)
    model.learn(10**12, callback=callback, log_interval=100, reset_num_timesteps=False)


if __name__ == "__main__":
    main()
