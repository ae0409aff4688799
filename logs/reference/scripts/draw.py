"""Draw the pictures and print the study's README.md, from the numbers beside it and nothing else.

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
GAPS = np.genfromtxt(HERE / "why.csv", delimiter=",", names=True)
STYLES = {  # a colour of Okabe and Ito, a line style and a marker for each method, everywhere
    "aggrevated": ("AggreVaTeD", "#0072B2", "-", "o"),
    "dagger": ("DAgger", "#E69F00", (0, (5, 1.5)), "s"),
    "natural": ("the paper's gradient, natural steps", "#009E73", "-.", "^"),
    "bc": ("behaviour cloning", "#D55E00", (0, (8, 2)), "P"),
    "expert": ("the expert", "black", "--", "*"),
    "sac": ("SAC from scratch", "#999999", "-", ""),
}


# -- reading ---------------------------------------------------------------------------------------
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


def episodes(row: str, who="best", terrains=None) -> list[list[dict]]:
    """Each seed's test episodes, of its best or last iterate, which may be the same."""
    seeds = runs("returns")[row, terrains or terrains_of(row)].values()
    return [[x for x in seed if x["iterate"] == who] or seed for seed in seeds]


def returns(row: str, who="best", terrains=None) -> np.ndarray:
    """Test returns (seeds, episodes)."""
    return np.array([[float(x["return"]) for x in e] for e in episodes(row, who, terrains)])


def cost(row: str) -> np.ndarray:
    """Environment steps and minutes of training, without evaluation, mean over the seeds."""
    ends = [lines[-1] for lines in runs("evaluations")[row, None].values()]
    own = np.mean([(int(x["env_steps"]), float(x["seconds"]) / 60) for x in ends], axis=0)
    return own + (cost(ROWS[row]["start_from"]) if "start_from" in ROWS[row] else 0)


# -- numbers, also for the text: {name argument ...} -----------------------------------------------
@cache
def shares(n: int, seed: int, draws=4000) -> np.ndarray:
    """How often each of n is drawn, as shares (draws, n), in a bootstrap."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws) / n


def minus(row: str, other: str, who="best") -> str:
    """Mean of a row less another's on the same terrains, with its 95 % bootstrap interval.

    The bootstrap is over both seeds and episodes; both rows have the same episodes.
    """
    a, b = (returns(x, who, terrains_of(row)) for x in (row, other))
    drawn = shares(a.shape[1], 0)
    means = [(shares(len(x), i) * (drawn @ x.T)).sum(axis=1) for i, x in ((1, a), (2, b))]
    low, high = np.percentile(means[0] - means[1], [2.5, 97.5])
    return f"{a.mean() - b.mean():+.1f} ({low:+.1f} to {high:+.1f})"


def mean(row: str) -> str:
    """Mean return, in brackets the lowest and the highest seed's."""
    x = returns(row).mean(axis=1)
    return f"{x.mean():.1f}" + (f" ({x.min():.1f} to {x.max():.1f})" if len(x) > 1 else "")


def solved(row: str) -> str:
    """How many seeds have a mean of 300, from which on the course counts as solved."""
    x = returns(row).mean(axis=1)
    return f"{(x >= 300).sum()} of {len(x)} seeds"


def failed(row: str) -> str:
    """Share of the episodes that failed."""
    return f"{np.mean(returns(row) < FAILED):.1%}"


def steps(row: str) -> str:
    """Environment steps of training."""
    return f"{cost(row)[0] / 1000:,.0f}k"


def gap(last=0, first=-1) -> str:
    """Mean gap between these steps before a fall; without them, in episodes that end well."""
    before = GAPS["steps_before_fall"]
    return f"{GAPS['gap'][(before > int(first)) & (before <= int(last))].mean():.3g}"


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


def score_table(rows: list[str], last=False, reference="", of="its expert") -> str:
    """Rows beside a reference, by default their experts; the last iterates in a column apart."""
    head = ["", "seeds × episodes", "mean return", "≥ 300", f"minus {of} (95 % CI)"]
    head, lines = head + [f"last iterate, minus {of}"] * last + ["steps", "min"], []
    for row in scored(*rows):
        x, other = returns(row), reference or expert_of(row)
        if (other, terrains_of(row)) not in runs("returns"):
            continue
        has_threshold = "BipedalWalker" in ag.Config(**options_of(row)).env_name
        name = f"{ROWS[row]['name']} `{row}`" if last else ROWS[row]["name"]
        line = [name, f"{len(x)} × {x.shape[1]}", mean(row)]
        line.append(f"{np.mean(x >= 300):.1%}" if has_threshold else "")
        if expert_of(row) != row:
            line += [minus(row, other, who) for who in ("best", "last")[: 1 + last]]
            line += [steps(row), f"{cost(row)[1]:.1f}"]
        lines.append(line + [""] * (len(head) - len(line)))
    return table(head, lines)


def others_table() -> str:
    """An agent a line: expert, learner, difference."""
    pairs = [(row, expert_of(row)) for row in scored(*PRINTED["others"])]
    lines = [[ROWS[r]["name"].split(":")[0], mean(e), mean(r), minus(r, e)] for r, e in pairs]
    return table(["task", "its expert", "AggreVaTeD", "difference (95 % CI)"], lines)


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


def printed() -> str:
    """What `python aggrevated.py` prints of seed 0, from its validation episodes."""
    points: dict[tuple, list[float]] = {}
    for x in runs("evaluations")["aggrevated", None]["0"]:
        when = x["policy"], int(x["iteration"]), int(x["env_steps"]), float(x["seconds"])
        points.setdefault(when, []).append(float(x["return"]))
    (_, expert), *learner = [(when, np.array(x)) for when, x in points.items()]
    lines = [ag.progress(*when[1:], x, expert[: len(x)], 300) for when, x in learner]
    return "\n".join(f"    {line}" for line in lines)


def noise_table() -> str:
    """hopper_noise.csv."""
    lines = np.genfromtxt(HERE / "hopper_noise.csv", delimiter=",", skip_header=1)
    lines = [[f"{x}", f"{m:.0f} ± {e:.0f}", f"{w:.0%}", f"{t:.0f}"] for x, m, e, w, t in lines]
    return table(["share of its noise", "mean return", "whole episodes", "median length"], lines)


@cache
def tables() -> dict[str, str]:
    """Every table that is printed; `main` and `others` are those of the project's own README."""
    return dict(
        main=score_table(PRINTED["main"]),
        others=others_table(),
        hardcore=score_table(list(TABLES["hardcore"]), last=True),
        tasks=score_table(list(TABLES["tasks"]), last=True),
        ablations=score_table(list(TABLES["ablations"]), True, "aggrevated", "the default"),
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
    numbers = {f.__name__: f for f in (mean, minus, solved, failed, steps, gap, states, rank)}
    numbers |= {name: text.__str__ for name, text in tables().items()}
    paragraphs = []
    for paragraph in page.split("\n\n"):
        with suppress(KeyError):
            call = lambda match: numbers[match[1]](*match[2].split())  # noqa: E731
            paragraphs.append(re.sub(r"\{(\w+)((?: \w+)*)\}", call, paragraph))
    return "\n\n".join(paragraphs)


# -- pictures --------------------------------------------------------------------------------------
def style(method: str, **more) -> dict:
    """Keywords of a method's line."""
    label, color, line, marker = STYLES[method]
    look = dict(label=label, color=color, linestyle=line, marker=marker, markersize=4)
    return look | dict(linewidth=1.5) | more


def curve(row: str, policy: str, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps and numbers of episodes (evaluations,), mean returns (seeds, evaluations)."""
    every = []
    for run in runs("evaluations")[row, None].values():
        points: dict[int, list[tuple]] = {}
        for x in run:
            if x["policy"] == policy and int(x["episode"]) < n:
                point = int(x["env_steps"]), float(x["return"])
                points.setdefault(int(x["iteration"]), []).append(point)
        every.append({i: (x[0][0], len(x), np.mean(x, axis=0)[1]) for i, x in points.items()})
    common = sorted(set.intersection(*map(set, every)))  # iterations
    steps, numbers, means = np.moveaxis([[x[i] for i in common] for x in every], 2, 0)
    before = cost(row)[0] - steps[:, -1].mean()  # the steps of what it started from
    return steps.mean(axis=0) + before, numbers[0], means


def draw_curves(axes, rows: dict[str, str]) -> None:
    """Means over the seeds, bands from the worst to the best, the expert by the same episodes."""
    every = [x for row in rows for x in runs("evaluations")[row, None].values()]
    n = 1 + min(max(int(x["episode"]) for x in run) for run in every)
    for row, method in rows.items():
        steps, numbers, means = curve(row, "learner", n)
        name = PRINTED["labels"].get(row, STYLES[method][0])
        how = style(method, label=f"{name} ({len(means)} seeds)")
        axes.plot(steps, means.mean(axis=0), **how)
        few, hollow = numbers < n, dict(linestyle="", markerfacecolor="white", label=None)
        axes.plot(steps[few], means.mean(axis=0)[few], **how | hollow)
        low, high = means.min(axis=0), means.max(axis=0)
        axes.fill_between(steps, low, high, alpha=0.2, linewidth=0, color=how["color"])
    axes.axhline(curve(next(iter(rows)), "expert", n)[2].mean(), **style("expert"))
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
    axes.tick_params(labelsize=6.5)


def draw_ends(axes, rows: dict[str, str]) -> None:
    """What the failed test episodes of rows ended at."""
    for i, (row, method) in enumerate(rows.items()):
        how = style(method, linestyle="", markersize=8)
        axes.plot(np.arange(len(ENDS)) + i / 8, list(ends_of(row).values()), **how)
    axes.set_xticks(np.arange(len(ENDS)) + len(rows) / 16, ENDS.values(), rotation=20)
    axes.set(ylabel="failed episodes in 100 test episodes", ylim=(0, None))


def draw_why(axes) -> None:
    """The gap of a cloned learner over the steps before its falls."""
    usual, falls = GAPS[0], GAPS[1:]
    x, y, error = (falls[k] for k in ("steps_before_fall", "gap", "standard_error"))
    label = f"a cloned learner before {falls['episodes'].max():.0f} falls"
    axes.plot(x, y, **style("bc", markevery=10, label=label))
    axes.fill_between(x, y - 2 * error, y + 2 * error, alpha=0.2, linewidth=0, color="#D55E00")
    label = f"its mean over {usual['episodes']:.0f} episodes that ended well"
    axes.axhline(usual["gap"], **style("bc", marker="", linestyle=":", label=label))
    axes.invert_xaxis()
    axes.set(xlabel="steps before the fall", ylabel="Q*(s, expert) - Q*(s, learner)")


def draw_candidates(axes, column: str, critics: str) -> None:
    """What critics said of candidates and what came, and means of six bins of equal counts."""
    for before, method, place in (("0", "aggrevated", "elsewhere"), ("1", "bc", "before a fall")):
        x, y = tried(column, "", before).clip(-1, 1), tried("came", "", before).clip(-8, 8)
        axes.plot(x, y, **style(method, linestyle="", alpha=0.3, markersize=3, label=place))
    said, came = tried(column), tried("came")
    for x in np.array_split(said.argsort(), 6):
        y, error = came[x].mean(), ag.standard_error(came[x])
        axes.errorbar(said[x].mean(), y, 2 * error, fmt="s", color="black", markersize=4, capsize=3)
    axes.axline((0, 0), slope=1, color="black", linewidth=0.7)
    axes.set(xlabel=f"better by {critics} critics", ylabel="really better by", xlim=(-1.1, 1.1))


def save(name: str, figure, axes) -> None:
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(HERE / "figures" / f"{name}.png", dpi=110)
    plt.close(figure)


def draw_all() -> None:
    """Every figure whose rows have numbers."""
    for name, rows in PRINTED["curves"].items():
        rows, wide = {row: rows[row] for row in scored(*rows)}, name == "past_expert"
        if not rows:
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
            inset = left.inset_axes([0.15, 0.2, 0.37, 0.46])
            draw_scores(inset, {row: PRINTED["inset"][row] for row in scored(*PRINTED["inset"])})
        save(name, figure, left)
    figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
    draw_why(axes)
    save("why", figure, axes)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.5), layout="constrained")
    draw_candidates(left, "advantage", "evaluated")
    draw_candidates(right, "advantage_zip", "SAC's own")
    save("candidates", figure, left)


if __name__ == "__main__":
    draw_all()
    (HERE / "README.md").write_text(fill((HERE / "template.md").read_text()))
