import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import SAC

import aggrevated

torch.set_num_threads(1)


class Tiny(gym.Env):
    """Pendulum's spaces; 3 or 9 steps by the seed (5 at most); refuses a step after the end.

    An observation is (steps so far, length, a random number that tells episodes apart).
    """

    metadata = {"render_modes": []}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gym.spaces.Box(-2, 2, (1,))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.length = 0, int(self.np_random.choice([3, 9]))
        self.name, self.over = self.np_random.random(), False
        return self._observe(), {}

    def step(self, action):
        assert not self.over and self.action_space.contains(action)
        self.t += 1
        self.over = self.t == self.length
        return self._observe(), float(self.t), self.over, False, {}

    def _observe(self):
        return np.array([self.t, self.length, self.name], dtype=np.float32)


gym.register("Tiny-v0", Tiny, max_episode_steps=5)


def make_sac(path, env_id="Pendulum-v1", steps=0, use_sde=False, seed=0, **policy_kwargs) -> Path:
    """The zip of an SB3 SAC agent, hardly trained."""
    model = SAC(
        "MlpPolicy", env_id, seed=seed, device="cpu", learning_starts=100, buffer_size=1000,
        use_sde=use_sde, policy_kwargs=dict(net_arch=[16, 16]) | policy_kwargs,
    )  # fmt: skip
    if steps:
        model.learn(steps)
    model.save(path)
    return Path(path)


@pytest.fixture(scope="session")
def expert_zip(tmp_path_factory) -> Path:
    return make_sac(tmp_path_factory.mktemp("expert") / "pendulum.zip", steps=150)


@pytest.fixture(scope="session")
def small(expert_zip):
    """small(**changes): the Config values of a run of about a second."""

    def values(**changes) -> dict:
        return dict(
            env_name="Pendulum-v1", expert_path=str(expert_zip), device="cpu", n_workers=1,
            n_threads=1, K=2, H=40, max_iteration=2, alpha_decay_iterations=2, eval_every=1,
            eval_episodes=2, hidden_dim=16, batch_sz=32, train_repeat=3, lr=1e-3, final_lr=1e-4,
            log_std_min=-5, log_std_max=1, target_clip=0.99,
        ) | changes  # fmt: skip

    return values


@pytest.fixture(scope="session")
def run_main():
    """run_main(*args, **fields): the command line in this process; its status, out and err."""

    def run(*args, **fields):
        out, err, handler = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
        argv = [str(a) for a in args] + [f"--{k}={v}" for k, v in fields.items()]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = aggrevated.main(argv)
        except SystemExit as end:  # --help
            status = end.code
        finally:
            signal.signal(signal.SIGTERM, handler)
        return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())

    return run


@pytest.fixture(scope="session")
def run_script():
    """run_script(*args): `python aggrevated.py` in a process of its own."""

    def run(*args, cwd=ROOT, timeout=600):
        return subprocess.run(
            [sys.executable, str(ROOT / "aggrevated.py"), *map(str, args)],
            cwd=cwd, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip

    return run


@pytest.fixture
def make_agent(small):
    """make_agent(**changes): an agent with its simulators, without a run folder."""
    agents = []

    def make(**changes):
        config = aggrevated.Config(**small(**changes)).check()
        agents.append(aggrevated.AggreVateDAgent(config))
        agents[-1].workers = aggrevated.Workers(config)
        return agents[-1]

    yield make
    for agent in agents:
        agent.close()
