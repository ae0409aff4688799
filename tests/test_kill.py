"""Killed or interrupted at any moment, then resumed: the same as a run that was never stopped."""

import csv
import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import aggrevated
from faults_common import *  # noqa: F403  (fixtures too)
from faults_common import (
    HERE, ROOT, alive, checkpoint, descendants, equal, error_line, evaluations, files, no_film,
    only_run, options, parent, run_main, sac_bytes, scalars, wait_for,
)  # fmt: skip

HOOKED = {
    aggrevated: ["make_run_dir", "banner"],
    aggrevated.AggreVateDAgent: [
        "collect", "label", "update", "diagnose", "validate", "_write_csv", "save", "restore",
        "train",
    ],
    aggrevated.Simulator: ["__init__", "run"],
    aggrevated.SummaryWriter: ["__init__", "add_scalar", "flush"],
    torch: ["save"],
    os: ["replace"],
}  # fmt: skip


def stop_at(plan, argv, journal=None):
    """main that gets a signal according to plan = (kind, n, signal, share).

    event: at the n-th entry to or return from the functions above; twice: and in close() again;
    save, table: during the n-th write of a checkpoint or of evaluations.csv, when a share of the
    bytes is on the disk.
    """
    no_film()
    kind, at, number, share = plan or (None, 0, 0, 0)
    counts = {"event": 0, "save": 0, "table": 0}

    def strike():
        os.kill(os.getpid(), number)

    def count(what):
        counts[what] += 1
        return what == ("event" if kind == "twice" else kind) and counts[what] == at

    def hook(owner, name):
        plain = getattr(owner, name)

        def hooked(*args, **kwargs):
            if count("event"):
                strike()
            result = plain(*args, **kwargs)
            if count("event"):
                strike()
            return result

        setattr(owner, name, hooked)

    plain_save, plain_writer = torch.save, csv.writer

    def save(state, path):
        if count("save"):
            buffer = io.BytesIO()
            plain_save(state, buffer)
            Path(path).write_bytes(buffer.getvalue()[: int(share * buffer.tell())])
            strike()
        plain_save(state, path)

    class Writer:
        def __init__(self, file):
            self.file = file

        def writerows(self, rows):
            text = io.StringIO(newline="")
            plain_writer(text).writerows(rows)
            if count("table"):
                self.file.write(text.getvalue()[: int(share * text.tell())])
                self.file.flush()
                strike()
            self.file.write(text.getvalue())

    torch.save, csv.writer = save, Writer
    for owner, names in HOOKED.items():
        for name in names:
            hook(owner, name)
    if kind == "twice":
        plain_close = aggrevated.AggreVateDAgent.close

        def close(self):
            strike()
            plain_close(self)

        aggrevated.AggreVateDAgent.close = close
    if journal:
        plain_iterate = aggrevated.AggreVateDAgent.iterate

        def iterate(self, n):
            with open(journal, "a") as file:
                file.write(f"{n}\n")
            return plain_iterate(self, n)

        aggrevated.AggreVateDAgent.iterate = iterate
    return aggrevated.main(argv)


def small(log_dir, expert, max_iteration, **changes):
    return options(
        log_dir, expert, "Pendulum-v1", max_iteration=max_iteration, eval_episodes=1, batch_sz=64,
        **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory):
    path = tmp_path_factory.mktemp("pendulum") / "expert.zip"
    path.write_bytes(sac_bytes("Pendulum-v1"))
    return path


def check_equal_runs(a, b):
    """Whether two runs left the same, up to times."""
    for name in ("last.pt", "best.pt"):
        x, y = ({k: v for k, v in checkpoint(r / name).items() if k != "seconds"} for r in (a, b))
        x["config"]["log_dir"] = y["config"]["log_dir"]
        for key in x:
            if key != "csv_bytes":  # the width of a time
                assert equal(x[key], y[key]), (name, key)
    assert evaluations(a) == evaluations(b)
    x, y = scalars(a), scalars(b)
    assert x.keys() == y.keys() and {"train/loss", "eval/episode_reward"} <= x.keys()
    for tag in x:
        assert x[tag] == y[tag], tag
    assert len(x["train/loss"]) == checkpoint(a / "last.pt")["iteration"]


@pytest.mark.slow
def test_killed_and_resumed_equals_never_stopped(pendulum, tmp_path):
    """25 kills, in turn at events, in a checkpoint, in the table and at any time."""
    status, _, err = parent().run(run_main, small(tmp_path / "a", pendulum, 60), False)
    assert status == 0, err
    whole, rng, journal = only_run(tmp_path / "a"), random.Random(0), tmp_path / "journal"
    plans = [("event", 60, signal.SIGKILL, 0)]
    for _ in range(6):
        plans += [
            ("event", rng.randrange(1, 120), signal.SIGKILL, 0),
            ("save", rng.randrange(1, 4), signal.SIGKILL, rng.random()),
            ("table", 1, signal.SIGKILL, rng.random()),
            ("time", rng.uniform(0.02, 0.15), signal.SIGKILL, 0),
        ]
    arguments, begun, half_saves, half_tables = small(tmp_path / "b", pendulum, 60), [0], 0, 0
    for plan in plans:
        after = plan[1:3] if plan[0] == "time" else None
        status, _, err = parent().run(stop_at, plan, arguments, journal, signal_after=after)
        assert status == -signal.SIGKILL, err  # the run must not end before the last of the plans
        run = only_run(tmp_path / "b")
        last = checkpoint(run / "last.pt")
        half_saves += bool(list(run.glob("*.tmp")))
        half_tables += (run / "evaluations.csv").stat().st_size != last["csv_bytes"]
        lines = [int(x) for x in journal.read_text().split()] if journal.exists() else []
        new, done = lines[len(begun) - 1 :], last["iteration"]
        begun += new
        if new:  # at most one iteration is done again, and none is left out
            assert new == list(range(new[0], new[-1] + 1)) and begun[-1] <= done + 1
            assert begun[-len(new) - 1] <= new[0] <= begun[-len(new) - 1] + 1
        arguments = ["--resume", str(run)]
    assert half_saves >= 3 and half_tables >= 3
    status, _, err = parent().run(stop_at, None, arguments, journal)
    assert status == 0, err
    check_equal_runs(whole, run)
    assert not list(run.glob("*.tmp"))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_killed_before_the_first_checkpoint(share, expert, tmp_path):
    """There is nothing to go on with; the message says so."""
    plan = ("save", 1, signal.SIGKILL, share)
    status, _, _ = parent().run(stop_at, plan, options(tmp_path / "logs", expert))
    assert status == -signal.SIGKILL
    run = only_run(tmp_path / "logs")
    for mode in ("--resume", "--evaluate"):
        status, _, err = parent().run(run_main, [mode, str(run)])
        assert status == 2 and str(run) in error_line(err)


def kill_in_film(argv):
    def film(self):
        os.kill(os.getpid(), signal.SIGKILL)

    aggrevated.AggreVateDAgent.film = film
    return aggrevated.main(argv)


def test_killed_while_it_films(expert, tmp_path):
    status, _, _ = parent().run(kill_in_film, options(tmp_path / "logs", expert))
    run = only_run(tmp_path / "logs")
    assert status == -signal.SIGKILL and not (run / "final.gif").exists()
    before = {k: v for k, v in files(run).items() if "tfevents" not in k}
    for _ in range(2):  # a finished run can be resumed too: it films again
        status, _, err = parent().run(run_main, ["--resume", str(run)])
        assert status == 0, err
        after = files(run)
        assert after["final.gif"][:6] == b"GIF89a"
        assert {k: after[k] for k in before} == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_interrupted_and_resumed_equals_never_stopped(number, pendulum, tmp_path):
    """130, the command that resumes, and nothing lost; at events all over, and twice in a row."""
    status, _, err = parent().run(run_main, small(tmp_path / "a", pendulum, 20), False)
    assert status == 0, err
    rng, arguments = random.Random(number), small(tmp_path / "b", pendulum, 20)
    for i in range(10):
        kind = ("event", "twice", "save", "table")[i % 4]
        at = 70 if i == 0 else rng.randrange(1, 90) if kind in ("event", "twice") else 1
        plan = (kind, at, number, rng.random())
        status, out, err = parent().run(stop_at, plan, arguments)
        run = only_run(tmp_path / "b")
        assert status == 130 and "Traceback" not in err, (plan, err)
        assert f"python aggrevated.py --resume {run}\n" in out
        checkpoint(run / "last.pt")
        arguments = ["--resume", str(run)]
    status, _, err = parent().run(stop_at, None, arguments)
    assert status == 0, err
    check_equal_runs(only_run(tmp_path / "a"), run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("event", range(1, 16, 2))
def test_interrupted_while_it_starts(event, number, expert, tmp_path):
    """What it says can be resumed can be."""
    arguments = options(tmp_path / "logs", expert)
    status, out, err = parent().run(stop_at, ("event", event, number, 0), arguments)
    assert status == 130 and "Traceback" not in err, err
    if "--resume" in out:
        run = only_run(tmp_path / "logs")
        assert f"--resume {run}\n" in out
        status, _, err = parent().run(run_main, ["--resume", str(run)], False)
        assert status == 0, err
    else:
        assert event < 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_interrupted_evaluation(number, finished_run):
    before = files(finished_run)
    for event in (1, 2, 3):
        plan = ("event", event, number, 0)
        status, out, err = parent().run(stop_at, plan, ["--evaluate", str(finished_run)])
        assert status == 130 and "Traceback" not in err, err
        assert "--resume" not in out
    assert files(finished_run) == before


# -- the program itself, with workers ----------------------------------------------------------
class Program:
    """`python aggrevated.py` with 2 workers, in a session of its own."""

    def __init__(self, folder, argv, **variables):
        self.out, self.err = folder / "out", folder / "err"
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "aggrevated.py"), *argv],
            stdout=open(self.out, "w"), stderr=open(self.err, "w"), start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(HERE)} | variables,
        )  # fmt: skip
        self.seen = set()

    def below(self):
        """Processes that it started and that run."""
        self.seen |= descendants(self.process.pid)
        return {p for p in self.seen if alive(p)}

    def workers(self):
        def is_worker(pid):
            try:
                return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                return False

        assert self.process.poll() is None, self.err.read_text()
        return {p for p in self.below() if is_worker(p)}

    def wait(self):
        """(status, stdout, stderr) at the end, when nothing of it may be left."""
        while self.process.poll() is None:
            self.below()
            time.sleep(0.05)
        wait_for(lambda: not self.below(), 30)
        return self.process.returncode, self.out.read_text(), self.err.read_text()


@pytest.fixture
def program(tmp_path):
    """program(*argv): a Program, killed at the end of the test with all below it."""
    started = []

    def start(*argv, **variables):
        started.append(Program(tmp_path, argv, **variables))
        return started[-1]

    yield start
    for p in started:
        for pid in {p.process.pid} | p.below():
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        p.process.wait()


def saved_iterations(log_dir):
    """The iteration of the last checkpoint below log_dir; -2 before there is one."""
    for path in Path(log_dir).glob("*/last.pt"):
        return checkpoint(path)["iteration"]
    return -2


@pytest.mark.slow
def test_worker_that_is_killed(expert, tmp_path, program):
    env_name = "faults_envs:dies-v0"
    expert.write_bytes(sac_bytes(env_name))
    p = program(*options(tmp_path / "logs", expert, env_name, n_workers=2, max_iteration=10))
    status, _, err = p.wait()
    assert status == 2 and "worker" in error_line(err)
    run = only_run(tmp_path / "logs")
    assert 1 <= checkpoint(run / "last.pt")["iteration"] < 10
    status, _, err = parent().run(run_main, ["--resume", str(run), "--n_workers=1"], False)
    assert status == 0 and checkpoint(run / "last.pt")["iteration"] == 10, err


@pytest.mark.slow
def test_trainer_that_is_killed_leaves_no_workers(expert, tmp_path, program):
    """In the middle of episodes that would take minutes more."""
    env_name, signs = "faults_envs:slow-v0", tmp_path / "signs"
    signs.mkdir()
    expert.write_bytes(sac_bytes(env_name))
    arguments = options(tmp_path / "logs", expert, env_name, n_workers=2)
    p = program(*arguments, FAULTS_SIGN=str(signs))
    wait_for(lambda: len(list(signs.iterdir())) == 2)
    assert len(p.workers()) == 2
    p.process.kill()
    p.process.wait()
    wait_for(lambda: not p.below(), 20)
    assert "Traceback" not in p.err.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ctrl_c_at_the_start", "ctrl_c_twice", "terminated"])
def test_interrupted_with_workers(how, expert, tmp_path, program):
    """Ctrl-C goes to the workers too; they are silent, and gone at the end."""
    p = program(*options(tmp_path / "logs", expert, n_workers=2, max_iteration=100_000))
    if how == "ctrl_c_at_the_start":
        wait_for(lambda: len(p.workers()) == 2)
    else:
        wait_for(lambda: saved_iterations(tmp_path / "logs") >= 2)
    if how == "terminated":
        p.process.terminate()
    else:
        os.killpg(p.process.pid, signal.SIGINT)
    if how == "ctrl_c_twice":
        time.sleep(0.02)
        os.killpg(p.process.pid, signal.SIGINT)
    status, out, err = p.wait()
    assert status == 130 and "Traceback" not in err, err
    run = only_run(tmp_path / "logs")
    assert f"python aggrevated.py --resume {run}\n" in out
    n = checkpoint(run / "last.pt")["iteration"]
    more = ["--resume", str(run), "--n_workers=1", f"--max_iteration={n + 2}"]
    status, _, err = parent().run(run_main, more, False)
    assert status == 0 and checkpoint(run / "last.pt")["iteration"] == n + 2, err
