"""open_session on Ray: a closure as the reward, a killed process in one line, and a session
after it. And the same death on the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from hybridflow import (
    Batch,
    FunctionRewardWorker,
    Ragged,
    RankContext,
    WorkerDied,
    current_session,
    each,
    open_session,
    start,
)
from recipes.composing import RecipeFile
from recipes.main import main
from tests.tiny import make_data, make_model
from workers.config import ModelConfig
from workers.role_config import ScorerConfig


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("ray")
    return {
        "num_devices": 2,
        "model.path": make_model(directory / "model", layers=1),
        "data.train": make_data(directory / "prompts.jsonl", rows=8),
        "data.batch_size": 2,
        "algorithm.samples_per_prompt": 2,
        "actor.generation.engine": "hf",
        "actor.generation.precision": "fp32",
        "actor.generation.sampling.max_response_tokens": 5,
        "actor.train.precision": "fp32",
        "cluster.address": "local",
        "output_dir": directory / "run",
    }


def test_a_session_dies_and_the_next_one_lives(
    tiny: dict[str, Any], tmp_path: Path, ray_cluster: None
) -> None:
    """Both in a cluster that is there already and stays; that sessions start and end one of their
    own: tests/asynchrony/test_two_pools.py."""
    offset = 2.5
    with open_session(
        "grpo", tiny, reward=lambda *, response, **columns: offset + 0 * len(response)
    ) as session:
        assert session.step()["reward/mean"] == offset
        memory = each(session.actor.peak_memory_bytes)
        assert len(memory) == 2 and all(isinstance(value, int) and value > 0 for value in memory)
        saving = start(session.actor.save_checkpoint, str(tmp_path / "checkpoint"))
        saving.wait()
        assert list((tmp_path / "checkpoint").iterdir())
        session.save(tmp_path / "saved")
        assert (tmp_path / "saved" / "model.safetensors").is_file()
        (pool,) = session.pools.values()
        os.kill(pool.hosts[1].pid, signal.SIGKILL)  # type: ignore[attr-defined]
        with pytest.raises(WorkerDied, match=r"actor rank 1 died in \w+ \(pid \d+") as caught:
            session.step()
        assert "\n" not in str(caught.value)
    assert current_session() is None
    again = {**tiny, "num_devices": 1}
    with open_session("grpo", again, reward=lambda **columns: 1.0) as session:
        numbers = session.step()
        assert numbers["reward/mean"] == 1.0
        assert not [name for name in numbers if name.startswith("seconds/") and "save" in name]


def test_a_killed_process_ends_the_command_in_one_line(
    tiny: dict[str, Any], tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command in this process; with its supervisor: tests/recovery/test_killed_run.py."""
    settings = {**tiny, "output_dir": tmp_path, "loop.num_steps": 10_000, "metrics.console": False}
    settings["reward.function"] = "tests.recipes.rewards:plain"
    settings |= {"recovery.max_restarts": 0, "num_devices": 1}
    metrics = tmp_path / "metrics.jsonl"

    def kill() -> None:
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            if ended.wait(0.05):
                return
        session = current_session()
        assert session is not None
        (pool,) = session.pools.values()
        os.kill(pool.pids()[0], signal.SIGKILL)

    ended = threading.Event()
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(SystemExit) as exit:
            main(
                lambda: RecipeFile("grpo"), [f"{name}={value}" for name, value in settings.items()]
            )
    finally:
        ended.set()
        killer.join()
    errors = capsys.readouterr().err
    assert exit.value.code == 1 and "Traceback" not in errors, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    # The process has all three roles; the call that it was in is one of theirs.
    roles = "actor|reference|reward"
    assert re.match(rf"error: ({roles}) rank 0 died in \w+ \(pid \d+ on ", line), line
    assert json.loads(metrics.read_text().splitlines()[0])["step"] == 1


def test_a_local_reward_runs_here_even_where_ray_is_connected(
    ray_cluster: None, tmp_path: Path
) -> None:
    seen: list[str] = []

    def reward(*, response: str, **columns: object) -> float:
        seen.append(response)
        return 1.0

    policy = ModelConfig(path=str(make_model(tmp_path, layers=1)))
    config = ScorerConfig(function=reward, policy=policy)
    worker = FunctionRewardWorker(config, RankContext())
    batch = Batch.of(
        prompt_ids=Ragged.of([[5]]),
        response_ids=Ragged.of([[6, 7]]),
        finish_reason=["stop"],
    )
    assert worker.compute_reward(batch).tensor("rewards").tolist() == [1.0] and seen == ["67"]


def test_rows_of_a_killed_reward_task_are_scored_again(ray_cluster: None, tmp_path: Path) -> None:
    """Nothing else is restarted, and no row gets another value. A function that kills
    its process each time ends in one line that says so."""
    died = tmp_path / "died"

    def reward(*, response: str, **columns: object) -> float:
        if response == "67" and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return float(response)

    def crashes(**columns: object) -> float:
        os.kill(os.getpid(), signal.SIGKILL)
        return 1.0

    policy = ModelConfig(path=str(make_model(tmp_path, layers=1)))
    batch = Batch.of(
        prompt_ids=Ragged.of([[5], [5]]),
        response_ids=Ragged.of([[6, 7], [8, 9]]),
        finish_reason=["stop", "stop"],
    )
    in_ray = RankContext(in_ray=True)
    worker = FunctionRewardWorker(ScorerConfig(function=reward, policy=policy, num_tasks=2), in_ray)
    assert worker.compute_reward(batch).tensor("rewards").tolist() == [67.0, 89.0]
    assert died.exists()
    config = ScorerConfig(function=crashes, policy=policy, retries=0)
    with pytest.raises(RuntimeError, match=r"the process that scored rows died 1 times"):
        FunctionRewardWorker(config, in_ray).compute_reward(batch)
