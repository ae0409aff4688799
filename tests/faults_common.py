"""What the fault tests share: zips to damage, small runs, and children that may be killed.

Run as a program this file is the parent of those children: it imports everything once and forks,
from a process without threads, one child per request.
"""

import base64
import contextlib
import csv
import functools
import io
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from pathlib import Path

ROOT, HERE = Path(__file__).resolve().parents[1], Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(HERE)]

import gymnasium as gym
import pytest
import torch

import aggrevated
import faults_envs  # noqa: F401  (registers the environments)

PLAIN = "faults_envs:plain-v0"


# -- SAC zips ----------------------------------------------------------------------------------
@functools.cache
def sac_bytes(env_id=PLAIN, kind="SAC", steps=0, **policy_kwargs) -> bytes:
    """The zip of an SB3 agent on an environment, hardly trained."""
    import stable_baselines3

    arguments = dict(learning_starts=100, buffer_size=300)
    if kind == "PPO":
        arguments = dict(n_steps=8, batch_size=8)
    model = getattr(stable_baselines3, kind)(
        "MlpPolicy", env_id, seed=0, device="cpu",
        policy_kwargs=dict(net_arch=[16, 16]) | policy_kwargs, **arguments,
    )  # fmt: skip
    if steps:
        model.learn(steps)
    buffer = io.BytesIO()
    model.save(buffer)
    return buffer.getvalue()


def unpack(raw: bytes) -> dict[str, bytes]:
    """The members of a zip."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(members: dict[str, bytes], compression=zipfile.ZIP_STORED) -> bytes:
    """A zip with these members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def torch_bytes(value) -> bytes:
    """What torch.save writes of a value."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def with_pickle(raw: bytes, pickled: bytes) -> bytes:
    """A file of torch.save with another pickle in it."""
    return pack({k: pickled if k.endswith("data.pkl") else v for k, v in unpack(raw).items()})


def with_state(change, raw: bytes | None = None) -> bytes:
    """A SAC zip whose policy.pth went through `change` (in place, or returning another)."""
    members = unpack(raw or sac_bytes())
    state = torch.load(io.BytesIO(members["policy.pth"]), weights_only=True)
    result = change(state)
    members["policy.pth"] = torch_bytes(state if result is None else result)
    return pack(members)


class Bomb:
    """Unpickling one of these creates a file."""

    def __init__(self, marker, how=0):
        self.marker, self.how = str(marker), how

    def __reduce__(self):
        touch = f"touch {self.marker}"
        python = f"open({self.marker!r}, 'w').close()"
        return [
            (os.system, (touch,)),
            (exec, (python,)),
            (eval, (python,)),
            (subprocess.call, (["touch", self.marker],)),
        ][self.how]


# -- runs --------------------------------------------------------------------------------------
def options(log_dir, expert, env_name=PLAIN, **changes) -> list[str]:
    """The command line of a run of well under a second."""
    values = dict(
        env_name=env_name, expert_path=expert, log_dir=log_dir, device="cpu", n_workers=1,
        n_threads=1, K=2, H=8, max_iteration=3, alpha_decay_iterations=2, eval_every=2,
        eval_episodes=2, hidden_dim=8, batch_sz=4, train_repeat=1,
    ) | changes  # fmt: skip
    return [f"--{k}={v}" for k, v in values.items()]


def only_run(log_dir) -> Path:
    """The one run folder below log_dir."""
    (run,) = [p for p in Path(log_dir).iterdir() if p.is_dir()]
    return run


def checkpoint(path) -> dict:
    return torch.load(path, weights_only=True)


def equal(a, b) -> bool:
    """Bitwise equality of nested tensors and values."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if torch.is_tensor(a):
        return torch.equal(a, b)
    return a == b or a != a and b != b


def evaluations(run) -> list[list[str]]:
    """evaluations.csv without the column `seconds`; every line whole."""
    text = (Path(run) / "evaluations.csv").read_bytes().decode("ascii")
    assert text.endswith("\n")
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert {len(r) for r in rows} == {7}
    return [r[:2] + r[3:] for r in rows]


def scalars(run) -> dict[str, list]:
    """(step, value) of every TensorBoard scalar except the times."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith("time/") or tag == "time/env_steps"
    }


def files(folder) -> dict:
    """Everything below a folder: the bytes of files, None for the rest."""
    folder = Path(folder)
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
        if p.exists()
    }


def error_line(text: str) -> str:
    """The one line of stderr that says what was wrong; a progress bar may stand before it."""
    assert "Traceback" not in text, text
    lines = [line for line in text.replace("\r", "\n").split("\n") if line.strip()]
    found = [line for line in lines if line.startswith("error: ")]
    assert len(found) == 1 and found[0] == lines[-1], text
    return found[0]


def descendants(pid: int) -> set[int]:
    """The processes below `pid`, from /proc."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                if stat[0] != "Z":
                    parents[int(entry.name)] = int(stat[1])
    found, new = set(), {pid}
    while new:
        new = {p for p, parent in parents.items() if parent in new} - found
        found |= new
    return found


def alive(pid: int) -> bool:
    """Whether a process runs still; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds=60.0):
    """The condition's first true value; fails after some seconds."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value


# -- children ----------------------------------------------------------------------------------
class Parent:
    """A process that has imported everything and forks a child for each request."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def run(self, function, *args, signal_after=None, timeout=120.0):
        """(status, stdout, stderr) of function(*args) in a child; -N if signal N ended it.

        signal_after: (seconds, signal) to send it.
        """
        with tempfile.TemporaryDirectory() as folder:
            request = function.__module__, function.__name__, args, folder, signal_after, timeout
            self.process.stdin.write(base64.b64encode(pickle.dumps(request)) + b"\n")
            self.process.stdin.flush()
            status = int(self.process.stdout.readline())
            out, err = ((Path(folder) / name).read_text("utf-8", "replace") for name in ("1", "2"))
        assert status != 999, f"a child hung:\n{out}\n{err}"
        return status, out, err


@functools.cache
def parent() -> Parent:
    return Parent()


def child(function, args, folder):
    """Run the request and end; 99 stands for an exception that came out of it."""
    for number in (1, 2):
        fd = os.open(f"{folder}/{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    status = 99
    try:
        status = function(*args) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def serve():
    """Fork a child per request; 999 reports one that had to be killed."""
    import importlib

    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # imports most of torch, in 1.5 s
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for line in sys.stdin.buffer:
        module, name, args, folder, signal_after, timeout = pickle.loads(base64.b64decode(line))
        function = getattr(importlib.import_module(module), name)
        pid, started = os.fork(), time.monotonic()
        if pid == 0:
            sys.stdin.close()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            child(function, args, folder)
        hung = False
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            seconds = time.monotonic() - started
            if signal_after and seconds >= signal_after[0]:
                os.kill(pid, signal_after[1])
                signal_after = None
            if seconds > timeout and not hung:
                hung = True
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
        print(999 if hung else os.waitstatus_to_exitcode(ended[1]), flush=True)


def no_film():
    aggrevated.AggreVateDAgent.film = lambda self: None


def run_main(argv, film=True) -> int:
    """aggrevated.main in a child."""
    if not film:
        no_film()
    return aggrevated.main(argv)


# -- fixtures, for `from faults_common import *` -----------------------------------------------
@pytest.fixture
def expert(tmp_path):
    """A SAC zip for the plain environment."""
    path = tmp_path / "expert.zip"
    path.write_bytes(sac_bytes())
    return path


@pytest.fixture(autouse=True)
def same_signals():
    """main() catches signals; put back what was there."""
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


@pytest.fixture
def refused(capsys, tmp_path):
    """refused(*argv) runs main, checks the way it refuses, and returns what it said."""

    def run(*argv):
        before = files(tmp_path)
        status = aggrevated.main([str(a) for a in argv])
        text = capsys.readouterr().err
        assert status == 2, text
        assert error_line(text) == text.rstrip("\n")
        assert files(tmp_path) == before
        return text

    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A run of 3 iterations that ended well, with its expert beside it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "expert.zip").write_bytes(sac_bytes())
    status, _, err = parent().run(run_main, options(folder / "logs", folder / "expert.zip"), False)
    assert status == 0, err
    return only_run(folder / "logs")


def spaces(env_name=PLAIN):
    env = gym.make(env_name)
    return env.observation_space, env.action_space


if __name__ == "__main__":
    serve()
