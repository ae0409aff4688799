"""Evaluate the critics of a SAC agent: make them the cost-to-go Q* of its mean action as it is.

    python rl-trained-agents/evaluate_critics.py AGENT.zip --out NEW.zip --fall_reward -25

The critics in a zip are what its actor was made greedy for: of all former actors, with an entropy
bonus, at the prices of training.  Here the actor is frozen, plays with noise, and fitted Q
evaluation, y = r + gamma Q(s', pi*(s')), goes on from copies of the zip's critics.  NEW.zip is the
old one with the copies besides: its second half of critics.  Beside it NEW.json says how they were
made and what they are worth.
"""

import argparse
import copy
import io
import json
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from audit import AUDIT, audit, what_came
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.save_util import data_to_json
from tqdm import trange
from train_sac import FALL, reprice

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aggrevated import AggreVateDAgent, Config, SACExpert, UserError, make_env, read_sac_zip

N_ENVS, NOISE = 64, (0.0, 0.1, 0.2, 0.4)  # standard deviations, one an episode; actions in [-1, 1]
BATCH, FALL_SHARE, FALL_WINDOW = 256, 0.4, 120  # 40 % of a batch is from the steps before falls
LEARNING_RATE, TARGET_RATE = 3e-4, 0.005
EPISODES = 100  # of the calibration


def play(expert, env, steps: int, seed: int) -> dict:
    """`steps` transitions of the expert with noise, as arrays (T, N_ENVS, ...)."""
    rng, state, rows = np.random.default_rng(seed), env.reset(), []
    std = rng.choice(NOISE, (N_ENVS, 1))
    half, middle = (expert.high - expert.low) / 2, (expert.high + expert.low) / 2
    for _ in trange(steps // N_ENVS, desc="playing", unit_scale=N_ENVS, unit=" steps"):
        mean = (expert.predict(state.astype(np.float32)) - middle) / half
        action = middle + half * np.clip(mean + std * rng.standard_normal(mean.shape), -1, 1)
        following, reward, done, infos = env.step(action := action.astype(np.float32))
        last = following.copy()
        for i in np.flatnonzero(done):
            last[i] = infos[i]["terminal_observation"]
        ended = done & ~np.array([info.get("TimeLimit.truncated", False) for info in infos])
        rows.append((state, action, reward, last, ended, done, ended & (reward <= FALL)))
        std[done] = rng.choice(NOISE, (done.sum(), 1))
        state = following
    names = "state", "action", "reward", "next_state", "terminated", "done", "fell"
    return {k: np.array(x, np.float32) for k, x in zip(names, zip(*rows), strict=True)}


def steps_before_falls(done: np.ndarray, fell: np.ndarray) -> np.ndarray:
    """Flat indices of the last FALL_WINDOW steps of all episodes that ended in a fall."""
    near, ahead = np.zeros(done.shape, bool), np.full(done.shape[1], FALL_WINDOW)
    for t in reversed(range(len(done))):
        ahead = np.where(fell[t], 0, np.where(done[t] > 0, FALL_WINDOW, ahead + 1))
        near[t] = ahead < FALL_WINDOW
    return np.flatnonzero(near)


def fit(expert, data: dict, updates: int, seed: int) -> torch.nn.ModuleList:
    """SAC's critics after fitted Q evaluation of the frozen actor, each with its own error."""
    n = len(expert.critics) // (2 if expert.evaluated else 1)
    own = torch.nn.ModuleList(expert.critics[:n])
    learned, target = copy.copy(expert), copy.copy(expert)
    learned.critics, target.critics = copy.deepcopy(own).requires_grad_(True), copy.deepcopy(own)
    both = [list(x.critics.parameters()) for x in (target, learned)]
    optimizer = torch.optim.Adam(both[1], fused=True)
    near = steps_before_falls(data["done"], data["fell"])
    flat = {k: torch.from_numpy(x.reshape(-1, *x.shape[2:])) for k, x in data.items()}
    n_near, rng = round(FALL_SHARE * BATCH), np.random.default_rng(seed)
    pieces = [expert.predict(s.numpy()) for s in flat["next_state"].split(4096)]
    flat["next_action"] = torch.from_numpy(np.concatenate(pieces))
    for update in trange(updates, desc="fitting", unit=" updates"):
        rows = rng.integers(len(flat["reward"]), size=BATCH)
        if len(near):
            rows[:n_near] = near[rng.integers(len(near), size=n_near)]
        b = {k: x[rows] for k, x in flat.items()}
        with torch.no_grad():
            q_next = target.q_values(b["next_state"], b["next_action"]).mean(dim=1)
            y = (b["reward"] + expert.gamma * (1 - b["terminated"]) * q_next)[:, None]
        loss = ((learned.q_values(b["state"], b["action"]) - y) ** 2).mean(dim=0).sum()
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, 2 * (1 - update / updates))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(*both, TARGET_RATE)
    return learned.critics


def write(critics, old: Path, new: Path, settings: dict) -> None:
    """The old zip with these critics behind its own, and the settings among its plain data."""
    weights, data = read_sac_zip(old)
    named = {f"qf{len(critics) + i}": q for i, q in enumerate(critics)}
    qs = torch.nn.ModuleDict(named).state_dict()
    weights |= {f"{who}.{k}": v for who in ("critic", "critic_target") for k, v in qs.items()}
    kwargs = {k: v for k, v in data["policy_kwargs"].items() if not isinstance(v, str)}
    if "activation_fn" in data["policy_kwargs"]:  # a class, and so the whole was pickled
        kwargs["activation_fn"] = type(critics[0][1])
    kwargs = json.loads(data_to_json(dict(policy_kwargs=kwargs | dict(n_critics=2 * len(critics)))))
    changed = {"data": json.dumps(data | kwargs | dict(critics_evaluated=settings), indent=4)}
    with zipfile.ZipFile(old) as source, zipfile.ZipFile(new, "w") as made:
        file = source.open("critic.optimizer.pth")
        optimizer = torch.load(file, map_location="cpu", weights_only=True)
        optimizer["state"], optimizer["param_groups"][0]["params"] = {}, list(range(2 * len(qs)))
        for name, state in {"policy.pth": weights, "critic.optimizer.pth": optimizer}.items():
            torch.save(state, buffer := io.BytesIO())
            changed[name] = buffer.getvalue()
        for name in source.namelist():
            made.writestr(name, changed.get(name) or source.read(name))


def calibrate(old: Path, new: Path, settings: dict) -> dict:
    """What the critics of both zips are worth, by fresh episodes of the mean action."""
    how = {k: settings[k] for k in ("env_name", "env_kwargs")} | dict(n_workers=1, device="cpu")
    before, after = (AggreVateDAgent(Config(expert_path=str(x), **how)) for x in (old, new))
    streams = [(AUDIT, i) for i in range(EPISODES)]
    episodes = [(t, 0) for t in after.play(streams, 1.0, 0.0, after.horizon, "calibrating")]
    came = what_came(after, episodes, partial(reprice, fall_reward=settings["fall_reward"]))
    worth = dict(before=audit(before, came), after=audit(after, came))
    return dict(settings=settings, gamma=after.expert.gamma, episodes=EPISODES) | worth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("zip", type=Path, help="a SAC agent of Stable-Baselines3")
    parser.add_argument("--out", type=Path, required=True, help="the zip to write")
    parser.add_argument("--env_name", default=Config.env_name, help="its task (%(default)s)")
    parser.add_argument("--env_kwargs", default="{}", help="JSON for gym.make")
    parser.add_argument("--fall_reward", type=float, help="for a last reward of -100 or less")
    for name, default in dict(steps=1_500_000, updates=80_000, seed=0).items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    args = parser.parse_args()
    settings = {k: v for k, v in vars(args).items() if k not in ("zip", "out")}
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        task = Config(env_name=args.env_name, env_kwargs=args.env_kwargs)
        env = make_vec_env(partial(make_env, task), N_ENVS, args.seed)
        expert = SACExpert(args.zip, env.observation_space, env.action_space)
    except UserError as error:
        parser.error(f"{error} (Here the zip is the first argument; check --env_name too.)")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    data = play(expert, env, args.steps, args.seed)
    data["reward"] = reprice(data["reward"], data["action"], data["fell"], args.fall_reward)
    critics = fit(expert, data, args.updates, args.seed)
    write(critics, args.zip, args.out, settings)
    worth = calibrate(args.zip, args.out, settings)
    args.out.with_suffix(".json").write_text(json.dumps(worth, indent=1) + "\n")


if __name__ == "__main__":
    main()
