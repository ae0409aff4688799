"""The mathematics, against sources that share no code with it."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import distributions as D, nn
from torch.nn.utils import parameters_to_vector

from aggrevated import ALGORITHMS, INPUT_BOUND, LOG_STD_MAX, LOG_STD_MIN, AggreVateDAgent, Config
from aggrevated import NumpyPolicy, PolicyNetwork, SACExpert

BOXES = {
    "one": Box(-1, 1, (2,)), "far": Box(100, 101, (1,)),
    "asymmetric": Box(np.float32([-3, 0]), np.float32([1, 10])),
    "double": Box(np.array([-0.3]), np.array([0.1]), dtype=np.float64),
}  # fmt: skip
each_box = pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)


def make_policy(box, hidden_dim=16):
    """A float64 learner whose means and deviations vary with the state."""
    torch.manual_seed(0)
    policy = PolicyNetwork(Box(-1, 1, (4,)), box, hidden_dim).double()
    policy.mean.weight.data *= 3
    policy.log_std.weight.data *= 20
    policy.state_mean += 0.3
    policy.state_std *= 1.7
    return policy


def states(n, dim=4, seed=1):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@each_box
def test_log_prob_is_torchs_of_the_action_clipped_to_99_percent_of_the_range(box):
    policy, state = make_policy(box), states(200)
    squash = [D.TanhTransform(), D.AffineTransform(policy.offset, policy.scale)]
    x = torch.linspace(-1.2, 1.2, 200)[:, None].double().expand(-1, *box.shape)
    own = policy.get_log_prob(state, policy.offset + policy.scale * x)
    inside = policy.offset + policy.scale * x.clamp(-0.99, 0.99)
    expected = D.TransformedDistribution(D.Normal(*policy(state)), squash).log_prob(inside)
    torch.testing.assert_close(own, expected.sum(1, keepdim=True), rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy's, of an overflow
@pytest.mark.parametrize("bias", [-1000.0, 0.0, 1000.0])
@each_box
def test_values_and_gradients_are_finite_at_the_ends_of_the_range(box, bias):
    policy, state = make_policy(box).float(), states(3).float()
    nn.init.constant_(policy.log_std.bias, bias)
    acted, (mean, std) = NumpyPolicy(policy.state_dict()).act(state.numpy(), 1.0), policy(state)
    torch.testing.assert_close(torch.from_numpy(acted), policy.squash(mean + std))
    assert (std.log() > LOG_STD_MIN - 0.001).all() and (std.log() < LOG_STD_MAX + 0.001).all()
    low, high = torch.tensor(np.array([box.low, box.high])).float().expand(3, 2, -1).unbind(1)
    for action in (low, high, low - 1, high + 1, (low + high) / 2):
        log_prob = policy.get_log_prob(state, action)
        gradient = torch.autograd.grad(log_prob.sum(), list(policy.parameters()))
        assert all(x.isfinite().all() for x in (log_prob, *gradient))
        assert bias or all((x != 0).any() for x in gradient)


@each_box
def test_torch_and_numpy_are_the_same_squashed_network_of_standardised_bounded_inputs(box):
    policy, state = make_policy(box).float(), states(99).float()
    first = state[:50]
    first[:, 2], state[50:60, 2] = 7.0, 7.004  # constant at first, but not for ever
    state[60:] *= 20
    policy.standardise_inputs(first)
    x = (state - first.mean(dim=0)) / first.std(dim=0, correction=0).clamp(min=1e-3)
    own, gelu = NumpyPolicy(policy.state_dict()), nn.GELU(approximate="tanh")
    network = nn.Sequential(policy.fc1, gelu, policy.fc2, gelu, policy.mean)
    u = network(x.clamp(-INPUT_BOUND, INPUT_BOUND)).detach().double().numpy()
    (low, high), z = np.float64([box.low, box.high]), np.random.default_rng(0).normal(size=u.shape)
    mean, std, state = policy.predict(state).detach(), policy(state)[1].detach(), state.numpy()
    bound = 1e-6 * (high - low) + 3 * np.spacing(np.float32(high))  # 101's neighbours are 8e-6 away
    rows = np.array([own.act(*x) for x in zip(state, z, strict=True)])
    for action, noise in (mean.numpy(), 0), (own.act(state), 0), (own.act(state, z), z), (rows, z):
        expected = (low + high) / 2 + (high - low) / 2 * np.tanh(u + std.numpy() * noise)
        assert action.shape == u.shape and action.dtype == np.float32
        assert (np.abs(action - expected) <= bound).all()


@pytest.mark.parametrize("factors", [(1.05, 1), (1, 1.05)])  # of mean and deviation
def test_network_that_acts_otherwise_than_it_learns_is_refused(make_agent, monkeypatch, factors):
    forward = PolicyNetwork.forward
    monkeypatch.setattr(PolicyNetwork, "forward", lambda *x: map(torch.mul, forward(*x), factors))
    with pytest.raises(AssertionError):
        make_agent()


def test_predict_draws_noise_of_its_own_for_every_row_and_dimension():
    policy, state = make_policy(BOXES["asymmetric"]).float(), states(3000).float()
    mean, std = (x.detach() for x in policy(state))
    np.random.seed(0)
    predict = partial(NumpyPolicy(policy.state_dict()).predict, deterministic=False)
    for action in predict(state.numpy())[0], np.array([predict(s)[0] for s in state.numpy()]):
        u = torch.atanh((torch.from_numpy(action) - policy.offset) / policy.scale)
        assert_standard_normal((u - mean) / std, 0.08)


def assert_standard_normal(z, tolerance):
    assert len(z.unique()) > 0.99 * z.numel() and z.mean().abs() < tolerance and z.max() > 3
    torch.testing.assert_close(torch.cov(z.T), torch.eye(2).to(z), rtol=0, atol=tolerance)


class Fake(SACExpert):
    """An expert with critics of (..., state and action in [-1, 1])."""

    def __init__(self, *critics, box=BOXES["one"]):
        self.low, self.high, self.critics = np.float32(box.low), np.float32(box.high), critics


def test_mean_action_is_as_good_as_the_worst_critic_says():
    q = torch.tensor([[5.0, 2, 9], [0, 4, 2], [7, 7, 1], [3, 2, 1]])
    v_star = torch.tensor([[1.0, 3, 8], [3, 1, 1], [0, 5, 6], [2, 0, 0]])
    expert = Fake(*[lambda x, i=i: x[:, i : i + 1] + x[:, :1] + x[:, 3:4] for i in range(3)])
    policy = SimpleNamespace(predict=lambda state: -state[:, :1])
    data = dict(state=q.repeat(1001, 1), v_star=v_star.repeat(1001, 1))
    gap = AggreVateDAgent.gap(SimpleNamespace(policy=policy, expert=expert), data)
    torch.testing.assert_close(gap, torch.tensor([[1.0], [3], [5], [-1]]).repeat(1001, 1))


@pytest.mark.parametrize("critics", [  # of d, which is 0 at a*
    [lambda d: d], [lambda d: d, lambda d: 9 - d], [lambda d: 3 + d, lambda d: 3 * d],
    [lambda d: 6 * d * d, lambda d: 1 + 0.7 * d], [lambda d: 5 + d, lambda d: 0.2 - 4 * abs(d)],
])  # fmt: skip
def test_improved_action_is_the_softmax_mean_of_candidates_by_their_advantage(critics):
    # the state is a sign: what is good in one is bad in another; the first half is not evaluated
    asked = [lambda x, q=q: q(x[..., :1] * (x[..., 1:2] - 0.2)) for q in critics]
    expert = Fake(*[lambda x: -9 * x[..., 1:2] for _ in asked], *asked, box=BOXES["asymmetric"])
    sign, a_star = torch.ones(300, 1), torch.tensor([[-0.6, 6.0]]).expand(300, 2)
    sign[::2] = -1
    torch.manual_seed(0)
    improved = expert.improve(sign, a_star, 512, 0.15, 0.3)
    shift = (sign * (improved - a_star) / torch.tensor([2.0, 5])).mean(dim=0)
    d = np.linspace(-0.9, 0.9, 20_001)  # the expectation, by quadrature
    advantage = np.min([q(d) - q(0) for q in critics], axis=0)
    expected = np.average(d, weights=np.exp(-0.5 * (d / 0.15) ** 2 + advantage / 0.3))
    np.testing.assert_allclose(shift, [expected, 0], atol=0.002)
    assert improved.shape == (300, 2) and len(improved.unique(dim=0)) == 300


@each_box
def test_improved_action_is_in_the_range_and_a_star_where_nothing_is_better(box):
    low, high = torch.tensor(np.float32([box.low, box.high]))
    data = torch.zeros(9, 4), (low + 0.6 * (high - low)).expand(9, -1)
    best = Fake(lambda x: 1e3 * x[..., 4:5], box=box).improve(*data, 512, 2.0, 1e-6)
    np.testing.assert_allclose(best[:, 0], high[0].expand(9), rtol=1e-6)
    assert (best >= low - 1e-4).all() and (best <= high + 1e-4).all()
    peaked = Fake(lambda x: -1e6 * (x[..., 4:] - 0.2).abs().sum(-1, keepdim=True), box=box)
    assert torch.equal(peaked.improve(*data, 512, 2.0, 1e-6), data[1])


@pytest.mark.parametrize("algorithm, gap_factor, weight", [
    ("weighted", 3, [7, 1, 4, 4]), ("weighted", 15, [20, 1, 16, 16]),  # 31 is cut to 20
    *[(x, 3, [1, 1, 1, 1]) for x in ALGORITHMS if x != "weighted"],
])  # fmt: skip
def test_states_are_drawn_in_proportion_to_weights_by_hand(algorithm, gap_factor, weight):
    config = Config(algorithm=algorithm, gap_factor=gap_factor, update_sz=20_000, train_repeat=2)
    gap = torch.tensor([[2.0], [-4], [1], [1]])  # of which -4 counts as 0; their mean is 1
    for k, w in (1.0, weight), (1e-6, weight), (70.0, weight), (0.0, [1, 1, 1, 1]):
        agent = SimpleNamespace(config=config, gap=lambda data: k * gap)
        agent.data = dict(state=torch.zeros(4, 3), v_star=torch.full((4, 2), k))
        torch.manual_seed(0)
        counts = torch.bincount(AggreVateDAgent.draw(agent), minlength=4)
        expected = 40_000 * torch.tensor(w) / sum(w)
        assert counts.sum() == 40_000 and ((counts - expected) / expected.sqrt()).abs().max() < 4.5


def learner(critic, n=200, hidden_dim=16, **settings):
    """What `loss` needs: an agent with this critic; its states, a* and Q*(s, a*)."""
    policy, expert = make_policy(BOXES["one"], hidden_dim), Fake(critic)
    agent = SimpleNamespace(policy=policy, config=Config(**settings), expert=expert)
    a_star = torch.linspace(-1, 1, 2 * n).reshape(n, 2).double()
    return agent, states(n), a_star, expert.q_values(states(n), a_star)


def loss_and_gradient(agent, *data):
    loss = AggreVateDAgent.loss(agent, *data)
    gradient = torch.autograd.grad(loss, list(agent.policy.parameters()))
    return loss.detach(), parameters_to_vector(gradient)


def test_loss_has_the_gradient_of_the_expected_advantage():
    """For Q* = -|u - f(s)|^2, E[A*] = -|mean(s) - f(s)|^2 - |std(s)|^2 - Q*(s, a*)."""
    drawn, deviations, estimates, v_star = [], [], [], states(200, 1, seed=2)

    def critic(x):  # the range is [-1, 1]: u = atanh(a)
        drawn.append(torch.atanh(x[:, 4:]))
        q = 30 - ((drawn[-1] - torch.sin(x[:, :2])) ** 2).sum(dim=1, keepdim=True)
        deviations.append((q - v_star).detach().std())
        return q

    agent, state, a_star, _ = learner(critic, hidden_dim=3, bc_weight=0.0)
    (mean, std), parameters = agent.policy(state), list(agent.policy.parameters())
    true = -((mean - torch.sin(state[:, :2])) ** 2 + std**2).sum(dim=1).mean()
    true = parameters_to_vector(torch.autograd.grad(true, parameters, retain_graph=True))
    torch.manual_seed(0)
    for _ in range(300):  # the loss is descended, and of advantages of deviation 1
        gradient = loss_and_gradient(agent, state, a_star, v_star)[1]
        estimates.append(-deviations[-1] * gradient)
    own, error = torch.stack(estimates).mean(0), torch.stack(estimates).std(0) / 300**0.5
    scale = (own @ true / (true @ true)).item()
    z = (own - scale * true) / error
    assert scale == pytest.approx(1, abs=0.01) and z.abs().max() < 4.5 and (z**2).mean() < 2
    z = ((torch.stack(drawn[1:]) - mean) / std).detach()  # drawn anew by every loss
    assert_standard_normal(z.flatten(0, 1), 0.03)


@pytest.mark.parametrize("steepness", [0.0, 1.0])  # 0: all advantages are equal
@pytest.mark.parametrize("n", [1, 200])
def test_gradient_is_finite_and_does_not_depend_on_the_scale_of_q(n, steepness):
    gradients = []
    for k in (1.0, 1e-6, 1e6):
        agent, *data = learner(lambda x: k * (5 + steepness * x.prod(dim=1, keepdim=True)), n=n)
        agent.policy.float()
        torch.manual_seed(0)
        loss, gradient = loss_and_gradient(agent, *(x.float() for x in data))
        assert loss.isfinite() and gradient.isfinite().all()
        gradients.append(gradient / gradient.norm() if n == 1 else gradient)
    torch.testing.assert_close(gradients[1:], 2 * gradients[:1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_imitation_makes_a_star_likelier(algorithm):
    data = learner(lambda x: 0 * x[:, 4:5], algorithm=algorithm, bc_weight=0.3)
    weight = 0.3 if algorithm == "aggrevated" else 1
    expected = -weight * data[0].policy.get_log_prob(*data[1:3]).mean()
    torch.testing.assert_close(AggreVateDAgent.loss(*data), expected)
