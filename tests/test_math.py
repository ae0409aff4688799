import copy
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import tiny_envs  # noqa: F401  (registers them)
import torch
from conftest import make_sac
from torch import nn
from torch.distributions import Normal
from torch.nn.utils import parameters_to_vector

from aggrevated import (
    AggreVateDAgent, PolicyNetwork, SACExpert, conjugate_gradient, gap_weights, mean_kl,
    natural_step, returns_to_go, standardise,
)  # fmt: skip

BOXES = {
    "one": gym.spaces.Box(-1, 1, (2,)),
    "two": gym.spaces.Box(-2, 2, (1,)),
    "narrow": gym.spaces.Box(5, 5.5, (1,)),
    "asymmetric": gym.spaces.Box(np.float32([-3, 0]), np.float32([1, 10])),
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


def ends(box):
    return torch.as_tensor(box.low).double(), torch.as_tensor(box.high).double()


@each_box
def test_log_prob_is_a_gaussians_after_a_change_of_variables(box):
    policy, state, (low, high) = make_policy(box), states(200), ends(box)
    y = 1.98 * torch.rand(200, len(low), dtype=torch.float64) - 0.99
    mean, std = policy(state)
    slope = (high - low) / 2 * (1 - y**2)  # of the action by u
    expected = (Normal(mean, std).log_prob(torch.atanh(y)) - slope.log()).sum(1, keepdim=True)
    log_prob = policy.get_log_prob(state, low + (y + 1) / 2 * (high - low))
    assert log_prob.shape == (200, 1)
    torch.testing.assert_close(log_prob, expected)


@each_box
def test_density_integrates_to_1(box):
    policy, (low, high), n = make_policy(box), ends(box), 20_000 if box.shape == (1,) else 300
    axes = [a + (b - a) * (torch.arange(n) + 0.5) / n for a, b in zip(low, high)]
    action = torch.cartesian_prod(*axes).view(-1, len(low))
    cell = ((high - low) / n).prod().item()
    for state in states(3):
        density = policy.get_log_prob(state.expand(len(action), -1), action).exp()
        assert density.sum().item() * cell == pytest.approx(1, abs=1e-3)


@each_box
def test_samples_have_the_distribution_and_the_log_prob_of_the_policy(box):
    policy, state, (low, high) = make_policy(box), states(1).expand(20_000, -1), ends(box)
    action, log_prob = policy.sample(state)
    assert action.shape == (20_000, len(low)) and log_prob.shape == (20_000, 1)
    mean, std = (x[0].detach() for x in policy(state))
    z = (torch.atanh(2 * (action.detach() - low) / (high - low) - 1) - mean) / std
    assert z.mean(0).abs().max() < 0.03 and (z.std(0) - 1).abs().max() < 0.03
    torch.testing.assert_close(log_prob, policy.get_log_prob(state, action), rtol=1e-4, atol=1e-4)
    action.sum().backward()  # reparameterised
    assert (policy.mean.bias.grad != 0).all() and (policy.log_std.bias.grad != 0).all()


@pytest.mark.parametrize("bias", [-100.0, 0.0, 100.0])
@each_box
def test_values_and_gradients_are_finite_at_the_bounds(box, bias):
    policy, state = make_policy(box).float(), states(3).float()
    nn.init.constant_(policy.log_std.bias, bias)
    std = policy(state)[1]
    assert (std >= np.exp(-2.001)).all() and (std <= np.exp(-0.999)).all()
    low, high = (x.float().expand(3, -1) for x in ends(box))
    for action in (low, high, low - 1, high + 1, (low + high) / 2):
        policy.zero_grad()
        log_prob = policy.get_log_prob(state, action)
        log_prob.sum().backward()
        assert log_prob.isfinite().all()
        assert all(p.grad.isfinite().all() for p in policy.parameters())
        assert bias or all((p.grad != 0).any() for p in policy.parameters())


@each_box
def test_prediction_is_the_squashed_mean_of_standardised_inputs(box):
    policy, state, (low, high) = make_policy(box), states(50), ends(box)
    layers = policy.fc1, nn.GELU(), policy.fc2, nn.GELU(), policy.mean
    mean = nn.Sequential(*layers)((state - 0.3) / 1.7)
    expected = low + (high - low) * (torch.tanh(mean) + 1) / 2
    torch.testing.assert_close(policy.predict(state), expected)


@each_box
def test_act_is_the_same_policy(box):
    policy, state = make_policy(box).float(), states(50).float()
    noise = torch.randn(50, *box.shape)
    mean, std = policy(state)
    sampled = policy.offset + policy.scale * torch.tanh(mean + std * noise)
    for eps, expected in ((noise, sampled), (0 * noise, policy.predict(state))):
        action = policy.act(state.numpy(), eps.numpy())
        np.testing.assert_allclose(action, expected.detach().numpy(), atol=1e-5)


def test_inside_cuts_actions_to_a_share_of_the_range():
    policy = make_policy(BOXES["asymmetric"])  # [-3, 1] x [0, 10]: 99 % are [-2.98, 0.98] x ...
    action = torch.tensor([[-3.0, 10.0], [1.0, 0.0], [0.97, 9.94], [-50, 50]])
    expected = torch.tensor([[-2.98, 9.95], [0.98, 0.05], [0.97, 9.94], [-2.98, 9.95]])
    torch.testing.assert_close(policy.inside(action).float(), expected)
    torch.testing.assert_close(policy.inside(action, 0.5)[0].float(), torch.tensor([-2, 7.5]))


KINDS = {
    "plain": {},
    "asymmetric box": dict(env_id="tiny_envs:Lopsided-v0"),
    "gsde": dict(use_sde=True),
    "gsde, other clip": dict(use_sde=True, clip_mean=0.5),
    "sizes": dict(net_arch=dict(pi=[8, 24, 8], qf=[32, 12])),
    "tanh": dict(activation_fn=nn.Tanh),
    "elu": dict(activation_fn=nn.ELU),
    "one critic": dict(n_critics=1),
    "three critics": dict(n_critics=3),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_expert_is_sb3s_agent(tmp_path, kind):
    model = make_sac(tmp_path / "expert.zip", **kind)
    spaces = model.observation_space, model.action_space
    expert, rng = SACExpert(tmp_path / "expert.zip", *spaces), np.random.default_rng(0)
    state = rng.normal(size=(100, 3)).astype(np.float32)
    low, high = spaces[1].low, spaces[1].high
    action = rng.uniform(low, high, (100, len(low))).astype(np.float32)
    expected = model.predict(state, deterministic=True)[0]
    assert expected.std() > 0.05
    np.testing.assert_allclose(expert.predict(state), expected, atol=1e-5)
    scaled = torch.from_numpy(model.policy.scale_action(action))
    state, action = torch.from_numpy(state), torch.from_numpy(action)
    q = torch.cat(model.critic(state, scaled), dim=1)
    own = expert.q_star(state, action)
    assert own.shape == (100, 1) and not own.requires_grad
    torch.testing.assert_close(own, q.min(dim=1, keepdim=True).values)
    assert q.shape[1] == kind.get("n_critics", 2) and own.std() > 0.01


def column(*values):
    return torch.tensor(values)[:, None]


def test_gap_weights_by_hand():
    q_expert, q_learner = column(3.0, 1.0, 0.0, -1.0), column(1.0, 5.0, -1.0, -2.0)
    # gaps 2, 0 (not -4), 1, 1 have mean 1: weights 1 + 3 gap = 7, 1, 4, 4; the cut takes 7 to 5
    weight = gap_weights(q_expert, q_learner, factor=3.0, cut=20.0)
    torch.testing.assert_close(weight, column(7.0, 1.0, 4.0, 4.0) / 4)
    weight = gap_weights(q_expert, q_learner, factor=3.0, cut=5.0)
    torch.testing.assert_close(weight, column(5.0, 1.0, 4.0, 4.0) / 3.5)


def test_gap_weights_have_mean_1_follow_the_gap_and_know_no_scale():
    q_expert, q_learner = torch.randn(2, 500, 1, generator=torch.Generator().manual_seed(0))
    weight = gap_weights(q_expert, q_learner, 3.0, 20.0)
    assert weight.shape == (500, 1) and weight.mean().item() == pytest.approx(1, abs=1e-5)
    assert (weight[(q_expert - q_learner).argsort(dim=0)[:, 0]].diff(dim=0) >= 0).all()
    scaled = gap_weights(70 * q_expert + 9, 70 * q_learner + 9, 3.0, 20.0)
    torch.testing.assert_close(weight, scaled, rtol=1e-4, atol=1e-4)
    assert torch.equal(gap_weights(q_expert, q_expert, 3.0, 20.0), torch.ones(500, 1))


def test_q_star_is_normalised_to_0_1_and_advantages_to_mean_0_and_deviation_1():
    normalise = AggreVateDAgent.normalize_q_star
    torch.testing.assert_close(normalise(column(-4.0, 0.0, 1.0, 6.0)), column(0.0, 0.4, 0.5, 1.0))
    x = standardise(column(1.0, 3.0, 5.0, 7.0))
    torch.testing.assert_close(x, column(-3.0, -1.0, 1.0, 3.0) / 5**0.5)
    assert all(f(column(2.0, 2.0)).isfinite().all() for f in (normalise, standardise))


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_returns_to_go_are_discounted_sums(gamma):
    rewards = np.random.default_rng(0).normal(size=30)
    expected = [sum(gamma ** (k - t) * rewards[k] for k in range(t, 30)) for t in range(30)]
    np.testing.assert_allclose(returns_to_go(rewards, gamma), expected, atol=1e-12)


def test_returns_to_go_of_whole_rewards():
    np.testing.assert_allclose(returns_to_go(np.array([1, 1, 1]), 0.5), [1.75, 1.5, 1])


def test_mean_kl_is_that_of_diagonal_gaussians():
    torch.manual_seed(0)
    m, n = torch.randn(2, 50, 3, dtype=torch.float64)
    s, t = torch.rand(2, 50, 3, dtype=torch.float64) + 0.1
    kl = (t / s).log() + (s**2 + (m - n) ** 2) / (2 * t**2) - 0.5
    torch.testing.assert_close(mean_kl((m, s), (n, t)), kl.sum(dim=1).mean())


def test_conjugate_gradient_solves():
    torch.manual_seed(0)
    half, b = torch.randn(12, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    matrix = half @ half.T + 0.1 * torch.eye(12)
    x = conjugate_gradient(lambda v: matrix @ v, b, 30)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-6, atol=1e-8)
    assert not conjugate_gradient(lambda v: matrix @ v, 0 * b, 30).any()


def explicit_fisher(policy, state):
    """Of Gaussians: mean over s of sum (dm dm' / std^2 + 2 dl dl'), l = log std."""
    parameters, total = list(policy.parameters()), 0
    for s in state[:, None]:
        mean, std = policy(s)
        for row in [*(mean / std.detach())[0], *(2**0.5 * std.log())[0]]:
            g = torch.autograd.grad(row, parameters, retain_graph=True, allow_unused=True)
            g = [torch.zeros_like(p) if x is None else x for p, x in zip(parameters, g)]
            total = total + torch.outer(*2 * [parameters_to_vector(g)])
    return total / len(state)


@pytest.fixture
def problem():
    """A policy, states, and the loss of making some actions likelier there."""
    policy, state = make_policy(BOXES["asymmetric"], state_dim=2, hidden_dim=3), states(30, 2)
    target = policy.inside(torch.tensor([[-1.0, 2.0]]) + 4 * torch.tanh(states(30, 2, seed=2)), 0.7)
    return policy, state, lambda policy: -policy.get_log_prob(state, target).mean()


def step_of(policy, loss, state, kl_step):
    """The loss that natural_step returned, and by how much it moved the parameters."""
    before = parameters_to_vector(policy.parameters()).detach().clone()
    loss = natural_step(policy, loss, state, kl_step)
    return loss, parameters_to_vector(policy.parameters()).detach() - before


@pytest.mark.parametrize("kl_step", [1e-6, 0.01])
def test_natural_step_is_the_damped_fisher_direction_scaled_to_the_kl(problem, kl_step):
    policy, state, loss_of = problem
    old, before = copy.deepcopy(policy)(state), loss_of(policy)
    gradient = parameters_to_vector(torch.autograd.grad(before, list(policy.parameters())))
    matrix = explicit_fisher(policy, state) + 0.1 * torch.eye(len(gradient))
    x = torch.linalg.solve(matrix, -gradient)
    expected = x * (2 * kl_step / (x @ matrix @ x)).sqrt()
    loss, moved = step_of(policy, lambda: loss_of(policy), state, kl_step)
    assert loss == before and loss_of(policy) < before
    assert torch.cosine_similarity(moved, expected, dim=0) > 0.99
    assert (moved.norm() / expected.norm()).item() == pytest.approx(1, abs=0.05)
    assert 0.5 * kl_step < mean_kl(old, policy(state)).item() < 1.5 * kl_step


@pytest.mark.parametrize("worse", [1, 3, 9, 10])
def test_natural_step_is_halved_until_the_loss_falls_or_not_taken(problem, worse):
    policy, state, loss_of = problem
    start, expected = copy.deepcopy(policy), 0.5**worse if worse < 10 else 0
    _, full = step_of(policy, lambda: loss_of(policy), state, 1e-4)
    losses = iter([None, *worse * [1e9], -1e9])
    _, moved = step_of(start, lambda: next(losses) or loss_of(start), state, 1e-4)
    torch.testing.assert_close(moved, expected * full, rtol=1e-4, atol=1e-9)


def test_natural_step_is_halved_until_the_kl_is_small_enough(problem):
    policy, state, loss_of = problem
    old, losses = copy.deepcopy(policy)(state), iter([None, *10 * [-1e9]])  # any step is better
    step_of(policy, lambda: next(losses) or loss_of(policy), state, 0.3)
    assert 0.1 < mean_kl(old, policy(state)).item() <= 1.5 * 0.3


def test_score_function_estimates_the_gradient_of_expected_q_star():
    policy, state = make_policy(BOXES["one"], hidden_dim=4), states(50)

    def q_star(s, a):
        return 30 - ((a - torch.sin(s[:, :2])) ** 2 * torch.tensor([1.0, 2.0])).sum(1, keepdim=True)

    torch.manual_seed(0)
    many, parameters = state.repeat(1000, 1), list(policy.parameters())
    true = torch.autograd.grad(q_star(many, policy.sample(many)[0]).mean(), parameters)
    config = SimpleNamespace(algorithm="score")
    agent = SimpleNamespace(config=config, policy=policy, get_q_star=q_star)
    data = AggreVateDAgent.weigh(agent, dict(state=many))
    own = torch.autograd.grad(AggreVateDAgent.loss(agent, *data), parameters)
    true, own = parameters_to_vector(true), -parameters_to_vector(own)  # a loss is to fall
    assert torch.cosine_similarity(own, true, dim=0) > 0.95
