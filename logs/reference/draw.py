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
    "aggrevated": "AggreVaTeD",
    "council": "AggreVaTeD",
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
}
MEMBER = ("algorithm", "weighting", "optimizer", "init_path")  # options that choose a row


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


def changes(run: Path) -> dict[str, tuple]:
    """Where a run's config differs from the default's: {field: (its value, the default)}."""
    its, default = (
        json.loads((path / "config.json").read_text()) for path in (run, HERE / "aggrevated_s0")
    )
    pairs = {k: (its.get(k, default[k]), default[k]) for k in default}  # older runs lack some
    return {k: v for k, v in pairs.items() if v[0] != v[1] and k not in ("seed", "log_dir")}


def is_ablation(run: Path) -> bool:
    """Whether a run is of the default's algorithm and experts, with some other setting changed."""
    changed = changes(run).keys()
    return bool(changed) and not changed & {"expert_path", *MEMBER}


def expert_returns() -> dict[str, np.ndarray]:
    """Test returns by expert number."""
    paths = HERE.glob("expert_*/test.csv")
    return {p.parent.name[7:]: np.array(read(p, ("policy",))[("expert",)]) for p in paths}


def paired_interval(a: np.ndarray, b: np.ndarray, draws=4000) -> tuple[float, float]:
    """95 % bootstrap interval of mean(a) - mean(b), each (seeds, episodes), over both.

    The episodes are the same for a and b, the seeds are not.
    """
    rng, episodes, means = np.random.default_rng(0), a.shape[1], 0.0
    # how often each episode, and each seed, is drawn: means are then products
    e = rng.multinomial(episodes, np.full(episodes, 1 / episodes), size=draws) / episodes
    for sign, x in ((1, a), (-1, b)):
        s = rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=draws) / len(x)
        means += sign * np.einsum("ds,se,de->d", s, x, e, optimize=True)
    return tuple(np.percentile(means, [2.5, 97.5]))


def versus(a: np.ndarray, b: np.ndarray) -> str:
    """Mean of a over that of b, by the episodes that both have, with its interval."""
    a, b = np.atleast_2d(a), np.atleast_2d(b)
    n = min(a.shape[1], b.shape[1])
    low, high = paired_interval(a[:, :n], b[:, :n])
    return f"{a[:, :n].mean() - b[:, :n].mean():+.1f} ({low:+.1f} to {high:+.1f})"


def test_returns(runs: list[Path], who: str) -> np.ndarray:
    """Test returns (seeds, episodes) of the runs' "best" or "last" policies."""
    return np.array([read(run / "test.csv", ("policy",))[(who,)] for run in runs])


def name_of(row: str) -> str:
    """What a row is, without what it learned from."""
    return NAMES.get(row.removeprefix("sub_").removeprefix("single_"), row)


def teachers(run: Path) -> str:
    """The numbers of the run's experts: "1", or "3+4+5"."""
    path = json.loads((run / "config.json").read_text())["expert_path"]
    return "+".join(re.findall(r"v3_(\d+)/", path))


def best_of(numbers: str) -> str:
    """The number of the best of several experts, by their cards: other episodes than these."""
    cards = {
        n: EXPERTS / f"BipedalWalkerHardcore-v3_{n}" / "score.json" for n in numbers.split("+")
    }
    return max(cards, key=lambda n: json.loads(cards[n].read_text())["score"]["mean"])


def cost(run: Path) -> tuple[float, float]:
    """Environment steps and minutes of training of a run."""
    with open(run / "evaluations.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    return float(last["env_steps"]), float(last["seconds"]) / 60


def cells(returns: np.ndarray) -> str:
    """The table's cells about test returns: how many there are, their mean and success rate."""
    seeds, episodes = np.atleast_2d(returns).shape
    return (
        f"{seeds} × {episodes} | {returns.mean():.1f} ± {returns.std():.1f} "
        f"| {(returns >= 300).mean():.1%}"
    )


HEAD = (
    "| {} | seeds × episodes | best on validation: mean ± std | ≥ 300 | minus {} (95 % CI) "
    "| last iterate | minus {} (95 % CI) | steps | min |\n|---|---|---|---|---|---|---|---|---|"
)


def line(name: str, runs: list[Path], best_reference, last_reference) -> str:
    """A row of a table: test episodes of the best and the last policies beside the references."""
    best, last = test_returns(runs, "best"), test_returns(runs, "last")
    steps, minutes = np.mean([cost(run) for run in runs], axis=0)
    if not curve(runs)[1].argmax(axis=1).any():  # validation liked iteration 0 best
        name += " (best is its start)"
    return (
        f"| {name} | {cells(best)} | {versus(best, best_reference)} "
        f"| {last.mean():.1f} | {versus(last, last_reference)} | {steps / 1000:.0f}k "
        f"| {minutes:.1f} |"
    )


def ranked(named: dict[str, list[Path]], *references) -> list[str]:
    """Rows of a table for the runs by name, the best row first."""
    order = sorted(named, key=lambda name: -test_returns(named[name], "best").mean())
    return [line(name, named[name], *references) for name in order]


def table() -> str:
    """The README's table of results: each row of the study beside its best expert."""
    experts, found = expert_returns(), rows()
    lines = [HEAD.format("policy", "single expert", "single expert")]
    groups = {teachers(run) for runs in found.values() for run in runs}
    for numbers in sorted(groups, key=lambda g: -experts[g].mean()):
        n = best_of(numbers)
        expert = experts[n]
        if n != numbers:
            together, names = experts[numbers], numbers.replace("+", ", ")
            singly = ", ".join(f"{experts[k].mean():.1f}" for k in numbers.split("+"))
            lines.append(
                f"| **experts {names} together** (singly {singly}) | {cells(together)} "
                f"| {versus(together, expert)} | | | | |"
            )
        card = ", best by its card" if n != numbers else ""
        lines.append(f"| **expert {n}{card}** | {cells(expert)} | | | | | |")
        mine = {
            name_of(row): runs
            for row, runs in found.items()
            if teachers(runs[0]) == numbers and not is_ablation(runs[0])
        }
        lines += ranked(mine, expert, expert)
    return "\n".join(lines)


def ablations() -> str:
    """The README's table of what changes when one choice of the default is taken away."""
    found = rows()
    default = [test_returns(found["aggrevated"], who) for who in ("best", "last")]
    changed = {
        ", ".join(f"`{k}` {new} (not {old})" for k, (new, old) in changes(runs[0]).items()): runs
        for row, runs in found.items()
        if row == "dagger" or is_ablation(runs[0])
    }
    head = HEAD.format("the default, but", "default", "default")
    return "\n".join([head, *reversed(ranked(changed, *default))])


def curve(runs: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Mean environment steps (evaluations,) and validation means (seeds, evaluations)."""
    steps, means = [], []
    for run in runs:
        groups = read(run / "evaluations.csv", ("policy", "env_steps"))
        steps.append([int(k[1]) for k in groups if k[0] == "learner"])
        means.append([np.mean(v) for k, v in groups.items() if k[0] == "learner"])
    return np.mean(steps, axis=0), np.array(means)


def draw_curves(name: str, *groups: str) -> None:
    """Validation returns over environment steps, a panel for each group of experts.

    The band goes from the worst to the best seed; the lines are the experts' test episodes.
    """
    figure, panels = plt.subplots(
        1, len(groups), figsize=(10, 5), layout="constrained", sharey=True, squeeze=False
    )
    experts = expert_returns()
    for axes, numbers in zip(panels[0], groups):
        for row, runs in rows().items():
            if teachers(runs[0]) != numbers or is_ablation(runs[0]):
                continue
            steps, means = curve(runs)
            label = f"{name_of(row)} ({len(runs)})".replace("\\", "")
            (line,) = axes.plot(steps[1:], means.mean(axis=0)[1:], label=label, linewidth=1.5)
            axes.fill_between(
                steps[1:], means.min(0)[1:], means.max(0)[1:], alpha=0.2, color=line.get_color()
            )
        n = best_of(numbers)
        log = np.load(EXPERTS / f"BipedalWalkerHardcore-v3_{n}" / "evaluations.npz")
        means = log["results"].mean(axis=1)
        axes.plot(log["timesteps"], means, color="black", label="SAC from scratch")
        axes.axhline(experts[n].mean(), color="black", linestyle="--", label=f"expert {n}")
        if n != numbers:
            axes.axhline(
                experts[numbers].mean(), color="black", linestyle=":", label="experts together"
            )
        names = f"expert{'s' * ('+' in numbers)} {numbers.replace('+', ', ')}"
        title = f"learned from {names} (seeds)"
        axes.set(xscale="log", xlabel="environment steps", title=title)
        axes.set_xlim(2e4, None)
        axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    panels[0, 0].set_ylabel("return, mean action")
    figure.savefig(HERE / name, dpi=110)
    plt.close(figure)


def draw_histogram() -> None:
    """Returns of the test episodes, best learners against their best expert."""
    runs, experts = rows()["aggrevated"], expert_returns()
    n = best_of(teachers(runs[0]))
    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    both = {f"expert {n}": experts[n], "learner": test_returns(runs, "best").ravel()}
    for label, x in both.items():
        weights = np.full(len(x), 1 / len(x))
        axes.hist(x, np.arange(-150, 340, 10), weights=weights, alpha=0.5, label=label)
    axes.set(xlabel="return of a test episode", ylabel="share, log scale", yscale="log")
    axes.legend()
    figure.savefig(HERE / "returns.png", dpi=110)
    plt.close(figure)


def sentences() -> str:
    """The differences that the README has beside its table."""
    experts, found = expert_returns(), rows()
    best, last = (
        {row: test_returns(runs, who) for row, runs in found.items()} for who in ("best", "last")
    )
    mine, clone = best["aggrevated"], best["single_bc"]
    result = {"minus expert 1, first 500 episodes": versus(mine[:, :500], experts["1"])}
    for row in ("aggrevated", "sub_council"):
        numbers = teachers(found[row][0])
        top = max(numbers.split("+"), key=lambda n: experts[n].mean())
        result[f"{row} minus expert {top}, best here"] = versus(best[row], experts[top])
        result[f"{row} minus the experts together"] = versus(best[row], experts[numbers])
    result |= {
        "minus DAgger": versus(mine, best["dagger"]),
        "minus AggreVaTe": versus(mine, best["aggrevate"]),
        "last minus AggreVaTe's last": versus(last["aggrevated"], last["aggrevate"]),
        "minus cloning": versus(mine, best["bc"]),
        "minus DAgger, expert 1 alone": versus(best["single_aggrevated"], best["single_dagger"]),
        "natural gradient minus its start": versus(last["single_start_natural"], clone),
        "pathwise minus its start": versus(last["single_start_pathwise"], clone),
    }
    return "\n".join(f"{name}: {text}" for name, text in result.items())


def speed() -> str:
    """The README's table of ratios, from what tests/benchmark.py saved."""
    log = json.loads((HERE / "benchmark.json").read_text())
    lines = ["| ratio | measured | goal | |", "|---|---|---|---|"]
    for g in log["goals"]:
        sign, met = {">=": "≥", "<=": "≤"}[g["sign"]], "met" if g["met"] else "not met"
        lines.append(f"| {g['goal']} | {g['value']:.3g} | {sign} {g['bound']:g} | {met} |")
    return "\n".join(lines)


def main() -> None:
    print(table(), ablations(), sentences(), speed(), sep="\n\n")
    draw_curves("learning_curve.png", "1+6+7+8+9", "1")
    draw_curves("learning_curve_2.png", "3+4+5", "2")
    draw_histogram()


if __name__ == "__main__":
    main()
