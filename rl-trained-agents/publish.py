"""Average a span of a train_sac.py run into one agent, score it, and put it into sac/.

    python rl-trained-agents/publish.py RUN_DIR --n 1 --first 350000 --last 700000

The score comes from fresh episodes by the mean action in the untouched environment, and nothing
was ever chosen on them; `score.json` beside the zip has it and what else was measured.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import gymnasium
import numpy as np
import stable_baselines3
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aggrevated import AggreVateDAgent, Config, make_env, returns_to_go

SCORE = 9  # the random stream of the scores, which neither training nor any validation uses
FALL = -100.0  # the last reward of an episode that ended in a fall
BEFORE_FALL = (0, 5), (5, 10), (10, 20), (20, 40), (40, 80), (80, 150)  # steps; 0 is the fall
STEP = 14 / 30  # BipedalWalker's unit of terrain [m]


def merge(paths: list[Path], which: str, env_name: str, net_arch: list[int], zip_path: Path):
    """Save the mean of the checkpoints' weights, actor's and critics', as a plain SB3 agent.

    A fresh agent takes them, so that no optimiser state or buffer comes along.  Its gamma is SB3's
    default, as the run's.  Returns the last checkpoint.
    """
    checkpoints = [torch.load(path, map_location="cpu", weights_only=True) for path in paths]
    states = [checkpoint[which] for checkpoint in checkpoints]
    mean = {k: torch.stack([s[k] for s in states]).double().mean(dim=0) for k in states[0]}
    how = dict(policy_kwargs=dict(net_arch=net_arch), buffer_size=1, device="cpu")
    model = stable_baselines3.SAC("MlpPolicy", make_env(env_name), **how)
    model.policy.load_state_dict(mean)
    model.save(zip_path)
    return checkpoints[-1]


def play_after_a_learner(agent: AggreVateDAgent, n: int) -> list[tuple]:
    """(episode, the expert's first step) from states that a half-trained learner got itself into.

    It has had 5 iterations of the defaults and acts for up to 500 steps, a quarter of the longest
    episode at most.  Episodes that end before the expert's turn are left out.
    """
    for i in range(1, 6):
        agent.iterate(i)
    firsts = np.random.default_rng(SCORE).integers(min(500, agent.horizon // 4), size=n)
    alphas = np.arange(agent.horizon) >= firsts[:, None]  # (n, H): the expert's share of each step
    runs = [agent.simulate([(SCORE, i)], a, 0.0, agent.horizon)[0] for i, a in enumerate(alphas)]
    return [(t, first) for t, first in zip(runs, firsts) if len(t.rewards) > first]


def audit(agent: AggreVateDAgent, episodes: list[tuple], fall_reward: float) -> dict:
    """Q*(s, a) against the discounted return that then came, a fall paid as the critics know it."""
    columns = []
    for t, first in episodes:
        q = agent.get_q_star(torch.from_numpy(t.states), torch.from_numpy(t.actions))[:, 0].numpy()
        rewards, end, to_fall = t.rewards.copy(), len(q), np.full(len(q), np.inf)
        if rewards[-1] == FALL:
            rewards[-1], to_fall = fall_reward, np.arange(end)[::-1]
        elif end == agent.horizon:  # what the limit cuts off is taken from Q*, and weighs little
            rewards[-1], end = q[-1], max(end - 500, end // 4)
        g = returns_to_go(rewards, agent.expert.gamma)
        columns.append(np.stack([q, g, to_fall])[:, first:end])
    q, g, to_fall = np.concatenate(columns, axis=1)
    result = dict(steps=len(q), mean_q=q.mean(), mean_return=g.mean(), bias=(q - g).mean())
    result |= dict(correlation=np.corrcoef(q, g)[0, 1], falls=int((to_fall == 0).sum()))
    if result["falls"]:
        near = {f"{a}-{b}": (a <= to_fall) & (to_fall < b) for a, b in BEFORE_FALL}
        result["before_fall"] = {k: dict(q=q[x].mean(), came=g[x].mean()) for k, x in near.items()}
    return result


def obstacle(env_name: str, i: int, actions: np.ndarray) -> str:
    """What episode i of the score ended at: the obstacle nearest to the hull, or grass.

    Obstacles are polygons, known by their size in steps; the ground between them is edges.
    """
    env, names = make_env(env_name), {(4, 1): "stairs", (1, 4): "pit"}  # a pit's two sides
    env.reset(seed=int(np.random.default_rng((SCORE, i)).integers(2**31)))
    for action in actions:
        env.step(action)
    x, near = env.unwrapped.hull.position.x, [(4 * STEP, "grass")]
    for corners in (np.array(body.fixtures[0].shape.vertices) for body in env.unwrapped.terrain):
        (left, low), (right, high) = corners.min(axis=0), corners.max(axis=0)
        size = round((right - left) / STEP), round((high - low) / STEP)
        if len(corners) == 4:
            near.append((max(left - x, x - right, 0.0), names.get(size, f"stump_{size[1]}")))
    return min(near)[1]


def draw_curve(run_dir: Path, path: Path) -> None:
    """evaluations.csv as a picture."""
    log = np.atleast_1d(np.genfromtxt(run_dir / "evaluations.csv", delimiter=",", names=True))
    x, mean, error = log["updates"], log["average_return"], log["standard_error"]
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(x, mean - error, mean + error, alpha=0.3)
    axes.plot(x, mean, label="averaged weights, mean action")
    axes.plot(x, log["sampled_return"], label="training episodes, sampled actions")
    axes.set(xlabel="updates", ylabel="return", title=run_dir.name)
    axes.legend()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("run_dir", type=Path, help="a run folder of train_sac.py")
    option("--n", type=int, required=True, help="the agent's number in sac/")
    option("--first", type=int, default=0, help="no checkpoint before so many updates")
    option("--last", type=int, default=10**9, help="none after so many")
    option("--which", choices=("average", "last"), default="average", help="last: of --last alone")
    option("--env_name", help="by default what the run folder is called, up to _s")
    option("--episodes", type=int, default=500, help="of the score")
    option("--learner_episodes", type=int, default=100, help="of the audit after a learner")
    option("--n_workers", type=int, default=1, help="processes that play")
    option("--obstacles", action="store_true", help="count at what the episodes below 250 ended")
    option("--logs", action="store_true", help="copy and draw the run's logs, for its first agent")
    option("--out", type=Path, default=Path(__file__).resolve().parent / "sac", help="not sac/")
    args = parser.parse_args()
    run_dir = args.run_dir.resolve()
    env_name = args.env_name or run_dir.name.rsplit("_s", 1)[0]
    settings = json.loads((run_dir / "settings.json").read_text())
    paths = [p for p in sorted(run_dir.glob("*.pt")) if args.first <= int(p.stem) <= args.last]
    paths = paths if args.which == "average" else paths[-1:]
    if not paths:
        parser.error(f"{run_dir} has no checkpoint from --first to --last")
    folder = args.out / f"{env_name}_{args.n}"
    folder.mkdir(parents=True, exist_ok=True)
    zip_path = folder / f"{env_name}.zip"
    newest = merge(paths, args.which, env_name, settings["net_arch"], zip_path)
    how = dict(expert_path=str(zip_path), n_workers=args.n_workers, device="cpu")
    agent = AggreVateDAgent(Config(env_name=env_name, **how).check())
    played = agent.evaluate("expert", args.episodes, SCORE)
    rows = np.array([(i, t.rewards.sum(), len(t.rewards)) for i, t in enumerate(played)])
    np.savetxt(
        folder / "returns.csv", rows, "%d,%.3f,%d", header="episode,return,length", comments=""
    )
    returns, spread = rows[:, 1], rows[:, 1].std(ddof=1)
    score = dict(
        env_name=env_name,
        run=run_dir.name,
        checkpoints=dict(
            which=args.which, first=int(paths[0].stem), last=int(paths[-1].stem), number=len(paths)
        ),
        **{k: newest[k] for k in ("updates", "env_steps", "minutes")},
        gamma=agent.expert.gamma,
        score=dict(
            mean=returns.mean(),
            std=spread,
            standard_error=spread / len(returns) ** 0.5,
            solved=np.mean(returns >= 300),
            at_least_250=np.mean(returns >= 250),
            episodes=len(returns),
        ),
        q_audit=audit(agent, [(t, 0) for t in played], settings["fall_reward"]),
    )
