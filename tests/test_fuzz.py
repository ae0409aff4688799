"""Random damage to files and random options: accepted, or a UserError; nothing else."""

import io
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import aggrevated
from aggrevated import AggreVateDAgent, Config, SACExpert, UserError
from faults_common import *  # noqa: F403  (fixtures too)
from faults_common import pack, sac_bytes, spaces, torch_bytes, unpack, with_pickle

SCALE = 1  # times as many cases


def cases(n):
    return settings(
        max_examples=n * SCALE, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def damage(largest):
    """A change of bytes: flips, cuts, insertions, repetitions, at any place."""
    place = st.integers(0, largest)
    flip = st.tuples(st.just("flip"), place, st.integers(1, 255))
    cut = st.tuples(st.just("cut"), place, st.integers(1, largest))
    insert = st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=20))
    repeat = st.tuples(st.just("repeat"), place, st.integers(1, 64))
    return st.lists(st.one_of(flip, flip, cut, insert, repeat), min_size=1, max_size=4)


def apply(changes, raw: bytes) -> bytes:
    for kind, place, value in changes:
        place %= len(raw) or 1
        head, tail = raw[:place], raw[place:]
        if kind == "flip":
            raw = head + bytes([tail[0] ^ value]) + tail[1:] if tail else raw
        elif kind == "cut":
            raw = head + tail[value % (len(tail) or 1) :]
        elif kind == "insert":
            raw = head + value + tail
        else:
            raw = head + tail[:value] + tail
    return raw


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Load bytes as an expert and ask it; whether that worked."""
    path, both = tmp_path_factory.mktemp("fuzz") / "x.zip", spaces()

    def run(raw):
        path.write_bytes(raw)
        try:
            expert = SACExpert(path, *both)
        except UserError as error:
            assert str(error).strip()
            return False
        action = expert.predict(np.zeros((2, 3), np.float32))
        assert action.shape == (2, 2) and np.isfinite(action).all()
        return True

    assert run(sac_bytes())
    return run


PLACES = 2**16


@cases(300)
@given(damage(PLACES))
def test_bytes_of_the_zip(load, changes):
    load(apply(changes, sac_bytes()))


@cases(300)
@given(damage(PLACES))
def test_directory_of_the_zip(load, changes):
    """Where names, sizes, offsets and methods stand."""
    raw = sac_bytes()
    start = raw.index(b"PK\1\2")
    load(raw[:start] + apply(changes, raw[start:]))


@cases(200)
@given(damage(PLACES))
def test_bytes_of_data(load, changes):
    """With the checksum of the damaged bytes: the zip is sound."""
    members = unpack(sac_bytes())
    load(pack(members | {"data": apply(changes, members["data"])}))


@cases(300)
@given(damage(PLACES))
def test_bytes_of_the_weights_pickle(load, changes):
    members = unpack(sac_bytes())
    weights = members["policy.pth"]
    pickled = next(v for k, v in unpack(weights).items() if k.endswith("data.pkl"))
    load(pack(members | {"policy.pth": with_pickle(weights, apply(changes, pickled))}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3),
    max_leaves=5,
)


@cases(100)
@given(
    st.dictionaries(st.sampled_from(["gamma", "policy_kwargs", "use_sde", "policy_class"]), JSON)
)
def test_values_of_data(load, changes):
    members = unpack(sac_bytes())
    data = json.loads(members["data"]) | changes
    load(pack(members | {"data": json.dumps(data).encode()}))


VALUES = st.one_of(
    JSON,
    st.builds(
        lambda huge, shape, dtype: torch.ones((), dtype=dtype).expand(huge + shape),
        st.sampled_from([[], [], [], [2**40]]),
        st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 16, 17]), max_size=3),
        st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.bool]),
    ),
)
NAMES = [
    "actor.mu.weight", "actor.mu.bias", "actor.latent_pi.0.weight", "actor.latent_pi.2.bias",
    "actor.log_std.bias", "critic.qf0.0.weight", "critic.qf0.4.weight", "critic.qf1.2.weight",
    "critic_target.qf0.0.weight", "actor.latent_pi.4.weight", "critic.qf0.6.weight",
    "critic.qf2.0.bias",
    "actor.mu.0.weight", "critic.qf0.x.weight", "", "critic.qf0",
]  # fmt: skip


@cases(150)
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=2))
def test_values_of_the_weights(load, changes):
    members = unpack(sac_bytes())
    state = torch.load(io.BytesIO(members["policy.pth"]), weights_only=True)
    load(pack(members | {"policy.pth": torch_bytes(dict(state) | changes)}))


# -- checkpoints -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def resume(finished_run, tmp_path_factory):
    """Read bytes as a checkpoint and let an agent take it over, as --resume does."""
    path = tmp_path_factory.mktemp("fuzz") / "last.pt"
    good = (finished_run / "last.pt").read_bytes()
    agent = AggreVateDAgent(aggrevated.load_checkpoint(finished_run / "last.pt")["config"])

    def run(raw):
        path.write_bytes(raw)
        try:
            state = aggrevated.load_checkpoint(path)
            agent.restore(state)
        except UserError as error:
            assert str(error).strip()
            return False
        return True

    assert run(good)
    run.good = good
    yield run
    agent.close()


@cases(200)
@given(damage(PLACES))
def test_bytes_of_a_checkpoint(resume, changes):
    resume(apply(changes, resume.good))


@cases(250)
@given(damage(PLACES))
def test_pickle_of_a_checkpoint(resume, changes):
    pickled = next(v for k, v in unpack(resume.good).items() if k.endswith("data.pkl"))
    resume(with_pickle(resume.good, apply(changes, pickled)))


PATHS = [
    ("config",), ("config", "lr"), ("config", "K"), ("config", "env_name"), ("config", "weighting"),
    ("policy",), ("policy", "fc1.weight"), ("policy", "scale"), ("optimizer",),
    ("optimizer", "state"),
    ("optimizer", "state", 0), ("optimizer", "state", 0, "exp_avg"), ("optimizer", "param_groups"),
    ("experience",), ("experience", "state"), ("experience", "q_expert"), ("iteration",),
    ("env_steps",), ("seconds",), ("best_return",), ("expert_return",), ("csv_bytes",), ("new",),
]  # fmt: skip


@cases(200)
@given(st.sampled_from(PATHS), VALUES)
def test_values_of_a_checkpoint(resume, keys, value):
    state = torch.load(io.BytesIO(resume.good), weights_only=True)
    part = state
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    resume(torch_bytes(state))


# -- options -----------------------------------------------------------------------------------
FIELDS = [f"--{f}" for f in Config.__dataclass_fields__]
NUMBERS = st.one_of(
    st.integers(),
    st.integers(-2, 3),
    st.floats(),
    st.sampled_from(["1e400", "-0", "0x1", "1_0", "٣", "９"]),
).map(str)
WORDS = st.one_of(
    NUMBERS, st.text(max_size=8),
    st.sampled_from(["", "-", "--", "-h=", "--no-render", "gap", "auto", "%s", "{}", "\udcff",
                     "@x", "=", "\n"]),
)  # fmt: skip
ARGUMENTS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(FIELDS), WORDS).map(lambda x: [f"{x[0]}={x[1]}"]),
        st.tuples(st.sampled_from([*FIELDS, "--resume", "--evaluate", "--nonsense"]), WORDS).map(
            list
        ),
        st.sampled_from(FIELDS).map(lambda x: [x[:-1]]),
        WORDS.map(lambda x: [x]),
    ),
    max_size=5,
).map(lambda parts: [x for part in parts for x in part])


@cases(500)
@given(ARGUMENTS)
def test_command_lines(arguments):
    try:
        resume, evaluate, fields = aggrevated.parse(arguments)
        config = Config(**fields).check()
    except UserError as error:
        assert str(error).strip()
    except SystemExit as end:  # only --help ends so
        assert end.code == 0 and any(a.startswith(("-h", "--h")) for a in arguments)
    else:
        assert resume is None or evaluate is None
        for name, value in fields.items():
            assert value == getattr(config, name)
            assert type(value) is Config.__dataclass_fields__[name].type


@cases(200)
@given(st.dictionaries(st.sampled_from([f[2:] for f in FIELDS]), JSON, max_size=3))
def test_values_of_a_config(values):
    """As they come from a checkpoint."""
    try:
        config = Config(**values).check()
    except UserError as error:
        assert str(error).strip()
    else:
        for name, field in Config.__dataclass_fields__.items():
            value = getattr(config, name)
            assert type(value) is field.type
            assert field.type not in (int, float) or np.isfinite(value)
