"""The mathematics, against sources that share no code with it."""

import copy
import pickle
from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import Mock

import gymnasium as gym
import numpy as np
import pytest
import tiny_envs  # noqa: F401  (registers them)
import torch
from conftest import make_sac
from torch import distributions as D, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import audit
from aggrevated import (
    FAMILY, AggreVateDAgent, Config, NumpyPolicy, PolicyNetwork, SACExpert, conjugate_gradient,
    imitate_by_gap, improved_action, mean_kl, natural_step, normalize_q_star,
)  # fmt: skip

BOXES = {
    "one": gym.spaces.Box(-1, 1, (2,)),
    "narrow": gym.spaces.Box(5, 5.5, (1,)),
    "asymmetric": gym.spaces.Box(np.float32([-3, 0]), np.float32([1, 10])),
    "far": gym.spaces.Box(100, 101, (1,)),
    "double": gym.spaces.Box(np.array([-0.3]), np.array([0.1]), dtype=np.float64),
}
each_box = pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)


def make_policy(box, state_dim=4, hidden_dim=16):
    """A float64 learner whose means and deviations vary with the state."""
    torch.manual_seed(0)
    policy = PolicyNetwork(gym.spaces.Box(-1, 1, (state_dim,)), box, hidden_dim).double()
    with torch.no_grad():
        policy.mean.weight.mul_(3)
        policy.log_std.weight.mul_(20)
        policy.state_mean += 0.3
        policy.state_std *= 1.7
    return policy


def states(n, dim=4, seed=1):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@each_box
def test_log_prob_is_that_of_torchs_transformed_distribution(box):
    policy, state = make_policy(box), states(200)
    squash = [D.TanhTransform(), D.AffineTransform(policy.offset, policy.scale)]
    action = policy.offset + policy.scale * (1.98 * torch.rand(200, *box.shape).double() - 0.99)
    expected = D.TransformedDistribution(D.Normal(*policy(state)), squash).log_prob(action)
    own = policy.get_log_prob(state, action)
    torch.testing.assert_close(own, expected.sum(1, keepdim=True), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bias", [-100.0, 0.0, 100.0])
@each_box
def test_values_and_gradients_are_finite_at_the_ends_of_the_range(box, bias):
    policy, state = make_policy(box).float(), states(3).float()
    nn.init.constant_(policy.log_std.bias, bias)
    std = policy(state)[1]
    assert (std >= np.exp(-2.001)).all() and (std <= np.exp(-0.999)).all()
    low, high = torch.tensor(np.array([box.low, box.high])).float().expand(3, 2, -1).unbind(1)
    for action in (low, high, low - 1, high + 1, (low + high) / 2):
        log_prob = policy.get_log_prob(state, action)
        gradient = torch.autograd.grad(log_prob.sum(), list(policy.parameters()))
        assert all(x.isfinite().all() for x in (log_prob, *gradient))
        assert bias or all((x != 0).any() for x in gradient)


@each_box
def test_torch_and_numpy_are_the_same_squashed_network_of_standardised_inputs(box):
    policy, state = make_policy(box).float(), states(99).float()
    noise = np.random.default_rng(0).normal(size=(99, *box.shape))
    own, gelu = NumpyPolicy(policy.state_dict()), nn.GELU(approximate="tanh")
    network = nn.Sequential(policy.fc1, gelu, policy.fc2, gelu, policy.mean)
    u = network((state - 0.3) / 1.7).detach().double().numpy()
    middle, half = (box.high + box.low) / 2, (box.high - box.low) / 2
    bound = 2e-6 * half + 3 * np.spacing(np.float32(box.high))  # 101's neighbours are 8e-6 away
    mean, state = policy.predict(state).detach().numpy(), state.numpy()
    noisy = middle + half * np.tanh(u + policy(torch.tensor(state))[1].detach().numpy() * noise)
    for action, expected in (
        (mean, middle + half * np.tanh(u)),
        (own.act(state), mean),
        ([own.act(s) for s in state], mean),
        (own.act(state, noise), noisy),
        ([own.act(s, z) for s, z in zip(state, noise, strict=True)], noisy),
    ):
        assert np.shape(action) == mean.shape and np.array(action).dtype == np.float32
        assert (np.abs(action - expected) <= bound).all()


def test_inputs_are_bounded_at_10_deviations():
    policy, first = make_policy(BOXES["one"]).float(), states(40).float()
    first[:, 2] = 7.0  # constant at first, but not for ever
    policy.standardise_inputs(first)
    own, std = NumpyPolicy(policy.state_dict()), first.std(dim=0, correction=0).clamp(min=1e-3)
    at = {k: first.mean(dim=0) + k * std * torch.tensor([[1, -1, 1, -1]]) for k in (9, 10, 11, 1e6)}
    for act in (policy.predict, lambda x: torch.from_numpy(own.act(x.numpy()))):
        assert act(first).isfinite().all()
        assert torch.equal(act(at[11]), act(at[1e6])) and not torch.equal(act(at[9]), act(at[10]))
        torch.testing.assert_close(act(at[10]), act(at[11]), rtol=1e-4, atol=1e-4)


IN_TORCH = {
    "gsde": dict(use_sde=True), "gsde, other clip": dict(use_sde=True, clip_mean=0.5),
    "tanh": dict(activation_fn=nn.Tanh), "elu": dict(activation_fn=nn.ELU),
}  # fmt: skip
KINDS = IN_TORCH | {
    "plain": {}, "sizes": dict(net_arch=dict(pi=[8, 24, 8], qf=[32, 12])),
    "asymmetric": dict(env_id="tiny_envs:Lopsided-v0"), "double": dict(env_id="tiny_envs:Double-v0"),
    "one critic": dict(n_critics=1), "three critics": dict(n_critics=3),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_expert_is_sb3s_agent(tmp_path, kind):
    model = make_sac(tmp_path / "expert.zip", **KINDS[kind])
    spaces = model.observation_space, model.action_space
    expert, rng = SACExpert(tmp_path / "expert.zip", *spaces), np.random.default_rng(0)
    state = rng.normal(size=(100, 3)).astype(np.float32)
    expected = model.predict(state, deterministic=True)[0]
    assert expected.std() > 0.02 and bool(expert.layers) == (kind not in IN_TORCH)
    sent = pickle.loads(pickle.dumps(expert))  # to a roll-in worker
    for own in (expert.predict(state), sent.predict(state), [expert.predict(s) for s in state]):
        np.testing.assert_allclose(own, expected, atol=1e-5)
    action = rng.uniform(spaces[1].low, spaces[1].high, (100, *spaces[1].shape)).astype(np.float32)
    scaled = torch.from_numpy(model.policy.scale_action(action)).float()
    state, action = torch.from_numpy(state), torch.from_numpy(action)
    q = torch.cat(model.critic(state, scaled), dim=1)
    own = expert.q_star(state, action)
    assert own.shape == (100, 1) and not own.requires_grad
    torch.testing.assert_close(own, q.min(dim=1, keepdim=True).values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(expert.critics(state, action), q.detach(), rtol=1e-4, atol=1e-5)
    assert q.shape[1] == KINDS[kind].get("n_critics", 2) and own.std() > 0.01


def improver(critics, box=BOXES["asymmetric"], **settings):
    """An agent whose expert always does the same; `critics` are Q_i of (action - that) / scale."""
    policy, config = make_policy(box).float(), Config(**dict(candidates=512) | settings)
    a_star = policy.offset + 0.2 * policy.scale
    expert = SimpleNamespace(
        evaluated=True,
        predict=lambda state: np.tile(a_star.numpy(), (len(state), 1)),
        critics=lambda state, action: critics((action - a_star) / policy.scale),
    )
    return SimpleNamespace(config=config, expert=expert, policy=policy, device="cpu"), a_star


def linear(*slopes):
    """Critics that rise along the action's first dimension by these slopes."""
    return lambda delta: delta[..., :1] * torch.tensor(slopes)


@pytest.mark.parametrize("slopes", [(1.0,), (1.0, -1.0), (1.0, 3.0), (2.0, -0.5)])
def test_improved_action_is_the_pessimistic_softmax_mean_of_the_candidates(slopes):
    agent, a_star = improver(linear(*slopes), candidate_noise=0.15, temperature=0.3)
    improved = improved_action(agent, torch.zeros(300, 4))
    shift = ((improved - a_star) / torch.tensor([2.0, 5.0])).mean(dim=0).numpy()
    delta = np.linspace(-0.9, 0.9, 20_001)  # the expectation, by quadrature
    advantage = np.min([k * delta for k in slopes], axis=0)
    expected = np.average(delta, weights=np.exp(-0.5 * (delta / 0.15) ** 2 + advantage / 0.3))
    assert improved.shape == (300, 2) and len(improved.unique(dim=0)) == 300
    np.testing.assert_allclose(shift, [expected, 0], atol=0.003)


@pytest.mark.parametrize("critics, candidates, evaluated", [
    (linear(1.0), 1, True), (linear(1.0), 512, None),
    (lambda delta: -1e6 * delta.abs().sum(-1, keepdim=True), 512, True),  # nothing is better
])  # fmt: skip
def test_experts_own_action_stays_where_it_is_not_improved(critics, candidates, evaluated):
    agent, a_star = improver(critics, candidates=candidates)
    agent.expert.evaluated = evaluated
    assert torch.equal(improved_action(agent, torch.zeros(5, 4)), a_star.expand(5, -1))


@each_box
def test_small_temperature_picks_the_best_candidate_in_the_range(box):
    agent, _ = improver(linear(1e3), box, candidate_noise=2.0, temperature=1e-6)
    improved = improved_action(agent, torch.zeros(9, 4)).numpy()
    np.testing.assert_allclose(improved[:, 0], box.high[0], rtol=1e-6)
    assert (improved >= box.low - 1e-4).all() and (improved <= box.high + 1e-4).all()


@pytest.mark.parametrize("cut, first", [(20.0, 7.0), (5.0, 5.0)])
def test_gap_weights_by_hand_and_all_weights_are_finite_where_all_is_alike(cut, first):
    q_expert, q_learner = torch.tensor([[3.0, 1, 0, -1], [1, 5, -1, -2]])[..., None]
    # gaps 2, 0 (not -4), 1, 1 have mean 1: the weights are 1 + 3 gap

    def weights(q_expert, q_learner):
        agent = Mock(config=Config(gap_cut=cut), get_q_star=lambda state, action: q_learner)
        return imitate_by_gap(agent, defaultdict(Mock, q_target=q_expert))[2]

    weight = weights(q_expert, q_learner)
    torch.testing.assert_close(weight, torch.tensor([first, 1, 4, 4])[:, None])
    torch.testing.assert_close(weights(70 * q_expert, 70 * q_learner), weight)
    x = torch.ones(4, 1)
    assert torch.equal(weights(x, x), x) and not normalize_q_star(x).any()


@pytest.mark.parametrize("rewards", [np.random.default_rng(0).normal(size=30), np.arange(9)])
@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_returns_to_go_are_discounted_sums(rewards, gamma):
    steps = range(len(rewards))
    expected = [sum(gamma ** (k - t) * rewards[k] for k in steps[t:]) for t in steps]
    np.testing.assert_allclose(audit.returns_to_go(rewards, gamma), expected, atol=1e-12)


def test_score_function_estimates_the_gradient_of_expected_q_star():
    """For Q* = -|u - f(s)|^2, E[Q*] = -|mean(s) - f(s)|^2 - |std(s)|^2."""
    policy, state = make_policy(BOXES["one"], hidden_dim=3), states(200)
    parameters = list(policy.parameters())

    def q_star(s, a):  # the range is [-1, 1]: u = atanh(a)
        return 30 - ((torch.atanh(a) - torch.sin(s[:, :2])) ** 2).sum(dim=1, keepdim=True)

    mean, std = policy(state)
    true = -((mean - torch.sin(state[:, :2])) ** 2 + std**2).sum(dim=1).mean()
    true = parameters_to_vector(torch.autograd.grad(true, parameters))
    agent, estimates = SimpleNamespace(policy=policy, get_q_star=q_star), []
    torch.manual_seed(0)
    for _ in range(400):
        data = FAMILY["score"].targets_and_weights(agent, dict(state=state))
        loss = AggreVateDAgent.loss(agent, *data)  # which is to fall
        estimates.append(-parameters_to_vector(torch.autograd.grad(loss, parameters)))
    own, error = torch.stack(estimates).mean(0), torch.stack(estimates).std(0) / 400**0.5
    scale = own @ true / (true @ true)  # of advantages of deviation 1
    z = (own - scale * true) / error
    assert 0.1 < scale < 10 and z.abs().max() < 4.5 and (z**2).mean() < 1.5
    assert true.norm() > 20 * (error / scale).norm()  # it is no empty comparison


def test_score_function_lets_no_state_outweigh_a_minibatch():
    policy, state = make_policy(BOXES["one"]), states(500)
    agent = SimpleNamespace(policy=policy, get_q_star=lambda s, a: 70 * a[:, :1])
    weight = FAMILY["score"].targets_and_weights(agent, dict(state=state))[2]
    assert weight.std().item() == pytest.approx(1, abs=0.01)  # whatever the scale of Q*
    steepness = 1 + 1e6 * (torch.arange(1000) % 500 == 7)  # both samples of one state
    agent.get_q_star = lambda s, a: a[:, :1] * steepness[:, None]
    weight = FAMILY["score"].targets_and_weights(agent, dict(state=state))[2]
    assert weight.shape == (1000, 1) and weight.abs().max() == 5
    torch.testing.assert_close(weight[:500], -weight[500:])  # what both share is no advantage


def test_conjugate_gradient_solves():
    torch.manual_seed(0)
    half, b = torch.randn(8, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    matrix = half @ half.T + 0.1 * torch.eye(8)
    x = conjugate_gradient(lambda v: matrix @ v, b)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-6, atol=1e-8)
    assert not conjugate_gradient(lambda v: matrix @ v, 0 * b).any()


@pytest.fixture
def problem():
    """A policy, states, and the loss of making some actions likelier there."""
    policy, state = make_policy(BOXES["asymmetric"], state_dim=2, hidden_dim=3), states(30, 2)
    target = torch.tensor([[-1.0, 5.0]]) + torch.tensor([[1.0, 3.0]]) * torch.tanh(states(30, 2, 2))
    return policy, state, lambda policy: -policy.get_log_prob(state, target).mean()


def step_of(policy, loss, state, kl_step):
    """The loss that natural_step returned, and by how much it moved the parameters."""
    before = parameters_to_vector(policy.parameters()).detach().clone()
    loss = natural_step(policy, loss, state, kl_step)
    return loss, parameters_to_vector(policy.parameters()).detach() - before


@pytest.mark.parametrize("kl_step", [1e-6, 0.01])
def test_natural_step_is_the_damped_fisher_direction_scaled_to_the_kl(problem, kl_step):
    policy, state, loss_of = problem
    old, before, (mean, std) = copy.deepcopy(policy)(state), loss_of(policy), policy(state)
    how = dict(inputs=list(policy.parameters()), retain_graph=True, materialize_grads=True)
    # of Gaussians: mean over s of sum (dm dm' / std^2 + 2 dl dl'), l = log std
    outputs = before, *torch.cat([mean / std.detach(), 2**0.5 * std.log()]).flatten()
    rows = torch.stack([parameters_to_vector(torch.autograd.grad(x, **how)) for x in outputs])
    gradient, rows = rows[0], rows[1:]
    matrix = rows.T @ rows / len(state) + 0.1 * torch.eye(len(gradient))
    x = torch.linalg.solve(matrix, -gradient)
    expected = x * (2 * kl_step / (x @ matrix @ x)).sqrt()
    loss, moved = step_of(policy, lambda: loss_of(policy), state, kl_step)
    assert loss == before and loss_of(policy) < before
    assert torch.cosine_similarity(moved, expected, dim=0) > 0.99
    assert (moved.norm() / expected.norm()).item() == pytest.approx(1, abs=0.05)
    assert 0.5 * kl_step < mean_kl(old, policy(state)).item() < 1.5 * kl_step


def elsewhere(policy, loss_of, loss_at):
    """The loss at the parameters of now; loss_at(how far away) at all others."""
    start = parameters_to_vector(policy.parameters()).detach().clone()

    def loss():
        distance = (parameters_to_vector(policy.parameters()).detach() - start).norm().item()
        return loss_at(distance) if distance else loss_of(policy)

    return loss


@pytest.mark.parametrize("worse", [1, 3, 9, 10])
def test_natural_step_is_halved_until_the_loss_falls_or_not_taken(problem, worse):
    policy, state, loss_of = problem
    start, expected = copy.deepcopy(policy), 0.5**worse if worse < 10 else 0
    _, full = step_of(policy, lambda: loss_of(policy), state, 1e-4)
    wall = full.norm().item() * 0.5 ** (worse - 0.5)  # between two halvings
    loss = elsewhere(start, loss_of, lambda distance: 1e9 if distance > wall else -1e9)
    _, moved = step_of(start, loss, state, 1e-4)
    torch.testing.assert_close(moved, expected * full, rtol=1e-4, atol=1e-9)


def test_step_is_halved_until_the_kl_is_small_enough(problem):
    policy, state, loss_of = problem
    old, loss = copy.deepcopy(policy)(state), elsewhere(policy, loss_of, lambda distance: -1e9)
    _, moved = step_of(policy, loss, state, 30.0)  # any step is better
    with torch.no_grad():
        kl, now = mean_kl(old, policy(state)), parameters_to_vector(policy.parameters())
        vector_to_parameters(now + moved, policy.parameters())
        assert 0 < kl <= 1.5 * 30.0 < mean_kl(old, policy(state))
