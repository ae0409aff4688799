"""What the critics say of actions around the expert's, and what came when they were played.

    python logs/reference/scripts/candidates.py     writes candidates.csv, from past_expert_s0.pt

In states that the learner visits, two candidates around the expert's action a*: the first that is
drawn, and that one of 16 others which has the largest advantage by the evaluated critics, the min
over them of Q_i(s, a) - Q_i(s, a*); beside it the same by SAC's own.  What came is the return of a
replay in which the candidate is played once and the expert goes on, less that of a* in its place.
"""

import pickle

from common import HARDCORE, HERE, ROOT, ag, terrain
import numpy as np
import torch
from tqdm import tqdm, trange

STREAM, EPISODES, STEPS = 13, 250, 800  # the learner's episodes; later states' replays are long
STATES, BEFORE, AFTER = 150, 150, 400  # of each kind; steps before a fall; steps after the state
CANDIDATES, NOISE, FALL = 16, 0.3, -25.0  # as in training; the task's actions are in [-1, 1]

CONFIG = ag.Config(env_name=HARDCORE)


def draw_states(episodes: list, rng) -> list[list[int]]:
    """[episode, step, whether it is within BEFORE steps of a fall], STATES of each kind."""
    kinds: tuple = [], []
    for i, t in enumerate(episodes):
        for step in range(n := len(t.rewards)):
            before = bool(t.rewards[-1] == -100 and step >= n - BEFORE)
            if before or step < STEPS - BEFORE:  # later ones may be before a fall after STEPS
                kinds[before].append((i, step, int(before)))
    return sorted(np.concatenate([rng.choice(k, STATES, replace=False) for k in kinds]).tolist())


def advantages(expert, state: np.ndarray, action: np.ndarray) -> list[np.ndarray]:
    """What actions (M, 4) are better by than the first (M,), by evaluated critics and SAC's own."""
    q = expert.q_values(torch.from_numpy(state).expand(len(action), -1), torch.from_numpy(action))
    own, evaluated = (q - q[0]).chunk(2, dim=1)
    return [x.amin(dim=1).numpy() for x in (evaluated, own)]  # all must agree


def replay(expert, i: int, trajectory, step: int, action: np.ndarray) -> float:
    """The discounted return from a state on, by this action and then the expert's."""
    env, total = ag.make_env(CONFIG), 0.0
    state, _ = env.reset(seed=terrain((STREAM, i)))
    for earlier in np.clip(trajectory.actions[:step], -1, 1):
        state, *_ = env.step(earlier)
    assert np.array_equal(state, trajectory.states[step])
    for k in range(AFTER):
        state, reward, ended, *_ = env.step(np.clip(action, -1, 1))
        total += expert.gamma**k * (FALL if reward == -100 else reward)
        if ended:
            break
        action = expert.predict(state)
    return total


if __name__ == "__main__":
    torch.set_num_threads(1)
    env, rng, lines = ag.make_env(CONFIG), np.random.default_rng((STREAM, EPISODES)), []
    path = ROOT / f"rl-trained-agents/sac/{HARDCORE}_4/{HARDCORE}.zip"
    expert = ag.SACExpert(path, env.observation_space, env.action_space)
    players = pickle.dumps((ag.load_policy(HERE / "policies" / "past_expert_s0.pt"), expert))
    how, streams = (players, CONFIG, 0.0, 0.0, STEPS), trange(EPISODES, desc="playing")
    episodes = [ag.play_episode(*how, (STREAM, i)) for i in streams]
    for i, step, before in tqdm(draw_states(episodes, rng), desc="replaying"):
        t, noise = episodes[i], NOISE * rng.standard_normal((2 + CANDIDATES, 4))
        noise[0] = 0  # a* itself
        action = np.clip(expert.predict(t.states[step]) + noise, -1, 1).astype(np.float32)
        said = advantages(expert, t.states[step], action)
        tried = dict(random=1, best=2 + said[0][2:].argmax())
        a_star = replay(expert, i, t, step, action[0])
        for kind, m in tried.items():
            numbers = *(x[m] for x in said), replay(expert, i, t, step, action[m]) - a_star
            lines.append((i, step, before, kind, *(f"{x:.4f}" for x in numbers)))
    names = "episode,step,before_fall,candidate,advantage,advantage_zip,came"
    np.savetxt(HERE / "candidates.csv", lines, "%s", ",", header=names, comments="")
