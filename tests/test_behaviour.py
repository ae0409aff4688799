"""Roll-ins, data, updates and evaluation: what the algorithm does."""

import pickle
from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import checkpoint, equal
from torch.nn.utils import parameters_to_vector

import aggrevated
from aggrevated import FAMILY, ROLL_IN, NumpyPolicy, roll_in

TINY = "tiny_envs:Tiny-v0"
HIGH, SHORT = np.array([0.0, 10, 20, 30]), np.zeros(1)  # terrains differ more than iterates
ON_POLICY = {"score", "minmax"}
IMITATED = [0, 1.98, -1.98, 1]  # 99 % of the range
each_member = pytest.mark.parametrize("algorithm", FAMILY)


def streams(n, iteration=1):
    return [(ROLL_IN, 0, iteration, k) for k in range(n)]


@pytest.fixture
def train(make_agent, tmp_path_factory, monkeypatch):
    """train(agent or **changes): an agent after its run, with the learner's curves."""

    def run(agent=None, **changes):
        agent, writer = agent or make_agent(**changes), Mock()
        monkeypatch.setattr(aggrevated, "open_logs", lambda *_: (writer, Mock()))
        agent.log, agent.run_dir = defaultdict(list), tmp_path_factory.mktemp("run")
        agent.train(agent.run_dir)
        for tag, value, _ in (call.args for call in writer.add_scalar.call_args_list):
            agent.log[tag].append(float(value))
        return agent

    return run


@each_member
def test_alpha_falls_linearly_from_1_to_0(train, algorithm):
    how = dict(alpha_decay_iterations=4, max_iteration=7, eval_every=7, K=1, H=5)
    expected = dict(bc=7 * [1]).get(algorithm, [1, 0.75, 0.5, 0.25, 0, 0, 0])
    assert train(algorithm=algorithm, **how).log["train/alpha"] == expected


class Player:
    """As an expert it acts by an episode's random number, as a learner by its negative."""

    low = np.zeros(1)

    def predict(self, state):
        return state[2:]

    def act(self, state, noise):
        return np.float32(noise) - state[2:]


def play(n, alpha, noise_scale=1.0, horizon=5, env=TINY):
    players = pickle.dumps((Player(), Player()))
    return [roll_in(players, env, {}, alpha, noise_scale, horizon, s) for s in streams(n)]


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
    z = np.concatenate([(t.actions + t.states[:, 2:]) / 0.5 for t in play(300, 0.0, 0.5)])[:, 0]
    assert abs(z.mean()) < 4 / len(z) ** 0.5 and z.std() == pytest.approx(1, abs=0.1)
    assert len(set(z)) == len(z)  # drawn anew at every step


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


def test_workers_return_the_trajectories_in_the_order_of_their_streams(make_agent):
    agents = [make_agent(env_name=TINY, n_workers=n) for n in (2, 1)]
    for a, b in zip(*(x.simulate(streams(7), 0.5, 1.0, 50) for x in agents), strict=True):
        assert all(map(np.array_equal, vars(a).values(), vars(b).values()))


def test_iteration_has_its_sizes_and_streams_and_the_first_standardises(make_agent, train):
    agent, calls = make_agent(K=3, H=7, seed=5, roll_in_noise=0.4), []
    simulate = agent.simulate
    agent.simulate = lambda *x: calls.append(x) or simulate(*x)
    state = train(agent).experience["state"]
    roll_ins = [x for x in calls if x[0][0][0] == ROLL_IN]
    expected = [[(ROLL_IN, 5, n, k) for k in range(3)] for n in (1, 2)]
    assert roll_ins == [(expected[0], 1.0, 0.4, 7), (expected[1], 0.5, 0.4, 7)]
    assert len(state) == agent.env_steps == 42
    torch.testing.assert_close(agent.policy.state_mean, state[:21].mean(dim=0))
    torch.testing.assert_close(agent.policy.state_std, state[:21].std(dim=0, correction=0))


@pytest.fixture
def labelled(make_agent):
    """labelled(**changes): an agent with the data of its first iteration; 80 transitions."""

    def make(**changes):
        agent = make_agent(**changes)
        agent.expert.evaluated = "so"
        agent.trajectories = agent.simulate(streams(2), 0.5, 1.0, 40)
        agent.keep(agent.label(agent.trajectories))
        return agent

    return make


def lesson(agent):
    """(states, targets, weights) of what the agent has."""
    return FAMILY[agent.config.algorithm].targets_and_weights(agent, agent.experience)


@each_member
def test_labels_are_what_expert_and_critics_say_and_the_newest_are_kept(labelled, algorithm):
    agent = labelled(algorithm=algorithm, candidates=8, max_experience_len=100)
    e, expert = agent.experience, agent.expert
    states, actions, _ = zip(*(vars(t).values() for t in agent.trajectories))
    np.testing.assert_array_equal(e["state"], np.concatenate(states))
    np.testing.assert_array_equal(e["action"], np.concatenate(actions))
    own = torch.from_numpy(expert.predict(np.concatenate(states)))
    assert torch.allclose(e["target"], own, atol=1e-6) == (algorithm != "aggrevated")
    torch.testing.assert_close(e["q_target"], expert.q_star(e["state"], e["target"]))
    new = agent.label(agent.simulate(streams(2, iteration=2), 0.0, 1.0, 40))
    agent.keep(new)
    for name, kept in agent.experience.items():
        old = e[name][-20:] if algorithm not in ON_POLICY else e[name][:0]
        assert torch.equal(kept, torch.cat([old, new[name]]))


class Known:
    """The expert of `Guess`: its action is the best one, and Q* is exact."""

    low, high, gamma, evaluated = np.float32([-2]), np.float32([2]), 0.0, None

    def predict(self, state):
        return np.float32(1.5 * state[..., :1])

    def q_star(self, state, action):
        return -((action - 1.5 * state[:, :1]) ** 2)


@pytest.mark.parametrize("algorithm, targets, weights", [
    ("bc", IMITATED, [1, 1, 1, 1]),
    ("dagger", IMITATED, [1, 1, 1, 1]),
    ("aggrevate", IMITATED, [3.5, 3.5, 1, 1 + 2 / 2.25]),  # 1 + 2 * 4 / 2.25 is cut
    ("aggrevated", IMITATED, [1, 3.5, 3.5, 1 + 2 / 2.25]),
    ("minmax", [1.98, 0, -1.98, 0], [0, 0, 1, 0.75]),
])  # fmt: skip
def test_targets_and_weights_by_hand(make_agent, algorithm, targets, weights):
    agent = make_agent(algorithm=algorithm, gap_factor=2, gap_cut=3.5)
    agent.expert = Known()
    best, done = torch.tensor([[0, 2, -2, 1.0], [2, 0, -2, 0]])[..., None]
    agent.policy.predict = lambda state: 0 * state[:, :1]  # which loses 0, 4, 4, 1 by Q*
    agent.experience = dict(state=best / 1.5, action=done, target=best)
    agent.experience["q_target"] = 0 * best  # what was done lost 4, 4, 0, 1
    state, target, weight = lesson(agent)
    assert torch.equal(state, best / 1.5) and weight.shape == (4, 1)
    np.testing.assert_allclose(target[:, 0], targets, rtol=1e-5)
    np.testing.assert_allclose(weight[:, 0], weights, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "natural"])
@each_member
def test_every_member_climbs_q_star(train, make_agent, algorithm, optimizer):
    # of its own noisy roll-ins alone: to repeat them is no progress, Q* says what is
    agent = make_agent(
        env_name="tiny_envs:Guess-v0", algorithm=algorithm, optimizer=optimizer, seed=1, K=60,
        max_iteration=5, roll_in_noise=2, update_sz=300, train_repeat=2, hidden_dim=32, lr=3e-3,
        kl_step=0.1, eval_episodes=8, eval_every=5,
    )  # fmt: skip
    simulate, agent.expert = agent.simulate, Known()
    agent.simulate = lambda streams, alpha, *how: simulate(streams, 0.0, *how)
    log = train(agent).log
    assert 0.5 < log["train/q_gap"][0] < 2  # of the mean action, before it has learned anything
    assert 0 < log["train/q_gap"][-1] < 0.35 * log["train/q_gap"][0]
    assert -2 < log["eval/episode_reward"][-1] < 0  # five steps; untrained, -4
    assert bool(agent.optimizer.state) == (optimizer == "adam")  # natural steps leave it alone


@pytest.mark.parametrize("algorithm", ["dagger", "minmax"])
def test_passes_are_whole_and_shuffled_and_the_step_size_falls_to_0(labelled, algorithm):
    agent, batches, rates = labelled(algorithm=algorithm, train_repeat=2, update_sz=70), [], []
    agent.experience["state"][:, 0] = torch.arange(80)
    loss, step, group = agent.loss, agent.optimizer.step, agent.optimizer.param_groups[0]
    agent.loss = lambda s, *x: batches.append(s[:, 0]) or loss(s, *x)
    agent.optimizer.step = lambda: rates.append(group["lr"]) or step()
    agent.update(*lesson(agent))
    agent.update(*lesson(agent))
    np.testing.assert_allclose(rates, 2 * [k / 6 * 1e-3 for k in (6, 5, 4, 3, 2, 1)])
    assert [len(b) for b in batches] == [32, 32, 6] * 4
    passes = [torch.cat(batches[i : i + 3]).tolist() for i in range(0, 12, 3)]
    assert len({tuple(x) for x in passes}) == 4
    drawn = [sorted(x) for x in passes]
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]
    assert (len(set(drawn[0])) == 70) == (algorithm in ON_POLICY)  # else with replacement


def test_transitions_are_drawn_in_proportion_to_their_weight(labelled):
    agent, seen = labelled(update_sz=40_000, batch_sz=40_000, train_repeat=1), []
    (state, target, _), weight, loss = lesson(agent), 1 + torch.arange(80) % 20, agent.loss
    state[:, 0] = torch.arange(80)
    agent.loss = lambda *x: seen.append(x) or loss(*x)
    agent.update(state, target, weight[:, None].float())
    ((state, _, ones),) = seen
    expected = 40_000 * weight / weight.sum()
    counts = torch.bincount(state[:, 0].long(), minlength=80)
    assert (ones == 1).all() and ((counts - expected) / expected.sqrt()).abs().max() < 5


@pytest.mark.parametrize("factor", [1e-3, 1e6])
def test_a_step_is_along_the_gradient_of_its_minibatch_cut_to_10(labelled, factor):
    agent = labelled(algorithm="minmax", batch_sz=80, lr=1e-12)  # three minibatches, all the same
    state, target, weight = lesson(agent)
    loss, parameters = agent.loss(state, target, factor * weight), list(agent.policy.parameters())
    expected = parameters_to_vector(torch.autograd.grad(loss, parameters))
    expected *= min(1, 10 / expected.norm())
    assert agent.update(state, target, factor * weight) == pytest.approx(loss.item(), rel=1e-4)
    own = parameters_to_vector(p.grad for p in parameters)
    assert (own - expected).norm() < 1e-3 * expected.norm()


def test_natural_steps_are_repeated_and_each_is_better(labelled):
    agent = labelled(train_repeat=3)
    losses = agent.natural_steps(*lesson(agent))
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]


def test_learner_comes_near_the_expert_on_pendulum(train, make_agent):
    agent = make_agent(  # the shipped expert is a task's default
        expert_path="", K=5, H=200, max_iteration=4, eval_every=4, eval_episodes=8, lr=8e-3,
        hidden_dim=64, batch_sz=64, train_repeat=8, update_sz=2000,
    )  # fmt: skip
    untrained = np.mean([t.rewards.sum() for t in agent.evaluate()])
    expert, *_, learner = [np.mean(e["returns"]) for e in train(agent).evaluations]
    assert learner > max(expert - 60, untrained + 600)


@pytest.mark.parametrize("algorithm", ["aggrevated", "score"])
def test_a_run_is_a_function_of_its_seed_however_often_evaluated(train, make_agent, algorithm):
    runs, drawn = [], []
    for seed, every in (3, 1), (3, 4), (4, 4):
        torch.manual_seed(len(runs))
        how = dict(candidates=4, eval_every=every, eval_episodes=5 - every)
        agent = make_agent(algorithm=algorithm, seed=seed, **how)
        agent.expert.evaluated, update = "so", agent.update
        agent.update = lambda *x, f=update: drawn.append(torch.rand(1).item()) or f(*x)
        runs.append(train(agent))
    first, again, other = runs
    assert [len(x.evaluations) for x in runs] == [3, 3, 3]
    assert equal(first.policy.state_dict(), again.policy.state_dict())
    assert equal(first.experience, again.experience)
    assert not torch.equal(first.policy.fc1.weight, other.policy.fc1.weight)
    assert drawn[:2] == drawn[2:4] and len(set(drawn)) == 4  # an update of one's own each


def test_evaluations_are_of_the_mean_action_to_the_end_on_terrains_of_their_own(train, make_agent):
    def starts(episodes):
        return [tuple(t.states[0]) for t in episodes]

    agent = make_agent(eval_episodes=3, H=7)
    first = starts(agent.evaluate())
    policy = NumpyPolicy(train(agent).policy.state_dict())
    for who, act in (("learner", policy.act), ("expert", agent.expert.predict)):
        assert first == starts(episodes := agent.evaluate(who))
        for t in episodes:
            assert len(t.rewards) == 200  # the environment's own limit
            np.testing.assert_allclose(t.actions, act(t.states), atol=1e-5)
    assert first[:1] == starts(agent.evaluate(n_episodes=1))
    first += starts(agent.evaluate(stream=aggrevated.TEST))
    first += starts(agent.simulate(streams(3) + streams(3, iteration=2), 0, 0, 1))
    assert len(set(first)) == 12


def test_rewards_are_recorded_and_logged_as_sums(train):
    agent = train(env_name=TINY, K=7, max_iteration=7, eval_every=5, eval_episodes=6)
    pay = [{3: 6, 5: 15}[len(t.rewards)] for t in agent.evaluate()]  # whoever plays
    assert [e["returns"] for e in agent.evaluations] == [pay[:n] for n in (6, 2, 2, 2, 6, 6)]
    steps = np.diff([0, *agent.log["time/env_steps"]])
    long = (steps - 7 * 3) / 2  # trajectories of 5 steps, which pay 15; those of 3 pay 6
    np.testing.assert_allclose(agent.log["rollout/episode_reward"], (6 * 7 + 9 * long) / 7)


@pytest.mark.parametrize("episodes, returns, best", [
    (4, {1: HIGH, 2: HIGH - [0.1, 2.9, 0.1, 2.9]}, 2),  # 1.5 lower, two errors are 1.62
    (4, {1: HIGH, 2: HIGH - [0, 2, 1, 2]}, 1),  # 1.25 lower, two errors are 0.96
    (4, {1: HIGH, 2: HIGH - 1}, 1),  # on every terrain alike: no luck in it
    (4, {1: HIGH - [0, 2, 0, 2], 2: HIGH, 3: HIGH, 4: HIGH - 1}, 3),
    (4, {1: SHORT + 50, 2: SHORT}, 2),  # while there is nothing else, the latest
    (4, {1: SHORT + 50, 2: SHORT + 90, 5: HIGH, 6: HIGH - 1}, 5),
    (4, {2: HIGH, 3: SHORT + 50}, 2),
    (1, {1: SHORT + 50, 2: SHORT}, 2),  # one difference has no error: it may be luck
])  # fmt: skip
def test_best_iterate_is_the_latest_within_two_errors(make_agent, episodes, returns, best):
    agent = make_agent(eval_episodes=episodes)
    agent.evaluations, kept = [dict(policy="expert", returns=[999.0] * episodes)], []
    for n, values in returns.items():
        agent.evaluations.append(dict(policy="learner", returns=values.tolist()))
        kept += [n] * agent.is_best()
    assert kept[-1] == best


def test_best_iterate_is_kept_with_its_own_score(train, make_agent):
    agent, scores = make_agent(max_iteration=3), iter([7.0, -3.0, -1.0, -1.8])  # the expert's first
    agent.evaluate = lambda *_: 2 * [SimpleNamespace(rewards=np.array([next(scores)]))]
    train(agent)
    best = checkpoint(agent.run_dir / "best.pt")
    assert (best["iteration"], best["score"]) == (2, -1.0)
