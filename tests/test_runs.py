"""What a run writes and prints, that it goes on as if never stopped, and what else it touches."""

import contextlib
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
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, checkpoint, equal, evaluations, only_run
from PIL import Image, ImageSequence
from stable_baselines3.common.evaluation import evaluate_policy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import aggrevated
import film
import tiny_envs
from aggrevated import TEST, AggreVateDAgent, Config, load_policy, make_env

STRANGE, RETURN = "tiny_envs:Strange-v0", "eval/episode_reward"
TAGS = {"train/loss", "train/alpha", "train/q_gap", "rollout/episode_reward", "time/env_steps"}


def events(run):
    return EventAccumulator(str(run)).Reload()


def points(run, tag=RETURN):
    return [(e.step, e.value) for e in events(run).Scalars(tag)]


def returns(run, who, n):
    (x,) = [e for e in evaluations(run) if (e["policy"], e["iteration"]) == (who, n)]
    return np.array(x["returns"])


def command(out, word):
    """The words of the printed command that `word` is before, as a shell takes them apart."""
    return shlex.split(re.search(f"^.*{word} +(.*)$", out, re.MULTILINE)[1])


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
    for text in ("Pendulum-v1", "seed 0", small()["expert_path"], str(run)):
        assert text in result.out
    assert "2/2" in result.err and "solved" not in result.out  # the bar; nothing solves Pendulum
    assert re.fullmatch(r"aggrevated_Pendulum-v1_s0_\d{8}_\d{6}_\d{3}", run.name)
    names = {re.sub(r"^events\..*", "events", p.name) for p in run.iterdir()}
    expected = "config.json", "evaluations.json", "last.pt", "best.pt"
    assert names == {*expected, "events", "expert"}
    config = json.loads((run / "config.json").read_text())
    assert config == vars(Config(**small(log_dir=str(run.parent))).check())
    assert [len(e["returns"]) for e in evaluations(run)] == [2, 2, 2]
    for n in (1, 2):
        learner, expert = returns(run, "learner", n).mean(), returns(run, "expert", 1).mean()
        line = rf"iteration +{n} .*learner +{learner:.1f} ± \d+\.\d +expert +{expert:.1f} \(2 epi"
        assert re.search(line, result.out), result.out
    log = events(run)
    assert {p.parent for p in run.rglob("events.*")} == {run, run / "expert"}
    parts = log.PluginTagToContent("hparams").items()
    parts = {k.split("/")[1]: HParamsPluginData.FromString(v) for k, v in parts}
    (metric,) = parts["experiment"].experiment.metric_infos
    settings = parts["session_start_info"].session_start_info.hparams
    assert metric.name.tag == RETURN and settings["env_name"].string_value == "Pendulum-v1"
    shown = {k: x.number_value for k, x in settings.items() if x.HasField("number_value")}
    assert shown == {k: x for k, x in config.items() if type(x) in (int, float)}
    assert b"- K: 2\n" in log.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.parametrize("last, every, steps", [(7, 5, "12357"), (4, 9, "1234"), (2, 1, "12")])
def test_learner_and_expert_have_points_in_runs_of_their_own(run_small, last, every, steps):
    run = run_small("logs", max_iteration=last, eval_every=every, eval_episodes=7)
    steps, expert = [int(n) for n in steps], returns(run, "expert", 1)
    learner = {n: returns(run, "learner", n) for n in steps}
    whole = {n for n in steps if n % every == 0 or n == last}
    assert {n: len(x) for n, x in learner.items()} == {n: 7 if n in whole else 2 for n in steps}
    assert len(expert) == 7
    assert points(run) == [(n, pytest.approx(learner[n].mean())) for n in steps]
    same = {n: expert[: len(x)].mean() for n, x in learner.items()}  # of the same terrains
    assert points(run / "expert") == [(n, pytest.approx(same[n])) for n in steps]
    tags = [set(events(folder).Tags()["scalars"]) for folder in (run, run / "expert")]
    assert tags == [TAGS | {"time/seconds", RETURN}, {RETURN}]
    assert all([n for n, _ in points(run, x)] == [*range(1, last + 1)] for x in tags[0] - tags[1])


def test_film_is_of_the_first_validation_episode(run_small, make_agent, tmp_path, monkeypatch):
    run, path = run_small("logs", seed=3), tmp_path / "x.gif"
    film.save_gif(run, path)
    with Image.open(path) as gif:
        frames = [np.array(x.convert("RGB")).reshape(-1, 3) for x in ImageSequence.Iterator(gif)]
    state = checkpoint(run / "best.pt")
    (episode,) = make_agent(**state["config"] | dict(init_path=str(run))).evaluate(n_episodes=1)
    expected = tiny_envs.colour(episode.states[::5])
    np.testing.assert_allclose(np.median(frames, axis=1), expected, atol=8)
    assert all((x < 60).all(axis=1).sum() > 50 for x in frames)  # step and return, in black
    monkeypatch.setattr(tiny_envs.Strange, "render", lambda env: None.bug)
    with pytest.raises(aggrevated.UserError, match="Strange-v0 cannot be drawn here"):
        film.save_gif(run, path)


def test_runs_of_one_second_have_folders_of_their_own(tmp_path):
    config = Config(log_dir=str(tmp_path), env_name="module:my/Task-v0", seed=3)
    made = set()
    for _ in range(3):
        made.add(aggrevated.make_run_dir(config).name)
        time.sleep(0.002)
    assert len(made) == 3 and all(x.startswith("aggrevated_my-Task-v0_s3_20") for x in made)


def test_evaluate_scores_the_best_iterate(run_small, run_main, make_agent, tmp_path, monkeypatch):
    task = dict(env_name="tiny_envs:Negative-v0")
    monkeypatch.setattr(AggreVateDAgent, "is_best", lambda agent: agent.iteration == 1)
    run = run_small("logs", **task)
    before, file = list(run.rglob("*")), shutil.copy(run / "best.pt", tmp_path / "policy file.pt")
    agent, last = (make_agent(**task, init_path=str(x)) for x in (file, run / "last.pt"))
    played = (agent, "learner"), (last, "learner"), (agent, "expert")
    played = [[t.rewards.sum() for t in a.evaluate(who, 3, TEST)] for a, who in played]
    x, last, y = np.array(played)
    assert abs(x.mean() - last.mean()) > 0.2
    for path in (run, file):
        result = run_main("--evaluate", path, eval_episodes=3)
        for text in (path, "iteration 1", "aggrevated", task["env_name"], agent.expert.path):
            assert str(text) in result.out
        for who, z in dict(learner=x, expert=y, difference=x - y).items():
            score = f"{who} {z.mean():.1f} ± {z.std(ddof=1) / 3**0.5:.1f}"
            share = f", {(z >= -3.75).mean():.0%} solved" if who != "difference" else ""
            assert score + share in " ".join(result.out.split())
        assert result.status == 0 and "3/3" in result.err  # a bar
    assert before == list(run.rglob("*"))


def test_start_from_another_runs_policy(finished, run_small):
    run = run_small("logs", init_path=finished[1], max_iteration=1, seed=1)
    start, end = (checkpoint(x)["policy"] for x in (finished[1] / "best.pt", run / "last.pt"))
    kept = {k for k in end if equal(start[k], end[k])}
    assert kept == {"state_mean", "state_std", "scale", "offset"}  # they go with the weights


def test_policy_can_be_used_without_an_environment_and_by_sb3(finished, make_agent, monkeypatch):
    state = np.random.default_rng(0).normal(size=(50, 3))
    network = make_agent(init_path=str(finished[1])).policy
    expected = network.predict(torch.from_numpy(state).float()).detach().numpy()
    with monkeypatch.context() as patch:
        patch.setattr(aggrevated.gym, "make", lambda *args, **kwargs: pytest.fail("an environment"))
        policy, same = load_policy(finished[1]), load_policy(str(finished[1] / "best.pt"))
    actions, hidden = policy.predict(state, deterministic=True)
    one, same_hidden = same.predict(state[3], "hidden", np.array([True]))
    np.testing.assert_allclose(actions, expected, atol=1e-5)
    np.testing.assert_allclose(one, expected[3], atol=1e-5)
    assert actions.dtype == np.float32 and (hidden, same_hidden) == (None, "hidden")
    assert (policy.predict(state, deterministic=False)[0] != actions).mean() > 0.5
    how = dict(n_eval_episodes=2, return_episode_rewards=True, warn=False)
    assert evaluate_policy(policy, make_env("Pendulum-v1"), **how)[1] == [200, 200]


def assert_same_runs(a, b):
    for name in ("last.pt", "best.pt"):
        x, y = checkpoint(a / name), checkpoint(b / name)
        for part in ("policy", "optimizer", "experience", "iteration", "env_steps", "score"):
            assert equal(x.get(part), y.get(part)), (name, part)
    assert evaluations(a) == evaluations(b)
    assert all(points(a, tag) == points(b, tag) for tag in {RETURN} | TAGS)
    assert points(a / "expert") == points(b / "expert")


def resume(run_main, run, **changes):
    """Go on; the old events are made to come before the next ones, even of the same second."""
    for log in list(run.rglob("events.*")):
        log.rename(log.with_name("events.out.tfevents.0"))
    result = run_main("--resume", run, **changes)
    assert result.status == 0, result.err


@pytest.mark.parametrize("moment, number, saved, changes", [
    ("simulate", 1, 0, dict()),  # where, in which call of it, how many iterations saved by then
    ("update", 3, 2, dict(optimizer="natural", max_experience_len=30)),
    ("validate", 4, 3, dict(algorithm="score")),
])  # fmt: skip
def test_stopped_run_goes_on(moment, number, saved, changes, run_small, run_main, monkeypatch):
    changes = changes | dict(max_iteration=4, eval_every=2, eval_episodes=5)
    whole, plain, calls = run_small("whole", **changes), getattr(AggreVateDAgent, moment), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AggreVateDAgent, moment, interrupted)
        run = run_small("part", status=130, **changes)
    assert checkpoint(run / "last.pt")["iteration"] == saved
    assert saved or re.search("error: .*best.pt is missing, ", run_main("--evaluate", run).err)
    resume(run_main, run)
    assert_same_runs(whole, run)


def test_finished_run_can_be_lengthened(run_small, run_main, expert_zip, tmp_path, monkeypatch):
    whole, part = run_small("whole"), run_small("part", max_iteration=1)
    before, sentence = list(part.rglob("*")), run_main("--resume", part).err
    assert re.search("has all its iterations; --max_iteration makes more", sentence)
    assert before == list(part.rglob("*"))  # no new events, no picture
    torch.save(checkpoint(part / "last.pt") | dict(seconds=1000.0), part / "last.pt")
    moved = shutil.copy(expert_zip, tmp_path / "moved.zip")
    monkeypatch.chdir(tmp_path.parent)
    relative = part.relative_to(tmp_path.parent)
    resume(run_main, relative, max_iteration=2, expert_path=moved)
    assert_same_runs(whole, part)
    config = json.loads((part / "config.json").read_text())
    assert (config["max_iteration"], config["expert_path"]) == (2, str(moved))
    assert 1000 < checkpoint(part / "last.pt")["seconds"] < 1100
    assert points(part, "time/seconds")[-1][1] > 1000


def test_printed_commands_can_be_pasted_with_spaces(run_main, small, tmp_path, monkeypatch):
    (tmp_path / "my own").mkdir()
    monkeypatch.chdir(tmp_path / "my own")
    monkeypatch.setattr(sys, "argv", [script := "../a b/aggrevated.py"])
    task = dict(env_name="tiny_envs:Pendulum-v1", expert_path="")
    out = run_main(**small(log_dir="my logs", **task)).out
    run = only_run(Path("my logs"))
    assert command(out, "score") == ["python", script, "--evaluate", str(run)]
    assert command(out, "watch") == ["tensorboard", "--logdir", "my logs"]
    assert run.name.startswith("aggrevated_Pendulum-v1_s0_") and "_1/Pendulum-v1.zip" in out
    assert checkpoint(run / "best.pt")["config"]["expert_path"] == ""
    run = run.resolve()
    monkeypatch.chdir(tmp_path)
    for path in ("", "rl-trained-agents/sac/Pendulum-v1_1/Pendulum-v1.zip"):  # beside the program
        assert run_main("--evaluate", run, expert_path=path).status == 0
    monkeypatch.setattr(AggreVateDAgent, "evaluate", lambda *x, **k: signal.raise_signal(2))
    result = run_main("--evaluate", run)  # is not to be resumed
    assert result.status == 130 and "None" not in result.out and "--resume" not in result.out
    out = run_main("--resume", run, max_iteration=3).out
    assert command(out, "watch") == ["tensorboard", "--logdir", str(run.parent)]


def test_main_ends_its_own_workers_and_no_other_process(run_small, monkeypatch):
    agents, plain = [], aggrevated.open_agent
    monkeypatch.setattr(aggrevated, "open_agent", lambda x: agents.append(plain(x)) or agents[0])
    other = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    other.start()
    run_small("logs", n_workers=2)
    assert multiprocessing.active_children() == [other]  # which only those alive are among
    other.kill()


IMPORT = """
import gymnasium, os, signal, stable_baselines3.sac.policies, threading, torch, tqdm
import torch.utils.tensorboard.summary, warnings
def state():
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    of_torch = torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state().tolist()
    others = warnings.filters[:], threading.active_count()
    return dict(os.environ), handlers, of_torch, torch.are_deterministic_algorithms_enabled(), others
before = state()
import aggrevated
assert state() == before
"""


def test_import_changes_nothing():
    subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, check=True, env={})  # not changed yet


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_cuda(run_small, run_main):
    resume(run_main, run := run_small("logs", device="auto"), max_iteration=3)
    assert checkpoint(run / "last.pt")["experience"]["state"].is_cuda


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
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


SCRIPT = str(ROOT / "aggrevated.py")
SPAWN = """
import multiprocessing as m
m.get_context = lambda method=None, get_context=m.get_context: get_context("spawn")
"""
KILLED_WHILE_IT_SAVES = """
import os, signal, sys, aggrevated
def half_save(state, path, save=aggrevated.torch.save):
    save(state, path)
    if "experience" in state and state["iteration"] == 2:
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
    assert command(out, "score")[:3] == ["python", SCRIPT, "--evaluate"]
    spawned, run = only_run(tmp_path / "spawned"), only_run(tmp_path / "killed")
    assert killed.returncode == -signal.SIGKILL
    assert checkpoint(run / "last.pt")["iteration"] == 1 and checkpoint(run / "best.pt")
    resume(run_main, run)
    assert_same_runs(spawned, run)


def ignore_ctrl_c(pid):
    """How many children of a process ignore Ctrl-C."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    status = "".join(Path(f"/proc/{child}/status").read_text() for child in children)
    return len(re.findall(r"SigIgn:\s\w+[2367abef]\n", status))


@pytest.mark.parametrize("number, times", [("SIGINT", 3), ("SIGTERM", 1), ("SIGTERM", 3)])
def test_ctrl_c_or_kill_ends_all_and_says_how_to_go_on(number, times, program, small, tmp_path):
    values = small(env_name=STRANGE, n_workers=2, max_iteration=10**6, eval_every=10**6)
    process, end = program(SCRIPT, **values, log_dir="my logs"), time.monotonic() + 300
    while not (list(tmp_path.glob("*/*/best.pt")) and ignore_ctrl_c(process.pid) == 2):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    for _ in range(times):
        time.sleep(0.01)
        os.killpg(process.pid, signal.Signals[number])  # the workers get it too
    out, err = process.communicate(timeout=300)  # until the workers have ended too
    assert process.returncode == 130 and "Traceback" not in err, err
    run = only_run(Path("my logs"))
    assert checkpoint(run / "last.pt")["iteration"] >= 0
    assert times > 1 or command(out, "Go on:") == ["python", SCRIPT, "--resume", str(run)]
