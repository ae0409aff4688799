"""Environments of a few steps; `tiny_envs:NAME-v0` finds them in every process."""

import random
from pathlib import Path

import gymnasium as gym
import numpy as np


class Tiny(gym.Env):
    """Ends after 3 or 9 steps, as the seed says (5 at most); refuses a step after the end."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))

    def __init__(self, render_mode=None, low=(-2,), high=(2,), dtype=np.float32):
        self.render_mode = render_mode
        self.action_space = gym.spaces.Box(dtype(low), dtype(high), dtype=dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.length = 0, int(self.np_random.choice([3, 9]))
        self.name, self.over = self.np_random.uniform(0.5, 1), False
        return self.observe(), {}

    def step(self, action):
        assert not self.over and self.action_space.contains(action)
        assert action.dtype == self.action_space.dtype
        self.t += 1
        self.over = self.t == self.length
        return self.observe(), np.array([self.t]), self.over, False, {}  # some pay in arrays

    def observe(self):
        return np.array([self.t, self.length, self.name])  # which tells episodes apart


class Guess(Tiny):
    """Every step is a problem of its own: the reward, 0 at best, is Q* whatever follows."""

    def observe(self):
        self.state = self.np_random.uniform(-1, 1, 3)
        return self.state

    def step(self, action):
        reward = -((action - 1.5 * self.state[0]) ** 2)[0]
        return self.observe(), reward, False, False, {}


class Strange(gym.Env):
    """As strangers make them: steps, position and a number; -|position + number|, or `pay`."""

    metadata = {"render_modes": ["rgb_array"]}
    open = 0  # simulators in this process

    def __init__(
        self, render_mode=None, dtype="float32", low=(-2,), high=(2,), seen_dtype="float64",
        pay=None, nan_at=None, broken="", flaw="",
    ):  # fmt: skip
        self.render_mode, self.pay, self.nan_at, self.broken = render_mode, pay, nan_at, broken
        self.action_space = gym.spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)
        self.observation_space = gym.spaces.Box(-1000, 1000, (3,), seen_dtype)
        self.flaw, self.number = flaw, np.random.uniform()
        if flaw == "no display":
            raise OSError("no display")
        if flaw == "only one" and Strange.open:
            raise RuntimeError("the simulator is in use")
        Strange.open += 1

    def close(self):
        Strange.open -= 1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        ways = dict(numpy=np.random.uniform, random=random.random, constructor=lambda: self.number)
        number = ways.get(self.flaw, self.np_random.uniform)()
        # observations of a space of integers have fractions all the same
        kind = "float32" if self.observation_space.dtype == "float32" else "float64"
        self.seen = np.array([0, 0, number], kind)
        return self.observe(), {}

    def step(self, action):
        integer = self.action_space.dtype.kind == "i"  # SB3 gives floats all the same
        assert integer or self.action_space.contains(action), action  # its type too
        if Path(self.broken).is_file():
            raise ArithmeticError("the motor is gone")
        self.seen += [1, action.sum(), 0]
        reward = -abs(self.seen[1:].sum()) if self.pay is None else self.pay
        return self.observe(), reward, False, False, {}

    def observe(self):
        if self.seen[0] == self.nan_at:
            return np.full(3, np.nan)
        ways = {"in place": self.seen, "row": self.seen[None].copy()}
        return ways.get(self.flaw, self.seen.copy())

    def render(self):
        if self.pay is not None:
            raise NotImplementedError
        return np.full((40, 200, 3), colour(self.seen), np.uint8)


def colour(seen):
    return (np.abs(seen) * [10, 5, 255]).astype(np.uint8)


gym.register("Guess-v0", Guess, max_episode_steps=5)
for name, kwargs in dict(
    Lopsided=dict(low=(-3, 0), high=(1, 10)), Unbounded=dict(low=(-np.inf,), high=(np.inf,)),
    Double=dict(low=(-0.3,), high=(0.1,), dtype=np.float64), Tiny={},  # float32's 0.1 is beyond it
).items():  # fmt: skip
    gym.register(f"{name}-v0", Tiny, max_episode_steps=5, kwargs=kwargs)
for name, threshold in [("Strange", None), ("own/Strange", None), ("Negative", -3.75)]:
    gym.register(f"{name}-v0", Strange, max_episode_steps=20, reward_threshold=threshold)
