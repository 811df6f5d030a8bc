"""Environments of verifiers (0.1.x): single turn, many turns, tools; with their rubrics.

    # my_module.py, run with environment=my_module:episode
    import verifiers
    from workers.agents.packages.verifiers import verifiers_episode

    episode = verifiers_episode(lambda: verifiers.load_environment("wordle"))

A row of data is a row of the environment's dataset (`get_dataset().to_json(path)`). The policy is
reached over an Endpoint, so that environments which write their own loop run too. The rubric's
reward is the episode's and its metrics are logged; an error that verifiers records in the rollout's
state, where it would count as a reward of 0, is a failure here. Leaves out verifiers.v1, and rubrics
that compare the rollouts of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workers.agents.endpoint import Endpoint
from workers.agents.executor import Episode
from workers.agents.model import Model
from workers.agents.outcome import Outcome


def verifiers_episode(load: Callable[[], Any]) -> Episode:
    """The episode of the environment that `load` returns, which is loaded once in each process."""
    loaded: list[Any] = []

    async def episode(model: Model, task: dict[str, Any]) -> Outcome:
        from openai import AsyncOpenAI
        from verifiers.clients import OpenAIChatCompletionsClient

        if not loaded:
            loaded.append(load())
        rollout_input = {"example_id": model.row, "info": {}, "answer": ""} | task
        async with (
            Endpoint(model) as url,
            AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client,
        ):
            output = await loaded[0].run_rollout(
                rollout_input, OpenAIChatCompletionsClient(client), "policy", {}
            )
        if output["error"] is not None:
            raise RuntimeError(f"verifiers: {output['error']}")
        return Outcome(reward=output["reward"], metrics=dict(output["metrics"] or {}))

    return episode
