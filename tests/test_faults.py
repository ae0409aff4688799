"""Bad input, broken and hostile files, bad numbers, full disks: one error, nothing spoiled."""

import base64
import contextlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

import aggrevated
from aggrevated import AggreVateDAgent, SACExpert, UserError
from faults_common import *  # noqa: F403  (fixtures too)
from faults_common import (
    PLAIN, ROOT, Bomb, checkpoint, equal, error_line, files, no_film, only_run, options, pack,
    parent, run_main, sac_bytes, spaces, torch_bytes, unpack, with_pickle, with_state,
)  # fmt: skip


def loads(raw: bytes, path, env_name=PLAIN) -> bool:
    """Whether bytes load as an expert; anything but that and UserError is a failure."""
    path.write_bytes(raw)
    try:
        expert = SACExpert(path, *spaces(env_name))
        expert.predict(np.zeros((1, 3), np.float32))
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return False
    return True


# -- bad input, line by line -------------------------------------------------------------------
def test_the_runs_here_work(expert, tmp_path):
    """What all the refusals below are changes of."""
    status, out, err = parent().run(run_main, options(tmp_path / "logs", expert))
    assert (status, "Traceback" in err) == (0, False), err
    assert {p.name for p in only_run(tmp_path / "logs").iterdir() if "tfevents" not in p.name} == {
        "config.json", "evaluations.csv", "last.pt", "best.pt", "final.gif",
    }  # fmt: skip


@pytest.mark.parametrize(
    "raw",
    [b"", b"not a zip", b"PK\3\4", b"PK\5\6" + bytes(18), bytes(100_000)],
    ids=["empty", "text", "magic", "empty_zip", "zeros"],
)
def test_expert_is_no_zip(raw, expert, tmp_path, refused):
    expert.write_bytes(raw)
    assert str(expert) in refused(*options(tmp_path / "logs", expert))


@pytest.mark.parametrize(
    "path", ["missing.zip", "missing/x.zip", ".", "/dev/null", "\0", "x" * 5000]
)
def test_expert_cannot_be_read(path, tmp_path, refused):
    refused(*options(tmp_path / "logs", path))


def endless_expert(kind, folder):
    """An expert that never ends, or is far larger than the memory this process may have."""
    path = folder / "expert.zip"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = "/dev/zero"
    else:
        with open(path, "wb") as file:
            file.truncate(2**36)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)
    return aggrevated.main(options(folder / "logs", path))


@pytest.mark.parametrize("kind", ["fifo", "device", "sparse"])
def test_expert_without_end(kind, tmp_path):
    status, _, err = parent().run(endless_expert, kind, tmp_path, timeout=120)
    assert status == 2, err
    error_line(err)


@pytest.mark.parametrize("kind", ["PPO", "TD3", "DDPG"])
def test_expert_is_not_sac(kind, expert, tmp_path, refused):
    expert.write_bytes(sac_bytes(kind=kind))
    refused(*options(tmp_path / "logs", expert))


def test_expert_of_another_environment(expert, tmp_path, refused):
    expert.write_bytes(sac_bytes("Pendulum-v1"))  # 3 observations too, but 1 action
    text = refused(*options(tmp_path / "logs", expert))
    assert "1 action" in text and "2" in text
    expert.write_bytes(sac_bytes("MountainCarContinuous-v0"))
    text = refused(*options(tmp_path / "logs", expert, "Pendulum-v1"))
    assert "2 observations" in text and "3" in text


@pytest.mark.parametrize(
    "name",
    [
        "", "Nothing-v0", "BipedalWalker-v999", "Pendulum-v1 ", "no_module:X-v0", "../x", "\0",
        "x" * 3000,
        "CartPole-v1", "ALE/Pong-v5",
        *(f"faults_envs:{f}-v0" for f in (
            "raises", "discrete", "unbounded", "half_bounded", "equal_bounds", "matrix_actions",
            "no_actions", "dict", "image",
        )),
    ],
)  # fmt: skip
def test_environment_does_not_do(name, expert, tmp_path, refused):
    refused(*options(tmp_path / "logs", expert, name))


@pytest.mark.parametrize(
    "option, value",
    [
        (name, value)
        for names, values in {
            "K H n_workers n_threads max_iteration alpha_decay_iterations max_experience_len "
            "hidden_dim batch_sz update_sz train_repeat cg_iterations eval_every eval_episodes": (
                "0 -1 1.5 x nan 1e3"
            ),
            "seed": "-1 x 1.5",
            "lr max_grad_norm kl_step": "0 -1 nan inf x",
            "gap_factor roll_in_noise final_lr cg_damping temperature": "-0.1 nan inf",
            "gap_cut": "0.9 nan inf",
            "gamma": "-0.1 1.1 nan 0.5",
            "target_clip": "0.4 1.1 nan",
            "log_std_min": "nan -inf 3",
            "log_std_max": "nan inf -6",
            "weighting": "none GAP",
            "algorithm": "none BC",
            "optimizer": "none Adam",
            "combine": "none median",
            "device": "tpu cuda:99 cpu:x meta mkldnn",
        }.items()
        for name in names.split()
        for value in [*values.split(), ""]
    ],
)
def test_option_out_of_range(option, value, expert, tmp_path, refused):
    text = refused(*options(tmp_path / "logs", expert, **{option: value}))
    assert option in text or option == "lr" and "learning" in text


@pytest.mark.parametrize("path", ["missing.pt", ".", "/dev/null", "an expert"])
def test_start_from_what_is_no_checkpoint(path, expert, tmp_path, refused):
    path = str(expert) if path == "an expert" else path
    assert path in refused(*options(tmp_path / "logs", expert, init_path=path))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nonsense"], ["--nonsense=3"], ["--K"], ["stray"], ["--learning_rate=1"], ["--max_it=3"],
        ["--lr", "-inf"], ["--resume", "x", "--evaluate", "y"], ["--resume"], ["--evaluate"],
        ["--render=yes"], ["--resume", "nowhere", "--lr=1e-3"], ["--resume", "nowhere", "--seed=3"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_option_unknown_or_misused(arguments, refused):
    refused(*arguments)


@pytest.mark.parametrize("value", [2**40, 2**63, 10**30])
@pytest.mark.parametrize("option", ["seed", "n_threads", "H", "hidden_dim", "K", "eval_episodes"])
def test_option_huge(option, value, expert, tmp_path):
    """No number of anything needs 40 bits; some of these would take the whole memory."""
    arguments = options(tmp_path / "logs", expert, **{option: value})
    status, _, err = parent().run(limited_main, 2**30, arguments, timeout=60)
    assert status == 2, err
    assert option in error_line(err) and not (tmp_path / "logs").exists()


def limited_main(more, argv):
    """main with `more` bytes of memory."""
    no_film()
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more,) * 2)
    return aggrevated.main(argv)


@pytest.mark.parametrize("where", ["file", "below_a_file", "/proc/nowhere", "/dev/null/x", "long"])
def test_log_dir_cannot_be_written(where, expert, tmp_path, refused):
    (tmp_path / "file").write_text("here already")
    where = {"below_a_file": "file/logs", "long": "x" * 300}.get(where, where)
    text = refused(*options(tmp_path / where, expert))
    assert "log_dir" in text


def test_exit_status_and_stderr_of_the_program(tmp_path):
    """As a shell sees it: the status, nothing on stdout, one line on stderr."""
    code = (
        "import subprocess, sys, aggrevated\n"
        "for a in (['--K=0'], ['--env_name=Nothing-v0'], ['--expert_path=x.zip'], ['--resume=x'],"
        " ['--env_name=CartPole-v1'], ['--env_name=Pendulum-v0']):\n"
        "    assert aggrevated.main(a) == 2\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == ""
    assert [x[:7] for x in done.stderr.splitlines()] == 6 * ["error: "], done.stderr
    done = subprocess.run(
        [sys.executable, ROOT / "aggrevated.py", "--K=0", f"--log_dir={tmp_path}/logs"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert list(tmp_path.iterdir()) == []


# -- broken and hostile experts ----------------------------------------------------------------
@pytest.mark.parametrize("tenth", range(10))
def test_expert_truncated(tenth, expert, tmp_path, refused):
    raw = sac_bytes()
    expert.write_bytes(raw[: len(raw) * tenth // 10])
    refused(*options(tmp_path / "logs", expert))


@pytest.mark.parametrize("seed", range(4))
def test_expert_with_flipped_bytes(seed, tmp_path):
    """30 cases each: a flip where nothing is read may do no harm, but none may surprise."""
    rng, raw = random.Random(seed), sac_bytes()
    outcomes = []
    for _ in range(30):
        damaged = bytearray(raw)
        for _ in range(rng.choice((1, 1, 4, 100))):
            damaged[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        outcomes.append(loads(bytes(damaged), tmp_path / "x.zip"))
    assert outcomes.count(False) > 15


@pytest.mark.parametrize("name", ["data", "policy.pth", None])
def test_expert_without_a_member(name, tmp_path):
    members = unpack(sac_bytes())
    members = {k: v for k, v in members.items() if name and k != name}
    assert not loads(pack(members), tmp_path / "x.zip")


@pytest.mark.parametrize(
    "name", ["pytorch_variables.pth", "actor.optimizer.pth", "system_info.txt"]
)
def test_expert_without_what_is_not_read(name, tmp_path):
    members = unpack(sac_bytes())
    assert loads(pack(members), tmp_path / "x.zip")
    del members[name]
    assert loads(pack(members), tmp_path / "x.zip")


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"\xff\xfe\x00", b"null", b"[]", b"3", b'"x"', b"{}", b'{"gamma": "x"}',
        b'{"gamma": []}',
        b'{"gamma": NaN}', b'{"gamma": 1e999}', b'{"gamma": {}}',
        b'{"gamma": 0.99, "policy_kwargs": 5}',
        b'{"gamma": 0.99, "policy_kwargs": []}', b'{"gamma": 0.99, "use_sde": true}',
        b'{"gamma": 0.99, "policy_kwargs": {"activation_fn": "<class \'os.system\'>"}}',
        b'{"gamma": 0.99, "policy_kwargs": {"activation_fn": 7}}', b"[" * 100_000,
        b'{"a":' * 100_000, b"9" * 10_000, b'{"gamma": ' + b"9" * 10_000 + b"}",
    ],
    ids=lambda b: b[:60].decode("ascii", "replace") or "empty",
)  # fmt: skip
def test_expert_with_odd_data(data, expert, tmp_path, refused):
    members = unpack(sac_bytes()) | {"data": data}
    expert.write_bytes(pack(members))
    if data == b"{}" or data.endswith(b"[]}"):  # as good as no policy_kwargs
        assert loads(pack(members), expert)
    else:
        refused(*options(tmp_path / "logs", expert))


def nan(state, value=torch.nan):
    state["actor.mu.weight"][0, 0] = value


def transpose(state):
    state["actor.latent_pi.2.weight"] = torch.zeros(16, 17)


STATES = {
    "nan": nan,
    "inf": lambda s: nan(s, -torch.inf),
    "nan_critic": lambda s: s.update({"critic.qf1.0.bias": torch.full((16,), torch.nan)}),
    "overflows_float32": lambda s: s.update(
        {"critic.qf0.4.bias": torch.full((1,), 1e300, dtype=torch.double)}
    ),
    "other_shape": transpose,
    "cut": lambda s: s.update({"actor.mu.weight": s["actor.mu.weight"][:, :8]}),
    "no_critic": lambda s: {k: v for k, v in s.items() if not k.startswith("critic.")},
    "no_second_critic": lambda s: {k: v for k, v in s.items() if not k.startswith("critic.qf1")},
    "no_log_std": lambda s: {k: v for k, v in s.items() if k != "actor.log_std.weight"},
    "more": lambda s: s.update({"actor.more": torch.zeros(3)}),
    "scalar": lambda s: s.update({"actor.mu.bias": torch.tensor(0.0)}),
    "scalar_layer": lambda s: s.update({"actor.latent_pi.0.weight": torch.tensor(0.0)}),
    "no_units": lambda s: s.update({"actor.latent_pi.0.weight": torch.zeros(0, 3)}),
    "not_a_tensor": lambda s: s.update({"actor.mu.bias": [0.0, 0.0]}),
    "string": lambda s: s.update({"actor.latent_pi.0.weight": "weights"}),
    "layer_x": lambda s: s.update({"actor.latent_pi.x.weight": torch.zeros(16, 3)}),
    "sparse": lambda s: s.update({"actor.mu.bias": torch.zeros(2).to_sparse()}),
    "meta": lambda s: s.update({"actor.mu.bias": torch.zeros(2, device="meta")}),
    "empty": lambda s: {},
    "list": lambda s: list(s.values()),
    "tensor": lambda s: torch.zeros(3),
    "none": lambda s: 0,
    "int_keys": lambda s: dict(enumerate(s.values())),
    "more_int_keys": lambda s: s.update({3: torch.zeros(3)}),
}


@pytest.mark.parametrize("name", STATES)
def test_expert_with_odd_weights(name, expert, tmp_path, refused):
    expert.write_bytes(with_state(STATES[name]))
    refused(*options(tmp_path / "logs", expert))


def expand(*shape):
    return torch.zeros(1).expand(shape)


def wide(state):
    for i in (0, 2, 4, 6):
        state[f"actor.latent_pi.{i}.weight"] = expand(16_384, 1)


def many(state):
    for i in range(2000):
        state[f"critic.qf{i}.0.weight"] = state["critic.qf0.0.weight"]
        state[f"critic.qf{i}.2.weight"] = expand(2048, 1)
    state["critic.qf0.0.weight"] = expand(2048, 5)


HUGE = {
    "expanded": lambda s: s.update({"actor.latent_pi.0.weight": expand(2**40, 3)}),
    "expanded_leaf": lambda s: s.update({"actor.mu.bias": expand(2**42)}),
    "wide_layers": wide,
    "many_critics": many,
    "many_small_critics": lambda s: s.update(
        {f"critic.qf{i}": s["actor.mu.bias"] for i in range(50_000)}
    ),
    "deep": lambda s: s.update(
        {f"actor.latent_pi.{i}.weight": expand(2048, 1) for i in range(0, 4000, 2)}
    ),
}


def load_and_measure(path):
    """The exit status, unless loading took more than half a GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = limited_main(2**32, options(path.parent / "logs", path))
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    return status if more < 500_000 else f"{more} kB more"


@pytest.mark.parametrize("name", HUGE)
def test_expert_that_claims_huge_tensors(name, expert):
    """A few kB of file must not become GBs of network."""
    expert.write_bytes(with_state(HUGE[name]))
    status, _, err = parent().run(load_and_measure, expert)
    assert status == 2, err
    error_line(err)


def test_expert_whose_pickle_claims_more_than_its_file_holds(expert, tmp_path, refused):
    """The storage sizes stand in the pickle; beyond the record there is other memory."""
    members = unpack(sac_bytes())
    inner = unpack(members["policy.pth"])
    (name,) = [k for k in inner if k.endswith("/data/0")]
    inner[name] = inner[name][:4]
    expert.write_bytes(pack(members | {"policy.pth": pack(inner)}))
    refused(*options(tmp_path / "logs", expert))


def zeros(n_bytes, declared=None) -> bytes:
    """A zip member's worth of deflated zeros, in a zip with `policy.pth` and `data`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("data", "{}")
        with archive.open("policy.pth", "w") as member:
            for _ in range(n_bytes // 2**24):
                member.write(bytes(2**24))
    raw, size = buffer.getvalue(), n_bytes // 2**24 * 2**24
    return raw.replace(struct.pack("<I", size), struct.pack("<I", declared or size))


@pytest.fixture(scope="module")
def bomb():
    return zeros(2**29 + 2**26)


@pytest.mark.parametrize("kind", ["declared", "lying", "nested", "twice"])
def test_zip_bomb(kind, bomb, expert, tmp_path):
    if kind == "lying":
        bomb = zeros(2**26, declared=1000)
    elif kind == "nested":
        bomb = pack(unpack(sac_bytes()) | {"policy.pth": bomb})
    elif kind == "twice":  # 1000 entries of the directory that share one member
        bomb = zeros(2**24)
        start, end = bomb.rindex(b"PK\1\2"), bomb.rindex(b"PK\5\6")
        entry, tail = bomb[start:end], bytearray(bomb[end:])
        tail[8:12] = struct.pack("<HH", 1001, 1001)
        (size,) = struct.unpack("<I", tail[12:16])
        tail[12:16] = struct.pack("<I", size + 999 * len(entry))
        bomb = bomb[:start] + 1000 * entry + bytes(tail)
        with zipfile.ZipFile(io.BytesIO(bomb)) as archive:
            assert len(archive.infolist()) == 1001
    assert len(bomb) < 4_000_000
    expert.write_bytes(bomb)
    status, _, err = parent().run(load_and_measure, expert, timeout=120)
    assert status == 2, err
    error_line(err)


def test_checkpoint_bomb(bomb, finished_run, tmp_path, capsys):
    (tmp_path / "last.pt").write_bytes(bomb)
    assert aggrevated.main(["--resume", str(tmp_path)]) == 2
    error_line(capsys.readouterr().err)


def test_path_traversal_writes_nothing(expert, tmp_path, monkeypatch):
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    names = [
        "../evil",
        "../../evil",
        f"{tmp_path}/evil",
        "..\\evil",
        "/evil_aggrevated",
        "a/../../evil",
    ]
    before = files(tmp_path)
    with contextlib.suppress(UserError):
        expert.write_bytes(sac_bytes())
        path = inside / "x.zip"
        path.write_bytes(pack(unpack(sac_bytes()) | {n: b"evil" for n in names}))
        SACExpert(path, *spaces())
    inner = unpack(unpack(sac_bytes())["policy.pth"])
    path.write_bytes(
        pack(unpack(sac_bytes()) | {"policy.pth": pack(inner | {f"x/{n}": b"evil" for n in names})})
    )
    with contextlib.suppress(UserError):
        SACExpert(path, *spaces())
    path.unlink()
    assert files(tmp_path) == before and not os.path.exists("/evil_aggrevated")


# -- pickles that would execute code -----------------------------------------------------------
def bombs(marker):
    """Pickles, bare and as torch saves them, that create `marker` when they are loaded."""
    for how in range(4):
        yield pickle.dumps(Bomb(marker, how))
        yield pickle.dumps({"policy": Bomb(marker, how)}, protocol=2)
        yield torch_bytes({"policy": torch.zeros(3), "config": Bomb(marker, how)})
        buffer = io.BytesIO()
        torch.save(Bomb(marker, how), buffer, _use_new_zipfile_serialization=False)
        yield buffer.getvalue()


def test_the_bombs_go_off(tmp_path):
    """Or the tests below would show nothing."""
    marker = tmp_path / "marker"
    for raw in bombs(marker):
        with contextlib.suppress(Exception):
            torch.load(io.BytesIO(raw), weights_only=False)
        assert marker.exists()
        marker.unlink()


@pytest.mark.parametrize(
    "place, read",
    [
        ("policy.pth", True), ("policy.pth/data.pkl", True), ("data", True),
        ("pytorch_variables.pth", False), ("actor.optimizer.pth", False),
        ("critic.optimizer.pth", False), ("ent_coef_optimizer.pth", False),
        ("system_info.txt", False), ("_stable_baselines3_version", False), ("new.pth", False),
    ],
)  # fmt: skip
def test_pickle_in_expert_is_never_executed(place, read, tmp_path):
    marker = tmp_path / "marker"
    for raw in bombs(marker):
        members = unpack(sac_bytes())
        if place == "policy.pth/data.pkl":
            members["policy.pth"] = with_pickle(members["policy.pth"], raw)
        else:
            members[place] = raw
        assert loads(pack(members), tmp_path / "x.zip") is not read
        assert not marker.exists()


def test_pickle_in_the_data_of_an_expert_is_never_executed(tmp_path):
    """In every field that SB3 pickles, and where no version has had one yet."""
    marker, members = tmp_path / "marker", unpack(sac_bytes(activation_fn=torch.nn.Tanh))
    plain = json.loads(members["data"])
    pickled = [k for k, v in plain.items() if isinstance(v, dict) and ":serialized:" in v]
    assert {"policy_class", "policy_kwargs", "observation_space", "lr_schedule"} <= set(pickled)
    for raw in bombs(marker):
        bomb = {":type:": "<class 'function'>", ":serialized:": base64.b64encode(raw).decode()}
        for field in [*pickled, "_last_obs", "new"]:
            old = plain.get(field) if field in pickled else {}
            data = plain | {field: old | bomb}
            assert loads(pack(members | {"data": json.dumps(data).encode()}), tmp_path / "x.zip")
        assert not marker.exists()


def test_pickle_in_checkpoint_is_never_executed(finished_run, tmp_path, capsys):
    marker, run = tmp_path / "marker", tmp_path / "run"
    shutil.copytree(finished_run, run)
    good = (run / "last.pt").read_bytes()
    for raw in bombs(marker):
        state = checkpoint(finished_run / "last.pt")
        whole = pickle.loads(pickle.dumps(state)) | {"seconds": Bomb(marker)}
        for damaged in (raw, with_pickle(good, raw), torch_bytes(whole)):
            (run / "last.pt").write_bytes(damaged)
            (run / "best.pt").write_bytes(damaged)
            for mode in ("--resume", "--evaluate"):
                assert aggrevated.main([mode, str(run)]) == 2
                error_line(capsys.readouterr().err)
                assert not marker.exists()


# -- broken and hostile checkpoints ------------------------------------------------------------
@pytest.fixture
def damaged(finished_run, tmp_path):
    """damaged(raw) puts it in place of a run's checkpoints; returns the status of resuming it.

    Whatever is refused is refused in one line, with the run folder as it was.
    """
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)

    def use(raw, mode="--resume"):
        for name in ("last.pt", "best.pt"):
            (run / name).write_bytes(raw)
        before, more = files(run), ["--max_iteration=4"] if mode == "--resume" else []
        status, _, err = parent().run(run_main, [mode, str(run), *more], False, timeout=120)
        if status:
            assert status == 2, err
            error_line(err)
            assert files(run) == before
        elif mode == "--resume":
            after = checkpoint(run / "last.pt")
            assert all(v.isfinite().all() for v in after["policy"].values())
        return status

    return use


def test_checkpoint_is_refused_only_when_damaged(damaged, finished_run):
    for mode in ("--resume", "--evaluate"):
        assert damaged((finished_run / "last.pt").read_bytes(), mode) == 0


@pytest.mark.parametrize("mode", ["--resume", "--evaluate"])
def test_checkpoint_truncated(mode, damaged, finished_run):
    raw = (finished_run / "last.pt").read_bytes()
    for tenth in range(10):
        assert damaged(raw[: len(raw) * tenth // 10], mode) == 2


@pytest.mark.parametrize("mode", ["--resume", "--evaluate"])
def test_checkpoint_with_flipped_bytes(mode, damaged, finished_run):
    rng, raw = random.Random(mode), (finished_run / "last.pt").read_bytes()
    outcomes = []
    for _ in range(40):
        bad = bytearray(raw)
        for _ in range(rng.choice((1, 1, 4, 100))):
            bad[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        outcomes.append(damaged(bytes(bad), mode))
    assert outcomes.count(2) > 20


def changed(finished_run, change) -> bytes:
    state = checkpoint(finished_run / "last.pt")
    result = change(state)
    return torch_bytes(state if result is None else result)


def setting(*keys, value):
    """A change that sets state[key][key]... = value."""

    def change(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


def without(*keys):
    """A change that deletes state[key][key]..."""

    def change(state):
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return change


KEYS = (
    "config", "policy", "optimizer", "experience", "iteration", "env_steps", "seconds",
    "best_return",
    "expert_return", "csv_bytes",
)  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_checkpoint_without_a_key(key, damaged, finished_run):
    assert damaged(changed(finished_run, without(key))) == 2


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", ["x", None, [], {}, torch.zeros(3)], ids=repr)
def test_checkpoint_with_a_value_of_another_type(key, value, damaged, finished_run):
    raw = changed(finished_run, setting(key, value=value))
    assert damaged(raw) == 2
    if key in ("config", "policy"):
        assert damaged(raw, "--evaluate") == 2


@pytest.mark.parametrize("value", [[], "x", 3, {}, {"policy": {}}, torch.zeros(3)], ids=repr)
def test_checkpoint_is_something_else(value, damaged):
    for mode in ("--resume", "--evaluate"):
        assert damaged(torch_bytes(value), mode) == 2


@pytest.mark.parametrize(
    "field, value",
    [
        ("unknown", 3), (3, 3), ("lr", "x"), ("lr", -1.0), ("lr", 10**400), ("lr", torch.nan),
        ("lr", None), ("K", 0),
        ("K", 2.5), ("K", True), ("K", "3"), ("H", []), ("env_name", 3), ("env_name", "Nothing-v0"),
        ("env_name", "\0"), ("env_name", "Pendulum-v1"), ("expert_path", "missing.zip"),
        ("expert_path", "\0"), ("expert_path", 3), ("weighting", "none"), ("weighting", ["gap"]),
        ("hidden_dim", 9), ("gamma", 0.5), ("gamma", torch.tensor(0.99)), ("device", "tpu"),
        ("render", "yes"), ("log_dir", None), ("seed", -1),
    ],
)  # fmt: skip
def test_checkpoint_with_odd_config(field, value, damaged, finished_run):
    raw = changed(finished_run, setting("config", field, value=value))
    for mode in ("--resume", "--evaluate"):
        assert damaged(raw, mode) == 2


WEIGHTS = {
    "nan": torch.full((8, 3), torch.nan),
    "inf": torch.full((8, 3), torch.inf),
    "other_shape": torch.zeros(3, 8),
    "scalar": torch.tensor(0.0),
    "empty": torch.zeros(0, 3),
    "list": [0.0],
    "sparse": torch.zeros(8, 3).to_sparse(),
    "meta": torch.zeros(8, 3, device="meta"),
    "huge": torch.zeros(1).expand(2**42, 3),
    "overflows_float32": torch.full((8, 3), 1e300, dtype=torch.double),
}


@pytest.mark.parametrize("mode", ["--resume", "--evaluate"])
@pytest.mark.parametrize("name", [*WEIGHTS, "missing", "more", "int_key"])
def test_checkpoint_with_odd_weights(name, mode, damaged, finished_run):
    change = {
        "missing": without("policy", "fc1.weight"),
        "more": setting("policy", "more", value=torch.zeros(3)),
        "int_key": setting("policy", 3, value=torch.zeros(3)),
    }
    assert damaged(
        changed(
            finished_run,
            change.get(name) or setting("policy", "fc1.weight", value=WEIGHTS.get(name)),
        ),
        mode,
    ) == 2  # fmt: skip


def test_checkpoint_of_another_action_range(damaged, finished_run):
    """The learner's buffers say what its actions mean; they must be the environment's."""
    raw = changed(finished_run, setting("policy", "scale", value=torch.ones(2)))
    for mode in ("--resume", "--evaluate"):
        assert damaged(raw, mode) == 2


@pytest.mark.parametrize("key", ["state", "expert_action", "q_expert"])
@pytest.mark.parametrize(
    "how", ["missing", "nan", "flat", "wide", "short", "list", "double", "empty"]
)
def test_checkpoint_with_odd_experience(key, how, damaged, finished_run):
    def change(state):
        e = state["experience"]
        e[key] = {
            "missing": None,
            "nan": e[key] * torch.nan,
            "flat": e[key].flatten(),
            "wide": torch.cat([e[key], e[key]], dim=1),
            "short": e[key][1:],
            "list": e[key].tolist(),
            "double": e[key].double(),
            "empty": e[key][:0],
        }[how]
        if how == "missing":
            del e[key]

    assert damaged(changed(finished_run, change)) == 2


@pytest.mark.parametrize(
    "change",
    [
        setting("optimizer", value={}),
        setting("optimizer", "state", value={}),
        setting("optimizer", "state", 0, value={}),
        setting("optimizer", "state", 0, "exp_avg", value=torch.zeros(1)),
        setting("optimizer", "state", 0, "exp_avg", value=torch.zeros(3, 8)),
        setting("optimizer", "state", 0, "exp_avg", value=torch.full((8, 3), torch.nan)),
        setting("optimizer", "state", 0, "exp_avg_sq", value=torch.full((8, 3), -1.0)),
        setting("optimizer", "state", 0, "exp_avg_sq", value=None),
        setting("optimizer", "state", 0, "step", value=torch.tensor(torch.nan)),
        setting("optimizer", "state", 0, "step", value="x"),
    ],
)
def test_checkpoint_with_odd_optimizer(change, damaged, finished_run):
    """A moment of another size would have the fused step write beyond its memory."""
    assert damaged(changed(finished_run, change)) == 2


@pytest.mark.parametrize(
    "keys, value",
    [
        ((), []), ((), "x"), ((0, "lr"), torch.nan), ((0, "lr"), "x"),
        ((0, "betas"), (2.0, torch.nan)),
        ((0, "betas"), None), ((0, "params"), [0]), ((0, "fused"), "x"), ((0, "amsgrad"), True),
        ((0, "maximize"), True), ((0, "weight_decay"), 1e30),
    ],
)  # fmt: skip
def test_checkpoint_with_odd_optimizer_settings(keys, value, damaged, finished_run, tmp_path):
    """They are Config's to give: refused, or without effect."""
    keys = "optimizer", "param_groups", *keys
    assert damaged((finished_run / "last.pt").read_bytes()) == 0
    plain = checkpoint(tmp_path / "run" / "last.pt")["policy"]
    if damaged(changed(finished_run, setting(*keys, value=value))) == 0:
        assert equal(checkpoint(tmp_path / "run" / "last.pt")["policy"], plain)


@pytest.mark.parametrize(
    "key, value",
    [
        ("iteration", -5), ("iteration", 1.5), ("iteration", torch.nan), ("iteration", True),
        ("iteration", 2**70), ("csv_bytes", -1), ("csv_bytes", 1.5), ("env_steps", -1),
        ("seconds", torch.nan), ("best_return", torch.nan),
    ],
)  # fmt: skip
def test_checkpoint_with_an_impossible_counter(key, value, damaged, finished_run):
    assert damaged(changed(finished_run, setting(key, value=value))) == 2


@pytest.mark.parametrize("path", ["nowhere", "nowhere/last.pt", ".", "/dev/null", "\0"])
@pytest.mark.parametrize("mode", ["--resume", "--evaluate"])
def test_checkpoint_cannot_be_read(mode, path, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    refused(mode, path)


def test_resume_whose_evaluations_are_gone(finished_run, tmp_path):
    """What is lost is lost, but the rest is a table still."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "evaluations.csv").unlink()
    status, _, err = parent().run(run_main, ["--resume", str(run), "--max_iteration=4"], False)
    if status:
        error_line(err)
    else:
        text = (run / "evaluations.csv").read_text()
        assert "\0" not in text and text.startswith("iteration,env_steps,")


# -- numbers -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "fault, word",
    [
        ("nan_obs", "observation"), ("inf_obs", "observation"), ("float64_huge", "observation"),
        ("nan_reward", "reward"), ("inf_reward", "reward"),
    ],
)  # fmt: skip
def test_environment_with_bad_numbers(fault, word, expert, tmp_path):
    """Detected, named, and no later than the first evaluation."""
    arguments = options(tmp_path / "logs", expert, f"faults_envs:{fault}-v0")
    status, _, err = parent().run(run_main, arguments)
    assert status == 2, err
    assert word in error_line(err)
    last = only_run(tmp_path / "logs") / "last.pt"
    assert not last.exists() or all(v.isfinite().all() for v in checkpoint(last)["policy"].values())


@pytest.mark.parametrize(
    "fault, length",
    [("plain", 5), ("one_step", 1), ("truncates", 4), ("float64", 5), ("narrow", 5)],
)
def test_environment_with_odd_episodes(fault, length, expert, tmp_path):
    """Saturated experts and learners included: every action lies in its Box."""
    env_name = f"faults_envs:{fault}-v0"

    def saturate(state):
        state["actor.mu.weight"] *= 1e4
        state["actor.mu.bias"] += torch.tensor([1e4, -1e4])

    expert.write_bytes(with_state(saturate, sac_bytes(env_name)))
    arguments = options(tmp_path / "logs", expert, env_name, roll_in_noise=50.0, max_iteration=4)
    status, _, err = parent().run(run_main, arguments)
    assert status == 0, err
    run = only_run(tmp_path / "logs")
    rows = [r.split(",") for r in (run / "evaluations.csv").read_text().splitlines()[1:]]
    assert {int(r[-1]) for r in rows} == {length}
    assert len(rows) == 2 * 4  # expert and learner at 0, learner at 2 and 4
    last = checkpoint(run / "last.pt")
    assert last["env_steps"] == 4 * 2 * length == len(last["experience"]["state"])
    assert last["experience"]["state"].dtype == torch.float32


@pytest.mark.parametrize(
    "changes",
    [
        dict(H=1), dict(K=1, n_workers=5), dict(H=1, K=1, batch_sz=1), dict(max_experience_len=1),
        dict(max_experience_len=1, weighting="minmax"), dict(eval_episodes=1), dict(batch_sz=10**6),
        dict(alpha_decay_iterations=1), dict(max_iteration=1, eval_every=100), dict(gap_cut=1.0),
        dict(gap_factor=0.0, roll_in_noise=0.0), dict(target_clip=1.0),
        dict(log_std_min=0, log_std_max=0),
        dict(hidden_dim=1), dict(K=7, n_threads=2),
        *(dict(H=1, K=1, algorithm=a) for a in ("bc", "dagger", "aggrevate", "reinforce")),
        *(dict(H=1, K=1, weighting=w) for w in ("score", "pathwise", "minmax")),
    ],
    ids=str,
)  # fmt: skip
def test_smallest_values(changes, expert, tmp_path):
    """Each lower bound that Config allows is one that works."""
    arguments = options(tmp_path / "logs", expert, **changes)
    status, _, err = parent().run(run_main, arguments, False)
    assert status == 0, err
    last = checkpoint(only_run(tmp_path / "logs") / "last.pt")
    assert all(v.isfinite().all() for v in last["policy"].values())
    if "H" in changes:
        assert last["env_steps"] == 3 * changes.get("K", 2)


def test_critic_that_overflows(expert, tmp_path):
    def overflow(state):
        for k, v in state.items():
            if k.startswith("critic.qf"):
                v.abs_().add_(1).mul_(1e25)

    expert.write_bytes(with_state(overflow))
    status, _, err = parent().run(run_main, options(tmp_path / "logs", expert))
    assert status == 2 and "Q*" in error_line(err)
    last = checkpoint(only_run(tmp_path / "logs") / "last.pt")
    assert last["iteration"] == 0 and not last["experience"]


def spoil(what, argv):
    """main, with a NaN in something from iteration 2 on."""
    no_film()
    plain = AggreVateDAgent.loss
    calls = []

    def loss(self, state, target, weight):
        calls.append(1)
        if self.iteration < 1:
            return plain(self, state, target, weight)
        if what == "loss":
            return plain(self, state, target, weight) * torch.nan
        if what == "weight":
            return plain(self, state, target, weight * torch.inf)
        return plain(self, state * torch.nan, target, weight)

    AggreVateDAgent.loss = loss
    return aggrevated.main(argv)


@pytest.mark.parametrize("what", ["loss", "weight", "state"])
def test_loss_that_is_nan(what, expert, tmp_path):
    status, _, err = parent().run(spoil, what, options(tmp_path / "logs", expert))
    assert status == 2
    assert "NaN" in error_line(err)
    last = checkpoint(only_run(tmp_path / "logs") / "last.pt")
    assert last["iteration"] == 1
    assert all(v.isfinite().all() for v in last["policy"].values())


@pytest.mark.parametrize("lr", [1e30, 1e38, 1e300])
def test_step_that_overflows(lr, expert, tmp_path):
    """One step per iteration: no second loss would see what the first step did."""
    arguments = options(
        tmp_path / "logs", expert, lr=lr, batch_sz=10**6, eval_every=100, max_iteration=1
    )
    status, _, err = parent().run(run_main, arguments, False)
    last = checkpoint(only_run(tmp_path / "logs") / "last.pt")
    assert all(v.isfinite().all() for v in last["policy"].values())
    if status:
        assert status == 2
        error_line(err)


# -- disk --------------------------------------------------------------------------------------
def limited_files(n_bytes, argv):
    """main where no file can grow beyond n_bytes; what it says is not meant by that."""
    no_film()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    with (
        contextlib.redirect_stderr(io.StringIO()) as err,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
        try:
            status = aggrevated.main(argv)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    sys.stderr.write(err.getvalue())
    return status


def check_after_full_disk(folder, status, err, iteration=None):
    assert status == 2, err
    error_line(err)
    run = only_run(folder)
    last = checkpoint(run / "last.pt")
    assert not list(run.glob("*.tmp"))
    if iteration is not None:
        assert last["iteration"] == iteration
    return run, last


@pytest.mark.parametrize("n_bytes", [0, 100, 2000, 6000])
def test_disk_full_from_the_start(n_bytes, expert, tmp_path):
    """Nothing can be written: nothing stays."""
    status, _, err = parent().run(
        limited_files, n_bytes, options(tmp_path / "logs", expert, max_iteration=1)
    )
    assert status == 2, err
    error_line(err)
    assert not list(tmp_path.glob("logs/*"))


def test_disk_full_while_the_checkpoint_is_saved(expert, tmp_path):
    """The checkpoint grows with the data until it does not fit; the one before stays."""
    arguments = options(
        tmp_path / "logs", expert, K=5, max_iteration=60, eval_every=100, batch_sz=1000
    )
    status, _, err = parent().run(limited_files, 25_000, arguments)
    run, last = check_after_full_disk(tmp_path / "logs", status, err)
    assert 1 <= last["iteration"] < 60
    status, _, err = parent().run(run_main, ["--resume", str(run), "--max_iteration=60"], False)
    assert status == 0 and checkpoint(run / "last.pt")["iteration"] == 60


def test_disk_full_while_tensorboard_writes(expert, tmp_path):
    """The event file is the largest here: its thread meets the limit."""
    arguments = options(
        tmp_path / "logs", expert, max_experience_len=5, max_iteration=200, eval_every=1000
    )
    status, _, err = parent().run(limited_files, 30_000, arguments)
    run, last = check_after_full_disk(tmp_path / "logs", status, err)
    assert 5 < last["iteration"] < 200


def test_disk_full_while_the_table_is_written(expert, tmp_path):
    arguments = options(
        tmp_path / "logs", expert, max_experience_len=5, eval_episodes=300, eval_every=1
    )
    status, _, err = parent().run(limited_files, 30_000, arguments)
    run, last = check_after_full_disk(tmp_path / "logs", status, err)
    status, _, err = parent().run(run_main, ["--resume", str(run), "--max_iteration=2"], False)
    rows = (run / "evaluations.csv").read_text().splitlines()
    assert status == 0 and len(rows) == 1 + 4 * 300


def vanish(how, argv):
    """main, whose run folder vanishes in iteration 2."""
    no_film()
    plain = AggreVateDAgent.iterate

    def iterate(self, n):
        if n == 2:
            shutil.rmtree(self.run_dir if how != "parent" else self.run_dir.parent)
            if how == "file":
                self.run_dir.write_text("in the way")
        return plain(self, n)

    AggreVateDAgent.iterate = iterate
    return aggrevated.main(argv)


@pytest.mark.parametrize("how", ["folder", "parent", "file"])
@pytest.mark.parametrize("eval_every", [2, 100])
def test_run_folder_vanishes(how, eval_every, expert, tmp_path):
    arguments = options(tmp_path / "logs", expert, eval_every=eval_every)
    status, _, err = parent().run(vanish, how, arguments)
    assert status == 2
    error_line(err)


# -- long runs ---------------------------------------------------------------------------------
def long_run(argv, report):
    """main, noting memory, open files, threads and children after every iteration."""
    no_film()
    notes, plain = [], AggreVateDAgent.iterate

    def iterate(self, n):
        result = plain(self, n)
        resident = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
        tasks = os.listdir("/proc/self/task")
        children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
        notes.append((resident, len(os.listdir("/proc/self/fd")), len(tasks), len(children)))
        return result

    AggreVateDAgent.iterate = iterate
    status = aggrevated.main(argv)
    report.write_text(json.dumps(notes))
    return status


@pytest.mark.slow
def test_long_run_is_flat(expert, tmp_path):
    arguments = options(
        tmp_path / "logs",
        expert,
        max_iteration=300,
        max_experience_len=200,
        eval_every=10,
        batch_sz=100,
    )
    status, _, err = parent().run(long_run, arguments, tmp_path / "notes.json")
    assert status == 0, err
    memory, fds, threads, children = zip(*json.loads((tmp_path / "notes.json").read_text()))
    assert len(memory) == 300
    assert max(memory[50:]) - memory[49] < 8_000_000
    assert len(set(fds[20:])) == 1 and len(set(threads[20:])) == 1 and set(children) == {0}
    run = only_run(tmp_path / "logs")
    (events,) = run.glob("*tfevents*")
    assert events.stat().st_size < 300 * 2000
    assert len(checkpoint(run / "last.pt")["experience"]["state"]) == 200
    assert (run / "last.pt").stat().st_size < 50_000


# -- other processes, other environments -------------------------------------------------------
@pytest.mark.slow
def test_same_weights_in_another_process(expert, tmp_path):
    """The program itself, with another hash seed, against a forked child."""
    expert.write_bytes(sac_bytes("Pendulum-v1"))
    arguments = {
        x: options(tmp_path / x, expert, "Pendulum-v1", H=20, n_threads=2, eval_episodes=1)
        for x in "ab"
    }
    done = subprocess.run(
        [sys.executable, ROOT / "aggrevated.py", *arguments["a"]],
        capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert parent().run(run_main, arguments["b"])[0] == 0
    a, b = (only_run(tmp_path / x) for x in "ab")
    for key in ("policy", "optimizer", "experience", "best_return", "expert_return"):
        assert equal(*(checkpoint(x / "last.pt")[key] for x in (a, b))), key
    assert (a / "final.gif").read_bytes() == (b / "final.gif").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "env_name, sizes",
    [
        ("Pendulum-v1", (3, 1)), ("BipedalWalker-v3", (24, 4)),
        ("MountainCarContinuous-v0", (2, 1)),
        ("LunarLanderContinuous-v3", (8, 2)), ("faults_envs:float64-v0", (3, 2)),
    ],
)  # fmt: skip
def test_other_environments(env_name, sizes, expert, tmp_path):
    """The whole script, on agents that SB3 has trained for 200 steps."""
    expert.write_bytes(sac_bytes(env_name, steps=200))
    arguments = options(tmp_path / "logs", expert, env_name, max_iteration=2, eval_episodes=1, H=30)
    status, out, err = parent().run(run_main, arguments)
    assert status == 0 and "Traceback" not in err, err
    run = only_run(tmp_path / "logs")
    experience = checkpoint(run / "last.pt")["experience"]
    assert tuple(experience[k].shape[1] for k in ("state", "expert_action")) == sizes
    assert (run / "final.gif").stat().st_size > 100
    status, out, err = parent().run(run_main, ["--evaluate", str(run), "--eval_episodes=2"])
    assert status == 0 and "learner" in out and "expert" in out
