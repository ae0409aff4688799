"""Average a span of a train_sac.py run into one agent, score it, and put it into sac/."""

import argparse
import hashlib
import json
import pickle
import shutil
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import numpy as np
import torch
from audit import AUDIT, audit, what_came
from stable_baselines3 import SAC
from train_sac import Settings, reprice

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aggrevated import AggreVateDAgent, Config, NumpyPolicy, SACExpert, make_env, play_episode

HALF_TRAINED = dict(algorithm="weighted", max_iteration=5, eval_episodes=2)  # a learner to audit


def merge(states: list[dict], env_name: str, zip_path: Path) -> None:
    """Save the mean of the weights, actor's and critics', in a fresh agent: no optimiser state."""
    mean = {k: torch.stack([s[k] for s in states]).double().mean(dim=0) for k in states[0]}
    units = [len(x) for k, x in mean.items() if "actor.latent_pi." in k and x.ndim == 2]
    how = dict(buffer_size=1, policy_kwargs=dict(net_arch=units))
    model = SAC("MlpPolicy", make_env(Config(env_name=env_name)), **how)
    model.policy.load_state_dict(mean)
    model.save(zip_path)


@dataclass
class HandOver:
    """Acts as the learner at first, then as the expert."""

    learner: NumpyPolicy
    expert: SACExpert
    steps: int  # that the learner still acts

    def act(self, state, noise):
        self.steps -= 1
        return self.expert.predict(state) if self.steps < 0 else self.learner.act(state)


def play_after_a_learner(agent: AggreVateDAgent, n: int) -> list[tuple]:
    """(episode, the expert's first step): before it a half-trained learner acts for up to 500."""
    with TemporaryDirectory() as folder:
        agent.train(Path(folder))
    c, learner = agent.config, NumpyPolicy(agent.policy.state_dict())
    firsts = np.random.default_rng(AUDIT).integers(min(500, agent.horizon // 4), size=n)
    episodes = []
    for i, first in enumerate(firsts):
        players = pickle.dumps((HandOver(learner, agent.expert, first), agent.expert))
        t = play_episode(players, c, 0.0, 0.0, agent.horizon, (AUDIT, i))
        if len(t.rewards) > first:
            episodes.append((t, first))
    return episodes


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
    how = dict(env_name=env_name, expert_path=str(zip_path), n_workers=1, device="cpu")
    agent = AggreVateDAgent(Config(**how, **HALF_TRAINED))
    played = agent.play([(AUDIT, i) for i in range(args.episodes)], 1.0, 0.0, agent.horizon)
    rows = np.array([(i, t.rewards.sum(dtype=float), len(t.rewards)) for i, t in enumerate(played)])
    header = dict(header="episode,return,length", comments="")
    np.savetxt(folder / "returns.csv", rows, "%d,%.3f,%d", **header)
    returns, prices = rows[:, 1], settings.stage(at[-1])[:2]
    price = partial(reprice, fall_reward=prices[0], torque_cost=prices[1])
    episodes = [(t, 0) for t in played]
    after_learner = args.learner_episodes and play_after_a_learner(agent, args.learner_episodes)
    score = dict(
        env_name=env_name, run=run_dir.name, gamma=agent.expert.gamma,
        checkpoints=dict(first=at[0], last=at[-1], number=len(at)),
        **{k: checkpoints[-1][k] for k in ("updates", "env_steps", "minutes")},
        score=dict(
            mean=returns.mean(), std=(std := returns.std(ddof=1)), episodes=len(returns),
            standard_error=std / len(returns) ** 0.5,
            solved=np.mean(returns >= 300), at_least_250=np.mean(returns >= 250),
        ),
        q_audit=audit(agent, what_came(agent, episodes, price)), prices=prices,
        q_audit_learner=after_learner and audit(agent, what_came(agent, after_learner, price)),
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
