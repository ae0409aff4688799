"""The shipped experts: readable both ways, the same actions and Q*, and what their cards say."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3 import SAC

import aggrevated

ROOT = Path(__file__).resolve().parents[1]
AGENTS = sorted((ROOT / "rl-trained-agents" / "sac").glob("*/*.zip"))


def test_the_default_experts_are_shipped():
    paths = aggrevated.Config().expert_path.split(",")
    assert {ROOT / path for path in paths} <= set(AGENTS) and len(paths) == 5


@pytest.mark.parametrize("path", AGENTS, ids=lambda p: p.parent.name)
def test_sb3_and_the_own_loader_agree(path):
    env = aggrevated.make_env(path.stem)
    ours = aggrevated.SACExpert(path, env.observation_space, env.action_space)
    theirs = SAC.load(path, device="cpu")
    obs = np.random.default_rng(0).normal(size=(50, *env.observation_space.shape))
    obs = obs.astype(np.float32)
    action, _ = theirs.predict(obs, deterministic=True)
    np.testing.assert_allclose(ours.predict(obs), action, rtol=1e-4, atol=1e-5)
    scaled = torch.as_tensor(theirs.policy.scale_action(action))
    with torch.no_grad():
        q = torch.cat(theirs.critic(torch.as_tensor(obs), scaled), dim=1).min(dim=1).values
    np.testing.assert_allclose(ours.q_star(obs, action)[:, 0], q, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", AGENTS, ids=lambda p: p.parent.name)
def test_card_matches_zip_and_log(path):
    card = json.loads((path.parent / "score.json").read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert card["sha256"] == digest
    text = (ROOT / "rl-trained-agents" / "README.md").read_text()
    assert digest in text
    returns = np.loadtxt(path.parent / "returns.csv")
    assert len(returns) == card["score"]["episodes"]
    assert card["score"]["mean"] == pytest.approx(returns.mean(), abs=1e-2)
    assert f"{returns.mean():.1f}" in text
