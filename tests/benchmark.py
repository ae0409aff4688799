"""How fast aggrevated.py is: against the bare simulator, a bare tensor loop and a plain script.

The expert is one SAC agent; what the default's several cost more is measured apart.

    python tests/benchmark.py [--json FILE]   about six minutes on two quiet cores
    python tests/benchmark.py --quick         tiny sizes, only to see that it runs

Numbers are medians over repeats.  What is compared runs in turn, A B then B A; a ratio is the
median of the repeats' own ratios.  Memory is peak resident size (VmHWM), summed over processes.
"""

import argparse
import copy
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product, zip_longest
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import aggrevated as ag

FULL = dict(
    config={}, seed_work=dict(K=20, H=1000, train_repeat=50, batch_sz=128, update_sz=10**6),
    timed_passes=3, repeats=3, many=300, growth=dict(H=200, alpha_decay_iterations=10**6),
    growth_cells=((20, 2), (5, 2), (10, 2), (40, 2), (80, 2), (20, 1), (20, 4)),  # (K, workers)
)  # fmt: skip
QUICK = dict(
    config=dict(K=4, H=60, max_experience_len=1000), seed_work=dict(K=4, H=60, train_repeat=5),
    timed_passes=1, repeats=2, many=40, growth=dict(H=30), growth_cells=((20, 2), (80, 2))
)  # fmt: skip
ROWS, GOALS = [], []  # goals are (text, value, sign, bound)
fresh_process = partial(ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"))


def row(what, value, unit, ratio=None, of=""):
    """Keep and print a number; `ratio` is of it to the thing that `of` names."""
    ROWS.append(dict(what=what, value=value, unit=unit, ratio=ratio, of=of))
    beside = "" if ratio is None else f"{ratio:8.3f} x {of}"
    print(f"{what:52s}{value:10,.{2 * (value < 100)}f} {unit:8s}{beside}".rstrip(), flush=True)


def compare(unit, tasks: dict, repeats: int, convert) -> dict:
    """Race functions, timed unless they return a float, seconds; their ratios to the first."""
    values, first = {name: [] for name in tasks}, next(iter(tasks))
    for r in range(repeats):
        for name in list(tasks)[:: -1 if r % 2 else 1]:
            started = time.perf_counter()
            result = tasks[name]()
            seconds = result if isinstance(result, float) else time.perf_counter() - started
            values[name].append(convert(seconds))
    ratios = {k: median(a / b for a, b in zip(v, values[first])) for k, v in values.items()}
    for name, v in values.items():
        row(name, median(v), unit, ratios[name], first[4:].split(",")[0])
    return ratios


def replay(env_name, episodes) -> float:
    """(a) Step new environments side by side through (seed, actions); the sum of all rewards."""
    envs = [ag.make_env(env_name) for _ in episodes]
    for env, (seed, _) in zip(envs, episodes):
        env.reset(seed=seed)
    turns = zip_longest(*(actions for _, actions in episodes))
    return sum(float(e.step(a)[1]) for now in turns for e, a in zip(envs, now) if a is not None)


def replay_seconds(processes, n, config, iteration, trajectories) -> float:
    """Seconds of stepping an iteration's roll-in again in n processes, shared out as Workers do."""
    streams = [(ag.ROLL_IN, config.seed, iteration, k) for k in range(len(trajectories))]
    seeds = [int(np.random.default_rng(stream).integers(2**31)) for stream in streams]
    episodes = list(zip(seeds, (t.actions for t in trajectories)))
    started = time.perf_counter()
    futures = [processes[i].submit(replay, config.env_name, episodes[i::n]) for i in range(n)]
    total, seconds = sum(f.result() for f in futures), time.perf_counter() - started
    if not math.isclose(total, sum(t.episode_return for t in trajectories), rel_tol=1e-6):
        warnings.warn("a replay took other states: the environment was not reset cleanly")
    return seconds


def measure_roll_in(agent, pools, processes, size):
    """(a), (b) Steps per second of the simulator alone and of the mixture, on the same states."""
    shares = []
    for agent.alpha in (1.0, 0.5, 0.0):
        for n, agent.workers in pools.items():
            done, where = agent.collect(0), f"alpha {agent.alpha}, {n} worker(s)"
            raw = partial(replay_seconds, processes, n, agent.config, 0, done)
            mixture, steps = f"(b) roll-in, {where}", sum(map(len, done))
            tasks = {f"(a) simulator, {where}": raw, mixture: partial(agent.collect, 0)}
            shares.append(compare("steps/s", tasks, size.repeats, lambda s: steps / s)[mixture])
    GOALS.append(("roll-in over simulator, 2 workers, worst alpha", min(shares[1::2]), ">=", 0.85))


def measure_update(agent, size, device, batch_sz):
    """(c) Microseconds of the update and of its weights, per sample."""
    # small steps, so that rounding does not lead the two loops apart
    c = replace(agent.config, batch_sz=batch_sz, train_repeat=1, device=device, lr=1e-3)
    ours, where = ag.AggreVateDAgent(c), f"sample and pass, batch {batch_sz}, {device}"
    ours.policy.load_state_dict(agent.policy.state_dict())
    ours.experience = {k: v[:20_000].to(device) for k, v in agent.experience.items()}
    e, weigh, net = ours.experience, ours.weigh, ours.policy
    state, fixed = e["state"], weigh(e, 1)
    ours.experience = e | dict(target=fixed[0], weight=fixed[1])  # drawn with their states
    ours.weigh = lambda drawn, _: (drawn["target"], drawn["weight"])
    p = [x.detach().clone().requires_grad_() for x in net.parameters()]
    optimizer, spread = torch.optim.Adam(p, c.lr, fused=True), c.log_std_max - c.log_std_min

    def bare():  # the mathematics of ours.update but what has no gradient, as tensor operations
        u = ((fixed[0] - net.offset) / net.scale).clamp(-c.target_clip, c.target_clip).atanh()
        data = (state - net.state_mean) / net.state_std, u, fixed[1]
        generator = torch.Generator().manual_seed(ag.stream_seed(ag.SHUFFLE, c.seed, 1))
        drawn, order = (torch.randperm(len(state), generator=generator) for _ in range(2))
        order = drawn[order].to(device)  # what is drawn is all, shuffled, and shuffled again
        for x, v, w in zip(*(t[order].split(batch_sz) for t in data)):
            h = F.linear(F.linear(x, p[0], p[1]).relu(), p[2], p[3]).relu()
            log_std = c.log_std_min + spread * torch.sigmoid(F.linear(h, p[6], p[7]))
            z = (v - F.linear(h, p[4], p[5])) * torch.exp(-log_std)
            loss = (w * (0.5 * z * z + log_std)).sum(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(p, c.max_grad_norm, error_if_nonfinite=True)
            optimizer.step()
        p[0].sum().item()  # waits for a GPU

    bare(), ours.update(1)
    difference = max((a - b).abs().max() for a, b in zip(p, net.parameters()))
    assert difference < 1e-2, f"the bare loop learns something else, by {difference:.1e}"
    tasks = {f"(c) bare loop, {where}": bare, f"(c) update, {where}": partial(ours.update, 1)}
    tasks[f"(c) weights, sample, {device}"] = lambda: weigh(e, 1)[1].cpu()
    compare("us", tasks, 2 * size.repeats + 1, lambda s: 1e6 * s / len(state))


def plain_seconds(agent, env, work, size) -> float:
    """(e) Seconds per step of an iteration as a plain script goes about it; passes extrapolated."""
    policy, data, started = copy.deepcopy(agent.policy), [], time.perf_counter()
    optimizer, rng = torch.optim.Adam(policy.parameters(), lr=work.lr), np.random.default_rng(0)
    for k in range(work.K):
        state, _ = env.reset(seed=k)
        for _ in range(work.H):
            x = torch.tensor(state).float().unsqueeze(0)
            with torch.no_grad():
                if rng.random() < agent.alpha:
                    action, _ = agent.expert.policy.predict(state, deterministic=True)
                else:
                    action = policy.sample(x)[0].squeeze(0).numpy()
                a = torch.tensor(action).float().unsqueeze(0)
                q = torch.min(*agent.expert.policy.critic(x, a)).item()
            following, reward, terminated, truncated, _ = env.step(action)
            data.append((state, action, following, reward, terminated, q))
            state = following
            if terminated or truncated:
                break
    rolled_in, b = time.perf_counter(), work.batch_sz
    states, actions, _, _, _, q = zip(*data)
    weights = (np.array(q)[:, None] - min(q)) / (max(q) - min(q) + 1e-8)
    for i in [*range(0, len(data), b)] * size.timed_passes:
        x, a, w = (torch.tensor(v[i : i + b]).float() for v in (states, actions, weights))
        loss = -(policy.get_log_prob(x, a) * w).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    passes = (time.perf_counter() - rolled_in) * work.train_repeat / size.timed_passes
    return (rolled_in - started + passes) / len(data)


def part(agent, start, experience, name, *args):
    """A method of the agent, from the same weights and experience every time."""
    agent.policy.load_state_dict(start)
    agent.experience = dict(experience)
    return getattr(agent, name)(*args)


def measure_iteration(agent, processes, size):
    """(d), (e) Labels and iterations, against the simulator's own time and plain scripts."""
    c, n = agent.config, 1 + agent.config.alpha_decay_iterations // 2
    agent.decay_alpha(n)
    done, start = agent.collect(n), copy.deepcopy(agent.policy.state_dict())
    m, some, e = c.max_experience_len, done[0].states[:, None], agent.expert
    full = {k: v.repeat(m // len(v) + 1, 1)[:m] for k, v in agent.experience.items()}
    drawn = {k: v[: c.update_sz] for k, v in full.items()}  # as many as an update draws
    here, own = partial(part, agent, start, full), partial(part, agent, start, {})
    tasks = {"(d) labels one by one, per step": lambda: [e.q_star(s, e.predict(s)) for s in some]}
    tasks["(d) labels batched, per step"] = partial(own, "label", done[:1])
    compare("us", tasks, 2 * size.repeats + 1, lambda s: 1e6 * s / len(some))
    whole, labels = f"(e) iteration, {m} transitions kept", "(e) its labels"
    raw = partial(replay_seconds, processes, 2, c, n, done)
    tasks = {
        f"(e) simulator, 2 processes, {sum(map(len, done))} steps": raw,
        whole: lambda: [here("iterate", n), agent.save("last.pt")],
        "(e) its roll-in": partial(here, "collect", n),
        labels: partial(here, "label", done),
        "(e) its weights": partial(here, "weigh", drawn, n),
        "(e) its update, with the weights": partial(here, "update", n),
        "(e) its checkpoint": partial(here, "save", "last.pt"),
        "(e) iteration, only its own transitions kept": partial(own, "iterate", n),
    }
    if c.env_name == ag.HARDCORE:  # the default's experts fit: labels and weights by all of them
        council, path = copy.copy(agent), ag.Config.expert_path
        council.expert = ag.load_expert(replace(c, expert_path=path), ag.make_env(c.env_name))
        several = f"{path.count(',') + 1} experts"
        tasks[f"(e) labels of {several}"] = partial(part, council, start, full, "label", done)
        tasks[f"(e) weights by {several}"] = partial(part, council, start, full, "weigh", drawn, n)
    over = compare("s", tasks, size.repeats, lambda s: s)
    GOALS.append(("iteration over simulator, experience full", over[whole], "<=", 1.5))
    GOALS.append(("labels' share of an iteration", over[labels] / over[whole], "<=", 0.02))
    same = ag.AggreVateDAgent(replace(c, weighting="minmax", **size.seed_work))
    same.workers, same.alpha, work = agent.workers, agent.alpha, same.config
    agent.policy.load_state_dict(start)
    same.policy.load_state_dict(start)
    steps, ours = sum(map(len, same.collect(n))), partial(part, same, start, {}, "iterate", n)
    plain = f"(e) plain script, per step, {size.timed_passes} of {work.train_repeat} passes run"
    tasks = {"(e) iteration, same work, per step": lambda: ours()["time/iteration_seconds"] / steps}
    tasks[plain] = partial(plain_seconds, agent, ag.make_env(c.env_name), work, size)
    over = compare("ms", tasks, size.repeats, lambda s: 1e3 * s)[plain]
    GOALS.append(("plain script over an iteration of the same work", over, ">=", 6))


def iterations(config, n, keep) -> list:
    """(roll-in steps/s, seconds, peak MiB of this process, of the workers) of n iterations."""
    agent, result = ag.AggreVateDAgent(config), []
    agent.workers = ag.Workers(config)
    pids = os.getpid(), *(p.pid for p in agent.workers.processes)
    for i in range(1, n + 1):
        agent.experience = agent.experience if keep else {}
        new = agent.iterate(i)
        status = [Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1] for pid in pids]
        main, *workers = (int(text.split()[0]) / 1024 for text in status)
        times = new["time/env_steps_per_second"], new["time/iteration_seconds"]
        result.append((*times, main, sum(workers)))
    agent.close()
    return result


def measure_growth(config, size):
    """(f), (g) Memory of default iterations and of many, and how all grows with K and workers."""
    fresh = fresh_process(max_tasks_per_child=1)
    *_, main, workers = fresh.submit(iterations, config, 5, True).result()[-1]
    row("(f) peak memory, main process alone", main, "MiB")
    row(f"(f) peak memory, with {config.n_workers} workers", main + workers, "MiB")
    small = replace(config, K=4, H=50, max_experience_len=1000)
    many = fresh.submit(iterations, small, size.many, True).result()
    peaks = [main + workers for *_, main, workers in many]
    flat, what = peaks[-1] / peaks[19], f"peak memory after {len(peaks)} small iterations"
    row(f"(f) {what}", peaks[-1], "MiB", flat, "after 20")
    GOALS.append((f"{what}, over after 20", flat, "<=", 1.05))
    cells = {}
    for K, n in size.growth_cells:
        c = replace(config, **size.growth, K=K, n_workers=n)
        cell = fresh.submit(iterations, c, size.repeats, False).result()[1:]
        rate, seconds, main, workers = (median(x) for x in zip(*cell))
        cells[K, n] = {"roll-in": rate, "iteration": seconds, "peak memory": main + workers}
        for (name, x), unit in zip(cells[K, n].items(), ("steps/s", "s", "MiB")):
            row(f"(g) {name}, K {K}, {n} worker(s)", x, unit, x / cells[20, 2][name], "K 20, 2")
    linear = cells[80, 2]["iteration"] / cells[20, 2]["iteration"] / 4
    GOALS.append(("seconds per trajectory, K 80 over K 20", linear, "<=", 1.1))


def main():
    """Parse the options, measure everything, print the goals."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--expert_path", default=ag.Config.expert_path.split(",")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; numbers mean nothing")
    args, started = parser.parse_args(), time.perf_counter()
    size = argparse.Namespace(**(QUICK if args.quick else FULL))
    warnings.filterwarnings("ignore", "Creating a tensor from a list")
    torch.set_num_threads(1)
    config = ag.Config(expert_path=args.expert_path, device="cpu", **size.config).check()
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].split("\n")[0]
    about = dict(cpu=cpu, cores=len(os.sched_getaffinity(0)), torch=torch.__version__)
    about |= dict(load_at_start=os.getloadavg()[0], quick=args.quick)
    print(*(f"{k} {v}" for k, v in about.items()), sep=", ", flush=True)
    measure_growth(config, size)
    processes = [fresh_process() for _ in range(2)]
    for process in processes:
        process.submit(replay, config.env_name, []).result()  # starts it
    pools = {n: ag.Workers(replace(config, n_workers=n)) for n in (1, 2)}
    agent = ag.AggreVateDAgent(replace(config, train_repeat=10))  # so that it walks a little
    agent.workers = pools[2]
    agent.iterate(1)
    agent.config = config
    for device, batch_sz in product(
        ["cpu", "cuda"][: 1 + torch.cuda.is_available()], (128, 256, 512)
    ):
        measure_update(agent, size, device, batch_sz)
    measure_roll_in(agent, pools, processes, size)  # leaves the agent with pools[2]
    with tempfile.TemporaryDirectory() as folder:
        agent.run_dir = Path(folder)
        measure_iteration(agent, processes, size)
    agent.close()
    for i, (text, value, sign, bound) in enumerate(GOALS):
        met = bool(value <= bound if sign == "<=" else value >= bound)
        print(f"{'met' if met else 'NOT MET':8s} {text:52s}{value:8.3f} (goal {sign} {bound})")
        GOALS[i] = dict(goal=text, value=value, sign=sign, bound=bound, met=met)
    about["seconds"] = round(time.perf_counter() - started)
    print(about["seconds"], "s in all")
    if args.json:
        args.json.write_text(json.dumps(dict(machine=about, rows=ROWS, goals=GOALS), indent=1))


if __name__ == "__main__":
    main()
