"""Several seeds of your own setting, and one curve of them all.

    python logs/reference/scripts/seeds.py logs/MINE --seeds 0 1 2 -- --K 20 --lr 5e-3

What stands after -- are options of aggrevated.py.  The runs are made in logs/MINE, one after
another; one that was stopped goes on.  Draws logs/MINE/curve.png.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from common import ROOT, ag
import matplotlib
import numpy as np
from study import is_finished

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def train(folder: Path, seed: int, options: list[str]) -> list[dict]:
    """The evaluations of the seed's run, after all its iterations."""
    last = next(folder.glob(f"*_s{seed}_*/last.pt"), None)
    if not last or not is_finished(last, ag.parse(options)):
        how = [f"--resume={last.parent}"] if last else [f"--seed={seed}", f"--log_dir={folder}"]
        if subprocess.call([sys.executable, ROOT / "aggrevated.py", *options, *how]):
            sys.exit("The same command goes on.")
    return json.loads(next(folder.glob(f"*_s{seed}_*/evaluations.json")).read_text())


def draw(runs: list[list[dict]], path: Path) -> None:
    """Mean returns of the seeds, and a band from the worst to the best; the expert's, dashed."""
    expert, *points = zip(*runs)  # as many as the shortest run has
    steps = [np.mean([e["env_steps"] for e in point]) for point in points]
    means = np.array([[np.mean(e["returns"]) for e in point] for point in points])
    plt.fill_between(steps, means.min(axis=1), means.max(axis=1), alpha=0.2)
    plt.plot(steps, means.mean(axis=1), marker="o", label=f"learner, {len(runs)} seeds")
    plt.axhline(np.mean(expert[0]["returns"]), color="black", linestyle="--", label="expert")
    plt.xlabel("environment steps of training")
    plt.ylabel(f"mean return of {len(expert[0]['returns'])} validation episodes")
    plt.legend()
    plt.savefig(path, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where runs and curve are made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="0 1 2 by default")
    end = [*sys.argv, "--"].index("--")
    args, options = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    runs = [train(args.folder, seed, options) for seed in args.seeds]
    draw(runs, args.folder / "curve.png")
    print(args.folder / "curve.png")
