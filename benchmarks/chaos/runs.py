"""The runs that are disturbed: PPO on a tiny fp32 model in three pools, through the command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from benchmarks.chaos.marks import DIRECTORY
from controllers.ledger import LEDGER, first_difference
from hybridflow.failures import EVENTS
from tests.tiny import make_data, make_model

CLOCKS = re.compile(
    r"seconds|tokens_per_s|time_s|sync/.*_s$|memory|asynchrony/(generator_idle|trainer_waits)"
)
"""Metrics that a clock or the memory allocator decides."""
CALL_TIMEOUT_S = 30.0
"""After which a stopped process is noticed; the longest call, building a role, takes a third of it."""
POOLS = (
    "placement=custom",
    "pools.policy.num_devices=2",
    "pools.policy.roles=[actor,reference]",
    "pools.values.roles=[critic,reward]",
    "pools.samples.roles=[generation]",
)
SETTINGS = (
    "data.batch_size=4",
    "algorithm.samples_per_prompt=2",
    "algorithm.num_mini_batches=2",
    "actor.generation.precision=fp32",
    "actor.generation.max_model_len=64",
    "actor.generation.kv_cache_bytes=16777216",
    "actor.generation.sampling.max_response_tokens=8",
    "actor.train.precision=fp32",
    "actor.train.engine=benchmarks.chaos.engine:RaisingEngine",
    "critic.train.precision=fp32",
    "reference.train.precision=fp32",
    "actor.train.optimizer.learning_rate=1e-3",
    "reward.function=benchmarks.chaos.reward:by_length",
    "loop.checkpoint_every=3",
    "metrics.console=false",
    "cluster.address=local",
    "cluster.worker_logs=false",
    f"call_timeout_s={CALL_TIMEOUT_S}",
    "threads_per_device=1",
    *POOLS,
)
MODEL = "huggingface/*model.safetensors"
"""An adapter's too."""


def make_inputs(directory: Path) -> tuple[Path, Path]:
    """A model and prompts."""
    return make_model(directory / "model", layers=1), make_data(directory / "prompts.jsonl")


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What a run left in its output directory."""

    directory: Path

    @property
    def log(self) -> Path:
        """Beside the directory, whose disk may be full."""
        return self.directory.with_name(f"{self.directory.name}.log")

    def events(self, event: str = "") -> list[dict[str, Any]]:
        lines = self._lines(EVENTS)
        return [line for line in lines if not event or line["event"] == event]

    def recoveries_in_log(self) -> int:
        """Also of those whose events wait for room on a full disk."""
        return self.log.read_text(errors="replace").count("\nrecovered in ")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl without what a clock decides."""
        rows = []
        for line in self._lines("metrics.jsonl"):
            rows.append({name: value for name, value in line.items() if not CLOCKS.search(name)})
        return rows

    def median_s(self) -> dict[str, float]:
        """Median seconds of every call."""
        seconds: dict[str, list[float]] = {}
        for line in self._lines("metrics.jsonl"):
            for name, value in line.items():
                if name.startswith("seconds/"):
                    seconds.setdefault(name.removeprefix("seconds/"), []).append(float(value))
        return {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}

    def ledger(self) -> dict[int, dict[str, Any]]:
        """The ledger's line of every committed step: digests of its rows and of all weights and
        moments after it."""
        return {line["step"]: line for line in self._lines(LEDGER)}

    def last_step(self) -> int:
        """The newest committed step; -1 before the first."""
        return max(self.ledger(), default=-1)

    def model(self) -> dict[str, Tensor]:
        """The weights of the newest checkpoint's Hugging Face directory."""
        checkpoints = self.directory / "checkpoints"
        newest = checkpoints / (checkpoints / "latest").read_text().strip()
        (path,) = newest.glob(MODEL)
        return load_file(path)

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.directory / name
        if not path.exists():
            return []
        lines = []
        for text in path.read_text().splitlines():
            if text.endswith("}"):
                lines.append(json.loads(text))
        return lines


def start_run(
    output: Path, model: Path, data: Path, num_steps: int, engine: str, more: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """`more` settings take the place of those of SETTINGS with the same name."""
    names = [setting.partition("=")[0] for setting in more]
    settings = [setting for setting in SETTINGS if setting.partition("=")[0] not in names]
    temporary = temporary_directory(output)
    temporary.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "recipes.ppo",
        *settings,
        f"model.path={model}",
        f"data.train={data}",
        f"output_dir={output}",
        f"loop.num_steps={num_steps}",
        f"actor.generation.engine={engine}",
        *more,
    ]
    output.mkdir(parents=True, exist_ok=True)
    with RunFiles(directory=output).log.open("w") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                **os.environ,
                DIRECTORY: str(output),
                "TMPDIR": str(temporary),
                "RAY_TMPDIR": tempfile.gettempdir(),  # sockets' paths must be short
            },
        )


def temporary_directory(output: Path) -> Path:
    """Where the run's processes put their temporary files; beside the directory, which may be full."""
    return output.with_name(f"{output.name}.tmp")


def rows_of(run: RunFiles, step: int) -> int:
    """Rows that the run trained on up to a step, by its ledger."""
    return sum(line["rows"]["count"] for number, line in run.ledger().items() if number <= step)


def equal_runs(one: RunFiles, other: RunFiles) -> list[str]:
    """In words: what differs between two runs; empty where they are equal to the last bit."""
    differences = []
    difference = first_difference(one.directory / LEDGER, other.directory / LEDGER)
    if difference is not None:
        differences.append(f"ledger: {difference}")
    if one.metrics() != other.metrics():
        differences.append("metrics")
    expected, weights = one.model(), other.model()
    for name, tensor in expected.items():
        if name not in weights or not tensor.equal(weights[name]):
            differences.append(f"weights of {name}")
    return differences
