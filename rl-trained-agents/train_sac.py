"""Train a SAC expert with Stable-Baselines3 and save it in the RL Zoo's layout.

    python rl-trained-agents/train_sac.py --env_name BipedalWalkerHardcore-v3 --seed 0

The run folder (`--run_dir`, by default `rl-trained-agents/runs/{env}_s{seed}`) collects
`evaluations.npz`, TensorBoard events, numbered policy checkpoints and `resume/`, the last state
with its replay buffer; `--resume` goes on from there.  `publish.py` then chooses a checkpoint.

Training may reshape the reward of a fall (see `Phase.fall_reward`); every score, whether from an
evaluation or from the training episodes' Monitor, is the untouched environment's own return.
"""

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure

HERE = Path(__file__).resolve().parent
FALL = -100.0  # what BipedalWalker pays for a fall, and nothing else
EVAL_SEED = 10_000  # evaluations while training
SELECT_SEED = 20_000  # choosing among checkpoints; the cards' scores use yet other seeds


@dataclass(frozen=True)
class Phase:
    """A stretch of training; the defaults are SB3's."""

    until: int  # environment steps at which the phase ends, counted from the start of training
    fall_reward: float = FALL  # paid for a fall instead of -100; 0 lets the agent dare to walk
    learning_rate: float = 3e-4  # at the start of the phase ...
    final_learning_rate: float | None = None  # ... falling linearly to this at its end
    batch_size: int = 256
    gradient_steps: int = 1  # updates per step of the whole vector of environments
    target_entropy: float | None = None  # nats; None is SB3's -action_dim


@dataclass(frozen=True)
class Settings:
    """How one environment's expert is trained."""

    phases: tuple[Phase, ...]
    n_envs: int = 1
    net_arch: tuple[int, ...] = (256, 256)
    sac: dict = field(default_factory=dict)  # further arguments of SAC
    eval_every: int = 250_000  # environment steps
    eval_episodes: int = 32


HARDCORE_SAC = dict(gamma=0.99, tau=0.005, buffer_size=1_000_000, learning_starts=10_000)
SETTINGS = {
    # With the fall penalty from the start SAC learns to stand still; so it learns to walk first
    # (phase 1, a fall is just an end) and then not to fall (phase 2, the true reward).
    "BipedalWalkerHardcore-v3": Settings(
        n_envs=32,
        sac=HARDCORE_SAC | dict(n_steps=3),
        phases=(
            Phase(until=3_250_000, fall_reward=0.0, gradient_steps=2),
            Phase(until=6_000_000, learning_rate=2e-4, final_learning_rate=5e-5, gradient_steps=2),
        ),
    ),
    "BipedalWalker-v3": Settings(
        n_envs=8,
        net_arch=(128, 128),
        sac=dict(gamma=0.99, buffer_size=300_000, learning_starts=5_000, n_steps=3),
        phases=(
            Phase(until=200_000, fall_reward=0.0, learning_rate=7e-4, gradient_steps=2),
            Phase(until=350_000, learning_rate=5e-4, final_learning_rate=5e-5, gradient_steps=2),
        ),
        eval_every=50_000,
    ),
    "Pendulum-v1": Settings(
        net_arch=(64, 64),
        sac=dict(gamma=0.99, buffer_size=20_000, learning_starts=500),
        phases=(Phase(until=10_000, learning_rate=1e-3),),
        eval_every=1_000,
    ),
}


class FallReward(gym.Wrapper):
    """Pays `fall_reward` where the environment pays -100; scores are taken below this wrapper."""

    fall_reward = FALL

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        if terminated and reward == FALL:
            reward = self.fall_reward
        return obs, reward, terminated, truncated, info

    def set_fall_reward(self, value: float) -> None:
        self.fall_reward = value


class ResumePoint(BaseCallback):
    """Saves the whole state, replay buffer included, every `minutes`, each file atomically."""

    def __init__(self, folder: Path, minutes: float = 10.0):
        super().__init__()
        self.folder, self.seconds = folder, 60 * minutes
        self.saved_at = time.monotonic()

    def _on_step(self) -> bool:
        if time.monotonic() - self.saved_at > self.seconds:
            self.save()
        return True

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model.save(self.folder / "new.zip")
        self.model.save_replay_buffer(self.folder / "new.pkl")
        os.replace(self.folder / "new.pkl", self.folder / "replay_buffer.pkl")
        os.replace(self.folder / "new.zip", self.folder / "model.zip")
        self.saved_at = time.monotonic()


class Evaluation(EvalCallback):
    """EvalCallback that carries its history over a resume and prints one line per evaluation."""

    def __init__(self, env_name: str, run_dir: Path, settings: Settings):
        n_envs = min(settings.eval_episodes, 16)
        env = make_vec_env(env_name, n_envs=n_envs, env_kwargs=dict(disable_env_checker=True))
        every = max(settings.eval_every // settings.n_envs, 1)
        super().__init__(
            env,
            n_eval_episodes=settings.eval_episodes,
            eval_freq=every,
            log_path=str(run_dir),
            verbose=0,
        )
        history = run_dir / "evaluations.npz"
        if history.exists():
            old = np.load(history)
            self.evaluations_timesteps = list(old["timesteps"])
            self.evaluations_results = list(old["results"])
            self.evaluations_length = list(old["ep_lengths"])
        self.started = time.monotonic()

    def _on_step(self) -> bool:
        if self.n_calls % self.eval_freq == 0:
            self.eval_env.seed(EVAL_SEED)  # the same terrains at every evaluation
            super()._on_step()
            minutes = (time.monotonic() - self.started) / 60
            spread = np.std(self.evaluations_results[-1])
            print(
                f"{self.num_timesteps:>9} steps  {self.model._n_updates:>7} updates  "
                f"{minutes:6.1f} min  return {self.last_mean_reward:7.1f} +- {spread:5.1f}",
                flush=True,
            )
        return True


def build(env_name: str, settings: Settings, seed: int, run_dir: Path, resume: bool) -> SAC:
    """A fresh SAC on `n_envs` environments, or the one that `resume/` holds."""
    env = make_vec_env(
        env_name,
        n_envs=settings.n_envs,
        seed=seed,
        wrapper_class=FallReward,  # outside the Monitor, which so records true returns
        env_kwargs=dict(disable_env_checker=True),
    )
    if resume:
        model = SAC.load(run_dir / "resume" / "model.zip", env=env, device="cpu")
        model.load_replay_buffer(run_dir / "resume" / "replay_buffer.pkl")
    else:
        policy_kwargs = dict(net_arch=list(settings.net_arch), optimizer_kwargs=dict(fused=True))
        model = SAC(
            "MlpPolicy", env, policy_kwargs=policy_kwargs, seed=seed, device="cpu", **settings.sac
        )
    model.set_logger(configure(str(run_dir), ["tensorboard"]))
    return model


def enter_phase(model: SAC, phase: Phase, start: int) -> None:
    """Switch the model, its environments and the stored rewards of falls to `phase`."""
    rate, final = phase.learning_rate, phase.final_learning_rate

    def schedule(progress_remaining: float) -> float:
        steps = (1.0 - progress_remaining) * phase.until
        done = float(np.clip((steps - start) / (phase.until - start), 0.0, 1.0))
        return rate if final is None else rate + (final - rate) * done

    model.lr_schedule = schedule
    model.batch_size, model.gradient_steps = phase.batch_size, phase.gradient_steps
    action_dim = int(np.prod(model.action_space.shape))
    model.target_entropy = float(
        -action_dim if phase.target_entropy is None else phase.target_entropy
    )
    buffer, env = model.replay_buffer, model.get_env()
    old = env.get_attr("fall_reward")[0]
    falls = (buffer.dones > 0) & (buffer.timeouts == 0) & (buffer.rewards == old)
    buffer.rewards[falls] = phase.fall_reward
    env.env_method("set_fall_reward", phase.fall_reward)


def train(env_name: str, settings: Settings, seed: int, run_dir: Path, resume: bool) -> SAC:
    """Run the phases that are left; every evaluation has its policy saved beside it."""
    model = build(env_name, settings, seed, run_dir, resume)
    every = max(settings.eval_every // settings.n_envs, 1)
    resume_point = ResumePoint(run_dir / "resume")
    evaluation = Evaluation(env_name, run_dir, settings)
    checkpoints = CheckpointCallback(every, str(run_dir / "checkpoints"), name_prefix="sac")
    previous = Phase(until=0)
    for phase in settings.phases:
        if model.num_timesteps < phase.until:
            # a resumed buffer holds the rewards of the phase it was saved in, or of the one before
            model.get_env().env_method("set_fall_reward", previous.fall_reward)
            enter_phase(model, phase, previous.until)
            print(f"{model.num_timesteps:>9} steps: {phase}", flush=True)
            model.learn(
                phase.until - model.num_timesteps,
                callback=[resume_point, checkpoints, evaluation],
                reset_num_timesteps=False,
                log_interval=100,
                progress_bar=False,
            )
            resume_point.save()
        previous = phase
    if model.num_timesteps not in evaluation.evaluations_timesteps:  # the end is a checkpoint too
        model.save(run_dir / "checkpoints" / f"sac_{model.num_timesteps}_steps.zip")
        evaluation.init_callback(model)
        evaluation.num_timesteps, evaluation.n_calls = model.num_timesteps, 0  # due at once
        evaluation._on_step()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--env_name", choices=SETTINGS, default="BipedalWalkerHardcore-v3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run_dir", type=Path, help="where the run's files go")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's state")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    settings = SETTINGS[args.env_name]
    run_dir = args.run_dir or HERE / "runs" / f"{args.env_name}_s{args.seed}"
    run_dir.mkdir(parents=True, exist_ok=args.resume)
    (run_dir / "settings.json").write_text(json.dumps(asdict(settings), indent=1))
    train(args.env_name, settings, args.seed, run_dir, args.resume)


if __name__ == "__main__":
    main()
