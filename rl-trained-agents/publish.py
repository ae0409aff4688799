"""Average a span of a train_sac.py run into one agent, score it, and put it into sac/."""

import argparse
import hashlib
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from stable_baselines3 import SAC

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aggrevated import AggreVateDAgent, Config, make_env, returns_to_go, sizes
from train_sac import FALL, Settings, reprice

SCORE = 9  # the random stream of the scores, which neither training nor any validation uses
BEFORE_FALL = (0, 5), (5, 10), (10, 20), (20, 40), (40, 80), (80, 150)  # steps; 0 is the fall


def merge(states: list[dict], env_name: str, zip_path: Path) -> None:
    """Save the mean of the weights, actor's and critics', in a fresh agent: no optimiser state."""
    mean = {k: torch.stack([s[k] for s in states]).double().mean(dim=0) for k in states[0]}
    kwargs = dict(net_arch=sizes(mean, "actor.latent_pi."))
    model = SAC("MlpPolicy", make_env(env_name), buffer_size=1, policy_kwargs=kwargs)
    model.policy.load_state_dict(mean)
    model.save(zip_path)


def play_after_a_learner(agent: AggreVateDAgent, n: int) -> list[tuple]:
    """(episode, the expert's first step): before it a half-trained learner acts for up to 500."""
    for i in range(1, 6):
        agent.iterate(i)
    firsts = np.random.default_rng(SCORE).integers(min(500, agent.horizon // 4), size=n)
    alphas = np.arange(agent.horizon) >= firsts[:, None]  # (n, H): the expert's share of each step
    runs = [agent.simulate([(SCORE, i)], a, 0.0, agent.horizon)[0] for i, a in enumerate(alphas)]
    return [(t, first) for t, first in zip(runs, firsts) if len(t.rewards) > first]


def audit(agent: AggreVateDAgent, episodes: list[tuple], prices: tuple) -> dict:
    """Q*(s, a) against the discounted return that then came, paid as the critics know it."""
    columns = []
    for t, first in episodes:
        q = agent.get_q_star(torch.from_numpy(t.states), torch.from_numpy(t.actions))[:, 0].numpy()
        end, fell = len(q), t.rewards[-1] == FALL
        to_fall = np.arange(end)[::-1] if fell else np.full(end, np.inf)
        rewards = reprice(t.rewards, t.actions, to_fall == 0, *prices)
        if not fell and end == agent.horizon:  # what the limit cuts off is taken from Q*: little
            rewards[-1], end = q[-1], max(end - 500, end // 4)
        g = returns_to_go(rewards, agent.expert.gamma)
        columns.append(np.stack([q, g, to_fall])[:, first:end])
    q, g, to_fall = np.concatenate(columns, axis=1)
    near = {f"{a}-{b}": (a <= to_fall) & (to_fall < b) for a, b in BEFORE_FALL}
    table = {k: {"q": q[x].mean(), "return": g[x].mean()} for k, x in near.items() if x.any()}
    return dict(
        steps=len(q), mean_q=q.mean(), mean_return=g.mean(), bias=(q - g).mean(),
        correlation=np.corrcoef(q, g)[0, 1], falls=int(sum(to_fall == 0)), before_fall=table,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("run_dir", type=Path, help="a run folder of train_sac.py")
    option("--n", type=int, required=True, help="its number in sac/; 1 gets the run's logs")
    option("--first", type=int, default=0, help="no checkpoint before so many updates")
    option("--last", type=int, default=10**9, help="none after so many")
    option("--episodes", type=int, default=500, help="of the score")
    option("--learner_episodes", type=int, default=100, help="of the audit after a learner, or 0")
    option("--out", type=Path, default=Path(__file__).resolve().parent / "sac", help="not sac/")
    args = parser.parse_args()
    env_name = (run_dir := args.run_dir.resolve()).name.rsplit("_s", 1)[0]
    settings = Settings(**json.loads((run_dir / "settings.json").read_text()))
    paths = [p for p in sorted(run_dir.glob("*.pt")) if args.first <= int(p.stem) <= args.last]
    checkpoints, at = [torch.load(p) for p in paths], [int(p.stem) for p in paths]
    zip_path = args.out / f"{env_name}_{args.n}" / f"{env_name}.zip"
    (folder := zip_path.parent).mkdir(parents=True, exist_ok=True)
    merge([c["average"] for c in checkpoints], env_name, zip_path)
    agent = AggreVateDAgent(Config(env_name, str(zip_path), n_workers=1, device="cpu"))
    played = agent.evaluate("expert", args.episodes, SCORE)
    rows = np.array([(i, t.rewards.sum(dtype=float), len(t.rewards)) for i, t in enumerate(played)])
    header = dict(header="episode,return,length", comments="")
    np.savetxt(folder / "returns.csv", rows, "%d,%.3f,%d", **header)
    returns, prices = rows[:, 1], settings.stage(at[-1])[:2]
    score = dict(
        env_name=env_name, run=run_dir.name, gamma=agent.expert.gamma,
        checkpoints=dict(first=at[0], last=at[-1], number=len(at)),
        **{k: checkpoints[-1][k] for k in ("updates", "env_steps", "minutes")},
        score=dict(
            mean=returns.mean(), std=(std := returns.std(ddof=1)), episodes=len(returns),
            standard_error=std / len(returns) ** 0.5,
            solved=np.mean(returns >= 300), at_least_250=np.mean(returns >= 250),
        ),
        q_audit=audit(agent, [(t, 0) for t in played], prices), prices=prices,
        q_audit_learner=args.learner_episodes
        and audit(agent, play_after_a_learner(agent, args.learner_episodes), prices),
        settings=asdict(settings), sha256=hashlib.sha256(zip_path.read_bytes()).hexdigest(),
    )  # fmt: skip
    (folder / "score.json").write_text(json.dumps(score, indent=1, default=float) + "\n")
    if args.n == 1:
        weights = shutil.ignore_patterns("*.pt", "resume.*")
        shutil.copytree(run_dir, folder, ignore=weights, dirs_exist_ok=True)
        log = np.genfromtxt(run_dir / "evaluations.csv", delimiter=",", names=True)
        plt.errorbar(log["updates"], log["average_return"], log["standard_error"], label="averaged")
        plt.plot(log["updates"], log["sampled_return"], label="while training")
        plt.xlabel("updates")
        plt.legend()
        plt.savefig(folder / "curve.png", dpi=90)


if __name__ == "__main__":
    main()
