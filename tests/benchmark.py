"""How fast aggrevated.py is beside its floor, the simulator, and beside another version of itself.

    python tests/benchmark.py --against OLD.py --evaluated SAC.zip      on two quiet cores

What is compared runs in turn, A B then B A; a ratio is the median of the repeats' own.  The floor
steps the same actions again by the same two workers, without policy, expert, labels or update.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

if __name__ == "__main__":  # before numpy and tqdm are loaded; the first as the program itself
    os.environ.update(OPENBLAS_NUM_THREADS="1", TQDM_DISABLE="1")
import numpy as np

THIS = Path(__file__).resolve().parents[1] / "aggrevated.py"
sys.path.insert(0, str(THIS.parent))
import aggrevated as ag  # noqa: E402

SAC = THIS.parent / "rl-trained-agents/sac/BipedalWalkerHardcore-v3_1/BipedalWalkerHardcore-v3.zip"
PLAIN = dict(expert_path=str(SAC), device="cpu", eval_every=99, eval_episodes=1)  # 1 candidate
TINY = dict(K=4, H=100, max_experience_len=1000, update_sz=500, max_iteration=2, eval_episodes=1)
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
    env = ag.make_env(ag.Config().env_name)
    env.reset(seed=ag.terrain_seed(np.random.default_rng(stream)))
    return sum(env.step(action)[1] for action in actions)


def measure_roll_in(sizes: dict, repeats: int) -> None:
    """The simulator over a roll-in, by alpha, and a default iteration over the simulator."""
    agent = ag.AggreVateDAgent(ag.Config(**PLAIN | sizes | dict(max_iteration=5)))
    c, played = agent.config, []
    streams = [(ag.ROLL_IN, c.seed, 6, k) for k in range(c.K)]

    def roll_in(alpha: float) -> None:
        played[:] = agent.simulate(streams, alpha, c.roll_in_noise, c.H)

    def floor() -> None:
        total = sum(agent.pool.map(replay, streams, [t.actions for t in played]))
        assert np.isclose(total, sum(t.rewards.sum() for t in played)), "another course"

    def train_on() -> float:  # seconds of what is left, for as many steps as were played
        past, n = agent.seconds, agent.env_steps
        with redirect_stdout(StringIO()), TemporaryDirectory() as folder:
            agent.train(Path(folder))
        c.max_iteration += 1
        return (agent.seconds - past) * sum(len(t.states) for t in played) / (agent.env_steps - n)

    train_on()  # until alpha is 0
    for alpha in (1.0, 0.5, 0.0):
        race(f"simulator over roll-in, alpha {alpha}", floor, partial(roll_in, alpha), repeats)
    race("default iteration over simulator", train_on, floor, repeats)
    agent.close()


def train(file: Path, options: dict) -> float:
    """Train with this version of aggrevated.py; the seconds that it records itself."""
    spec = importlib.util.spec_from_file_location(f"version_{file.stem}", file)
    sys.modules[spec.name] = version = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(version)
    agent = version.AggreVateDAgent(version.Config(**options).check())
    with redirect_stdout(StringIO()), TemporaryDirectory() as folder, agent.pool:
        agent.train(Path(folder))
    return agent.seconds


def train_alone(file: Path, options: dict) -> float:
    """`train` in a new process: it wants to fork its workers before it has threads."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(train, file, options).result()


def measure_program(options: dict) -> None:
    """`python aggrevated.py` from the outside."""
    with TemporaryDirectory() as log_dir:
        argv = [f"--{k}={v}" for k, v in (options | dict(log_dir=log_dir)).items()]
        silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started, first = time.perf_counter(), 0.0
        process = subprocess.Popen([sys.executable, THIS, *argv], **silent)
        while process.poll() is None:
            time.sleep(0.2)
            logs = [path.read_text() for path in Path(log_dir).glob("*/evaluations.json")]
            first = first or ("learner" in "".join(logs)) * (time.perf_counter() - started)
        whole = time.perf_counter() - started
        (log,) = Path(log_dir).glob("*/evaluations.json")
        training = json.loads(log.read_text())[-1]["seconds"]
    report("whole `python aggrevated.py`", whole, "s")
    report("its training alone", training, "s")
    report("whole run over its training alone", whole / training)
    report("from the command to the learner's first point", first, "s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--against", type=Path, help="another version of aggrevated.py")
    parser.add_argument("--evaluated", help="SAC zip with evaluated critics, for the candidates")
    parser.add_argument("--json", type=Path, default=os.devnull, help="where to write the numbers")
    args = parser.parse_args()
    sizes, repeats = (TINY, 2) if args.quick else ({}, 4)
    measure_program(sizes)
    measure_roll_in(sizes, repeats)
    if args.against:
        both = (partial(train_alone, file, PLAIN | sizes) for file in (THIS, args.against))
        race(f"training alone over that of {args.against.stem}", *both, repeats)
    if args.evaluated:
        how = PLAIN | sizes | dict(expert_path=args.evaluated)
        both = (partial(train_alone, THIS, how | dict(candidates=n)) for n in (16, 1))
        race("training with 16 candidates over that with 1", *both, repeats)
    args.json.write_text(json.dumps(RESULTS, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
