"""Deeply AggreVaTeD (Sun et al., ICML 2017, arXiv 1703.01030) with a SAC expert.

At each step the expert or the learner acts.  In the states that they visit, the policy
gradient follows the expert's cost-to-go Q*, as the SAC agent's critics estimate it.
`AggreVateDAgent.train` is Algorithm 1 with many steps of Adam, old states too, gradients
through the critics, a term for the expert's action, half the noise, and rewards.

    python aggrevated.py                        train with the defaults
    python aggrevated.py --seed 3 --K 20        every Config field is an option
    python aggrevated.py --resume logs/RUN      continue a run that was stopped
    python aggrevated.py --evaluate logs/RUN    score its best policy on test episodes
"""

import json
import lzma
import math
import multiprocessing
import os
import pickle
import random
import re
import shlex
import signal
import sys
import threading
import time
import warnings
import zipfile
import zlib
from argparse import SUPPRESS, ArgumentParser
from collections import namedtuple
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # what must be set before numpy and torch are loaded
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while they load: end at once
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a roll-in worker has one core
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # idle threads spin for microseconds only
import gymnasium as gym
import numpy as np
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.sac.policies import SACPolicy
from torch import nn
from torch.distributions import Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class UserError(Exception):
    """A mistake that the user can correct; the message is one sentence that says how."""


# Errors from reading a file that is damaged or of another kind.
BAD_FILE = OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError
BAD_FILE += zipfile.BadZipFile, zlib.error, lzma.LZMAError, pickle.UnpicklingError


@contextmanager
def user_error_if(errors, sentence: str):
    """Turn errors into a UserError: this sentence, then the error's own first one."""
    try:
        yield
    except errors as error:
        reason = re.split(r"\n|\. ", f"{type(error).__name__}: {error}")[0]
        raise UserError(f"{sentence} ({reason[:300]}).") from None


# == Config ====================================================================
ALGORITHMS = "aggrevated", "weighted", "dagger", "bc"


@dataclass
class Config:
    """Options; the comment is the help.  Ranges in it are usual ones, not enforced."""

    env_name: str = "BipedalWalkerHardcore-v3"  # Gymnasium id, or module:id
    env_kwargs: str = "{}"  # further arguments of gym.make, as JSON
    expert_path: str = ""  # SB3 SAC zip; empty: rl-trained-agents/sac/ENV_1/ENV.zip
    algorithm: str = "aggrevated"  # see loss, draw and train
    init_path: str = ""  # run folder or policy file to start from; empty: random weights
    seed: int = 0  # for all that is random but evaluation episodes
    device: str = "auto"  # auto (CUDA if there is one), cpu, cuda or cuda:1
    n_workers: int = 2  # simulating processes, and threads of the update
    log_dir: str = "logs"  # where run folders are made

    max_iteration: int = 20  # N of Algorithm 1, over which lr falls; 10 to 100
    alpha_decay_iterations: int = 4  # until the expert acts no more; 1 to 60
    K: int = 10  # trajectories per iteration; 5 to 100
    H: int = 2000  # longest roll-in [steps]; of evaluations only without a time limit
    roll_in_noise: float = 0.5  # scale of the learner's noise; 0: its mean action
    max_experience_len: int = 300_000  # visited states that are kept, the newest

    hidden_dim: int = 128  # units in each of two hidden layers; 64 to 512
    lr: float = 1e-2  # Adam's step size; it falls to 0 within and over the iterations
    update_sz: int = 150_000  # states drawn for an update; 50k to 300k
    batch_sz: int = 1024  # states per minibatch
    train_repeat: int = 1  # multiplies update_sz
    bc_weight: float = 0.3  # aggrevated: weight of log pi(a*|s); 0 to 1
    gap_factor: float = 3.0  # weighted: weight 1 + gap_factor * gap / mean gap, up to 20

    eval_every: int = 5  # iterations between evaluations; the first 3 and the last, too
    eval_episodes: int = 20  # episodes of an evaluation; 10 to 500

    def __post_init__(self):
        """UserError for a wrong type, sign or choice."""
        for f in fields(self):
            value, least = getattr(self, f.name), int(f.type is int and f.name != "seed")
            if type(value) is not f.type and (type(value), f.type) != (int, float):
                raise UserError(f"{f.name} is {value!r}; its type is {f.type.__name__}.")
            if f.type is not str and not least <= value < 2**32:
                raise UserError(f"{f.name} is {value}; give {least} to {2**32 - 1}.")
        if self.algorithm not in ALGORITHMS:
            raise UserError(f"algorithm is {self.algorithm}; give {' or '.join(ALGORITHMS)}.")


# == Learner ===================================================================
LOG_STD_MIN, LOG_STD_MAX = -1.4, -1.0  # of u; less: E[A*] is rough; more: too flat
INPUT_BOUND = 10.0  # for standardised inputs that were constant at first and vary later


class PolicyNetwork(nn.Module):
    """A tanh-Gaussian policy: a = offset + scale * tanh(u), u ~ N(mean(s), std(s)).

    States are (N, state_dim); actions (N, action_dim), in the environment's units;
    log-probabilities (N, 1), of actions in these units.
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
        """Set the inputs' mean and deviation; only once: it changes the policy."""
        self.state_mean.copy_(state.mean(dim=0))
        self.state_std.copy_(state.std(dim=0, correction=0).clamp(min=1e-3))

    def forward(self, state):
        """Mean and standard deviation (N, action_dim) of u; as in NumpyPolicy."""
        x = ((state - self.state_mean) / self.state_std).clamp(-INPUT_BOUND, INPUT_BOUND)
        x = nn.functional.gelu(self.fc1(x), approximate="tanh")
        x = nn.functional.gelu(self.fc2(x), approximate="tanh")
        fraction = torch.sigmoid(self.log_std(x))  # a clamp's gradient would vanish
        return self.mean(x), (LOG_STD_MIN + fraction * (LOG_STD_MAX - LOG_STD_MIN)).exp()

    def squash(self, u):
        """The action of u."""
        return self.offset + self.scale * torch.tanh(u)

    def predict(self, state):
        """The deterministic action: the mean, squashed."""
        return self.squash(self(state)[0])

    def get_log_prob(self, state, action):
        """log pi(action | state), of actions clipped to 99 % of the range."""
        mean, std = self(state)
        squashed = ((action - self.offset) / self.scale).clamp(-0.99, 0.99)
        log_slope = (1 - squashed**2).log() + self.scale.log()  # log |da/du|
        gaussian = Normal(mean, std, validate_args=False).log_prob(torch.atanh(squashed))
        return (gaussian - log_slope).sum(dim=1, keepdim=True)


def gelu(x):
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def mlp(x, layers, activation):
    """A multilayer perceptron of [(weight, bias), ...] arrays."""
    for weight, bias in layers[:-1]:
        x = activation(x @ weight + bias)
    return x @ layers[-1][0] + layers[-1][1]


class NumpyPolicy:
    """A learner that only acts, in numpy: five times as fast as torch for one state."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        self.w = w = {name: x.cpu().numpy() for name, x in weights.items()}
        names = "fc1", "fc2", "mean", "log_std"
        *hidden, mean, log_std = [(w[f"{x}.weight"].T, w[f"{x}.bias"]) for x in names]
        self.layers = *hidden, [np.concatenate(x, axis=-1) for x in zip(mean, log_std, strict=True)]

    def act(self, state, noise=0.0):
        """The action of u = mean + std * noise, for one state or many."""
        w = self.w
        x = ((state - w["state_mean"]) / w["state_std"]).clip(-INPUT_BOUND, INPUT_BOUND)
        out, n = mlp(x, self.layers, gelu), len(w["scale"])
        fraction = (1 + np.tanh(out[..., n:] / 2)) / 2  # a sigmoid that cannot overflow
        std = np.exp(LOG_STD_MIN + fraction * (LOG_STD_MAX - LOG_STD_MIN))
        return w["offset"] + w["scale"] * np.tanh(out[..., :n] + std * np.float32(noise))

    def predict(self, observation, state=None, episode_start=None, deterministic=True):
        """As in Stable-Baselines3, unclipped: (action, state), for one state or many."""
        observation = np.asarray(observation, dtype=np.float32)
        shape = *observation.shape[:-1], len(self.w["scale"])
        noise = 0.0 if deterministic else np.random.standard_normal(shape)
        return self.act(observation, noise), state


# == Expert ====================================================================
def read_sac_zip(path) -> tuple[dict, dict]:
    """Weights, without torch.compile's prefix, and plain settings; runs no code."""
    with zipfile.ZipFile(path) as archive, archive.open("policy.pth") as file:
        weights = torch.load(file, map_location="cpu", weights_only=True)
        settings = dict(json.loads(archive.read("data")))
    if not all(x.isfinite().all() for x in weights.values()):
        raise ValueError("a weight is NaN or infinite")
    return {k.replace("_orig_mod.", ""): x for k, x in weights.items()}, settings


def check_settings(settings: dict, space) -> None:
    """ValueError if policy, extractor or range of actions are not as needed."""
    made_of = dict(settings["policy_class"])
    if made_of["__module__"] != SACPolicy.__module__:
        raise ValueError(f"its policy is of {made_of['__module__']} {made_of.get('__init__', '')}")
    extractor = dict(settings["policy_kwargs"]).get("features_extractor_class", FlattenExtractor)
    if str(extractor) != str(FlattenExtractor):
        raise ValueError(f"it has a features extractor, {extractor}")
    low, high = (settings["action_space"][x].strip("[]").split() for x in ("low", "high"))
    if not np.allclose(np.array([low, high], dtype=float), [space.low, space.high], rtol=1e-4):
        raise ValueError(f"its actions are from {low} to {high}, the task's are in {space}")


class SACExpert:
    """A frozen SB3 SAC agent: its mean action, and what its critics say of any action.

    `evaluated`: the second half of the critics was fitted to the mean action's returns
    by rl-trained-agents/evaluate_critics.py.  It improves a*; A* is of all critics.
    UserError unless the zip fits the spaces.
    """

    def __init__(self, path, observation_space, action_space, device="cpu"):
        with user_error_if(BAD_FILE, f"{path} is no SAC agent of this task; set --expert_path"):
            weights, settings = read_sac_zip(path)
            check_settings(settings, action_space)
            sizes = {k: len(x) for k, x in weights.items() if x.ndim == 2}
            pi = [n for k, n in sizes.items() if k.startswith("actor.latent_pi.")]
            qf = [n for k, n in sizes.items() if k.startswith("critic.qf0.")]
            given = dict(settings["policy_kwargs"])
            activation = str(given.get("activation_fn", nn.ReLU)).split("modules.activation.")
            kwargs = dict(
                net_arch=dict(pi=pi, qf=qf[:-1]),
                activation_fn=vars(nn)[activation[-1].rstrip("'>")],
                use_sde=bool(settings.get("use_sde")),
                clip_mean=float(given.get("clip_mean", 2.0)),
                n_critics=len({k.split(".")[1] for k in sizes if k.startswith("critic.")}),
            )
            policy = SACPolicy(observation_space, action_space, lambda _: 0.0, **kwargs)
            policy.load_state_dict(weights)
            self.gamma = float(settings["gamma"])
            self.evaluated = isinstance(settings.get("critics_evaluated"), dict)
        policy.eval().requires_grad_(False)
        self.path, self.critics = path, policy.critic.to(device).q_networks
        self.low, self.high = np.float32(action_space.low), np.float32(action_space.high)
        self.actor, self.layers = nn.Sequential(policy.actor.latent_pi, policy.actor.mu), []
        if kwargs["activation_fn"] is nn.ReLU and not kwargs["use_sde"]:
            linear = [m for m in self.actor.modules() if isinstance(m, nn.Linear)]
            self.layers = [(m.weight.T.numpy(), m.bias.numpy()) for m in linear]

    def __getstate__(self):
        """What goes to a roll-in worker, which only acts."""
        return self.__dict__ | dict(critics=None, actor=None if self.layers else self.actor)

    @torch.no_grad()
    def predict(self, state: np.ndarray) -> np.ndarray:
        """The deterministic action, in the environment's units, of one state or many."""
        if self.layers:
            u = mlp(state, self.layers, lambda x: np.maximum(x, 0))
        else:
            u = self.actor(torch.from_numpy(state)).numpy()
        return self.low + 0.5 * (np.tanh(u) + 1) * (self.high - self.low)

    def q_values(self, state, action, first=0):
        """Q_i(s, a) of critics[first:], (..., n); a in the environment's units."""
        low, high = torch.tensor(np.array([self.low, self.high]), device=action.device)
        scaled = 2 * (action - low) / (high - low) - 1  # critics take actions in [-1, 1]
        x = torch.cat([state, scaled], dim=-1)
        return torch.cat([q(x) for q in self.critics[first:]], dim=-1)

    def advantage(self, state, action, v_star):
        """A*(s, a) = min_i [Q_i(s, a) - Q_i(s, a*)], (..., 1); v_star is Q_i(s, a*)."""
        return (self.q_values(state, action) - v_star).amin(dim=-1, keepdim=True)

    def improve(self, state, a_star, candidates=16, deviation=0.3, temperature=0.25):
        """Labels a*: candidates around pi*(s) weighted by softmax(gain / temperature).

        Gains are by the evaluated critics alone; `deviation` is of actions in [-1, 1].
        The weights are those of MPO's E-step (Abdolmaleki et al. 2018).
        """
        low, high = torch.tensor(np.array([self.low, self.high]), device=state.device)
        improved, first = [], len(self.critics) // 2
        for s, a in zip(state.split(128), a_star.split(128)):  # for the CPU's cache
            noise = deviation * torch.randn(candidates, *a.shape).to(a.device)
            noise[0] = 0  # the first candidate is pi*(s) itself
            action = torch.clamp(a + (high - low) / 2 * noise, low, high)
            q = self.q_values(s.expand(candidates, -1, -1), action, first)
            advantage = (q - q[0]).amin(dim=-1, keepdim=True)
            improved.append((torch.softmax(advantage / temperature, dim=0) * action).sum(dim=0))
        return torch.cat(improved)


# == Roll-in ===================================================================
# Random streams, np.random.default_rng((purpose, ...)), do not depend on what was drawn before:
# more evaluations change no iterate.  Scripts in logs/reference use others up to 17.
ROLL_IN = 0  # (ROLL_IN, seed, n, k): trajectory k of iteration n
UPDATE = 1  # (UPDATE, seed, n): what iteration n's labels and update draw
VALIDATION = 3  # (VALIDATION, i): validation episode i, in every run
TEST = 18  # (TEST, i): test episode i, used by --evaluate only

# Arrays (T, state_dim), (T, action_dim) in the environment's units, and (T,)
Trajectory = namedtuple("Trajectory", "states actions rewards")


def make_env(c: Config) -> gym.Env:
    """The environment; UserError unless it has 1-D Boxes and bounded actions."""
    with user_error_if(Exception, f"{c.env_name} cannot be made; check env_name, env_kwargs"):
        env = gym.make(c.env_name, disable_env_checker=True, **json.loads(c.env_kwargs))
    seen, acts = env.observation_space, env.action_space
    vectors = all(isinstance(x, gym.spaces.Box) and len(x.shape) == 1 for x in (seen, acts))
    if not vectors or not acts.is_bounded():
        raise UserError(f"{c.env_name} has {seen}, {acts}; both must be vectors, actions bounded.")
    return env


def play_episode(players: bytes, c: Config, alpha, noise_scale, horizon, stream):
    """One trajectory; at every step the expert acts with probability alpha."""
    learner, expert = pickle.loads(players)
    rng = np.random.default_rng(stream)
    env_seed = int(rng.integers(2**31))
    random.seed(env_seed)  # some environments draw from the global generators
    np.random.seed(env_seed)
    env = make_env(c)  # a new one, for Box2D's resets leave traces
    seen, acts = env.observation_space, env.action_space
    observation, _ = env.reset(seed=env_seed)
    steps = []
    for _ in range(horizon):
        state = np.array(observation, dtype=seen.dtype).reshape(seen.shape).astype(np.float32)
        if not np.isfinite(state).all():
            raise UserError(f"{c.env_name} gave a NaN or infinite observation.")
        if rng.random() < alpha:
            action = expert.predict(state)
        else:
            action = learner.act(state, noise_scale * rng.standard_normal(acts.shape))
        legal = action.clip(acts.low, acts.high)  # rounding may overshoot
        observation, reward, terminated, truncated, _ = env.step(legal)
        steps.append((state, action, np.asarray(reward, dtype=float).item()))
        if terminated or truncated:
            break
    env.close()
    trajectory = Trajectory(*(np.array(column) for column in zip(*steps, strict=True)))
    if not np.isfinite(trajectory.rewards).all():
        raise UserError(f"{c.env_name} gave a NaN or infinite reward.")
    return trajectory


def start_worker() -> None:
    """A roll-in process leaves Ctrl-C to its parent, and ends when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


# == Agent =====================================================================
SAVED = dict(iteration=int, env_steps=int, seconds=float, evaluations=list, best=dict)


class AggreVateDAgent:
    """Learner, expert, data and numbers of one run; `train` is Algorithm 1."""

    def __init__(self, config: Config, checkpoint: dict | None = None, resume=False):
        self.config = c = config
        torch.set_num_threads(1)  # until the workers are forked
        with user_error_if((RuntimeError, AssertionError), f"--device: device {c.device} fails"):
            name = c.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
            self.device = torch.zeros(1, device=name).device
        env = make_env(c)
        env.close()  # some simulators allow only one
        self.horizon = env.spec.max_episode_steps or c.H  # of an evaluation [steps]
        self.threshold = env.spec.reward_threshold  # the return that solves it, or None
        name, here = c.env_name.split(":")[-1], Path(__file__).resolve().parent
        path = Path(c.expert_path or here / f"rl-trained-agents/sac/{name}_1/{name}.zip")
        path = here / path if (here / path).exists() and not path.exists() else path
        spaces = env.observation_space, env.action_space
        self.expert = SACExpert(path, *spaces, self.device)
        torch.manual_seed(c.seed)  # only now: making the expert draws numbers, too
        self.policy = PolicyNetwork(*spaces, c.hidden_dim).to(self.device)
        state = torch.randn(9, *spaces[0].shape)  # NumpyPolicy must act alike
        acted = torch.from_numpy(NumpyPolicy(self.policy.state_dict()).act(state.numpy(), 1.0))
        error = self.policy.squash(sum(self.policy(state.to(self.device)))).cpu() - acted
        assert (error.abs() < 1e-3 * self.policy.scale.cpu()).all(), "NumpyPolicy differs"
        self.data: dict[str, torch.Tensor] = {}  # states and their labels, (N, ...)
        self.iteration = self.env_steps = 0
        self.seconds = 0.0  # of training
        self.evaluations: list[dict] = []  # the expert's, then the learner's
        self.best = dict(mean=-math.inf, iteration=0)
        if checkpoint:
            self.load(checkpoint, resume)
        # a fork skips imports; it is safe on Linux only, before torch has threads
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self.pool = ProcessPoolExecutor(min(c.n_workers, 61), context, start_worker)
        if c.n_workers > 1:
            self.pool.submit(int)  # any job starts all workers now
        torch.set_num_threads(min(c.n_workers, 61))
        self.close = partial(self.pool.shutdown, cancel_futures=True)  # ends after current jobs

    def play(self, streams: list, alpha, noise_scale, horizon, desc=None) -> list[Trajectory]:
        """One trajectory per random stream, in their order, played by all workers."""
        # as bytes, or torch would send the expert's tensors by shared memory
        players = pickle.dumps((NumpyPolicy(self.policy.state_dict()), self.expert))
        job = partial(play_episode, players, self.config, alpha, noise_scale, horizon)
        with user_error_if(BrokenExecutor, "A worker died; --n_workers 1 may tell why"):
            played = (self.pool.map if self.config.n_workers > 1 else map)(job, streams)
            return list(tqdm(played, desc, total=len(streams), disable=desc is None))

    @torch.no_grad()
    def label(self, trajectories: list[Trajectory]) -> dict[str, torch.Tensor]:
        """States, a* (pi*(s), improved if `evaluated`) and Q_i(s, a*); (N, ...)."""
        states = np.concatenate([t.states for t in trajectories])
        state = torch.from_numpy(states).to(self.device)
        a_star = torch.from_numpy(self.expert.predict(states)).to(self.device)
        if self.expert.evaluated:
            a_star = self.expert.improve(state, a_star)
        return dict(state=state, a_star=a_star, v_star=self.expert.q_values(state, a_star))

    @torch.no_grad()
    def gap(self, data: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the learner's mean action costs, -A*(s, mean action), (N, 1)."""
        pieces = zip(data["state"].split(2048), data["v_star"].split(2048))  # for the CPU's cache
        return -torch.cat([self.expert.advantage(s, self.policy.predict(s), v) for s, v in pieces])

    def draw(self) -> torch.Tensor:
        """Rows of the data for an update, drawn in proportion to their weights."""
        c, weight = self.config, torch.ones(len(self.data["state"]))
        if c.algorithm == "weighted":
            gap = self.gap(self.data)[:, 0].clamp(min=0).cpu()
            weight = (1 + c.gap_factor * gap / (gap.mean() + 1e-30)).clamp(max=20)
        return torch.multinomial(weight, c.train_repeat * c.update_sz, replacement=True)

    def loss(self, state, a_star, v_star):
        """The loss of a minibatch, a scalar."""
        imitation = -self.policy.get_log_prob(state, a_star).mean()
        if self.config.algorithm != "aggrevated":
            return imitation
        # The paper's objective, E_{a ~ pi}[A*(s, a)]; its pathwise gradient goes through the
        # critics.  Q* is a function, so old states, too, get fresh actions of pi.
        action = self.policy.squash(Normal(*self.policy(state), validate_args=False).rsample())
        advantage = self.expert.advantage(state, action, v_star)
        spread = advantage.detach().std(correction=0) + 1e-6 * v_star.abs().mean() + 1e-30
        return -(advantage / spread).mean() + self.config.bc_weight * imitation

    def update(self, lr: float) -> float:
        """Steps of a new Adam, whose size falls from lr to 0; returns the mean loss."""
        batches = self.draw().to(self.device).split(self.config.batch_sz)
        optimizer = torch.optim.Adam(self.policy.parameters(), fused=True)
        total = torch.zeros((), device=self.device)
        for i, rows in enumerate(batches):
            optimizer.param_groups[0]["lr"] = lr * (1 - i / len(batches))
            loss = self.loss(**{name: x[rows] for name, x in self.data.items()})
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.policy.parameters(), 10.0)  # log pi is steep near a bound
            optimizer.step()
            total += loss.detach()
        if not total.isfinite():
            raise UserError("The loss became NaN or infinite; start again with a lower --lr.")
        return total.item() / len(batches)

    def evaluate(self, who: str, stream=VALIDATION, desc=None) -> np.ndarray:
        """The return of each episode, of "learner" or "expert" by the mean action."""
        streams = [(stream, i) for i in range(self.config.eval_episodes)]
        played = self.play(streams, float(who == "expert"), 0.0, self.horizon, desc)
        return np.array([t.rewards.sum() for t in played])

    def validate(self, run_dir: Path, who="learner") -> float:
        """The mean of a new evaluation, kept and printed; saves the best policy."""
        returns = self.evaluate(who)
        now = dict(iteration=self.iteration, env_steps=self.env_steps, seconds=self.seconds)
        self.evaluations.append(now | dict(policy=who, returns=returns.tolist()))
        text = f"iteration {self.iteration:3d} {self.env_steps:8d} steps {self.seconds:5.0f} s"
        tqdm.write(f"{text}  {who:7s} {describe(returns, self.threshold)}")
        if who == "learner" and returns.mean() >= self.best["mean"]:
            self.best = dict(mean=float(returns.mean()), iteration=self.iteration)
            self.save(run_dir / "best.pt", data={})
        return returns.mean()

    # == Algorithm 1 ===========================================================
    def train(self, run_dir: Path) -> None:
        """Algorithm 1, from the iteration after the last one that was saved."""
        c, first = self.config, self.iteration + 1
        how = dict(purge_step=first) if any(run_dir.glob("events.*")) else {}  # drop later points
        writer, expert_writer = (SummaryWriter(run_dir / x, **how) for x in ("", "expert"))
        if not self.evaluations:
            self.validate(run_dir, "expert")
        for n in tqdm(range(first, c.max_iteration + 1), unit="iteration"):
            started = time.perf_counter()
            # Roll in with alpha pi* + (1 - alpha) pi; label what was visited
            alpha = 1.0 if c.algorithm == "bc" else max(0.0, 1 - (n - 1) / c.alpha_decay_iterations)
            streams = [(ROLL_IN, c.seed, n, k) for k in range(c.K)]
            trajectories = self.play(streams, alpha, c.roll_in_noise, c.H)
            torch.manual_seed(int(np.random.default_rng((UPDATE, c.seed, n)).integers(2**62)))
            new = self.label(trajectories)
            if n == 1 and not c.init_path:
                self.policy.standardise_inputs(new["state"])
            scalars = {"train/alpha": alpha, "train/q_gap": self.gap(new).mean().item()}
            # Update theta, with the newest states of all iterations
            old = self.data or {name: x[:0] for name, x in new.items()}
            self.data = {k: torch.cat([old[k], new[k]])[-c.max_experience_len :] for k in new}
            scalars["train/loss"] = self.update(c.lr * (1 - (n - 1) / c.max_iteration))
            self.iteration, self.env_steps = n, self.env_steps + len(new["state"])
            self.seconds += time.perf_counter() - started
            scalars["rollout/episode_reward"] = np.mean([t.rewards.sum() for t in trajectories])
            # Keep the best policy on validation
            if n <= 3 or n % c.eval_every == 0 or n == c.max_iteration:
                scalars["eval/episode_reward"] = self.validate(run_dir)
                expert_mean = np.mean(self.evaluations[0]["returns"])
                expert_writer.add_scalar("eval/episode_reward", expert_mean, n)
            for tag, value in (scalars | {"time/env_steps": self.env_steps}).items():
                writer.add_scalar(tag, value, n)
            writer.flush()
            expert_writer.flush()
            self.save(run_dir / "last.pt", self.data)

    # == Checkpoints ===========================================================
    def save(self, path: Path, data: dict) -> None:
        """Write policy, data and SAVED by way of .tmp, so that a kill leaves the old file."""
        state = dict(config=asdict(self.config), policy=self.policy.state_dict(), data=data)
        state |= {name: getattr(self, name) for name in SAVED}
        aside = path.with_suffix(".tmp")
        try:
            with user_error_if((OSError, RuntimeError), f"{path} cannot be written; disk full?"):
                (path.parent / "evaluations.json").write_text(json.dumps(self.evaluations))
                torch.save(state, aside)
                os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)

    def load(self, checkpoint: dict, resume: bool) -> None:
        """Take its policy, or all for `resume`; UserError if it does not fit."""
        weights, own = checkpoint["policy"], self.policy.state_dict()
        with user_error_if(BAD_FILE, "The checkpoint is of another task, expert or --hidden_dim"):
            if any(not torch.equal(weights[k], own[k].cpu()) for k in ("scale", "offset")):
                raise ValueError("its actions have another range")
            self.policy.load_state_dict(weights)
            self.data = {k: x.to(self.device) for k, x in checkpoint["data"].items() if resume}
            [sum(e["returns"]) for e in checkpoint["evaluations"]]  # numbers?
            if self.data:  # the same critics give the same values
                s, a, v = (self.data[k][:9] for k in ("state", "a_star", "v_star"))
                if (self.expert.q_values(s, a) - v).abs().max() > 1e-4 * v.abs().max():
                    raise ValueError("its labels are another expert's")
        vars(self).update({name: checkpoint[name] for name in SAVED if resume})


def load_checkpoint(path) -> dict:
    """A .pt file, or a run folder's best.pt; runs no code.  UserError if damaged."""
    path = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
    with user_error_if(BAD_FILE, f"{path} is missing, damaged or of another version"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        config, w = state["config"], state["policy"]
        sound = all(x.isfinite().all() for x in w.values()) and w["state_std"].min() > 0
        sound = sound and all(type(state[name]) is kind for name, kind in SAVED.items())
        if not sound or zipfile.ZipFile(path).testzip() or config.keys() != asdict(Config()).keys():
            raise ValueError("checksums, weights, numbers or settings are wrong")
        state["config"] = Config(**config)
    return state


def load_policy(path) -> NumpyPolicy:
    """The best policy of a run folder, or that of a .pt file, with SB3's `predict`."""
    return NumpyPolicy(load_checkpoint(path)["policy"])


# == Command line ==============================================================
# Options that are allowed with an old run; its expert may have been moved.
RESUME = "max_iteration", "n_workers", "device", "expert_path"
EVALUATE = "eval_episodes", "env_name", "env_kwargs", "n_workers", "device", "expert_path"


def describe(returns: np.ndarray, threshold=None) -> str:
    """Mean return ± its standard error, and the share of episodes at the threshold."""
    text = f"{returns.mean():8.5g} ± {returns.std() / max(1, len(returns) - 1) ** 0.5:.3g}"
    return text if threshold is None else f"{text}, {(returns >= threshold).mean():4.0%} solved"


def parse(argv: list[str]) -> dict:
    """The options that were given; argparse ends with status 2 if one is wrong."""
    how = dict(usage="%(prog)s [options]", argument_default=SUPPRESS)
    parser = ArgumentParser(allow_abbrev=False, **how)
    old = parser.add_mutually_exclusive_group()
    old.add_argument("--resume", metavar="RUN", help="run folder to continue")
    old.add_argument("--evaluate", metavar="RUN", help="run or policy file to score")
    source = Path(__file__).read_text(encoding="utf-8")
    notes = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", source, re.M))
    notes["algorithm"] = " or ".join(ALGORITHMS)
    for f in fields(Config):
        text = f"{notes.get(f.name, '')} (default: {f.default!r})"
        parser.add_argument(f"--{f.name}", type=f.type, help=text)
    return vars(parser.parse_args(argv))


def open_agent(resume=None, evaluate=None, **changes) -> AggreVateDAgent:
    """The agent of a new run, or of one to continue or to score."""
    if resume is None and evaluate is None:
        c = Config(**changes)
        return AggreVateDAgent(c, load_checkpoint(c.init_path) if c.init_path else None)
    checkpoint = load_checkpoint(evaluate if resume is None else Path(resume) / "last.pt")
    old, may_change = checkpoint["config"], RESUME if evaluate is None else EVALUATE
    for name in changes.keys() - set(may_change):
        if changes[name] != getattr(old, name):
            raise UserError(f"--{name} cannot change now; what can: {', '.join(may_change)}.")
    if ":" in old.env_name and "env_name" not in changes:  # maybe a stranger's file
        raise UserError(f"It imports {old.env_name}; if you trust that, add --env_name.")
    c = replace(old, **changes)
    if evaluate is None and checkpoint["iteration"] >= c.max_iteration:
        raise UserError(f"{resume} is finished; --max_iteration makes more.")
    return AggreVateDAgent(c, checkpoint, evaluate is None)


def print_scores(agent: AggreVateDAgent, path: str) -> None:
    """Learner and expert, by their mean actions, in the same test episodes."""
    learner, expert = (agent.evaluate(who, TEST, who) for who in ("learner", "expert"))
    print(f"{path} on {agent.config.env_name}, {len(learner)} test episodes")
    print(f"learner    {describe(learner, agent.threshold)}")
    print(f"expert     {describe(expert, agent.threshold)}  {agent.expert.path}")
    print(f"difference {describe(learner - expert)}")


def check_environment(c: Config) -> None:
    """Only warn: some tasks that gymnasium's checker rejects work all the same."""
    env = make_env(c)
    try:
        with warnings.catch_warnings(action="ignore"):
            check_env(env.unwrapped, skip_render_check=True, skip_close_check=True)
    except Exception as error:
        print(f"warning: gymnasium's check_env says of {c.env_name}: {error}")
    env.close()


def start_training(agent: AggreVateDAgent, resume: str | None) -> None:
    """Train in a new run folder, or in the one to resume."""
    c, command = agent.config, f"python {shlex.quote(sys.argv[0])}"
    name = f"{c.algorithm}_{c.env_name.split(':')[-1].replace('/', '-')}_s{c.seed}"
    run_dir = Path(resume or Path(c.log_dir) / f"{name}_{datetime.now():%Y%m%d_%H%M%S_%f}")
    check_environment(c)
    with user_error_if(OSError, "The run folder cannot be written; set --log_dir"):
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.json").write_text(json.dumps(asdict(c), indent=1))
    agent.save(run_dir / "last.pt", agent.data)  # to resume from the start
    run = shlex.quote(str(run_dir))
    module = f" --env_name {shlex.quote(c.env_name)}" if ":" in c.env_name else ""
    print(f"{c.algorithm} on {c.env_name}, evaluations of at most {agent.horizon} steps")
    print(f"seed     {c.seed}, on {agent.device}\nexpert   {agent.expert.path}\nrun      {run}")
    print(f"watch    tensorboard --logdir {shlex.quote(str(run_dir.parent))}")
    print(f"continue {command} --resume {run}{module}  # if it is stopped", flush=True)
    agent.train(run_dir)
    print(f"best     iteration {agent.best['iteration']}, {agent.best['mean']:.5g}: {run}/best.pt")
    print(f"score    {command} --evaluate {run}{module} --eval_episodes 100")


def main(argv=None) -> int:
    """Run the command line; exit status 2 after an error, 130 after Ctrl-C."""
    options = parse(sys.argv[1:] if argv is None else argv)
    try:
        with closing(open_agent(**options)) as agent:
            if "evaluate" in options:
                print_scores(agent, options["evaluate"])
            else:
                start_training(agent, options.get("resume"))
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    end_at_once = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # second Ctrl-C
    signal.signal(signal.SIGINT, lambda *x: end_at_once() and signal.default_int_handler(*x))
    sys.exit(main())
