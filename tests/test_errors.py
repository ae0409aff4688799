"""Whatever is wrong: status 2, a sentence that says what to do, nothing written, nothing run."""

import base64
import io
import json
import os
import pickle
import re
import shutil
import zipfile

import numpy as np
import pytest
import torch
from conftest import checkpoint, make_sac
from stable_baselines3 import SAC

import aggrevated
from aggrevated import AggreVateDAgent, SACExpert, make_env

MOUNTAIN = "MountainCarContinuous-v0"
SPACES = (lambda env: (env.observation_space, env.action_space))(make_env("Pendulum-v1"))


def files(folder):
    return {str(p): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def refused(run_main, small, tmp_path, monkeypatch):
    """refused(*args, **changes): the sentence with which a run ends before it has written."""
    monkeypatch.chdir(tmp_path)  # where the Bomb below would leave its trace

    def run(*args, **changes):
        before = files(tmp_path)
        result = run_main(
            *args, **(changes if args else small(log_dir=tmp_path / "logs") | changes)
        )
        *usage, sentence = result.err.splitlines()
        assert result.status == 2 and files(tmp_path) == before and not result.out
        assert "error: " in sentence and all(x.startswith("usage: ") for x in usage), result.err
        return sentence

    return run


@pytest.fixture
def expert(expert_zip, tmp_path):
    return shutil.copy(expert_zip, tmp_path / "copy.zip")


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished[1], tmp_path / "run")


@pytest.mark.parametrize(
    "option, mend",
    [
        ("algorithm=magic", "invalid choice: 'magic' .*aggrevated"),
        ("K=many", "--K: invalid int value: 'many'"),
        ("lr=fast", "--lr: invalid float value: 'fast'"),
        ("no_such=1", "unrecognized arguments: --no_such=1"),
        ("K=0", "K is 0; give 1 to inf"),
        ("n_workers=65", "n_workers is 65; give 1 to 64"),
        ("gamma=1.1", "gamma is 1.1; give 0 to 1"),
        ("lr=nan", "lr is nan; give 1e-12 to 1"),
        ("seed=-1", "seed is -1; give 0 to"),
        (f"seed={2**64}", "give 0 to 4294967296"),
        ("env_name=Nonsense-v0", "'Nonsense-v0' cannot be made; check it"),
        ("env_name=no_such_module:Tiny-v0", "cannot be made; check it"),
        ("env_name=CartPole-v1", "Discrete.*choose one with 1-D Boxes and bounded actions"),
        ("env_name=tiny_envs:Unbounded-v0", "choose one with 1-D Boxes and bounded actions"),
        ("log_dir=file", "cannot be written; set --log_dir"),
    ],
)
def test_option(refused, tmp_path, option, mend):
    (tmp_path / "file").touch()
    name, value = option.split("=")
    assert re.search(mend, refused(**{name: value}))


def test_unknown_member_of_the_family():
    with pytest.raises(aggrevated.UserError, match="'magic'; give one of bc, dagger"):
        aggrevated.Config(algorithm="magic").check()


def test_resume_or_evaluate(run, refused):
    assert "not allowed with argument" in refused("--resume", run, "--evaluate", run)


@pytest.mark.parametrize("option", ["K=3", "seed=1", "lr=0.1", "env_name=X", "log_dir=x"])
def test_option_that_cannot_change_on_resume(finished, refused, option):
    sentence = refused("--resume", finished[1], f"--{option}")
    name = option.split("=")[0]
    assert f"--{name} cannot change on --resume; start a new run with it" in sentence


class Bomb:
    """Unpickling one makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def torch_bytes(value, new_format=True):
    torch.save(value, buffer := io.BytesIO(), _use_new_zipfile_serialization=new_format)
    return buffer.getvalue()


def unpack(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def weights_in(path):
    return torch.load(io.BytesIO(unpack(path)["policy.pth"]), weights_only=True)


def pack(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def repack(path, **members):
    pack(path, unpack(path) | {k.replace("_pth", ".pth"): v for k, v in members.items()})


def truncate(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


BAD_EXPERTS = {
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "random bytes": lambda path: path.write_bytes(np.random.default_rng(0).bytes(10_000)),
    "empty": lambda path: truncate(path, 0),
    "half": lambda path: truncate(path, 0.5),
    "a plain zip": lambda path: pack(path, dict(hello=b"world")),
    "PPO": lambda path: make_sac(path, kind="PPO"),
    "TD3": lambda path: make_sac(path, kind="TD3"),
    "of another environment": lambda path: make_sac(path, MOUNTAIN),
    "settings not JSON": lambda path: repack(path, data=b"\0"),
    "code in the weights": lambda path: repack(path, policy_pth=torch_bytes(Bomb())),
    "code in the old format": lambda path: repack(path, policy_pth=torch_bytes(Bomb(), False)),
    "code elsewhere": lambda path: repack(path, pytorch_variables_pth=torch_bytes(Bomb())),
}


@pytest.mark.parametrize("damage", BAD_EXPERTS.values(), ids=BAD_EXPERTS)
def test_expert_that_is_no_sac_agent_for_the_environment(expert, refused, damage):
    damage(expert)
    sentence = refused(expert_path=expert)
    assert f"{expert} is no SB3 SAC agent for this environment; set another --exp" in sentence


def test_code_in_an_experts_settings_is_not_run(expert, tmp_path, monkeypatch):
    """SB3's own loading runs it: the code here would do something."""
    monkeypatch.chdir(tmp_path)
    data, code = json.loads(unpack(expert)["data"]), base64.b64encode(pickle.dumps(Bomb())).decode()
    for value in [v for v in data.values() if isinstance(v, dict) and ":serialized:" in v]:
        value[":serialized:"] = code
    repack(expert, data=json.dumps(data).encode())
    SACExpert(expert, *SPACES)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(Exception):  # noqa: B017
        SAC.load(expert, device="cpu")
    assert (tmp_path / "executed").exists()


def test_expert_whose_weights_are_in_torchs_old_format_is_read(expert, expert_zip):
    repack(expert, policy_pth=torch_bytes(weights_in(expert), new_format=False))
    assert not zipfile.is_zipfile(io.BytesIO(unpack(expert)["policy.pth"]))
    state = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    a, b = (SACExpert(path, *SPACES) for path in (expert, expert_zip))
    np.testing.assert_array_equal(a.predict(state), b.predict(state))


def test_critics_that_are_nan(expert, tmp_path, run_main, small):
    weights = weights_in(expert)
    weights["critic.qf0.0.weight"][0, 0] = torch.nan
    repack(expert, policy_pth=torch_bytes(weights))
    result = run_main(**small(expert_path=expert, log_dir=tmp_path / "logs"))
    assert result.status == 2
    assert "error: Q* is NaN or infinite on a visited state; use another expert." in result.err


def test_loss_that_is_nan(tmp_path, run_main, small, monkeypatch):
    loss = AggreVateDAgent.loss
    monkeypatch.setattr(AggreVateDAgent, "loss", lambda *x: torch.nan * loss(*x))
    result = run_main(**small(log_dir=tmp_path / "logs"))
    assert result.status == 2 and "error: The loss became NaN or infinite; lower --lr" in result.err


def other_network(path):
    state = checkpoint(path)
    state["policy"]["fc1.weight"] = torch.zeros(16, 5)
    torch.save(state, path)


NO_CHECKPOINT = "is not a checkpoint of this version; give a run folder"
BAD_CHECKPOINTS = {
    "missing": (lambda path: path.unlink(), NO_CHECKPOINT),
    "empty": (lambda path: truncate(path, 0), NO_CHECKPOINT),
    "half": (lambda path: truncate(path, 0.5), NO_CHECKPOINT),
    "unknown field": (lambda path: torch.save(dict(config=dict(x=1)), path), NO_CHECKPOINT),
    "wrong value": (lambda path: torch.save(dict(config=dict(K=0)), path), "K is 0; give 1"),
    "of another network": (other_network, "does not fit; give one of this network and env"),
    "code": (lambda path: path.write_bytes(torch_bytes(Bomb())), NO_CHECKPOINT),
    "code, old": (lambda path: path.write_bytes(torch_bytes(Bomb(), False)), NO_CHECKPOINT),
}


@pytest.mark.parametrize("option", ["--resume", "--evaluate", "--init_path"])
@pytest.mark.parametrize("damage, mend", BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS)
def test_checkpoint_that_is_damaged(run, refused, option, damage, mend):
    damage(path := run / ("last.pt" if option == "--resume" else "best.pt"))
    sentence = refused(init_path=path) if option == "--init_path" else refused(option, run)
    assert mend in sentence


def test_checkpoint_of_another_environment(run, refused):
    expert, values = run / "mountain.zip", dict(env_name=MOUNTAIN)
    make_sac(expert, MOUNTAIN)
    assert "does not fit" in refused(init_path=run / "best.pt", expert_path=expert, **values)
    assert "no SB3 SAC agent for this environment" in refused("--evaluate", run, **values)
