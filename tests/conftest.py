import contextlib
import io
import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / x) for x in ("", "rl-trained-agents", "logs/reference/scripts")]

import pytest
import stable_baselines3
import torch
import aggrevated

torch.set_num_threads(1)
checkpoint = torch.load  # of weights only


def make_sac(path, env_id="Pendulum-v1", kind="SAC", use_sde=False, **policy_kwargs):
    """Save an untrained SB3 agent to `path`; SAC's actor is loud, so that the bounds matter."""
    kwargs = dict(policy_kwargs=dict(net_arch=[16, 16]) | policy_kwargs)
    kwargs |= dict(use_sde=use_sde) if kind == "SAC" else {}
    model = getattr(stable_baselines3, kind)("MlpPolicy", env_id, seed=0, device="cpu", **kwargs)
    if kind == "SAC":
        for layer in (x for x in model.actor.mu.modules() if isinstance(x, torch.nn.Linear)):
            layer.weight.data.mul_(10)
    model.save(path)
    return model


def equal(a, b):
    """Bitwise equality of nested tensors and values."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def only_run(log_dir):
    (run,) = log_dir.iterdir()
    return run


def evaluations(run):
    """A run's evaluations without their seconds."""
    table = json.loads((run / "evaluations.json").read_text())
    return [{k: v for k, v in row.items() if k != "seconds"} for row in table]


@pytest.fixture(scope="session")
def expert_zip(tmp_path_factory):
    path = tmp_path_factory.mktemp("expert") / "pendulum.zip"
    make_sac(path)
    return path


@pytest.fixture(scope="session")
def small(expert_zip):
    """small(**changes): the Config values of a run of about a second."""
    values = dict(
        env_name="Pendulum-v1", expert_path=str(expert_zip), device="cpu", n_workers=1, K=2, H=40,
        max_iteration=2, alpha_decay_iterations=2, eval_every=1, eval_episodes=2, hidden_dim=16,
        update_sz=100, batch_sz=32, train_repeat=3, lr=1e-3,
    )  # fmt: skip
    return lambda **changes: values | changes


@pytest.fixture
def make_agent(small):
    """make_agent(**changes): an agent without a run folder; its workers end with the test."""
    agents = []
    yield lambda **changes: agents.append(aggrevated.open_agent(**small(**changes))) or agents[-1]
    for agent in agents:
        agent.close()


@pytest.fixture(scope="session")
def run_main():
    """run_main(*args, **fields): the command line in this process; its status, out and err."""

    def run(*args, **fields):
        out, err, argv = io.StringIO(), io.StringIO(), [str(a) for a in args]
        fields |= {k: json.dumps(v) for k, v in fields.items() if isinstance(v, dict)}
        argv += [f"--{k}={v}" for k, v in fields.items()]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = aggrevated.main(argv)
        except SystemExit as end:  # argparse's
            status = end.code
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C changes it
        return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())

    return run


@pytest.fixture(scope="session")
def finished(run_main, small, tmp_path_factory):
    """The result of a small run, and its folder."""
    log_dir = tmp_path_factory.mktemp("finished") / "new" / "logs"
    result = run_main(log_dir=log_dir, **small())
    assert result.status == 0, result.err
    return result, only_run(log_dir)
