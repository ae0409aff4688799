"""Deeply AggreVaTeD (Sun et al., ICML 2017, arXiv 1703.01030) on BipedalWalkerHardcore-v3.

A tanh-Gaussian learner imitates a Stable-Baselines3 SAC agent, whose critics supply the expert's
cost-to-go Q*.  Rewards are maximised here where the paper minimises costs.

    python aggrevated.py                          train with the defaults
    python aggrevated.py --seed 3 --K 20          every Config field is an option
    python aggrevated.py --resume logs/RUN        go on where a run was stopped
    python aggrevated.py --evaluate logs/RUN      score its best policy on fresh episodes

The paper's Algorithm 1 in the names of this file, which lays them out from top to bottom:

    for n = 1 .. max_iteration:            iterate(n)
        alpha = decay_alpha(n)             1, falling linearly to 0
        trajectories = simulate(...)       K of the mixture, at most H steps each
        label(trajectories)                the expert's action in every state, and its Q*
        update(n)                          climbs mean_s[ w(s) log pi(target | s) ]
        validate(run_dir)                  now and then: keeps the best iterate

The default's target is the expert's action, its weight what Q* says the learner's own action would
cost there: a regression that needs few steps.  `--algorithm score` is the paper's own gradient.
"""

import argparse
import copy
import csv
import json
import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's: a roll-in worker has one core
import gymnasium as gym
import numpy as np
import torch
from PIL import Image
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.sac.policies import SACPolicy
from torch import nn
from torch.distributions import Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import AffineTransform, TanhTransform
from torch.nn.functional import gelu
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Normal.set_default_validate_args(False)  # `update` finds what is not finite
# Every random stream is a pure function of (purpose, seed, counters): evaluating more often cannot
# disturb training, and a resumed run needs no generator states.  No setting was chosen by TEST.
ROLL_IN, UPDATE, VALIDATION, TEST = 0, 1, 3, 15


class UserError(Exception):
    """What a user can mend; the message is one sentence that says how."""


@contextmanager
def mend(sentence: str):
    """Whatever goes wrong inside becomes a UserError that says so and names the mend."""
    try:
        yield
    except Exception as error:  # a foreign or damaged file raises a dozen types
        raise UserError(f"{sentence} ({error!r:.150}).") from None


# == 1. Config: every setting ====================================================================
ALGORITHMS = "bc", "dagger", "aggrevate", "aggrevated", "score", "minmax", "reinforce"


def option(default, note: str, low=-math.inf, high=math.inf, choices=None):
    """A Config field with its note (unit, why, sensible range) and its legal values."""
    return field(default=default, metadata=dict(note=note, low=low, high=high, choices=choices))


@dataclass
class Config:
    """Every setting; each field is a command-line option too."""

    env_name: str = option("BipedalWalkerHardcore-v3", "Gymnasium id; bounded Box actions")
    expert_path: str = option("", "SAC zip; none: rl-trained-agents/sac/{env}_1/{env}.zip")
    algorithm: str = option("aggrevated", "score: the paper's own; see weigh", choices=ALGORITHMS)
    optimizer: str = option("adam", "natural: one natural step a pass", choices=("adam", "natural"))
    init_path: str = option("", "checkpoint whose policy to start from; none: start at random")
    seed: int = option(0, "of everything random", 0, 2**32)
    device: str = option("auto", "of the update: CUDA if there is one", choices=("auto", "cpu"))
    n_workers: int = option(2, "processes that simulate, and threads of the update", 1, 64)
    max_iteration: int = option(15, "N of Algorithm 1; 10 to 100", low=1)
    alpha_decay_iterations: int = option(4, "iterations until alpha is 0; 3 to 60", low=1)
    K: int = option(10, "trajectories per iteration; 5 to 100", low=1)
    H: int = option(2000, "longest trajectory [steps]; the task's own limit is 2000", low=1)
    roll_in_noise: float = option(1.0, "scale of the learner's noise in roll-ins; 0 to 1", 0, 10)
    max_experience_len: int = option(300_000, "newest transitions that are kept", low=1)
    hidden_dim: int = option(128, "units in each of the two hidden layers; 64 to 512", low=1)
    lr: float = option(1e-2, "Adam's first step size of an update; falls to 0 in it", 1e-12, 1)
    update_sz: int = option(150_000, "transitions drawn for an update; 50k to 300k", low=1)
    batch_sz: int = option(1024, "transitions per minibatch; 128 to 1024", low=1)
    train_repeat: int = option(1, "passes over the drawn transitions; 1 to 10", low=1)
    gap_factor: float = option(3.0, "weight of the normalised gap beside 1; 1 to 10", 0, 1e6)
    gap_cut: float = option(20.0, "largest weight before normalisation; 5 to 50", 1, 1e6)
    kl_step: float = option(0.01, "natural: KL between old and new policy [nats]", 1e-12, 10)
    gamma: float = option(0.0, "discount of REINFORCE; 0: the one that Q* has", 0, 1)
    eval_every: int = option(5, "iterations between evaluations; training does not notice", low=1)
    eval_episodes: int = option(20, "episodes per evaluation; 10 to 500", low=1)
    log_dir: str = option("logs", "parent of the run folders")

    def check(self) -> "Config":
        """Raise UserError unless every number is in its range; name the expert."""
        for f in fields(self):
            value, m = getattr(self, f.name), f.metadata
            if f.type is not str and not m["low"] <= value <= m["high"]:
                raise UserError(f"{f.name} is {value}; give {m['low']} to {m['high']}.")
            if m["choices"] and value not in m["choices"]:
                raise UserError(f"{f.name} is {value!r}; give one of {', '.join(m['choices'])}.")
        zoo = "rl-trained-agents/sac/{0}_1/{0}.zip"  # the RL Zoo's layout
        self.expert_path = self.expert_path or zoo.format(self.env_name)
        return self


# == 2. The learner: a tanh-Gaussian policy on any bounded Box ===================================
class PolicyNetwork(nn.Module):
    """a = offset + scale * tanh(u), u ~ N(mean(s), std(s)).

    States are (N, state_dim), actions (N, action_dim) in the environment's units and
    log-probabilities (N, 1), with respect to those units.
    """

    log_std_min, log_std_max = -2.0, -1.0  # lower: gradients explode; higher: noisy roll-ins

    def __init__(self, observation_space, action_space, hidden_dim):
        super().__init__()
        low, high = torch.as_tensor(action_space.low), torch.as_tensor(action_space.high)
        state_dim = observation_space.shape[0]
        self.fc1 = nn.Linear(state_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, hidden_dim)
        self.mean = nn.Linear(hidden_dim, len(low))
        self.log_std = nn.Linear(hidden_dim, len(low))
        self.register_buffer("scale", (high - low) / 2, persistent=False)
        self.register_buffer("offset", (high + low) / 2, persistent=False)
        self.register_buffer("state_mean", torch.zeros(state_dim))
        self.register_buffer("state_std", torch.ones(state_dim))

    def forward(self, state):
        """Mean and standard deviation (N, action_dim) of u, before the tanh."""
        x = gelu(self.fc1((state - self.state_mean) / self.state_std))
        x = gelu(self.fc2(x))  # with relu the same fit takes twice the updates
        share = torch.sigmoid(self.log_std(x))  # unlike a clamp's, its gradient never dies
        log_std = self.log_std_min + share * (self.log_std_max - self.log_std_min)
        return self.mean(x), log_std.exp()

    def predict(self, state):
        """The deterministic action: the mean, squashed."""
        return self.offset + self.scale * torch.tanh(self(state)[0])

    def distribution(self, state) -> TransformedDistribution:
        """pi(. | state); its caches spare a sample's log-probability the atanh."""
        u, into_range = Normal(*self(state)), AffineTransform(self.offset, self.scale, cache_size=1)
        return TransformedDistribution(u, [TanhTransform(cache_size=1), into_range])

    def sample(self, state):
        """A reparameterised sample and its log-probability."""
        pi = self.distribution(state)
        action = pi.rsample()
        return action, pi.log_prob(action).sum(dim=1, keepdim=True)

    def get_log_prob(self, state, action):
        """log pi(action | state)."""
        return self.distribution(state).log_prob(self.inside(action, 1 - 1e-6)).sum(1, keepdim=True)

    def inside(self, action, share=0.99):
        """Actions cut to this share of the range: at its ends, where experts act, atanh is inf."""
        return action.clamp(self.offset - share * self.scale, self.offset + share * self.scale)

    @torch.inference_mode()
    def act(self, state: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """The action of u = mean + std * noise, from arrays, on the CPU: what the roll-in calls."""
        mean, std = self(torch.from_numpy(state))
        return (self.offset + self.scale * torch.tanh(mean + std * torch.from_numpy(noise))).numpy()


# == 3. The expert: a SAC agent whose twin critics are Q* ========================================
def sizes(weights: dict, prefix: str) -> list[int]:
    """Output sizes of the linear layers under a prefix, in order."""
    return [len(w) for k, w in weights.items() if k.startswith(prefix) and w.ndim == 2]


class SACExpert:
    """A frozen SB3 SAC agent: its mean action, and Q*(s, a) = min over its critics.

    Q* is what SAC learned: discounted by SAC's gamma, entropy bonus and all.
    Raises UserError if the file is not a SAC zip or does not fit the spaces.  Nothing in it can run
    code: SB3 reads the weights by torch's `weights_only`, and the rest is plain JSON.
    """

    def __init__(self, path, observation_space, action_space, device="cpu"):
        with mend(f"{path} is no SB3 SAC agent for this environment; set another --expert_path"):
            weights = load_from_zip_file(path, load_data=False, device="cpu")[1]["policy"]
            with zipfile.ZipFile(path) as archive:
                data = json.loads(archive.read("data"))
            kwargs = data.get("policy_kwargs") or {}
            activation = str(kwargs.get("activation_fn", "ReLU")).rstrip("'>").split(".")[-1]
            pi, qf = (sizes(weights, prefix) for prefix in ("actor.latent_pi.", "critic.qf0."))
            policy = SACPolicy(
                observation_space, action_space, lr_schedule=lambda _: 0.0,
                net_arch=dict(pi=pi, qf=qf[:-1]),
                activation_fn=getattr(nn.modules.activation, activation),
                use_sde=bool(data.get("use_sde")), clip_mean=float(kwargs.get("clip_mean", 2.0)),
                n_critics=len({k.split(".")[1] for k in weights if k.startswith("critic.qf")}),
            )  # fmt: skip
            policy.load_state_dict(weights)
            self.gamma = float(data["gamma"])
        self.mean = nn.Sequential(policy.actor.latent_pi, policy.actor.mu).requires_grad_(False)
        self.critic = policy.critic.to(device).requires_grad_(False)
        self.low, self.high = action_space.low, action_space.high

    def __getstate__(self):
        return self.__dict__ | dict(critic=None)  # what goes to a roll-in worker only acts

    @torch.inference_mode()
    def predict(self, state: np.ndarray) -> np.ndarray:
        """The deterministic actions (N, action_dim), in the environment's units."""
        scaled = self.mean(torch.from_numpy(state)).tanh().numpy()  # in [-1, 1]
        return self.low + 0.5 * (scaled + 1.0) * (self.high - self.low)

    @torch.no_grad()
    def q_star(self, state, action):
        """Q*(s, a) (N, 1): the smaller critic, as SAC's own target takes it."""
        low, high = (torch.as_tensor(x, device=action.device) for x in (self.low, self.high))
        scaled = 2.0 * (action - low) / (high - low) - 1.0  # SB3's critics know no other units
        return torch.cat(self.critic(state, scaled), dim=1).amin(dim=1, keepdim=True)


# == 4. Roll-in (line 4 of the paper) ============================================================
@dataclass(frozen=True)
class Trajectory:
    """What one environment showed until it ended or `horizon` steps were over."""

    states: np.ndarray  # (T, state_dim)
    actions: np.ndarray  # (T, action_dim), in the environment's units
    rewards: np.ndarray  # (T,)


def make_env(env_name: str, **how) -> gym.Env:
    """The environment; UserError unless it exists with 1-D Boxes and bounded actions."""
    with mend(f"env_name {env_name!r} cannot be made; check it"):
        env = gym.make(env_name, disable_env_checker=True, **how)
    spaces = env.observation_space, env.action_space
    boxes = all(isinstance(x, gym.spaces.Box) and len(x.shape) == 1 for x in spaces)
    if not boxes or not env.action_space.is_bounded():
        raise UserError(f"{env_name} has {spaces}; choose one with 1-D Boxes and bounded actions.")
    return env


def mixed_policy(policy, expert, state, expert_turn, noise) -> np.ndarray:
    """Actions (n, action_dim): the expert's where `expert_turn` (n,), else a sample of pi."""
    action, own = np.empty_like(noise), ~expert_turn
    if expert_turn.any():
        action[expert_turn] = expert.predict(state[expert_turn])
    if own.any():
        action[own] = policy.act(state[own], noise[own])
    return action


def roll_in(policy, expert, env_name, alpha, noise_scale, horizon, streams) -> list[Trajectory]:
    """A trajectory per random stream, all stepped side by side with one batched call per step.

    At every step the expert acts with probability `alpha`, else the learner, with its noise scaled
    by `noise_scale`.  A stream seeds its trajectory's terrain, mixture and noise.
    """
    # an environment each: Box2D's worlds carry traces of earlier episodes over a reset
    envs = [make_env(env_name) for _ in streams]
    rngs = [np.random.default_rng(stream) for stream in streams]
    states = [env.reset(seed=int(rng.integers(2**31)))[0] for env, rng in zip(envs, rngs)]
    by_expert = np.array([rng.random(horizon) < alpha for rng in rngs])  # (n, horizon)
    shape = horizon, *envs[0].action_space.shape
    noise = np.array([noise_scale * rng.standard_normal(shape) for rng in rngs], dtype=np.float32)
    history, running, t = [[] for _ in envs], list(range(len(envs))), 0
    while running and t < horizon:
        state, still = np.array([states[i] for i in running], dtype=np.float32), []
        action = mixed_policy(policy, expert, state, by_expert[running, t], noise[running, t])
        for i, s, a in zip(running, state, action):
            states[i], reward, terminated, truncated, _ = envs[i].step(a)
            history[i].append((s, a, reward))
            if not (terminated or truncated):
                still.append(i)
        running, t = still, t + 1
    return [Trajectory(*(np.array(column) for column in zip(*rows))) for rows in history]


def work(players: bytes, *job) -> list[Trajectory]:
    """`roll_in` in a worker; pickled by hand, for torch would send tensors as shared memory."""
    return roll_in(*pickle.loads(players), *job)


def start_worker() -> None:
    """What a worker does first; it ends with its parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork inherits the parent's handler
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# == 5. What an update is made of: pure functions of tensors =====================================
def gap_weights(q_expert, q_learner, factor: float, cut: float):
    """w = min(1 + factor * gap / mean(gap), cut), normalised to mean 1; all (N, 1).

    gap = max(0, Q*(s, a_expert) - Q*(s, a_learner)): what it costs not to do as the expert does.
    """
    gap = (q_expert - q_learner).clamp(min=0)
    weights = (1 + factor * gap / gap.mean().clamp(min=1e-4)).clamp(max=cut)  # 1e-4: rounding
    return weights / weights.mean()


def standardise(x):
    """Mean 0 and standard deviation 1 over the batch."""
    return (x - x.mean()) / (x.std(correction=0) + 1e-8)


def returns_to_go(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """Discounted sum of the rewards (T,) from each step on."""
    total, result = 0.0, np.empty(len(rewards))
    for t in reversed(range(len(rewards))):
        result[t] = total = rewards[t] + gamma * total
    return result


def mean_kl(old, new) -> torch.Tensor:
    """Mean KL(old || new) of Gaussians given as (mean, std), (N, action_dim); tanh keeps it."""
    return kl_divergence(Normal(*old), Normal(*new)).sum(dim=1).mean()


def conjugate_gradient(product, b, iterations=10) -> torch.Tensor:
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


def natural_step(policy, loss_of, state, kl_step: float):
    """Step along -I(theta)^-1 grad (section 5.2) to a KL of kl_step; the loss before it."""
    parameters, loss, grad = list(policy.parameters()), loss_of(), torch.autograd.grad
    gradient, new = parameters_to_vector(grad(loss, parameters)), policy(state[:10_000])
    kl = mean_kl([x.detach() for x in new], new)  # its Hessian at theta itself is I(theta)
    slope = parameters_to_vector(grad(kl, parameters, create_graph=True))

    def product(v):  # (I(theta) + damping) v
        return parameters_to_vector(grad(slope @ v, parameters, retain_graph=True)) + 0.1 * v

    step = conjugate_gradient(product, -gradient)
    step *= (2 * kl_step / (step @ product(step)).clamp(min=1e-12)).sqrt()
    with torch.no_grad():
        old, start = policy(state), parameters_to_vector(parameters)
        for halving in range(10):  # until the KL is right and the loss falls, or no step at all
            vector_to_parameters(start + 0.5**halving * step, parameters)
            if mean_kl(old, policy(state)) <= 1.5 * kl_step and loss_of() < loss:
                break
        else:
            vector_to_parameters(start, parameters)
    return loss.detach()


# == 6. The agent: Algorithm 1 ===================================================================
class AggreVateDAgent:
    """Learner, expert, optimiser and data of one run; `train` is Algorithm 1."""

    def __init__(self, config: Config):
        self.config = c = config
        # a fork needs no imports and shares memory; Linux alone has a safe one, before any thread
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self.pool = ProcessPoolExecutor(c.n_workers, context, start_worker)
        if c.n_workers > 1:
            self.pool.submit(int)  # any job starts them
        cuda = torch.cuda.is_available() and c.device == "auto"
        self.device = torch.device("cuda" if cuda else "cpu")
        torch.set_num_threads(c.n_workers)
        torch.manual_seed(c.seed)
        env = make_env(c.env_name)
        spaces = env.observation_space, env.action_space
        self.horizon = env.spec.max_episode_steps or c.H  # of an evaluation [steps]
        self.expert = SACExpert(c.expert_path, *spaces, self.device)
        self.policy = PolicyNetwork(*spaces, c.hidden_dim)
        self.optimizer = torch.optim.Adam(self.policy.to(self.device).parameters(), fused=True)
        self.experience: dict[str, torch.Tensor] = {}  # newest transitions, (N, ...) each
        self.on_policy = c.algorithm in ("score", "minmax", "reinforce")  # no old data
        self.alpha, self.iteration, self.env_steps, self.seconds = 1.0, 0, 0, 0.0
        self.best_return, self.rows = -math.inf, []  # rows of evaluations.csv

    def decay_alpha(self, iteration: int) -> float:
        """The mixing rate alpha_n: 1 in iteration 1, then linearly to 0, and 0 from there."""
        decayed = max(0.0, 1.0 - (iteration - 1) / self.config.alpha_decay_iterations)
        self.alpha = {"bc": 1.0, "reinforce": 0.0}.get(self.config.algorithm, decayed)
        return self.alpha

    def simulate(self, streams: list, alpha, noise_scale, horizon) -> list[Trajectory]:
        """`roll_in` by all workers; the trajectories come back in the order of their streams."""
        players = pickle.dumps((copy.deepcopy(self.policy).cpu(), self.expert))
        job = partial(work, players, self.config.env_name, alpha, noise_scale, horizon)
        size = min(math.ceil(len(streams) / self.config.n_workers), 25)  # larger ones end unevenly
        batches = [streams[i : i + size] for i in range(0, len(streams), size)]
        run = self.pool.map if self.config.n_workers > 1 else map  # a single one: this process
        return [trajectory for part in run(job, batches) for trajectory in part]

    @torch.no_grad()
    def get_q_star(self, state, action=None):
        """Q*(s, a) (N, 1), of the learner's mean action if none is given."""
        states = state.split(2048)  # pieces stay in the CPU's cache
        actions = map(self.policy.predict, states) if action is None else action.split(2048)
        q = torch.cat([self.expert.q_star(s, a) for s, a in zip(states, actions)])
        if not q.isfinite().all():
            raise UserError("Q* is NaN or infinite on a visited state; use another expert.")
        return q

    def label(self, trajectories: list[Trajectory]) -> None:
        """Ask expert and Q* about all visited states; they join or (on-policy) replace the old."""
        gamma = self.config.gamma or self.expert.gamma
        rows = [(t.states, t.actions, returns_to_go(t.rewards, gamma)) for t in trajectories]
        arrays = [np.concatenate(column, dtype=np.float32) for column in zip(*rows)]
        arrays.append(self.expert.predict(arrays[0]))
        state, action, to_go, expert_action = (torch.from_numpy(x).to(self.device) for x in arrays)
        new = dict(state=state, action=action, expert_action=expert_action, to_go=to_go[:, None])
        new["q_expert"] = self.get_q_star(state, expert_action)
        for name, tensor in new.items():
            kept = tensor[:0] if self.on_policy else self.experience.get(name, tensor[:0])
            self.experience[name] = torch.cat([kept, tensor])[-self.config.max_experience_len :]

    @staticmethod
    def normalize_q_star(q_star):
        """The first script's weights: Q* of the executed actions, shifted and scaled to [0, 1]."""
        return (q_star - q_star.min()) / (q_star.max() - q_star.min() + 1e-8)

    @torch.no_grad()
    def weigh(self, e: dict):
        """(states, what to make likelier there, its weight (N, 1)): how the family differs."""
        c, policy, state = self.config, self.policy, e["state"]
        if c.algorithm == "reinforce":
            return state, e["action"], standardise(e["to_go"])
        if c.algorithm == "minmax":
            q_action = self.get_q_star(state, e["action"])
            return state, policy.inside(e["action"]), self.normalize_q_star(q_action)
        if c.algorithm == "score":  # A*: Q* less a baseline, its mean over two samples of pi
            state = state.repeat(2, 1)
            action, _ = policy.sample(state)
            q = self.get_q_star(state, action).view(2, -1, 1)
            return state, action, standardise((q - q.mean(dim=0)).view(-1, 1)).clamp(-5, 5)
        target, weight = policy.inside(e["expert_action"]), torch.ones_like(e["q_expert"])
        if c.algorithm in ("aggrevate", "aggrevated"):  # by what was done, or would be done now
            q = self.get_q_star(state, e["action"] if c.algorithm == "aggrevate" else None)
            weight = gap_weights(e["q_expert"], q, c.gap_factor, c.gap_cut)
        return state, target, weight

    def loss(self, state, target, weight):
        """-mean(w log pi(target | s)); (N, 1) * (N, 1)."""
        return -(weight * self.policy.get_log_prob(state, target)).mean()

    def update(self, iteration: int) -> float:
        """`train_repeat` passes over `update_sz` drawn transitions (line 5); the mean loss."""
        c, losses = self.config, []
        torch.manual_seed(np.random.default_rng((UPDATE, c.seed, iteration)).integers(2**62).item())
        data = state, target, weight = self.weigh(self.experience)
        if self.on_policy:  # weights with signs stay in the loss
            drawn = torch.randperm(len(weight))[: c.update_sz]
        else:  # draw by weight, then count alike: the same gradient on average, less noise
            drawn = torch.multinomial(weight[:, 0].double().cpu(), c.update_sz, replacement=True)
            data = state, target, torch.ones_like(weight)
        drawn = drawn.to(self.device)
        n_batches = c.train_repeat * math.ceil(len(drawn) / c.batch_sz)
        for _ in range(c.train_repeat):
            if c.optimizer == "natural":
                chosen = [x[drawn] for x in data]
                loss_of = partial(self.loss, *chosen)
                losses.append(natural_step(self.policy, loss_of, chosen[0], c.kl_step))
                continue
            for rows in drawn[torch.randperm(len(drawn)).to(self.device)].split(c.batch_sz):
                self.optimizer.param_groups[0]["lr"] = c.lr * (1 - len(losses) / n_batches)
                losses.append(loss := self.loss(*(x[rows] for x in data)))
                self.optimizer.zero_grad()
                loss.backward()
                clip_grad_norm_(self.policy.parameters(), max_norm=10.0)
                self.optimizer.step()
        loss = torch.stack(losses).mean().item()
        if not math.isfinite(loss):
            raise UserError("The loss became NaN or infinite; lower --lr and start again.")
        return loss

    def evaluate(self, who="learner", n_episodes=None, stream=VALIDATION) -> list[Trajectory]:
        """Episodes of "learner" or "expert", deterministic, the same terrains at every call."""
        streams = [(stream, i) for i in range(n_episodes or self.config.eval_episodes)]
        return self.simulate(streams, float(who == "expert"), 0.0, self.horizon)

    def validate(self, run_dir: Path) -> dict[str, float]:
        """Evaluate the learner, the first time the expert too; keep the best iterate (line 7)."""
        for who in ("learner",) if self.rows else ("expert", "learner"):
            now = self.iteration, self.env_steps, round(self.seconds, 1), who
            for i, t in enumerate(episodes := self.evaluate(who)):
                self.rows.append([*now, i, float(t.rewards.sum()), len(t.rewards)])
        columns = "iteration", "env_steps", "seconds", "policy", "episode", "return", "length"
        with open(run_dir / "evaluations.tmp", "w", newline="") as file:
            csv.writer(file).writerows([columns, *self.rows])
        os.replace(run_dir / "evaluations.tmp", run_dir / "evaluations.csv")
        returns = np.array([t.rewards.sum() for t in episodes])
        score, luck = float(returns.mean()), 2 * returns.std() / len(returns) ** 0.5
        best_before, self.best_return = self.best_return, max(self.best_return, score)
        if score >= best_before - luck:  # a later iterate saw more: two errors are forgiven
            self.save(run_dir / "best.pt")
        expert = np.mean([row[5] for row in self.rows if row[3] == "expert"])
        return {"eval/episode_reward": score, "eval/expert_reward": expert}

    def iterate(self, n: int) -> dict[str, float]:
        """Iteration n of Algorithm 1: roll in with the mixture, label with Q*, step the policy."""
        c, started = self.config, time.perf_counter()
        streams = [(ROLL_IN, c.seed, n, k) for k in range(c.K)]
        trajectories = self.simulate(streams, self.decay_alpha(n), c.roll_in_noise, c.H)
        steps = sum(len(t.rewards) for t in trajectories)
        self.label(trajectories)
        state, q_expert = (self.experience[k][-steps:] for k in ("state", "q_expert"))
        if n == 1 and not c.init_path:  # standardise inputs, once: later it would change pi
            self.policy.state_mean.copy_(state.mean(dim=0))
            self.policy.state_std.copy_(state.std(dim=0, correction=0).clamp(min=1e-3))
        gap = q_expert - self.get_q_star(state)
        loss = self.update(n)
        self.env_steps += steps
        self.seconds += time.perf_counter() - started
        return {
            "train/loss": loss,
            "train/alpha": self.alpha,
            "train/q_gap": gap.mean(),
            "rollout/episode_reward": np.mean([t.rewards.sum() for t in trajectories]),
            "time/env_steps": self.env_steps,
            "time/seconds": self.seconds,
        }

    def train(self, run_dir: Path) -> None:
        """Algorithm 1, from the iteration after the last one that was saved."""
        c, first = self.config, self.iteration + 1
        (run_dir / "config.json").write_text(json.dumps(asdict(c), indent=1))
        writer = SummaryWriter(run_dir, purge_step=first)
        if first == 1:
            chart = ["Multiline", ["eval/episode_reward", "eval/expert_reward"]]
            writer.add_custom_scalars({"evaluation": {"learner and expert": chart}})
            writer.add_text("config", "\n".join(f"- {k}: {v}" for k, v in asdict(c).items()))
        for n in tqdm(range(first, c.max_iteration + 1), unit="iteration"):
            scalars = self.iterate(n)
            self.iteration = n
            if n % c.eval_every == 0 or n == c.max_iteration:
                scalars |= self.validate(run_dir)
                scores = "learner {eval/episode_reward:7.1f}  expert {eval/expert_reward:7.1f}"
                now = f"iteration {n:3d} {self.env_steps:8d} steps {self.seconds:6.0f} s  "
                tqdm.write(now + scores.format(**scalars))
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, n)
            writer.flush()
            self.save(run_dir / "last.pt")
        writer.close()

    SAVED = "iteration", "env_steps", "seconds", "best_return", "rows"

    def save(self, path: Path) -> None:
        """Write a checkpoint under a temporary name, then rename it: a kill leaves the last one."""
        state = {name: getattr(self, name) for name in self.SAVED}
        state |= dict(config=asdict(self.config), policy=self.policy.state_dict())
        if path.name == "last.pt":  # what resuming needs and evaluating does not
            state |= dict(optimizer=self.optimizer.state_dict(), experience=self.experience)
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, state: dict, policy_only: bool) -> None:
        """Take over what `load_checkpoint` read; UserError if it does not fit."""
        with mend("The checkpoint does not fit; give one of this network and environment"):
            self.policy.load_state_dict(state["policy"])
            if not policy_only:
                self.optimizer.load_state_dict(state["optimizer"])
                self.experience = {k: v.to(self.device) for k, v in state["experience"].items()}
                self.__dict__ |= {name: state[name] for name in self.SAVED}


# == 7. Files and pictures =======================================================================
def make_run_dir(config: Config) -> Path:
    """A fresh folder below log_dir; UserError if it cannot be made."""
    name = Path(config.env_name).name + time.strftime(f"_s{config.seed}_%Y%m%d_%H%M%S")
    run_dir = Path(config.log_dir) / f"AggreVateD_{name}"
    with mend("The run folder cannot be written; set --log_dir"):
        run_dir.mkdir(parents=True)
    return run_dir


def load_checkpoint(path: Path) -> dict:
    """A checkpoint's contents, read without running code in it; UserError unless it is one."""
    with mend(f"{path} is not a checkpoint of this version; give a run folder"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["config"] = Config(**state["config"]).check()
        return state


def film(agent: AggreVateDAgent, path: Path) -> None:
    """The first validation episode as a GIF, every fifth step; no picture is no error."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    warnings.simplefilter("ignore")  # of a missing display; what matters is said below
    (episode,), frames = agent.evaluate(n_episodes=1), []
    try:
        env = make_env(agent.config.env_name, render_mode="rgb_array")
        env.reset(seed=int(np.random.default_rng((VALIDATION, 0)).integers(2**31)))
        for t, action in enumerate(episode.actions):
            if t % 5 == 0:  # method 2, an octree, is the fast one
                frames.append(Image.fromarray(env.render()[::2, ::2]).quantize(32, method=2))
            env.step(action)
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, loop=0)
    except Exception as error:  # no display, no OpenGL, an environment without pictures
        print(f"No {path.name}: {agent.config.env_name} cannot be drawn here ({error}).")


# == 8. Command line =============================================================================
def parse(argv=None) -> dict:
    """The options that were given; a wrong one ends in a sentence and exit status 2."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", argument_default=argparse.SUPPRESS)
    old = parser.add_mutually_exclusive_group()
    old.add_argument("--resume", type=Path, metavar="RUN", help="go on from its last.pt")
    old.add_argument("--evaluate", type=Path, metavar="RUN", help="score its best.pt")
    for f in fields(Config):
        note = f"{f.metadata['note']} (default: {f.default})".replace("%", "%%")
        parser.add_argument(f"--{f.name}", type=f.type, choices=f.metadata["choices"], help=note)
    return vars(parser.parse_args(argv))


def open_agent(resume: Path | None, evaluate: Path | None, overrides: dict) -> AggreVateDAgent:
    """The agent of a new run, of one to go on with, or of one to score."""
    fixed = overrides.keys() - {"max_iteration", "n_workers", "device"}
    if resume and fixed:
        raise UserError(f"--{min(fixed)} cannot change on --resume; start a new run with it.")
    if resume or evaluate:
        state = load_checkpoint(resume / "last.pt" if resume else evaluate / "best.pt")
        agent = AggreVateDAgent(replace(state["config"], **overrides).check())
        agent.load(state, policy_only=not resume)
    else:
        agent = AggreVateDAgent(Config(**overrides).check())
        if agent.config.init_path:
            agent.load(load_checkpoint(Path(agent.config.init_path)), policy_only=True)
    return agent


def print_scores(agent: AggreVateDAgent) -> int:
    """The learner beside the expert, by their mean actions, on the same fresh terrains."""
    played = (agent.evaluate(who, stream=TEST) for who in ("learner", "expert"))
    learner, expert = (np.array([t.rewards.sum() for t in episodes]) for episodes in played)
    for who, x in dict(learner=learner, expert=expert, difference=learner - expert).items():
        error = x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else math.nan
        print(f"{who:10s} {x.mean():8.1f} +- {error:.1f} (standard error, {len(x)} episodes)")
    return 0


def main(argv=None) -> int:
    """Run the command line; the exit status is 2 after an error, 130 after an interruption."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = parse(argv)
    run_dir, evaluate = options.pop("resume", None), options.pop("evaluate", None)
    try:
        agent = open_agent(run_dir, evaluate, options)
        if evaluate:
            return print_scores(agent)
        c, run_dir = agent.config, run_dir or make_run_dir(agent.config)
        versions = f"torch {torch.__version__}, gymnasium {gym.__version__}, numpy {np.__version__}"
        print(f"AggreVaTeD on {c.env_name}, seed {c.seed}, {agent.device}; {versions}")
        print(f"expert {c.expert_path}\nrun    {run_dir}\nwatch  tensorboard --logdir {c.log_dir}")
        agent.save(run_dir / "last.pt")
        agent.train(run_dir)
        film(agent, run_dir / "final.gif")
        print(f"score  python aggrevated.py --evaluate {run_dir}")
        return 0
    except KeyboardInterrupt:
        print("\nStopped.", f"Go on: python aggrevated.py --resume {run_dir}" if run_dir else "")
        return 130
    except (UserError, OSError, BrokenProcessPool) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        for worker in multiprocessing.active_children():
            worker.terminate()  # in the middle of a trajectory too


if __name__ == "__main__":
    sys.exit(main())
