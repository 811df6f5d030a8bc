"""Training of tiny models that act, and what environments' delays cost.

    python -m benchmarks.agents --json agents.json [--only calculator/tools] [--steps 30] [--engine hf]

A row for each task and interface: success (mean reward of held-out tasks, greedy) before and after
training with recipes.grpo, episodes per second, turns, groups given up, and the seconds of the whole
row: `warm_start_s` of them (0 where another row of the task and seed has made model and data),
`training_s`, and validation. Then the throughput of 256 episodes at a time whose environments take
random time, with and without lockstep, over that without delays (throughput); and the speed of
environments that compute in two processes of their own, over that in the engine's (busy).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.agents.processes import busy
from hybridflow import run
from recipes.agents.prepare import TASKS, prepare, settings
from recipes.quickstart.model import make_tokenizer
from workers.agents.config import EpisodeConfig
from workers.agents.executor import Episodes, Executor
from workers.agents.model import Draw, Drawn, Limits, Model, Request
from workers.agents.renderer import Renderer
from workers.text import ResponseReader

NUM_EPISODES, NUM_TURNS, NUM_TASKS = 256, 4, 1024
ROUND_S = 0.2
"""Seconds that the simulated engine takes for the replies of all episodes."""
MOST_DELAY_S = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", default="", help="task/interface, throughput, or busy")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--engine", default="hf")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a row for each")
    parser.add_argument("--directory", type=Path, default=None)
    arguments = parser.parse_args()
    directory = arguments.directory or Path(tempfile.mkdtemp())
    rows: list[dict[str, Any]] = []
    for name, task in TASKS.items():
        for interface in task.environments:
            if arguments.only not in ("", f"{name}/{interface}"):
                continue
            for seed in arguments.seeds:
                where = directory / str(seed)
                row = learn(name, interface, where, arguments.steps, arguments.engine, seed)
                rows.append(row)
                print(json.dumps(row), flush=True)
    if arguments.only in ("", "throughput"):
        rows.append(throughput())
        print(json.dumps(rows[-1]), flush=True)
    if arguments.only in ("", "busy"):
        rows.append(busy(2))
        print(json.dumps(rows[-1]), flush=True)
    arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def learn(
    name: str, interface: str, directory: Path, steps: int, engine: str, seed: int
) -> dict[str, Any]:
    """Trains on the task through the interface; `seed`: of model, data, warm start and draws."""
    began = time.perf_counter()
    paths = prepare(name, directory / name, seed=seed)
    prepared = time.perf_counter()
    output = directory / f"{name}-{interface}"
    chosen = settings(name, interface) | {
        "runtime": "local",
        "seed": seed,
        "actor.generation.engine": engine,
        "loop.num_steps": steps,
        "loop.resume": "never",
        "output_dir": output,
    }
    outcome = run("grpo", paths | chosen)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    training = [line for line in lines if "episode/turns" in line and "reward/std" in line]
    num_episodes = steps * settings(name, interface)["data.batch_size"] * 8  # type: ignore[operator]
    return {
        "task": name,
        "interface": interface,
        "seed": seed,
        "success_before": outcome.reward_before,
        "success_after": outcome.reward_after,
        "episodes_per_s": num_episodes / outcome.train_s,
        "turns_mean": float(np.mean([line["episode/turns"] for line in training])),
        "given_up": sum(line["episode/given_up"] for line in training),
        "warm_start_s": prepared - began,
        "training_s": outcome.train_s,
        "seconds": time.perf_counter() - began,
    }


def throughput() -> dict[str, Any]:
    """Episodes per second with delays over those without. The engine is simulated: it sleeps for a
    time that grows with the number of replies."""
    gc.collect()
    gc.disable()  # else one of the runs has the collection of all that was imported
    plain = episodes_per_s(0.0, lockstep=True)
    lockstep = episodes_per_s(MOST_DELAY_S, lockstep=True)
    free = episodes_per_s(MOST_DELAY_S, lockstep=False)
    gc.enable()
    return {
        "task": "throughput",
        "interface": f"{NUM_EPISODES} episodes of {NUM_TURNS} turns, delays up to {MOST_DELAY_S} s",
        "episodes_per_s": plain,
        "share_with_delays_lockstep": lockstep / plain,
        "share_with_delays": free / plain,
    }


def episodes_per_s(most_delay_s: float, *, lockstep: bool) -> float:
    """The speed of NUM_TASKS episodes, NUM_EPISODES at a time, with a random delay after each turn."""
    tokenizer = make_tokenizer()
    renderer, read = Renderer(tokenizer), ResponseReader(tokenizer, [tokenizer.eos_token_id])
    config = EpisodeConfig(lockstep=lockstep)
    chance = random.Random(0)

    async def episode(model: Model, task: dict[str, Any]) -> float:
        for _ in range(NUM_TURNS):
            await model.reply([1])
            await asyncio.sleep(chance.random() * most_delay_s)
        return 1.0

    def make_model(row: int, draw: Draw) -> Model:
        return Model(
            row=row,
            draw=draw,
            renderer=renderer,
            read=read,
            end_token_ids=frozenset(),
            config=config,
            limits=Limits(reply_tokens=8, sampled_tokens=1000, context_tokens=1000),
            vocab_size=len(renderer.tokenizer),
        )

    def answer(requests: Sequence[Request]) -> list[Drawn]:
        time.sleep(ROUND_S * (0.5 + 0.5 * len(requests) / NUM_EPISODES))
        drawn = Drawn(ids=[5], log_probs=[-1.0], stopped=True, weight_versions=[0])
        return [drawn] * len(requests)

    began = time.perf_counter()
    for _ in range(NUM_TASKS // NUM_EPISODES):
        begin = partial(Episodes, episode, "delays", config, make_model)
        Executor(begin, answer, lockstep=lockstep).run([{}] * NUM_EPISODES)
    return NUM_TASKS / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
