"""Roll-ins, data, updates and evaluation: what the algorithm does."""

import pickle
from collections import defaultdict
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import checkpoint, equal, make_sac
from torch.nn.utils import parameters_to_vector

import aggrevated
from aggrevated import ALGORITHMS, ROLL_IN, TEST, Config, NumpyPolicy, SACExpert, play_episode

TINY = "tiny_envs:Tiny-v0"


def streams(n, iteration=1):
    return [(ROLL_IN, 0, iteration, k) for k in range(n)]


@pytest.fixture
def train(make_agent, tmp_path_factory, monkeypatch):
    """train(agent or **changes): an agent after its run, with the learner's curves."""

    def run(agent=None, **changes):
        agent, writers = agent or make_agent(**changes), [Mock(), Mock()]
        monkeypatch.setattr(aggrevated, "SummaryWriter", Mock(side_effect=writers))
        agent.log, agent.run_dir = defaultdict(list), tmp_path_factory.mktemp("run")
        agent.train(agent.run_dir)
        for tag, value, _ in (call.args for call in writers[0].add_scalar.call_args_list):
            agent.log[tag].append(float(value))
        return agent

    return run


class Player:
    """As an expert it acts by an episode's random number, as a learner by its negative."""

    def predict(self, state):
        return state[2:]

    def act(self, state, noise):
        return np.float32(noise) - state[2:]


def play(n, alpha, noise_scale=1.0, horizon=5, env=TINY):
    players, c = pickle.dumps((Player(), Player())), Config(env_name=env)
    return [play_episode(players, c, alpha, noise_scale, horizon, s) for s in streams(n)]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_expert_acts_with_probability_alpha_anew_at_every_step(alpha):
    trajectories = play(300, alpha, noise_scale=0.0)
    assert all((np.abs(t.actions) == t.states[:, 2:]).all() for t in trajectories)
    turns = [t.actions[:, 0] > 0 for t in trajectories]
    n = sum(map(len, turns))
    tolerance = 4 * (alpha * (1 - alpha) / n) ** 0.5
    switches = np.concatenate([x[1:] != x[:-1] for x in turns])
    assert n > 1000 and abs(np.concatenate(turns).mean() - alpha) <= tolerance
    assert abs(switches.mean() - 2 * alpha * (1 - alpha)) <= 2 * tolerance


def test_noise_of_the_learner_is_standard_normal_times_its_scale():
    trajectories = play(300, 0.0, 0.5, env="tiny_envs:Lopsided-v0")
    z = np.concatenate([(t.actions + t.states[:, 2:]) / 0.5 for t in trajectories])
    assert (abs(z.mean(axis=0)) < 4 / len(z) ** 0.5).all() and len(np.unique(z)) == z.size
    np.testing.assert_allclose(np.cov(z.T), np.eye(2), atol=0.15)  # of two dimensions


@pytest.mark.parametrize("env", [TINY, "tiny_envs:Double-v0"])
@pytest.mark.parametrize("horizon", [2, 4, 50])
def test_episodes_end_where_environment_or_horizon_say_and_nothing_is_made_up(horizon, env):
    trajectories = play(12, 0.5, 1.0, horizon, env)
    assert {int(t.states[0, 1]) for t in trajectories} == {3, 9}
    for t in trajectories:
        steps = min(int(t.states[0, 1]), 5, horizon)  # terminated, truncated, cut
        np.testing.assert_array_equal(t.states[:, 0], np.arange(steps))
        np.testing.assert_array_equal(t.rewards, 1 + np.arange(steps))
        assert t.actions.shape == (steps, 1) and len(set(t.states[:, 2])) == 1
        assert t.states.dtype == t.actions.dtype == np.float32
    assert len({t.states[0, 2] for t in trajectories}) == 12


def test_iteration_has_its_sizes_and_streams_and_the_first_standardises(make_agent, train):
    agent, calls = make_agent(K=3, H=7, seed=5, roll_in_noise=0.4), []
    play = agent.play
    agent.play = lambda *x: calls.append(x) or play(*x)
    state = train(agent).data["state"]
    roll_ins = [x for x in calls if x[0][0][0] == ROLL_IN]
    expected = [[(ROLL_IN, 5, n, k) for k in range(3)] for n in (1, 2)]
    assert roll_ins == [(expected[0], 1.0, 0.4, 7), (expected[1], 0.5, 0.4, 7)]
    assert len(state) == agent.env_steps == 42
    torch.testing.assert_close(agent.policy.state_mean, state[:21].mean(dim=0))
    torch.testing.assert_close(agent.policy.state_std, state[:21].std(dim=0, correction=0))


@pytest.mark.parametrize("evaluated", [True, False])
def test_labels_are_of_all_visited_states_and_what_expert_and_critics_say(make_agent, evaluated):
    agent = make_agent()
    agent.expert.evaluated = evaluated
    trajectories = agent.play(streams(2), 0.5, 1.0, 40)
    state, a_star, v_star = map(agent.label(trajectories).get, ("state", "a_star", "v_star"))
    visited = np.concatenate([t.states for t in trajectories])
    np.testing.assert_array_equal(state, visited)
    assert np.array_equal(a_star, agent.expert.predict(visited)) != evaluated
    torch.testing.assert_close(v_star, agent.expert.q_values(state, a_star))


def test_the_newest_data_of_all_iterations_are_what_updates_draw_from(train, make_agent):
    agent, labels, sizes = make_agent(max_experience_len=200, max_iteration=3), [], []
    label, update = agent.label, agent.update
    agent.label = lambda x: labels.append(label(x)) or labels[-1]
    agent.update = lambda lr: sizes.append(len(agent.data["state"])) or update(lr)
    for name, data in train(agent).data.items():
        assert torch.equal(data, torch.cat([x[name] for x in labels])[-200:])
    assert sizes == [80, 160, 200]


@pytest.fixture
def steps(monkeypatch):
    """What the optimizers' steps had: step size, gradient, and whether the optimizer was new."""
    steps, step = [], torch.optim.Adam.step

    def record(self, *args):
        (g,) = self.param_groups
        steps.append((g["lr"], parameters_to_vector(p.grad for p in g["params"]), not self.state))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", record)
    return steps


ALPHAS = dict(aggrevated=[3, 2, 1, 0, 0], bc=5 * [3])  # thirds


@pytest.mark.parametrize("algorithm, alphas", ALPHAS.items())
def test_step_size_and_alpha_fall_linearly(train, steps, algorithm, alphas):
    how = dict(lr=0.02, update_sz=35, train_repeat=2)  # minibatches of 32, 32, 6
    log = train(algorithm=algorithm, max_iteration=5, alpha_decay_iterations=3, **how).log
    np.testing.assert_allclose(log["train/alpha"], np.array(alphas) / 3)
    expected = [0.02 * (n / 5) * (k / 3) for n in (5, 4, 3, 2, 1) for k in (3, 2, 1)]
    np.testing.assert_allclose([lr for lr, _, _ in steps], expected)
    assert [new for _, _, new in steps] == 5 * [True, False, False]


@pytest.mark.parametrize("factor", [1e-3, 1e6])
def test_a_step_is_along_the_gradient_of_its_minibatch_cut_to_10(make_agent, steps, factor):
    agent, drawn = make_agent(algorithm="dagger"), torch.randint(80, (70,))
    agent.data = agent.label(agent.play(streams(2), 0.5, 1.0, 40))
    loss, agent.draw, parameters = agent.loss, lambda: drawn, list(agent.policy.parameters())
    agent.loss = lambda **data: factor * loss(**data)
    mean = agent.update(0.0)  # so that nothing moves
    losses = [agent.loss(**{k: x[i] for k, x in agent.data.items()}) for i in drawn.split(32)]
    assert mean == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    for expected, (_, own, _) in zip(losses, steps, strict=True):
        expected = parameters_to_vector(torch.autograd.grad(expected, parameters))
        expected *= min(1, 10 / expected.norm())
        assert (own - expected).norm() < 1e-3 * expected.norm()


class Known(SACExpert):
    """The expert of `Guess`: its action is the best one, and Q* is exact."""

    low, high, layers, evaluated = np.float32([-2]), np.float32([2]), ["none"], False
    __init__ = object.__init__  # no file

    def predict(self, state):
        return np.float32(1.5 * state[..., :1])

    def q_values(self, state, action):
        return -((action - 1.5 * state[:, :1]) ** 2)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_climbs_q_star(train, make_agent, algorithm):
    # of its own noisy roll-ins alone: to repeat them is no progress, Q* says what is
    agent = make_agent(
        env_name="tiny_envs:Guess-v0", algorithm=algorithm, bc_weight=0, seed=1, K=60,
        max_iteration=3, roll_in_noise=2, update_sz=300, train_repeat=2, hidden_dim=32, lr=3e-3,
        eval_episodes=8,
    )  # fmt: skip
    play, agent.expert = agent.play, Known()
    agent.play = lambda streams, alpha, *how: play(streams, 0.0, *how)
    log = train(agent).log
    assert 0.5 < log["train/q_gap"][0] < 2  # of the mean action, before it has learned anything
    assert 0 < log["train/q_gap"][-1] < 0.2 * log["train/q_gap"][0]
    assert -1 < log["eval/episode_reward"][-1] < 0  # five steps; untrained, -4


def test_learner_comes_near_the_expert_on_pendulum(train, make_agent):
    agent = make_agent(  # the shipped expert is a task's default
        expert_path="", K=5, H=200, max_iteration=2, eval_episodes=8, lr=8e-3, hidden_dim=64,
        batch_sz=64, train_repeat=8, update_sz=2000,
    )  # fmt: skip
    untrained = agent.evaluate("learner").mean()
    expert, *_, learner = [np.mean(e["returns"]) for e in train(agent).evaluations]
    assert learner > max(expert - 30, untrained + 600)


def test_a_run_is_a_function_of_its_seed_however_often_evaluated(train, make_agent):
    runs, drawn = [], []
    for seed, every, episodes in (3, 1, 3), (3, 9, 2), (4, 9, 2):
        agent = make_agent(seed=seed, eval_every=every, eval_episodes=episodes, max_iteration=5)
        torch.manual_seed(len(runs))  # whatever others drew
        agent.expert.evaluated, update = True, agent.update
        agent.update = lambda lr, f=update: drawn.append(torch.rand(1).item()) or f(lr)
        runs.append(train(agent))
    first, again, other = runs
    assert [len(x.evaluations) for x in runs] == [6, 5, 5]
    assert equal(first.policy.state_dict(), again.policy.state_dict())
    assert equal(first.data, again.data) and not equal(first.data, other.data)
    assert drawn[:5] == drawn[5:10] and len(set(drawn)) == 10  # an update of one's own each


def test_first_weights_depend_on_the_seed_alone(make_agent, tmp_path):
    make_sac(path := str(tmp_path / "other.zip"), net_arch=[8], n_critics=3)
    changes = {}, dict(expert_path=path), dict(seed=1)
    first, same, other = [make_agent(**x).policy.state_dict() for x in changes]
    assert equal(first, same) and not torch.equal(first["fc1.weight"], other["fc1.weight"])


def test_evaluations_are_of_the_mean_action_to_the_end_on_terrains_of_their_own(train, make_agent):
    agent, played = make_agent(eval_episodes=3, H=7), []
    play = agent.play
    agent.play = lambda *x: played.append(play(*x)) or played[-1]
    policy = NumpyPolicy(train(agent).policy.state_dict())
    returns = [agent.evaluate(*x) for x in (["learner"], ["expert"], ["learner", TEST])]
    starts = [[tuple(t.states[0]) for t in episodes] for episodes in played]
    # the expert, a roll-in and an evaluation in each of two iterations, and these three
    assert starts[0] == starts[2] == starts[4] == starts[5] == starts[6]
    assert len({start for x in (0, 1, 3, 7) for start in starts[x]}) == 3 + 2 + 2 + 3
    acts = policy.act, agent.expert.predict, policy.act
    for act, episodes, own in zip(acts, played[5:], returns, strict=True):
        for t, total in zip(episodes, own, strict=True):
            assert len(t.rewards) == 200 and total == t.rewards.sum()  # the environment's own limit
            np.testing.assert_allclose(t.actions, act(t.states), atol=1e-5)


def test_rewards_are_recorded_and_logged_as_sums(train):
    agent = train(env_name=TINY, K=7, max_iteration=7, eval_every=5, eval_episodes=9)
    pay = agent.evaluate("learner").tolist()  # whoever plays
    assert set(pay) == {6, 15} and [e["returns"] for e in agent.evaluations] == 6 * [pay]
    assert agent.log["eval/episode_reward"] == 5 * [pytest.approx(np.mean(pay))]
    steps = np.diff([0, *agent.log["time/env_steps"]])
    long = (steps - 7 * 3) / 2  # trajectories of 5 steps, which pay 15; those of 3 pay 6
    np.testing.assert_allclose(agent.log["rollout/episode_reward"], (6 * 7 + 9 * long) / 7)


def test_best_policy_has_the_highest_mean_and_is_the_latest_of_equals(train, make_agent):
    scores = iter([[9, 9], [-3, -3], [0, -2], [-1, -1], [1.5, -4]])  # the expert's first
    agent, weights = make_agent(max_iteration=4), {}

    def evaluate(who):
        weights[agent.iteration] = {k: x.clone() for k, x in agent.policy.state_dict().items()}
        return np.array(next(scores))

    agent.evaluate = evaluate
    best = checkpoint(train(agent).run_dir / "best.pt")
    assert best["iteration"] == agent.best["iteration"] == 3 and equal(best["policy"], weights[3])
    assert agent.best["mean"] == -1 and checkpoint(agent.run_dir / "last.pt")["iteration"] == 4
