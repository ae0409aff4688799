import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_envs  # noqa: F401  (registers them)
import torch
from conftest import PENDULUM_EXPERT, equal

from aggrevated import ALGORITHMS, ROLL_IN, TEST, gap_weights, returns_to_go, roll_in, standardise

TINY = "tiny_envs:Tiny-v0"
ON_POLICY = {"score", "minmax", "reinforce"}


def weights_of(network):
    return {k: v.clone() for k, v in network.state_dict().items()}


def streams(n, iteration=1):
    return [(ROLL_IN, 0, iteration, k) for k in range(n)]


# -- the mixture -----------------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_alpha_falls_linearly_from_1_to_0(make_agent, algorithm):
    agent = make_agent(algorithm=algorithm, alpha_decay_iterations=4)
    falling = [1, 0.75, 0.5, 0.25, 0, 0, 0]
    expected = {"bc": 7 * [1], "reinforce": 7 * [0]}.get(algorithm, falling)
    assert [agent.decay_alpha(n) for n in range(1, 8)] == expected


# The expert's action is an episode's random number, the learner's its negative (plus noise).
EXPERT = SimpleNamespace(predict=lambda state: state[:, 2:])
LEARNER = SimpleNamespace(act=lambda state, noise: noise - state[:, 2:])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_expert_acts_with_probability_alpha_anew_at_every_step(alpha):
    trajectories = roll_in(LEARNER, EXPERT, TINY, alpha, 0.0, 5, streams(300))
    assert all((np.abs(t.actions) == t.states[:, 2:]).all() for t in trajectories)
    turns = [t.actions[:, 0] > 0 for t in trajectories]
    n = sum(map(len, turns))
    tolerance = 4 * math.sqrt(alpha * (1 - alpha) / n)
    switches = np.concatenate([x[1:] != x[:-1] for x in turns])
    assert n > 1000 and abs(np.concatenate(turns).mean() - alpha) <= tolerance
    assert abs(switches.mean() - 2 * alpha * (1 - alpha)) <= 2 * tolerance


def test_noise_of_the_learner_is_standard_normal_times_its_scale():
    trajectories = roll_in(LEARNER, EXPERT, TINY, 0.0, 0.5, 5, streams(300))
    z = np.concatenate([(t.actions + t.states[:, 2:]) / 0.5 for t in trajectories])[:, 0]
    assert abs(z.mean()) < 4 / math.sqrt(len(z)) and z.std() == pytest.approx(1, abs=0.1)
    assert len(set(z)) == len(z)  # drawn anew at every step


# -- trajectories ----------------------------------------------------------------------------------
@pytest.mark.parametrize("horizon", [2, 4, 50])
def test_episodes_end_where_the_environment_or_the_horizon_says_and_nothing_is_made_up(horizon):
    trajectories = roll_in(LEARNER, EXPERT, TINY, 0.5, 1.0, horizon, streams(12))
    assert {int(t.states[0, 1]) for t in trajectories} == {3, 9}
    for t in trajectories:
        steps = min(int(t.states[0, 1]), 5, horizon)  # terminated, truncated, cut
        np.testing.assert_array_equal(t.states[:, 0], np.arange(steps))
        np.testing.assert_array_equal(t.rewards, 1 + np.arange(steps))
        assert t.actions.shape == (steps, 1) and len(set(t.states[:, 2])) == 1
    assert len({t.states[0, 2] for t in trajectories}) == 12


def test_a_stream_means_the_same_trajectory_in_any_company():
    together = roll_in(LEARNER, EXPERT, TINY, 0.5, 1.0, 50, streams(6))
    for stream, t in zip(streams(6), together, strict=True):
        (alone,) = roll_in(LEARNER, EXPERT, TINY, 0.5, 1.0, 50, [stream])
        np.testing.assert_array_equal(alone.states, t.states)
        np.testing.assert_allclose(alone.actions, t.actions, atol=1e-6)


def test_two_workers_return_the_trajectories_in_the_order_of_the_streams(make_agent):
    agent = make_agent(env_name=TINY, n_workers=2)
    own = roll_in(agent.policy, agent.expert, TINY, 0.5, 1.0, 50, streams(7))
    by_workers = agent.simulate(streams(7), 0.5, 1.0, 50)
    agent.pool.shutdown()
    for a, b in zip(own, by_workers, strict=True):
        np.testing.assert_array_equal(a.states, b.states)
        np.testing.assert_allclose(a.actions, b.actions, atol=1e-4)


def test_iteration_uses_the_configured_sizes_and_streams(make_agent, monkeypatch):
    agent, calls = make_agent(K=3, H=7, seed=5, roll_in_noise=0.4), []
    simulate = agent.simulate
    monkeypatch.setattr(agent, "simulate", lambda *x: calls.append(x) or simulate(*x))
    agent.iterate(2)
    assert calls == [([(ROLL_IN, 5, 2, k) for k in range(3)], 0.5, 0.4, 7)]
    assert len(agent.experience["state"]) == agent.env_steps == 21


# -- data ------------------------------------------------------------------------------------------
@pytest.fixture
def labelled(make_agent):
    """labelled(**changes): an agent with the data of its first iteration; 80 transitions."""

    def make(**changes):
        agent = make_agent(**changes)
        agent.trajectories = agent.simulate(streams(2), 0.5, 1.0, 40)
        agent.label(agent.trajectories)
        return agent

    return make


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_labels_are_what_expert_and_critics_say(labelled, gamma):
    agent = labelled(gamma=gamma)
    e, expert = agent.experience, agent.expert
    states = np.concatenate([t.states for t in agent.trajectories])
    actions = np.concatenate([t.actions for t in agent.trajectories])
    expert_action = expert.predict(states)
    np.testing.assert_array_equal(e["state"], states)
    np.testing.assert_array_equal(e["action"], actions)
    np.testing.assert_allclose(e["expert_action"], expert_action, atol=1e-6)
    q = expert.q_star(torch.from_numpy(states), torch.from_numpy(expert_action))
    torch.testing.assert_close(e["q_expert"], q)
    to_go = [returns_to_go(t.rewards, gamma or expert.gamma) for t in agent.trajectories]
    np.testing.assert_allclose(e["to_go"][:, 0], np.concatenate(to_go), rtol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_newest_data_are_kept_or_this_iterations_alone(labelled, algorithm):
    agent = labelled(algorithm=algorithm, max_experience_len=100)
    first = agent.experience["state"]
    trajectories = agent.simulate(streams(2, iteration=2), 0.0, 1.0, 40)
    agent.label(trajectories)
    expected = torch.from_numpy(np.concatenate([t.states for t in trajectories]))
    if algorithm not in ON_POLICY:
        expected = torch.cat([first[-20:], expected])
    assert torch.equal(agent.experience["state"], expected)
    assert {len(x) for x in agent.experience.values()} == {len(expected)}


def test_inputs_are_standardised_by_the_first_states(make_agent):
    agent = make_agent()
    agent.iterate(1)
    state = agent.experience["state"]
    agent.iterate(2)
    torch.testing.assert_close(agent.policy.state_mean, state.mean(dim=0))
    torch.testing.assert_close(agent.policy.state_std, state.std(dim=0, correction=0))


# -- what the algorithms make likelier, and how much -----------------------------------------------
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_targets_and_weights(labelled, algorithm):
    agent = labelled(algorithm=algorithm, gap_factor=2.0, gap_cut=5.0)
    e, policy, q_star = agent.experience, agent.policy, agent.get_q_star
    torch.manual_seed(0)
    state, target, weight = agent.weigh(e)
    assert weight.shape == (len(state), 1) and not weight.requires_grad
    if algorithm == "score":
        assert torch.equal(state, e["state"].repeat(2, 1))
        first, second = target.split(80)
        assert not torch.equal(first, second)
        a, b = q_star(e["state"], first), q_star(e["state"], second)
        expected = standardise(torch.cat([a - b, b - a])).clamp(-5, 5)
        return torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        q_learner = q_star(e["state"], policy.predict(e["state"]))
        q_action = q_star(e["state"], e["action"])
    assert not torch.equal(e["q_expert"], q_action)
    expert_action, action = policy.inside(e["expert_action"]), policy.inside(e["action"])
    assert not torch.equal(expert_action, e["expert_action"])  # it acts at the bounds too
    expected_target, expected = {
        "bc": (expert_action, torch.ones(80, 1)),
        "dagger": (expert_action, torch.ones(80, 1)),
        "aggrevate": (expert_action, gap_weights(e["q_expert"], q_action, 2.0, 5.0)),
        "aggrevated": (expert_action, gap_weights(e["q_expert"], q_learner, 2.0, 5.0)),
        "minmax": (action, agent.normalize_q_star(q_action)),
        "reinforce": (e["action"], standardise(e["to_go"])),
    }[algorithm]
    assert torch.equal(state, e["state"]) and torch.equal(target, expected_target)
    torch.testing.assert_close(weight, expected)


# -- updates ---------------------------------------------------------------------------------------
def test_learning_rate_falls_to_zero_within_each_update(labelled, monkeypatch):
    agent, rates = labelled(lr=1e-3, train_repeat=2, update_sz=70), []  # 3 minibatches a pass
    step, group = agent.optimizer.step, agent.optimizer.param_groups[0]
    monkeypatch.setattr(agent.optimizer, "step", lambda: rates.append(group["lr"]) or step())
    agent.update(1)
    agent.update(2)
    np.testing.assert_allclose(rates, 2 * [k / 6 * 1e-3 for k in (6, 5, 4, 3, 2, 1)])


@pytest.mark.parametrize("algorithm", ["dagger", "reinforce"])
def test_passes_are_whole_and_shuffled(labelled, monkeypatch, algorithm):
    agent = labelled(algorithm=algorithm, train_repeat=2, update_sz=70)
    agent.experience["state"][:, 0] = torch.arange(80)
    batches, loss = [], agent.loss
    monkeypatch.setattr(agent, "loss", lambda s, *x: batches.append(s[:, 0]) or loss(s, *x))
    agent.update(1)
    agent.update(2)
    assert [len(b) for b in batches] == [32, 32, 6] * 4
    passes = [torch.cat(batches[i : i + 3]).tolist() for i in range(0, 12, 3)]
    assert len({tuple(x) for x in passes}) == 4
    drawn = [sorted(x) for x in passes]
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]
    assert (len(set(drawn[0])) == 70) == (algorithm in ON_POLICY)  # else with replacement


def test_transitions_are_drawn_in_proportion_to_their_weight(labelled, monkeypatch):
    agent, seen = labelled(update_sz=40_000, batch_sz=40_000, train_repeat=1), []
    agent.experience["state"][:, 0] = torch.arange(80) / 80
    weight, loss = agent.weigh(agent.experience)[2][:, 0], agent.loss
    assert weight.min() < 0.5 and weight.max() > 2
    monkeypatch.setattr(agent, "loss", lambda *x: seen.append(x) or loss(*x))
    agent.update(1)
    ((state, _, weights),) = seen
    assert (weights == 1).all()
    counts = torch.bincount((80 * state[:, 0]).round().long(), minlength=80)
    expected = 40_000 * weight / weight.sum()
    assert ((counts - expected) / expected.sqrt()).abs().max() < 5


@pytest.mark.parametrize("optimizer", ["adam", "natural"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_method_trains(make_agent, algorithm, optimizer):
    agent = make_agent(algorithm=algorithm, optimizer=optimizer)
    before = weights_of(agent.policy)
    scalars = [agent.iterate(n) for n in (1, 2)]
    assert all(math.isfinite(v) for s in scalars for v in s.values())
    after = weights_of(agent.policy)
    assert not any(torch.equal(before[k], after[k]) for k in after)


@pytest.mark.parametrize("optimizer", ["adam", "natural"])
def test_learner_comes_near_the_expert_on_pendulum(make_agent, optimizer):
    agent = make_agent(
        expert_path=str(PENDULUM_EXPERT), K=5, H=200, max_iteration=5, eval_episodes=10, lr=8e-3,
        hidden_dim=64, batch_sz=64, train_repeat=8, update_sz=2000, optimizer=optimizer,
        kl_step=0.1,
    )  # fmt: skip
    played, critics = [agent.evaluate("expert"), agent.evaluate()], weights_of(agent.expert.critic)
    for n in range(1, 6):
        agent.iterate(n)
    played.append(agent.evaluate())
    expert, untrained, trained = (np.mean([t.rewards.sum() for t in x]) for x in played)
    assert trained > expert - 60 and trained > untrained + 600
    assert equal(critics, weights_of(agent.expert.critic))
    assert bool(agent.optimizer.state) == (optimizer == "adam")  # natural steps leave it alone


# -- evaluation ------------------------------------------------------------------------------------
def test_evaluation_is_of_the_mean_action_to_the_environments_own_limit(make_agent):
    agent = make_agent(H=7)
    mean = partial(agent.policy.act, noise=np.zeros((200, 1), np.float32))
    for who, act in (("learner", mean), ("expert", agent.expert.predict)):
        for t in agent.evaluate(who):
            assert len(t.rewards) == 200
            np.testing.assert_allclose(t.actions, act(t.states), atol=1e-5)


def test_evaluations_meet_the_same_terrains_and_no_others_do(make_agent):
    def starts(episodes):
        return [t.states[0].tolist() for t in episodes]

    agent = make_agent(eval_episodes=3)
    first = starts(agent.evaluate())
    agent.iterate(1)
    assert first == starts(agent.evaluate()) == starts(agent.evaluate("expert"))
    assert first[:1] == starts(agent.evaluate(n_episodes=1))
    first += starts(agent.evaluate(stream=TEST))
    first += starts(agent.simulate(streams(3) + streams(3, iteration=2), 0, 0, 1))
    assert len({tuple(s) for s in first}) == 12


@pytest.fixture
def train(make_agent, tmp_path_factory):
    """train(**changes): an agent after its run."""

    def run(**changes):
        agent = make_agent(max_iteration=3, **changes)
        agent.train(tmp_path_factory.mktemp("run"))
        return agent

    return run


@pytest.mark.parametrize("algorithm", ["aggrevated", "score"])
def test_evaluation_does_not_disturb_training(train, algorithm):
    often = train(algorithm=algorithm, eval_every=1, eval_episodes=3)
    seldom = train(algorithm=algorithm, eval_every=3, eval_episodes=1)
    assert len(often.rows) == 3 * 4 and len(seldom.rows) == 2
    assert equal(weights_of(often.policy), weights_of(seldom.policy))
    assert equal(often.experience, seldom.experience)


def test_a_run_is_a_function_of_its_seed(train):
    torch.manual_seed(1)
    first = train(seed=3)
    torch.manual_seed(2)
    again, other = train(seed=3), train(seed=4)
    assert equal(weights_of(first.policy), weights_of(again.policy))
    assert equal(first.experience, again.experience)
    assert not torch.equal(first.policy.fc1.weight, other.policy.fc1.weight)
    assert not torch.equal(first.policy.state_mean, other.policy.state_mean)


@pytest.mark.parametrize("third, best_iteration", [(-1.8, 2), (-1.6, 3), (0.0, 3)])
def test_best_iterate_is_the_last_within_two_standard_errors(
    make_agent, tmp_path, monkeypatch, third, best_iteration
):
    agent, scores = make_agent(max_iteration=3), iter([-3.0, -1.0, third])

    def evaluate(who="learner"):
        score = next(scores) if who == "learner" else 7.0
        return [SimpleNamespace(rewards=np.array([score - 1, x])) for x in (0.5, 1.5)]  # 2 * 0.35

    monkeypatch.setattr(agent, "evaluate", evaluate)
    agent.train(tmp_path)
    best, last = (torch.load(tmp_path / f"{x}.pt", weights_only=True) for x in ("best", "last"))
    assert best["iteration"] == best_iteration and last["iteration"] == 3
    assert best["best_return"] == last["best_return"] == pytest.approx(max(third, -1))
