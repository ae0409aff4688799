"""Choose a checkpoint of a train_sac.py run, score it, and put it into sac/.

    python rl-trained-agents/publish.py rl-trained-agents/runs/BipedalWalkerHardcore-v3_s0 --n 1

The candidates are the checkpoints with the best evaluations while training and averages of the last
ones' weights (or, with `--target`, the checkpoints nearest to a return); 100 validation episodes
choose among them, and other, fresh episodes give the score.  All use the mean action in the
untouched environment.  `score.json` beside the zip has the numbers and what they were measured on.
"""

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

import gymnasium
import matplotlib
import numpy as np
import stable_baselines3
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import aggrevated  # noqa: E402
from stable_baselines3 import SAC  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SELECT = 100  # a stream of episodes that neither training, validation nor the scores use
AVERAGES = (2, 3, 4, 6)  # of the last so many checkpoints' weights
SCORE = aggrevated.TUNING  # fresh for an expert: only learners were ever tuned on it


def play(zip_path: Path, env_name: str, episodes: int, stream: int) -> list[aggrevated.Trajectory]:
    """Deterministic episodes of the agent in `zip_path`."""
    config = aggrevated.Config(env_name=env_name, expert_path=str(zip_path)).check()
    agent = aggrevated.AggreVateDAgent(config)
    agent.workers = aggrevated.Workers(config)
    try:
        return agent.evaluate("expert", episodes, stream)
    finally:
        agent.close()


def summary(returns: np.ndarray) -> dict:
    """Mean, standard deviation, standard error and success rate."""
    spread = returns.std(ddof=1)
    return dict(
        mean=returns.mean(),
        std=spread,
        standard_error=spread / len(returns) ** 0.5,
        success_rate=np.mean(returns >= aggrevated.SOLVED),
        episodes=len(returns),
    )


def play_after_a_learner(zip_path: Path, env_name: str, n: int) -> list[tuple]:
    """(episode, the expert's first step) from states that a half-trained learner got itself into.

    The learner has had 5 iterations of the defaults; it acts for up to 500 steps, a quarter of the
    longest episode at most, and the expert from there on.
    """
    config = aggrevated.Config(env_name=env_name, expert_path=str(zip_path), n_workers=1).check()
    agent = aggrevated.AggreVateDAgent(config)
    agent.workers = aggrevated.Workers(config)
    for i in range(1, 6):
        agent.iterate(i)
    rng, simulator, result = np.random.default_rng(SCORE), agent.workers.local, []
    simulator.policy.load_state_dict(agent.policy.state_dict())
    for i in range(n):
        job = aggrevated.Job((SCORE, i), 0.0, 0.0, agent.horizon)
        t = aggrevated.Trajectory(job, aggrevated.make_env(env_name))
        switch = rng.integers(min(500, agent.horizon // 4))
        t.by_expert = np.arange(agent.horizon) >= switch
        with torch.inference_mode():
            while not t.step(simulator._act([t])[0]):
                pass
        t.finish()
        if len(t) > switch:  # else the learner fell first
            result.append((t, switch))
    return result


def audit(zip_path: Path, env_name: str, episodes: list[tuple], gamma: float) -> dict:
    """Q*(s, a_expert) against the discounted return that then came, but not near a time-out."""
    env = aggrevated.make_env(env_name)
    expert = aggrevated.SACExpert(zip_path, env.observation_space, env.action_space)
    q_all, g_all, before_fall = [], [], []
    for t, start in episodes:
        q = expert.q_star(t.states, t.actions)[:, 0]
        rewards, cut = t.rewards.copy(), len(t)
        if not t.terminated:  # what a time-out cuts off is taken from Q*, and weighs little
            rewards[-1], cut = q[-1], max(len(t) - 500, len(t) // 4)
        g = aggrevated.returns_to_go(rewards, gamma)
        q_all.append(q[start:cut])
        g_all.append(g[start:cut])
        if t.terminated and t.rewards[-1] <= -100:
            before_fall.append((q[-5:].mean(), g[-5:].mean()))
    q, g = np.concatenate(q_all), np.concatenate(g_all)
    result = dict(
        steps=len(q),
        mean_q=q.mean(),
        mean_return=g.mean(),
        bias=(q - g).mean(),
        correlation=np.corrcoef(q, g)[0, 1],
        falls=len(before_fall),
    )
    if before_fall:
        fall = np.mean(before_fall, axis=0)
        result |= dict(q_before_fall=fall[0], return_before_fall=fall[1])
    return result


def average(paths: list[Path], result: Path) -> Path:
    """Save the agent whose weights, actor's and critics', are the mean of several checkpoints'."""
    models = [load(path) for path in paths]
    states = [m.policy.state_dict() for m in models]
    mean = {k: torch.stack([s[k] for s in states]).double().mean(dim=0) for k in states[0]}
    models[-1].policy.load_state_dict(mean)
    models[-1].save(result)
    return result


def load(path: Path) -> SAC:
    return SAC.load(path, device="cpu", custom_objects={"lr_schedule": lambda _: 0.0})


def choose(run_dir: Path, env_name: str, target: float | None, after: int, n_candidates=5):
    """The checkpoint that 100 validation episodes like best, and what each candidate got."""
    log = np.load(run_dir / "evaluations.npz")
    means, steps = log["results"].mean(axis=1), log["timesteps"]
    order = np.argsort(-means if target is None else np.abs(means - target))
    folder, candidates = run_dir / "checkpoints", {}
    paths = [folder / f"sac_{steps[i]}_steps.zip" for i in order if steps[i] > after]
    paths = paths[:n_candidates]
    if target is None:
        last = [folder / f"sac_{x}_steps.zip" for x in steps]
        paths += [average(last[-n:], folder / f"average_of_last_{n}.zip") for n in AVERAGES]
    for path in paths:
        if path.exists():
            returns = [t.episode_return for t in play(path, env_name, 100, SELECT)]
            candidates[path] = float(np.mean(returns))
            print(f"{path.name}: {candidates[path]:.1f} over 100 validation episodes", flush=True)
    best = min(
        candidates, key=lambda p: -candidates[p] if target is None else abs(candidates[p] - target)
    )
    return best, {p.name: v for p, v in candidates.items()}


def draw_curve(run_dir: Path, folder: Path) -> None:
    """evaluations.npz as a picture: mean return with its standard error over steps."""
    log = np.load(run_dir / "evaluations.npz")
    mean = log["results"].mean(axis=1)
    error = log["results"].std(axis=1, ddof=1) / log["results"].shape[1] ** 0.5
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.fill_between(log["timesteps"], mean - error, mean + error, alpha=0.3)
    axes.plot(log["timesteps"], mean)
    axes.set(xlabel="environment steps", ylabel="return, mean action", title=folder.name)
    figure.savefig(folder / "curve.png", dpi=90)
    plt.close(figure)


def wall_minutes(run_dir: Path, steps: int) -> float:
    """Minutes of training up to `steps`, breaks left out, from the TensorBoard events."""
    minutes = 0.0
    for path in run_dir.glob("events.*"):
        log = EventAccumulator(str(path)).Reload()
        if "rollout/ep_rew_mean" in log.Tags()["scalars"]:
            times = [x.wall_time for x in log.Scalars("rollout/ep_rew_mean") if x.step <= steps]
            minutes += (times[-1] - times[0]) / 60 if times else 0.0
    return minutes


def strip(model: SAC, env_name: str) -> SAC:
    """The agent without optimiser state, replay buffer and training's leftovers."""
    net_arch = model.policy_kwargs["net_arch"]
    env = aggrevated.make_env(env_name)
    fresh = SAC(
        "MlpPolicy", env, policy_kwargs={"net_arch": net_arch}, buffer_size=1, gamma=model.gamma
    )
    fresh.policy.load_state_dict(model.policy.state_dict())
    return fresh


def reward_known(settings: dict, steps: int) -> str:
    """Which reward the critics were trained on last."""
    phase = next(p for p in settings["phases"] if steps <= p["until"])
    if phase["fall_reward"] == -100.0:
        return "trained on the environment's own reward"
    return f"trained with {phase['fall_reward']:g} instead of -100 for a fall: a fall only ends"


def publish(run_dir, env_name, n, episodes, checkpoint, learner_audit, **how) -> None:
    """Choose, strip, score and audit; write sac/{env}_{n}/."""
    folder = HERE / "sac" / f"{env_name}_{n}"
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.loads((run_dir / "settings.json").read_text())
    if checkpoint:
        checkpoint, candidates = run_dir / "checkpoints" / checkpoint, {}
    else:
        checkpoint, candidates = choose(run_dir, env_name, **how)
    model = load(checkpoint)
    zip_path = folder / f"{env_name}.zip"
    strip(model, env_name).save(zip_path)
    played = play(zip_path, env_name, episodes, SCORE)
    returns = np.array([t.episode_return for t in played])
    np.savetxt(folder / "returns.csv", returns, fmt="%.3f", header="return of each test episode")
    score = dict(
        env_name=env_name,
        run=run_dir.name,
        checkpoint=checkpoint.name,
        candidates=candidates,
        env_steps=int(model.num_timesteps),
        updates=int(model._n_updates),
        gamma=model.gamma,
        reward=reward_known(settings, model.num_timesteps),
        score=summary(returns),
        q_audit=audit(zip_path, env_name, [(t, 0) for t in played], model.gamma),
        q_audit_learner=learner_audit
        and audit(zip_path, env_name, play_after_a_learner(zip_path, env_name, 100), model.gamma),
        wall_minutes=wall_minutes(run_dir, model.num_timesteps),
        versions={m.__name__: m.__version__ for m in (stable_baselines3, torch, gymnasium, np)},
        settings=settings,
        sha256=hashlib.sha256(zip_path.read_bytes()).hexdigest(),
    )
    (folder / "score.json").write_text(json.dumps(score, indent=1, default=float) + "\n")
    shutil.copy(run_dir / "evaluations.npz", folder)
    for events in run_dir.glob("events.*"):
        shutil.copy(events, folder)
    draw_curve(run_dir, folder)
    print(
        json.dumps(
            {k: score[k] for k in ("checkpoint", "score", "q_audit")}, indent=1, default=float
        )
    )


def audited(q: dict) -> str:
    """An audit in a sentence."""
    text = (
        f"bias {q['bias']:+.2f} on a mean return of {q['mean_return']:.2f}, correlation "
        f"{q['correlation']:.2f} ({q['steps']:,} steps)"
    )
    if q["falls"]:
        text += (
            f"; in the last 5 steps before {q['falls']} falls Q\\* was {q['q_before_fall']:.1f} "
            f"and the return {q['return_before_fall']:.1f}"
        )
    return text


def write_cards() -> None:
    """README.md: a card for every agent in sac/, from its score.json."""
    parts = [INTRODUCTION]
    for path in sorted((HERE / "sac").glob("*/score.json")):
        card, name = json.loads(path.read_text()), path.parent.name
        s, q, seed = card["score"], card["q_audit"], card["run"].rsplit("_s", 1)[1]
        chosen, learner = "for its place in the run, not for its score", ""
        solved = failures = ""
        if "Walker" in name:
            solved = f"{s['success_rate']:.1%} of them at 300 or more; "
            returns = np.loadtxt(path.parent / "returns.csv")
            failures = (
                f"- **Known failures**: a fall in {q['falls']} of those {len(returns)} episodes; "
                f"{np.mean(returns < 200):.1%} end below 200, a fall or stuck at an obstacle.\n"
            )
        if card["candidates"]:
            several = ", ".join(f"{k} {v:.1f}" for k, v in card["candidates"].items())
            chosen = f"on 100 validation episodes among: {several}"
        if card["q_audit_learner"]:
            states = audited(card["q_audit_learner"])
            learner = f" From states of a half-trained learner: {states}."
        parts.append(
            f"## sac/{name}\n\n![training curve](sac/{name}/curve.png)\n\n"
            f"- **Score**: {s['mean']:.1f} ± {s['std']:.1f} (standard error "
            f"{s['standard_error']:.1f}) over {s['episodes']} fresh episodes; {solved}mean action; "
            f"each return is in `returns.csv`.\n"
            f"- **Command**: `python rl-trained-agents/train_sac.py --env_name {card['env_name']} "
            f"--seed {seed}`, settings in `score.json`; checkpoint `{card['checkpoint']}` after "
            f"{card['env_steps']:,} environment steps, {card['updates']:,} updates and "
            f"{card['wall_minutes']:.0f} minutes on one core, beside other work; "
            + ", ".join(f"{k} {v}" for k, v in card["versions"].items())
            + ".\n"
            f"- **Chosen** {chosen}.\n- **Critics**: gamma {card['gamma']}, {card['reward']}.\n"
            f"- **Q\\* against the return that came**: in those episodes {audited(q)}.{learner}\n"
            f"{failures}"
            f"- **sha256** `{card['sha256']}`\n"
        )
    (HERE / "README.md").write_text("\n".join(parts))


INTRODUCTION = """# Experts

SAC agents (Stable-Baselines3) trained by `train_sac.py`, chosen and scored by `publish.py`, which
also wrote this page from the `score.json` of each agent.  The zips hold the policy and its critics
without optimiser state; raw logs (`evaluations.npz`, TensorBoard events) lie beside them.

BipedalWalkerHardcore-v3_1 was to reach 280, better 300, and does not.  Its Q\\* lies below the
return that comes: SAC bootstraps from the smaller of its two critics.  AggreVaTeD uses differences
of Q\\* between actions in one state only, where a constant cancels.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", type=Path, help="a run folder of train_sac.py")
    parser.add_argument("--n", type=int, required=True, help="the agent's number in sac/")
    parser.add_argument("--target", type=float, help="the return to come near to, not the best")
    parser.add_argument("--after", type=int, default=0, help="only checkpoints after these steps")
    parser.add_argument("--checkpoint", help="this one of its checkpoints/, without choosing")
    parser.add_argument(
        "--learner_audit", action=argparse.BooleanOptionalAction, default=True,
        help="audit Q* on the states of a half-trained learner too; it takes some minutes",
    )  # fmt: skip
    parser.add_argument("--episodes", type=int, default=500, help="test episodes")
    args = parser.parse_args()
    env_name = args.run_dir.resolve().name.rsplit("_s", 1)[0]
    publish(
        args.run_dir, env_name, args.n, args.episodes, args.checkpoint, args.learner_audit,
        target=args.target, after=args.after,
    )  # fmt: skip
    write_cards()


if __name__ == "__main__":
    main()
