"""The study's scripts: rows are run, killed, gone on with and published; variants of the learner."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.distributions import Normal, kl_divergence
from torch.nn.utils import parameters_to_vector as flat

import common
import draw
import study
from aggrevated import AggreVateDAgent, Config, load_checkpoint, load_policy
from variants import VARIANTS

TINY = dict(env_name="Pendulum-v1", K=2, H=40, max_iteration=3, eval_every=1, hidden_dim=16)
TINY_ROW = dict(expert="tiny_expert", options=dict(K=3), seeds=[4], keep=[4], variant="one_step")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty study of an expert and two equal rows."""
    rows = dict(tiny_expert=dict(options=TINY, episodes=1), tiny=TINY_ROW, twin=TINY_ROW)
    for module in (common, study):
        monkeypatch.setattr(module, "HERE", tmp_path)
        monkeypatch.setattr(module, "ROWS", rows)
    monkeypatch.setattr(study, "RUNS", tmp_path / ".runs")
    monkeypatch.setitem(common.TERRAINS, "test", 19)
    for name in ("returns", "evaluations"):
        header = (ROOT / f"logs/reference/{name}.csv").read_text().split("\n")[0]
        (tmp_path / f"{name}.csv").write_text(header + "\n")
    return tmp_path


def test_scores_replace_those_of_the_same_row_seed_and_terrains(place):
    def score(row, seed, terrains, *values):
        lines = [(row, seed, k, terrains, 0, x, 9, "") for k, x in zip(("best", "last"), values)]
        common.merge("returns", lines)

    score("tiny", 5, "test", 4)
    score("tiny", 4, "validation", 3)
    score("tiny", 4, "test", 1, 1)
    score("tiny_expert", "", "test", 2)
    assert common.missing("tiny", [4, 5, 6]) == [(6, "test")] and not common.missing("tiny_expert")
    assert common.missing("tiny", [4, 5], "validation") == [(5, "validation")]
    score("unknown", 4, "test", 8)
    score("tiny", 4, "test", 7)
    assert [x["return"] for x in common.read("returns")] == ["2", "7", "3", "4", "8"]


def test_killed_row_goes_on_and_its_best_iterate_is_published(place, monkeypatch, capsys):
    def stop(agent, trajectories, label=AggreVateDAgent.label):
        if agent.iteration == 2:
            raise KeyboardInterrupt
        return label(agent, trajectories)

    best_is_2 = lambda agent, who: np.array([0, agent.iteration % 3])  # noqa: E731
    monkeypatch.setattr(AggreVateDAgent, "evaluate", best_is_2)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="same command goes on"):
        patch.setattr(AggreVateDAgent, "label", stop)
        study.run_row("tiny")
    assert {x["row"] for x in common.read("returns")} == {"tiny_expert"}
    for row in ("tiny", "twin"):  # nothing stops the second
        study.run_row(row)
    (last,) = place.glob(".runs/tiny_s4/*/last.pt")
    assert torch.load(last)["moments"]["state"][0]["step"] == 3  # of Adam
    played: dict = {}
    for x in common.read("returns"):
        played.setdefault((x["row"], x["iterate"]), []).append(float(x["return"]))
    assert played["tiny", "last"] == played["twin", "last"] != played["tiny", "best"]
    policy = place / "policies" / "tiny_s4.pt"
    again = [x for _, x, *_ in common.play("tiny", "test", load_policy(policy))]
    assert played["tiny", "best"] == again and load_checkpoint(policy)["iteration"] == 2
    monkeypatch.setattr(draw, "runs", draw.runs.__wrapped__)
    out, lines = capsys.readouterr().out, draw.printed("tiny", "4").split("\n")
    assert len(lines) == 4 and all(x.strip().split(",")[0] in out for x in lines)
    monkeypatch.setattr(study.ag, "main", lambda _: pytest.fail("it was run again"))
    study.train("tiny", 4)


def make(name, config):
    agent = VARIANTS[name](Config(**config))
    return agent, agent.label(agent.play([(9, 0)], 1.0, 0.0, 4))


def gradient(agent, data):
    return torch.autograd.grad(agent.loss(**data), agent.policy.mean.weight)[0]


@pytest.mark.parametrize("name", ["score_4", "score_4_mean"])
def test_score_has_the_gradient_of_the_pathwise_estimator(small, name):
    (usual, data), (score, _) = (make(x, small(bc_weight=1.0)) for x in (None, name))
    assert score.samples == 4
    score.samples = 5000
    pathwise = gradient(usual, {k: x.repeat(5000, 1) for k, x in data.items()})
    assert (gradient(score, data) - pathwise).norm() < 0.05 * pathwise.norm()
    score.samples, score.config.bc_weight = 1, 0.0
    assert bool(gradient(score, data).any()) != score.baseline  # one sample is its own mean


def test_own_states_are_the_newest_alone_and_one_step_is_one(small, tmp_path):
    own, _ = make("own_states", small())
    own.train(tmp_path)
    assert len(own.data["state"]) == 80 and own.env_steps == 160
    one, one.data = make("one_step", small())
    before = flat(one.policy.parameters()).detach()
    one.update(0.01)
    change = (flat(one.policy.parameters()) - before).abs().max().item()
    assert change == pytest.approx(0.01, rel=1e-3)  # Adam's first


def test_min_q_is_the_difference_of_the_smallest(small):
    agent, data = make("min_q", small())
    state, a_star, v_star = (data[x] for x in ("state", "a_star", "v_star"))
    q, q_star = (agent.expert.q_values(state, a).amin(1) for a in (-a_star, a_star))
    torch.testing.assert_close(agent.expert.advantage(state, -a_star, v_star)[:, 0], q - q_star)
    assert v_star.shape == (4, 2) and (v_star == q_star[:, None]).all()


def test_natural_step_is_along_fishers_and_as_long_as_its_divergence(small):
    agent, agent.data = make("natural", small())
    parameters, before = list(agent.policy.parameters()), agent.policy(agent.data["state"])
    product, start = agent.fisher_product(agent.data["state"]), flat(parameters).detach()
    agent.kl, agent.draw = 1e-4, lambda: torch.arange(len(before[0]))
    torch.manual_seed(0)
    downhill = -flat(torch.autograd.grad(agent.loss(**agent.data), parameters))
    torch.manual_seed(0)
    agent.update(agent.config.lr)
    step, after = flat(parameters).detach() - start, agent.policy(agent.data["state"])
    divergence = kl_divergence(Normal(*before), Normal(*after)).sum(dim=1).mean().item()
    assert divergence + 0.05 * (step @ step).item() == pytest.approx(1e-4, rel=0.05)
    assert torch.cosine_similarity(product(step), downhill, dim=0) > 0.9999
