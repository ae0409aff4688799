"""What train_sac.py adds to SAC, publish.py, evaluate_critics.py, and the shipped experts."""

import hashlib
import json
import sys
from functools import partial
from types import SimpleNamespace
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT
from stable_baselines3 import SAC

import aggrevated
import audit
import evaluate_critics
import publish
import train_sac

ZIPS = sorted((ROOT / "rl-trained-agents" / "sac").glob("*/*.zip"))
ZIPS = [path for path in ZIPS if list(path.parent.glob("*.json"))]  # the RL Zoo's have none
ROWS, N_ENVS, WINDOW, ENDS = 40, 3, 6, ("fall", "goal", "timeout")
CUTS = [(n, at, end) for n, at in ((76, 75), (80, 79), (95, 75), (95, 79)) for end in ("", *ENDS)]
CUTS += [(n, None, "") for n in (25, 40, 41, 95, 113, 320)]  # part filled, full, and at the seam
OPTIONS = """--env_name Pendulum-v1 --learning_starts 210 --batch_size 16 --updates 40 --n_envs 1
--gradient_steps 1 --units 16 --n_steps 1 --buffer_size 1000 --torque_updates 20 --torque_cost 3
--late_updates 30""".split()


def fill(n_rows, n_steps=3, cut_at=None, cut_end=""):
    """Our buffer, SB3's paid by our prices and with a time limit at `cut_at`, and the ends."""
    size = ROWS * N_ENVS, gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,))
    how = dict(device="cpu", n_envs=N_ENVS, n_steps=n_steps, gamma=0.9)
    ours = train_sac.FailureReplayBuffer(*size, failure_share=0.4, failure_window=WINDOW, **how)
    theirs = train_sac.NStepReplayBuffer(*size, **how)
    rng, log = np.random.default_rng(0), []
    for row in range(n_rows):
        if row == n_rows // 2:  # they change for what is stored and what comes
            ours.prices = -10.0, 3.0
            ours.price()
        end = rng.choice(["", *ENDS], size=N_ENVS, p=[0.9] + [0.1 / 3] * 3)
        end = np.array([cut_end, "", ""]) if row == cut_at else end
        arrays = *rng.normal(size=(2, N_ENVS, 2)), rng.normal(size=(N_ENVS, 1))
        reward, fell = rng.normal(size=N_ENVS), end == "fall"
        reward[fell | (end != "goal") & (rng.random(N_ENVS) < 0.2)] = -100  # not all are falls
        infos = [{"TimeLimit.truncated": x == "timeout"} for x in end]
        ours.add(*arrays, reward, end != "", infos)
        if row == cut_at:
            ours.cut_episodes()
            end = np.where(end == "", "timeout", end)
            infos = [{"TimeLimit.truncated": x == "timeout"} for x in end]
        paid = np.where(fell, -10, reward - 2 * 0.028 * np.abs(arrays[2][:, 0]))
        theirs.add(*arrays, paid, end != "", infos)
        log.append(end)
    return ours, theirs, np.array(log)


def before_falls(log, kept=ROWS):
    """The places (row, environment) that count in a ring of `kept` rows, from the log alone."""
    places = []
    for row, env in zip(*np.nonzero(log == "fall")):
        first = max([0, row - WINDOW + 1, *(np.flatnonzero(log[:row, env] != "") + 1)])
        places += [(r % kept, env) for r in range(first, row + 1) if first >= len(log) - kept]
    return places


def assert_uniform(drawn, places):
    """Only these places, and by chi-square all alike."""
    kinds, counts = np.unique(drawn.reshape(-1, 2), axis=0, return_counts=True)
    assert {tuple(kind) for kind in kinds} == set(places)
    mean, freedom = counts.mean(), len(counts) - 1
    assert ((counts - mean) ** 2 / mean).sum() < freedom + 4 * (2 * freedom) ** 0.5


@mock.patch.object(evaluate_critics, "FALL_WINDOW", WINDOW)
@pytest.mark.parametrize("n_steps", [1, 4])
@pytest.mark.parametrize("n_rows, cut_at, cut_end", CUTS)
def test_samples_are_sb3s_and_a_share_from_before_falls(n_rows, cut_at, cut_end, n_steps):
    ours, theirs, log = fill(n_rows, n_steps, cut_at, cut_end)
    rows, columns = np.transpose([*np.ndindex(ours.size(), N_ENVS)])
    sample = ours.gather(rows, columns)
    with mock.patch("numpy.random.randint", return_value=columns):
        reference = theirs._get_samples(rows)
    torch.testing.assert_close(tuple(sample), tuple(reference), rtol=1e-5, atol=1e-6)
    ours.gather = lambda rows, columns: np.stack([rows, columns], axis=1)
    np.random.seed(0)
    drawn, places = np.array([ours.sample(500) for _ in range(30)]), before_falls(log)
    assert_uniform(drawn[:, 300:], places)  # 0.4 of every batch
    assert_uniform(drawn[:, :300], np.ndindex(ours.size(), N_ENVS))
    assert not {tuple(place) for place in drawn[:, 299]} <= set(places)  # and no more
    flat = evaluate_critics.steps_before_falls(log != "", log == "fall")
    assert sorted(zip(*divmod(flat, N_ENVS))) == sorted(before_falls(log, kept=len(log)))


class Slope(gym.Env):
    """Pays where it stands; beyond 0.8 it falls."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(1, 3, (1,))

    def __init__(self, pull=0.0):
        self.pull = pull

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = np.float32(self.np_random.uniform(-0.5, 0.8, size=1))
        return self.x, {}

    def step(self, action):
        before, self.x = self.x, np.clip(self.pull * self.x + action - 2, -1, 1, dtype=np.float32)
        fell = bool(self.x > 0.8)
        return self.x, -100.0 if fell else before.item(), fell, False, {}


gym.register("Slope-v0", Slope, max_episode_steps=8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{checkpoint_every: (folder, weights after each update)} of the same 40 updates."""
    result, train = {}, SAC.train
    for every in (20, 40):
        folder, weights = tmp_path_factory.mktemp("run") / "Pendulum-v1_s0", []

        def recorded(self, *args, weights=weights, **kwargs):
            train(self, *args, **kwargs)
            weights.append({k: v.clone() for k, v in self.policy.state_dict().items()})

        argv = ["", *OPTIONS, f"--checkpoint_every={every}", f"--run_dir={folder}"]
        with mock.patch.object(SAC, "train", recorded), mock.patch("sys.argv", argv):
            train_sac.main()
        result[every] = folder, weights
    return result


def mean(states):
    return {k: torch.stack([s[k].double() for s in states]).mean(0).float() for k in states[0]}


@pytest.mark.parametrize("every, at, first", [(20, 20, 0), (20, 40, 20), (40, 40, 0)])
def test_checkpoints_hold_the_mean_since_the_last_one_and_do_not_disturb(runs, every, at, first):
    state, weights = torch.load(runs[every][0] / f"{at:07d}.pt"), runs[every][1]
    torch.testing.assert_close(state["average"], mean(weights[first:at]), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(state["last"], weights[at - 1], rtol=0, atol=0)
    torch.testing.assert_close(runs[20][1][-1], runs[40][1][-1], rtol=0, atol=0)


@mock.patch.dict(publish.HALF_TRAINED, max_iteration=1, K=1, H=20, update_sz=20)
def test_publish_averages_the_checkpoints_and_scores_the_zip(runs, tmp_path, monkeypatch):
    options = "--n=1 --episodes=3 --learner_episodes=2".split()
    monkeypatch.setattr(sys, "argv", ["", str(runs[20][0]), f"--out={tmp_path}", *options])
    publish.main()
    out = tmp_path / "Pendulum-v1_1"
    model = SAC.load(out / "Pendulum-v1.zip", device="cpu")
    score = json.loads((out / "score.json").read_text())
    expected = mean([torch.load(path)["average"] for path in runs[20][0].glob("*.pt")])
    torch.testing.assert_close(dict(model.policy.state_dict()), expected, rtol=0, atol=1e-9)
    assert not model.actor.optimizer.state and model.buffer_size == 1
    assert score["checkpoints"] == dict(first=20, last=40, number=2)
    _, returns, _ = np.loadtxt(out / "returns.csv", delimiter=",", skiprows=1).T
    assert score["score"]["mean"] == pytest.approx(returns.mean(), abs=1e-3)
    assert score["q_audit"]["steps"] == 50 * len(returns) == 150 and (out / "curve.png").exists()
    assert 0 < score["q_audit_learner"]["steps"] <= 100
    learner, expert = SimpleNamespace(act=lambda s: s), SimpleNamespace(predict=lambda s: -s)
    player = publish.HandOver(learner, expert, steps=2)
    assert [player.act(state, noise=9) for state in (1, 2, 3, 4)] == [1, 2, -3, -4]


def test_audit_compares_what_critics_say_with_what_came():
    def episode(q, rewards):
        return aggrevated.Trajectory(np.float32([q]).T, np.zeros((len(q), 1)), np.array(rewards))

    four = dict(evaluated=True, q_values=lambda s, a: torch.cat([s - 9, s, s + 1, s], dim=1))
    agent = SimpleNamespace(horizon=8, expert=SimpleNamespace(gamma=0.5, **four))
    price = partial(train_sac.reprice, fall_reward=-8.0)
    fall, goal = episode([9, 1, 2], [0, 4, -120]), episode([3, 5], [1, 6])
    cut_off = episode([1, 2, 3, 4, 5, 6, 7, 256], [0] * 7 + [-100])
    came = audit.what_came(agent, [(fall, 1), (goal, 0), (cut_off, 0)], price)
    np.testing.assert_allclose(came[2], [0, -8, 4, 6, 2, 4])  # the last two by Q* of the end
    worth = audit.audit(agent, came)
    assert worth["before_fall"] == {"0-5": {"steps": 2, "q": 1.5, "return": -4.0}}
    assert worth["elsewhere"] == {"steps": 4, "q": 2.75, "return": 4.0}
    assert (worth["steps"], worth["falls"]) == (6, 1)
    assert worth["bias"] == pytest.approx(14 / 6 - 8 / 6)
    assert worth["correlation"] == pytest.approx(np.corrcoef([1, 2, 3, 5, 1, 2], came[2])[0, 1])


def test_the_price_of_a_fall_replaces_ends_at_minus_100_or_less_only():
    reward, done, timeout = [-100, -120, -99, -100, -100], [1, 1, 1, 1, 0], [0, 0, 0, 1, 0]
    reward, done, timeout = np.array([reward, done, timeout])[:, np.arange(64) % 5]
    infos = [{"TimeLimit.truncated": x == 1, "terminal_observation": [7.0]} for x in timeout]
    state, still = np.zeros((64, 1)), SimpleNamespace(low=-1, high=1, predict=lambda s: 0 * s)
    env = SimpleNamespace(reset=lambda: state, step=lambda a: (state, reward, done > 0, infos))
    data = evaluate_critics.play(still, env, 128, 0)
    first = {k: x[1, :5].ravel().tolist() for k, x in data.items()}
    assert first["terminated"] == [1, 1, 1, 0, 0] and first["next_state"] == [7, 7, 7, 7, 0]
    falls = data["reward"], data["action"], data["fell"]
    paid = [train_sac.reprice(*falls, price)[1, :5].tolist() for price in (-25.0, None)]
    assert paid == [[-25, -25, -99, -100, -100], [-100, -120, -99, -100, -100]]


@mock.patch.multiple(evaluate_critics, LEARNING_RATE=3e-3, TARGET_RATE=0.05, EPISODES=30)
def test_evaluated_critics_know_what_comes_of_the_actor_as_it_is(tmp_path, monkeypatch):
    old, new = tmp_path / "old.zip", tmp_path / "folder" / "new.zip"
    kwargs = dict(net_arch=[32, 32], activation_fn=torch.nn.Tanh)
    model = SAC("MlpPolicy", Slope(), gamma=0.8, buffer_size=1, seed=0, policy_kwargs=kwargs)
    model.critic.optimizer.state["exp_avg"] = torch.ones(1)
    with mock.patch.object(torch.serialization, "location_tag", lambda _: "cuda:0"):  # a GPU's
        model.save(old)
    options = '--env_name=Slope-v0 --env_kwargs={"pull":1.6} --fall_reward=-2 --steps=2560'
    monkeypatch.setattr(sys, "argv", f"x {old} --out={new} {options} --updates=800".split())
    evaluate_critics.main()
    after = aggrevated.SACExpert(new, Slope.observation_space, Slope.action_space)
    x = np.linspace(-0.4, 0.8, 200, dtype=np.float32)[:, None]
    action = np.clip(after.predict(x) + np.resize(np.float32([0.3, 0, -0.3]), x.shape), 1, 3)
    env, came = Slope(pull=1.6), torch.zeros(len(x), 1)
    for i, (env.x, a) in enumerate(zip(x, action)):
        for t in range(50):  # this action, and then the expert's for ever
            following, reward, fell, *_ = env.step(a)
            came[i] += 0.8**t * max(reward, -2)
            if fell:
                break
            a = after.predict(following)
    x, action = torch.from_numpy(x), torch.from_numpy(action)
    wrong = ((said := after.q_values(x, action)) - came).abs().mean(dim=0)
    assert (wrong[2:] < 0.25).all() and (wrong[:2] > 1).all() and came.std() > 1
    theirs, weights = SAC.load(new, device="cpu"), aggrevated.read_sac_zip(old)[0]
    assert all(torch.equal(theirs.policy.state_dict()[k], w) for k, w in weights.items())
    for critic in (theirs.critic, theirs.critic_target):  # SB3's, of actions in [-1, 1]
        torch.testing.assert_close(torch.cat(critic(x, action - 2), dim=1), said)
    worth = json.loads(new.with_suffix(".json").read_text())
    assert theirs.critics_evaluated == worth["settings"] and after.evaluated and after.gamma == 0.8
    assert abs(worth["after"]["bias"]) < 0.1 < worth["before"]["bias"] < worth["after"]["falls"]


@pytest.mark.parametrize("path", ZIPS, ids=lambda path: path.parent.name)
def test_shipped_experts_are_what_their_scores_say_and_load_both_ways(path):
    theirs = SAC.load(path, device="cpu")
    ours = aggrevated.SACExpert(path, theirs.observation_space, theirs.action_space)
    if ours.evaluated:
        card = json.loads(path.with_suffix(".json").read_text())
        assert card["settings"] == theirs.critics_evaluated
    else:
        score = json.loads(path.with_name("score.json").read_text())
        cards, mean = (ROOT / "rl-trained-agents/README.md").read_text(), score["score"]["mean"]
        line = f"| {path.parent.name} | {mean:.1f} ± {score['score']['standard_error']:.1f} |"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == score["sha256"]
        assert line in cards and score["sha256"][:16] in cards
