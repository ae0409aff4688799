import csv
import json
import multiprocessing
import re
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import aggrevated
from aggrevated import Config

TAGS = {
    "train/loss", "train/alpha", "train/entropy", "train/log_std", "train/q_gap",
    "train/q_twin_gap", "train/grad_norm", "eval/episode_reward", "eval/expert_reward",
    "eval/episode_length", "eval/success_rate", "rollout/episode_reward",
    "rollout/expert_fraction", "time/env_steps", "time/env_steps_per_second",
    "time/iteration_seconds",
}  # fmt: skip
HEADER = "iteration,env_steps,seconds,policy,episode,return,length"


def only_run(log_dir):
    (run,) = log_dir.iterdir()
    return run


def checkpoint(path):
    return torch.load(path, weights_only=True)


def equal(a, b):
    """Bitwise equality of nested tensors and values."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def evaluations(run):
    with open(run / "evaluations.csv", newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def events(run):
    return EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0}).Reload()


@pytest.fixture
def no_film(monkeypatch):
    monkeypatch.setattr(aggrevated.AggreVateDAgent, "film", lambda self: None)


@pytest.fixture(scope="module")
def finished(run_main, small, tmp_path_factory):
    """The result of a small run and its folder."""
    log_dir = tmp_path_factory.mktemp("finished") / "new" / "logs"
    result = run_main(log_dir=log_dir, **small())
    assert result.status == 0, result.err
    return result, only_run(log_dir)


@pytest.fixture
def run_small(run_main, small, tmp_path, no_film):
    """run_small(name, **changes): the folder of a run without its film."""

    def run(name, **changes):
        result = run_main(log_dir=tmp_path / name, **small(**changes))
        assert result.status == 0, result.err
        return only_run(tmp_path / name)

    return run


# -- what a run leaves -----------------------------------------------------------------------------
def test_run_leaves_its_files_and_nothing_else(finished):
    names = {"config.json", "evaluations.csv", "last.pt", "best.pt", "final.gif"}
    left = {p.name for p in finished[1].iterdir() if not p.name.startswith("events.out.tfevents.")}
    assert left == names
    assert len(list(finished[1].iterdir())) == len(names) + 1


def test_run_folder_is_named_by_environment_seed_and_time(finished):
    assert re.fullmatch(r"AggreVateD_Pendulum-v1_s0_\d{8}_\d{6}", finished[1].name)


def test_config_json_holds_every_field(finished, small):
    config = json.loads((finished[1] / "config.json").read_text())
    assert config == asdict(Config(**small(log_dir=str(finished[1].parent))).check())


def test_banner_and_progress(finished, small):
    result, run = finished
    for text in ("Pendulum-v1", "seed 0", torch.__version__, small()["expert_path"], str(run)):
        assert text in result.out
    assert "tensorboard --logdir" in result.out and f"--evaluate {run}" in result.out
    assert "2/2" in result.err  # the bar


def test_evaluations_csv(finished):
    assert (finished[1] / "evaluations.csv").read_text().splitlines()[0] == HEADER
    rows = evaluations(finished[1])
    order = [(r["iteration"], r["env_steps"], r["policy"], r["episode"]) for r in rows]
    assert order == [
        ("0", "0", "expert", "0"), ("0", "0", "expert", "1"),
        ("0", "0", "learner", "0"), ("0", "0", "learner", "1"),
        ("1", "80", "learner", "0"), ("1", "80", "learner", "1"),
        ("2", "160", "learner", "0"), ("2", "160", "learner", "1"),
    ]  # fmt: skip
    assert all(r["length"] == "200" and -2000 < float(r["return"]) < 0 for r in rows)
    seconds = [float(r["seconds"]) for r in rows]
    assert seconds[0] == 0 and seconds == sorted(seconds)


def test_checkpoints_are_plain_and_best_is_the_best_of_the_evaluations(finished):
    rows = [r for r in evaluations(finished[1]) if r["policy"] == "learner"]
    means = np.array([float(r["return"]) for r in rows]).reshape(3, 2).mean(axis=1)
    last, best = (checkpoint(finished[1] / name) for name in ("last.pt", "best.pt"))
    assert last["iteration"] == 2 and last["env_steps"] == 160
    assert best["iteration"] == np.argmax(means)
    assert last["best_return"] == best["best_return"] == pytest.approx(max(means))
    assert last["policy"].keys() == best["policy"].keys()
    assert last["config"] == json.loads((finished[1] / "config.json").read_text())


def test_best_is_kept_when_the_learner_gets_worse(run_small, monkeypatch):
    scores = iter([-3.0, -1.0, -2.0])
    evaluate = aggrevated.AggreVateDAgent.evaluate

    def scored(self, who="learner", *args, **kwargs):
        episodes = evaluate(self, who, *args, **kwargs)
        score = next(scores) if who == "learner" else 0.0
        for t in episodes:
            t.rewards = np.full(len(t), score / len(t))
        return episodes

    monkeypatch.setattr(aggrevated.AggreVateDAgent, "evaluate", scored)
    run = run_small("worse")
    best, last = checkpoint(run / "best.pt"), checkpoint(run / "last.pt")
    assert best["iteration"] == 1 and last["iteration"] == 2
    assert best["best_return"] == last["best_return"] == pytest.approx(-1)
    assert not equal(best["policy"], last["policy"])


def test_gif_is_animated(finished):
    with Image.open(finished[1] / "final.gif") as gif:
        assert gif.format == "GIF" and gif.n_frames > 1
        first = np.asarray(gif.convert("RGB"))
        gif.seek(gif.n_frames - 1)
        assert (np.asarray(gif.convert("RGB")) != first).any()


def test_environment_without_a_picture(run_main, small, tmp_path):
    result = run_main(log_dir=tmp_path, **small(env_name="Tiny-v0", max_iteration=1))
    assert result.status == 0, result.err
    assert (only_run(tmp_path) / "last.pt").exists()
    assert not (only_run(tmp_path) / "final.gif").exists()


def test_tensorboard_has_every_tag(finished):
    log = events(finished[1])
    assert set(log.Tags()["scalars"]) == TAGS
    for tag in TAGS:
        steps = [e.step for e in log.Scalars(tag)]
        assert steps == ([0, 1, 2] if tag.startswith("eval/") else [1, 2]), tag
        assert all(np.isfinite(e.value) for e in log.Scalars(tag))
    (image,) = log.Images(log.Tags()["images"][0])
    assert image.encoded_image_string == (finished[1] / "final.gif").read_bytes()
    (text,) = log.Tags()["tensors"]
    table = log.Tensors(text)[0].tensor_proto.string_val[0].decode()
    assert all(f.name in table for f in fields(Config))


def test_tensorboard_agrees_with_the_csv(finished):
    log, rows = events(finished[1]), evaluations(finished[1])
    for tag, who in (("eval/episode_reward", "learner"), ("eval/expert_reward", "expert")):
        for event in log.Scalars(tag):
            n = str(event.step) if who == "learner" else "0"
            values = [float(r["return"]) for r in rows if (r["iteration"], r["policy"]) == (n, who)]
            assert event.value == pytest.approx(np.mean(values), rel=1e-5)
    assert [e.value for e in log.Scalars("train/alpha")] == [1, 0.5]
    assert [e.value for e in log.Scalars("time/env_steps")] == [80, 160]
    assert [e.value for e in log.Scalars("eval/episode_length")] == [200] * 3


def test_training_changes_the_learner(finished):
    run = finished[1]
    config = Config(**checkpoint(run / "last.pt")["config"])
    fresh = aggrevated.make_policy(config, aggrevated.make_env("Pendulum-v1")).state_dict()
    trained = checkpoint(run / "last.pt")["policy"]
    changed = {k for k in fresh if not torch.equal(fresh[k], trained[k])}
    assert changed == {k for k in fresh if k.endswith(("weight", "bias", "_mean", "_std"))}


def test_start_from_another_runs_policy(finished, run_small, run_main, small, tmp_path):
    best = finished[1] / "best.pt"
    run = run_small("start", init_path=best, max_iteration=1, alpha_decay_iterations=1)
    start, end = checkpoint(best), checkpoint(run / "last.pt")
    for name in ("state_mean", "state_std"):  # goes with the weights, is not fitted anew
        assert torch.equal(start["policy"][name], end["policy"][name])
    rows = [r for r in evaluations(run) if r["policy"] == "learner" and r["iteration"] == "0"]
    assert np.mean([float(r["return"]) for r in rows]) == pytest.approx(start["best_return"])
    wrong = run_main(**small(log_dir=tmp_path / "wrong", init_path=best, hidden_dim=8))
    assert wrong.status == 2 and "do not fit" in wrong.err and not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    "choice",
    [
        dict(optimizer="natural"), dict(weighting="pathwise"), dict(weighting="score"),
        dict(weighting="minmax"), dict(algorithm="aggrevate"), dict(algorithm="reinforce"),
    ],
    ids=lambda choice: "-".join(choice.values()),
)  # fmt: skip
def test_every_choice_resumes_to_the_same_weights(choice, run_small, run_main):
    whole, half = run_small("whole", **choice), run_small("half", **choice, max_iteration=1)
    assert run_main("--resume", half, max_iteration=2).status == 0
    a, b = checkpoint(whole / "last.pt"), checkpoint(half / "last.pt")
    assert a["iteration"] == b["iteration"] == 2 and equal(a["policy"], b["policy"])


def test_no_run_overwrites_another(small, tmp_path):
    config = Config(**small(log_dir=str(tmp_path)))
    first, second = aggrevated.make_run_dir(config), aggrevated.make_run_dir(config)
    assert first != second and set(tmp_path.iterdir()) == {first, second}


# -- the same again --------------------------------------------------------------------------------
def test_same_seed_same_run(finished, run_small):
    again = run_small("again")
    a, b = checkpoint(finished[1] / "last.pt"), checkpoint(again / "last.pt")
    for part in ("policy", "optimizer", "experience"):
        assert equal(a[part], b[part]), part
    assert without_seconds(evaluations(finished[1])) == without_seconds(evaluations(again))


def test_another_seed_another_run(finished, run_small):
    other = run_small("other", seed=1)
    a, b = checkpoint(finished[1] / "last.pt"), checkpoint(other / "last.pt")
    for k in ("fc1.weight", "fc2.weight", "mean.weight", "log_std.weight"):
        assert not torch.equal(a["policy"][k], b["policy"][k])
    rows = [r["return"] for r in evaluations(other) if r["policy"] == "expert"]
    assert rows == [r["return"] for r in evaluations(finished[1]) if r["policy"] == "expert"]


def test_two_workers_give_the_same_run_and_end(run_small):
    changes = dict(K=3, eval_episodes=3)  # one gets two thirds
    one, two = run_small("one", **changes), run_small("two", n_workers=2, **changes)
    assert not multiprocessing.active_children()
    a, b = checkpoint(one / "last.pt"), checkpoint(two / "last.pt")
    assert a["env_steps"] == b["env_steps"] == 240
    for name, tensor in a["experience"].items():  # the expert's own trajectories, in their order
        torch.testing.assert_close(tensor[:120], b["experience"][name][:120], rtol=1e-3, atol=1e-3)
    rows = [evaluations(one), evaluations(two)]
    assert [r["length"] for r in rows[0]] == [r["length"] for r in rows[1]]
    for x, y in list(zip(*rows, strict=True))[:6]:  # of iteration 0
        assert float(x["return"]) == pytest.approx(float(y["return"]), rel=0.01)


# -- going on --------------------------------------------------------------------------------------
RESUMED = dict(max_iteration=3, alpha_decay_iterations=3, max_experience_len=150)


@pytest.fixture
def uninterrupted(run_small):
    return run_small("whole", **RESUMED)


def resume(run_main, run, **fields):
    (log,) = run.glob("events.*")
    log.rename(run / "events.out.tfevents.0")  # before the next one, even in the same second
    result = run_main("--resume", run, **fields)
    assert result.status == 0, result.err


def assert_same_runs(whole, resumed):
    a, b = checkpoint(whole / "last.pt"), checkpoint(resumed / "last.pt")
    for part in ("policy", "optimizer", "experience", "iteration", "env_steps", "best_return"):
        assert equal(a[part], b[part]), part
    rows = without_seconds(evaluations(whole))
    assert len(rows) == 2 * (3 + 2) and rows == without_seconds(evaluations(resumed))
    best = [checkpoint(run / "best.pt") for run in (whole, resumed)]
    assert equal(best[0]["policy"], best[1]["policy"])
    logs = [events(run) for run in (whole, resumed)]
    for tag in sorted(TAGS - {"time/env_steps_per_second", "time/iteration_seconds"}):
        a, b = ([(e.step, e.value) for e in log.Scalars(tag)] for log in logs)
        assert a == b, tag


def test_lengthened_run_is_the_uninterrupted_one(run_main, run_small):
    steady = RESUMED | dict(lr=1e-3, final_lr=1e-3)  # else its steps depend on max_iteration
    whole, part = run_small("whole", **steady), run_small("part", **steady | dict(max_iteration=1))
    assert checkpoint(part / "last.pt")["iteration"] == 1
    resume(run_main, part, max_iteration=3)
    assert_same_runs(whole, part)


@pytest.mark.parametrize("moment", ["update", "save"])  # save: when the rest is written already
def test_ctrl_c_says_how_to_go_on_and_nothing_is_lost(
    uninterrupted, run_main, small, tmp_path, monkeypatch, moment
):
    original = getattr(aggrevated.AggreVateDAgent, moment)

    def interrupted(self, what):
        if what == 2 or (what, self.iteration) == ("last.pt", 2):
            raise KeyboardInterrupt
        return original(self, what)

    with monkeypatch.context() as patch:
        patch.setattr(aggrevated.AggreVateDAgent, moment, interrupted)
        result = run_main(log_dir=tmp_path / "part", **small(**RESUMED))
    run = only_run(tmp_path / "part")
    assert result.status == 130 and "Traceback" not in result.err
    assert f"python aggrevated.py --resume {run}" in result.out
    assert checkpoint(run / "last.pt")["iteration"] == 1
    assert len(evaluations(run)) == 2 * (2 + 1 + (moment == "save"))
    resume(run_main, run)
    assert_same_runs(uninterrupted, run)


def test_resuming_an_ended_run_changes_nothing(run_small, run_main):
    run = run_small("ended", max_iteration=1)
    before, rows = checkpoint(run / "last.pt"), evaluations(run)
    assert run_main("--resume", run).status == 0
    assert equal(before, checkpoint(run / "last.pt")) and rows == evaluations(run)


# -- scoring ---------------------------------------------------------------------------------------
def scores(out):
    """{who: [mean, spread, standard error, success rate]} of what --evaluate printed."""
    lines = re.findall(r"^ *(learner|expert) (.*)$", out, re.MULTILINE)
    return {who: [float(x) for x in re.findall(r"-?\d+\.\d+|nan", text)] for who, text in lines}


def test_evaluate_scores_learner_and_expert(finished, run_main):
    before = {p.name: p.read_bytes() for p in finished[1].iterdir()}
    folder = run_main("--evaluate", finished[1], eval_episodes=3)
    assert folder.status == 0, folder.err
    file = run_main("--evaluate", finished[1] / "best.pt", eval_episodes=3)
    assert folder.out == file.out and "3 fresh episodes" in folder.out
    assert before == {p.name: p.read_bytes() for p in finished[1].iterdir()}
    result = scores(folder.out)
    assert result.keys() == {"learner", "expert"}
    for mean, spread, error, success in result.values():
        assert -2000 < mean < 0 and success == 0
        assert spread > 0 and error == pytest.approx(spread / 3**0.5, abs=0.2)


def test_evaluate_agrees_with_its_episodes(finished, run_main, make_agent):
    path = finished[1] / "last.pt"
    result = scores(run_main("--evaluate", path, eval_episodes=4).out)
    agent = make_agent()
    agent.policy.load_state_dict(checkpoint(path)["policy"])
    for who, numbers in result.items():
        episodes = agent.evaluate(who, 4, aggrevated.TEST)
        returns = [t.episode_return for t in episodes]
        assert numbers[0] == pytest.approx(np.mean(returns), abs=0.2)
        assert numbers[1] == pytest.approx(np.std(returns, ddof=1), abs=0.2)


def test_script_in_a_process_of_its_own(finished, run_script, tmp_path):
    result = run_script("--evaluate", finished[1], "--eval_episodes=1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert scores(result.stdout).keys() == {"learner", "expert"}
    assert "Traceback" not in result.stderr and not list(tmp_path.iterdir())


# -- the command line ------------------------------------------------------------------------------
def test_help_lists_every_field(run_main):
    result = run_main("--help")
    assert result.status == 0
    text = "".join(result.out.split())  # wherever the lines were broken
    for f in fields(Config):
        assert f"--{f.name}" in text and f.metadata["note"]
        assert f"(default:{f.default})" in text
    assert "--resume" in text and "--evaluate" in text


def test_every_field_is_an_option_of_its_type():
    values = {f.name: {bool: True, int: 3, float: 0.25, str: "x"}[f.type] for f in fields(Config)}
    argv = [f"--{k}" if v is True else f"--{k}={v}" for k, v in values.items()]
    assert aggrevated.parse(argv)[2] == values
    assert aggrevated.parse(["--no-render"])[2] == {"render": False}
