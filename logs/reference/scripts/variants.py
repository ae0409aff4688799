"""Other learners, for the study's ablations: a row's `variant` in rows.json is one of VARIANTS."""

from types import SimpleNamespace
from unittest import mock

from common import ag
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn.utils import parameters_to_vector, vector_to_parameters

USUAL = ag.AggreVateDAgent


class OwnStates(USUAL):
    """An update draws from the newest iteration's states only."""

    def label(self, trajectories):
        self.data = {}  # what was kept
        return super().label(trajectories)


class OneStep(OwnStates):
    """An update is one step of Adam, in all of the newest iteration's states; its moments stay."""

    moments: dict = {}

    def update(self, lr):
        optimizer = torch.optim.Adam(self.policy.parameters())
        if self.moments:
            optimizer.load_state_dict(self.moments)
        optimizer.param_groups[0]["lr"] = lr
        loss = self.loss(**self.data)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 10.0)
        optimizer.step()
        self.moments = optimizer.state_dict()
        return loss.item()


class MinQ(USUAL):
    """A*(s, a) = min_i Q_i(s, a) - min_i Q_i(s, a*), instead of the min of the differences."""

    def label(self, trajectories):
        new = super().label(trajectories)
        new["v_star"] = new["v_star"].amin(dim=1, keepdim=True).repeat(1, new["v_star"].shape[1])
        return new


class Score(USUAL):
    """The paper's gradient by the likelihood ratio: mean of A*(s, a) grad log pi(a|s), a ~ pi."""

    samples, baseline = 2, False

    def loss(self, state, a_star, v_star):
        mean, std = self.policy(state)
        u = (mean + std * torch.randn(self.samples, *mean.shape)).detach()
        states = state.expand(self.samples, -1, -1)
        advantage = self.expert.advantage(states, self.policy.squash(u), v_star)[..., 0]
        deviation = advantage.std() + 1e-30
        advantage = advantage - self.baseline * advantage.mean(dim=0)
        advantage = (advantage / deviation).clamp(-10, 10)
        log_prob = Normal(mean, std, validate_args=False).log_prob(u).sum(dim=-1)
        cloning = SimpleNamespace(policy=self.policy, config=SimpleNamespace(algorithm="bc"))
        imitation = USUAL.loss(cloning, state, a_star, v_star)
        return self.config.bc_weight * imitation - (advantage * log_prob).mean()


class Natural(USUAL):
    """Natural steps (section 5.2 of the paper) instead of Adam's, in larger minibatches.

    The Fisher matrix is that of u, by the Hessian of the mean KL divergence in 1,024 states of a
    minibatch, plus 0.1; conjugate gradients, 10 iterations.  The first step of an iteration is as
    long as a mean divergence of `kl` allows; `kl` falls as the square of Adam's step size would.
    """

    batch_sz, fisher_sz, damping, kl = 2048, 1024, 0.1, 0.1

    def fisher_product(self, state):
        """The function v -> (Fisher matrix + damping) v of flat parameters."""
        parameters = list(self.policy.parameters())
        now = Normal(*self.policy(state), validate_args=False)
        fixed = Normal(now.loc.detach(), now.scale.detach(), validate_args=False)
        divergence = kl_divergence(fixed, now).sum(dim=1).mean()
        slope = parameters_to_vector(torch.autograd.grad(divergence, parameters, create_graph=True))

        def product(v):
            again = torch.autograd.grad(slope @ v, parameters, retain_graph=True)
            return parameters_to_vector(again) + self.damping * v

        return product

    def update(self, lr):
        batches = self.draw().to(self.device).split(self.batch_sz)
        parameters, total = list(self.policy.parameters()), 0.0
        for i, rows in enumerate(batches):
            loss = self.loss(**{name: x[rows] for name, x in self.data.items()})
            downhill = -parameters_to_vector(torch.autograd.grad(loss, parameters))
            product = self.fisher_product(self.data["state"][rows[: self.fisher_sz]])
            step = conjugate_gradients(product, downhill)
            fall = lr / self.config.lr * (1 - i / len(batches))
            length = fall * (2 * self.kl / (step @ product(step))).sqrt()
            vector_to_parameters(parameters_to_vector(parameters) + length * step, parameters)
            total += loss.item()
        return total / len(batches)


def conjugate_gradients(product, b, iterations=10):
    """x, such that product(x) is about b."""
    x, residual, direction = torch.zeros_like(b), b, b
    for _ in range(iterations):
        image = product(direction)
        share = residual @ residual / (direction @ image + 1e-30)
        x, new = x + share * direction, residual - share * image
        direction = new + new @ new / (residual @ residual + 1e-30) * direction
        residual = new
    return x


VARIANTS = {None: USUAL, "own_states": OwnStates, "one_step": OneStep, "min_q": MinQ}
VARIANTS |= {"natural": Natural}
VARIANTS |= {f"score_{m}": type("Score", (Score,), dict(samples=m)) for m in (2, 4, 8)}
VARIANTS["score_4_mean"] = type("Score", (Score,), dict(samples=4, baseline=True))


def variant(name: str | None):
    """A context in which agents are of this variant, or usual ones."""
    saved = ag.SAVED | (dict(moments=dict) if name == "one_step" else {})  # for resuming
    return mock.patch.multiple(ag, AggreVateDAgent=VARIANTS[name], SAVED=saved)
