"""Episodes on Ray: two replicas draw what one process draws, and groups stay whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hybridflow import Batch, open_session
from tests.agents.chat import chat_model, chat_settings
from tests.asynchrony.runs import TRUNCATE, TWO_POOLS, drive


def test_two_replicas_draw_what_one_process_draws(tmp_path: Path) -> None:
    """An environment of a script, which Ray's processes get by value."""

    class Countdown:
        def reset(self, task: dict[str, Any]) -> None:
            self.left = int(task["answer"]) % 3

        async def step(self, action: str) -> tuple[str, bool, float]:
            self.left -= 1
            return f"{self.left} left", self.left < 0, float(len(action))

    settings = chat_settings(tmp_path)
    batches: list[Batch] = []
    for changes in ({"runtime": "local"}, {"runtime": "ray", "num_devices": 2}):
        output = {"output_dir": tmp_path / str(changes["runtime"])}
        with open_session("grpo", settings | changes | output, environment=Countdown) as session:
            batch = session.actor.generate_sequences(next(session.prompts))
            batches.append(batch.local(batch.columns))
            assert session.step()["episode/given_up"] == 0.0
    local, ray = batches
    for column in ("prompt_ids", "response_ids", "loss_mask", "turn_lengths"):
        expected, drawn = local.ragged(column), ray.ragged(column)
        assert torch.equal(drawn.lengths, expected.lengths), column
        assert torch.equal(drawn.values, expected.values), column
    torch.testing.assert_close(
        ray.ragged("rollout_log_probs").values,
        local.ragged("rollout_log_probs").values,
        atol=1e-4,
        rtol=0,
    )
    assert torch.equal(ray.tensor("episode_rewards"), local.tensor("episode_rewards"))


class Countdown:
    """One to three replies, each with a reward of its own."""

    def reset(self, task: dict[str, Any]) -> None:
        self.left = int(task["answer"]) % 3

    async def step(self, action: str) -> tuple[str, bool, float]:
        self.left -= 1
        return f"{self.left} left", self.left < 0, float(len(action) % 4)


VLLM = {
    "runtime": "ray",
    "actor.generation.engine": "vllm",
    "actor.generation.kv_cache_bytes": 2**22,
    "threads_per_device": 1,
    "cluster.address": "local",
}


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tp", "pp"])
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_replica_of_two_ranks(tmp_path: Path, axis: str, staleness: int) -> None:
    """F12, 12, for episodes: vLLM over two ranks, of which one runs the environments, gives the
    rewards, turns and losses of one process with the engine hf; drawn ahead, too."""
    settings = (
        chat_settings(tmp_path) | TRUNCATE | {"loop.num_steps": 3, "actor.consistency": "warn"}
    )
    settings["model.path"] = chat_model(tmp_path / "wide", hidden_size=64)
    if staleness:
        settings |= {"asynchrony.staleness": 1, "asynchrony.in_flight": "drain"}
    alone = drive(settings, tmp_path / "hf", num_steps=3, environment=Countdown)
    two = VLLM | {"num_devices": 2, f"actor.generation.{axis}": 2}
    both = drive(settings | two, tmp_path / "vllm", num_steps=3, environment=Countdown)
    compared = ("reward/mean", "episode/turns", "episode/sampled_tokens", "actor/policy_loss")
    for here, there in zip(alone.metrics, both.metrics, strict=True):
        for name in compared:
            assert there[name] == pytest.approx(here[name], rel=1e-3, abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["hf", "vllm"])
@pytest.mark.parametrize("in_flight", ["drain", "keep"])
def test_episodes_ahead_in_a_pool_of_their_own(tmp_path: Path, engine: str, in_flight: str) -> None:
    """Two pools, with validation: in drain mode the numbers of one process, otherwise every task
    once and within the bound."""
    settings = (
        chat_settings(tmp_path) | TRUNCATE | {"loop.num_steps": 4, "actor.consistency": "warn"}
    )
    settings["model.path"] = chat_model(tmp_path / "wide", hidden_size=64)
    settings |= {"asynchrony.staleness": 1, "asynchrony.in_flight": in_flight}
    settings |= {
        "data.validation": settings["data.train"],
        "episode.lockstep": in_flight == "drain",
    }
    apart = settings | VLLM | TWO_POOLS | {"actor.generation.engine": engine}
    there = drive(apart, tmp_path / "apart", environment=Countdown, num_steps=4, validates=True)
    assert there.positions == [4, 8, 12, 16]
    assert max(step["staleness/max"] for step in there.metrics) <= 3
    if in_flight == "drain":
        here = drive(settings, tmp_path / "hf", environment=Countdown, num_steps=4, validates=True)
        for mine, other in zip(here.metrics, there.metrics, strict=True):
            for name in ("reward/mean", "episode/turns", "validation/reward/mean"):
                assert other[name] == pytest.approx(mine[name], rel=1e-3), name
