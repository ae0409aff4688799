"""Run rows of the study and score them on the test episodes.

    python logs/reference/study.py aggrevated dagger          every seed that the row has
    python logs/reference/study.py aggrevated --seeds 0 1     some of them
    python logs/reference/study.py --list

A run is `python aggrevated.py` with the options of its row; it lands in logs/reference/ROW_sSEED
with its config, evaluations and events, and the chosen policy (best.pt) of the default and of seed
0 of rows without an underscore.  test.csv has the returns of fresh test episodes, the same
terrains for every row of a task, played once by the best iterate on validation and once by the last
one.  What is there already is not done again.  One process uses one core.  The agents of the RL Zoo
that the MuJoCo rows imitate are not shipped: see README.md.
"""

import argparse
import csv
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import aggrevated  # noqa: E402

SAC = "rl-trained-agents/sac/{0}_{1}/{0}.zip"
HARDCORE = "BipedalWalkerHardcore-v3"
OLD = 14  # a test stream seen before the last choice, 128 units, which validation made
TASKS = {  # name: (options, test episodes, their stream)
    "hardcore": ({}, 500, aggrevated.TEST),
    "suboptimal": (dict(expert_path=SAC.format(HARDCORE, 2)), 500, aggrevated.TEST),
    "before": (dict(hidden_dim=256), 500, OLD),  # the Hardcore task for the default before
    "bipedal": (dict(env_name="BipedalWalker-v3"), 100, OLD),
    "pendulum": (dict(env_name="Pendulum-v1"), 100, OLD),
    "hopper": (dict(env_name="Hopper-v5", expert_path=SAC.format("Hopper-v3", 1)), 100, OLD),
    "walker2d": (
        dict(env_name="Walker2d-v5", expert_path=SAC.format("Walker2d-v3", 1)), 100, OLD
    ),
}
# The paper's own gradient, as its authors use it: large batches, one step on each, alpha falling
# over many iterations.  Hardcore needs longer steps; see README.md.
LONG = dict(hidden_dim=256, eval_every=10, eval_episodes=10)
NATURAL = dict(algorithm="score", optimizer="natural", **LONG)
MUJOCO = dict(K=50, max_iteration=60, alpha_decay_iterations=40)
FIGURE_2 = {
    "natural": NATURAL | MUJOCO | dict(kl_step=0.02),
    "adam": dict(algorithm="score", lr=1e-3, **LONG) | MUJOCO,
    "dagger": dict(algorithm="dagger"),
    "reinforce": dict(algorithm="reinforce", lr=1e-3, **LONG) | MUJOCO,
}
FEW = dict(max_iteration=5, update_sz=30_000)  # a third of the iterations, a fifteenth of the draws
ABLATIONS = {  # of the default before
    "cut_100": dict(gap_cut=100.0),
    "factor_1": dict(gap_factor=1.0),
    "noise_0": dict(roll_in_noise=0.0),
    "slow_alpha": dict(alpha_decay_iterations=10),
    "hidden_128": dict(hidden_dim=128),
    "N_30": dict(max_iteration=30, alpha_decay_iterations=8, eval_every=6),
}
ROWS = {  # row: (task, options, seeds)
    "aggrevated": ("hardcore", dict(eval_every=3), 5),  # for the curve; training does not notice
    "dagger": ("hardcore", dict(algorithm="dagger", eval_every=3), 5),
    "aggrevate": ("hardcore", dict(algorithm="aggrevate"), 3),
    "bc": ("hardcore", dict(algorithm="bc"), 3),
    "minmax": ("hardcore", dict(algorithm="minmax", train_repeat=50), 3),
    "units_256": ("hardcore", dict(hidden_dim=256), 5),
    "natural": (
        "before",
        NATURAL | dict(K=60, max_iteration=100, alpha_decay_iterations=60, kl_step=0.1),
        3,
    ),
    "reinforce": ("before", FIGURE_2["reinforce"], 1),
    "suboptimal": ("suboptimal", {}, 5),
    "few_aggrevated": ("hardcore", FEW, 5),
    "few_dagger": ("hardcore", FEW | dict(algorithm="dagger"), 5),
}
ROWS |= {
    "before": ("before", {}, 5),  # units_256's runs, on the ablations' terrains
    "dagger_256": ("before", dict(algorithm="dagger"), 5),
    "bc_256": ("before", dict(algorithm="bc"), 3),
}
ROWS |= {name: ("before", options, 3) for name, options in ABLATIONS.items()}
ROWS |= {task: (task, {}, 5) for task in ("bipedal", "pendulum", "hopper", "walker2d")}
ROWS |= {
    f"{task}_{name}": (task, options, 3)
    for task in ("hopper", "walker2d")
    for name, options in FIGURE_2.items()
}


def obstacle(stream: tuple, actions: np.ndarray) -> str:
    """What Hardcore's episode ended at: the obstacle within 4 steps of the hull, or grass."""
    step, names = 14 / 30, {4: "pit", 1: "stairs"}  # the terrain's unit; widths in it
    env = aggrevated.make_env(HARDCORE)
    env.reset(seed=int(np.random.default_rng(stream).integers(2**31)))
    for action in actions:
        env.step(action)
    x, near = env.unwrapped.hull.position.x, [(4 * step, "grass")]
    for corners in (np.array(body.fixtures[0].shape.vertices) for body in env.unwrapped.terrain):
        (left, low), (right, high) = corners.min(axis=0), corners.max(axis=0)
        width, height = round((right - left) / step), round((high - low) / step)
        if len(corners) == 4:  # an obstacle, known by its size in steps; the ground is edges
            name = f"stump_{height}" if width == height else names[height]
            near.append((max(left - x, x - right, 0.0), name))
    return min(near)[1]


def play(config: aggrevated.Config, who: str, task: str, weights=None) -> list[tuple]:
    """A row of test.csv per test episode of "learner" or "expert", by the mean action."""
    _, episodes, stream = TASKS[task]
    config.n_workers, config.init_path = 1, ""
    agent = aggrevated.AggreVateDAgent(config)
    if weights is not None:
        agent.policy.load_state_dict(weights)
    rows = []
    for i, t in enumerate(agent.evaluate(who, episodes, stream)):
        score = float(t.rewards.sum())
        failed = config.env_name == HARDCORE and score < 250
        end = obstacle((stream, i), t.actions) if failed else ""
        rows.append((i, round(score, 3), len(t.rewards), end))
    return rows


def write(path: Path, played: dict[str, list[tuple]]) -> None:
    """test.csv, a line per episode."""
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("policy", "episode", "return", "length", "ended_at"))
        table.writerows((who, *row) for who in played for row in played[who])


def score_expert(task: str) -> None:
    """expert_TASK/test.csv: the expert itself on the test episodes of its task."""
    path = HERE / f"expert_{task}" / "test.csv"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        config = aggrevated.Config(**TASKS[task][0]).check()
        write(path, {"expert": play(config, "expert", task)})


def score(run: Path, task: str) -> None:
    """run/test.csv: the iterate that validation chose, and the last one."""
    best, last = (aggrevated.load_checkpoint(run / f"{name}.pt") for name in ("best", "last"))
    played = {"best": play(best["config"], "learner", task, best["policy"])}
    same = best["iteration"] == last["iteration"]
    played["last"] = (
        played["best"] if same else play(last["config"], "learner", task, last["policy"])
    )
    write(run / "test.csv", played)
    (run / "last.pt").unlink()  # it holds the experience
    row, _, seed = run.name.rpartition("_s")
    if row != "aggrevated" and (seed != "0" or "_" in row):  # for their size
        (run / "best.pt").unlink()


def train(row: str, seed: int, run: Path) -> None:
    """One run, by the command that a user would give."""
    task, changes, _ = ROWS[row]
    with tempfile.TemporaryDirectory(dir=HERE, prefix=".") as log_dir:
        options = TASKS[task][0] | changes | dict(seed=seed, n_workers=1)
        options["log_dir"] = os.path.relpath(log_dir)  # it ends up in the run's own files
        if (row, seed) != ("aggrevated", 0):  # films are large
            aggrevated.film = lambda *_: None
        if aggrevated.main([f"--{k}={v}" for k, v in options.items()]):
            sys.exit(f"{row}, seed {seed} stopped")
        (made,) = Path(log_dir).iterdir()
        shutil.move(made, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="see --list")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: all that the row has")
    parser.add_argument("--list", action="store_true", help="print all rows and what is missing")
    args = parser.parse_args()
    for row in ROWS if args.list else args.rows:
        task, options, n_seeds = ROWS[row]
        runs = [(seed, HERE / f"{row}_s{seed}") for seed in args.seeds or range(n_seeds)]
        if args.list:
            missing = [seed for seed, run in runs if not (run / "test.csv").exists()]
            print(f"{row:20s} {task:12s} seeds missing: {missing or 'none'}  {options}")
            continue
        score_expert(task)
        for seed, run in runs:
            if not run.exists():
                train(row, seed, run)
            if not (run / "test.csv").exists():
                score(run, task)
            print(f"{run.name} scored", flush=True)


if __name__ == "__main__":
    main()
