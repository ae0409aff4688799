"""Whatever is wrong: status 2, a sentence that says what to do, nothing written, nothing run."""

import base64
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import traceback
import zipfile
from dataclasses import asdict, make_dataclass

import pytest
import torch
from conftest import checkpoint, make_sac, only_run
from stable_baselines3 import SAC

import aggrevated
from aggrevated import AggreVateDAgent, Config, SACExpert, UserError, make_env

pytestmark = pytest.mark.filterwarnings("ignore:Duplicate name")
STRANGE, MOUNTAIN = "tiny_envs:Strange-v0", "MountainCarContinuous-v0"


@pytest.fixture
def refused(run_main, small, tmp_path, monkeypatch):
    """refused(*args, **changes): the sentence with which a run ends before it has written."""
    monkeypatch.chdir(tmp_path)  # where the Bomb below would leave its trace

    def files():
        return {str(p): p.read_bytes() if p.is_file() else None for p in tmp_path.rglob("*")}

    def run(*args, **changes):
        values, before = changes if args else small(log_dir=tmp_path / "logs") | changes, files()
        result = run_main(*args, **values)
        *usage, sentence = result.err.splitlines()
        assert result.status == 2 and files() == before and not result.out
        assert "error: " in sentence and all(x.startswith("usage: ") for x in usage), result.err
        return sentence

    return run


@pytest.fixture
def run_strange(run_main, small, tmp_path):
    """run_strange(env_kwargs, **changes): the result of a run in another's environment."""
    values = small(env_name=STRANGE, log_dir=tmp_path / "logs")
    return lambda env_kwargs={}, **changes: run_main(**values | changes, env_kwargs=env_kwargs)


@pytest.fixture
def expert(expert_zip, tmp_path):
    return shutil.copy(expert_zip, tmp_path / "copy.zip")


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished[1], tmp_path / "run")


@pytest.mark.parametrize("option, mend", [
    ("algorithm=magic", "algorithm is '?magic'?; .*bc, dagger.*aggrevated"),
    ("env_nam=no_abbreviation", "unrecognized arguments: --env_nam=no"),
    ("max_iteration=0", "max_iteration is 0; give 1 to inf"),
    ("lr=nan", "lr is nan; give 1e-12 to 1"),
    (f"seed={2**64}", "give 0 to 4294967295"),
    ("env_kwargs={g: 10}", "(?i)env_kwargs.* invalid .*json"),
    ("env_kwargs=[10]", r"env_kwargs is \[10\]; .*dict"),
    ('env_kwargs={"gravity": 1}', "cannot be made; check .*env_kwargs.*gravity"),
    ("env_name=no_such_module:Tiny-v0", "cannot be made; check"),
    ("env_name=CartPole-v1", r"has .* and Discrete\(2\); both must be vectors"),
    ("env_name=tiny_envs:Unbounded-v0", r"Unbounded-v0 has .*\(-inf, inf, .*actions bounded"),
    ("log_dir=file", "cannot be written; set --log_dir"),
    ("log_dir=link", "cannot be written; set --log_dir"),  # to what there is not
    ("device=gpu", "device is gpu; give one of auto, cpu"),
    ("init_path=nowhere", "nowhere is missing, .*; give another"),
])  # fmt: skip
def test_option(refused, tmp_path, option, mend):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    name, value = option.split("=")
    assert re.search(mend, sentence := refused(**{name: value})), sentence


def test_constants_have_types_and_need_no_note(run_strange, run_main, tmp_path, monkeypatch):
    for name, value in (("K", 2.5), ("K", True), ("lr", "0.01"), ("log_dir", 3)):
        with pytest.raises(UserError, match=f"{name} is {value!r}; .* type"):
            Config(**{name: value}).check()
    config = Config(max_experience_len=3e5, lr=1).check()
    assert (type(config.max_experience_len), type(config.lr)) == (int, float)
    config = make_dataclass("Config", [("new", int, 3)], bases=(Config,))
    monkeypatch.setattr(aggrevated, "Config", config)
    text = "".join(run_main("--help").out.split())  # wherever the lines were broken
    for name, default in asdict(config()).items():
        assert f"--{name}" in text and (f"(default:{default})" in text or default in ("", {}))
    assert "(default:)" not in text and "new is 4.5; " in run_strange(new=4.5).err
    assert run_strange(new=4, update_sz="1e2").status == 0
    config = json.loads((only_run(tmp_path / "logs") / "config.json").read_text())
    assert (config["update_sz"], config["new"]) == (100, 4)


class Bomb:
    """Unpickling one makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def change_weights(path, change, zipped=True, member="policy.pth"):
    """change(name, tensor) for all weights; a zip's last member of a name is the one that counts."""
    with zipfile.ZipFile(path, "a") as archive:
        weights = torch.load(io.BytesIO(archive.read("policy.pth")), weights_only=True)
        weights, buffer = {name: change(name, x) for name, x in weights.items()}, io.BytesIO()
        torch.save(weights, buffer, _use_new_zipfile_serialization=zipped)
        archive.writestr(member, buffer.getvalue())


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def like_tqc(name, x):
    """Its critics have many outputs; the names of its weights are SAC's."""
    return x.repeat_interleave(25, dim=0) if re.match(r"critic.*\.4\.", name) else x


OWN = type("Own", (torch.nn.ReLU,), {})  # an activation that torch does not know
DAMAGED = "is missing or no SAC zip of this task; set --expert_path"
BAD_EXPERTS = {
    "missing": (lambda path: path.unlink(), f"{DAMAGED} .*No such file"),
    "half": (truncate, DAMAGED),
    "empty": (lambda path: zipfile.ZipFile(path, "w").close(), DAMAGED),
    "PPO": (lambda path: make_sac(path, kind="PPO"), DAMAGED),
    "DQN": (lambda path: make_sac(path, "CartPole-v1", "DQN"), DAMAGED),
    "TD3": (lambda path: make_sac(path, kind="TD3"), f"{DAMAGED} .*actor_target"),
    "TQC": (lambda path: change_weights(path, like_tqc), f"{DAMAGED} .*critic"),
    "another task's": (lambda path: make_sac(path, MOUNTAIN), rf"{DAMAGED} .*16, 2\].*16, 3\]"),
    "own activation": (lambda path: make_sac(path, activation_fn=OWN), f"{DAMAGED} .*Own"),
    "code": (lambda path: change_weights(path, lambda *_: Bomb()), DAMAGED),
    "code, old": (lambda path: change_weights(path, lambda *_: Bomb(), False), DAMAGED),
}


@pytest.mark.parametrize("damage, mend", BAD_EXPERTS.values(), ids=BAD_EXPERTS)
def test_expert_that_is_no_sac_agent_for_the_task(expert, refused, damage, mend):
    damage(expert)
    sentence = refused(expert_path=expert)
    assert str(expert) in sentence and re.search(mend, sentence), sentence


def test_old_weights_are_read_and_code_beside_them_is_not_run(expert, expert_zip, refused):
    change_weights(expert, lambda name, x: x, zipped=False)
    change_weights(expert, lambda *_: Bomb(), member="pytorch_variables.pth")
    with zipfile.ZipFile(expert, "a") as archive:
        code = base64.b64encode(pickle.dumps(Bomb())).decode()
        data = re.sub('(":serialized:": )"[^"]*"', rf'\1"{code}"', archive.read("data").decode())
        archive.writestr("data", data)
    env, state = make_env("Pendulum-v1"), torch.randn(20, 3).numpy()
    spaces = env.observation_space, env.action_space
    a, b = (SACExpert(path, *spaces).predict(state) for path in (expert, expert_zip))
    assert (a == b).all() and not os.path.exists("executed")
    with pytest.raises(Exception):  # noqa: B017
        SAC.load(expert, device="cpu")
    assert os.path.exists("executed")  # SB3's own loading runs it


@pytest.mark.parametrize("task, pay, poor", [  # 20 times; "solved" is from 100 or -3.75 on
    ("Solvable", 2.4, 1), ("Solvable", 2.6, 0), ("Negative", -0.15, 0), ("Strange", -9, 0)
])  # fmt: skip
def test_poor_expert_is_warned_of_once(task, pay, poor, run_strange):
    out = run_strange(dict(pay=pay), env_name=f"tiny_envs:{task}-v0").out
    assert out.count("iteration ") == 2 and out.count("expert is poor") == poor
    shares = dict(Solvable=["0%", "0%"], Negative=["100%", "100%"], Strange=[])
    assert re.findall(r"(\d+%) solved", out) == shares[task]


def flip(path):
    weights = checkpoint(path)["policy"]["fc2.weight"].numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(weights, weights[::-1]))


def change(path, **parts):
    torch.save(checkpoint(path) | parts, path)


@pytest.mark.parametrize("mend, damage", [
    ("damaged", truncate),
    ("a checksum differs", flip),
    ("format 2.*train anew", lambda path: change(path, format=2)),
    ("another program", lambda path: change(path, config=dict(x=1))),
    ("damaged ", lambda path: change(path, more=Bomb())),
    ("best.pt is missing", lambda path: path.unlink()),
])  # fmt: skip
def test_checkpoint_that_is_damaged(run, refused, mend, damage):
    damage(run / "best.pt")
    ways = refused("--evaluate", run), refused(init_path=run)
    assert all(re.search(mend, sentence) for sentence in ways), ways


def test_checkpoint_of_another_task_and_damaged_last_one(run, refused, tmp_path):
    make_sac(expert := tmp_path / "mountain.zip", MOUNTAIN)
    assert DAMAGED in refused("--evaluate", run, env_name=MOUNTAIN)
    assert "not fit" in refused(init_path=run, expert_path=expert, env_name=MOUNTAIN, n_workers=2)
    assert not multiprocessing.active_children()
    assert "--env_kwargs cannot change" in refused("--resume", run, '--env_kwargs={"g": 9}')
    assert "--K cannot change with --evaluate; what can: " in refused("--evaluate", run, "--K=3")
    config = checkpoint(run / "last.pt")["config"] | dict(env_name="logs.run:Strange-v0")
    change(run / "last.pt", config=config)
    assert "if you trust" in refused("--resume", run)
    truncate(run / "last.pt")
    assert "damaged" in refused("--resume", run)


@pytest.mark.parametrize("init_path", ["", "best.pt"])
def test_fault_of_our_own_is_not_told_as_a_damaged_file(init_path, run, run_strange, monkeypatch):
    monkeypatch.setattr(aggrevated.torch, "load", lambda *args, **kwargs: None.bug)
    with pytest.raises(AttributeError, match="bug"):
        run_strange(init_path=init_path and run / init_path)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_environment_that_raises_keeps_its_traceback(run_strange, run_main, tmp_path, n_workers):
    kwargs = dict(broken=str(broken := tmp_path / "broken"), dtype="float64")
    result = run_strange(kwargs, n_workers=n_workers)
    assert result.status == 0, result.err
    run, _ = only_run(tmp_path / "logs"), broken.touch()
    assert json.loads((run / "config.json").read_text())["env_kwargs"] == kwargs
    with pytest.raises(ArithmeticError, match="the motor is gone") as raised:
        run_main("--resume", run, max_iteration=5)
    assert "in step" in "".join(traceback.format_exception(raised.value))
    assert not multiprocessing.active_children()
    last, _ = checkpoint(run / "last.pt"), broken.unlink()
    assert last["iteration"] == 2 and last["config"]["env_kwargs"] == kwargs
    assert run_main("--resume", run, max_iteration=3).status == 0
    how = dict(env_kwargs=kwargs | dict(pay=1.0), eval_episodes=1)  # for 20 steps; without an error
    assert re.search("learner +20.0\n", run_main("--evaluate", run, **how).out)


@pytest.mark.parametrize("what, mend", [
    ("observation", "Strange-v0 .*NaN"), ("critics", "Q.* NaN .*another expert"),
    ("loss", "NaN.*--lr"),
])  # fmt: skip
def test_nan_ends_the_run_before_it_is_kept(what, mend, run_strange, expert, tmp_path, monkeypatch):
    loss, bad = AggreVateDAgent.loss, "critic.qf0.0.weight"
    if what == "critics":
        change_weights(expert, lambda name, x: x * torch.nan if name == bad else x)
    if what == "loss":
        monkeypatch.setattr(AggreVateDAgent, "loss", lambda *x: torch.nan * loss(*x))
    kwargs = dict(nan_at=19 if what == "observation" else None)
    result = run_strange(kwargs, n_workers=2, expert_path=expert)
    assert result.status == 2 and "Traceback" not in result.err
    assert re.search(f"error: .*{mend}", result.err), result.err
    assert checkpoint(only_run(tmp_path / "logs") / "last.pt")["iteration"] == 0
