"""How fast aggrevated.py is beside its floor, the simulator, and beside the script it began from.

    python tests/benchmark.py            about six minutes on two quiet cores
    python tests/benchmark.py --quick    tiny sizes, only to see that it runs

What is compared runs in turn, A B then B A; a ratio is the median of the repeats' own.  The floor
steps an iteration's trajectories again without policy, expert, labels or update: the same
environments, terrains and actions, in as many processes.  Memory is the proportional set size of
all processes together, in which a page that n of them share counts 1 / n in each (Linux only).
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from stable_baselines3 import SAC

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import aggrevated as ag  # noqa: E402

RESULTS = {}


def report(name: str, value: float, unit: str = "×") -> None:
    RESULTS[name] = f"{value:.{2 if value < 10 else 0}f} {unit}"
    print(f"{name:72s} {RESULTS[name]:>8s}", flush=True)


def race(a, b, repeats: int) -> float:
    """The median ratio of a's seconds to b's."""
    ratios = []
    for r in range(repeats):
        took = {}
        for function in (b, a) if r % 2 else (a, b):
            started = time.perf_counter()
            function()
            took[function] = time.perf_counter() - started
        ratios.append(took[a] / took[b])
    return statistics.median(ratios)


def replay(env_name: str, share: list[tuple]) -> float:
    """Step new environments side by side through (stream, actions); the sum of all rewards."""
    envs, total = [ag.make_env(env_name) for _ in share], 0.0
    for env, (stream, _) in zip(envs, share):
        env.reset(seed=int(np.random.default_rng(stream).integers(2**31)))
    for t in range(max(len(actions) for _, actions in share)):
        for env, (_, actions) in zip(envs, share):
            if t < len(actions):
                total += float(env.step(actions[t])[1])
    return total


def floor_of(agent, streams, trajectories):
    """A function that replays the trajectories by the agent's own workers, shared out as theirs."""
    episodes = [(stream, t.actions) for stream, t in zip(streams, trajectories)]
    size = -(-len(episodes) // agent.config.n_workers)
    shares = [episodes[i : i + size] for i in range(0, len(episodes), size)]
    expected = sum(float(t.rewards.sum()) for t in trajectories)

    def run():
        step = partial(replay, agent.config.env_name)
        total = sum((agent.pool.map if agent.config.n_workers > 1 else map)(step, shares))
        assert abs(total - expected) < 1e-6 * abs(expected) + 1e-6, "a replay took another course"

    return run


def measure_roll_in(n_workers: int, sizes: dict, repeats: int) -> None:
    """The simulator's share of a roll-in, by alpha, and a whole iteration over the simulator."""
    config = ag.Config(n_workers=n_workers, device="cpu", **sizes).check()
    agent, where = ag.AggreVateDAgent(config), f", {n_workers} worker(s)"
    for n in range(1, 6):  # until alpha is 0
        agent.iterate(n)
    streams = [(ag.ROLL_IN, config.seed, 6, k) for k in range(config.K)]
    for alpha in (1.0, 0.5, 0.0):
        roll_in = partial(agent.simulate, streams, alpha, config.roll_in_noise, config.H)
        floor = floor_of(agent, streams, roll_in())
        report(f"simulator over roll-in, alpha {alpha}" + where, race(floor, roll_in, repeats))
    report(
        "default iteration over simulator" + where, race(lambda: agent.iterate(6), floor, repeats)
    )


def plain_iteration(agent, expert, env, c) -> int:
    """An iteration as the first script goes about it, state by state; the number of its steps."""
    policy, data = agent.policy, []
    for _ in range(c.K):
        state, _ = env.reset()
        for _ in range(c.H):
            tensor = torch.FloatTensor(state).unsqueeze(0)
            with torch.no_grad():
                if random.random() < 0.5:
                    action, _ = expert.predict(state, deterministic=True)
                else:
                    action = policy.sample(tensor)[0].squeeze(0).numpy()
                q = torch.min(*expert.critic(tensor, torch.FloatTensor(action).unsqueeze(0)))
            following, _, done, _, _ = env.step(action)
            data.append((state, action, q.item()))
            state = following
            if done:
                break
    states, actions, q = (np.array(x, dtype=np.float32) for x in zip(*data))
    weights = (q - q.min()) / (q.max() - q.min() + 1e-8)
    for _ in range(c.train_repeat):
        for i in range(0, len(q), c.batch_sz):
            batch = (
                torch.tensor(x[i : i + c.batch_sz]) for x in (states, actions, weights[:, None])
            )
            loss = agent.loss(*batch)
            agent.optimizer.zero_grad()
            loss.backward()
            agent.optimizer.step()
    return len(q)


def measure_first_script(sizes: dict, repeats: int, **work) -> None:
    """Its loop over ours, per step, for the same work at alpha 0.5."""
    options = dict(algorithm="minmax", batch_sz=128, hidden_dim=128, n_workers=2, device="cpu")
    options |= dict(H=1000, alpha_decay_iterations=2, lr=1e-5, update_sz=10**6)
    c = ag.Config(**options | work | sizes).check()
    ours, plain = ag.AggreVateDAgent(c), ag.AggreVateDAgent(c)
    expert, env, ratios = SAC.load(c.expert_path, device="cpu"), ag.make_env(c.env_name), []
    for _ in range(repeats):
        torch.set_num_threads(2)
        started, before = time.perf_counter(), ours.env_steps
        ours.iterate(2)  # alpha 0.5
        a = (time.perf_counter() - started) / (ours.env_steps - before)
        started = time.perf_counter()
        steps = plain_iteration(plain, expert, env, c)
        ratios.append((time.perf_counter() - started) / steps / a)
    name = f"first script's loop over ours, K {c.K}, H {c.H}, {c.train_repeat} passes, per step"
    report(name, statistics.median(ratios))


def memory(group: int) -> float:
    """Proportional set size of a process group [MiB]."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == group:
                lines = (folder / "smaps_rollup").read_text().splitlines()
                total += sum(int(x.split()[1]) for x in lines if x.startswith("Pss:"))
        except OSError:  # it ended just now
            continue
    return total / 1024


def measure_program(options: list[str]) -> None:
    """`python aggrevated.py` from the outside: whole run, training, first point, memory."""
    with tempfile.TemporaryDirectory() as log_dir:
        argv = [sys.executable, ROOT / "aggrevated.py", "--log_dir", log_dir, *options]
        started, first, peak = time.perf_counter(), 0.0, 0.0
        how = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        process = subprocess.Popen(argv, **how, cwd=ROOT)
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            tables = list(Path(log_dir).glob("*/evaluations.csv"))
            first = first or (time.perf_counter() - started if tables else 0.0)
            time.sleep(1.0)  # looking costs time of its own
        whole, (table,) = time.perf_counter() - started, Path(log_dir).glob("*/evaluations.csv")
        training = float(table.read_text().splitlines()[-1].split(",")[2])
    report("whole `python aggrevated.py`", whole, "s")
    report("its training alone", training, "s")
    report("whole run over its training alone", whole / training)
    report("from the command to the first evaluation", first, "s")
    report("peak memory of all processes", peak, "MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    args = parser.parse_args()
    tiny = dict(K=4, H=100, max_experience_len=1000, update_sz=500) if args.quick else {}
    RESULTS["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    measure_program([f"--{k}={v}" for k, v in tiny.items()] + ["--max_iteration=2"] * args.quick)
    for n_workers in (1, 2):
        measure_roll_in(n_workers, tiny, 2 if args.quick else 5)
    few, repeats = (tiny | dict(train_repeat=2), 1) if args.quick else ({}, 3)
    for work in (dict(K=20, train_repeat=50), dict(K=4, train_repeat=10)):
        measure_first_script(few, repeats, **work)
    if args.json:
        args.json.write_text(json.dumps(RESULTS, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
