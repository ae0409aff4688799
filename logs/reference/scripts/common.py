"""What the scripts of the study share: its rows, its terrains, its two tables, and playing."""

import csv
import fcntl
import json
import os
import pickle
import sys
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy is loaded: one process, one core
import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parents[1]  # logs/reference
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
import aggrevated as ag  # noqa: E402

TERRAINS = {"test": ag.TEST, "validation": 17}  # streams; the second is for choosing settings
WHY, HOPPER = 10, 12  # streams of why.py and hopper.py
HARDCORE = "BipedalWalkerHardcore-v3"
FAILED = 250  # Hardcore's episodes below it ended in a fall or by the clock
TABLES = json.loads((HERE / "rows.json").read_text())
PRINTED = TABLES.pop("printed")  # which rows stand in which other tables and figures
ROWS = {name: row for table in TABLES.values() for name, row in table.items()}


def expert_of(row: str) -> str:
    """The row of a row's expert; an expert is its own."""
    return ROWS[row].get("expert", row)


def options_of(row: str) -> dict:
    """The options of `aggrevated.py` that make a row, but for the seed."""
    return ROWS[expert_of(row)]["options"] | ROWS[row]["options"]


def read(name: str) -> list[dict]:
    """The lines of a table."""
    with open(HERE / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def missing(row: str, seeds=None, terrains=None) -> list[tuple]:
    """(seed, terrains) of a row that have no scores; an expert has no seed."""
    there = {(x["seed"], x["terrains"]) for x in read("returns") if x["row"] == row}
    wanted = [terrains] if terrains else ROWS[row].get("terrains", ["test"])
    pairs = [(seed, t) for seed in seeds or ROWS[row].get("seeds", [""]) for t in wanted]
    return [(seed, t) for seed, t in pairs if (str(seed), t) not in there]


@contextmanager
def lock(path: Path, wait=True):
    """Hold a lock between processes; gives False if another has it and we shall not wait."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file = None
        yield file is not None


def place(line: dict) -> tuple:
    """Where a line stands in its table: rows as in rows.json, then seeds and terrains."""
    order = [*ROWS, line["row"]].index(line["row"])  # a row that is new in the file comes last
    return order, line["row"], int(line["seed"] or 0), line.get("terrains")


def merge(name: str, new: list[tuple]) -> None:
    """Put new lines into a table, instead of old ones of the same row, seed and terrains.

    Other processes may do so at the same time, and a kill leaves the old table or the new one.
    """
    with lock(HERE / ".lock"):
        columns = (HERE / f"{name}.csv").read_text().split("\n", 1)[0].split(",")
        lines = [dict(zip(columns, map(str, line), strict=True)) for line in new]
        again = set(map(place, lines))
        lines += [line for line in read(name) if place(line) not in again]
        with open(HERE / f".{name}.tmp", "w", newline="") as file:
            table = csv.DictWriter(file, columns, lineterminator="\n")
            table.writeheader()
            table.writerows(sorted(lines, key=place))
        os.replace(HERE / f".{name}.tmp", HERE / f"{name}.csv")


def terrain(stream: tuple) -> int:
    """The environment's seed in an episode, as `aggrevated.play_episode` draws it."""
    return int(np.random.default_rng(stream).integers(2**31))


def obstacle(stream: tuple, actions: np.ndarray) -> str:
    """What Hardcore's episode ended at: the obstacle within 4 steps of the hull, or grass."""
    step, names = 14 / 30, {4: "pit", 1: "stairs"}  # the terrain's unit; widths in it
    env = ag.make_env(ag.Config(env_name=HARDCORE))
    env.reset(seed=terrain(stream))
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


def play(row: str, terrains: str, policy=None, episodes=None) -> list[tuple]:
    """(episode, return, length, ended_at) of a policy's mean action, by default the expert's.

    In all episodes of these terrains, or only in some.
    """
    agent = ag.AggreVateDAgent(ag.Config(**options_of(row), n_workers=1, device="cpu"))
    c, players, played = agent.config, pickle.dumps((policy, agent.expert)), []
    n = min(ROWS[expert_of(row)].get("episodes", 500), 300 if terrains == "validation" else 500)
    alpha = float(policy is None)
    for i in tqdm(episodes or range(n), desc=row):
        stream = TERRAINS[terrains], i
        t = ag.play_episode(players, c, alpha, 0.0, agent.horizon, stream)
        total = float(t.rewards.sum())
        failed = c.env_name == HARDCORE and total < FAILED
        end = obstacle(stream, t.actions) if failed else ""
        played.append((i, round(total, 3), len(t.rewards), end))
    return played


def score(row: str, seed, terrains: str, policies: dict) -> None:
    """Put the episodes of {iterate: policy} into returns.csv."""
    played = {k: play(row, terrains, policy) for k, policy in policies.items()}
    merge("returns", [(row, seed, k, terrains, *x) for k, xs in played.items() for x in xs])
