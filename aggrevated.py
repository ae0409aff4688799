"""Deeply AggreVaTeD (Sun et al., ICML 2017, arXiv 1703.01030) on BipedalWalkerHardcore-v3.

A tanh-Gaussian learner imitates a Stable-Baselines3 SAC agent, or several that decide together.
It rolls in with a mixture of itself and this expert, and learns from the expert's cost-to-go Q*,
which the SAC critics supply.
The file follows Algorithm 1: Config, policy, expert, roll-in, update, evaluation, the loop.
Rewards are maximised here where the paper minimises costs.

    python aggrevated.py                          train with the defaults
    python aggrevated.py --seed 3 --K 10          every Config field is an option
    python aggrevated.py --resume logs/RUN        go on where a run was stopped
    python aggrevated.py --evaluate logs/RUN      score its best policy on fresh episodes
"""

import argparse
import contextlib
import csv
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from stable_baselines3.sac.policies import SACPolicy
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# Every random stream is a pure function of (purpose, seed, counters), so that evaluating more often
# cannot disturb training and a resumed run needs no generator states.  TUNING has test episodes
# that were looked at while settings were chosen; reported scores use TEST.
ROLL_IN, SHUFFLE, SAMPLE, VALIDATION, TUNING, TEST = range(6)
HARDCORE = "BipedalWalkerHardcore-v3"
SAC_ZIP = f"rl-trained-agents/sac/{HARDCORE}_{{}}/{HARDCORE}.zip"  # of the expert with this number
SOLVED = 300.0  # the return at which an episode of BipedalWalker counts as solved
MAX_ZIP_BYTES = 500_000_000  # unpacked; a SAC agent has a few MB
CSV_COLUMNS = ("iteration", "env_steps", "seconds", "policy", "episode", "return", "length")
CHECKPOINT_VALUES = (
    "iteration", "env_steps", "seconds", "best_return", "expert_return", "csv_bytes",
)  # fmt: skip
RESUMABLE = {"max_iteration", "n_workers", "n_threads", "device", "render"}  # on --resume


class UserError(Exception):
    """Bad input; the message is one sentence that names the mend."""


def option(default, note: str, low=None, high=None, choices=None):
    """A Config field with its note (unit, why, sensible range) and its legal values."""
    return field(default=default, metadata=dict(note=note, low=low, high=high, choices=choices))


# == 1. Config: every setting ====================================================================
@dataclass
class Config:
    """Every setting; each field is a command-line option too."""

    env_name: str = option(HARDCORE, "Gymnasium id; bounded Box actions")
    expert_path: str = option(
        ",".join(map(SAC_ZIP.format, (1, 6, 7, 8, 9))),
        "SAC zip of any Stable-Baselines3 version; several, with commas between, become one expert",
    )
    combine: str = option(
        "mean", "how several experts' Q* become one; max is MAMBA's", choices=("mean", "min", "max")
    )
    temperature: float = option(
        0.3, "several experts' actions are mixed by softmax(Q* / this); 0 takes the best", low=0.0
    )
    algorithm: str = option(
        "aggrevated",
        "member of the family: what is rolled in, kept and weighted",
        choices=("bc", "dagger", "aggrevate", "aggrevated", "reinforce"),
    )
    weighting: str = option(
        "gap",
        "aggrevated's update: by gap_weights, the paper's score function, pathwise, or Q* min-max",
        choices=("gap", "score", "pathwise", "minmax"),
    )
    optimizer: str = option(
        "adam", "or the paper's natural gradient: a step per pass", choices=("adam", "natural")
    )
    init_path: str = option(
        "", "checkpoint whose policy to start from, as Algorithm 1 allows; none: start at random"
    )
    seed: int = option(0, "of everything random", low=0)
    device: str = option("auto", "of the update: cpu, cuda, or auto; the roll-in is on the CPU")
    n_workers: int = option(
        2, "processes that simulate; one per core, 1 starts none", low=1, high=64
    )
    n_threads: int = option(2, "torch threads of labels and update; each worker takes 1", low=1)

    max_iteration: int = option(15, "N of Algorithm 1; 10 to 100", low=1)
    alpha_decay_iterations: int = option(4, "iterations until alpha is 0; 3 to 20", low=1)
    K: int = option(20, "trajectories per iteration; 5 to 50", low=1)
    H: int = option(2000, "longest trajectory [steps]; the task's own limit is 2000", low=1)
    roll_in_noise: float = option(1.0, "scale of the learner's noise in roll-ins; 0 to 1", low=0.0)
    max_experience_len: int = option(
        300_000, "newest transitions that are kept to train on; 50k to 1M", low=1
    )

    hidden_dim: int = option(128, "units in each of the two hidden layers; 64 to 256", low=1)
    log_std_min: float = option(-2.0, "lower bound of log std; below -5 gradients explode")
    log_std_max: float = option(-1.0, "upper bound of log std; wider roll-ins visit other states")
    target_clip: float = option(
        0.99, "expert actions are cut to this share of the range: atanh(1) is infinite", 0.5, 1.0
    )

    lr: float = option(8e-3, "Adam's step size in iteration 1; 1e-3 to 1e-2", low=1e-12)
    final_lr: float = option(1e-4, "and in the last one, linear between; 0 to lr", low=0.0)
    update_sz: int = option(
        100_000, "transitions drawn from them for an iteration's update; 30k to all", low=1
    )
    batch_sz: int = option(512, "transitions per minibatch; 128 to 1024", low=1)
    train_repeat: int = option(2, "passes over the drawn transitions; 1 to 10", low=1)
    gap_factor: float = option(3.0, "weight of the normalised gap beside 1; 1 to 10", low=0.0)
    gap_cut: float = option(20.0, "largest weight before normalisation; 5 to 50", low=1.0)
    max_grad_norm: float = option(10.0, "bound on the gradient norm; 1 to 100", low=1e-12)
    kl_step: float = option(0.01, "natural: KL between old and new policy [nats]", low=1e-12)
    cg_damping: float = option(0.1, "natural: added to the Fisher matrix's diagonal", low=0.0)
    cg_iterations: int = option(10, "natural: conjugate gradient steps; 5 to 20", low=1)
    gamma: float = option(0.99, "discount that Q* must have been trained with", 0.0, 1.0)

    eval_every: int = option(3, "iterations between evaluations; training does not notice", low=1)
    eval_episodes: int = option(100, "episodes per evaluation; 20 to 500", low=1)
    log_dir: str = option("logs", "parent of the run folders")
    render: bool = option(False, "show the last episode in a window, not only as final.gif")

    def check(self) -> "Config":
        """Raise UserError unless every field has its type and lies in its range."""
        for f in fields(self):
            value, m = getattr(self, f.name), f.metadata
            if type(value) is int and abs(value) >= 2**31:
                raise UserError(f"{f.name} is {value}; give a number below 2 to the 31st.")
            if f.type is float and isinstance(value, int) and not isinstance(value, bool):
                setattr(self, f.name, value := float(value))
            if type(value) is not f.type:
                raise UserError(f"{f.name} must be a {f.type.__name__}, not {value!r}.")
            if f.type is float and not math.isfinite(value):
                raise UserError(f"{f.name} is {value}; give a finite number.")
            if m["choices"] and value not in m["choices"]:
                raise UserError(f"{f.name} is {value!r}; choose from {', '.join(m['choices'])}.")
            if m["low"] is not None and value < m["low"]:
                raise UserError(f"{f.name} is {value}; give at least {m['low']}.")
            if m["high"] is not None and value > m["high"]:
                raise UserError(f"{f.name} is {value}; give at most {m['high']}.")
        if self.log_std_min > self.log_std_max:
            raise UserError("log_std_min is above log_std_max; swap them.")
        return self


# == 2. The learner: a tanh-Gaussian policy on any bounded Box ===================================
class PolicyNetwork(nn.Module):
    """a = offset + scale * tanh(u), u ~ N(mean(s), std(s)).

    States are (N, state_dim), actions (N, action_dim) in the environment's units and
    log-probabilities (N, 1), with respect to those units.
    """

    def __init__(self, state_dim, action_space, hidden_dim, *, log_std_min=-2.0, log_std_max=-1.0):
        super().__init__()
        action_dim = action_space.shape[0]
        self.fc1 = nn.Linear(state_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, hidden_dim)
        self.mean = nn.Linear(hidden_dim, action_dim)
        self.log_std = nn.Linear(hidden_dim, action_dim)
        self.log_std_min, self.log_std_max = log_std_min, log_std_max
        low, high = torch.as_tensor(action_space.low), torch.as_tensor(action_space.high)
        ranges = dict(low=low, high=high, scale=(high - low) / 2, offset=(high + low) / 2)
        states = dict(state_mean=torch.zeros(state_dim), state_std=torch.ones(state_dim))
        for name, value in (ranges | states).items():
            self.register_buffer(name, value.float())

    def fit_input(self, state):
        """Standardise inputs from now on by the mean and std of these states (N, state_dim)."""
        self.state_mean.copy_(state.mean(dim=0))
        self.state_std.copy_(state.std(dim=0, correction=0).clamp(min=1e-3))

    def forward(self, state):
        """Mean and standard deviation (N, action_dim) of u, before the tanh."""
        x = F.relu(self.fc1((state - self.state_mean) / self.state_std))
        x = F.relu(self.fc2(x))
        share = torch.sigmoid(self.log_std(x))  # unlike a clamp's, its gradient never dies
        log_std = self.log_std_min + share * (self.log_std_max - self.log_std_min)
        return self.mean(x), log_std.exp()

    def squash(self, u):
        """The action of a pre-tanh value."""
        action = self.offset + self.scale * torch.tanh(u)
        return action.clamp(self.low, self.high)  # rounding can end just outside

    def sample(self, state, noise=None):
        """A reparameterised sample (from standard-normal `noise` if given) and its log-prob."""
        mean, std = self(state)
        u = mean + std * (torch.randn_like(mean) if noise is None else noise)
        return self.squash(u), self._log_prob(u, mean, std)  # u itself: no atanh, no rounding

    def predict(self, state):
        """The deterministic action: the mean, squashed."""
        return self.squash(self(state)[0])

    def get_log_prob(self, state, action, limit=1 - 1e-6):
        """log pi(action | state); an action beyond `limit` of the range counts as at that limit."""
        u = torch.atanh(((action - self.offset) / self.scale).clamp(-limit, limit))
        return self._log_prob(u, *self(state))

    def _log_prob(self, u, mean, std):
        """log N(u; mean, std) - log |da/du|; log(1 - tanh(u)^2) in a form that cannot overflow."""
        normal = -0.5 * ((u - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u)) + self.scale.log()
        return (normal - log_slope).sum(dim=1, keepdim=True)


# == 3. The expert: a SAC agent whose twin critics are Q*, or a council of several ===============
def read_zip(raw: bytes, what: str) -> zipfile.ZipFile:
    """Open a zip held in memory; UserError if it is none, damaged, or unpacks to something huge."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(raw))
        size, damaged = sum(i.file_size for i in archive.infolist()), None
        if size <= MAX_ZIP_BYTES:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises half a dozen types on hostile bytes
        raise UserError(f"{what} is not a readable zip file ({error}); get it again.") from None
    if size > MAX_ZIP_BYTES or damaged:
        raise UserError(f"{what} is damaged or unpacks to over 500 MB; get it again.")
    return archive


def read_file(path, what: str, mend: str) -> bytes:
    """A file of plausible size; UserError for anything else: devices and pipes may never end."""
    path, reason = Path(path), "no such file"
    try:
        if path.is_file():
            if path.stat().st_size > MAX_ZIP_BYTES:
                raise UserError(f"{what} has over 500 MB; get it again.")
            return path.read_bytes()
    except OSError as error:
        reason = error.strerror
    raise UserError(f"{what} cannot be read ({reason}); {mend}") from None


def load_tensors(raw: bytes, what: str):
    """torch.load without unpickling anything but tensors and plain values."""
    read_zip(raw, what)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickle protocols; what matters is raised
            return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).split("\n")[0][:100]
        raise UserError(f"{what} does not hold plain tensors ({reason}); save it again.") from None


def layer_sizes(state: dict, prefix: str) -> list[int]:
    """Output sizes of the linear layers under `prefix`, in order."""
    names = [k for k in state if k.startswith(prefix + ".") and k.endswith(".weight")]
    names.sort(key=lambda k: int(k.removeprefix(prefix + ".").split(".")[0]))
    return [state[k].shape[0] for k in names]


class SACExpert(nn.Module):
    """A frozen SB3 SAC agent: its mean action, and Q*(s, a) = min over its critics.

    Nothing in the zip can run code: the weights are read with `weights_only=True`, the sizes come
    from the tensors, and the activation from the plain text beside the pickles.

    Raises UserError if the file is not a SAC zip or does not fit the spaces.
    """

    def __init__(self, path, observation_space, action_space, device="cpu"):
        super().__init__()
        raw = read_file(
            path, f"The expert {path}", "set --expert_path to a Stable-Baselines3 SAC zip, or "
            "train one with rl-trained-agents/train_sac.py."
        )  # fmt: skip
        archive = read_zip(raw, f"The expert {path}")
        try:
            data, weights = json.loads(archive.read("data")), archive.read("policy.pth")
            state = load_tensors(weights, f"policy.pth in the expert {path}")
            self.gamma = data.get("gamma")
            self.policy = self._build(data, state, observation_space, action_space)
        except UserError:
            raise
        except Exception as error:  # any surprise in hostile JSON or tensors means the same
            reason = str(error).split("\n")[0][:100]
            raise UserError(
                f"{path} is not a Stable-Baselines3 SAC agent for this environment ({reason}); "
                "choose an expert trained on it."
            ) from None
        if not all(p.isfinite().all() for p in self.policy.parameters()):
            raise UserError(f"The expert {path} has NaN or infinite weights; get it again.")
        low, high = torch.as_tensor(action_space.low), torch.as_tensor(action_space.high)
        self.register_buffer("low", low.float(), persistent=False)
        self.register_buffer("high", high.float(), persistent=False)
        self.to(device).requires_grad_(False).policy.set_training_mode(False)

    @staticmethod
    def _build(data, state, observation_space, action_space):
        """SB3's own SACPolicy in the sizes of `state`, loaded with it."""
        mu = state.get("actor.mu.weight", state.get("actor.mu.0.weight"))  # the latter with gSDE
        if mu is None:
            raise UserError("The expert is not a SAC agent (it has no Gaussian actor); choose one.")
        pi, qf = layer_sizes(state, "actor.latent_pi"), layer_sizes(state, "critic.qf0")[:-1]
        action_dim = mu.shape[0]
        state_dim = state["critic.qf0.0.weight"].shape[1] - action_dim
        sizes = (state_dim, action_dim), observation_space.shape + action_space.shape
        if sizes[0] != sizes[1]:
            raise UserError(
                f"The expert has {state_dim} observations and {action_dim} actions, the "
                f"environment {sizes[1][0]} and {sizes[1][1]}; choose an expert trained on it."
            )
        n_critics = len({k.split(".")[1] for k in state if k.startswith("critic.qf")})
        pairs = [*zip([state_dim, *pi], pi), *n_critics * [*zip([state_dim + action_dim, *qf], qf)]]
        if n_critics > 100 or 4 * sum(a * b for a, b in pairs) > MAX_ZIP_BYTES:
            raise UserError("The expert's network is implausibly large; get it again.")
        kwargs = data.get("policy_kwargs") or {}
        name = str(kwargs.get("activation_fn", "ReLU")).rstrip("'>").split(".")[-1]
        policy = SACPolicy(
            gym.spaces.Box(-np.inf, np.inf, (state_dim,)),
            action_space,
            lr_schedule=lambda _: 0.0,
            net_arch=dict(pi=pi, qf=qf),
            activation_fn={"ReLU": nn.ReLU, "Tanh": nn.Tanh, "ELU": nn.ELU, "GELU": nn.GELU,
                           "SiLU": nn.SiLU, "LeakyReLU": nn.LeakyReLU}[name],
            use_sde=bool(data.get("use_sde", False)),
            clip_mean=float(kwargs.get("clip_mean", 2.0)),
            n_critics=n_critics,
        )  # fmt: skip
        policy.load_state_dict(state)
        return policy

    def _tensor(self, x):
        return torch.as_tensor(x, dtype=torch.float32, device=self.low.device)

    @torch.no_grad()
    def predict(self, obs):
        """The expert's deterministic actions (N, action_dim), in the environment's units."""
        actor = self.policy.actor  # called in parts: its forward builds a distribution nobody needs
        scaled = torch.tanh(actor.mu(actor.latent_pi(self._tensor(obs))))  # in [-1, 1]
        action = self.low + 0.5 * (scaled + 1.0) * (self.high - self.low)
        return action if torch.is_tensor(obs) else action.cpu().numpy()

    def q_star(self, obs, action):
        """Q*(s, a) (N, 1)."""
        q = self.combine(self.critics(obs, action))
        return q if torch.is_tensor(obs) else q.cpu().numpy()

    @staticmethod
    def combine(values):
        """One Q* of the critics' (N, n_critics): the smallest, as SAC's own target takes it."""
        return values.amin(dim=1, keepdim=True)

    def critics(self, obs, action):
        """Each critic's value (N, n_critics); SB3 trains them on actions scaled to [-1, 1]."""
        scaled = 2.0 * (self._tensor(action) - self.low) / (self.high - self.low) - 1.0
        return torch.cat(self.policy.critic(self._tensor(obs), scaled), dim=1)


class Council(nn.Module):
    """Several experts as one: combined Q*, and the mean of their actions under softmax(Q* / T).

    The mean is smooth in the state, so that a learner can imitate it.  With T = 0 and `max` this
    comes close to MAMBA's state-wise best expert (Cheng et al., NeurIPS 2020).
    """

    def __init__(self, members: list[SACExpert], how: str, temperature: float):
        super().__init__()
        self.members, self.temperature = nn.ModuleList(members), temperature
        self.reduce = {"mean": torch.mean, "min": torch.amin, "max": torch.amax}[how]
        self.gamma = members[0].gamma
        if any(m.gamma != self.gamma for m in members):
            raise UserError("The experts' Q* have different discounts; choose some of one gamma.")

    @torch.no_grad()
    def predict(self, obs):
        """The council's deterministic actions (N, action_dim), in the environment's units."""
        state, m = self.members[0]._tensor(obs), len(self.members)
        actions = torch.stack([member.predict(state) for member in self.members])  # (M, N, dim)
        values = self.q_star(state.repeat(m, 1), actions.flatten(0, 1)).view(m, -1, 1)
        if self.temperature > 0:
            share = torch.softmax(values / self.temperature, dim=0)
        else:
            share = F.one_hot(values.argmax(dim=0), m).permute(2, 0, 1)
        action = (share * actions).sum(dim=0)
        return action if torch.is_tensor(obs) else action.cpu().numpy()

    def critics(self, obs, action):
        """Each expert's own Q* (N, M)."""
        state, action = (self.members[0]._tensor(x) for x in (obs, action))
        return torch.cat([m.q_star(state, action) for m in self.members], dim=1)

    def combine(self, values):
        """One Q* (N, 1) of the experts' (N, M): their mean, smallest or largest."""
        return self.reduce(values, dim=1, keepdim=True)

    q_star = SACExpert.q_star


def load_expert(config, env: gym.Env, device="cpu") -> SACExpert | Council:
    """The expert that `expert_path` names, or the council of several; UserError as SACExpert."""
    spaces = env.observation_space, env.action_space
    members = [SACExpert(path, *spaces, device) for path in config.expert_path.split(",")]
    return members[0] if len(members) == 1 else Council(members, config.combine, config.temperature)


# == 4. Roll-in (Algorithm 1, line 4), in this process or in workers =============================
def make_env(env_name: str, render_mode=None) -> gym.Env:
    """The environment; UserError unless it exists with 1-D Boxes and bounded actions."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters comes as an error
            env = gym.make(env_name, render_mode=render_mode, disable_env_checker=True)
    except Exception as error:  # unknown id, missing package, a constructor that fails
        reason = str(error).split("\n")[0]
        raise UserError(f"env_name {env_name!r} cannot be made ({reason}); check it.") from None
    obs, act = env.observation_space, env.action_space
    if not isinstance(act, gym.spaces.Box) or len(act.shape) != 1:
        raise UserError(f"{env_name} has {act} actions; choose one with a 1-D Box of actions.")
    if not (np.isfinite([act.low, act.high]).all() and (act.high > act.low).all()):
        raise UserError(
            f"{env_name} has unbounded actions; choose one whose Box has finite bounds."
        )
    if not isinstance(obs, gym.spaces.Box) or len(obs.shape) != 1:
        raise UserError(f"{env_name} has {obs} observations; choose one with a 1-D Box of them.")
    return env


def make_policy(config: Config, env: gym.Env) -> PolicyNetwork:
    """A fresh learner; its weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return PolicyNetwork(
            env.observation_space.shape[0], env.action_space, config.hidden_dim,
            log_std_min=config.log_std_min, log_std_max=config.log_std_max,
        )  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One trajectory to simulate: what it is seeded with and how its actions are chosen."""

    stream: tuple  # of integers: the seed of the terrain, of the mixing and of the noise
    alpha: float  # probability of the expert's action, drawn anew at every step
    noise: float  # scale of the learner's noise: 1 samples pi, 0 takes the mean action
    horizon: int  # longest length [steps]


class Trajectory:
    """A job in the making: the random draws it will use and what it has seen so far.

    After `finish`: states (T, state_dim), actions (T, action_dim), rewards (T,) and by_expert (T,).
    """

    def __init__(self, job: Job, env: gym.Env):
        rng = np.random.default_rng(job.stream)
        self.state, _ = env.reset(seed=int(rng.integers(2**31)))
        self.env, self.horizon = env, job.horizon
        self.by_expert = rng.random(job.horizon) < job.alpha  # (H,)
        size = job.horizon, env.action_space.shape[0]
        self.noise = (job.noise * rng.standard_normal(size)).astype(np.float32)
        self.states, self.actions, self.rewards = [], [], []
        self.terminated = self.truncated = False

    def step(self, action) -> bool:
        """Step the environment; True when the trajectory has ended."""
        self.states.append(self.state)
        self.actions.append(action)
        self.state, reward, self.terminated, self.truncated, _ = self.env.step(action)
        self.rewards.append(reward)
        return self.terminated or self.truncated or len(self.rewards) == self.horizon

    def finish(self) -> None:
        """Lay the lists out as arrays and close the environment."""
        self.states = np.asarray(self.states, dtype=np.float32)
        self.actions = np.asarray(self.actions, dtype=np.float32)
        self.rewards = np.asarray(self.rewards, dtype=np.float64)
        self.by_expert = self.by_expert[: len(self.rewards)]
        self.env.close()
        self.env = self.noise = None
        if not np.isfinite(self.rewards).all():
            raise FloatingPointError("The environment returned a NaN or infinite reward.")

    @property
    def episode_return(self) -> float:
        return float(self.rewards.sum())

    def __len__(self) -> int:
        return len(self.rewards)


class Simulator:
    """Steps several environments side by side, with one batched policy call per step."""

    def __init__(self, config: Config, n_envs: int):
        self.env_name, self.n_envs = config.env_name, n_envs
        env = make_env(config.env_name)
        self.policy = make_policy(config, env)
        self.expert = load_expert(config, env)
        env.close()

    @torch.inference_mode()
    def run(self, weights: dict, jobs: list[Job]) -> list[Trajectory]:
        """Simulate the jobs, in their order; when a trajectory ends the next one takes its place.

        Each has an environment of its own: Box2D's worlds carry traces over a reset, so that a
        used one would make a trajectory depend on those before it.
        """
        self.policy.load_state_dict({k: torch.as_tensor(v) for k, v in weights.items()})
        started, running = [], []
        while len(started) < len(jobs) or running:
            while len(running) < self.n_envs and len(started) < len(jobs):
                running.append(Trajectory(jobs[len(started)], make_env(self.env_name)))
                started.append(running[-1])
            for trajectory, action in zip(list(running), self._act(running)):
                if trajectory.step(action):
                    trajectory.finish()
                    running.remove(trajectory)
        return started

    def _act(self, running: list[Trajectory]) -> np.ndarray:
        """Actions (n, action_dim) for the trajectories at their present steps."""
        state = np.asarray([r.state for r in running], dtype=np.float32)
        if not np.isfinite(state).all():
            raise FloatingPointError("The environment returned a NaN or infinite observation.")
        expert_turn = np.asarray([r.by_expert[len(r)] for r in running])
        noise = np.asarray([r.noise[len(r)] for r in running])
        return AggreVateDAgent.mixed_policy(self.policy, self.expert, state, expert_turn, noise)


def end_with_parent() -> None:
    """End this worker when its parent is gone, in the middle of an episode too."""
    multiprocessing.parent_process().join()
    os._exit(1)


def serve(connection, config: Config, n_envs: int) -> None:
    """A worker's life: simulate the jobs that arrive until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        simulator = Simulator(config, n_envs)
        while True:
            weights, jobs = connection.recv()
            try:
                connection.send(simulator.run(weights, jobs))
            except (FloatingPointError, UserError) as error:
                connection.send(error)


class Workers:
    """`n_workers` processes with a share of the environments each; a single one is this process."""

    def __init__(self, config: Config):
        self.n = min(config.n_workers, config.K)
        n_envs = max(math.ceil(config.K / self.n), 25)  # evaluations have more jobs than K
        self.local = Simulator(config, n_envs) if self.n == 1 else None
        self.processes, self.connections = [], []
        if self.local:
            return
        context = multiprocessing.get_context("spawn")  # forking a process with CUDA is not safe
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # they inherit it while they import
        for i in range(self.n):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, config, n_envs), daemon=True)
            process.start()
            theirs.close()  # so that a dead worker reads as the end of the file
            self.processes.append(process)
            self.connections.append(ours)
        signal.signal(signal.SIGINT, before)

    def run(self, policy: PolicyNetwork, jobs: list[Job]) -> list[Trajectory]:
        """Simulate `jobs` with `policy`; the trajectories come back in the order of the jobs."""
        weights = {k: v.cpu().numpy() for k, v in policy.state_dict().items()}
        if self.local:
            return self.local.run(weights, jobs)
        result = [None] * len(jobs)
        try:
            for i, connection in enumerate(self.connections):
                connection.send((weights, jobs[i :: self.n]))
            for i, connection in enumerate(self.connections):
                part = connection.recv()
                if isinstance(part, Exception):
                    raise part
                result[i :: self.n] = part
        except (EOFError, OSError):
            raise ChildProcessError(
                "A roll-in worker died (killed, or out of memory); go on with --resume."
            ) from None
        return result

    def close(self):
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.terminate()
            process.join()


# == 5. The agent: Algorithm 1 ===================================================================
def gap_weights(q_expert, q_learner, factor: float, cut: float):
    """w = min(1 + factor * gap / mean(gap), cut), normalised to mean 1; all (N, 1).

    gap = max(0, Q*(s, a_expert) - Q*(s, a_learner)): what it costs not to do as the expert does.
    """
    gap = (q_expert - q_learner).clamp(min=0)
    mean = gap.mean().clamp(min=1e-4)  # less is rounding
    weights = (1 + factor * gap / mean).clamp(max=cut)
    return weights / weights.mean()


def stream_seed(*stream: int) -> int:
    """A torch seed for a stream of integers."""
    return int(np.random.default_rng(stream).integers(2**62))


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one; UserError if torch does not know or have the device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if name.split(":")[0] not in ("cpu", "cuda"):
            raise ValueError("only cpu and cuda are known to work")
        return torch.empty(0, device=name).device
    except Exception as error:
        reason = str(error).split("\n")[0][:100]
        raise UserError(f"device {name!r} is not to be had here ({reason}); use cpu.") from None


def flatten(tensors) -> torch.Tensor:
    """All elements in one vector."""
    return torch.cat([t.reshape(-1) for t in tensors])


def conjugate_gradient(product, b, iterations: int) -> torch.Tensor:
    """An approximate x with product(x) = b, for a symmetric positive definite `product`."""
    x, residual, direction, square = torch.zeros_like(b), b, b, b @ b
    for _ in range(iterations):
        if square < 1e-20:
            break
        image = product(direction)
        length = square / (direction @ image)
        x, residual = x + length * direction, residual - length * image
        square, before = residual @ residual, square
        direction = residual + square / before * direction
    return x


def mean_kl(old, new) -> torch.Tensor:
    """Mean KL(old || new) of Gaussians given as (mean, std), (N, action_dim); tanh keeps it."""
    old, new = (torch.distributions.Normal(*x, validate_args=False) for x in (old, new))
    return torch.distributions.kl_divergence(old, new).sum(dim=1).mean()


def standardise(x):
    """Mean 0 and standard deviation 1 over the batch."""
    return (x - x.mean()) / (x.std(correction=0) + 1e-8)


def returns_to_go(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """Discounted sum of the rewards (T,) from each step on."""
    total, result = 0.0, np.empty_like(rewards)
    for t in reversed(range(len(rewards))):
        result[t] = total = rewards[t] + gamma * total
    return result


def in_chunks(function, *tensors, size=2048):
    """function(*tensors) in pieces that stay in the CPU's cache."""
    return torch.cat([function(*parts) for parts in zip(*(t.split(size) for t in tensors))])


# How the family differs: what weighs a log-probability.  aggrevated has its `weighting`.
METHODS = {"bc": "uniform", "dagger": "uniform", "aggrevate": "frozen", "reinforce": "returns"}
ON_POLICY = ("minmax", "score", "pathwise", "returns")  # train on an iteration's own data alone


class AggreVateDAgent:
    """Learner, expert, optimiser and data of one run; `train` is Algorithm 1."""

    def __init__(self, config: Config, run_dir: Path | None = None):
        self.config, self.run_dir = config, run_dir
        torch.set_num_threads(config.n_threads)
        self.device = pick_device(config.device)
        self.method = METHODS.get(config.algorithm, config.weighting)
        env = make_env(config.env_name)
        self.horizon = env.spec.max_episode_steps or config.H  # of an evaluation [steps]
        self.policy = make_policy(config, env).to(self.device)
        self.expert = load_expert(config, env, self.device)
        env.close()
        if self.expert.gamma not in (None, config.gamma):
            raise UserError(
                f"The expert's Q* is discounted by {self.expert.gamma}; set --gamma to that."
            )
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=config.lr, fused=True)
        self.experience: dict[str, torch.Tensor] = {}  # newest transitions, (N, ...) each
        self.alpha, self.iteration, self.env_steps, self.seconds = 1.0, -1, 0, 0.0
        self.best_return, self.expert_return, self.csv_bytes = -math.inf, math.nan, 0
        self.workers = self.writer = None

    # -- roll-in: line 4 -------------------------------------------------------------------------
    @staticmethod
    def mixed_policy(policy, expert, state, expert_turn, noise):
        """Actions (n, action_dim): the expert's where `expert_turn` (n,), else a sample of pi."""
        action = np.empty_like(noise)
        if expert_turn.any():
            action[expert_turn] = expert.predict(state[expert_turn])
        if not expert_turn.all():
            own = ~expert_turn
            mean, std = policy(torch.from_numpy(state[own]))
            action[own] = policy.squash(mean + std * torch.from_numpy(noise[own])).numpy()
        return action

    def decay_alpha(self, iteration: int) -> float:
        """The mixing rate alpha_n: 1 in iteration 1, then linearly to 0, and 0 from there."""
        fixed = {"bc": 1.0, "reinforce": 0.0}.get(self.config.algorithm)
        decayed = max(0.0, 1.0 - (iteration - 1) / self.config.alpha_decay_iterations)
        self.alpha = decayed if fixed is None else fixed
        return self.alpha

    def collect(self, iteration: int) -> list[Trajectory]:
        """K trajectories of the mixture."""
        c = self.config
        streams = ((ROLL_IN, c.seed, iteration, k) for k in range(c.K))
        jobs = [Job(stream, self.alpha, c.roll_in_noise, c.H) for stream in streams]
        return self.workers.run(self.policy, jobs)

    # -- labels: Q* and what the expert would have done --------------------------------------------
    def get_q_star(self, state, action):
        """Q*(s, a) (N, 1), without gradient."""
        with torch.no_grad():
            return in_chunks(self.expert.q_star, state, action)

    def label(self, trajectories: list[Trajectory]) -> dict[str, float]:
        """Label the trajectories in one batch and keep them as, or with, the experience."""
        c = self.config
        arrays = ([getattr(t, name) for t in trajectories] for name in ("states", "actions"))
        state, action = (torch.from_numpy(np.concatenate(x)).to(self.device) for x in arrays)
        with torch.no_grad():
            expert_action = in_chunks(self.expert.predict, state)
            values = in_chunks(self.expert.critics, state, expert_action)  # (T, n_critics)
        if not values.isfinite().all():
            raise FloatingPointError(
                "Q* is NaN or infinite on a visited state; the expert is broken."
            )
        q_expert = self.expert.combine(values)
        new = dict(state=state, expert_action=expert_action, q_expert=q_expert)
        if self.method in ("minmax", "frozen"):
            new |= dict(action=action, q_action=self.get_q_star(state, action))
        elif self.method == "returns":
            to_go = np.concatenate([returns_to_go(t.rewards, c.gamma) for t in trajectories])
            new |= dict(
                action=action, q_action=torch.from_numpy(to_go).float()[:, None].to(self.device)
            )
        kept = {} if self.method in ON_POLICY else self.experience
        for name, tensor in new.items():
            joined = torch.cat([kept.get(name, tensor[:0]), tensor])
            self.experience[name] = joined[-c.max_experience_len :]
        spread = values.max(dim=1).values - values.min(dim=1).values
        return {"train/q_twin_gap": spread.mean().item()}

    # -- update: line 5 --------------------------------------------------------------------------
    def normalize_q_star(self, q_star):
        """The weights of `minmax`: Q* of the executed actions, shifted and scaled to [0, 1]."""
        return (q_star - q_star.min()) / (q_star.max() - q_star.min() + 1e-8)

    def _noise(self, n: int, *stream: int) -> torch.Tensor:
        """Standard-normal noise (n, action_dim)."""
        shape, rng = (n, len(self.policy.scale)), np.random.default_rng(stream)
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(self.device)

    @torch.no_grad()
    def weigh(self, e: dict, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What to make likelier in the states of the transitions `e`, and its weight (N, 1)."""
        c = self.config
        if self.method == "minmax":
            return e["action"], self.normalize_q_star(e["q_action"])
        if self.method == "returns":
            return e["action"], standardise(e["q_action"])
        if self.method == "score":  # A*(s, a) = Q*(s, a) - Q*(s, a_expert) of a sample of pi
            noise = self._noise(len(e["state"]), SAMPLE, c.seed, iteration)
            action, _ = self.policy.sample(e["state"], noise)
            return action, standardise(self.get_q_star(e["state"], action) - e["q_expert"])
        if self.method == "gap":
            q_learner = self.get_q_star(e["state"], in_chunks(self.policy.predict, e["state"]))
        elif self.method == "frozen":  # of what was executed then, whatever the policy does now
            q_learner = e["q_action"]
        else:
            return e["expert_action"], torch.ones_like(e["q_expert"])
        return e["expert_action"], gap_weights(e["q_expert"], q_learner, c.gap_factor, c.gap_cut)

    def loss(self, state, target, weight):
        """-mean(w log pi(target | s)); for the pathwise estimator -mean(Q*(s, pi(s)))."""
        if self.method == "pathwise":
            return -self.expert.q_star(state, self.policy.predict(state)).mean()
        own = self.method in ("score", "returns")  # samples of pi, not to be cut as the expert's
        cut = {} if own else dict(limit=self.config.target_clip)
        return -(weight * self.policy.get_log_prob(state, target, **cut)).mean()  # (N, 1) * (N, 1)

    def update(self, iteration: int) -> dict[str, float]:
        """`train_repeat` shuffled passes over `update_sz` transitions drawn from the experience."""
        c, history = self.config, []  # of losses and gradient norms
        share = min((iteration - 1) / max(c.max_iteration - 1, 1), 1.0)
        self.optimizer.param_groups[0]["lr"] = c.lr + (c.final_lr - c.lr) * share
        generator = torch.Generator().manual_seed(stream_seed(SHUFFLE, c.seed, iteration))
        shuffle = partial(torch.randperm, generator=generator)
        drawn = shuffle(len(self.experience["state"]))[: c.update_sz].to(self.device)
        e = {name: tensor[drawn] for name, tensor in self.experience.items()}
        data = e["state"], *self.weigh(e, iteration)
        for _ in range(c.train_repeat):
            if c.optimizer == "natural":
                history.append(self.natural_step(*data))
                continue
            order = shuffle(len(drawn)).to(self.device)
            for batch in zip(*(x[order].split(c.batch_sz) for x in data)):
                history.append(self.adam_step(*batch))
        if not all(p.isfinite().all() for p in self.policy.parameters()):
            raise FloatingPointError("The weights became NaN or infinite; lower --lr.")
        loss, norm = (torch.stack(x).mean().item() for x in zip(*history))
        return {"train/loss": loss, "train/grad_norm": norm}

    def adam_step(self, state, target, weight) -> tuple[torch.Tensor, torch.Tensor]:
        """One minibatch; returns the loss and the gradient's norm before it was clipped."""
        loss = self.loss(state, target, weight)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)
        if not norm.isfinite():  # before it can reach the weights
            raise FloatingPointError("NaN or infinite gradient; lower --lr or raise --log_std_min.")
        self.optimizer.step()
        return loss.detach(), norm

    def fisher_product(self, state):
        """v -> (I(theta) + damping) v; I is the Hessian of the KL divergence at theta itself."""
        parameters = list(self.policy.parameters())
        new = self.policy(state)
        kl = mean_kl([x.detach() for x in new], new)
        slope = flatten(torch.autograd.grad(kl, parameters, create_graph=True))

        def product(v):
            curvature = torch.autograd.grad(slope @ v, parameters, retain_graph=True)
            return flatten(curvature) + self.config.cg_damping * v

        return product

    def natural_step(self, state, target, weight) -> tuple[torch.Tensor, torch.Tensor]:
        """Step along -I(theta)^-1 gradient to a KL of kl_step, halved until the loss falls.

        The paper's second procedure (its section 5.2); returns the loss and the gradient's norm.
        """
        c, parameters = self.config, list(self.policy.parameters())
        loss = self.loss(state, target, weight)
        gradient = flatten(torch.autograd.grad(loss, parameters, materialize_grads=True))
        if not gradient.isfinite().all():
            raise FloatingPointError("The gradient is NaN or infinite; raise --log_std_min.")
        product = self.fisher_product(state)
        step = conjugate_gradient(product, -gradient, c.cg_iterations)
        step *= (2 * c.kl_step / (step @ product(step)).clamp(min=1e-12)).sqrt()
        with torch.no_grad():
            old, start = self.policy(state), flatten(parameters)
            for halving in range(10):
                nn.utils.vector_to_parameters(start + 0.5**halving * step, parameters)
                kl = mean_kl(old, self.policy(state))
                if kl <= 1.5 * c.kl_step and self.loss(state, target, weight) < loss:
                    break
            else:
                nn.utils.vector_to_parameters(start, parameters)
        return loss.detach(), gradient.norm()

    @torch.no_grad()
    def diagnose(self, n_new: int) -> dict[str, float]:
        """What the learner is like on the newest `n_new` states."""
        state, q_expert = (self.experience[k][-n_new:] for k in ("state", "q_expert"))
        mean, std = self.policy(state)
        _, log_prob = self.policy.sample(state, self._noise(len(state), SAMPLE, 0))
        gap = q_expert - self.get_q_star(state, self.policy.squash(mean))
        return {
            "train/entropy": -log_prob.mean().item(),
            "train/log_std": std.log().mean().item(),
            "train/q_gap": gap.mean().item(),
        }

    # -- evaluation: line 7 ------------------------------------------------------------------------
    def evaluate(self, who="learner", n_episodes=None, stream=VALIDATION, first=0):
        """Trajectories of "learner" or "expert", deterministic, the same terrains at every call.

        They are the episodes from number `first` up to `n_episodes`.
        """
        alpha = {"learner": 0.0, "expert": 1.0}[who]
        episodes = range(first, n_episodes or self.config.eval_episodes)
        jobs = [Job((stream, i), alpha, noise=0.0, horizon=self.horizon) for i in episodes]
        return self.workers.run(self.policy, jobs)

    def validate(self) -> dict[str, float]:
        """Evaluate the learner, at first the expert too; keep the best."""
        result = {}
        for who in ("expert", "learner") if self.iteration == 0 else ("learner",):
            episodes = self.evaluate(who)
            self._write_csv(who, episodes)
            result[who] = np.array([t.episode_return for t in episodes])
        if "expert" in result:
            self.expert_return = result["expert"].mean().item()
        score = result["learner"].mean().item()
        if score > self.best_return:
            self.best_return = score
            self.save("best.pt")
        return {
            "eval/episode_reward": score,
            "eval/expert_reward": self.expert_return,
            "eval/episode_length": float(np.mean([len(t) for t in episodes])),
            "eval/success_rate": float((result["learner"] >= SOLVED).mean()),
        }

    # -- the loop ----------------------------------------------------------------------------------
    def iterate(self, n: int) -> dict[str, float]:
        """Iteration n of Algorithm 1: roll in with the mixture, label with Q*, step the policy."""
        started = time.perf_counter()
        scalars = {"train/alpha": self.decay_alpha(n)}
        trajectories = self.collect(n)
        n_new = sum(map(len, trajectories))
        self.env_steps += n_new
        rolled_in = time.perf_counter()
        scalars |= self.label(trajectories)
        if n == 1 and not self.config.init_path:
            self.policy.fit_input(self.experience["state"])
        scalars |= self.update(n) | self.diagnose(n_new)
        return scalars | {
            "rollout/episode_reward": float(np.mean([t.episode_return for t in trajectories])),
            "rollout/expert_fraction": float(sum(t.by_expert.sum() for t in trajectories) / n_new),
            "time/env_steps": self.env_steps,
            "time/env_steps_per_second": n_new / (rolled_in - started),
            "time/iteration_seconds": time.perf_counter() - started,
        }

    def train(self) -> None:
        """Algorithm 1.  Iteration 0 only evaluates the expert and the untrained learner."""
        c = self.config
        self.workers = Workers(c)
        threading.excepthook = lambda *_: None  # flush() raises what the writer's thread met
        self.writer = SummaryWriter(self.run_dir, purge_step=self.iteration + 1)
        if self.iteration < 0:
            table = "".join(f"\n| {k} | {v} |" for k, v in asdict(c).items())  # in Markdown
            self.writer.add_text("config", "| field | value |\n|---|---|" + table, 0)
        with tqdm(total=c.max_iteration, initial=max(self.iteration, 0), unit="iteration") as bar:
            for n in range(self.iteration + 1, c.max_iteration + 1):
                scalars = self.iterate(n) if n > 0 else {}
                self.iteration = n
                self.seconds += scalars.get("time/iteration_seconds", 0.0)  # without evaluation
                if n % c.eval_every == 0 or n == c.max_iteration:
                    scalars |= self.validate()
                    bar.write(
                        f"iteration {n:4d}  {self.env_steps:8d} steps  {self.seconds:6.0f} s  "
                        f"learner {scalars['eval/episode_reward']:7.1f}  "
                        f"expert {self.expert_return:7.1f}"
                    )
                for tag, value in scalars.items():
                    self.writer.add_scalar(tag, value, n)
                self.writer.flush()
                self.save("last.pt")
                bar.update(n > 0)
        self.film()

    def film(self) -> None:
        """One episode of the last policy as final.gif and under TensorBoard's IMAGES."""
        env = make_env(self.config.env_name)
        if "rgb_array" not in env.metadata.get("render_modes", ()):
            return print(f"{self.config.env_name} cannot be drawn: no final.gif.")
        if self.config.render:
            record(self.config, self.policy, self.horizon, "human")
        frames = record(self.config, self.policy, self.horizon, "rgb_array")
        first, *others = (Image.fromarray(f).quantize(32) for f in frames)
        path = self.run_dir / "final.gif"
        first.save(path, save_all=True, append_images=others, duration=80, loop=0)  # duration in ms
        image = Summary.Image(height=first.height, width=first.width, colorspace=3)
        image.encoded_image_string = path.read_bytes()
        summary = Summary(value=[Summary.Value(tag="final_policy", image=image)])
        self.writer.file_writer.add_summary(summary, self.iteration)
        self.writer.flush()

    def close(self) -> None:
        """End the workers and the event file."""
        for part in filter(None, (self.workers, self.writer)):
            with contextlib.suppress(OSError):  # of a full disk; what matters is on it
                part.close()

    # -- files -------------------------------------------------------------------------------------
    def _write_csv(self, who: str, episodes: list[Trajectory]) -> None:
        """Append a line per episode, after cutting off what a killed run wrote unsaved."""
        now = self.iteration, self.env_steps, f"{self.seconds:.1f}", who
        rows = [(*now, i, t.episode_return, len(t)) for i, t in enumerate(episodes)]
        with open(self.run_dir / "evaluations.csv", "a+", newline="") as file:
            self.csv_bytes = min(self.csv_bytes, file.seek(0, os.SEEK_END))
            file.truncate(self.csv_bytes)
            if not self.csv_bytes:
                rows.insert(0, CSV_COLUMNS)
            csv.writer(file).writerows(rows)
            file.flush()
            self.csv_bytes = file.tell()

    def save(self, name: str) -> None:
        """Write a checkpoint of tensors and plain values under a temporary name, then rename it."""
        state = {k: getattr(self, k) for k in CHECKPOINT_VALUES}
        state |= dict(config=asdict(self.config), policy=self.policy.state_dict())
        if name == "last.pt":  # what resuming needs and evaluating does not
            state |= dict(optimizer=self.optimizer.state_dict(), experience=self.experience)
        path, temporary = self.run_dir / name, self.run_dir / (name + ".tmp")
        try:
            torch.save(state, temporary)
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            temporary.unlink(missing_ok=True)
            raise OSError(f"cannot write {path} ({str(error).splitlines()[0][:100]})") from None

    def load_policy(self, state: dict) -> None:
        """Take over the weights of a checkpoint; UserError unless they are finite and fit."""
        own = {k: v.cpu() for k, v in self.policy.state_dict().items()}
        fixed = ("low", "high", "scale", "offset")
        if not fits(state["policy"], own) or any(
            not torch.equal(state["policy"][k], own[k]) for k in fixed
        ):
            raise UserError("The checkpoint's weights are not finite or do not fit; use another.")
        self.policy.load_state_dict(state["policy"])

    def restore(self, state: dict) -> None:
        """Continue from a checkpoint; UserError unless it holds just what this run would save."""
        wanted = {k: getattr(self, k) for k in CHECKPOINT_VALUES}
        moments, experience = {}, {}
        try:
            if not all(isinstance(state[k], dict) for k in ("optimizer", "experience")):
                raise TypeError
            saved = state["optimizer"]["state"]
            if state["iteration"] > 0:
                size = len(state["experience"]["state"]), len(self.policy.scale)
                names = ("expert_action", "q_expert")
                if self.method in ("minmax", "frozen", "returns"):
                    names += ("action", "q_action")
                experience = {
                    k: torch.empty(size[0], 1 if k[:2] == "q_" else size[1]) for k in names
                }
                experience["state"] = torch.empty(size[0], self.policy.fc1.in_features)
                adam = self.config.optimizer == "adam"
                for i, (name, p) in enumerate(self.policy.named_parameters() if adam else ()):
                    if self.method == "pathwise" and name.startswith("log_std"):
                        continue  # its loss does not have them
                    p = p.detach().cpu()
                    moments[i] = dict(step=torch.tensor(0.0), exp_avg=p, exp_avg_sq=p)
            wanted |= dict(optimizer=moments, experience=experience)
            ok = fits({k: state[k] for k in wanted} | dict(optimizer=saved), wanted)
            ok = ok and -1 <= state["iteration"] < 2**31 and not math.isnan(state["best_return"])
            ok = ok and all(state[k] >= 0 for k in ("env_steps", "seconds", "csv_bytes"))
            ok = ok and all(m["exp_avg_sq"].min() >= 0 and m["step"] >= 0 for m in saved.values())
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError):
            ok = False
        if not ok:
            raise UserError("The checkpoint is damaged or not of this run; use its own.")
        self.load_policy(state)
        own = self.optimizer.state_dict()
        self.optimizer.load_state_dict(own | dict(state=saved))
        self.experience = {k: v.to(self.device) for k, v in state["experience"].items()}
        for name in CHECKPOINT_VALUES:
            setattr(self, name, state[name])


# == 6. Files and pictures =======================================================================
def make_run_dir(config: Config) -> Path:
    """A fresh folder below log_dir, with config.json in it; UserError if that cannot be written."""
    name = "".join(x if x.isalnum() or x in "-_" else "-" for x in config.env_name)
    while True:
        stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
        run_dir = Path(config.log_dir) / f"AggreVateD_{name}_s{config.seed}_{stamp}"
        try:
            run_dir.mkdir(parents=True)
            (run_dir / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
            return run_dir
        except FileExistsError:
            if not run_dir.is_dir():
                raise UserError(
                    f"log_dir {config.log_dir} is not a folder; set --log_dir."
                ) from None
            time.sleep(0.2)  # two runs in one second
        except OSError as error:
            shutil.rmtree(run_dir, ignore_errors=True)
            raise UserError(
                f"log_dir {config.log_dir} cannot be written ({error.strerror}); set --log_dir."
            ) from None


def record(config: Config, policy: PolicyNetwork, horizon: int, mode: str) -> list[np.ndarray]:
    """RGB frames (H, W, 3) of one deterministic episode, or none if `mode` shows it in a window."""
    if mode != "human":
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    env, frames, ended, t = make_env(config.env_name, mode), [], False, 0
    state, _ = env.reset(seed=TEST)
    while not ended and t < horizon:
        if t % 4 == 0 and mode != "human":
            frames.append(env.render()[::2, ::2])
        with torch.no_grad():
            x = torch.as_tensor(state, dtype=torch.float32, device=policy.scale.device)
            action = policy.predict(x[None])[0].cpu().numpy()
        state, _, terminated, truncated, _ = env.step(action)
        ended, t = terminated or truncated, t + 1
    env.close()
    return frames


def load_checkpoint(path: Path) -> dict:
    """A checkpoint's dict, from its file or its run folder; UserError unless it is one."""
    what = f"The checkpoint {path}"
    state = load_tensors(read_file(path, what, "give a run folder."), what)
    if not isinstance(state, dict) or not {"config", "policy", "iteration"} <= state.keys():
        raise UserError(f"{path} is not a checkpoint of this program; give a last.pt or best.pt.")
    known = {f.name for f in fields(Config)}
    if not isinstance(state["config"], dict) or state["config"].keys() - known:
        raise UserError(f"The checkpoint {path} was written by another version; use that one.")
    state["config"] = Config(**state["config"]).check()
    return state


def fits(value, pattern) -> bool:
    """Whether nested values have a pattern's keys, types and shapes, and finite tensors."""
    if isinstance(pattern, dict):
        return (
            isinstance(value, dict)
            and value.keys() == pattern.keys()
            and all(fits(value[k], pattern[k]) for k in pattern)
        )
    if not torch.is_tensor(pattern) or type(value) is not torch.Tensor:
        return type(value) is type(pattern)
    kind = [(x.shape, x.dtype, x.layout, x.device) for x in (value, pattern)]
    return kind[0] == kind[1] and bool(value.isfinite().all())


# == 7. Command line =============================================================================
def describe(returns: np.ndarray) -> str:
    """Mean, standard deviation, standard error and success rate of episode returns."""
    spread = returns.std(ddof=1) if len(returns) > 1 else math.nan
    return (
        f"{returns.mean():8.1f} +- {spread:6.1f} "
        f"(standard error {spread / len(returns) ** 0.5:5.1f}), "
        f"success {np.mean(returns >= SOLVED):6.1%}"
    )


def print_evaluation(path: Path, overrides: dict) -> None:
    """Score a checkpoint's mean action beside the expert, on fresh episodes (same terrains)."""
    path = path / "best.pt" if path.is_dir() else path
    state = load_checkpoint(path)
    config = replace(state["config"], **overrides).check()
    with contextlib.closing(AggreVateDAgent(config)) as agent:
        agent.load_policy(state)
        agent.workers = Workers(config)
        returns = {
            who: np.array([t.episode_return for t in agent.evaluate(who, stream=TEST)])
            for who in ("learner", "expert")
        }
    n, iteration = config.eval_episodes, state["iteration"]
    print(f"{path}, iteration {iteration}: {n} fresh episodes, mean action")
    for who, values in returns.items():
        print(f"  {who:8s} {describe(values)}")
    print(f"  paired   {describe(returns['learner'] - returns['expert']).split(', ')[0]}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message[0].upper()}{message[1:]}; see --help.")


def parse(argv=None):
    """The command line as (mode, path, {field: value} of the options that were given)."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", type=Path, metavar="RUN_DIR", help="go on from its last.pt")
    mode.add_argument(
        "--evaluate", type=Path, metavar="PATH", help="score a checkpoint or run folder"
    )
    for f in fields(Config):
        note = f"{f.metadata['note']} (default: {f.default})".replace("%", "%%")
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type)
        parser.add_argument(f"--{f.name}", help=note, default=argparse.SUPPRESS, **kind)
    args = vars(parser.parse_args(argv))
    return args.pop("resume"), args.pop("evaluate"), args


def start(resume: Path | None, overrides: dict) -> AggreVateDAgent:
    """The agent of a new run, or of one to go on with; nothing is written before all is checked."""
    if resume is None:
        config = Config(**overrides).check()
        agent = AggreVateDAgent(config)
        if config.init_path:
            agent.load_policy(load_checkpoint(Path(config.init_path)))
        agent.run_dir = make_run_dir(config)
        try:
            agent.save("last.pt")
        except OSError:
            shutil.rmtree(agent.run_dir, ignore_errors=True)
            raise
        return agent
    if fixed := overrides.keys() - RESUMABLE:
        raise UserError(f"--{min(fixed)} cannot change on --resume; start a new run with it.")
    state = load_checkpoint(resume / "last.pt")
    agent = AggreVateDAgent(replace(state["config"], **overrides).check(), resume)
    agent.restore(state)
    return agent


def banner(agent: AggreVateDAgent) -> None:
    """What runs, on what, with which seed, and where it goes."""
    c, size = agent.config, sum(p.numel() for p in agent.policy.parameters())
    print(
        f"AggreVaTeD on {c.env_name}: seed {c.seed}, {c.n_workers} workers, device {agent.device}, "
        f"learner of {size} parameters\n"
        f"torch {torch.__version__}, gymnasium {gym.__version__}, "
        f"stable-baselines3 {stable_baselines3.__version__}, numpy {np.__version__}\n"
        f"expert {c.expert_path}\nrun    {agent.run_dir}\n"
        f"watch  tensorboard --logdir {c.log_dir}"
    )


def interrupt(*_):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a second one must not stop the cleaning up
    raise KeyboardInterrupt


def main(argv=None) -> int:
    """Run the command line; the exit status is 2 after an error, 130 after an interruption."""
    agent = resume = None
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupt)
        resume, evaluate, overrides = parse(argv)
        if evaluate:
            print_evaluation(evaluate, overrides)
            return 0
        agent = start(resume, overrides)
        banner(agent)
        agent.train()
        print(f"score  python aggrevated.py --evaluate {agent.run_dir}")
        return 0
    except KeyboardInterrupt:
        run_dir = agent.run_dir if agent else resume
        hint = f"  Go on with:  python aggrevated.py --resume {run_dir}" if run_dir else ""
        print(f"\nStopped.{hint}")
        return 130
    except (UserError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        text = str(error) or "out of memory"
        print(f"error: {text.splitlines()[0]}", file=sys.stderr)
        return 2
    finally:
        if agent:
            agent.close()


if __name__ == "__main__":
    sys.exit(main())
