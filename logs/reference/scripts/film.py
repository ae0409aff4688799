"""A film of a policy on the first validation terrain.

    python logs/reference/scripts/film.py logs/RUN        writes logs/RUN/final.gif

A run plays by its best iterate; a policy file will do too, and its film lies beside it.
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

from common import ag, terrain
from PIL import Image, ImageDraw

EVERY, SIZE = 5, (480, 480)  # steps between pictures; their largest size


def draw(c: ag.Config, episode: ag.Trajectory) -> list[Image.Image]:
    """Every fifth step of an episode on the first validation terrain, with step and return."""
    frames = []
    kwargs = json.loads(c.env_kwargs) | dict(render_mode="rgb_array")
    env = ag.make_env(replace(c, env_kwargs=json.dumps(kwargs)))
    env.reset(seed=terrain((ag.VALIDATION, 0)))
    for t, action in enumerate(episode.actions):
        if t % EVERY == 0:
            frame = Image.fromarray(env.render())
            frame.thumbnail(SIZE)
            text = f"step {t}, return {episode.rewards[:t].sum():.0f}"
            ImageDraw.Draw(frame).text((8, 8), text, "black", font_size=24)
            frames.append(frame.quantize(32, method=Image.Quantize.FASTOCTREE))
        env.step(action.clip(env.action_space.low, env.action_space.high))
    env.close()
    return frames


def save_gif(run: Path, path: Path, **changes) -> None:
    """The film of a run's best iterate; UserError unless the run and its pictures are there."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    agent = ag.open_agent(**changes, evaluate=run, n_workers=1, device="cpu")
    (episode,) = agent.play([(ag.VALIDATION, 0)], 0.0, 0.0, agent.horizon)
    name = agent.config.env_name
    with ag.user_error_if(Exception, f"{name} cannot be drawn here"):  # no OpenGL, no pictures
        frames = draw(agent.config, episode)
    how = dict(format="GIF", save_all=True, append_images=frames[1:], duration=100, loop=0)
    with ag.user_error_if(OSError, f"{path} cannot be written; give another file"):
        frames[0].save(path, **how)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run, or a policy file")
    parser.add_argument("film", type=Path, nargs="?", help="default: beside the policy")
    parser.add_argument("--env_name", help="for one that is imported: module:id")
    args = parser.parse_args()
    changes = dict(env_name=args.env_name) if args.env_name else {}
    beside = args.run / "final.gif" if args.run.is_dir() else args.run.with_suffix(".gif")
    path = args.film or beside
    try:
        save_gif(args.run, path, **changes)
    except ag.UserError as error:
        parser.error(str(error))
    print(path)
