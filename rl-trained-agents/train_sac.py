"""Train a SAC expert with Stable-Baselines3, from nothing, in one stretch on one core.

    python rl-trained-agents/train_sac.py                       BipedalWalkerHardcore-v3, 2 to 3 h
    python rl-trained-agents/train_sac.py --resume              go on where it was stopped
    python rl-trained-agents/train_sac.py --env_name Pendulum-v1

SAC itself is Stable-Baselines3's.  Three things are added, without which the course is not solved:
a fall pays -10 instead of -100; part of every batch is drawn from the steps that led to a fall
(`FailureReplayBuffer`); and every checkpoint holds the mean of the weights since the one before
(`Checkpoints`), so that `publish.py` can average any span of the run into one agent.

The run folder (`--run_dir`, by default `rl-trained-agents/runs/{env}_s{seed}`) collects
`evaluations.csv`, TensorBoard events, `checkpoints/` and the resume point.  Scores are always the
untouched environment's own returns.
"""

import argparse
import csv
import io
import json
import os
import pickle
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBufferSamples
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
FALL = -100.0  # what BipedalWalker pays for a fall, and for nothing else
EVALUATION_SEED = 10_000  # the terrains of the evaluations while training


@dataclass(frozen=True)
class Settings:
    """How one environment's expert is trained; what is not here is SB3's default."""

    updates: int  # gradient steps in all
    n_envs: int  # environments side by side
    gradient_steps: int  # updates per step of all environments
    net_arch: tuple[int, ...] = (256, 256)
    learning_rate: float = 3e-4
    batch_size: int = 128
    n_steps: int = 3  # of the n-step returns
    buffer_size: int = 1_000_000  # transitions
    learning_starts: int = 10_000  # steps of random actions
    fall_reward: float = -10.0  # paid for a fall; -100 teaches to stand still, 0 to be careless
    failure_share: float = 0.4  # of each batch, drawn from the steps before falls
    failure_window: int = 120  # steps before a fall that count
    checkpoint_every: int = 25_000  # updates


SETTINGS = {
    "BipedalWalkerHardcore-v3": Settings(updates=700_000, n_envs=32, gradient_steps=4),
    "BipedalWalker-v3": Settings(
        updates=60_000, n_envs=8, gradient_steps=2, net_arch=(128, 128), learning_rate=5e-4,
        buffer_size=300_000, learning_starts=5_000, checkpoint_every=5_000,
    ),
    "Pendulum-v1": Settings(
        updates=10_000, n_envs=1, gradient_steps=1, net_arch=(64, 64), learning_rate=1e-3,
        buffer_size=20_000, learning_starts=500, n_steps=1, checkpoint_every=1_000,
    ),
}  # fmt: skip


class FallReward(gym.Wrapper):
    """Pays `fall_reward` where the environment pays -100, and says so in the info as `fell`."""

    def __init__(self, env: gym.Env, fall_reward: float):
        super().__init__(env)
        self.fall_reward = fall_reward

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        if terminated and reward == FALL:
            reward, info = self.fall_reward, info | {"fell": True}
        return obs, reward, terminated, truncated, info


class FailureReplayBuffer(NStepReplayBuffer):
    """SB3's n-step buffer, but a share of each batch is drawn from the steps before falls.

    Uniform draws hardly ever show the rare falls that are left to learn from.  A step counts if it
    is one of the last `failure_window` of an episode that ended in a fall; all that count are
    equally likely.  Until there is a fall, every draw is uniform.
    """

    def __init__(self, *args, failure_share: float, failure_window: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.failure_share, self.failure_window = failure_share, failure_window
        self.added = 0  # rows ever written; row r lies at r % buffer_size
        self.age = np.zeros(self.n_envs, dtype=int)  # steps of each running episode
        self.falls = np.empty((0, 3), dtype=int)  # (row of the fall, environment, steps that count)

    def add(self, obs, next_obs, action, reward, done, infos) -> None:
        super().add(obs, next_obs, action, reward, done, infos)
        self.age += 1
        fell = np.flatnonzero([info.get("fell", False) for info in infos])
        new = np.stack(
            [np.full_like(fell, self.added), fell, self.age[fell].clip(max=self.failure_window)], 1
        )
        self.added += 1
        self.age[done.astype(bool)] = 0
        first_row = self.falls[:, 0] - self.falls[:, 2] + 1
        kept = self.falls[first_row >= self.added - self.buffer_size]  # not yet overwritten
        self.falls = np.concatenate([kept, new])

    def cut_episodes(self) -> None:
        """End the running episodes at the newest row, as a time limit does (for a resume)."""
        self.timeouts[self.pos - 1] = self.dones[self.pos - 1] = 1.0
        self.age[:] = 0

    def sample(self, batch_size: int, env=None) -> ReplayBufferSamples:
        n_failures = round(self.failure_share * batch_size) if len(self.falls) else 0
        n_uniform = batch_size - n_failures
        rows = np.random.randint(self.size(), size=n_uniform)
        columns = np.random.randint(self.n_envs, size=n_uniform)
        if n_failures:
            ends = self.falls[:, 2].cumsum()
            draw = np.random.randint(ends[-1], size=n_failures)
            fall = np.searchsorted(ends, draw, side="right")
            before = ends[fall] - 1 - draw  # 0 is the fall itself
            rows = np.concatenate([rows, (self.falls[fall, 0] - before) % self.buffer_size])
            columns = np.concatenate([columns, self.falls[fall, 1]])
        return self.gather(rows, columns)

    def gather(self, rows, columns) -> ReplayBufferSamples:
        """n-step transitions from these places; `_get_samples` can't be told the environments."""
        steps = (rows[:, None] + np.arange(self.n_steps)) % self.buffer_size  # (B, n)
        c = columns[:, None]
        # nothing follows an episode's end, nor the newest row
        last = (self.dones[steps, c] > 0) | (steps == (self.pos - 1) % self.buffer_size)
        alive = np.cumsum(last, axis=1) - last == 0  # (B, n): up to the end, inclusive
        discounts = self.gamma ** np.arange(self.n_steps)
        returns = (self.rewards[steps, c] * discounts * alive).sum(axis=1)
        length = alive.sum(axis=1)
        end = steps[np.arange(len(rows)), length - 1], columns
        terminated = self.dones[end] * (1 - self.timeouts[end])
        arrays = (
            self.observations[rows, columns], self.actions[rows, columns],
            self.next_observations[end], terminated[:, None], returns[:, None],
            self.gamma ** length[:, None],
        )  # fmt: skip
        return ReplayBufferSamples(*(self.to_torch(x.astype(np.float32)) for x in arrays))


class Checkpoints(BaseCallback):
    """Every `checkpoint_every` updates: mean weights, last weights, an evaluation, a resume point.

    The mean runs over all updates since the checkpoint before, for the actor and the critics alike,
    so that Q* belongs to the averaged actor.
    """

    def __init__(self, env_name: str, settings: Settings, run_dir: Path, rows: list[dict]):
        super().__init__()
        self.settings, self.run_dir, self.rows = settings, run_dir, rows
        self.env = make_vec_env(env_name, n_envs=16)
        self.sums, self.n_sums = None, 0

    def _on_training_start(self) -> None:
        self.started = time.monotonic() - (60 * self.rows[-1]["minutes"] if self.rows else 0)
        done, total = self.model._n_updates, self.settings.updates
        self.bar = tqdm(initial=done, total=total, unit=" updates", mininterval=1, smoothing=0.01)

    def _on_step(self) -> bool:
        """Called before each round of updates; the weights are those after the round before."""
        updates = self.model._n_updates
        if updates == self.bar.n:  # nothing was updated yet
            return True
        self.bar.update(updates - self.bar.n)
        weights = [w.double() for w in self.model.policy.state_dict().values()]
        if self.sums is None:
            self.sums = [torch.zeros_like(w) for w in weights]
        torch._foreach_add_(self.sums, weights)
        self.n_sums += 1
        if updates % self.settings.checkpoint_every == 0:
            self.checkpoint()
        return updates < self.settings.updates

    def checkpoint(self) -> None:
        """Write `checkpoints/{updates}.pt` and evaluations.csv anew, then the resume point."""
        policy, updates = self.model.policy, self.model._n_updates
        last = {k: v.clone() for k, v in policy.state_dict().items()}
        average = {k: (x / self.n_sums).float() for k, x in zip(last, self.sums)}
        self.sums, self.n_sums = None, 0
        policy.load_state_dict(average)
        self.env.seed(EVALUATION_SEED)  # the same terrains at every evaluation
        returns, _ = evaluate_policy(policy, self.env, 32, return_episode_rewards=True)
        policy.load_state_dict(last)
        row = dict(
            updates=updates,
            env_steps=self.num_timesteps,
            minutes=round((time.monotonic() - self.started) / 60, 2),
            sampled_return=round(float(np.mean([e["r"] for e in self.model.ep_info_buffer])), 2),
            average_return=round(float(np.mean(returns)), 2),
            standard_error=round(float(np.std(returns, ddof=1)) / len(returns) ** 0.5, 2),
        )
        self.rows.append(row)
        self.bar.set_postfix_str(f"return {row['average_return']:.0f}")
        torch.save(row | dict(last=last, average=average), self.run_dir / f"{updates:07d}.pt")
        with open(self.run_dir / "evaluations.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerows(self.rows)
        model = io.BytesIO()
        self.model.save(model)
        state = dict(model=model.getvalue(), buffer=self.model.replay_buffer, rows=self.rows)
        with open(self.run_dir / "resume.new", "wb") as file:
            pickle.dump(state, file)
        os.replace(self.run_dir / "resume.new", self.run_dir / "resume.pkl")  # all or nothing


def build(env_name: str, settings: Settings, seed: int) -> SAC:
    """A fresh agent on its environments."""
    env = make_vec_env(
        env_name,
        n_envs=settings.n_envs,
        seed=seed,
        wrapper_class=FallReward,  # outside the Monitor, which so records true returns
        wrapper_kwargs=dict(fall_reward=settings.fall_reward),
        env_kwargs=dict(disable_env_checker=True),
    )
    return SAC(
        "MlpPolicy",
        env,
        learning_rate=settings.learning_rate,
        buffer_size=settings.buffer_size,
        learning_starts=settings.learning_starts,
        batch_size=settings.batch_size,
        gradient_steps=settings.gradient_steps,
        replay_buffer_class=FailureReplayBuffer,
        replay_buffer_kwargs=dict(
            n_steps=settings.n_steps,
            failure_share=settings.failure_share,
            failure_window=settings.failure_window,
        ),
        policy_kwargs=dict(
            net_arch=list(settings.net_arch), optimizer_kwargs=dict(fused=True)
        ),
        seed=seed,
        device="cpu",
    )


def train(env_name: str, settings: Settings, seed: int, run_dir: Path, resume: bool) -> None:
    """Train to the end; `resume` goes on from the last checkpoint, with new episodes."""
    model, rows = build(env_name, settings, seed), []
    if resume:
        with open(run_dir / "resume.pkl", "rb") as file:
            state = pickle.load(file)
        env, rows = model.get_env(), state["rows"]
        model = SAC.load(io.BytesIO(state["model"]), env=env, device="cpu")
        model.replay_buffer = state["buffer"]
        model.replay_buffer.cut_episodes()
    model.set_logger(configure(str(run_dir), ["tensorboard"]))
    callback = Checkpoints(env_name, settings, run_dir, rows)
    model.learn(10**12, callback=callback, log_interval=100, reset_num_timesteps=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--env_name", choices=SETTINGS, default="BipedalWalkerHardcore-v3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run_dir", type=Path, help="where the run's files go")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    for f in fields(Settings):
        if f.name != "net_arch":
            parser.add_argument(f"--{f.name}", type=f.type, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    given = {f.name: getattr(args, f.name, None) for f in fields(Settings)}
    settings = replace(SETTINGS[args.env_name], **{k: v for k, v in given.items() if v is not None})
    run_dir = args.run_dir or HERE / "runs" / f"{args.env_name}_s{args.seed}"
    run_dir.mkdir(parents=True, exist_ok=args.resume)
    (run_dir / "settings.json").write_text(json.dumps(asdict(settings), indent=1))
    train(args.env_name, settings, args.seed, run_dir, args.resume)


if __name__ == "__main__":
    main()
