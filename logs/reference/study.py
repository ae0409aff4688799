"""Run rows of the study, each with the defaults but for what ROWS says, and score them.

    python logs/reference/study.py aggrevated dagger --seeds 0 1 2 --experts 1

A run lands in logs/reference/ROW_sSEED with its config, evaluations, events, best.pt and (but for
ablations) last.pt; test.csv has returns on fresh test episodes, the same terrains for every row.
What is there already is not done again, and more --episodes are added to those there.  One process
uses one core.
"""

import argparse
import csv
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import aggrevated  # noqa: E402

SAC = aggrevated.SAC_ZIP
FILM = aggrevated.AggreVateDAgent.film
CLONED = dict(init_path="logs/reference/single_bc_s{seed}/best.pt", alpha_decay_iterations=1)
FAMILY = {
    "aggrevated": {},
    "dagger": dict(algorithm="dagger"),
    "bc": dict(algorithm="bc"),
    "aggrevate": dict(algorithm="aggrevate"),
    "minmax": dict(weighting="minmax"),
    "reinforce": dict(algorithm="reinforce"),
    "natural": dict(optimizer="natural", train_repeat=20, update_sz=5_000),
    "start_gap": CLONED,
    "start_score": CLONED | dict(weighting="score", lr=3e-4),
    "start_pathwise": CLONED | dict(weighting="pathwise", lr=1e-4),
    "start_natural": CLONED
    | dict(weighting="score", optimizer="natural", train_repeat=5, update_sz=10_000),
}
ABLATIONS = {
    "factor_1": dict(gap_factor=1.0),
    "factor_10": dict(gap_factor=10.0),
    "cut_100": dict(gap_cut=100.0),
    "noise_0": dict(roll_in_noise=0.0),
    "K_10": dict(K=10, max_iteration=30, alpha_decay_iterations=8),
    "slow_alpha": dict(alpha_decay_iterations=10),
    "half_data": dict(max_experience_len=50_000),
    "one_pass": dict(train_repeat=1),
    "hidden_256": dict(hidden_dim=256),
    "H_500": dict(H=500),
    "N_60": dict(max_iteration=60, max_experience_len=1_000_000, eval_every=12),
    "argmax": dict(temperature=0.0),
    "min": dict(combine="min"),
    "max": dict(combine="max"),
    "argmax_max": dict(temperature=0.0, combine="max"),
}
ROWS = FAMILY | ABLATIONS
for prefix, n in {"single": 1, "sub": 2}.items():  # one expert: the strongest, a sub-optimal one
    ROWS |= {f"{prefix}_{k}": dict(expert_path=SAC.format(n)) | v for k, v in FAMILY.items()}
ROWS["sub_council"] = dict(expert_path=",".join(SAC.format(n) for n in (3, 4, 5)))


def play(config, who: str, episodes: range, weights=None) -> list[tuple]:
    """(return, length) of test episodes of "learner" or "expert", by the mean action."""
    config = replace(config, n_workers=1, n_threads=1, init_path="")
    agent = aggrevated.AggreVateDAgent(config)
    if weights is not None:
        agent.policy.load_state_dict(weights)
    agent.workers = aggrevated.Workers(config)
    played = agent.evaluate(who, episodes.stop, aggrevated.TEST, episodes.start)
    return [(t.episode_return, len(t)) for t in played]


def add(path: Path, played: dict, episodes: int) -> None:
    """Bring test.csv up to so many episodes of every policy; played[policy](range) plays some."""
    rows = {who: [] for who in played}
    if path.exists():
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                rows[row["policy"]].append((row["return"], row["length"]))
    for who, play_some in played.items():
        if len(rows[who]) < episodes:
            rows[who] += play_some(range(len(rows[who]), episodes))
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("policy", "episode", "return", "length"))
        table.writerows((who, i, *x) for who in rows for i, x in enumerate(rows[who]))


def score(run: Path, episodes: int) -> None:
    """Write run/test.csv for the best and the last policy; the expert's is beside the runs."""
    path = run / "test.csv"
    if path.exists() and path.read_text().count("\n") > 2 * episodes:
        return
    states = {w: aggrevated.load_checkpoint(run / f"{w}.pt") for w in ("best", "last")}
    players = {  # one, which plays once, if best and last are the same iterate
        s["iteration"]: cache(partial(play, s["config"], "learner", weights=s["policy"]))
        for s in states.values()
    }
    add(path, {w: players[s["iteration"]] for w, s in states.items()}, episodes)


def score_expert(n: str, episodes: int) -> None:
    """Write expert_n/test.csv: the same episodes, played by the expert itself."""
    config = aggrevated.Config(expert_path=",".join(map(SAC.format, n.split("+")))).check()
    folder = HERE / f"expert_{n}"
    folder.mkdir(exist_ok=True)
    add(folder / "test.csv", {"expert": partial(play, config, "expert")}, episodes)


def strip(path: Path) -> None:
    """Leave a checkpoint what evaluating needs: no data, no optimiser."""
    state = torch.load(path, weights_only=True)
    torch.save({k: state[k] for k in state if k not in ("experience", "optimizer")}, path)


def train(row: str, seed: int, folder: Path) -> None:
    """One run into `folder`, by the command that a user would give."""
    options = ROWS[row] | dict(seed=seed, n_workers=1, n_threads=1)
    if "init_path" in options:
        options["init_path"] = options["init_path"].format(seed=seed)
    with tempfile.TemporaryDirectory(dir=HERE, prefix=".") as log_dir:
        log_dir = os.path.relpath(log_dir)  # it ends up in the run's own files
        one = (row, seed) == ("aggrevated", 0)  # films are large
        aggrevated.AggreVateDAgent.film = FILM if one else lambda agent: None
        if aggrevated.main([f"--{k}={v}" for k, v in (options | dict(log_dir=log_dir)).items()]):
            sys.exit(f"{row}, seed {seed} stopped")
        (run,) = Path(log_dir).iterdir()
        strip(run / "last.pt")
        shutil.move(run, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", help="of: " + ", ".join(ROWS))
    parser.add_argument("--experts", nargs="*", default=[], help="to score: 1, or 3+4+5 as one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--episodes", type=int, default=300)
    args = parser.parse_args()
    for n in args.experts:
        score_expert(n, args.episodes)
    for seed in args.seeds:
        for row in args.rows:
            folder = HERE / f"{row}_s{seed}"
            if not folder.exists():
                train(row, seed, folder)
            score(folder, args.episodes)
            if row in ABLATIONS:  # room for what no headline needs
                (folder / "last.pt").unlink(missing_ok=True)
            print(f"{folder.name} scored", flush=True)


if __name__ == "__main__":
    main()
