import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, checkpoint, equal, evaluations, make_sac, only_run
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import aggrevated
from aggrevated import AggreVateDAgent, Config

TAGS = {
    "train/loss", "train/alpha", "train/q_gap", "eval/episode_reward", "eval/expert_reward",
    "rollout/episode_reward", "time/env_steps", "time/seconds",
}  # fmt: skip


def events(run):
    return EventAccumulator(str(run)).Reload()


@pytest.fixture
def no_film(monkeypatch):
    monkeypatch.setattr(aggrevated, "film", lambda agent, path: None)


@pytest.fixture
def run_small(run_main, small, tmp_path, no_film):
    """run_small(name, **changes): the folder of a run without its film."""

    def run(name, **changes):
        result = run_main(**small(log_dir=tmp_path / name, **changes))
        assert result.status == 0, result.err
        return only_run(tmp_path / name)

    return run


# -- what a run leaves -----------------------------------------------------------------------------
def test_run_leaves_its_files_and_says_what_it_does(finished, small):
    result, run = finished
    for text in ("Pendulum-v1", "seed 0", small()["expert_path"], f"--evaluate {run}\n"):
        assert text in result.out
    assert result.out.count("iteration ") == 2 and "2/2" in result.err  # the bar
    assert re.fullmatch(r"AggreVateD_Pendulum-v1_s0_\d{8}_\d{6}", run.name)
    names = {re.sub(r"^events\..*", "events", p.name) for p in run.iterdir()}
    assert names == {"config.json", "evaluations.csv", "last.pt", "best.pt", "final.gif", "events"}
    config = json.loads((run / "config.json").read_text())
    assert config == asdict(Config(**small(log_dir=str(run.parent))).check())
    with Image.open(run / "final.gif") as gif:
        assert gif.n_frames == 40  # every fifth of 200


def test_table_has_a_row_per_episode(finished):
    rows = evaluations(finished[1])
    keys = "iteration", "env_steps", "policy", "episode"
    assert ["_".join(r[k] for k in keys) for r in rows] == [
        "1_80_expert_0", "1_80_expert_1", "1_80_learner_0", "1_80_learner_1",
        "2_160_learner_0", "2_160_learner_1",
    ]  # fmt: skip
    assert all(r["length"] == "200" and -2000 < float(r["return"]) < 0 for r in rows)


def test_tensorboard_has_every_tag_and_the_chart_of_both(finished):
    log, rows = events(finished[1]), evaluations(finished[1])
    assert set(log.Tags()["scalars"]) == TAGS
    for tag in TAGS:
        assert [e.step for e in log.Scalars(tag)] == [1, 2], tag
    assert [e.value for e in log.Scalars("train/alpha")] == [1, 0.5]
    for tag, part in (("eval/episode_reward", rows[-2:]), ("eval/expert_reward", rows[:2])):
        mean = np.mean([float(r["return"]) for r in part])
        assert log.Scalars(tag)[-1].value == pytest.approx(mean)
    (layout,) = log.Tensors("custom_scalars__config__")[0].tensor_proto.string_val
    assert b"eval/episode_reward" in layout and b"eval/expert_reward" in layout


def test_evaluate_prints_learner_expert_and_difference(finished, run_main, make_agent):
    before = {p.name: p.read_bytes() for p in finished[1].iterdir()}
    result = run_main("--evaluate", finished[1], eval_episodes=3)
    assert result.status == 0 and result.out.count("\n") == 3
    assert before == {p.name: p.read_bytes() for p in finished[1].iterdir()}
    scores = re.findall(r"^(\w+) +(\S+) \+- (\S+) \(.*3 episodes\)$", result.out, re.MULTILINE)
    assert [who for who, *_ in scores] == ["learner", "expert", "difference"]
    agent = make_agent()
    agent.policy.load_state_dict(checkpoint(finished[1] / "best.pt")["policy"])
    played = (agent.evaluate(who, 3, aggrevated.TEST) for who in ("learner", "expert"))
    x, y = (np.array([t.rewards.sum() for t in episodes]) for episodes in played)
    for (_, mean, error), values in zip(scores, (x, y, x - y), strict=True):
        assert float(mean) == pytest.approx(values.mean(), abs=0.2)
        assert float(error) == pytest.approx(values.std(ddof=1) / 3**0.5, abs=0.2)


def test_start_from_another_runs_policy(finished, run_small, make_agent):
    best = finished[1] / "best.pt"
    assert equal(make_agent(init_path=best).policy.state_dict(), checkpoint(best)["policy"])
    run = run_small("start", init_path=best, max_iteration=1, seed=1)
    start, end = checkpoint(best), checkpoint(run / "last.pt")
    kept = {k for k in end["policy"] if equal(start["policy"][k], end["policy"][k])}
    assert kept == {"state_mean", "state_std"}  # they go with the weights


def test_start_in_an_environment_of_other_bounds(finished, small, tmp_path):
    make_sac(tmp_path / "narrow.zip", narrow := "tiny_envs:Narrow-v0")
    expert, start = str(tmp_path / "narrow.zip"), str(finished[1] / "best.pt")
    values = small(env_name=narrow, expert_path=expert, init_path=start)
    agent = aggrevated.open_agent(None, None, values)
    action = agent.policy.predict(100 * torch.ones(1, 3)).item()
    assert 0.9 < abs(action) <= 1


@pytest.mark.parametrize("name", ["Tiny", "Undrawable", "WithoutRenderMode"])
def test_environment_without_a_picture(name, run_main, small, tmp_path):
    result = run_main(**small(log_dir=tmp_path, env_name=f"tiny_envs:{name}-v0"))
    assert result.status == 0, result.err
    assert f"No final.gif: tiny_envs:{name}-v0 cannot be drawn here" in result.out
    assert not (only_run(tmp_path) / "final.gif").exists()


def test_help_lists_every_field(run_main):
    result = run_main("--help")
    text = "".join(result.out.split())  # wherever the lines were broken
    assert result.status == 0 and "--resume" in text and "--evaluate" in text
    assert all(f"--{f.name}" in text and f"(default:{f.default})" in text for f in fields(Config))


# -- going on --------------------------------------------------------------------------------------
def assert_same_runs(a, b):
    for name in ("last.pt", "best.pt"):
        x, y = checkpoint(a / name), checkpoint(b / name)
        for part in ("policy", "optimizer", "experience", "iteration", "env_steps", "best_return"):
            assert equal(x.get(part), y.get(part)), (name, part)
    assert evaluations(a) == evaluations(b)


MOMENTS = dict(  # save: when everything else of that iteration is written
    update=dict(), save=dict(optimizer="natural", max_experience_len=100),
    validate=dict(algorithm="score"),
)  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupted_and_resumed_is_never_stopped(
    moment, run_small, run_main, small, tmp_path, monkeypatch
):
    changes = MOMENTS[moment] | dict(max_iteration=4, eval_every=2)
    whole, plain = run_small("whole", **changes), getattr(AggreVateDAgent, moment)

    def interrupted(agent, what):
        if what == 3 or agent.iteration == (3 if moment == "save" else 4):
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(agent, what)

    with monkeypatch.context() as patch:
        patch.setattr(AggreVateDAgent, moment, interrupted)
        result = run_main(**small(log_dir=tmp_path / "part", **changes))
    run = only_run(tmp_path / "part")
    assert result.status == 130 and f"python aggrevated.py --resume {run}\n" in result.out
    assert checkpoint(run / "last.pt")["iteration"] == (3 if moment == "validate" else 2)
    (log,) = run.glob("events.*")
    log.rename(run / "events.out.tfevents.0")  # before the next one, even in the same second
    assert run_main("--resume", run).status == 0
    assert_same_runs(whole, run)
    losses = [[(e.step, e.value) for e in events(x).Scalars("train/loss")] for x in (whole, run)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_finished_run_can_be_lengthened(run_small, run_main):
    whole, part = run_small("whole"), run_small("part", max_iteration=1)
    assert run_main("--resume", part, max_iteration=2).status == 0
    assert_same_runs(whole, part)
    configs = [json.loads((run / "config.json").read_text()) for run in (whole, part)]
    assert [c["max_iteration"] for c in configs] == [2, 2]


def test_interrupted_evaluation_names_no_run_to_resume(finished, run_main, monkeypatch):
    monkeypatch.setattr(AggreVateDAgent, "evaluate", lambda *x, **k: signal.raise_signal(2))
    result = run_main("--evaluate", finished[1])
    assert result.status == 130 and "None" not in result.out


# -- the program itself, with two workers ----------------------------------------------------------
def running(process):
    """/proc/*/status of the processes of its group that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended just now
            if os.getpgid(int(folder.name)) == process.pid:
                found.append((folder / "status").read_text())
    return [status for status in found if "State:\tZ" not in status]


def ignores_ctrl_c(status):
    return int(re.search(r"SigIgn:\s(\w+)", status)[1], 16) & 1 << signal.SIGINT - 1 > 0


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def program(tmp_path):
    """program(fields, *python): the script, or other Python code, in a process group of its own."""
    started, paths = [], os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def start(values, *python):
        argv = [sys.executable, *(python or [ROOT / "aggrevated.py"])]
        argv += [f"--{k}={v}" for k, v in values.items()]
        env = os.environ | dict(PYTHONPATH=paths)
        started.append(subprocess.Popen(argv, cwd=tmp_path, env=env, **how))
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


KILLED_WHILE_IT_SAVES = """
import os, signal, sys, aggrevated
save = aggrevated.torch.save
def half_save(state, path, **kwargs):
    save(state, path, **kwargs)
    if isinstance(state, dict) and "experience" in state and state["iteration"] == 2:
        os.truncate(path, 1000)
        os.kill(os.getpid(), signal.SIGKILL)
aggrevated.torch.save = half_save
aggrevated.main(sys.argv[1:])
"""


def test_script_runs_and_a_killed_run_goes_on_as_if_nothing_had_happened(
    program, small, tmp_path, run_main, no_film
):
    values = small(n_workers=2, K=3, max_iteration=3)
    whole = program(values | dict(log_dir="whole"))
    killed = program(values | dict(log_dir="killed"), "-c", KILLED_WHILE_IT_SAVES)
    out, err = whole.communicate(timeout=120)
    assert whole.returncode == 0 and "score  python aggrevated.py --evaluate" in out, err
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    wait_for(lambda: not running(killed), 10)
    whole, run = only_run(tmp_path / "whole"), only_run(tmp_path / "killed")
    assert (whole / "final.gif").exists()
    assert checkpoint(run / "last.pt")["iteration"] == 1 and checkpoint(run / "best.pt")
    assert run_main("--resume", run).status == 0
    assert_same_runs(whole, run)


def test_ctrl_c_ends_all_processes_and_says_how_to_go_on(program, small, tmp_path):
    values = small(env_name="tiny_envs:Tiny-v0", n_workers=2, max_iteration=10**6, log_dir="logs")
    process = program(values)
    wait_for(lambda: sum(map(ignores_ctrl_c, running(process))) >= 2, 120)  # the workers
    wait_for(lambda: list(tmp_path.glob("logs/*/best.pt")), 60)
    os.killpg(process.pid, signal.SIGINT)  # the workers get it too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    run = only_run(tmp_path / "logs").relative_to(tmp_path)
    assert f"python aggrevated.py --resume {run}\n" in out
    assert checkpoint(tmp_path / run / "last.pt")["iteration"] >= 0
    wait_for(lambda: not running(process), 10)
