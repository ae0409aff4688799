"""Draw the README's pictures and print its table from the runs beside this file, nothing else.

    python logs/reference/draw.py

A run is a folder ROW_sSEED of study.py; expert_n/test.csv has the same episodes played by expert n.
Needs matplotlib, which tests/requirements.txt installs.
"""

import csv
import json
import re
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
EXPERTS = HERE.parents[1] / "rl-trained-agents" / "sac"
NAMES = {
    "aggrevated": "AggreVaTeD (default)",
    "aggrevate": "AggreVaTe",
    "dagger": "DAgger",
    "bc": "behaviour cloning",
    "minmax": "min-max Q\\*",
    "reinforce": "REINFORCE, no expert",
    "natural": "natural gradient, gap weights",
    "start_score": "score function, from a cloned start",
    "start_natural": "score function, natural gradient, from a cloned start",
    "start_pathwise": "pathwise, from a cloned start",
    "start_gap": "gap weights, from a cloned start",
    "council": "AggreVaTeD, several experts, mean Q\\*",
    "council_min": "AggreVaTeD, several experts, least Q\\*",
    "council_max": "AggreVaTeD, several experts, largest Q\\* (MAMBA)",
}


def read(path: Path, columns: tuple[str, ...]) -> dict[tuple, list[float]]:
    """Returns of a CSV's episodes, grouped by the given columns, in the order of the file."""
    groups: dict[tuple, list[float]] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            groups.setdefault(tuple(row[c] for c in columns), []).append(float(row["return"]))
    return groups


def rows() -> dict[str, list[Path]]:
    """The scored runs of every row, by seed."""
    found: dict[str, list[Path]] = {}
    for path in sorted(HERE.glob("*_s*/test.csv")):
        found.setdefault(path.parent.name.rsplit("_s", 1)[0], []).append(path.parent)
    return found


def expert_returns() -> dict[str, np.ndarray]:
    """Test returns by expert number."""
    paths = HERE.glob("expert_*/test.csv")
    return {p.parent.name[7:]: np.array(read(p, ("policy",))[("expert",)]) for p in paths}


def paired_interval(learner: np.ndarray, expert: np.ndarray, draws=4000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean difference of (seeds, episodes), over both."""
    rng, difference = np.random.default_rng(0), learner - expert
    seeds, episodes = difference.shape
    # how often each episode, and each seed, is drawn: means are then products
    e = rng.multinomial(episodes, np.full(episodes, 1 / episodes), size=draws) / episodes
    s = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
    means = np.einsum("ds,se,de->d", s, difference, e, optimize=True)
    return tuple(np.percentile(means, [2.5, 97.5]))


def versus(learner: np.ndarray, expert: np.ndarray) -> str:
    """Mean paired difference of (seeds, episodes) with its interval, as the table has it."""
    low, high = paired_interval(learner, expert)
    return f"{(learner - expert).mean():+.1f} ({low:+.1f} to {high:+.1f})"


def best_expert(run: Path, experts: dict) -> str:
    """The number of the run's expert, of the best one if it has several."""
    path = json.loads((run / "config.json").read_text())["expert_path"]
    members = re.findall(r"v3_(\d+)/", path)
    scored = [n for n in members if n in experts]
    if not scored:  # the members have no test episodes of their own, the council has
        return "+".join(members)
    return max(scored, key=lambda n: experts[n].mean())


def cost(run: Path) -> tuple[float, float]:
    """Environment steps and minutes of training of a run."""
    with open(run / "evaluations.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    return float(last["env_steps"]), float(last["seconds"]) / 60


def table() -> str:
    """The README's table: test episodes of each row's best and last policies beside the expert."""
    experts, found = expert_returns(), rows()
    lines = [
        "| policy | seeds × episodes | best on validation: mean ± std | ≥ 300 "
        "| minus expert (95 % CI) | last iterate | minus expert (95 % CI) | steps | min |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for n, expert in sorted(experts.items()):
        lines.append(
            f"| **expert {n}** | 1 × {len(expert)} | {expert.mean():.1f} ± {expert.std():.1f} "
            f"| {(expert >= 300).mean():.1%} | | | | | |"
        )
        mine = {row: runs for row, runs in found.items() if best_expert(runs[0], experts) == n}
        scored = {}
        for row, runs in mine.items():
            tests = [read(run / "test.csv", ("policy",)) for run in runs]
            best, last = (np.array([t[(who,)] for t in tests]) for who in ("best", "last"))
            against = expert[: best.shape[1]]
            steps, minutes = np.mean([cost(run) for run in runs], axis=0)
            name = NAMES.get(row.removeprefix("sub_"), row.removeprefix("sub_"))
            scored[best.mean(), row] = (
                f"| {name} | {len(runs)} × {best.shape[1]} | {best.mean():.1f} ± {best.std():.1f} "
                f"| {(best >= 300).mean():.1%} | {versus(best, against)} "
                f"| {last.mean():.1f} | {versus(last, against)} "
                f"| {steps / 1000:.0f}k | {minutes:.1f} |"
            )
        lines += [scored[k] for k in sorted(scored, reverse=True)]
    return "\n".join(lines)


def curve(runs: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Mean environment steps (evaluations,) and validation means (seeds, evaluations)."""
    steps, means = [], []
    for run in runs:
        groups = read(run / "evaluations.csv", ("policy", "env_steps"))
        steps.append([int(k[1]) for k in groups if k[0] == "learner"])
        means.append([np.mean(v) for k, v in groups.items() if k[0] == "learner"])
    return np.mean(steps, axis=0), np.array(means)


def draw_curves(name: str, prefix: str, n: str) -> None:
    """Validation returns over environment steps, the band from the worst to the best seed."""
    figure, axes = plt.subplots(figsize=(9.5, 4.2), layout="constrained")
    for row, runs in rows().items():
        if row.startswith("sub_") != bool(prefix) or row.removeprefix(prefix) not in NAMES:
            continue
        steps, means = curve(runs)
        label = NAMES[row.removeprefix(prefix)].replace("\\", "")
        (line,) = axes.plot(
            steps[1:], means.mean(axis=0)[1:], label=f"{label} ({len(runs)})", linewidth=1.5
        )
        axes.fill_between(
            steps[1:], means.min(0)[1:], means.max(0)[1:], alpha=0.2, color=line.get_color()
        )
    log = np.load(EXPERTS / f"BipedalWalkerHardcore-v3_{n}" / "evaluations.npz")
    means = log["results"].mean(axis=1)
    axes.plot(log["timesteps"], means, color="black", label="SAC from scratch")
    expert = expert_returns()[n].mean()
    axes.axhline(expert, color="black", linestyle="--", label=f"expert {n}, test episodes")
    axes.set(xscale="log", xlabel="environment steps", ylabel="return, mean action")
    axes.set_xlim(2e4, None)
    figure.legend(loc="outside right upper", fontsize=8, title="(seeds)", title_fontsize=8)
    figure.savefig(HERE / name, dpi=110)
    plt.close(figure)


def draw_histogram() -> None:
    """Returns of the test episodes, best learners against the expert."""
    learners = [read(run / "test.csv", ("policy",))[("best",)] for run in rows()["aggrevated"]]
    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    both = {"expert 1": expert_returns()["1"], "learner": np.concatenate(learners)}
    for label, x in both.items():
        weights = np.full(len(x), 1 / len(x))
        axes.hist(x, np.arange(-150, 340, 10), weights=weights, alpha=0.5, label=label)
    axes.set(xlabel="return of a test episode", ylabel="share")
    axes.legend()
    figure.savefig(HERE / "returns.png", dpi=110)
    plt.close(figure)


def main() -> None:
    print(table())
    draw_curves("learning_curve.png", "", "1")
    if "2" in expert_returns():
        draw_curves("learning_curve_2.png", "sub_", "2")
    draw_histogram()


if __name__ == "__main__":
    main()
