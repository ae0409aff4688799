"""Draw the README's pictures and print its table from the runs beside this file, nothing else.

    python logs/reference/draw.py

Needs matplotlib, which Stable-Baselines3 brings along.
"""

import csv
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent


def read(path: Path, columns: tuple[str, ...]) -> dict[tuple, list[float]]:
    """Returns of a CSV's episodes, grouped by the given columns, in the order of the file."""
    groups: dict[tuple, list[float]] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            groups.setdefault(tuple(row[c] for c in columns), []).append(float(row["return"]))
    return groups


def paired_interval(learner: np.ndarray, expert: np.ndarray, draws=10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean difference of (seeds, episodes), over both."""
    rng, difference = np.random.default_rng(0), learner - expert
    seeds, episodes = difference.shape
    s = rng.integers(seeds, size=(draws, seeds))
    e = rng.integers(episodes, size=(draws, episodes))
    means = np.array([difference[np.ix_(i, j)].mean() for i, j in zip(s, e)])
    return tuple(np.percentile(means, [2.5, 97.5]))


def table(runs: list[Path]) -> str:
    """The README's table: test episodes of each run's best and last policy beside the expert."""
    lines = [
        "| policy | seeds | episodes each | mean ± std | ≥ 300 | difference to expert, 95 % CI |",
        "|---|---|---|---|---|---|",
    ]
    tests = [read(run / "test.csv", ("policy",)) for run in runs]
    expert = np.array([t[("expert",)] for t in tests])
    for who in ("expert", "best", "last"):
        x = np.array([t[(who,)] for t in tests])
        low, high = paired_interval(x, expert)
        gap = "" if who == "expert" else f"{(x - expert).mean():+.1f} ({low:+.1f} to {high:+.1f})"
        lines.append(
            f"| {who if who == 'expert' else 'learner, ' + who} | {len(runs)} | {x.shape[1]} "
            f"| {x.mean():.1f} ± {x.std():.1f} | {(x >= 300).mean():.1%} | {gap} |"
        )
    return "\n".join(lines)


def draw_curves(runs: list[Path]) -> None:
    """Validation returns over environment steps, a line per seed, and the expert's."""
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for run in runs:
        groups = read(run / "evaluations.csv", ("policy", "env_steps"))
        steps = [int(k[1]) for k in groups if k[0] == "learner"]
        means = [np.mean(v) for k, v in groups.items() if k[0] == "learner"]
        errors = [np.std(v) / len(v) ** 0.5 for k, v in groups.items() if k[0] == "learner"]
        seed = json.loads((run / "config.json").read_text())["seed"]
        axes.errorbar(steps, means, errors, marker="o", markersize=3, label=f"learner, seed {seed}")
    expert = np.mean([v for k, v in groups.items() if k[0] == "expert"])
    axes.axhline(expert, color="black", linestyle="--", label="expert")
    axes.set(xlabel="environment steps", ylabel="validation return, mean action")
    axes.legend()
    figure.savefig(HERE / "learning_curve.png", dpi=110)


def draw_histogram(runs: list[Path]) -> None:
    """Returns of the test episodes, best learner against expert."""
    tests = [read(run / "test.csv", ("policy",)) for run in runs]
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    for who, label in (("expert", "expert"), ("best", "learner")):
        returns = np.concatenate([t[(who,)] for t in tests])
        weights = np.full(len(returns), 1 / len(returns))
        axes.hist(returns, np.arange(-150, 340, 10), weights=weights, alpha=0.5, label=label)
    axes.set(xlabel="return of a test episode", ylabel="share")
    axes.legend()
    figure.savefig(HERE / "returns.png", dpi=110)


def main() -> None:
    runs = sorted(p.parent for p in HERE.glob("default_s*/test.csv"))
    print(table(runs))
    draw_curves(runs)
    draw_histogram(runs)


if __name__ == "__main__":
    main()
