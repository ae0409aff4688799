"""Agents and tasks that others made: played as Stable-Baselines3 plays them, or refused."""

import base64
import io
import json
import pickle
import random
import re
import shutil
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import tiny_envs
import torch
from conftest import make_sac
from stable_baselines3 import SAC
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.sac.policies import SACPolicy
from test_errors import STRANGE, Bomb, refused, run_strange  # noqa: F401  (fixtures)
from torch import nn

from aggrevated import Config, SACExpert, make_env, play_episode


def edit(path, data=None, weights=None, zipped=True, compression=zipfile.ZIP_STORED):
    """Write an agent's zip anew, with what the functions make of its settings and weights."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    if data:
        members["data"] = json.dumps(data(json.loads(members["data"])))
    if weights:
        new = weights(torch.load(io.BytesIO(members["policy.pth"]), weights_only=True))
        torch.save(new, buffer := io.BytesIO(), _use_new_zipfile_serialization=zipped)
        members["policy.pth"] = buffer.getvalue()
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def arm(data):
    code = base64.b64encode(pickle.dumps(Bomb())).decode()
    return json.loads(re.sub('(":serialized:": )"[^"]*"', rf'\1"{code}"', json.dumps(data)))


def sb3_return(model, c, stream):
    terrain = int(np.random.default_rng(stream).integers(2**31))
    random.seed(terrain)
    np.random.seed(terrain)
    how = json.loads(c.env_kwargs) | dict(disable_env_checker=True)
    env = DummyVecEnv([lambda: gym.make(c.env_name, **how)])
    env.seed(terrain)
    return evaluate_policy(model, env, n_eval_episodes=1, warn=False)[0]


AGENTS = {
    "gsde": dict(use_sde=True), "gsde, other clip": dict(use_sde=True, clip_mean=0.5),
    "gsde, no clip": dict(use_sde=True, clip_mean=0.0), "one critic": dict(n_critics=1),
    "gsde, no hidden layer": dict(use_sde=True, net_arch=[]), "three critics": dict(n_critics=3),
    "tanh": dict(activation_fn=nn.Tanh), "rrelu": dict(activation_fn=nn.RReLU), "plain": {},
    "400-300": dict(net_arch=[400, 300]), "no hidden layer": dict(net_arch=[]),
    "sizes": dict(net_arch=dict(pi=[8, 24, 8], qf=[32, 12])), "elu": dict(activation_fn=nn.ELU),
}  # fmt: skip
TASKS = {
    "lopsided": dict(low=[-3, 0], high=[1, 10]), "float64": dict(low=[-0.3], dtype="float64"),
    "integer actions": dict(dtype="int64"), "integer states": dict(seen_dtype="int64"),
    "rows": dict(flaw="row"), "in place": dict(flaw="in place", seen_dtype="float32"),
    "numpy's generator": dict(flaw="numpy"), "python's generator": dict(flaw="random"),
}  # fmt: skip
ZIPS = {
    "compiled": dict(weights=lambda x: {f"_orig_mod.{name}": w for name, w in x.items()}),
    "old format": dict(weights=dict, zipped=False), "code beside the weights": dict(data=arm),
    "not evaluated": dict(data=lambda x: x | dict(critics_evaluated="no")),
}  # fmt: skip


@pytest.mark.parametrize("kind", AGENTS | TASKS | ZIPS)
def test_expert_is_sb3s_agent(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # where a Bomb would leave its trace
    c = Config(env_name=STRANGE, env_kwargs=json.dumps(TASKS.get(kind, {})))
    make_sac(path := tmp_path / "expert.zip", env := make_env(c), **AGENTS.get(kind, {}))
    model = SAC.load(path, device="cpu")
    edit(path, **ZIPS.get(kind, {}))
    acts, rng = env.action_space, np.random.default_rng(0)
    expert = SACExpert(path, env.observation_space, acts)
    assert not expert.evaluated and not (tmp_path / "executed").exists()
    state = rng.normal(size=(100, 3)).astype(np.float32)
    expected = model.predict(state, deterministic=True)[0]
    for own in (expert.predict(state), [expert.predict(s) for s in state]):
        np.testing.assert_allclose(own, expected, atol=1e-5)
    action = rng.uniform(acts.low, acts.high, (100, *acts.shape)).astype(np.float32)
    scaled = torch.from_numpy(model.policy.scale_action(action)).float()
    q = torch.cat(model.critic(torch.from_numpy(state), scaled), dim=1)
    own = expert.q_values(torch.from_numpy(state), torch.from_numpy(action))
    torch.testing.assert_close(own, q, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.02 and own.std() > 0.01
    players = pickle.dumps((None, expert))  # as to a worker
    for stream in [(3, i) for i in range(3)]:
        t = play_episode(players, c, 1.0, 0.0, 20, stream)
        assert t.rewards.sum() == pytest.approx(sb3_return(model, c, stream), rel=1e-4)
        assert (t.states[:, 0] == range(20)).all() and t.states.dtype == np.float32  # of all steps


def own(cls):
    """Another's class of the same name."""
    return type(cls)(cls.__name__, (cls,), dict(__module__=__name__))


def damage_stream(path):
    """Bytes in the middle, of the compressed weights, are others."""
    edit(path, compression=zipfile.ZIP_LZMA)
    content, n = path.read_bytes(), path.stat().st_size // 2
    path.write_bytes(content[:n] + bytes(200) + content[n + 200 :])


TQC = dict(__module__="sb3_contrib.tqc.policies")
BAD_EXPERTS = {
    "missing": (lambda path: path.unlink(), "No such file"), "damaged stream": (damage_stream, ""),
    "half": (lambda path: path.write_bytes(path.read_bytes()[:5000]), ""),
    "Stable-Baselines 2": (lambda path: zipfile.ZipFile(path, "w").close(), "'policy.pth'"),
    "PPO": (lambda path: make_sac(path, kind="PPO"), "stable_baselines3.common.policies"),
    "DQN": (lambda path: make_sac(path, "CartPole-v1", "DQN"), "stable_baselines3.dqn.policies"),
    "TD3": (lambda path: make_sac(path, kind="TD3"), "stable_baselines3.td3.policies"),
    "TQC": (dict(data=lambda x: x | dict(policy_class=x["policy_class"] | TQC)), "sb3_contrib.tqc"),
    "policy": (lambda path: SAC(own(SACPolicy), "Pendulum-v1").save(path), "is of test_strangers"),
    "extractor": (dict(features_extractor_class=own(FlattenExtractor)), "test_s.*FlattenExtractor"),
    "activation": (dict(activation_fn=own(nn.ReLU)), "test_strangers.ReLU"),
    "another range": (dict(env_id="MountainCarContinuous-v0"), "-1.* the task's .*-2.0"),
    "another size": (dict(env_id=gym.make(STRANGE, low=[-2, -2], high=[2, 2])), ""),
    "code": (dict(weights=lambda x: Bomb()), ""), "list": (dict(data=lambda x: [x]), ""),
    "arguments in a list": (dict(data=lambda x: x | dict(policy_kwargs=[1])), ""),
    "numbers for a range": (dict(data=lambda x: x | dict(action_space=dict(low=3, high=3))), ""),
    "list of weights": (dict(weights=lambda x: [*x.values()]), ""),
    "words for weights": (dict(weights=lambda x: dict.fromkeys(x, "x")), ""),
    "NaN": (dict(weights=lambda x: x | {"actor.mu.bias": torch.full([1], torch.nan)}), "is NaN"),
    "code, old format": (dict(weights=lambda x: Bomb(), zipped=False), ""),
}  # fmt: skip


@pytest.mark.parametrize("damage, reason", BAD_EXPERTS.values(), ids=BAD_EXPERTS)
def test_expert_that_is_refused(expert_zip, tmp_path, refused, damage, reason):  # noqa: F811
    path = shutil.copy(expert_zip, tmp_path / "copy.zip")
    if callable(damage):
        damage(path)
    else:
        (edit if {"data", "weights"} & {*damage} else make_sac)(path, **damage)
    pattern = rf"{path} is no SAC agent of this task; set --expert_path .*{reason}"
    assert re.search(pattern, sentence := refused(expert_path=path)), sentence


@pytest.mark.parametrize("flaw", ["", "numpy", "random", "constructor"])
def test_trajectories_are_of_their_streams_alone_and_in_order(flaw, make_agent):
    played, kwargs = [], json.dumps(dict(flaw=flaw))
    for n_workers in (1, 2, 2):
        agent = make_agent(env_name=STRANGE, env_kwargs=kwargs, n_workers=n_workers)
        played.append(agent.play([(0, 0, 1, k) for k in range(7)], 0.5, 1.0, 50))
    for all_three in zip(*played, strict=True):
        assert all(np.array_equal(x, y) for t in all_three for x, y in zip(t, all_three[0]))
    assert len({t.states[0, 2] for t in played[0]}) == 7


def test_tasks_that_gymnasium_would_not_make(run_strange, finished, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tiny_envs.Strange, "open", 0)  # there can be only one
    result = run_strange(dict(flaw="only one"))
    assert result.status == 0 and tiny_envs.Strange.open == 0, result.err
    result = run_strange(dict(flaw="row", pay=-1.23456e-7))
    (warning,) = [line for line in result.out.splitlines() if "warning" in line]
    assert result.status == 0 and re.search("check_env .*Strange-v0: .*observation", warning)
    assert "warning" not in finished[0].out + finished[0].err  # of Gymnasium's own task
    assert len(re.findall(r"(?:learner|expert) +-2\.4691e-06 ± ", result.out)) == 3
