import base64
import itertools
import json
import pickle
import sys
import zipfile
from types import SimpleNamespace

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import make_sac
from stable_baselines3 import SAC
from torch import nn
from torch.distributions import AffineTransform, Normal, TanhTransform, TransformedDistribution

from aggrevated import (
    AggreVateDAgent, Council, PolicyNetwork, SACExpert, UserError, conjugate_gradient, flatten,
    mean_kl,
)  # fmt: skip

BOXES = {
    "one": gym.spaces.Box(-1, 1, (2,)),
    "two": gym.spaces.Box(-2, 2, (1,)),
    "asymmetric": gym.spaces.Box(np.float32([-3, 0, -0.5]), np.float32([1, 10, 0.5])),
}
PENDULUM = gym.make("Pendulum-v1")
SPACES = PENDULUM.observation_space, PENDULUM.action_space


def policy_on(box, spread=1.0):
    """A float64 learner of 4 observations whose means and deviations vary with the state."""
    torch.manual_seed(0)
    policy = PolicyNetwork(4, box, 16, log_std_min=-5, log_std_max=2).double()
    with torch.no_grad():
        policy.mean.weight.mul_(4 * spread)
        policy.log_std.weight.mul_(4 * spread)
    return policy


def reference(policy, state, box):
    mean, std = policy(state)
    low, high = torch.tensor(box.low).double(), torch.tensor(box.high).double()
    return TransformedDistribution(
        Normal(mean, std), [TanhTransform(), AffineTransform((high + low) / 2, (high - low) / 2)]
    )


def states(n, seed=1):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the learner's density -----------------------------------------------------------------------
@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_log_prob_is_that_of_torch(box):
    policy, state = policy_on(box), states(200)
    share = torch.rand(200, *box.shape, generator=torch.Generator().manual_seed(2)).double()
    low, high = torch.tensor(box.low), torch.tensor(box.high)
    action = low + (0.005 + 0.99 * share) * (high - low)
    expected = reference(policy, state, box).log_prob(action).sum(dim=1, keepdim=True)
    assert expected.shape == (200, 1)
    torch.testing.assert_close(policy.get_log_prob(state, action), expected)


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_sample_and_its_log_prob_are_those_of_torch(box):
    policy, state = policy_on(box), states(200)
    noise = torch.randn(200, *box.shape, generator=torch.Generator().manual_seed(3)).double()
    action, log_prob = policy.sample(state, noise)
    distribution = reference(policy, state, box)
    mean, std = policy(state)
    expected = distribution.transforms[1](torch.tanh(mean + std * noise))
    torch.testing.assert_close(action, expected)
    expected = distribution.log_prob(action).sum(dim=1, keepdim=True)
    torch.testing.assert_close(log_prob, expected, rtol=1e-6, atol=1e-6)
    assert action.requires_grad  # reparameterised


@pytest.mark.parametrize("low, high", [(-1, 1), (-2, 2), (-3, 1), (5, 5.5)])
def test_density_integrates_to_1_over_the_box(low, high):
    policy, n = policy_on(gym.spaces.Box(low, high, (1,)), spread=0.3), 50_000
    nn.init.constant_(policy.log_std.bias, -0.7)
    cell = (high - low) / n
    action = low + cell * (torch.arange(n, dtype=torch.float64)[:, None] + 0.5)
    for state in states(4):
        density = policy.get_log_prob(state.expand(n, 4), action).exp()
        assert density.sum().item() * cell == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("log_std", [-100.0, 0.0, 100.0])  # between the bounds of -5 and 2
@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_values_and_gradients_are_finite_at_the_bounds(box, log_std):
    policy = policy_on(box, spread=10).float()
    nn.init.constant_(policy.log_std.bias, log_std)
    state, low, high = states(3).float(), torch.tensor(box.low), torch.tensor(box.high)
    std = policy(state)[1]
    assert (std >= np.exp(-5.001)).all() and (std <= np.exp(2.001)).all()
    for action in (low, high, low - 1, high + 1, (low + high) / 2):
        policy.zero_grad()
        log_prob = policy.get_log_prob(state, action.expand(3, -1))
        log_prob.sum().backward()
        assert log_prob.isfinite().all()
        assert all(p.grad.isfinite().all() for p in policy.parameters())
    assert torch.equal(
        policy.get_log_prob(state, high.expand(3, -1)),
        policy.get_log_prob(state, high.expand(3, -1) + 1),
    )
    for noise in (-1e3, 0.0, 1e3):
        policy.zero_grad()
        action, log_prob = policy.sample(state, torch.full((3, *box.shape), noise))
        (action.sum() + log_prob.sum()).backward()
        assert log_prob.isfinite().all()
        assert all(p.grad.isfinite().all() for p in policy.parameters())


def test_log_prob_counts_what_is_beyond_the_limit_as_at_it():
    policy, state = policy_on(BOXES["two"]), states(3)
    at = [policy.get_log_prob(state, torch.full((3, 1), a).double(), 0.9) for a in (1.7, 1.9, 2.0)]
    assert torch.equal(at[1], at[2]) and not torch.equal(at[0], at[1])


def test_every_part_of_a_fresh_learner_has_a_gradient():
    torch.manual_seed(0)
    policy = PolicyNetwork(4, BOXES["one"], 16)  # with the bounds it has by default
    policy.get_log_prob(states(50).float(), torch.full((50, 2), 0.9)).sum().backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad != 0).any(), name


def test_inputs_are_standardised_by_the_states_given():
    policy, state = policy_on(BOXES["one"]), states(50)
    offset, scale = torch.tensor([5.0, -3.0, 0.0, 100.0]), torch.tensor([0.1, 2.0, 1.0, 50.0])
    standard = (state - state.mean(dim=0)) / state.std(dim=0, correction=0)
    expected = policy(standard)
    policy.fit_input(offset + scale * state)
    for own, wanted in zip(policy(offset + scale * state), expected, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-6)
    policy.fit_input(torch.ones(5, 4))  # a constant input does no harm
    assert policy(torch.ones(1, 4).double())[0].isfinite().all()


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_log_prob_of_a_sample_is_that_of_its_action(box):
    policy, state = policy_on(box, spread=0.3).float(), states(500).float()
    torch.manual_seed(0)
    action, log_prob = policy.sample(state)
    low, high = torch.tensor(box.low), torch.tensor(box.high)
    inside = ((action - (low + high) / 2).abs() < 0.495 * (high - low)).all(dim=1)
    assert inside.sum() > 250
    torch.testing.assert_close(
        log_prob[inside], policy.get_log_prob(state, action)[inside], rtol=1e-3, atol=2e-3
    )


def test_samples_are_random_and_predictions_are_the_squashed_mean():
    policy, state = policy_on(BOXES["asymmetric"]), states(5)
    assert not torch.equal(policy.sample(state)[0], policy.sample(state)[0])
    mean = policy(state)[0]
    expected = torch.tensor([-1.0, 5.0, 0.0]) + torch.tensor([2.0, 5.0, 0.5]) * torch.tanh(mean)
    torch.testing.assert_close(policy.predict(state), expected)
    torch.testing.assert_close(policy.predict(state), policy.sample(state, 0 * mean)[0])


@pytest.mark.parametrize("pre_tanh", [-100.0, -1.0, 1.0, 100.0])
def test_predict_stays_within_the_bounds(pre_tanh):
    rng = np.random.default_rng(0)
    low = rng.normal(size=2000).astype(np.float32)
    box = gym.spaces.Box(low, low + rng.uniform(0.01, 5, 2000).astype(np.float32))
    policy = PolicyNetwork(4, box, 4)
    nn.init.constant_(policy.mean.bias, pre_tanh)
    action = policy.predict(states(1).float())[0].detach().numpy()
    assert box.contains(action)


# -- the expert against SB3's own ------------------------------------------------------------------
def observations(n=50, seed=0):
    rng = np.random.default_rng(seed)
    angle, speed = rng.uniform(-np.pi, np.pi, n), rng.uniform(-8, 8, n)
    return np.stack([np.cos(angle), np.sin(angle), speed], axis=1).astype(np.float32)


def assert_agrees(expert, model):
    """Actions and Q* of `expert` are those of SB3's `model`, on arrays and on tensors."""
    obs = observations()
    action = np.random.default_rng(1).uniform(-2, 2, (50, 1)).astype(np.float32)
    expected = model.predict(obs, deterministic=True)[0]
    scaled = torch.from_numpy(model.policy.scale_action(action))
    with torch.no_grad():
        q = torch.cat(model.critic(torch.from_numpy(obs), scaled), dim=1)
    q = q.min(dim=1, keepdim=True).values.numpy()
    assert np.abs(expected).max() <= 2 and expected.std() > 0.001 and q.std() > 0.001
    for convert in (np.asarray, torch.from_numpy):
        own = expert.predict(convert(obs)), expert.q_star(convert(obs), convert(action))
        assert all(type(x) is type(convert(obs)) and x.shape == (50, 1) for x in own)
        np.testing.assert_allclose(own[0], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(own[1], q, rtol=1e-4, atol=1e-5)


def amplified(path):
    """The same agent with an actor 6 times as loud, so that its bounds matter."""
    model = SAC.load(path, device="cpu")
    with torch.no_grad():
        for layer in model.actor.mu.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(6)
    model.save(path)
    return path, model


def test_expert_is_sb3s_agent(expert_zip):
    assert_agrees(SACExpert(expert_zip, *SPACES), SAC.load(expert_zip, device="cpu"))


def test_expert_scales_actions_to_1_for_its_critics(expert_zip):
    expert, obs = SACExpert(expert_zip, *SPACES), observations(2)
    with torch.no_grad():
        q = expert.policy.critic(torch.from_numpy(obs), torch.tensor([[-1.0], [0.5]]))
    np.testing.assert_allclose(
        expert.q_star(obs, np.float32([[-2], [1]])), torch.minimum(*q).numpy(), rtol=1e-5
    )


KINDS = {
    "gsde": dict(use_sde=True),
    "gsde_clip_mean": dict(use_sde=True, clip_mean=0.5),
    "gsde_no_clip": dict(use_sde=True, clip_mean=0.0),
    "sizes": dict(net_arch=dict(pi=[8, 24, 8], qf=[32, 12])),
    "tanh": dict(activation_fn=nn.Tanh),
    "elu": dict(activation_fn=nn.ELU),
    "three_critics": dict(n_critics=3),
    "one_layer": dict(net_arch=[20]),
}


@pytest.mark.parametrize("kwargs", KINDS.values(), ids=KINDS)
def test_expert_of_any_architecture(tmp_path, kwargs):
    path, model = amplified(make_sac(tmp_path / "expert.zip", **kwargs))
    assert_agrees(SACExpert(path, *SPACES), model)


def test_expert_is_frozen(expert_zip):
    expert = SACExpert(expert_zip, *SPACES)
    assert list(expert.parameters())
    assert not any(p.requires_grad for p in expert.parameters())
    assert not any(m.training for m in expert.policy.modules())


def test_gradient_of_q_star_reaches_the_action(expert_zip):
    action = torch.zeros(5, 1, requires_grad=True)
    expert = SACExpert(expert_zip, *SPACES)
    expert.q_star(torch.from_numpy(observations(5)), action).sum().backward()
    assert (action.grad != 0).any()


def test_zip_of_2021_loads_and_nothing_is_unpickled(expert_zip, tmp_path, monkeypatch):
    old = tmp_path / "old.zip"
    with zipfile.ZipFile(expert_zip) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    data = json.loads(members["data"])
    missing = base64.b64encode(b"cgym.spaces.box\nBox\n.").decode()
    pickled = [v for v in data.values() if isinstance(v, dict) and ":serialized:" in v]
    assert len(pickled) > 5
    for i, value in enumerate(pickled):
        value[":serialized:"] = "!! no base64 !!" if i % 2 else missing
    members["data"] = json.dumps(data).encode()
    with zipfile.ZipFile(old, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    model = SAC.load(expert_zip, device="cpu")

    def refuse(*_, **__):
        raise AssertionError("something was unpickled")

    for module in (pickle, cloudpickle):
        monkeypatch.setattr(module, "load", refuse)
        monkeypatch.setattr(module, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    with pytest.raises(AssertionError, match="unpickled"):  # by SB3 itself
        SAC.load(old, device="cpu")
    assert_agrees(SACExpert(old, *SPACES), model)
    assert "gym" not in sys.modules


# -- several experts -------------------------------------------------------------------------------
def council(tmp_path, how):
    experts = [
        SACExpert(make_sac(tmp_path / f"{i}.zip", seed=i), *SPACES)
        for i in range(3)
    ]  # fmt: skip
    return experts, Council(experts, how, 0.0)


@pytest.mark.parametrize("how", ["mean", "min", "max"])
def test_council_takes_the_action_its_combined_q_star_values_most(tmp_path, how):
    experts, together = council(tmp_path, how)
    obs = observations(50)
    chosen, value = together.predict(obs), together.q_star(obs, together.predict(obs))
    reduce = dict(mean=np.mean, min=np.min, max=np.max)[how]
    of_each = []
    for member in experts:
        action = member.predict(obs)
        q = reduce([e.q_star(obs, action) for e in experts], axis=0)
        np.testing.assert_allclose(together.q_star(obs, action), q, rtol=1e-5, atol=1e-6)
        of_each.append(q)
    best = np.argmax(of_each, axis=0)[:, 0]
    assert len(set(best)) > 1  # or the choice would not be seen
    np.testing.assert_allclose(value, np.max(of_each, axis=0), rtol=1e-5, atol=1e-6)
    own = np.stack([e.predict(obs) for e in experts])
    np.testing.assert_allclose(chosen, own[best, np.arange(50)], rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.05, 10.0])
def test_council_mixes_actions_by_softmax_of_q_star(tmp_path, temperature):
    experts, _ = council(tmp_path, "mean")
    together = Council(experts, "mean", temperature)
    obs = observations(50)
    actions = np.stack([e.predict(obs) for e in experts]).astype(np.float64)
    q = np.stack([np.mean([e.q_star(obs, a) for e in experts], axis=0) for a in actions])
    share = np.exp((q - q.max(axis=0)) / temperature)
    mixed = (share * actions).sum(axis=0) / share.sum(axis=0)
    np.testing.assert_allclose(together.predict(obs), mixed, rtol=1e-4, atol=1e-4)
    assert np.abs(mixed - actions).min(axis=0).max() > 0.01  # no member's own action


def test_council_of_one_discount(tmp_path):
    experts, _ = council(tmp_path, "mean")
    experts[1].gamma = 0.5
    with pytest.raises(UserError, match="discount"):
        Council(experts, "mean", 0.0)


# -- the natural gradient --------------------------------------------------------------------------
def test_conjugate_gradient_solves():
    torch.manual_seed(0)
    half, b = torch.randn(12, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    matrix = half @ half.T + 0.1 * torch.eye(12)
    x = conjugate_gradient(lambda v: matrix @ v, b, 30)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-6, atol=1e-8)
    assert not conjugate_gradient(lambda v: matrix @ v, 0 * b, 30).any()


def explicit_fisher(policy, state):
    """E_a[grad log pi grad log pi^T] by Gauss-Hermite quadrature over u, averaged over states."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    weights = torch.from_numpy(weights / weights.sum())
    parameters, total = list(policy.parameters()), 0
    for s in state[:, None]:
        for i, j in itertools.product(range(8), repeat=2):
            mean, std = policy(s)
            u = mean + std * torch.tensor([nodes[i], nodes[j]])
            log_prob = policy._log_prob(u.detach(), mean, std)
            g = flatten(torch.autograd.grad(log_prob.sum(), parameters))
            total = total + weights[i] * weights[j] * torch.outer(g, g)
    return total / len(state)


def test_fisher_product_is_that_of_the_explicit_matrix():
    torch.manual_seed(0)
    policy, state = PolicyNetwork(4, BOXES["one"], 3).double(), states(5)
    agent = SimpleNamespace(policy=policy, config=SimpleNamespace(cg_damping=0.1))
    product = AggreVateDAgent.fisher_product(agent, state)
    fisher = explicit_fisher(policy, state)
    assert torch.linalg.matrix_rank(fisher) > 10
    for _ in range(3):
        v = torch.randn(len(fisher), dtype=torch.float64)
        torch.testing.assert_close(product(v), fisher @ v + 0.1 * v, rtol=1e-6, atol=1e-9)


def test_natural_step_goes_as_far_as_it_may():
    torch.manual_seed(0)
    policy, state = PolicyNetwork(4, BOXES["one"], 8).double(), states(200)
    config = SimpleNamespace(cg_damping=1e-3, cg_iterations=20, kl_step=0.01)
    agent = SimpleNamespace(policy=policy, config=config)
    agent.fisher_product = lambda s: AggreVateDAgent.fisher_product(agent, s)
    agent.loss = lambda s, a, w: -(w * policy.get_log_prob(s, a)).mean()
    target, weight = 0.5 * torch.tanh(states(200)[:, :2]), torch.ones(200, 1).double()
    with torch.no_grad():
        old = policy(state)
    before, norm = AggreVateDAgent.natural_step(agent, state, target, weight)
    with torch.no_grad():
        kl, after = mean_kl(old, policy(state)), agent.loss(state, target, weight)
    assert 0.005 < kl < 0.015 and after < before and norm > 0
    start, first = flatten(policy.parameters()).clone(), iter([agent.loss])
    agent.loss = lambda *batch: next(first, lambda *_: torch.tensor(1e9))(*batch)
    AggreVateDAgent.natural_step(agent, state, target, weight)  # no step lowers this loss
    torch.testing.assert_close(flatten(policy.parameters()), start, rtol=0, atol=0)
