"""How fast aggrevated.py is beside its floor, the simulator, and beside another version of itself.

    python tests/benchmark.py --against OLD.py --evaluated SAC.zip      on two quiet cores

What is compared runs in turn, A B then B A; a ratio is the median of the repeats' own.  The floor
steps the same actions again by the same two workers, without policy, expert, labels or update.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

if __name__ == "__main__":  # before numpy and tqdm are loaded; the first as the program itself
    os.environ.update(OPENBLAS_NUM_THREADS="1", TQDM_DISABLE="1")
import numpy as np

THIS = Path(__file__).resolve().parents[1] / "aggrevated.py"
sys.path.insert(0, str(THIS.parent))
import aggrevated as ag  # noqa: E402

SAC = THIS.parent / "rl-trained-agents/sac/BipedalWalkerHardcore-v3_1/BipedalWalkerHardcore-v3.zip"
PLAIN = dict(expert_path=str(SAC), device="cpu", eval_every=99, eval_episodes=1)
RESULTS = {"machine": f"{os.uname().machine}, {os.cpu_count()} cores, torch {ag.torch.__version__}"}


def report(name: str, value: float, unit: str = "×") -> None:
    RESULTS[name] = f"{value:.{2 if value < 10 else 0}f} {unit}"
    print(f"{name:72s} {RESULTS[name]:>8s}", flush=True)


def race(name: str, a, b, repeats: int) -> None:
    """Report seconds of a() over those of b(), which either return them or are timed."""
    ratios = []
    for r in range(repeats):
        took = {}
        for f in (a, b) if r % 2 else (b, a):
            started = time.perf_counter()
            took[f] = f() or time.perf_counter() - started
        ratios.append(took[a] / took[b])
    report(name, np.median(ratios))


def replay(stream: tuple, actions: np.ndarray) -> float:
    """Step a new environment through these actions; the sum of all rewards."""
    env = ag.make_env(ag.Config())
    env.reset(seed=int(np.random.default_rng(stream).integers(2**31)))
    return sum(env.step(action)[1] for action in actions)


def measure_roll_in(repeats: int) -> None:
    """The simulator over a roll-in, by alpha, and iterations over the simulator and each other."""
    options, played = PLAIN | dict(max_iteration=5), []
    agent = ag.AggreVateDAgent(c := ag.Config(**options))
    other = ag.AggreVateDAgent(ag.Config(**options | dict(algorithm="weighted")))
    streams = [(ag.ROLL_IN, c.seed, 6, k) for k in range(c.K)]

    def roll_in(alpha: float) -> None:
        played[:] = agent.play(streams, alpha, c.roll_in_noise, c.H)

    def floor() -> None:
        total = sum(agent.pool.map(replay, streams, [t.actions for t in played]))
        assert np.isclose(total, sum(t.rewards.sum() for t in played)), "another course"

    def train_on(agent) -> float:  # seconds of what is left, for 1000 steps
        past, n = agent.seconds, agent.env_steps
        with redirect_stdout(StringIO()), TemporaryDirectory() as folder:
            agent.train(Path(folder))
        agent.config.max_iteration += 1
        return (agent.seconds - past) / (agent.env_steps - n) * 1000

    for x in (agent, other):
        train_on(x)  # until alpha is 0
    for alpha in (1.0, 0.5, 0.0):
        race(f"simulator over roll-in, alpha {alpha}", floor, partial(roll_in, alpha), repeats)
    steps = sum(len(t.states) for t in played)
    race("iteration over simulator", lambda: train_on(agent) * steps / 1000, floor, repeats)
    both = (partial(train_on, x) for x in (agent, other))
    race("iteration of aggrevated over one of weighted", *both, repeats)
    agent.close()
    other.close()


def program(options: dict, file=THIS) -> tuple[float, float, float]:
    """Seconds of `python aggrevated.py`, to the learner's first point, and of training alone."""
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with TemporaryDirectory() as log_dir:
        argv = [f"--{k}={v}" for k, v in (options | dict(log_dir=log_dir)).items()]
        started, first = time.perf_counter(), 0.0
        process = subprocess.Popen([sys.executable, file, *argv], **silent)
        while process.poll() is None:
            time.sleep(0.1)
            logs = [path.read_text() for path in Path(log_dir).glob("*/evaluations.json")]
            first = first or ("learner" in "".join(logs)) * (time.perf_counter() - started)
        whole = time.perf_counter() - started
        (log,) = Path(log_dir).glob("*/evaluations.json")
        training = json.loads(log.read_text())[-1]["seconds"]
    return whole, first, training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--against", type=Path, help="another version of aggrevated.py")
    parser.add_argument("--evaluated", help="SAC zip with evaluated critics")
    parser.add_argument("--json", type=Path, default=os.devnull, help="where to write the numbers")
    args = parser.parse_args()
    whole, first, training = program({})
    report("whole `python aggrevated.py`", whole, "s")
    report("its training alone", training, "s")
    report("whole run over its training alone", whole / training)
    report("from the command to the learner's first point", first, "s")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    report("peak memory of its largest process", peak, "MiB")
    measure_roll_in(repeats=2)

    def training(file=THIS, **options) -> float:
        return program(PLAIN | options, file)[2]

    weighted = partial(training, algorithm="weighted")
    race("training of aggrevated over that of weighted", training, weighted, 1)
    if args.against:
        old = partial(training, args.against)
        race(f"training over that of {args.against.stem}", training, old, 2)
    if args.evaluated:
        four = partial(training, expert_path=args.evaluated)
        race("training with evaluated critics over that without", four, training, 2)
    args.json.write_text(json.dumps(RESULTS, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
