"""Environments of a few steps; `tiny_envs:NAME-v0` finds them in every process."""

import gymnasium as gym
import numpy as np


class Tiny(gym.Env):
    """Ends after 3 or 9 steps, as the seed says (5 at most); refuses a step after the end.

    An observation is (steps so far, length, a random number that tells episodes apart).
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))

    def __init__(self, render_mode=None, low=(-2,), high=(2,)):
        self.render_mode = render_mode
        self.action_space = gym.spaces.Box(np.float32(low), np.float32(high))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.length = 0, int(self.np_random.choice([3, 9]))
        self.name, self.over = self.np_random.uniform(0.5, 1), False
        return self.observe(), {}

    def step(self, action):
        assert not self.over and action.shape == self.action_space.shape
        self.t += 1
        self.over = self.t == self.length
        return self.observe(), float(self.t), self.over, False, {}

    def observe(self):
        return np.array([self.t, self.length, self.name], dtype=np.float32)


class Undrawable(Tiny):
    metadata = {"render_modes": ["rgb_array"]}

    def render(self):
        raise RuntimeError("no display")


class WithoutRenderMode(Tiny):
    def __init__(self):
        super().__init__()


for cls in (Tiny, Undrawable, WithoutRenderMode):
    gym.register(f"{cls.__name__}-v0", cls, max_episode_steps=5)
for name, low, high in [
    ("Narrow", (-1,), (1,)), ("Lopsided", (-3, 0), (1, 10)), ("Unbounded", (-np.inf,), (np.inf,)),
]:  # fmt: skip
    gym.register(f"{name}-v0", Tiny, max_episode_steps=5, kwargs=dict(low=low, high=high))
