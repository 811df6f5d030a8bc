"""python -m recipes.shapes DIRECTORY [--steps 120]: makes the task, warms the model up by recipes.sft and
trains it by recipes.grpo, all in this process. Prints the share of the held-out images whose colour it
names, taking the likeliest answer, before and after."""

from __future__ import annotations

import argparse
from pathlib import Path

from hybridflow import open_session
from recipes.session import Session
from recipes.shapes.task import prepare, reward, settings, warm_start_settings

WARM_START_STEPS = 24
WINDOW = 10
"""Steps between two lines."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    arguments = parser.parse_args()
    directory = arguments.directory
    data = prepare(directory)
    with open_session("sft", warm_start_settings(directory) | {"runtime": "local"}) as session:
        for _ in range(WARM_START_STEPS):
            session.step()
        session.save(directory / "warmed")
    run = settings() | data
    run |= {
        "runtime": "local",
        "model.path": str(directory / "warmed"),
        "output_dir": str(directory / "grpo"),
    }
    rewards: list[float] = []
    with open_session("grpo", run, reward=reward) as session:
        _print_held_out(session, "before")
        for step in range(1, arguments.steps + 1):
            rewards.append(session.step()["reward/mean"])
            if step % WINDOW == 0:
                print(f"step {step}: {sum(rewards[-WINDOW:]) / WINDOW:.0%} right", flush=True)
        _print_held_out(session, f"after {arguments.steps} steps")
        session.save(directory / "trained")


def _print_held_out(session: Session, when: str) -> None:
    share = session.validate()["reward/mean"]
    print(f"held out, {when}: {share:.0%} right", flush=True)


if __name__ == "__main__":
    main()
