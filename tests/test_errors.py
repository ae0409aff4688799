"""Whatever is wrong: status 2, a sentence that says what to do, nothing written, nothing run."""

import inspect
import json
import multiprocessing
import os
import pickle
import re
import shutil
import traceback
from dataclasses import fields

import pytest
import torch
from conftest import checkpoint, make_sac, only_run

from aggrevated import ALGORITHMS, AggreVateDAgent, Config, UserError

STRANGE, MOUNTAIN = "tiny_envs:Strange-v0", "MountainCarContinuous-v0"
DAMAGED = "is missing, damaged or of another version"
NO_FIT = "error: The checkpoint is of another task, expert or --hidden_dim"


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


class Bomb:
    """Unpickling one makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("option, mend", [
    *([] if torch.cuda.is_available() else [("device=cuda", "device cuda .*CUDA")]),
    ("device=cuda:99", "device cuda:99 .*(CUDA|invalid)"),
    ("device=gpu", "device gpu .*Expected one of cpu, cuda"),
    ("algorithm=magic", "algorithm is magic; give aggrevated or weighted or dagger or bc"),
    ("env_nam=no_abbreviation", "unrecognized arguments: --env_nam=no"),
    ("max_iteration=0", "max_iteration is 0; give 1 to "), ("lr=nan", "lr is nan; give 0 to "),
    (f"seed={2**32}", "seed is 4294967296; give 0 to 4294967295"),
    ("K=ten", "--K: .*invalid int value: 'ten'"), ("K=2.5", "--K: .*invalid int value: '2.5'"),
    ("env_kwargs={g: 10}", "check env_name, env_kwargs .*JSON"),
    ('env_kwargs={"gravity": 1}', "check env_name, env_kwargs .*gravity"),
    ("env_name=no_such_module:Tiny-v0", "check env_name, env_kwargs .*no_such_module"),
    ("env_name=CartPole-v1", r"has .* Discrete\(2\); .*vectors"),
    ("env_name=tiny_envs:Unbounded-v0", r"Unbounded-v0 has .*\(-inf, inf, .*; .*bound"),
    ("log_dir=file", "cannot be written; set --log_dir"), ("init_path=pickle", f"pickle {DAMAGED}"),
    ("init_path=nowhere", f"nowhere {DAMAGED}"),
])  # fmt: skip
def test_option(refused, tmp_path, option, mend):
    (tmp_path / "file").touch()
    (tmp_path / "pickle").write_bytes(pickle.dumps(Bomb(), protocol=2))
    name, value = option.split("=")
    assert re.search(mend, sentence := refused(**{name: value})), sentence
    assert "weights_only=False" not in sentence  # torch's advice


def test_constants_have_types_and_help(run_main):
    for value in (dict(K=2.5), dict(K=True), dict(lr="0.01"), dict(log_dir=3)):
        with pytest.raises(UserError, match=" is .*; .* type"):
            Config(**value)
    assert Config(lr=1).lr == 1
    notes = dict(re.findall(r"^ +(\w+): .*  # (.*)$", inspect.getsource(Config), re.MULTILINE))
    notes["algorithm"], help_text = " or ".join(ALGORITHMS), run_main("--help").out
    for f in fields(Config):
        note = "".join(f"{notes[f.name]} (default: {f.default!r})".split())
        assert f"--{f.name} " in help_text and note in "".join(help_text.split())


def flip(path):
    weights = checkpoint(path)["policy"]["fc2.weight"].numpy()
    path.write_bytes(path.read_bytes().replace(weights.tobytes(), weights[::-1].tobytes()))


def change(path, part="", **changes):
    """Change a checkpoint, or a table that is a part of it; None leaves out."""
    state = checkpoint(path)
    new = {k: v for k, v in ((state[part] if part else state) | changes).items() if v is not None}
    torch.save(state | {part: new} if part else new, path)


ONES, NAN = torch.ones(160, 7), torch.full([3], torch.nan)
DAMAGES = [
    os.unlink, flip, lambda path: os.truncate(path, path.stat().st_size // 2),
    lambda path: torch.save(ONES, path), lambda path: torch.save([ONES], path),
    dict(more=Bomb()), dict(config=[1]), dict(config=dict(x=1)), dict(part="config", K=None),
    dict(policy=[ONES]), dict(part="policy", scale="2"), dict(part="policy", state_std=None),
    dict(part="policy", state_std=torch.zeros(3)), dict(part="policy", state_mean=NAN),
    dict(iteration="two"), dict(env_steps="many"), dict(seconds=None), dict(evaluations="good"),
]  # fmt: skip
MISFITS = [
    dict(data="much"), dict(data=[ONES]), dict(data=dict(state=ONES)), dict(evaluations=[3]),
    dict(part="data", state=ONES), dict(part="data", a_star=ONES), dict(part="data", state="x"),
    dict(part="data", v_star=ONES), dict(part="policy", scale=torch.full([1], 1e9)),
    dict(part="policy", scale=torch.ones(2)),
]  # fmt: skip


@pytest.mark.parametrize("told, damage", [
    *((DAMAGED, x) for x in DAMAGES), *((NO_FIT, x) for x in MISFITS)
])  # fmt: skip
def test_checkpoint_that_is_damaged_or_does_not_fit(finished, refused, tmp_path, told, damage):
    run = shutil.copytree(finished[1], tmp_path / "run")
    path = run / "last.pt"
    damage(path) if callable(damage) else change(path, **damage)
    assert told in refused("--resume", run, max_iteration=9)
    if told == DAMAGED:
        assert f"{path} {told}" in refused("--evaluate", path) == refused(init_path=path)


def test_checkpoint_of_another_task(finished, refused, tmp_path):
    run = shutil.copytree(finished[1], tmp_path / "run")
    make_sac(expert := tmp_path / "mountain.zip", MOUNTAIN)
    assert "is no SAC agent of this task" in refused("--evaluate", run, env_name=MOUNTAIN)
    other = dict(init_path=run, expert_path=expert, env_name=MOUNTAIN)
    assert NO_FIT in refused(**other, n_workers=2)
    assert not multiprocessing.active_children()
    assert NO_FIT in refused(init_path=run, hidden_dim=8)
    assert "--env_kwargs cannot change now" in refused("--resume", run, '--env_kwargs={"g": 9}')
    assert "--K cannot change now; what can: " in refused("--evaluate", run, "--K=3")
    make_sac(other := tmp_path / "other.zip", net_arch=[8])
    told = refused("--resume", run, max_iteration=9, expert_path=other)
    assert NO_FIT in told and "labels are another expert's" in told
    for name in ("run:Strange-v0", "logs.run:Strange-v0"):
        change(run / "last.pt", "config", env_name=name)
        assert f"imports {name}; if you trust" in refused("--resume", run)


@pytest.mark.parametrize("error, saved", [(OSError, 0), (OSError, 2), (RuntimeError, 2)])
def test_full_disk_leaves_no_half_file(run_strange, tmp_path, monkeypatch, error, saved):
    def save(state, path, save=torch.save, calls=[]):
        save(state, path)
        calls.append(path)
        if len(calls) > saved:
            raise error("No space left on device")

    monkeypatch.setattr(torch, "save", save)
    result = run_strange()
    assert result.status == 2 and "Traceback" not in result.err
    assert re.search(r"error: .*\.pt cannot be written; .* No space left", result.err)
    names = {path.name for path in only_run(tmp_path / "logs").iterdir()}
    assert ("last.pt" in names) == (saved > 0) and "tmp" not in str(names)


def test_fault_of_our_own_is_not_told_as_a_damaged_file(run_strange, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: no_such_name)  # noqa: F821
    with pytest.raises(NameError, match="no_such_name"):
        run_strange()


@pytest.mark.parametrize("n_workers", [1, 2])
def test_environment_that_raises_keeps_its_traceback(run_strange, run_main, tmp_path, n_workers):
    kwargs = dict(broken=str(broken := tmp_path / "broken"), dtype="float64")
    assert run_strange(kwargs, n_workers=n_workers).status == 0
    run, _ = only_run(tmp_path / "logs"), broken.touch()
    with pytest.raises(ArithmeticError, match="the motor is gone") as raised:
        run_main("--resume", run, max_iteration=5, env_name=STRANGE)
    assert "in step" in "".join(traceback.format_exception(raised.value))
    assert not multiprocessing.active_children()
    last, _ = checkpoint(run / "last.pt"), broken.unlink()
    assert last["iteration"] == 2 and json.loads(last["config"]["env_kwargs"]) == kwargs
    how = dict(env_name=STRANGE, env_kwargs=kwargs | dict(pay=1.0))  # for 20 steps
    assert re.search("learner +20 ± 0\n", run_main("--evaluate", run, **how).out)


@pytest.mark.parametrize("kwargs, mend", [
    (dict(flaw="no display"), "Strange-v0 cannot be made; .* no display"), ({}, "NaN.*--lr"),
    (dict(nan_at=19), "Strange-v0 .*NaN"), (dict(pay=torch.nan), "Strange-v0 .*NaN"),
])  # fmt: skip
def test_bad_environment_or_loss_ends_the_run(kwargs, mend, run_strange, tmp_path, monkeypatch):
    if not kwargs:
        loss = AggreVateDAgent.loss
        monkeypatch.setattr(AggreVateDAgent, "loss", lambda *x, **k: torch.nan * loss(*x, **k))
    result = run_strange(kwargs, n_workers=2)
    assert result.status == 2 and "Traceback" not in result.err
    assert re.search(f"error: .*{mend}", result.err), result.err
    for path in tmp_path.rglob("last.pt"):  # before it is kept
        assert checkpoint(path)["iteration"] == 0
