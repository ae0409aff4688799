"""Draw the pictures and write README.md here, from the logs beside this file and nothing else.

    python logs/reference/draw.py

A run is a folder ROW_sSEED of study.py; expert_TASK/test.csv has the same episodes played by the
expert.  Needs matplotlib, which tests/requirements.txt installs.
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
AGENTS = HERE.parents[1] / "rl-trained-agents" / "sac"
sys.path.insert(0, str(HERE))
from study import ABLATIONS, FIGURE_2, ROWS  # noqa: E402

NAMES = {
    "aggrevated": "**AggreVaTeD** (the default)",
    "dagger": "DAgger",
    "aggrevate": "AggreVaTe",
    "bc": "behaviour cloning",
    "minmax": "min-max Q\\*, the first script's weights",
    "natural": "the paper's gradient, natural steps",
    "adam": "the paper's gradient, Adam",
    "reinforce": "REINFORCE, no expert",
    "imitation_dagger": "DAgger of the library `imitation`",
    "suboptimal": "AggreVaTeD from expert 2",
    "few_aggrevated": "AggreVaTeD, few steps and updates",
    "few_dagger": "DAgger, few steps and updates",
    "units_256": "AggreVaTeD, 256 units",
    "before": "AggreVaTeD, 256 units",
    "dagger_256": "DAgger, 256 units",
    "bc_256": "behaviour cloning, 256 units",
    "imitation_dagger_256": "DAgger of the library `imitation`, 256 units",
    "bipedal": "BipedalWalker-v3",
    "pendulum": "Pendulum-v1",
    "hopper": "Hopper-v5",
    "walker2d": "Walker2d-v5",
}
EXPERTS = {  # of the Hardcore task
    "hardcore": "expert 1 (SAC)",
    "before": "expert 1 on other terrains",
    "suboptimal": "expert 2, an early checkpoint",
}
ROWS = ROWS | {
    "imitation_dagger": ("hardcore", {}, 3),
    "imitation_dagger_256": ("before", {}, 3),
}


# -- reading ---------------------------------------------------------------------------------------
def read(path: Path, *columns: str) -> dict[tuple, list[float]]:
    """Returns of a CSV's episodes, grouped by the given columns, in the order of the file."""
    groups: dict[tuple, list[float]] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            groups.setdefault(tuple(row[c] for c in columns), []).append(float(row["return"]))
    return groups


def runs(row: str) -> list[Path]:
    """The scored runs of a row, by seed."""
    return [path.parent for path in sorted(HERE.glob(f"{row}_s[0-9]*/test.csv"))]


def scored(*rows: str) -> list[str]:
    """Those of the rows that have runs."""
    return [row for row in rows if runs(row)]


def returns(row: str, who: str) -> np.ndarray:
    """Test returns (seeds, episodes) of a row's "best" or "last" policies."""
    tests = [read(run / "test.csv", "policy") for run in runs(row)]
    return np.array([test.get((who,), test[("last",)]) for test in tests])


def expert(task: str) -> np.ndarray:
    """The expert's test returns (1, episodes)."""
    return np.array(list(read(HERE / f"expert_{task}" / "test.csv", "policy").values()))


def curve(row: str) -> tuple[np.ndarray, np.ndarray]:
    """Environment steps (evaluations,) and validation means (seeds, evaluations) of the learner."""
    steps, means = [], []
    for run in runs(row):
        groups = read(run / "evaluations.csv", "policy", "env_steps")
        groups = {int(steps): x for (policy, steps), x in groups.items() if policy == "learner"}
        steps.append(list(groups))
        means.append([np.mean(x) for x in groups.values()])
    return np.mean(steps, axis=0), np.array(means)


def cost(row: str) -> tuple[float, float]:
    """Environment steps and minutes of training, without evaluation, mean over the seeds."""
    last, log = [], "train.csv" if row.startswith("imitation") else "evaluations.csv"
    for run in runs(row):
        with open(run / log, newline="") as file:
            last.append(list(csv.DictReader(file))[-1])
    return tuple(np.mean([(float(x["env_steps"]), float(x["seconds"]) / 60) for x in last], axis=0))


# -- comparing -------------------------------------------------------------------------------------
def interval(a: np.ndarray, b: np.ndarray, draws=4000) -> tuple[float, float]:
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
    """Mean of a minus mean of b, with its interval."""
    low, high = interval(a, b)
    return f"{a.mean() - b.mean():+.1f} ({low:+.1f} to {high:+.1f})"


# -- tables ----------------------------------------------------------------------------------------
HEAD = (
    "| {} | seeds × episodes | mean return | ≥ 300 | minus {} (95 % CI) | last iterate, minus {} "
    "| steps | min |\n|---|---|---|---|---|---|---|---|"
)


def cells(x: np.ndarray) -> str:
    """How many test returns there are, their mean over the seeds' range, and the share of 300."""
    by_seed = x.mean(axis=1)
    spread = f" ({by_seed.min():.1f} to {by_seed.max():.1f})" if len(x) > 1 else ""
    solved = f"{np.mean(x >= 300):.1%}" if 250 < x.max() < 400 else ""  # BipedalWalker
    return f"{len(x)} × {x.shape[1]} | {x.mean():.1f}{spread} | {solved}"


def line(row: str, reference: dict[str, np.ndarray], name: str = "") -> str:
    """A row of a table: its best and last policies' test episodes beside a reference's."""
    best, last = returns(row, "best"), returns(row, "last")
    steps, minutes = cost(row)
    return (
        f"| {name or NAMES[row]} | {cells(best)} | {versus(best, reference['best'])} "
        f"| {versus(last, reference['last'])} | {steps / 1000:,.0f}k | {minutes:.1f} |"
    )


def expert_line(task: str, name: str) -> str:
    return f"| **{name}** | {cells(expert(task))} | | | | |"


def against_expert(task: str) -> dict[str, np.ndarray]:
    return dict.fromkeys(("best", "last"), expert(task))


def hardcore_table() -> str:
    """The result: every row of the task below its expert, the best first."""
    lines = [HEAD.format("policy", "its expert", "its expert")]
    for task, name in EXPERTS.items():
        rows = [row for row, (of, _, _) in ROWS.items() if of == task and row not in ABLATIONS]
        rows = sorted(scored(*rows), key=lambda row: -returns(row, "best").mean())
        lines += [expert_line(task, name), *(line(row, against_expert(task)) for row in rows)]
    return "\n".join(lines)


def ablation_table() -> str:
    """What changes when one choice of the default before is changed."""
    before = {who: returns("before", who) for who in ("best", "last")}
    lines = [HEAD.format("256 units, but", "256 units alone", "256 units alone")]
    for row in scored(*ABLATIONS):
        changed = ", ".join(f"`{k}` {v}" for k, v in ABLATIONS[row].items() if k != "eval_every")
        lines.append(line(row, before, changed))
    return "\n".join(lines)


def speed_table() -> str:
    """What tests/benchmark.py measured, by `--json logs/reference/benchmark.json`."""
    path = HERE / "benchmark.json"
    if not path.exists():
        return "Not measured yet."
    numbers = json.loads(path.read_text())
    lines = [f"| on {numbers.pop('machine')} | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in numbers.items())])


def why() -> str:
    """The gap before falls beside its usual size, in a sentence."""
    log = np.genfromtxt(HERE / "why.csv", delimiter=",", names=True)
    usual, before = log[0], log[(log["steps_before_fall"] > 20) & (log["steps_before_fall"] <= 60)]
    return (
        f"20 to 60 steps before a fall the gap of a cloned learner is {before['gap'].mean():.2f}, "
        f"on average over\nepisodes that end well it is {usual['gap']:.3f}."
    )


def hopper_table() -> str:
    """Returns of Hopper's expert with a share of its own noise."""
    lines = ["| share of its noise | mean return | whole episodes | median length |"]
    lines.append("|---|---|---|---|")
    with open(HERE / "hopper_noise.csv", newline="") as file:
        for row in csv.DictReader(file):
            x = {k: float(v) for k, v in row.items()}
            score = f"{x['mean_return']:.0f} ± {x['standard_error']:.0f}"
            ends = f"{x['whole_episodes']:.0%} | {x['median_length']:.0f}"
            lines.append(f"| {x['noise']} | {score} | {ends} |")
    return "\n".join(lines)


OBSTACLES = {
    "stump_1": "stump, 1 step", "stump_2": "stump, 2 steps", "pit": "pit", "stairs": "stairs",
    "grass": "open grass",
}  # fmt: skip


def falls_table() -> str:
    """Episodes of Hardcore below 250, per 100, by what they ended at; "best" policies."""
    lines = [
        "| policy | " + " | ".join(OBSTACLES.values()) + " | all |",
        "|---|---|---|---|---|---|---|",
    ]
    tests = {"expert 1": [HERE / "expert_hardcore" / "test.csv"]}
    tests |= {
        NAMES[r]: [run / "test.csv" for run in runs(r)]
        for r in scored("aggrevated", "dagger", "bc")
    }
    for name, paths in tests.items():
        ends, episodes = [], 0
        for path in paths:
            with open(path, newline="") as file:
                rows = [r for r in csv.DictReader(file) if r["policy"] != "last"]
            episodes += len(rows)
            ends += [r["ended_at"] for r in rows if float(r["return"]) < 250]
        counts = [ends.count(end) for end in OBSTACLES] + [len(ends)]
        lines.append(
            f"| {name} | " + " | ".join(f"{100 * n / episodes:.1f}" for n in counts) + " |"
        )
    return "\n".join(lines)


def task_table() -> str:
    """Other tasks, the same defaults."""
    lines = [HEAD.format("task", "its expert", "its expert")]
    for task in scored("bipedal", "pendulum", "hopper", "walker2d"):
        lines.append(expert_line(task, f"{NAMES[task]}: expert"))
        lines.append(line(task, against_expert(task), f"{NAMES[task]}: learner"))
    return "\n".join(lines)


def figure_2_table() -> str:
    """The paper's two continuous tasks, member by member."""
    if not scored(*(row for row in ROWS if row.startswith(("hopper_", "walker2d_")))):
        return "Not run yet."
    lines = [HEAD.format("task and method", "its expert", "its expert")]
    for task in scored("hopper", "walker2d"):
        lines.append(line(task, against_expert(task), f"{NAMES[task]}: {NAMES['aggrevated']}"))
        for method in FIGURE_2:
            for row in scored(f"{task}_{method}"):
                name = f"{NAMES[task]}: {NAMES[method]}"
                lines.append(line(row, against_expert(task), name))
    return "\n".join(lines)


def sentences() -> str:
    """The comparisons that the table does not have."""
    others = "units_256", "dagger", "aggrevate", "bc", "imitation_dagger"
    pairs = [("aggrevated", other) for other in others]
    pairs += [("before", f"{other}_256") for other in ("dagger", "bc", "imitation_dagger")]
    pairs += [("few_aggrevated", "few_dagger")]
    pairs += [(t, f"{t}_{m}") for t in ("hopper", "walker2d") for m in ("dagger", "natural")]
    lines = []
    for a, b in pairs:
        if runs(a) and runs(b):
            best, last = (versus(returns(a, who), returns(b, who)) for who in ("best", "last"))
            lines.append(f"- `{a}` minus `{b}`: {best} by the best iterate, {last} by the last.")
    return "\n".join(lines)


# -- pictures --------------------------------------------------------------------------------------
def draw_curves(name: str, title: str, task: str, rows: dict[str, str], sac: Path | None) -> None:
    """Validation returns over environment steps; bands from the worst to the best seed."""
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for row, label in rows.items():
        if not runs(row):
            continue
        steps, means = curve(row)
        label = f"{label} ({len(means)} seeds)" if len(means) > 1 else f"{label} (1 seed)"
        (drawn,) = axes.plot(steps, means.mean(axis=0), label=label, linewidth=1.6)
        low, high = means.min(axis=0), means.max(axis=0)
        axes.fill_between(steps, low, high, alpha=0.2, color=drawn.get_color())
    if task == "hardcore" and runs("imitation_dagger"):  # it has no validation episodes
        x, test = cost("imitation_dagger")[0], returns("imitation_dagger", "last").mean(axis=1)
        axes.plot([x] * len(test), test, "k+", label="DAgger of imitation (test episodes)")
    if sac:
        log = np.genfromtxt(sac, delimiter=",", names=True)
        axes.plot(log["env_steps"], log["average_return"], color="gray", label="SAC from scratch")
    axes.axhline(expert(task).mean(), color="black", linestyle="--", label="the expert")
    axes.set(xscale="log", xlabel="environment steps", ylabel="return, mean action", title=title)
    axes.legend(fontsize=8)
    figure.savefig(HERE / name, dpi=110)
    plt.close(figure)


def draw_why() -> None:
    """The gap of a cloned learner over the steps before its falls."""
    log = np.genfromtxt(HERE / "why.csv", delimiter=",", names=True)
    falls, usual = log[log["steps_before_fall"] > 0], log[log["steps_before_fall"] == 0][0]
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    axes.plot(falls["steps_before_fall"], falls["gap"], label="before a fall")
    axes.axhline(usual["gap"], color="black", linestyle="--", label="in episodes that end well")
    axes.invert_xaxis()
    axes.set(xlabel="steps before the fall", ylabel="Q*(s, expert) - Q*(s, learner)")
    axes.legend()
    figure.savefig(HERE / "why.png", dpi=110)
    plt.close(figure)


def main() -> None:
    if runs("aggrevated"):
        rows = dict(aggrevated="AggreVaTeD", dagger="DAgger", natural="the paper's gradient")
        sac = AGENTS / "BipedalWalkerHardcore-v3_1" / "evaluations.csv"
        draw_curves("learning_curve.png", "BipedalWalkerHardcore-v3", "hardcore", rows, sac)
    for task in scored("hopper", "walker2d"):
        rows = {task: "AggreVaTeD"} | {
            f"{task}_{k}": NAMES[k].replace("REINFORCE, no expert", "REINFORCE") for k in FIGURE_2
        }
        draw_curves(f"{task}.png", NAMES[task], task, rows, None)
    if (HERE / "why.csv").exists():
        draw_why()
    text = (HERE / "template.md").read_text()
    tables = (
        hardcore_table,
        falls_table,
        hopper_table,
        why,
        speed_table,
        ablation_table,
        task_table,
        figure_2_table,
        sentences,
    )
    for make in tables:
        text = text.replace("{" + make.__name__ + "}", make())
    (HERE / "README.md").write_text(text)


if __name__ == "__main__":
    main()
