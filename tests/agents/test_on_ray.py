"""Episodes on Ray: two replicas draw what one process draws, and groups stay whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hybridflow import Batch, open_session
from tests.agents.chat import chat_settings


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
