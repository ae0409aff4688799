"""Draw the pictures and print the study's README.md, from the numbers beside it and expert 1's log.

    python logs/reference/scripts/draw.py

The sentences are template.md's; {names} in it are those of the tables and numbers below.  Needs
matplotlib, which tests/requirements.txt installs.
"""

import json
import re
from contextlib import suppress
from functools import cache

from common import FAILED, HERE, PRINTED, ROOT, ROWS, TABLES, ag, expert_of, options_of, read
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ENDS = {  # what an episode of Hardcore that failed ended at
    "stump_1": "stump, 1 step", "stump_2": "stump, 2 steps", "pit": "pit", "stairs": "stairs",
    "grass": "open grass", "time": "time limit",
}  # fmt: skip

SAC_LOG = ROOT / "rl-trained-agents/sac/BipedalWalkerHardcore-v3_1/evaluations.csv"
STYLES = {  # a colour of Okabe and Ito, a line style and a marker for each method, everywhere
    "aggrevated": ("AggreVaTeD", "#0072B2", "-", "o"),
    "weighted": ("weighted imitation", "#009E73", "-.", "^"),
    "dagger": ("DAgger", "#E69F00", (0, (5, 1.5)), "s"),
    "bc": ("behaviour cloning", "#D55E00", (0, (8, 2)), "P"),
    "expert": ("the expert", "black", "--", "*"),
    "sac": ("SAC from scratch", "#999999", "-", ""),
    "two_critics": ("AggreVaTeD", "#0072B2", "-", "o"),
    "four_critics": ("with evaluated critics, too", "#CC79A7", "--", "v"),
    "no_bc_min_q": ("bc_weight 0, smallest Q", "#D55E00", "-.", "P"),
}


# -- reading ---------------------------------------------------------------------------------------
@cache
def columns(name: str) -> np.ndarray:
    """A small table, by its columns' names."""
    how = dict(delimiter=",", names=True, dtype=None, encoding="utf-8")
    return np.genfromtxt(HERE / f"{name}.csv", **how)


@cache
def runs(table: str) -> dict[tuple, dict]:
    """{(row, terrains): {seed: lines}} of a table; evaluations.csv has no terrains."""
    groups: dict = {}
    for x in read(table):
        groups.setdefault((x["row"], x.get("terrains")), {}).setdefault(x["seed"], []).append(x)
    return groups


def terrains_of(row: str) -> str | None:
    """The terrains of a row's numbers in the tables, if it has any."""
    terrains = ROWS[row].get("terrains", ["test"])[0]
    return terrains if (row, terrains) in runs("returns") else None


def scored(*rows: str) -> list[str]:
    """Those of the rows that have numbers."""
    return [row for row in rows if terrains_of(row)]


def logged(*rows: str) -> list[str]:
    """Those of the rows that have validation episodes of their training."""
    return [row for row in rows if (row, None) in runs("evaluations")]


def episodes(row: str, who="best", terrains=None) -> list[list[dict]]:
    """Each seed's test episodes, of its best or last iterate, which may be the same."""
    seeds = runs("returns")[row, terrains or terrains_of(row)].values()
    return [[x for x in seed if x["iterate"] == who] or seed for seed in seeds]


def returns(row: str, who="best", terrains=None) -> np.ndarray:
    """Test returns (seeds, episodes)."""
    return np.array([[float(x["return"]) for x in e] for e in episodes(row, who, terrains)])


# -- numbers, also for the text: {name argument ...} -----------------------------------------------
@cache
def shares(n: int, seed: int, draws=4000) -> np.ndarray:
    """How often each of n is drawn, as shares (draws, n), in a bootstrap."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws) / n


def with_interval(value: float, drawn: np.ndarray) -> str:
    """A difference and the 95 % interval of its bootstrap."""
    low, high = np.percentile(drawn, [2.5, 97.5])
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def minus(row: str, other: str, who="best") -> str:
    """Mean of a row less another's on the same terrains, with its 95 % bootstrap interval.

    The bootstrap is over both seeds and episodes; both rows have the same episodes.
    """
    a, b = (returns(x, who, terrains_of(row)) for x in (row, other))
    drawn = shares(a.shape[1], 0)
    means = [(shares(len(x), i) * (drawn @ x.T)).sum(axis=1) for i, x in ((1, a), (2, b))]
    return with_interval(a.mean() - b.mean(), means[0] - means[1])


def chosen(row: str) -> str:
    """As `minus`, of what validation chose less the last iterates of the same runs."""
    x = returns(row) - returns(row, "last")
    means = (shares(len(x), 1) * (shares(x.shape[1], 0) @ x.T)).sum(axis=1)
    return with_interval(x.mean(), means)


def mean(row: str, terrains=None) -> str:
    """Mean return, in brackets the lowest and the highest seed's."""
    x = returns(row, terrains=terrains).mean(axis=1)
    return f"{x.mean():.1f}" + (f" ({x.min():.1f} to {x.max():.1f})" if len(x) > 1 else "")


def percent(row: str, who="best") -> str:
    """Mean return in per cent of its expert's."""
    return f"{returns(row, who).mean() / returns(expert_of(row)).mean():.1%}"


def solved(row: str) -> str:
    """How many seeds have a mean of 300, from which on the course counts as solved."""
    x = returns(row).mean(axis=1)
    return f"{(x >= 300).sum()} of {len(x)} seeds"


def failed(row: str) -> str:
    """Share of the episodes that failed."""
    return f"{np.mean(returns(row) < FAILED):.1%}"


def steps(row: str) -> str:
    """Environment steps of training, mean over the seeds."""
    ends = [int(lines[-1]["env_steps"]) for lines in runs("evaluations")[row, None].values()]
    return f"{np.mean(ends) / 1000:,.0f}k"


def gap(last=0, first=-1) -> str:
    """Mean gap between these steps before a fall; without them, in episodes that end well."""
    why = columns("why")
    before = why["steps_before_fall"]
    return f"{why['gap'][(before > int(first)) & (before <= int(last))].mean():.3g}"


def tried(column: str, kind="", before="") -> np.ndarray:
    """A column of candidates.csv, perhaps only of "best" or "random" ones, and before falls (1)."""
    lines = [x for x in read("candidates") if x["candidate"].startswith(kind)]
    return np.array([float(x[column]) for x in lines if x["before_fall"].startswith(before)])


def states(before: str) -> str:
    """In how many states of how many episodes candidates were tried."""
    of = tried("episode", "best", before)
    return f"{len(of)} states of {len(set(of))} episodes"


def rank(column: str) -> str:
    """Rank correlation of what critics said of candidates with what came, two standard errors."""
    ranks = [tried(x).argsort().argsort() for x in (column, "came")]
    return f"{np.corrcoef(ranks)[0, 1]:+.2f} ± {2 / len(ranks[0]) ** 0.5:.2f}"


# -- tables ----------------------------------------------------------------------------------------
def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, or a sentence if nothing has been run."""
    lines = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(x)} |" for x in lines) if lines[2:] else "Not run yet."


def score_table(rows: list[str], ids=True, reference="", of="its expert") -> str:
    """Rows beside a reference, by default their experts; last iterates if they were scored."""
    head, last = ["", "seeds × episodes", "mean return", "≥ 300"], not reference
    head += [f"minus {of} (95 % CI)"] + [f"last iterate, minus {of}"] * last
    head, lines = head + ["steps"], []
    for row in scored(*rows):
        x, other = returns(row), reference or expert_of(row)
        if (other, terrains_of(row)) not in runs("returns"):
            continue
        has_threshold = "BipedalWalker" in ag.Config(**options_of(row)).env_name
        name = f"{ROWS[row]['name']} `{row}`" if ids else ROWS[row]["name"]
        line = [name, f"{len(x)} × {x.shape[1]}", mean(row)]
        line.append(f"{np.mean(x >= 300):.1%}" if has_threshold else "")
        if expert_of(row) != row:
            line += [minus(row, other, who) for who in ("best", "last")[: 1 + last]]
            line += [steps(row)] if logged(row) else []
        lines.append(line + [""] * (len(head) - len(line)))
    return table(head, lines)


def ends_of(row: str) -> dict[str, float]:
    """Failed episodes in a hundred, by what they ended at."""
    every = sum(episodes(row), [])
    lost = [x for x in every if float(x["return"]) < FAILED]
    ends = ["time" if int(x["length"]) == 2000 else x["ended_at"] for x in lost]
    return {end: 100 * ends.count(end) / len(every) for end in ENDS}


def ends_table() -> str:
    """`ends_of` the rows that the claims are about."""
    lines = [[ROWS[row]["name"], *ends_of(row).values()] for row in scored(*PRINTED["ends"])]
    lines = [[name, *(f"{x:.1f}" for x in (*ends, sum(ends)))] for name, *ends in lines]
    return table(["", *ENDS.values(), "all"], lines)


def differences() -> str:
    """The comparisons that the tables do not have."""
    pairs = [pair for pair in PRINTED["differences"] if scored(*pair) == pair]
    both = [(a, b, minus(a, b), minus(a, b, "last")) for a, b in pairs]
    lines = [[f"`{a}` minus `{b}`", x, y if y != x else "the same"] for a, b, x, y in both]
    return table(["", "best iterate", "last iterate"], lines)


def speed_table() -> str:
    """What tests/benchmark.py measured, by `--json logs/reference/benchmark.json`."""
    numbers = json.loads((HERE / "benchmark.json").read_text())
    return table(["on " + numbers.pop("machine"), ""], list(map(list, numbers.items())))


def printed(row="aggrevated", seed="0") -> str:
    """What the program prints in training, from its validation episodes."""
    points: dict[str, list[float]] = {}
    for x in runs("evaluations").get((row, None), {}).get(seed, []):
        n, env_steps, seconds = int(x["iteration"]), int(x["env_steps"]), float(x["seconds"])
        now = f"iteration {n:3d} {env_steps:8d} steps {seconds:5.0f} s  {x['policy']:7s}"
        points.setdefault(now, []).append(float(x["return"]))
    lines = [f"    {now} {ag.describe(np.array(x), 300)}" for now, x in points.items()]
    return "\n".join(lines) or "Not run yet."


def noise_table() -> str:
    """hopper_noise.csv."""
    lines = columns("hopper_noise")
    lines = [[f"{x}", f"{m:.0f} ± {e:.0f}", f"{w:.0%}", f"{t:.0f}"] for x, m, e, w, t in lines]
    return table(["share of its noise", "mean return", "whole episodes", "median length"], lines)


@cache
def tables() -> dict[str, str]:
    """Every table that is printed; `main` and `printed` are in the project's own README, too."""
    return dict(
        main=score_table(PRINTED["main"], ids=False),
        hardcore=score_table(list(TABLES["hardcore"])),
        tasks=score_table(list(TABLES["tasks"])),
        ablations=score_table(list(TABLES["ablations"]), True, "aggrevated", "`aggrevated`"),
        ends=ends_table(),
        differences=differences(),
        noise=noise_table(),
        printed=printed(),
        speed=speed_table(),
    )


def fill(page: str) -> str:
    """The text with each {table} and each {number argument ...}, such as {minus dagger bc}.

    A paragraph that needs a row which has not been run is left out.
    """
    functions = mean, minus, chosen, percent, solved, failed, steps, gap, states, rank
    numbers = {f.__name__: f for f in functions}
    numbers |= {name: text.__str__ for name, text in tables().items()}
    paragraphs = []
    for paragraph in page.split("\n\n"):
        with suppress(KeyError, FileNotFoundError):
            call = lambda match: numbers[match[1]](*match[2].split())  # noqa: E731
            paragraphs.append(re.sub(r"\{(\w+)((?:\s+\w+)*)\}", call, paragraph))
    return "\n\n".join(paragraphs)


# -- pictures --------------------------------------------------------------------------------------
def style(method: str, **more) -> dict:
    """Keywords of a method's line."""
    label, color, line, marker = STYLES[method]
    look = dict(label=label, color=color, linestyle=line, marker=marker, markersize=4)
    return look | dict(linewidth=1.5) | more


def curve(row: str, policy: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps (evaluations,) and mean returns (seeds, evaluations), by the first n episodes."""
    every = []
    for run in runs("evaluations")[row, None].values():
        points: dict[int, list[tuple]] = {}
        for x in run:
            if x["policy"] == policy and int(x["episode"]) < n:
                point = int(x["env_steps"]), float(x["return"])
                points.setdefault(int(x["iteration"]), []).append(point)
        every.append({i: np.mean(x, axis=0) for i, x in points.items()})
    common = sorted(set.intersection(*map(set, every)))  # iterations
    steps, means = np.moveaxis([[x[i] for i in common] for x in every], 2, 0)
    return steps.mean(axis=0), means


def draw_band(axes, x, y: np.ndarray, how: dict) -> None:
    """Means over the seeds of y (seeds, points), and a band from the worst to the best."""
    axes.plot(x, y.mean(axis=0), **how)
    low, high = y.min(axis=0), y.max(axis=0)
    axes.fill_between(x, low, high, alpha=0.2, linewidth=0, color=how["color"])


def draw_curves(axes, rows: dict[str, str]) -> None:
    """Validation returns while they train, and the expert's in the same episodes."""
    every = [x for row in rows for x in runs("evaluations")[row, None].values()]
    n = 1 + min(max(int(x["episode"]) for x in run) for run in every)
    for row, method in rows.items():
        steps, means = curve(row, "learner", n)
        name = PRINTED["labels"].get(row, STYLES[method][0])
        draw_band(axes, steps, means, style(method, label=f"{name} ({len(means)} seeds)"))
    axes.axhline(curve(next(iter(rows)), "expert", n)[1].mean(), **style("expert"))
    axes.set(xscale="log", xlabel="environment steps of training")
    axes.set(ylabel=f"mean return of the first {n} validation episodes")


def draw_scores(axes, rows: dict[str, str]) -> None:
    """Test scores where they differ: a small marker a seed, a large one their mean, the expert."""
    first = next(iter(rows))
    expert = returns(expert_of(first), terrains=terrains_of(first))
    axes.axhline(expert.mean(), **style("expert"))
    for i, (row, (method, _)) in enumerate(rows.items()):
        by_seed = returns(row).mean(axis=1)
        axes.plot([i] * len(by_seed), by_seed, **style(method, linestyle="", alpha=0.5))
        axes.plot(i + 0.3, by_seed.mean(), **style(method, linestyle="", markersize=8))
    axes.set_xticks(np.arange(len(rows)) + 0.15, [name for _, name in rows.values()])
    axes.set(ylim=(250, 325), xlim=(-0.5, len(rows) - 0.2))
    axes.set_title(f"{expert.size} test episodes a seed", fontsize=8)
    axes.tick_params(labelsize=6)


def draw_ends(axes, rows: dict[str, str]) -> None:
    """What the failed test episodes of rows ended at."""
    for i, (row, method) in enumerate(rows.items()):
        how = style(method, linestyle="", markersize=8)
        axes.plot(np.arange(len(ENDS)) + i / 8, list(ends_of(row).values()), **how)
    axes.set_xticks(np.arange(len(ENDS)) + len(rows) / 16, ENDS.values(), rotation=20)
    axes.set(ylabel="failed episodes in 100 test episodes", ylim=(0, None))


def draw_why(axes) -> None:
    """The gap of a cloned learner over the steps before its falls."""
    usual, falls = columns("why")[0], columns("why")[1:]
    x, y, error = (falls[k] for k in ("steps_before_fall", "gap", "standard_error"))
    label = f"a cloned learner before {falls['episodes'].max():.0f} falls"
    axes.plot(x, y, **style("bc", markevery=10, label=label))
    axes.fill_between(x, y - 2 * error, y + 2 * error, alpha=0.2, linewidth=0, color="#D55E00")
    label = f"its mean over {usual['episodes']:.0f} episodes that ended well"
    axes.axhline(usual["gap"], **style("bc", marker="", linestyle=":", label=label))
    axes.invert_xaxis()
    axes.set(xlabel="steps before the fall", ylabel="-A*(s, learner's mean action)")


def draw_candidates(*both) -> None:
    """What critics said of candidates and what came, and means of six bins of equal counts."""
    places = ("0", "aggrevated", "elsewhere"), ("1", "bc", "before a fall")
    names = {"advantage": "evaluated", "advantage_zip": "SAC's own"}
    for axes, (column, critics) in zip(both, names.items(), strict=True):
        for before, method, label in places:
            x, y = tried(column, "", before).clip(-1, 1), tried("came", "", before).clip(-8, 8)
            axes.plot(x, y, **style(method, linestyle="", alpha=0.3, markersize=3, label=label))
        said, came = tried(column), tried("came")
        for i in np.array_split(said.argsort(), 6):
            error = 2 * came[i].std(ddof=1) / len(i) ** 0.5
            axes.errorbar(said[i].mean(), came[i].mean(), error, fmt="ks", ms=4, capsize=3)
        axes.axline((0, 0), slope=1, color="black", linewidth=0.7)
        axes.set(xlabel=f"better by {critics} critics", ylabel="really better by", xlim=(-1.1, 1.1))


def draw_exploitation(left, right) -> None:
    """What A* promises and what comes, by iteration."""
    for row in PRINTED["exploitation"]:
        points = columns("exploitation")[columns("exploitation")["row"] == row]
        n = np.unique(points["iteration"])
        for axes, column in ((left, "promised"), (right, "came")):
            draw_band(axes, n, points[column].reshape(-1, len(n)), style(row))
    left.set(xlabel="iteration", ylabel="mean of A*(s, mean action)")
    right.set(xlabel="iteration", ylabel="validation return less the expert's")


def save(name: str, figure, axes) -> None:
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(HERE / "figures" / f"{name}.png", dpi=110)
    plt.close(figure)


def draw_all() -> None:
    """Every figure whose rows have numbers."""
    for name, rows in PRINTED["curves"].items():
        rows = {row: rows[row] for row in scored(*logged(*rows))}
        wide = name == "past_expert"
        if not scored(*map(expert_of, rows)):
            continue
        size = dict(figsize=(8 + 2 * wide, 5), squeeze=False, layout="constrained")
        figure, axes = plt.subplots(1, 1 + wide, **size)
        left, right = axes[0, 0], axes[0, -1]
        draw_curves(left, rows)
        if wide:
            draw_ends(right, {expert_of(next(iter(rows))): "expert"} | rows)
        if name == "learning_curve":
            log = np.genfromtxt(SAC_LOG, delimiter=",", names=True)
            left.plot(log["env_steps"], log["average_return"], **style("sac"))
            inset = left.inset_axes([0.16, 0.16, 0.42, 0.42])
            draw_scores(inset, {row: PRINTED["inset"][row] for row in scored(*PRINTED["inset"])})
        save(name, figure, left)
    for draw, n in ((draw_why, 1), (draw_candidates, 2), (draw_exploitation, 2)):
        size = dict(figsize=(8, 3.6), squeeze=False, layout="constrained")
        figure, axes = plt.subplots(1, n, **size)
        with suppress(FileNotFoundError):
            draw(*axes[0])
            save(draw.__name__.removeprefix("draw_"), figure, axes[0, 0])


if __name__ == "__main__":
    draw_all()
    (HERE / "README.md").write_text(fill((HERE / "template.md").read_text()))
