"""Deeply AggreVaTeD (Sun et al., ICML 2017, arXiv 1703.01030).

A tanh-Gaussian learner imitates a Stable-Baselines3 SAC agent, whose critics supply the
expert's cost-to-go Q*.  Rewards are maximised here where the paper minimises costs.

    python aggrevated.py                        train with the defaults
    python aggrevated.py --seed 3 --K 20        every Config field is an option
    python aggrevated.py --resume logs/RUN      go on where a run was stopped
    python aggrevated.py --evaluate logs/RUN    score its best iterate on test episodes

The paper's Algorithm 1 is `AggreVateDAgent.train`; what is made likelier, and with what
weight, is what the algorithms differ in: see FAMILY.  The default's target is the
expert's action, its weight how much worse the learner's own action is there by Q*:
cost-weighted imitation, a regression that needs few steps and keeps all data.  If the
critics were evaluated, that is, fitted anew to the expert's own returns (by
rl-trained-agents/evaluate_critics.py), they improve the target, so that the learner can
pass its expert.  `--algorithm score` is the paper's gradient.

best.pt is the latest iterate within two standard errors of the one with the highest mean.
"""

import argparse
import json
import math
import multiprocessing
import os
import pickle
import shlex
import signal
import sys
import textwrap
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # what must be set before numpy and CUDA are loaded
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while they are loaded: end at once
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a roll-in worker has one core
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products
import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.sac.policies import SACPolicy
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import gelu, softplus
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

# Random streams, pure functions of (purpose, ...): evaluating more often cannot disturb
# training, and a resumed run needs no generator states.  The learner's first weights come
# from torch's generator, seeded with `seed`.  Numbers up to 17 are taken.
ROLL_IN = 0  # + (seed, n, k): terrain, mixture, noise of iteration n's trajectory k
UPDATE = 1  # + (seed, n): candidates, samples and minibatches of iteration n
VALIDATION = 3  # + (i,): terrain of validation episode i, the same for every run
TEST = 16  # + (i,): terrain of test episode i, on which nothing is ever chosen

FORMAT = 3  # of checkpoints: a new number when the same weights would act otherwise
LOG_STD_MIN, LOG_STD_MAX = -2.0, -1.0  # lower: huge gradients; higher: noisy roll-ins
INPUT_BOUND = 10.0  # clips standardised inputs that were constant in the first data
EARLY = 3  # first iterations, where the return rises: a short evaluation after each


class UserError(Exception):
    """What a user can mend; the message is one sentence that says how."""


# what reading a file that is damaged, or of something else, raises
BAD_FILE = OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError
BAD_FILE += zipfile.BadZipFile, zlib.error, pickle.UnpicklingError


@contextmanager
def user_error_if(errors, sentence: str):
    """These errors inside become a UserError that says so and names the mend."""
    try:
        yield
    except errors as error:
        cause = textwrap.shorten(f"{type(error).__name__}: {error}", 250, placeholder=" ...")
        raise UserError(f"{sentence} ({cause}).") from None


# == 1. Config: every setting ==========================================================
def option(default, note: str, low=-math.inf, high=math.inf):
    """A Config field with its note (unit, why, sensible range) and its legal range."""
    return field(default_factory=lambda: default, metadata=dict(note=note, low=low, high=high))


@dataclass
class Config:
    """Every setting; each field is a command-line option too."""

    env_name: str = option("BipedalWalkerHardcore-v3", "Gymnasium id, or module:id")
    env_kwargs: dict = option({}, "more for gym.make, as JSON")
    expert_path: str = option("", "SAC zip; none: rl-trained-agents/sac/ENV_1/ENV.zip")
    algorithm: str = option("aggrevated", "bc dagger aggrevate aggrevated score minmax")
    optimizer: str = option("adam", "adam or natural")
    init_path: str = option("", "run or policy file to start from; none: at random")
    seed: int = option(0, "decides all that is random", 0, 2**32 - 1)
    device: str = option("auto", "auto takes CUDA if there is one; or cpu")
    n_workers: int = option(2, "processes that simulate, threads of the update", 1, 64)
    max_iteration: int = option(15, "N of Algorithm 1; 10 to 100", 1)
    alpha_decay_iterations: int = option(4, "iterations until alpha is 0; 3 to 60", 1)
    K: int = option(10, "trajectories per iteration; 5 to 100", 1)
    H: int = option(2000, "longest trajectory [steps]; the task's limit is 2000", 1)
    roll_in_noise: float = option(1.0, "scale of the learner's noise in roll-ins", 0, 10)
    max_experience_len: int = option(300_000, "newest transitions that are kept", 1, 2**24)
    candidates: int = option(16, "M actions around the expert's, weighed by Q*", 1, 1024)
    candidate_noise: float = option(0.3, "their deviation; actions in [-1, 1]", 0, 2)
    temperature: float = option(0.25, "tau of their softmax [Q*]; 0.1 to 1", 1e-6, 1e6)
    hidden_dim: int = option(128, "units in each of two hidden layers; 64 to 512", 1)
    lr: float = option(1e-2, "Adam's first step size of an update; falls to 0", 1e-12, 1)
    update_sz: int = option(150_000, "transitions drawn for an update; 50k to 300k", 1)
    batch_sz: int = option(1024, "transitions per minibatch; 128 to 1024", 1)
    train_repeat: int = option(1, "passes over the drawn transitions; 1 to 10", 1)
    gap_factor: float = option(3.0, "weight of the normalised gap; 0 to 10", 0, 1e6)
    gap_cut: float = option(20.0, "largest weight; 5 to 50", 1, 1e6)
    kl_step: float = option(0.01, "KL of a natural step [nats]; 0.01 to 0.1", 1e-12, 10)
    # best.pt is the latest iterate within two standard errors of the one with the highest mean
    eval_every: int = option(5, "iterations between whole evaluations", 1)
    eval_episodes: int = option(20, "episodes of a whole evaluation; 10 to 500", 1)
    log_dir: str = option("logs", "parent of the run folders")

    def check(self) -> "Config":
        """UserError unless all types and ranges are right; 3e5 is a whole number."""
        for f in fields(self):
            value = getattr(self, f.name)
            legal = f.metadata or option(None, "").metadata  # a plain field has none
            number = f.type in (int, float) and type(value) in (int, float)
            if number and value % 1 == 0:
                value = f.type(value)
                setattr(self, f.name, value)
            if type(value) is not f.type:
                raise UserError(f"{f.name} is {value!r}; its type is {f.type.__name__}.")
            if number and not legal["low"] <= value <= legal["high"]:
                raise UserError(f"{f.name} is {value}; give {legal['low']} to {legal['high']}.")
        names = dict(algorithm=FAMILY, optimizer=("adam", "natural"), device=("auto", "cpu"))
        for name, known in names.items():
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"{name} is {value}; give one of {', '.join(known)}.")
        return self


# == 2. The learner: a tanh-Gaussian policy on any bounded Box =========================
class PolicyNetwork(nn.Module):
    """a = offset + scale * tanh(u), u ~ N(mean(s), std(s)).

    States are (N, state_dim), actions (N, action_dim) in the environment's units and
    log-probabilities (N, 1), with respect to those units.
    """

    def __init__(self, observation_space, action_space, hidden_dim):
        super().__init__()
        low, high = torch.tensor(np.array([action_space.low, action_space.high]))
        state_dim, action_dim = observation_space.shape[0], action_space.shape[0]
        self.fc1 = nn.Linear(state_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, hidden_dim)
        self.mean = nn.Linear(hidden_dim, action_dim)
        self.log_std = nn.Linear(hidden_dim, action_dim)
        self.register_buffer("scale", ((high - low) / 2).float())
        self.register_buffer("offset", ((high + low) / 2).float())
        self.register_buffer("state_mean", torch.zeros(state_dim))
        self.register_buffer("state_std", torch.ones(state_dim))

    def standardise_inputs(self, state):
        """Take these states' mean and deviation: once, for later it would change pi."""
        self.state_mean.copy_(state.mean(dim=0))
        self.state_std.copy_(state.std(dim=0, correction=0).clamp(min=1e-3))

    def forward(self, state):
        """Mean and standard deviation (N, action_dim) of u, before the tanh."""
        x = ((state - self.state_mean) / self.state_std).clamp(-INPUT_BOUND, INPUT_BOUND)
        x = gelu(self.fc1(x), approximate="tanh")
        x = gelu(self.fc2(x), approximate="tanh")  # relu's fit takes twice the updates
        fraction = torch.sigmoid(self.log_std(x))  # a clamp's gradient would die
        log_std = LOG_STD_MIN + fraction * (LOG_STD_MAX - LOG_STD_MIN)
        return self.mean(x), log_std.exp()

    def predict(self, state):
        """The deterministic action: the mean, squashed."""
        return self.offset + self.scale * torch.tanh(self(state)[0])

    def sample(self, state):
        """An action drawn from pi(. | state)."""
        mean, std = self(state)
        return self.offset + self.scale * torch.tanh(mean + std * torch.randn_like(mean))

    def get_log_prob(self, state, action):
        """log pi(action | state): a Gaussian's in u, less log |da/du|."""
        mean, std = self(state)
        squashed = (action - self.offset) / self.scale
        u = torch.atanh(squashed.clamp(-1 + 1e-6, 1 - 1e-6))  # atanh(1) is inf
        gaussian = -(((u - mean) / std) ** 2 + math.log(2 * math.pi)) / 2 - std.log()
        log_slope = 2 * (math.log(2) - u - softplus(-2 * u))  # stable log(1 - tanh(u)^2)
        return (gaussian - log_slope - self.scale.log()).sum(dim=1, keepdim=True)

    def clip_to_range(self, action, share=0.99):
        """Actions cut to this share of the range; experts act at its very ends."""
        return action.clamp(self.offset - share * self.scale, self.offset + share * self.scale)


class NumpyPolicy:
    """A PolicyNetwork's weights as arrays: torch takes five times as long for a state."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        self.w = {name: x.cpu().numpy() for name, x in weights.items()}

    def act(self, state, noise=0.0):
        """The action of u = mean + std * noise, gelu as above: one state or a batch."""
        w = self.w
        x = ((state - w["state_mean"]) / w["state_std"]).clip(-INPUT_BOUND, INPUT_BOUND)
        for layer in ("fc1", "fc2"):
            x = x @ w[f"{layer}.weight"].T + w[f"{layer}.bias"]
            x = x / 2 * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x * x * x)))  # sqrt(2/pi)
        mean = x @ w["mean.weight"].T + w["mean.bias"]
        fraction = 1 / (1 + np.exp(-(x @ w["log_std.weight"].T + w["log_std.bias"])))
        log_std = LOG_STD_MIN + fraction * (LOG_STD_MAX - LOG_STD_MIN)
        u = mean + np.exp(log_std) * np.float32(noise)
        return w["offset"] + w["scale"] * np.tanh(u)

    def predict(self, observation, state=None, episode_start=None, deterministic=True):
        """As in SB3: (action, state), by the mean or sampled, of an observation or many."""
        observation = np.asarray(observation, dtype=np.float32)
        shape = *observation.shape[:-1], len(self.w["scale"])
        noise = 0.0 if deterministic else np.random.standard_normal(shape)
        return self.act(observation, noise), state


# == 3. The expert: a SAC agent whose twin critics are Q* ==============================
def layer_sizes(weights: dict, prefix: str) -> list[int]:
    """Output sizes of the linear layers under a prefix, in order."""
    return [len(w) for k, w in weights.items() if k.startswith(prefix) and w.ndim == 2]


def read_sac_zip(path) -> tuple[dict, dict]:
    """Weights and settings of an SB3 agent; no code is run."""
    with zipfile.ZipFile(path) as archive, archive.open("policy.pth") as pth:
        weights = torch.load(pth, map_location="cpu", weights_only=True)
        return weights, json.loads(archive.read("data"))


class SACExpert:
    """A frozen SB3 SAC agent: its mean action, and Q*(s, a) = min over its critics.

    Q* is what the zip's critics say, discounted.  They are as SAC left them, with its
    entropy bonus, or were evaluated: fitted anew to the returns of this mean action, as
    `evaluated` says.  Raises UserError unless it fits the spaces.
    """

    def __init__(self, path, observation_space, action_space, device="cpu"):
        mend = "is missing or no SAC zip of this task; set --expert_path"
        with user_error_if(BAD_FILE, f"{path} {mend}"):
            weights, data = read_sac_zip(path)
            kwargs = data.get("policy_kwargs") or {}  # "activation_fn": "<class '...ReLU'>"
            activation = str(kwargs.get("activation_fn", "ReLU")).rstrip("'>").split(".")[-1]
            pi, qf = layer_sizes(weights, "actor.latent_pi."), layer_sizes(weights, "critic.qf0.")
            how = dict(
                net_arch=dict(pi=pi, qf=qf[:-1]),
                activation_fn=vars(nn)[activation],
                use_sde=bool(data.get("use_sde")),
                clip_mean=float(kwargs.get("clip_mean", 2.0)),
                n_critics=len({k.split(".")[1] for k in weights if k.startswith("critic.qf")}),
            )
            policy = SACPolicy(observation_space, action_space, lambda _: 0.0, **how)
            policy.load_state_dict(weights)
            self.path, self.gamma = path, float(data["gamma"])
            self.evaluated = data.get("critics_evaluated")
        policy.requires_grad_(False)
        self.mean = nn.Sequential(policy.actor.latent_pi, policy.actor.mu)
        self.critic = policy.critic.to(device)
        self.low, self.high = np.float32(action_space.low), np.float32(action_space.high)
        self.layers = []  # arrays, five times as fast; for other activations torch acts
        if activation == "ReLU" and not how["use_sde"]:
            linear = [m for m in self.mean.modules() if isinstance(m, nn.Linear)]
            self.layers = [(m.weight.T.numpy(), m.bias.numpy()) for m in linear]

    def __str__(self):
        return f"{self.path} (critics {'evaluated' if self.evaluated else 'as SAC left them'})"

    def __getstate__(self):
        """What goes to a roll-in worker, which only acts."""
        return self.__dict__ | dict(critic=None, mean=None if self.layers else self.mean)

    @torch.inference_mode()
    def predict(self, state: np.ndarray) -> np.ndarray:
        """The deterministic action, in the environment's units, of a state or many."""
        x = state
        for weight, bias in self.layers[:-1]:
            x = np.maximum(x @ weight + bias, 0)
        if self.layers:
            x = x @ self.layers[-1][0] + self.layers[-1][1]
        else:
            x = self.mean(torch.from_numpy(x)).numpy()
        return self.low + 0.5 * (np.tanh(x) + 1) * (self.high - self.low)

    @torch.no_grad()
    def critics(self, state, action):
        """Q_i(s, a) (..., number of critics)."""
        low, high = torch.tensor(np.array([self.low, self.high]), device=action.device)
        scaled = 2 * (action - low) / (high - low) - 1  # the critics know no other units
        x = torch.cat([state, scaled], dim=-1)
        return torch.cat([q(x) for q in self.critic.q_networks], dim=-1)

    def q_star(self, state, action):
        """Q*(s, a) (N, 1): the smaller critic, as SAC's own target takes it."""
        return self.critics(state, action).amin(dim=-1, keepdim=True)


# == 4. Roll-in (line 4 of the paper) ==================================================
@dataclass(frozen=True)
class Trajectory:
    """What one environment showed until it ended or `horizon` steps were over."""

    states: np.ndarray  # (T, state_dim), float32
    actions: np.ndarray  # (T, action_dim), float32, in the environment's units
    rewards: np.ndarray  # (T,)


def returns_of(trajectories: list[Trajectory]) -> np.ndarray:
    """Sums of rewards, (trajectories,)."""
    return np.array([t.rewards.sum() for t in trajectories])


def make_env(env_name: str, **kwargs) -> gym.Env:
    """The environment; UserError unless it exists with 1-D Boxes and bounded actions."""
    errors = gym.error.Error, ImportError, TypeError, ValueError
    with user_error_if(errors, f"{env_name!r} cannot be made; check env_name, env_kwargs"):
        env = gym.make(env_name, disable_env_checker=True, **kwargs)
    seen, acts = env.observation_space, env.action_space
    vectors = all(isinstance(x, gym.spaces.Box) and len(x.shape) == 1 for x in (seen, acts))
    if not vectors or not acts.is_bounded():
        raise UserError(f"{env_name} has {seen} and {acts}; both must be vectors, actions bounded.")
    return env


def terrain_seed(rng: np.random.Generator) -> int:
    """The environment's seed: the first number of a random stream."""
    return int(rng.integers(2**31))


def roll_in(players: bytes, env_name, env_kwargs, alpha, noise_scale, horizon, stream):
    """One Trajectory of the mixture; the stream seeds its terrain, mixture and noise."""
    learner, expert = pickle.loads(players)
    env = make_env(env_name, **env_kwargs)  # Box2D's worlds keep traces over a reset
    space, rng = env.action_space, np.random.default_rng(stream)
    observation, _ = env.reset(seed=terrain_seed(rng))
    steps = []
    for _ in range(horizon):
        state = np.asarray(observation, dtype=np.float32)
        if not np.isfinite(state).all():
            raise UserError(f"{env_name} gave a NaN or infinite observation; mend it.")
        if rng.random() < alpha:  # the mixture
            action = expert.predict(state)
        else:
            action = learner.act(state, noise_scale * rng.standard_normal(space.shape))
        legal = action.clip(space.low, space.high).astype(space.dtype)  # rounding may overshoot
        observation, reward, terminated, truncated, _ = env.step(legal)
        steps.append((state, action, np.asarray(reward).item()))
        if terminated or truncated:
            break
    env.close()
    return Trajectory(*(np.array(column) for column in zip(*steps, strict=True)))


def start_worker() -> None:
    """What a roll-in process does first; it ends with its parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork inherits the parent's handler
    torch.set_num_threads(1)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


# == 5. The family: what its members make likelier, and how much =======================
def normalize_q_star(q_star):
    """Q*, shifted and scaled to [0, 1]."""
    return (q_star - q_star.min()) / (q_star.max() - q_star.min() + 1e-8)


def expert_action(agent, state):
    """a* = pi*(s), the deterministic action (N, action_dim)."""
    return torch.from_numpy(agent.expert.predict(state.cpu().numpy())).to(agent.device)


def improved_action(agent, state):
    """The mean of M candidates around a*, weighed by softmax(A / tau), (N, action_dim).

    The weights are those of MPO's E-step (Abdolmaleki et al. 2018), with the expert as
    the proposal.  A is the smallest of all critics' Q_i(s, a) - Q_i(s, a*): they must
    agree that a candidate is better.  Critics as SAC left them improve nothing.
    """
    c, improved, a_star = agent.config, [], expert_action(agent, state)
    if c.candidates == 1 or not agent.expert.evaluated:
        return a_star
    for s, a in zip(state.split(128), a_star.split(128), strict=True):  # for the CPU's cache
        noise = c.candidate_noise * torch.randn(c.candidates, *a.shape).to(agent.device)
        noise[0] = 0  # the first candidate is a* itself
        action = agent.policy.clip_to_range(a + agent.policy.scale * noise, 1.0)
        q = agent.expert.critics(s.expand(c.candidates, -1, -1), action)
        advantage = (q - q[0]).amin(dim=2, keepdim=True)  # (M, n, critics) -> (M, n, 1)
        weight = torch.softmax(advantage / c.temperature, dim=0)
        improved.append((weight * action).sum(dim=0))
    return torch.cat(improved)


# Each of these gives (states, what to make likelier there, its weight (N, 1)).
def imitate(agent, data):
    """The target, which is the expert's action, everywhere alike."""
    target = agent.policy.clip_to_range(data["target"])
    return data["state"], target, torch.ones_like(data["q_target"])


def imitate_by_gap(agent, data, action=None):
    """The target by w = min(1 + gap_factor * gap / mean(gap), gap_cut).

    gap = max(0, Q*(s, target) - Q*(s, action)): what `action`, by default the learner's own
    mean action, costs.
    """
    c = agent.config
    gap = (data["q_target"] - agent.get_q_star(data["state"], action)).clamp(min=0)
    mean = gap.mean().clamp(min=1e-4)  # less is rounding
    weight = (1 + c.gap_factor * gap / mean).clamp(max=c.gap_cut)
    return data["state"], agent.policy.clip_to_range(data["target"]), weight


def imitate_by_executed_gap(agent, data):
    """The target by what the executed action cost: a stand-in for AggreVaTe."""
    return imitate_by_gap(agent, data, data["action"])


@torch.no_grad()  # the samples are data; pathwise gradients would be another estimator
def score_function(agent, data):
    """The paper's gradient: two of the learner's samples a state, by Q* less the pair's mean.

    On-policy in a first natural step or minibatch; later ones have moved theta since.
    """
    state = data["state"].repeat(2, 1)
    action = agent.policy.sample(state)
    q = agent.get_q_star(state, action).view(2, -1, 1)  # (sample, state, 1)
    advantage = (q - q.mean(dim=0)).view(-1, 1)
    advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
    return state, action, advantage.clamp(-5, 5)  # one state cannot outweigh a minibatch


def min_max(agent, data):
    """The executed action by its own Q*: no weight is negative, bad ones are repeated too."""
    weight = normalize_q_star(agent.get_q_star(data["state"], data["action"]))
    return data["state"], agent.policy.clip_to_range(data["action"]), weight


@dataclass(frozen=True)
class Member:
    """All that makes one algorithm of the family differ from another."""

    last_alpha: float  # the expert's share of the roll-in, which falls from 1 to this
    # True: all iterations' data, of which states are drawn in proportion to their weights;
    # False: this iteration's alone, and the weights, of either sign, multiply the loss
    keeps_data: bool
    target: Callable  # (agent, states) -> data["target"], which the last two do not use
    targets_and_weights: Callable  # (agent, data) -> states, targets, weights


FAMILY = {
    "bc": Member(1.0, True, expert_action, imitate),
    "dagger": Member(0.0, True, expert_action, imitate),
    "aggrevate": Member(0.0, True, expert_action, imitate_by_executed_gap),
    "aggrevated": Member(0.0, True, improved_action, imitate_by_gap),
    "score": Member(0.0, False, expert_action, score_function),
    "minmax": Member(0.0, False, expert_action, min_max),
}


# == 6. The natural step (section 5.2) =================================================
FISHER_STATES = 10_000  # enough for the Fisher matrix
CG_ITERATIONS, DAMPING, HALVINGS = 10, 0.1, 10  # the first author's


def mean_kl(old, new) -> torch.Tensor:
    """Mean KL(old || new) of Gaussians (mean, std), the same after the tanh."""
    return kl_divergence(Normal(*old), Normal(*new)).sum(dim=1).mean()


def conjugate_gradient(A: Callable, b) -> torch.Tensor:
    """An approximate x with A(x) = b, for a symmetric positive definite product A."""
    x, r, p = torch.zeros_like(b), b, b
    for _ in range(CG_ITERATIONS):
        rr, Ap = r @ r, A(p)
        if rr < 1e-20:  # solved
            break
        step = rr / (p @ Ap)
        x = x + step * p
        r = r - step * Ap
        p = r + (r @ r) / rr * p
    return x


def natural_step(policy, loss_of: Callable, state, kl_step: float):
    """Step along -I(theta)^-1 grad to a KL of kl_step; the loss before it."""
    parameters, loss = list(policy.parameters()), loss_of()
    gradient = parameters_to_vector(torch.autograd.grad(loss, parameters))
    new = policy(state[:FISHER_STATES])
    kl = mean_kl([x.detach() for x in new], new)  # its Hessian at theta is I(theta)
    slope = parameters_to_vector(torch.autograd.grad(kl, parameters, create_graph=True))

    def fisher(v):  # (I(theta) + damping) v
        product = torch.autograd.grad(slope @ v, parameters, retain_graph=True)
        return parameters_to_vector(product) + DAMPING * v

    step = conjugate_gradient(fisher, -gradient)
    curvature = (step @ fisher(step)).clamp(min=1e-12)
    step *= (2 * kl_step / curvature).sqrt()  # KL is about step' I step / 2
    with torch.no_grad():  # halve it until the KL is right and the loss falls
        old, start = policy(state), parameters_to_vector(parameters)
        for halving in range(HALVINGS):
            vector_to_parameters(start + 0.5**halving * step, parameters)
            small = mean_kl(old, policy(state)) <= 1.5 * kl_step  # it is quadratic only nearly
            if small and loss_of() < loss:
                return loss.detach()
        vector_to_parameters(start, parameters)  # or take none
    return loss.detach()


# == 7. The agent ======================================================================
MAX_GRADIENT_NORM = 10.0  # a saturated action's log-probability has huge gradients


class AggreVateDAgent:
    """Learner, expert, optimiser and data of one run; `train` is Algorithm 1."""

    def __init__(self, config: Config, start: dict | None = None, resume=False):
        self.config = c = config.check()
        self.member = FAMILY[c.algorithm]
        torch.set_num_threads(1)  # until the workers are forked
        cuda = torch.cuda.is_available() and c.device == "auto"
        self.device = torch.device("cuda" if cuda else "cpu")
        torch.use_deterministic_algorithms(cuda, warn_only=True)
        torch.manual_seed(c.seed)
        env, name = make_env(c.env_name, **c.env_kwargs), c.env_name.split(":")[-1]
        self.horizon = env.spec.max_episode_steps or c.H  # of an evaluation [steps]
        self.threshold = env.spec.reward_threshold  # from where on it is solved, or None
        home = Path(__file__).resolve().parent
        given = Path(c.expert_path or home / f"rl-trained-agents/sac/{name}_1/{name}.zip")
        path = given if given.exists() else home / given  # wherever one stands
        spaces = env.observation_space, env.action_space
        self.expert = SACExpert(path, *spaces, self.device)
        self.policy = PolicyNetwork(*spaces, c.hidden_dim).to(self.device)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), fused=True)
        self.experience: dict[str, torch.Tensor] = {}  # newest transitions (N, ...)
        self.iteration = self.env_steps = 0
        self.seconds = 0.0  # of training
        self.evaluations: list[dict] = []  # the expert's, then the learner's
        if start:
            self.load(start, resume)
        # a fork needs no imports; Linux alone has a safe one, before torch has threads
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self.pool = ProcessPoolExecutor(c.n_workers, context, start_worker)
        if c.n_workers > 1:
            self.pool.submit(int)  # any job starts all workers
        torch.set_num_threads(c.n_workers)

    def close(self) -> None:
        """End the workers, after the trajectories that they are at."""
        self.pool.shutdown(cancel_futures=True)

    def simulate(self, streams: list, alpha, noise_scale, horizon, bar=None):
        """A list of `roll_in`'s trajectories, one a stream, played by all workers."""
        c = self.config
        # pickled once for all; torch would send an expert's tensors as shared memory
        players = pickle.dumps((NumpyPolicy(self.policy.state_dict()), self.expert))
        play = partial(roll_in, players, c.env_name, c.env_kwargs, alpha, noise_scale, horizon)
        run = self.pool.map if c.n_workers > 1 else map  # a single one: this process
        with user_error_if(BrokenExecutor, "A worker was killed; set fewer --n_workers"):
            return list(tqdm(run(play, streams), bar, total=len(streams), disable=bar is None))

    @torch.no_grad()
    def get_q_star(self, state, action=None):
        """Q*(s, a) (N, 1), of the learner's mean action if none is given."""
        states = state.split(2048)  # pieces stay in the CPU's cache
        actions = map(self.policy.predict, states) if action is None else action.split(2048)
        q = torch.cat(list(map(self.expert.q_star, states, actions)))
        if not q.isfinite().all():
            raise UserError("Q* is NaN or infinite on a visited state; use another expert.")
        return q

    @torch.no_grad()
    def label(self, trajectories: list[Trajectory]) -> dict[str, torch.Tensor]:
        """What was done, and what is to be imitated, in all visited states: (N, ...)."""
        state = torch.from_numpy(np.concatenate([t.states for t in trajectories])).to(self.device)
        action = torch.from_numpy(np.concatenate([t.actions for t in trajectories])).to(self.device)
        target = self.member.target(self, state)  # the expert's action, perhaps improved
        q = self.get_q_star(state, target)
        return dict(state=state, action=action, target=target, q_target=q)

    def keep(self, new: dict[str, torch.Tensor]) -> None:
        """Append the new data and drop the oldest, or replace all of them."""
        old = self.experience if self.member.keeps_data else {}
        n = self.config.max_experience_len
        self.experience = {k: torch.cat([old.get(k, x[:0]), x])[-n:] for k, x in new.items()}

    def loss(self, state, target, weight):
        """-mean(w log pi(target | s)); (N, 1) * (N, 1)."""
        return -(weight * self.policy.get_log_prob(state, target)).mean()

    def update(self, state, target, weight) -> float:
        """Step theta by `update_sz` drawn transitions (line 5); the mean loss."""
        c = self.config
        if self.member.keeps_data:
            probability = weight[:, 0].double().cpu()  # less noise than weights in the loss
            drawn = torch.multinomial(probability, c.update_sz, replacement=True)
            weight = torch.ones_like(weight)  # each draw counts the same
        else:  # weights with signs stay in the loss
            drawn = torch.randperm(len(weight))[: c.update_sz]
        data = [x[drawn.to(self.device)] for x in (state, target, weight)]
        step = self.natural_steps if c.optimizer == "natural" else self.adam_passes
        loss = torch.stack(step(*data)).mean().item()
        if not math.isfinite(loss):
            raise UserError("The loss became NaN or infinite; lower --lr and start again.")
        return loss

    def adam_passes(self, *data) -> list[torch.Tensor]:
        """`train_repeat` passes in minibatches; the step size falls to 0 over them."""
        c, losses = self.config, []
        n = len(data[0])
        n_batches = c.train_repeat * math.ceil(n / c.batch_sz)
        for _ in range(c.train_repeat):
            for rows in torch.randperm(n).to(self.device).split(c.batch_sz):
                self.optimizer.param_groups[0]["lr"] = c.lr * (1 - len(losses) / n_batches)
                loss = self.loss(*(x[rows] for x in data))
                losses.append(loss.detach())
                self.optimizer.zero_grad()
                loss.backward()
                clip_grad_norm_(self.policy.parameters(), MAX_GRADIENT_NORM)
                self.optimizer.step()
        return losses

    def natural_steps(self, *data) -> list[torch.Tensor]:
        """`train_repeat` natural steps on all that was drawn."""
        c, loss_of = self.config, partial(self.loss, *data)
        repeats = range(c.train_repeat)
        return [natural_step(self.policy, loss_of, data[0], c.kl_step) for _ in repeats]

    def evaluate(self, who="learner", n_episodes=None, stream=VALIDATION, bar=None):
        """Trajectories of "learner" or "expert", mean actions, on the same terrains."""
        streams = [(stream, i) for i in range(n_episodes or self.config.eval_episodes)]
        return self.simulate(streams, float(who == "expert"), 0.0, self.horizon, bar)

    def record(self, who: str, n_episodes: int) -> np.ndarray:
        """Returns (n_episodes,) of a new evaluation, which is kept."""
        returns = returns_of(self.evaluate(who, n_episodes))
        self.evaluations.append(self.now() | dict(policy=who, returns=returns.tolist()))
        return returns

    def is_best(self) -> bool:
        """Whether this iterate is within two errors of the one with the highest mean.

        Differences and their errors are paired, on the same terrains: the highest mean of
        20 episodes is often luck.  Short evaluations count only while there is no other.
        """
        returns = [np.array(e["returns"]) for e in self.evaluations[1:]]
        whole = [x for x in returns if len(x) == self.config.eval_episodes]
        if len(returns[-1]) < self.config.eval_episodes:
            return not whole
        difference = max(whole, key=np.mean) - returns[-1]
        error = standard_error(difference)
        return bool(math.isnan(error) or difference.mean() <= 2 * error)

    def validate(self, run_dir: Path, whole: bool) -> tuple[np.ndarray, np.ndarray]:
        """Returns of learner and expert on the same terrains; saves best.pt (line 7)."""
        episodes, solved = self.config.eval_episodes, self.threshold
        if not self.evaluations:
            expert = self.record("expert", episodes)
            if solved and expert.mean() < solved - abs(solved) / 2:
                mend = "is it of this task, trained without a wrapper (VecNormalize)?"
                tqdm.write(f"warning: the expert is poor, {solved:g} is solved; {mend}")
        learner = self.record("learner", episodes if whole else math.ceil(episodes / 4))
        expert = np.array(self.evaluations[0]["returns"][: len(learner)])
        (run_dir / "evaluations.json").write_text(json.dumps(self.evaluations))
        if self.is_best():  # the latest one stays
            self.save(run_dir / "best.pt", score=float(learner.mean()))
        tqdm.write(progress(**self.now(), learner=learner, expert=expert, threshold=solved))
        return learner, expert

    def now(self) -> dict:
        """How far the run is."""
        return dict(iteration=self.iteration, env_steps=self.env_steps, seconds=self.seconds)

    def save(self, path: Path, **more) -> None:
        """Write a checkpoint and then rename it: a kill leaves the last one."""
        state = dict(format=FORMAT, config=asdict(self.config), policy=self.policy.state_dict())
        with user_error_if((OSError, RuntimeError), f"{path} cannot be written"):
            torch.save(state | self.now() | more, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)

    def save_last(self, run_dir: Path) -> None:
        """last.pt: all that resuming needs."""
        more = dict(optimizer=self.optimizer.state_dict(), experience=self.experience)
        self.save(run_dir / "last.pt", **more, evaluations=self.evaluations)

    def load(self, state: dict, resume: bool) -> None:
        """Take a checkpoint's policy, or all to resume; UserError if it does not fit."""
        mend = "The checkpoint does not fit; check --hidden_dim and --env_name"
        with user_error_if((RuntimeError, KeyError), mend):
            self.policy.load_state_dict(state["policy"])
            if resume:
                self.optimizer.load_state_dict(state["optimizer"])
                self.experience = {k: x.to(self.device) for k, x in state["experience"].items()}
                self.iteration, self.env_steps = state["iteration"], state["env_steps"]
                self.seconds, self.evaluations = state["seconds"], state["evaluations"]

    # == 8. Algorithm 1 ================================================================
    def train(self, run_dir: Path) -> None:
        """Algorithm 1, from the iteration after the last one that was saved."""
        c, first = self.config, self.iteration + 1
        writer, expert_writer = open_logs(run_dir, c, first)
        for n in tqdm(range(first, c.max_iteration + 1), unit="iteration"):
            started = time.perf_counter()
            torch.manual_seed(int(np.random.default_rng((UPDATE, c.seed, n)).integers(2**62)))
            alpha = max(self.member.last_alpha, 1.0 - (n - 1) / c.alpha_decay_iterations)
            streams = [(ROLL_IN, c.seed, n, k) for k in range(c.K)]
            trajectories = self.simulate(streams, alpha, c.roll_in_noise, c.H)
            new = self.label(trajectories)
            if n == 1 and not c.init_path:
                self.policy.standardise_inputs(new["state"])
            gap = new["q_target"] - self.get_q_star(new["state"])  # for the log
            self.keep(new)
            states, targets, weights = self.member.targets_and_weights(self, self.experience)
            loss = self.update(states, targets, weights)
            self.iteration, self.env_steps = n, self.env_steps + len(new["state"])
            self.seconds += time.perf_counter() - started
            scalars = {
                "train/loss": loss,
                "train/alpha": alpha,
                "train/q_gap": gap.cpu().numpy(),
                "rollout/episode_reward": returns_of(trajectories),
                "time/env_steps": self.env_steps,
                "time/seconds": self.seconds,
            }
            log(writer, n, scalars)
            whole = n % c.eval_every == 0 or n == c.max_iteration
            if whole or n <= EARLY:
                learner, expert = self.validate(run_dir, whole)
                log(writer, n, {"eval/episode_reward": learner})
                log(expert_writer, n, {"eval/episode_reward": expert})
            self.save_last(run_dir)


# == 9. Logs and files =================================================================
def standard_error(x: np.ndarray) -> float:
    """Of the mean; NaN for a single number."""
    return x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else math.nan


def describe(returns: np.ndarray, threshold=None) -> str:
    """Mean return ± its standard error, and the share that reaches the threshold."""
    text = f"{returns.mean():7.1f}"
    if len(returns) > 1:
        text += f" ± {standard_error(returns):.1f}"
    if threshold is not None:
        text += f", {(returns >= threshold).mean():4.0%} solved"
    return text


def progress(iteration, env_steps, seconds, learner, expert, threshold) -> str:
    """A line on an evaluation, from returns on the same terrains."""
    now = f"iteration {iteration:3d} {env_steps:8d} steps {seconds:5.0f} s"
    its = f"{expert.mean():.1f} ({len(expert)} episodes)"
    return f"{now}  learner {describe(learner, threshold)}  expert {its}"


def log(writer: SummaryWriter, n: int, scalars: dict) -> None:
    """Points at iteration n; of arrays, their means."""
    for tag, value in scalars.items():
        writer.add_scalar(tag, np.mean(value), n)
    writer.flush()


def open_logs(run_dir: Path, config: Config, first: int):
    """TensorBoard's writers: the learner's, and below it the expert's own run."""
    settings = asdict(config)
    (run_dir / "config.json").write_text(json.dumps(settings, indent=1))
    writer = SummaryWriter(run_dir, purge_step=first)
    if first == 1:
        writer.add_text("config", "\n".join(f"- {k}: {v}" for k, v in settings.items()))
        settings["env_kwargs"] = str(config.env_kwargs)
        for summary in hparams(settings, {"eval/episode_reward": 0.0}):
            writer.file_writer.add_summary(summary)
    return writer, SummaryWriter(run_dir / "expert", purge_step=first)


def make_run_dir(c: Config) -> Path:
    """A fresh folder below log_dir; UserError if it cannot be made."""
    env = c.env_name.split(":")[-1].replace("/", "-")
    now = datetime.now().strftime("%Y%m%d_%H%M%S_%f")[:-3]  # milliseconds
    run_dir = Path(c.log_dir) / f"{c.algorithm}_{env}_s{c.seed}_{now}"
    with user_error_if(OSError, "The run folder cannot be written; set --log_dir"):
        run_dir.mkdir(parents=True)
    return run_dir


def load_checkpoint(path) -> dict:
    """The checkpoint in a file, or a folder's best.pt; no code is run; or a UserError."""
    path = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
    mend = "is missing, damaged or of another program; give another"
    with user_error_if(BAD_FILE, f"{path} {mend}"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum differs")
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']}, not {FORMAT}: train anew")
        state["config"] = Config(**state["config"])
    return state


def load_policy(path) -> NumpyPolicy:
    """The policy of a run folder (its best iterate) or file, with SB3's `predict`."""
    return NumpyPolicy(load_checkpoint(path)["policy"])


# == 10. Command line ==================================================================
MAY_CHANGE = {  # with an old run; its expert may have been moved
    "resume": ("max_iteration", "n_workers", "device", "expert_path"),
    "evaluate": ("eval_episodes", "env_name", "env_kwargs", "n_workers", "device", "expert_path"),
}


def JSON(text: str) -> dict:  # the name stands in argparse's sentence
    return json.loads(text)


def parse(argv: list[str]) -> dict:
    """The options that were given; a wrong one ends in a sentence and exit status 2."""
    how = dict(usage="%(prog)s [options]", argument_default=argparse.SUPPRESS)
    parser = argparse.ArgumentParser(allow_abbrev=False, **how)
    old = parser.add_mutually_exclusive_group()
    old.add_argument("--resume", metavar="RUN", help="folder of a run to go on with")
    old.add_argument("--evaluate", metavar="RUN", help="run folder or policy file to score")
    types = {int: float, dict: JSON}  # 3e5 is a whole number: see `check`
    for f in fields(Config):
        default, kind = getattr(Config(), f.name), types.get(f.type, f.type)
        shown = "" if default in ("", {}) else f" (default: {default})"
        parser.add_argument(f"--{f.name}", type=kind, help=f.metadata.get("note", "") + shown)
    return vars(parser.parse_args(argv))


def open_agent(options: dict) -> AggreVateDAgent:
    """The agent of a new run, of one to go on with, or of one to score."""
    mode = next((m for m in MAY_CHANGE if m in options), None)
    changes = {k: v for k, v in options.items() if k != mode}
    if mode is None:
        config = Config(**changes).check()
        start = load_checkpoint(config.init_path) if config.init_path else None
        return AggreVateDAgent(config, start)
    path = Path(options[mode]) / "last.pt" if mode == "resume" else options[mode]
    state = load_checkpoint(path)
    old = state["config"]
    for name in sorted(changes.keys() - MAY_CHANGE[mode]):
        if changes[name] != getattr(old, name):
            can = ", ".join(MAY_CHANGE[mode])
            raise UserError(f"--{name} cannot change with --{mode}; what can: {can}.")
    # logs.RUN.x:Task would import x.py of the run's folder, which may be a stranger's
    if "." in old.env_name.rpartition(":")[0] and "env_name" not in changes:
        raise UserError(f"It imports {old.env_name}: if you trust that, give it as --env_name.")
    config = replace(old, **changes)
    if mode == "resume" and state["iteration"] >= config.max_iteration:
        raise UserError(f"{path} has all its iterations; --max_iteration makes more.")
    agent = AggreVateDAgent(config, state, mode == "resume")
    agent.iteration = state["iteration"]  # to say what is scored
    return agent


def print_scores(agent: AggreVateDAgent, path: str) -> None:
    """Learner and expert, by their mean actions, on the same test terrains."""
    c, returns = agent.config, {}
    print(f"{path}, iteration {agent.iteration}: {c.algorithm} on {c.env_name}")
    print(f"expert {agent.expert}")
    print(f"means of {c.eval_episodes} test episodes ± standard error")
    for who in ("learner", "expert"):
        returns[who] = returns_of(agent.evaluate(who, stream=TEST, bar=who))
        print(f"{who:10s} {describe(returns[who], agent.threshold)}")
    print(f"difference {describe(returns['learner'] - returns['expert'])}")


def handle_signals(handler) -> None:
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)


def interrupt(*_) -> None:
    """Ctrl-C or a kill: stop in good order; the next one, at once."""
    handle_signals(lambda *_: os._exit(130))
    raise KeyboardInterrupt


def main(argv=None) -> int:
    """Run the command line; exit status 2 after an error, 130 after an interruption."""
    options = parse(sys.argv[1:] if argv is None else argv)
    agent, run_dir = None, options.get("resume")
    command = f"python {shlex.quote(sys.argv[0])}"
    try:
        agent = open_agent(options)
        if "evaluate" in options:
            print_scores(agent, options["evaluate"])
            return 0
        run_dir = Path(run_dir) if run_dir else make_run_dir(agent.config)
        c = agent.config
        print(f"AggreVaTeD ({c.algorithm}) on {c.env_name}, seed {c.seed}, {agent.device}")
        print(f"torch {torch.__version__}, gymnasium {gym.__version__}, numpy {np.__version__}")
        print(f"expert {agent.expert}")
        print(f"run    {run_dir}\nwatch  tensorboard --logdir {shlex.quote(str(run_dir.parent))}")
        agent.save_last(run_dir)  # to be resumed even from the first iteration
        agent.train(run_dir)
        print(f"score  {command} --evaluate {shlex.quote(str(run_dir))}")
        return 0
    except KeyboardInterrupt:
        go_on = f"Go on: {command} --resume {shlex.quote(str(run_dir))}"
        print("\nStopped.", go_on if run_dir else "")
        return 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if agent:
            agent.close()


if __name__ == "__main__":
    handle_signals(interrupt)
    sys.exit(main())
