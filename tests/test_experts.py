"""What train_sac.py adds to SAC, what publish.py makes of a run, and the shipped experts."""

import hashlib
import json
import pickle
import runpy
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import NStepReplayBuffer

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "rl-trained-agents")]
import aggrevated
import publish
import train_sac

CARDS = sorted((ROOT / "rl-trained-agents" / "sac").glob("*/score.json"))
ROWS, N_ENVS, WINDOW, ENDS = 40, 3, 6, ("fall", "goal", "timeout")


def fill(n_rows, share=0.4, n_steps=3, ends=ENDS, cut_at=None, cut_end=""):
    """Our and SB3's buffer with the same steps, and the ends; `cut_at` is a time limit in SB3's."""
    spaces = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,))
    how = dict(device="cpu", n_envs=N_ENVS, n_steps=n_steps, gamma=0.9)
    special = dict(failure_share=share, failure_window=WINDOW)
    ours = train_sac.FailureReplayBuffer(ROWS * N_ENVS, *spaces, **how, **special)
    theirs = NStepReplayBuffer(ROWS * N_ENVS, *spaces, **how)
    rng, log = np.random.default_rng(0), []
    for row in range(n_rows):
        end = rng.choice(["", *ends], size=N_ENVS, p=[0.9] + [0.1 / len(ends)] * len(ends))
        end = np.array([cut_end, "", ""]) if row == cut_at else end
        arrays = *rng.normal(size=(2, N_ENVS, 2)), rng.normal(size=(N_ENVS, 1)), rng.normal(size=3)
        arrays[3][end == "fall"] = -100
        infos = [{"TimeLimit.truncated": x == "timeout"} for x in end]
        ours.add(*arrays, end != "", infos)
        if row == cut_at:
            ours.cut_episodes()
            infos = [{"TimeLimit.truncated": x in ("", "timeout")} for x in end]
            end = np.where(end == "", "timeout", end)
        theirs.add(*arrays, end != "", infos)
        log.append(end)
    return ours, theirs, np.array(log)


def before_falls(log):
    """The places (row, environment) that count, from the log alone."""
    places = []
    for env, ends in enumerate(log.T):
        start = 0
        for row in np.flatnonzero(ends != ""):
            first = max(start, row - WINDOW + 1)
            if ends[row] == "fall" and first >= len(log) - ROWS:
                places += [(r % ROWS, env) for r in range(first, row + 1)]
            start = row + 1
    return places


def draws(buffer):
    """The places that `sample` draws, (30 batches, 500, 2)."""
    buffer.gather = lambda rows, columns: np.stack([rows, columns], axis=1)
    np.random.seed(0)
    return np.array([buffer.sample(500) for _ in range(30)])


def assert_uniform(drawn, places):
    """Only these places, and by chi-square all alike."""
    kinds, counts = np.unique(drawn.reshape(-1, 2), axis=0, return_counts=True)
    assert {tuple(kind) for kind in kinds} == set(places)
    mean, freedom = counts.mean(), len(counts) - 1
    assert ((counts - mean) ** 2 / mean).sum() < freedom + 4 * (2 * freedom) ** 0.5


def assert_same_samples(ours, theirs, monkeypatch):
    rows, columns = np.transpose([*np.ndindex(ours.size(), N_ENVS)])
    sample = ours.gather(rows, columns)
    monkeypatch.setattr(np.random, "randint", lambda *args, **kwargs: columns)
    reference = theirs._get_samples(rows)
    for name, got, expected in zip(reference._fields, sample, reference):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("n_steps", [1, 3, 5])
@pytest.mark.parametrize("n_rows", [25, 40, 95])  # part filled, just full, wrapped
def test_n_step_samples_are_sb3s(n_rows, n_steps, monkeypatch):
    ours, theirs, log = fill(n_rows, n_steps=n_steps)
    assert set(log.ravel()) == {"", *ENDS}
    assert_same_samples(ours, theirs, monkeypatch)


@pytest.mark.parametrize("n_rows", [25, 40, 41, 113, 320])  # windows' first rows are at the seam
def test_a_share_of_each_batch_is_uniform_over_the_steps_before_falls(n_rows):
    ours, _, log = fill(n_rows)
    drawn, places = draws(ours), before_falls(log)
    assert_uniform(drawn[:, 300:], places)  # 0.4 of every batch
    assert_uniform(drawn[:, :300], np.ndindex(ours.size(), N_ENVS))
    assert not {tuple(place) for place in drawn[:, 299]} <= set(places)  # and no more


@pytest.mark.parametrize("how", [dict(share=0.0), dict(ends=("goal", "timeout"))])
def test_without_share_or_falls_all_draws_are_uniform(how):
    assert_uniform(draws(ours := fill(95, **how)[0]), np.ndindex(ours.size(), N_ENVS))


@pytest.mark.parametrize("kind", ["", "timeout", "fall"])
@pytest.mark.parametrize("n_rows, cut_at", [(76, 75), (80, 79), (95, 75), (95, 79)])  # 80: a seam
def test_cut_episodes_is_a_time_limit(n_rows, cut_at, kind, monkeypatch):
    ours, theirs, log = fill(n_rows, cut_at=cut_at, cut_end=kind)
    assert_same_samples(ours, theirs, monkeypatch)
    monkeypatch.undo()
    assert_uniform(draws(ours)[:, 300:], before_falls(log))


@pytest.mark.parametrize("cost, extra", [(1.0, 0.0), (3.0, 2 * 0.028 * 1.5)])
def test_only_a_fall_pays_the_fall_reward_and_all_else_pays_for_torque(cost, extra):
    spaces = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (2,))
    special = dict(n_envs=4, failure_share=0.4, failure_window=WINDOW)
    buffer = train_sac.FailureReplayBuffer(8, *spaces, device="cpu", **special)
    buffer.prices = -10.0, cost
    rewards, done = np.float32([-100, -100, -99, -100]), np.array([0, 1, 1, 1])
    infos = [{"TimeLimit.truncated": env == 1} for env in range(4)]
    state, action = np.zeros((4, 2)), np.float32([[-1.0, 0.5]] * 4)
    for _ in range(2):
        buffer.add(state, state, action, rewards, done, infos)
    expected = [-100 - extra, -100 - extra, -99 - extra, -10]
    np.testing.assert_allclose(buffer.rewards, [expected] * 2, rtol=1e-6)
    assert buffer.falls[:, :2].tolist() == [[0, 3], [1, 3]]


def test_torque_costs_what_the_environment_charges():
    env = aggrevated.make_env("BipedalWalker-v3")
    env.reset(seed=0)
    action = np.array([0.5, -1.0, 0.2, 0.0], dtype=np.float32)
    shaping = env.unwrapped.prev_shaping
    plain = env.step(action)[1]
    charged = env.unwrapped.prev_shaping - shaping - plain  # what is left is the torque's price
    dear = train_sac.reprice(plain, action, False, -10.0, 3.0)
    assert plain - dear == pytest.approx(2 * charged, rel=1e-4) and charged > 0


@pytest.mark.parametrize("n_rows", [60, 95])
def test_prices_hold_for_what_is_stored_and_what_comes(n_rows):
    ours, theirs, _ = fill(n_rows)
    ours.prices = -10.0, 3.0
    ours.price()
    for buffer in (ours, theirs):
        buffer.add(
            np.ones((3, 2)), np.ones((3, 2)), np.ones((3, 1)), np.ones(3), np.zeros(3), [{}] * 3
        )
    expected = np.where(theirs.rewards == -100, -10, theirs.rewards)
    expected -= (theirs.rewards != -100) * 2 * 0.028 * np.abs(theirs.actions[..., 0])
    np.testing.assert_allclose(ours.rewards, expected, rtol=1e-5, atol=1e-6)
    assert (theirs.rewards == -100).any()


class OneStep(gym.Env):
    """Episodes of one step, which falls if the action says so."""

    def reset(self, *, seed=None, options=None):
        return np.zeros(1), {}

    def step(self, action):
        return np.zeros(1), -100.0 if action else 0.0, True, False, {}


def test_a_terrain_is_tried_again_after_a_fall():
    def play(n, fall):
        terrains = []
        for _ in range(n):
            env.reset(seed=None if terrains else seeds.pop())
            env.step(fall)
            terrains.append(env.terrain)
        return terrains

    env, seeds = train_sac.Retry(OneStep()), [3, 2, 1, 0]
    assert len(set(play(50, fall=True))) == 50  # before the late part no terrain comes again
    env.retries = 3
    (fallen,) = play(1, fall=True)
    after = play(50, fall=False)
    assert after.count(fallen) == 3 and len(set(after)) == 50 - 3 + 1
    assert max(after.index(fallen), 50 - after[::-1].index(fallen)) > 3  # fresh ones between them
    assert 20 < len(set(play(100, fall=True))) < 80 and len(env.failed) == 50


def test_the_monitor_records_the_true_return():
    env_name, rewards, done = "BipedalWalker-v3", [], False
    env = train_sac.build(env_name, train_sac.Settings(n_envs=8, buffer_size=800), seed=0).get_env()
    env.reset()
    while not done:
        _, (reward, *_), (done, *_), (info, *_) = env.step(np.full((8, 4), -1.0))
        rewards.append(reward)
    assert reward == -100 and info["episode"]["r"] == pytest.approx(sum(rewards), abs=1e-3)


OPTIONS = (
    "--env_name Pendulum-v1 --learning_starts 210 --batch_size 16 --updates 40 --n_envs 1 "
    "--gradient_steps 1 --units 16 --n_steps 1 --buffer_size 1000"
).split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{checkpoint_every: (folder, weights after each update)} of the same 40 updates."""
    result, train = {}, SAC.train
    for every in (20, 40):
        folder, weights = tmp_path_factory.mktemp("run") / "Pendulum-v1_s0", []

        def recorded(self, *args, weights=weights, **kwargs):
            train(self, *args, **kwargs)
            weights.append({k: v.clone() for k, v in self.policy.state_dict().items()})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SAC, "train", recorded)
            how = f"--checkpoint_every={every}", f"--run_dir={folder}"
            patch.setattr(sys, "argv", ["", *OPTIONS, *how])
            train_sac.main()
        result[every] = folder, weights
    return result


def mean(states):
    return {k: torch.stack([s[k].double() for s in states]).mean(0).float() for k in states[0]}


@pytest.mark.parametrize("every, at, first", [(20, 20, 0), (20, 40, 20), (40, 40, 0)])
def test_checkpoints_hold_the_mean_since_the_one_before(runs, every, at, first):
    folder, weights = runs[every]
    state = torch.load(folder / f"{at:07d}.pt")
    torch.testing.assert_close(state["average"], mean(weights[first:at]), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(state["last"], weights[at - 1], rtol=0, atol=0)


def test_evaluating_does_not_disturb_training(runs):
    torch.testing.assert_close(runs[20][1][-1], runs[40][1][-1], rtol=0, atol=0)


def test_resuming_after_a_kill_goes_on_to_the_end(tmp_path, monkeypatch):
    folder, script = tmp_path / "run", str(ROOT / "rl-trained-agents" / "train_sac.py")
    options = [script, *OPTIONS, "--checkpoint_every=20", f"--run_dir={folder}", "--updates=9999"]
    with subprocess.Popen([sys.executable, *options], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (folder / "resume.pkl").exists():
            time.sleep(0.01)
        process.kill()
    updates = 20 * len((folder / "evaluations.csv").read_text().splitlines())  # one more
    monkeypatch.setattr(sys, "argv", [*options, f"--updates={updates}", "--resume"])
    runpy.run_path(script, run_name="__main__")
    log = np.genfromtxt(folder / "evaluations.csv", delimiter=",", names=True)
    assert log["updates"].tolist() == list(range(20, updates + 1, 20))
    assert set(np.diff(log["env_steps"])) <= {20, 21} and (np.diff(log["minutes"]) >= 0).all()


def test_late_in_the_run_the_prices_change_in_all_that_is_stored(tmp_path, monkeypatch):
    late = "--torque_updates=20", "--torque_cost=3", "--late_updates=30"
    updates = "--updates=40", "--checkpoint_every=20"
    monkeypatch.setattr(sys, "argv", ["", *OPTIONS, *late, *updates, f"--run_dir={tmp_path / 'r'}"])
    train_sac.main()
    buffer = pickle.loads((tmp_path / "r" / "resume.pkl").read_bytes())["buffer"]
    extra = buffer.unpriced - buffer.rewards
    np.testing.assert_allclose(extra, 2 * 0.028 * np.abs(buffer.actions).sum(axis=2), atol=1e-5)
    assert extra.max() > 0.01 and buffer.prices == (-40.0, 3.0)
    stage = train_sac.Settings(torque_updates=20, late_updates=30).stage
    assert [stage(n) for n in (19, 20)] == [(-10.0, 1.0, 0), (-10.0, 4.0, 0)]
    assert [stage(n) for n in (29, 30)] == [(-10.0, 4.0, 0), (-40.0, 4.0, 3)]


def test_publish_averages_the_checkpoints_and_scores_the_zip(runs, tmp_path, monkeypatch):
    options = "--n=1 --episodes=3 --learner_episodes=0".split()
    monkeypatch.setattr(sys, "argv", ["", str(runs[20][0]), f"--out={tmp_path}", *options])
    publish.main()
    out = tmp_path / "Pendulum-v1_1"
    model, score = SAC.load(out / "Pendulum-v1.zip"), json.loads((out / "score.json").read_text())
    expected = mean([torch.load(path)["average"] for path in runs[20][0].glob("*.pt")])
    torch.testing.assert_close(dict(model.policy.state_dict()), expected, rtol=0, atol=1e-9)
    assert not model.actor.optimizer.state and model.buffer_size == 1
    assert model.predict(np.zeros(3, dtype=np.float32))[0].shape == (1,)
    assert score["checkpoints"] == dict(first=20, last=40, number=2)
    _, returns, _ = np.loadtxt(out / "returns.csv", delimiter=",", skiprows=1).T
    assert score["score"]["mean"] == pytest.approx(returns.mean(), abs=1e-3)
    assert score["q_audit"]["steps"] == 50 * len(returns) == 150 and (out / "curve.png").exists()


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_shipped_experts_are_what_their_scores_say_and_load_both_ways(path):
    score = json.loads(path.read_text())
    zip_path = path.with_name(f"{score['env_name']}.zip")
    assert hashlib.sha256(zip_path.read_bytes()).hexdigest() == score["sha256"]
    theirs = SAC.load(zip_path, device="cpu")
    ours = aggrevated.SACExpert(zip_path, theirs.observation_space, theirs.action_space)
    states = torch.randn(50, *theirs.observation_space.shape)
    action, _ = theirs.predict(states.numpy(), deterministic=True)
    np.testing.assert_allclose(ours.predict(states.numpy()), action, rtol=1e-4, atol=1e-5)
    scaled = torch.from_numpy(theirs.policy.scale_action(action))
    q = torch.cat(theirs.critic(states, scaled), dim=1).min(dim=1, keepdim=True).values
    torch.testing.assert_close(ours.q_star(states, torch.from_numpy(action)), q)
