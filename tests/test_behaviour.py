import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import make_sac

import aggrevated
from aggrevated import Job, Simulator, gap_weights


def weights_of(policy):
    return {k: v.clone() for k, v in policy.state_dict().items()}


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def simulate(small):
    """simulate(jobs, ...): trajectories of a fresh learner and the small expert."""
    simulators = []

    def run(jobs, n_envs=4, **changes):
        config = aggrevated.Config(**small(**changes))
        simulators.append(Simulator(config, n_envs))
        return simulators[-1].run(weights_of(simulators[-1].policy), jobs)

    run.policy = lambda: simulators[-1].policy
    run.expert = lambda: simulators[-1].expert
    return run


@pytest.fixture
def train(small, tmp_path, monkeypatch):
    """train(**changes): an agent after a run without its film."""
    monkeypatch.setattr(aggrevated.AggreVateDAgent, "film", lambda self: None)
    agents = []

    def run(**changes):
        folder = tmp_path / str(len(agents))
        folder.mkdir()
        agents.append(aggrevated.AggreVateDAgent(aggrevated.Config(**small(**changes)), folder))
        agents[-1].train()
        return agents[-1]

    yield run
    for agent in agents:
        agent.close()


# -- the mixture -----------------------------------------------------------------------------------
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_expert_acts_with_probability_alpha(simulate, alpha):
    jobs = [Job((0, 0, 1, k), alpha, 0.0, 200) for k in range(8)]
    trajectories = simulate(jobs, n_envs=8)
    by_expert = np.concatenate([t.by_expert for t in trajectories])
    n = len(by_expert)
    assert n == 1600
    assert abs(by_expert.mean() - alpha) <= 4 * math.sqrt(alpha * (1 - alpha) / n)
    if alpha == 0.3:  # anew at every step and in every trajectory
        switches = np.mean([np.mean(t.by_expert[1:] != t.by_expert[:-1]) for t in trajectories])
        assert switches == pytest.approx(2 * 0.3 * 0.7, abs=0.06)
        assert len({t.by_expert.tobytes() for t in trajectories}) == 8


def test_by_expert_says_who_acted(simulate):
    trajectories = simulate([Job((0, 0, 1, k), 0.5, 0.0, 50) for k in range(4)])
    for t in trajectories:
        state = torch.from_numpy(t.states)
        with torch.no_grad():
            expert, learner = simulate.expert().predict(state), simulate.policy().predict(state)
        assert (expert - learner).abs().mean() > 0.05
        expected = torch.where(torch.from_numpy(t.by_expert)[:, None], expert, learner)
        np.testing.assert_allclose(t.actions, expected.numpy(), atol=1e-5)


def test_roll_in_samples_the_learner(simulate):
    (t,) = simulate([Job((0, 0, 1, 0), 0.0, 1.0, 200)])
    with torch.no_grad():
        mean, std = simulate.policy()(torch.from_numpy(t.states))
    z = (torch.atanh(torch.from_numpy(t.actions) / 2) - mean) / std
    assert abs(z.mean()) < 4 / math.sqrt(200) and z.std().item() == pytest.approx(1, abs=0.2)
    assert abs(np.corrcoef(z[1:, 0], z[:-1, 0])[0, 1]) < 0.3


def test_alpha_falls_linearly_from_1_to_0(make_agent):
    agent = make_agent(alpha_decay_iterations=8)
    alphas = [agent.decay_alpha(n) for n in range(1, 13)]
    assert alphas[0] == 1 and alphas[8:] == [0] * 4
    np.testing.assert_allclose(np.diff(alphas[:9]), -1 / 8)
    agent = make_agent(alpha_decay_iterations=1)
    assert [agent.decay_alpha(n) for n in (1, 2, 3)] == [1, 0, 0]


# -- trajectories ----------------------------------------------------------------------------------
def test_ends_are_kept_apart_and_no_step_is_made_up(simulate):
    jobs = [Job((0, 0, 1, k), 0.5, 1.0, 4 if k % 3 == 0 else 50) for k in range(24)]
    trajectories = simulate(jobs, n_envs=3, env_name="Tiny-v0")
    seen = set()
    for job, t in zip(jobs, trajectories, strict=True):
        length = int(t.states[0, 1])
        steps = min(length, job.horizon, 5)
        assert len(t) == len(t.states) == len(t.actions) == len(t.by_expert) == steps
        assert t.terminated == (length == 3)
        assert t.truncated == (length == 9 and job.horizon == 50)
        np.testing.assert_array_equal(t.states[:, 0], np.arange(steps))
        np.testing.assert_array_equal(t.rewards, 1 + np.arange(steps))
        assert t.episode_return == steps * (steps + 1) / 2
        assert len(set(t.states[:, 2])) == 1
        seen.add((t.terminated, t.truncated))
    assert seen == {(True, False), (False, True), (False, False)}


def test_trajectories_come_in_the_order_of_the_jobs(simulate):
    jobs = [Job((0, 0, 1, k), 0.5, 1.0, 50) for k in range(11)]
    alone = [simulate([job], n_envs=1, env_name="Tiny-v0")[0] for job in jobs]
    together = simulate(jobs, n_envs=3, env_name="Tiny-v0")
    assert len({t.states[0, 2] for t in together}) == len(jobs)
    assert len({len(t) for t in together}) > 1
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a.states, b.states)
        np.testing.assert_array_equal(a.by_expert, b.by_expert)
        np.testing.assert_allclose(a.actions, b.actions, atol=1e-5)


def test_a_trajectory_does_not_depend_on_those_before_it(simulate, tmp_path):
    env_name = "BipedalWalkerHardcore-v3"  # its physics engine outlives a reset
    expert = make_sac(tmp_path / "walker.zip", env_name)
    changes = dict(n_envs=1, env_name=env_name, expert_path=str(expert))
    jobs = [Job((0, 0, 1, k), 0.0, 1.0, 120) for k in range(12)]
    forwards, backwards = simulate(jobs, **changes), simulate(jobs[::-1], **changes)[::-1]
    for a, b in zip(forwards, backwards, strict=True):
        np.testing.assert_array_equal(a.states, b.states)


# -- weights ---------------------------------------------------------------------------------------
def column(*values):
    return torch.tensor(values)[:, None]


def test_gap_weights_by_hand():
    q_expert, q_learner = column(3.0, 1.0, 0.0, -1.0), column(1.0, 5.0, -1.0, -2.0)
    # gaps 2, 0 (not -4), 1, 1 have mean 1: weights 1 + 3 gap = 7, 1, 4, 4; the cut takes 7 to 5
    torch.testing.assert_close(
        gap_weights(q_expert, q_learner, factor=3.0, cut=20.0), column(7.0, 1.0, 4.0, 4.0) / 4
    )
    torch.testing.assert_close(
        gap_weights(q_expert, q_learner, factor=3.0, cut=5.0), column(5.0, 1.0, 4.0, 4.0) / 3.5
    )


def test_gap_weights_have_mean_1_and_any_scale_of_q():
    generator = torch.Generator().manual_seed(0)
    q_expert, q_learner = torch.randn(2, 500, 1, generator=generator)
    weight = gap_weights(q_expert, q_learner, 3.0, 20.0)
    assert weight.shape == (500, 1) and weight.mean().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(
        weight, gap_weights(70 * q_expert + 9, 70 * q_learner + 9, 3.0, 20.0), rtol=1e-4, atol=1e-4
    )
    no_gap = gap_weights(q_expert, q_expert, 3.0, 20.0)
    assert torch.equal(no_gap, torch.ones(500, 1))


@pytest.fixture
def labelled(make_agent):
    """labelled(**changes): an agent with the data of its first iteration."""

    def make(alpha=0.5, **changes):
        agent = make_agent(**changes)
        agent.alpha = alpha
        agent.label(agent.collect(1))
        return agent

    return make


def test_data_are_labelled_by_the_expert(labelled):
    agent = labelled()
    e = agent.experience
    assert len(e["state"]) == 80
    torch.testing.assert_close(e["expert_action"], agent.expert.predict(e["state"]))
    torch.testing.assert_close(
        e["q_expert"], agent.expert.q_star(e["state"], e["expert_action"]), rtol=1e-4, atol=1e-4
    )


def test_newest_transitions_are_kept(labelled):
    agent = labelled(max_experience_len=100)
    first = agent.experience["state"]
    trajectories = agent.collect(2)
    agent.label(trajectories)
    new = torch.from_numpy(np.concatenate([t.states for t in trajectories]))
    assert len(first) == len(new) == 80
    assert all(len(x) == 100 for x in agent.experience.values())
    assert torch.equal(agent.experience["state"], torch.cat([first[-20:], new]))


def test_gap_weighs_the_expert_action_against_the_learners_mean(labelled):
    agent = labelled(gap_factor=2.0)
    state = agent.experience["state"]
    target, weight = agent.weigh(agent.experience, 1)
    with torch.no_grad():
        q_learner = agent.expert.q_star(state, agent.policy.predict(state))
    assert torch.equal(target, agent.experience["expert_action"])
    expected = gap_weights(agent.experience["q_expert"], q_learner, 2.0, 20.0)
    torch.testing.assert_close(weight, expected)


def test_dagger_weighs_all_the_same(labelled):
    agent = labelled(algorithm="dagger")
    target, weight = agent.weigh(agent.experience, 1)
    assert torch.equal(target, agent.experience["expert_action"])
    assert torch.equal(weight, torch.ones(80, 1))


def test_minmax_weighs_what_was_executed_from_0_to_1(labelled):
    agent = labelled(weighting="minmax")
    target, weight = agent.weigh(agent.experience, 1)
    assert torch.equal(target, agent.experience["action"])
    assert not torch.equal(target, agent.experience["expert_action"])
    assert weight.shape == (80, 1) and weight.min() == 0 and weight.max().item() == pytest.approx(1)
    torch.testing.assert_close(
        agent.normalize_q_star(column(-4.0, 0.0, 1.0, 6.0)), column(0.0, 0.4, 0.5, 1.0)
    )
    agent.label(agent.collect(2))
    assert len(agent.experience["state"]) == 80  # an iteration's own data alone


def test_loss_pairs_every_weight_with_its_own_state(labelled):
    agent = labelled()
    state, target = (agent.experience[k][:5] for k in ("state", "expert_action"))
    weight = column(0.0, 1.0, 0.5, 3.0, 10.0)
    each = [
        w.item() * agent.policy.get_log_prob(s[None], a[None]).item()
        for s, a, w in zip(state, target, weight, strict=True)
    ]
    loss = agent.loss(state, target, weight)
    assert loss.shape == () and loss.item() == pytest.approx(-np.mean(each), rel=1e-4)


def test_targets_at_the_bounds_are_cut(labelled):
    agent = labelled(target_clip=0.9)
    state, weight = agent.experience["state"][:3], torch.ones(3, 1)
    loss = agent.loss(state, torch.full((3, 1), 2.0), weight)
    assert loss.item() == agent.loss(state, torch.full((3, 1), 1.8), weight).item()
    assert loss.item() != agent.loss(state, torch.full((3, 1), 1.7), weight).item()


# -- updates ---------------------------------------------------------------------------------------
def distance(agent):
    """How far the learner's mean action is from the expert's, over the experience."""
    with torch.no_grad():
        own = agent.policy.predict(agent.experience["state"])
    return (own - agent.experience["expert_action"]).abs().mean().item()


@pytest.mark.parametrize(
    "changes", [dict(), dict(algorithm="dagger"), dict(algorithm="aggrevate")], ids=str
)
def test_updates_move_the_mean_to_the_expert_action(labelled, changes):
    agent = labelled(lr=3e-3, train_repeat=10, max_iteration=6, **changes)
    before, losses = distance(agent), []
    for n in range(1, 7):
        losses.append(agent.update(n)["train/loss"])
    assert losses[-1] < losses[0] - 0.3
    assert distance(agent) < before / 2


@pytest.mark.parametrize(
    "changes",
    [dict(algorithm=a) for a in ("bc", "dagger", "aggrevate", "reinforce")]
    + [dict(weighting=w) for w in ("gap", "score", "pathwise", "minmax")]
    + [dict(optimizer="natural", weighting=w) for w in ("gap", "score", "pathwise")],
    ids=lambda changes: "".join(changes.values()),
)
def test_every_method_trains(make_agent, changes):
    agent = make_agent(**changes)
    before = weights_of(agent.policy)
    scalars = [agent.iterate(n) for n in (1, 2)]
    assert all(math.isfinite(v) for s in scalars for v in s.values())
    assert not same_weights(before, weights_of(agent.policy))
    alphas = {"bc": [1, 1], "reinforce": [0, 0]}.get(changes.get("algorithm"), [1, 0.5])
    assert [s["train/alpha"] for s in scalars] == alphas
    own = changes.get("algorithm") == "reinforce" or changes.get("weighting") in (
        "score", "pathwise", "minmax",
    )  # fmt: skip
    assert len(agent.experience["state"]) == (80 if own else 160)


def test_update_draws_some_of_the_experience_each_time_others(labelled, monkeypatch):
    agent, drawn = labelled(update_sz=30), []
    weigh = agent.weigh
    monkeypatch.setattr(agent, "weigh", lambda e, n: drawn.append(e["state"]) or weigh(e, n))
    agent.update(1), agent.update(2)
    kept = {tuple(s) for s in agent.experience["state"].tolist()}
    first, second = ({tuple(s) for s in e.tolist()} for e in drawn)
    assert len(first) == len(second) == 30 and first | second <= kept and first != second


def test_natural_gradient_takes_one_step_a_pass(labelled, monkeypatch):
    agent, sizes = labelled(optimizer="natural", train_repeat=4), []
    step = agent.natural_step
    monkeypatch.setattr(agent, "natural_step", lambda *x: sizes.append(len(x[0])) or step(*x))
    before = distance(agent)
    agent.update(1)
    assert sizes == [80] * 4 and distance(agent) < before


def test_several_experts_are_one(make_agent, small, tmp_path):
    other = make_sac(tmp_path / "other.zip", seed=1)
    paths = f"{small()['expert_path']},{other}"
    agent = make_agent(expert_path=paths, combine="max", temperature=0.0)
    assert math.isfinite(agent.iterate(1)["train/q_gap"])
    e = agent.experience
    each = torch.cat([m.q_star(e["state"], e["expert_action"]) for m in agent.expert.members], 1)
    torch.testing.assert_close(e["q_expert"], each.amax(1, keepdim=True), rtol=1e-4, atol=1e-4)


def test_pathwise_updates_raise_q_of_the_learner(labelled):
    agent = labelled(weighting="pathwise", lr=3e-3, train_repeat=20)

    def q():
        state = agent.experience["state"]
        with torch.no_grad():
            return agent.expert.q_star(state, agent.policy.predict(state)).mean().item()

    before = q()
    agent.update(1)
    assert q() > before + 0.01


def test_returns_to_go_by_hand():
    np.testing.assert_allclose(
        aggrevated.returns_to_go(np.array([1.0, -2.0, 4.0]), 0.5), [1.0, 0.0, 4.0]
    )


def test_learning_rate_falls_linearly(labelled):
    agent, rates = labelled(lr=1e-3, final_lr=2e-4, max_iteration=5), []
    for n in range(1, 6):
        agent.update(n)
        rates.append(agent.optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(rates, [1e-3, 8e-4, 6e-4, 4e-4, 2e-4])


def test_updates_leave_the_expert_alone(labelled):
    agent = labelled()
    before = weights_of(agent.expert)
    agent.update(1)
    assert same_weights(before, weights_of(agent.expert))


def test_gradient_norm_is_bounded(labelled):
    agent = labelled(max_grad_norm=1e-9, train_repeat=1, batch_sz=80)
    agent.update(1)
    norm = sum(p.grad.square().sum() for p in agent.policy.parameters()).sqrt().item()
    assert 0 < norm <= 1.01e-9


def test_passes_over_the_data_are_shuffled_and_whole(labelled, monkeypatch):
    agent = labelled(train_repeat=2)
    agent.experience["state"][:, 0] = torch.arange(80)
    batches, loss = [], agent.loss
    monkeypatch.setattr(
        agent, "loss", lambda s, t, w: (batches.append(s[:, 0].tolist()), loss(s, t, w))[1]
    )
    agent.update(1)
    assert [len(b) for b in batches] == [32, 32, 16] * 2
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert first != second and sorted(first) == sorted(second) == list(range(80))
    assert first != sorted(first)


def test_learner_comes_near_the_expert(make_agent):
    agent = make_agent(
        K=4, max_iteration=5, alpha_decay_iterations=2, lr=3e-3, train_repeat=8, hidden_dim=32
    )
    scalars = []
    for n in range(1, 6):
        scalars.append(agent.iterate(n))
        if n == 1:
            first = weights_of(agent.policy)
    last = distance(agent)
    fresh = aggrevated.make_policy(agent.config, gym.make("Pendulum-v1"))
    agent.policy.load_state_dict(fresh.state_dict())
    untrained = distance(agent)
    agent.policy.load_state_dict(first)
    assert last < distance(agent) < untrained
    assert last < untrained / 2
    assert [s["train/alpha"] for s in scalars] == [1, 0.5, 0, 0, 0]
    assert [s["rollout/expert_fraction"] for s in scalars][::2] == [1, 0, 0]
    assert scalars[-1]["time/env_steps"] == 5 * 4 * 40


# -- evaluation ------------------------------------------------------------------------------------
def test_evaluation_does_not_disturb_training(train):
    often = train(max_iteration=4, eval_every=1, eval_episodes=3)
    seldom = train(max_iteration=4, eval_every=100, eval_episodes=1)
    assert often.csv_bytes > seldom.csv_bytes
    assert same_weights(often.policy.state_dict(), seldom.policy.state_dict())
    assert torch.equal(often.experience["state"], seldom.experience["state"])


def test_evaluations_meet_the_same_terrains(make_agent):
    agent = make_agent(eval_episodes=3)
    first, expert = agent.evaluate(), agent.evaluate("expert")
    agent.iterate(1)
    torch.manual_seed(5)
    later = agent.evaluate()
    starts = [[t.states[0] for t in episodes] for episodes in (first, expert, later)]
    np.testing.assert_array_equal(starts[0], starts[1])
    np.testing.assert_array_equal(starts[0], starts[2])
    assert len({s.tobytes() for s in starts[0]}) == 3
    assert [t.episode_return for t in later] != [t.episode_return for t in first]
    again = agent.evaluate()
    assert all(np.array_equal(a.states, b.states) for a, b in zip(later, again, strict=True))
    (one,) = agent.evaluate(n_episodes=1)
    np.testing.assert_array_equal(one.states[0], starts[0][0])
    test = agent.evaluate(stream=aggrevated.TEST, n_episodes=1)[0]
    roll_in = agent.collect(1)[0]
    assert len({t.states[0].tobytes() for t in (one, test, roll_in)}) == 3


def test_evaluation_is_of_the_mean_action_to_the_environments_own_limit(make_agent):
    agent = make_agent(H=7)
    for who in ("learner", "expert"):
        act = agent.policy.predict if who == "learner" else agent.expert.predict
        for t in agent.evaluate(who):
            assert len(t) == 200 and t.truncated and not t.terminated
            assert (t.by_expert == (who == "expert")).all()
            with torch.no_grad():
                expected = act(torch.from_numpy(t.states)).numpy()
            np.testing.assert_allclose(t.actions, expected, atol=1e-5)


def test_roll_ins_differ_by_seed_iteration_and_trajectory(make_agent):
    starts = set()
    for seed in (0, 1):
        agent = make_agent(seed=seed, H=1)
        starts |= {t.states[0].tobytes() for n in (1, 2) for t in agent.collect(n)}
    assert len(starts) == 2 * 2 * 2


def test_learner_depends_on_the_seed_alone(make_agent):
    torch.manual_seed(1)
    first = make_agent()
    torch.manual_seed(2)
    second, third = make_agent(), make_agent(seed=1)
    assert same_weights(weights_of(first.policy), weights_of(second.policy))
    assert not same_weights(weights_of(first.policy), weights_of(third.policy))
