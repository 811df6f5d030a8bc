"""A trained role small enough to be killed often: real snapshot files, staging and flushing over an
engine of two tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from controllers.algorithm_base import AlgorithmConfig
from controllers.data import DataConfig, PromptDataset, RowLoader
from controllers.loop import Loop
from controllers.loop_config import LoopConfig
from hybridflow.batch import Batch
from hybridflow.checkpoint import CheckpointStore
from hybridflow.context import RankContext
from hybridflow.metrics import MetricsConfig, Tracker
from hybridflow.recovery.attempts import Attempt
from hybridflow.resharding.shards import LocalParameter
from hybridflow.results import Metrics
from hybridflow.snapshots.files import check_file, file_name, write_snapshot
from hybridflow.snapshots.flush import Flusher
from hybridflow.snapshots.memory import MemoryPlace, Stager
from hybridflow.snapshots.reading import SnapshotFiles
from tests.snapshots.layouts import parts
from workers.trained_worker import TrainedWorker


class HandEngine:
    """model.w and exp_avg.w on one rank."""

    def __init__(self) -> None:
        self.num_steps = 0
        whole = {"model.w": torch.arange(12.0).view(4, 3), "exp_avg.w": torch.zeros(4, 3)}
        self._parameters = parts(whole, "rows", 0, 1)

    def state(self, *, moments: bool, copies: bool) -> list[LocalParameter]:
        return self._parameters if moments else self._parameters[:1]

    def tensor(self, number: int) -> torch.Tensor:
        return self._parameters[number].shards[0].tensor

    def step(self, rows: torch.Tensor) -> None:
        """Depends on the order of all rows so far."""
        for uid in rows.tolist():
            self.tensor(1).mul_(0.9).add_(self.tensor(0) * (uid + 1))
            self.tensor(0).add_(self.tensor(1).sin())
        self.num_steps += 1

    def scalars(self, further: Mapping[str, int]) -> dict[str, int]:
        return {"num_steps": self.num_steps, **further}

    def save(self, directory: Path, scalars: Mapping[str, int]) -> None:
        state = self.state(moments=self.num_steps > 0, copies=False)
        scalars = {"num_steps": self.num_steps, **scalars}
        write_snapshot(directory / file_name(0), state, scalars)

    def load(self, directory: Path, stamp: str | None = None) -> dict[str, int]:
        files = SnapshotFiles(directory, stamp)
        self.num_steps = files.scalars["num_steps"]
        files.load(self.state(moments=self.num_steps > 0, copies=True))
        if not self.num_steps:
            self.tensor(1).zero_()
        return files.scalars


class HandRole(TrainedWorker):
    prefix = "actor"

    def __init__(self) -> None:
        self.engine: Any = HandEngine()
        self.context = RankContext(role="actor")
        self.num_updates = 0
        self._stager, self._flusher, self._staged = Stager(), Flusher(check_file), None
        self.exports = 0

    def save_pretrained(self, directory: str) -> None:
        self.exports += 1
        Path(directory).mkdir()
        (Path(directory) / "config.json").write_text("{}")


@dataclass
class HandAlgorithm:
    role: HandRole
    config: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    number: float = 0.0

    def step(self, prompts: Batch) -> Metrics:
        self.role.engine.step(prompts.tensor("uid"))
        self.role.num_updates += 1
        self.number += 0.5
        return Metrics({"loss": float(self.role.engine.tensor(0).sum())})

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


def dataset(num_rows: int = 10) -> PromptDataset:
    columns = [json.dumps({}).encode()] * num_rows
    ends = np.cumsum([len(column) for column in columns])
    text = np.frombuffer(b"".join(columns), dtype=np.uint8)
    tokens = np.repeat(np.arange(num_rows, dtype=np.int32), 2)
    return PromptDataset(tokens, 2 * np.arange(1, num_rows + 1), text, ends, "made by hand")


def make_loop(
    output: Path, shm: Path | None, role: HandRole | None = None, **settings: Any
) -> Loop:
    """A controller's life up to the point where it runs: claims the run and resumes."""
    attempt = Attempt.claim(output)
    memory = None if shm is None else MemoryPlace.open(attempt, root=shm)
    role = role or HandRole()
    config = LoopConfig(**({"num_steps": 5, "checkpoint_every": 2} | settings))
    quiet = MetricsConfig(console=False, tensorboard=False, jsonl=False)
    loop = Loop(
        HandAlgorithm(role),
        trained={"actor": role},
        data=RowLoader(dataset(), DataConfig(train="by hand", batch_size=4, seed=3)),
        validate=None,
        tracker=Tracker(quiet, output, total_steps=5),
        store=CheckpointStore(output / "checkpoints", attempt=attempt),
        config=config,
        memory=memory,
    )
    loop.resume()
    return loop


def weights(loop: Loop) -> torch.Tensor:
    """Weights and moments: float32 [2, 4, 3]."""
    role = loop.trained["actor"]
    assert isinstance(role, HandRole)
    return torch.stack([role.engine.tensor(0), role.engine.tensor(1)])
