"""What a run writes and prints, that it goes on as if never stopped, and what else it touches."""

import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, checkpoint, equal, evaluations, only_run
from PIL import Image, ImageSequence
from stable_baselines3.common.evaluation import evaluate_policy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import aggrevated
import film
import tiny_envs
from aggrevated import TEST, VALIDATION, AggreVateDAgent, Config, load_policy, make_env

STRANGE, RETURN = "tiny_envs:Strange-v0", "eval/episode_reward"
TAGS = {"train/loss", "train/alpha", "train/q_gap", "rollout/episode_reward", "time/env_steps"}


def points(run, tag=RETURN):
    """A tag's points, in the order of steps: the newer file may come first."""
    return sorted((e.step, e.value) for e in EventAccumulator(str(run)).Reload().Scalars(tag))


def score(returns):
    return f"{returns.mean():.5g} ± {returns.std(ddof=1) / len(returns) ** 0.5:.3g}"


def command(out, word):
    """The words of the printed command that `word` is before, as a shell takes them apart."""
    return shlex.split(re.search(f"^{word} +(.*)$", out, re.MULTILINE)[1], comments=True)


@pytest.fixture
def run_small(run_main, small, tmp_path):
    """run_small(name, status, **changes): the folder of a run."""

    def run(name, status=0, **changes):
        result = run_main(**small(env_name=STRANGE, log_dir=tmp_path / name) | changes)
        assert result.status == status, result.err
        return only_run(tmp_path / name)

    return run


def test_run_leaves_its_files_and_says_what_it_does(finished, small):
    result, run = finished
    for text in ("aggrevated on Pendulum-v1", "seed 0, on cpu", small()["expert_path"], str(run)):
        assert text in re.sub(" +", " ", result.out)
    assert "2/2" in result.err and "solved" not in result.out  # the bar; nothing solves Pendulum
    assert re.fullmatch(r"aggrevated_Pendulum-v1_s0_\d{8}_\d{6}_\d{6}", run.name)
    names = {re.sub(r"events\..*", "events", str(p.relative_to(run))) for p in run.rglob("*")}
    own = {"config.json", "evaluations.json", "last.pt", "best.pt", "events"}
    assert names == own | {"expert", "expert/events"}
    config, table = json.loads((run / "config.json").read_text()), evaluations(run)
    assert config == asdict(Config(**small(log_dir=str(run.parent))))
    assert [(e["policy"][0], e["iteration"]) for e in table] == [("e", 0), ("l", 1), ("l", 2)]
    for e in table:
        now = rf"iteration +{e['iteration']} +{80 * e['iteration']} steps +\d+ s"
        line = f"{now} +{e['policy']} +{score(np.array(e['returns']))}"
        assert len(e["returns"]) == 2 and re.search(line, result.out), result.out


@pytest.mark.parametrize("last, every, steps", [(7, 5, "12357"), (4, 9, "1234"), (2, 1, "12")])
def test_learner_and_expert_have_points_in_runs_of_their_own(run_small, last, every, steps):
    run = run_small("logs", max_iteration=last, eval_every=every, eval_episodes=3)
    expert, *learner = [(e["iteration"], np.mean(e["returns"])) for e in evaluations(run)]
    assert [n for n, _ in learner] == [int(n) for n in steps]
    np.testing.assert_allclose(points(run), learner, rtol=1e-6)
    np.testing.assert_allclose(points(run / "expert"), [(n, expert[1]) for n, _ in learner], 1e-6)
    for tag in TAGS:
        assert [n for n, _ in points(run, tag)] == [*range(1, last + 1)]


def test_film_is_of_the_first_validation_episode(run_small, make_agent, tmp_path):
    run, path = run_small("logs", seed=3), tmp_path / "x.gif"
    film.save_gif(run, path, env_name=STRANGE)
    with Image.open(path) as gif:
        frames = [np.array(x.convert("RGB")).reshape(-1, 3) for x in ImageSequence.Iterator(gif)]
    agent = make_agent(env_name=STRANGE, init_path=str(run))
    (episode,) = agent.play([(VALIDATION, 0)], 0.0, 0.0, agent.horizon)
    expected = tiny_envs.colour(episode.states[::5])
    np.testing.assert_allclose(np.median(frames, axis=1), expected, atol=8)
    assert all((x < 60).all(axis=1).sum() > 50 for x in frames)  # step and return, in black
    task = dict(env_name=STRANGE, env_kwargs='{"pay": 1.0}')  # it draws no pictures then
    with pytest.raises(aggrevated.UserError, match="Strange-v0 cannot be drawn here"):
        film.save_gif(run, path, **task)


def test_evaluate_scores_the_best_iterate(run_main, small, make_agent, tmp_path):
    def evaluate(agent, who, *args):  # the learner's second iterate is its best
        return np.array([1.0, -1.0]) - (agent.iteration - 2) ** 2 * (who == "learner")

    task = dict(env_name="tiny_envs:Negative-v0", eval_episodes=3)
    with mock.patch.object(AggreVateDAgent, "evaluate", evaluate):
        result = run_main(**small(log_dir=tmp_path / "logs", max_iteration=3, **task))
    run = only_run(tmp_path / "logs")
    assert re.search(rf"^best +iteration 2, .*{run}/best.pt$", result.out, re.MULTILINE)
    before, file = list(run.rglob("*")), shutil.copy(run / "best.pt", tmp_path / "policy file.pt")
    agent, last = (make_agent(**task, init_path=str(x)) for x in (file, run / "last.pt"))
    played = (agent, "learner"), (last, "learner"), (agent, "expert")
    x, last, y = (a.evaluate(who, TEST) for a, who in played)
    assert abs(x.mean() - last.mean()) > 0.01 and checkpoint(file)["iteration"] == 2
    for path in (run, file):
        result = run_main("--evaluate", path, env_name=task["env_name"])
        assert all(str(x) in result.out for x in (path, task["env_name"], agent.expert.path))
        for who, z in dict(learner=x, expert=y, difference=x - y).items():
            share = f", {(z >= -3.75).mean():.0%} solved" if who != "difference" else ""
            line = rf"^{who} +{score(z)}{share}( .*)?$"
            assert re.search(line, re.sub(" +", " ", result.out), re.MULTILINE), result.out
        assert result.status == 0 and "3/3" in result.err  # a bar
    assert before == list(run.rglob("*"))


def test_start_from_another_runs_policy(finished, run_small):
    run = run_small("logs", init_path=finished[1], max_iteration=1, seed=1)
    start, end = (checkpoint(x)["policy"] for x in (finished[1] / "best.pt", run / "last.pt"))
    same = {k for k in end if equal(start[k], end[k])}
    assert same == {"state_mean", "state_std", "scale", "offset"}  # these go with the weights


def test_policy_can_be_used_without_an_environment_and_by_sb3(finished, make_agent):
    state = np.random.default_rng(0).normal(size=(50, 3))
    network = make_agent(init_path=str(finished[1])).policy
    expected = network.predict(torch.from_numpy(state).float()).detach().numpy()
    with mock.patch.object(aggrevated.gym, "make", side_effect=AssertionError):
        policy = load_policy(finished[1])
    actions, hidden = policy.predict(state, "hidden", np.array([True]))
    np.testing.assert_allclose(actions, expected, atol=1e-5)
    np.testing.assert_allclose(policy.predict(state[3])[0], expected[3], atol=1e-5)
    assert actions.dtype == np.float32 and hidden == "hidden"
    assert (policy.predict(state, deterministic=False)[0] != actions).mean() > 0.5
    how = dict(n_eval_episodes=2, return_episode_rewards=True, warn=False)
    assert evaluate_policy(policy, make_env(Config(env_name="Pendulum-v1")), **how)[1] == [200, 200]


def assert_same_runs(a, b):
    for name in ("last.pt", "best.pt"):
        x, y = checkpoint(a / name), checkpoint(b / name)
        for part in ("policy", "data", "iteration", "env_steps"):
            assert equal(x[part], y[part]), (name, part)
    assert evaluations(a) == evaluations(b)
    assert all(points(a, tag) == points(b, tag) for tag in {RETURN} | TAGS)
    assert points(a / "expert") == points(b / "expert")


def resume(run_main, run, old_log=0, **changes):
    """Go on; by its name, the old log begins at second `old_log`: long before the new one."""
    for log in list(run.rglob("events.*")):
        log.rename(log.with_name(f"events.out.tfevents.{old_log}"))
    task = dict(env_name=checkpoint(run / "last.pt")["config"]["env_name"])
    result = run_main("--resume", run, **task, **changes)
    assert result.status == 0, result.err


@pytest.mark.parametrize("moment, number, saved, old_log, changes", [
    ("play", 2, 0, 0, dict(n_workers=2)),  # where, in which call, how many iterations saved
    ("update", 3, 2, 9_999_999_999, dict(algorithm="weighted", max_experience_len=30)),
    ("validate", 4, 2, 0, dict(algorithm="dagger")),
    ("save", 4, 2, 0, dict()),  # iteration 3 has its points then
    ("save", 2, 0, 0, dict()),
])  # fmt: skip
def test_stopped_run_goes_on(moment, number, saved, old_log, changes, run_small, run_main):
    changes = changes | dict(max_iteration=4, eval_every=2)
    whole, plain, calls = run_small("whole", **changes), getattr(AggreVateDAgent, moment), []

    def interrupted(*args, **kwargs):
        if moment != "save" or args[1].name == "last.pt":
            calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    with mock.patch.object(AggreVateDAgent, moment, interrupted):
        run = run_small("part", status=130, **changes)
    assert not multiprocessing.active_children()  # its workers have ended
    assert checkpoint(run / "last.pt")["iteration"] == saved
    resume(run_main, run, old_log)  # late, if the clock was set back
    assert_same_runs(whole, run)


def test_finished_run_can_be_lengthened(run_small, run_main, expert_zip, tmp_path):
    part = run_small("part", max_iteration=1, env_name=(env := "tiny_envs:own/Strange-v0"))
    assert part.name.startswith("aggrevated_own-Strange-v0_s0_")
    before, sentence = list(part.rglob("*")), run_main("--resume", part, env_name=env).err
    assert re.search("finished; --max_iteration makes more", sentence)
    assert before == list(part.rglob("*"))  # no new events
    torch.save(first := checkpoint(part / "last.pt") | dict(seconds=1000.0), part / "last.pt")
    moved = shutil.copy(expert_zip, tmp_path / "moved.zip")
    resume(run_main, part, max_iteration=3, expert_path=moved)
    last, whole = checkpoint(part / "last.pt"), run_small("whole", max_iteration=3)
    # the step size depends on max_iteration, but for the first iteration's
    assert evaluations(part)[:2] == evaluations(whole)[:2] and len(evaluations(part)) == 4
    assert [n for n, _ in points(part)] == [1, 2, 3] and 1000 < last["seconds"] < 1100
    assert all(equal(x, last["data"][k][: len(x)]) for k, x in first["data"].items())
    config = json.loads((part / "config.json").read_text())
    assert (config["max_iteration"], config["expert_path"]) == (3, str(moved))


def test_printed_commands_can_be_pasted_with_spaces(run_main, small, tmp_path, monkeypatch):
    (tmp_path / "my own").mkdir()
    monkeypatch.chdir(tmp_path / "my own")
    monkeypatch.setattr(sys, "argv", [script := "../a b/aggrevated.py"])
    task = dict(env_name=(env := "tiny_envs:Pendulum-v1"), expert_path="")
    out = run_main(**small(log_dir="my logs", **task)).out
    run = only_run(Path("my logs"))
    assert command(out, "score")[:4] == ["python", script, "--evaluate", str(run)]
    assert command(out, "continue") == ["python", script, "--resume", str(run), "--env_name", env]
    assert command(out, "watch") == ["tensorboard", "--logdir", "my logs"]
    assert run.name.startswith("aggrevated_Pendulum-v1_s0_") and "_1/Pendulum-v1.zip" in out
    monkeypatch.chdir((run := run.resolve()).parent)
    beside_the_program = "rl-trained-agents/sac/Pendulum-v1_1/Pendulum-v1.zip"
    assert run_main("--evaluate", run, env_name=env, expert_path=beside_the_program).status == 0


IMPORT = """
import gymnasium, os, signal, stable_baselines3.sac.policies, threading, torch, tqdm
import gymnasium.utils.env_checker, torch.utils.tensorboard.summary, warnings
def state():
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    of_torch = torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state().tolist()
    of_torch += (torch.are_deterministic_algorithms_enabled(),)
    return dict(os.environ), handlers, of_torch, warnings.filters[:], threading.active_count()
before = state()
import aggrevated
assert state() == before
"""


def test_import_changes_nothing():
    subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, check=True, env={})  # not changed yet


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_cuda(run_small, run_main):
    resume(run_main, run := run_small("logs", device="auto"), max_iteration=3)
    assert checkpoint(run / "last.pt")["data"]["state"].is_cuda


@pytest.fixture
def program(tmp_path, monkeypatch):
    """program(*python, **values): the script, or other code, in a process group of its own."""
    started, pipe = [], subprocess.PIPE
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["site", f"{ROOT}", f"{ROOT / 'tests'}"]))

    def start(*python, **values):
        argv = [sys.executable, *python, *(f"--{k}={v}" for k, v in values.items())]
        how = dict(stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        started.append(subprocess.Popen(argv, **how))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


SCRIPT = str(ROOT / "aggrevated.py")
SPAWN = "import multiprocessing as m; f = m.get_context; m.get_context = lambda *_: f('spawn')"
KILLED_WHILE_IT_SAVES = """
import os, signal, sys, aggrevated
def half_save(state, path, save=aggrevated.torch.save):
    save(state, path)
    if state["data"] and state["iteration"] == 2:
        os.truncate(path, 1000)
        os.kill(os.getpid(), signal.SIGKILL)
aggrevated.torch.save = half_save
aggrevated.main(sys.argv[1:])
"""


def test_killed_run_goes_on_as_another_by_spawn(program, small, tmp_path, run_main):
    values = small(env_name=STRANGE, n_workers=2, K=3, max_iteration=3)
    killed = program("-c", KILLED_WHILE_IT_SAVES, **values, log_dir="killed")
    killed.communicate(timeout=300)  # until its workers have ended too
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SPAWN)  # Windows' and macOS's way
    spawned = program(SCRIPT, **values, log_dir="spawned")
    out, err = spawned.communicate(timeout=300)
    assert spawned.returncode == 0 and "Exception" not in err, err
    spawned, run = only_run(tmp_path / "spawned"), only_run(tmp_path / "killed")
    assert killed.returncode == -signal.SIGKILL
    assert checkpoint(run / "last.pt")["iteration"] == 1 and not checkpoint(run / "best.pt")["data"]
    resume(run_main, run)
    assert_same_runs(spawned, run)


@pytest.mark.parametrize("kill, number, times", [  # the terminal's Ctrl-C reaches the workers, too
    (os.killpg, signal.SIGINT, 1), (os.killpg, signal.SIGINT, 2), (os.kill, signal.SIGTERM, 1),
])  # fmt: skip
def test_ctrl_c_or_kill_ends_all_and_can_be_continued(kill, number, times, program, small):
    values = small(env_name=STRANGE, n_workers=2, max_iteration=10**6, eval_every=10**6)
    process, end, ready = program(SCRIPT, **values, log_dir="my logs"), time.monotonic() + 300, 0
    while ready < 5:  # iterations: both workers have played
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
        ready = max([checkpoint(x)["iteration"] for x in Path().glob("*/*/last.pt")], default=0)
    for _ in range(times):
        time.sleep(0.01)
        kill(process.pid, number)
    out, err = process.communicate(timeout=300)  # until the workers have ended too
    statuses = [-number] if number == signal.SIGTERM else [130, -number][:times]
    assert process.returncode in statuses and "Traceback" not in err, err
    run = only_run(Path("my logs"))
    assert checkpoint(run / "last.pt")["iteration"] >= ready
    again = ["python", SCRIPT, "--resume", str(run), "--env_name", STRANGE]
    assert command(out, "continue") == again
