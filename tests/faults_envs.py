"""Tiny environments with one fault each; `faults_envs:NAME-v0` finds them in any process."""

import os
import signal
import time
from multiprocessing import current_process

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete


class Odd(gym.Env):
    """A walk in 3 dimensions with 2 actions, 5 steps long; `fault` says what is wrong with it."""

    metadata = {"render_modes": ["rgb_array", "human"]}

    resets = 0

    def __init__(self, fault="", render_mode=None):
        if fault == "raises":
            raise ValueError("no such robot")
        self.fault, self.render_mode = fault, render_mode
        self.dtype = np.float64 if fault.startswith("float64") else np.float32
        self.action_space = Box(np.float32([-2, 0]), np.float32([1, 3]))
        self.observation_space = Box(-np.inf, np.inf, (3,), self.dtype)
        if fault == "narrow":
            self.action_space = Box(np.float32([-0.1, -0.7]), np.float32([0.3, 0.1]))
        elif fault == "discrete":
            self.action_space = Discrete(3)
        elif fault == "unbounded":
            self.action_space = Box(-np.inf, np.inf, (2,))
        elif fault == "half_bounded":
            self.action_space = Box(np.float32([0, 0]), np.float32([1, np.inf]))
        elif fault == "equal_bounds":
            self.action_space = Box(np.float32([0, 1]), np.float32([1, 1]))
        elif fault == "matrix_actions":
            self.action_space = Box(-1, 1, (2, 2))
        elif fault == "no_actions":
            self.action_space = Box(-1, 1, (0,))
        elif fault == "dict":
            self.observation_space = Dict(x=Box(-1, 1, (3,)))
        elif fault == "image":
            self.observation_space = Box(0, 255, (8, 8, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.x = 0, self.np_random.standard_normal(3)
        Odd.resets += 1  # of the process: every trajectory has an environment of its own
        if self.fault == "dies" and Odd.resets == 5 and current_process().name.endswith("-1"):
            os.kill(os.getpid(), signal.SIGKILL)  # only the first worker
        if self.fault == "slow" and "FAULTS_SIGN" in os.environ:
            open(f"{os.environ['FAULTS_SIGN']}/{os.getpid()}", "w").close()
        return self._observe(), {}

    def step(self, action):
        if self.fault == "narrow" and not self.action_space.contains(action):
            raise AssertionError(f"{action} is outside {self.action_space}")
        if self.fault == "slow":
            time.sleep(0.05)
        self.t += 1
        self.x = 0.9 * self.x + 0.1 * np.array([*action, 1.0])
        reward = {"nan_reward": np.nan, "inf_reward": -np.inf}.get(self.fault, -(self.x**2).sum())
        endless = self.fault in ("truncates", "slow")
        last = self.t >= (1 if self.fault == "one_step" else 5)
        return self._observe(), float(reward), last and not endless, False, {}

    def _observe(self):
        if self.t == 3:
            odd = {"nan_obs": np.nan, "inf_obs": np.inf, "float64_huge": 1e300}.get(self.fault)
            self.x[0] = self.x[0] if odd is None else odd
        return self.x.astype(self.dtype)

    def render(self):
        return np.full((8, 8, 3), 10 * self.t % 255, np.uint8)


FAULTS = (
    "plain", "raises", "float64", "float64_huge", "narrow", "discrete", "unbounded", "half_bounded",
    "equal_bounds", "matrix_actions", "no_actions", "dict", "image", "dies", "slow", "nan_obs",
    "inf_obs", "nan_reward", "inf_reward", "one_step", "truncates",
)  # fmt: skip
LIMITS = {"truncates": 4, "slow": 10_000}
for fault in FAULTS:
    gym.register(
        f"{fault}-v0", Odd, kwargs=dict(fault=fault), max_episode_steps=LIMITS.get(fault, 50)
    )
