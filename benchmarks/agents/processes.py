"""The speed of environments that compute, in processes of their own (episode.processes)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from cluster.config import ClusterConfig
from cluster.connect import connect
from hybridflow.context import RankContext
from recipes.quickstart.model import make_tokenizer
from workers.agents.config import EpisodeConfig
from workers.agents.executor import Episodes, Executor
from workers.agents.interfaces import as_episode
from workers.agents.live import LiveEpisodes
from workers.agents.model import Draw, Drawn, Model, Request
from workers.agents.models import Models, Plan
from workers.agents.processes import EpisodesInProcesses, Processes
from workers.generation.config import SamplingConfig

NUM_EPISODES, NUM_TURNS = 64, 4
BUSY_S = 0.01
"""Seconds of a processor that an environment computes between two replies."""
ROUND_S = 0.1
"""Seconds that the simulated engine takes for the replies of all episodes."""


class Busy:
    """Computes in Python for BUSY_S of its thread's time at each step."""

    def reset(self, task: dict[str, Any]) -> str:
        self.left = NUM_TURNS
        return "begin"

    def step(self, action: str) -> tuple[str, bool, float]:
        until, number = time.thread_time() + BUSY_S, 0
        while time.thread_time() < until:
            number += 1
        self.left -= 1
        return "go on", self.left == 0, 1.0


def busy(number: int) -> dict[str, Any]:
    """Episodes per second in `number` processes, and over those in the engine's process."""
    config = EpisodeConfig()
    tokenizer = make_tokenizer()
    models = Models(
        tokenizer,
        (),
        [tokenizer.eos_token_id],
        config,
        context_tokens=4096,
        vocab_size=len(tokenizer),
    )
    plan = Plan(seed=0, sampling=SamplingConfig(max_response_tokens=8), most_tokens=1000)
    interface = as_episode(Busy)

    def here() -> LiveEpisodes:
        def make_model(row: int, draw: Draw) -> Model:
            return models.make(row, draw, plan)

        return Episodes(interface.episode, interface.name, config, make_model)

    alone = episodes_per_s(here)
    with connect(ClusterConfig(address="local"), cpu_slots=number):
        processes = Processes(number, RankContext(in_ray=True), Busy, config, models)

        def apart() -> LiveEpisodes:
            return EpisodesInProcesses(processes, [plan] * NUM_EPISODES)

        speed = episodes_per_s(apart)
        processes.close()
    return {
        "task": "busy",
        "interface": f"{NUM_EPISODES} environments that compute {BUSY_S} s for each of {NUM_TURNS} turns",
        "processes": number,
        "episodes_per_s": speed,
        "times_one_process": speed / alone,
    }


def episodes_per_s(make_episodes: Callable[[], LiveEpisodes]) -> float:
    """The speed of the second of two rounds of NUM_EPISODES."""

    def answer(requests: Sequence[Request]) -> list[Drawn]:
        time.sleep(ROUND_S)
        drawn = Drawn(ids=[5], log_probs=[-1.0], stopped=True, weight_versions=[0])
        return [drawn] * len(requests)

    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        Executor(make_episodes, answer, lockstep=True).run([{}] * NUM_EPISODES)
        seconds = time.perf_counter() - began
    return NUM_EPISODES / seconds
