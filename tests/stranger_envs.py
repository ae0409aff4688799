"""An environment as strangers make them: `stranger_envs:Strange-v0`, odd as its keywords say."""

from pathlib import Path

import gymnasium as gym
import numpy as np


class Strange(gym.Env):
    """It observes steps so far, position and a random number; a picture is these as a colour."""

    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)

    def __init__(self, render_mode=None, dtype="float32", pay=None, nan_at=None, broken=""):
        self.render_mode, self.pay, self.nan_at, self.broken = render_mode, pay, nan_at, broken
        self.action_space = gym.spaces.Box(-2, 2, (1,), np.dtype(dtype).type)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seen = np.array([0, 0, self.np_random.uniform()])
        return self.seen.copy(), {}

    def step(self, action):
        assert self.action_space.contains(action), action  # its type too
        if Path(self.broken).is_file():
            raise ArithmeticError("the motor is gone")
        self.seen += [1, action.item(), 0]
        seen = np.full(3, np.nan) if self.seen[0] == self.nan_at else self.seen.copy()
        reward = -abs(self.seen[1]) if self.pay is None else self.pay
        return seen, np.array([reward]), False, False, {}

    def render(self):
        if self.pay is not None:
            raise NotImplementedError
        return np.full((40, 200, 3), colour(self.seen), np.uint8)


def colour(seen):
    return (np.abs(seen) * [10, 5, 255]).astype(np.uint8)


for name, threshold in [("Strange", None), ("Solvable", 100.0), ("Negative", -3.75)]:
    gym.register(f"{name}-v0", Strange, max_episode_steps=20, reward_threshold=threshold)
