"""Run rows of the study and score them.

    python logs/reference/scripts/study.py aggrevated dagger          all that is missing of them
    python logs/reference/scripts/study.py aggrevated --seeds 0 1     some of it
    python logs/reference/scripts/study.py --list                     what is missing

A row is `python aggrevated.py` with its options in rows.json, once for each of its seeds, on one
core; some rows have another learner, a `variant` of variants.py.  Then the iterate which validation
chose, and the last one if that is another, play 500 test terrains (100 if the task is not Hardcore)
by their mean actions, the same for every policy.  `--terrains validation` are 300 others, for
choosing settings.

What is there is not done again.  A run that was killed goes on from its last checkpoint in
.runs/ROW_sSEED beside aggrevated.py, and several processes may work at the same rows.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from common import HERE, ROOT, ROWS, TERRAINS, ag, expert_of, lock, merge, missing, options_of
from common import score
from film import save_gif
import torch
from variants import variant

RUNS = ROOT / ".runs"  # not below logs/, where TensorBoard would find them


def is_finished(path: Path, options: dict) -> bool:
    """Whether a checkpoint is a run's last; it must be of these options."""
    state = ag.load_checkpoint(path)
    changed = [k for k, v in options.items() if getattr(state["config"], k) != v]
    if changed:
        sys.exit(f"{path} was made with another {', '.join(changed)}; delete it and start again")
    return state["iteration"] >= state["config"].max_iteration


def train(row: str, seed: int) -> Path:
    """The folder of the row's run with this seed, which begins, goes on, or is there already."""
    folder, options = RUNS / f"{row}_s{seed}", options_of(row)
    options |= dict(seed=seed, n_workers=1, device="cpu", log_dir=os.path.relpath(folder))
    last = next(folder.glob("*/last.pt"), None)
    if last and is_finished(last, options):
        return last.parent
    argv = ["--resume", str(last and last.parent)]
    if last is None:
        shutil.rmtree(folder, ignore_errors=True)  # it was killed before its first checkpoint
        argv = [f"--{k}={v}" for k, v in options.items()]
    with variant(ROWS[row].get("variant")):
        if ag.main(argv):
            sys.exit(f"{row}, seed {seed}, has stopped; the same command goes on")
    (last,) = folder.glob("*/last.pt")
    state = torch.load(last, weights_only=True) | dict(data={})  # which is large
    torch.save(state, last.with_suffix(".tmp"))
    os.replace(last.with_suffix(".tmp"), last)
    return last.parent


def keep(row: str, seed: int, run: Path) -> None:
    """What is committed of a run: its numbers, some policies, and one run's events and film."""
    lines = []
    for e in json.loads((run / "evaluations.json").read_text()):
        now = row, seed, e["iteration"], e["env_steps"], round(e["seconds"], 1), e["policy"]
        lines += [(*now, i, round(x, 3)) for i, x in enumerate(e["returns"])]
    merge("evaluations", lines)
    if seed in ROWS[row].get("keep", []):
        (HERE / "policies").mkdir(exist_ok=True)
        shutil.copy(run / "best.pt", HERE / "policies" / f"{row}_s{seed}.pt")
    if (row, seed) == ("aggrevated", 0):
        shutil.rmtree(HERE / "aggrevated_s0", ignore_errors=True)
        other = shutil.ignore_patterns("*.pt", "evaluations.json")
        shutil.copytree(run, HERE / "aggrevated_s0", ignore=other)
        save_gif(run, HERE / "figures" / "learner.gif")


def policies_of(run: Path) -> dict:
    """{iterate: policy} of a run; the last one only if it is not the best."""
    best, last = (ag.load_checkpoint(run / name) for name in ("best.pt", "last.pt"))
    states = dict(best=best) | (dict(last=last) if last["iteration"] > best["iteration"] else {})
    return {name: ag.NumpyPolicy(state["policy"]) for name, state in states.items()}


def run_row(row: str, seeds=None, terrains=None) -> None:
    """Train and score what a row lacks, after its expert's own score."""
    if "script" in ROWS[row]:
        sys.exit(f"{row} needs an environment of its own: see scripts/{ROWS[row]['script']}")
    for seed, t in missing(row, seeds, terrains):
        with lock(RUNS / f"{row}_s{seed}.lock", wait=False) as free:
            if not free:
                print(f"{row}, seed {seed}: another process is at it")
            elif expert_of(row) == row:
                score(row, "", t, {"": None})
            else:
                run_row(expert_of(row), None, t)
                run = train(row, seed)
                keep(row, seed, run)
                policies = policies_of(run)
                if t == "validation":  # settings are compared by what a run would give its user
                    policies = dict(best=policies["best"])
                score(row, seed, t, policies)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="see --list")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: all that the row has")
    parser.add_argument("--terrains", choices=TERRAINS, help="default: those of the row")
    parser.add_argument("--list", action="store_true", help="print what is missing")
    args = parser.parse_args()
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"rows.json has no {', '.join(unknown)}")
    os.chdir(ROOT)  # paths in the checkpoints are relative to it
    for row in (args.rows or ROWS) if args.list else args.rows:
        if args.list:
            lacks = [f"{seed} {t}".strip() for seed, t in missing(row, args.seeds, args.terrains)]
            print(f"{row:22s} {', '.join(lacks) or 'complete'}")
        elif missing(row, args.seeds, args.terrains):
            run_row(row, args.seeds, args.terrains)
        else:
            what = f".runs/{row}_s* and its lines in returns.csv"
            print(f"{row} is complete; to run it again, delete {what}")
