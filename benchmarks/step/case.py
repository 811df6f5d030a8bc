"""The parts that both sides of benchmarks.step share: models, prompts, sampled lengths, the reward,
and how time and memory are measured.

Imported by the other system's interpreter too, so nothing of the runtime is imported here.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil

PROMPTS, SAMPLES, PROMPT_TOKENS, RESPONSE_TOKENS, SHORTEST_RESPONSE = 32, 8, 8, 64, 8
NUM_PROMPTS = 512
"""Rows of the dataset: more than any run uses."""
PHASES = ("generation", "sync", "log_probs", "update", "other")
SHAPES: dict[str, dict[str, int]] = {
    "3m": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_layers": 4,
        "num_heads": 4,
        "num_key_value_heads": 2,
    },
    "30m": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_layers": 8,
        "num_heads": 8,
        "num_key_value_heads": 4,
    },
}
"""Qwen2 with 3.3 and 31.7 million parameters; head_dim 64."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of one system."""

    model: str
    """Key of SHAPES."""
    lengths: str
    """fixed (every response RESPONSE_TOKENS long) or drawn (uniform from SHORTEST_RESPONSE to
    RESPONSE_TOKENS, per response)."""
    directory: str
    """Where prepare() put models and prompts."""
    warm_up: int
    """Steps before those that are measured."""
    steps: int
    settings: dict[str, str] = field(default_factory=dict)
    """Settings of the system that is measured."""

    @property
    def model_path(self) -> str:
        return str(Path(self.directory) / self.model)

    @property
    def data_path(self) -> str:
        return str(Path(self.directory) / "prompts.parquet")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        return cls(**json.loads(text))

    def response_tokens(self, step: int) -> np.ndarray:
        """int64 [PROMPTS * SAMPLES]: how long each response of the step is made."""
        count = PROMPTS * SAMPLES
        if self.lengths == "fixed":
            return np.full(count, RESPONSE_TOKENS, dtype=np.int64)
        return np.random.default_rng([7, step]).integers(
            SHORTEST_RESPONSE, RESPONSE_TOKENS + 1, count
        )


def prepare(directory: Path, models: list[str]) -> None:
    """Random models with a byte tokenizer, and prompts of eight digits, which are eight tokens."""
    import pandas

    from recipes.quickstart.model import ModelShape, make_model, make_tokenizer

    tokenizer = make_tokenizer()
    for name in models:
        shape = ModelShape(**SHAPES[name], max_tokens=128)  # type: ignore[arg-type]
        make_model(tokenizer, shape, seed=0).save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    digits = np.random.default_rng(0).integers(0, 10, (NUM_PROMPTS, PROMPT_TOKENS))
    prompts = ["".join(map(str, row)) for row in digits]
    assert all(len(tokenizer(prompt)["input_ids"]) == PROMPT_TOKENS for prompt in prompts)
    pandas.DataFrame({"prompt": prompts}).to_parquet(directory / "prompts.parquet")


def reward(response: str) -> float:
    """Something trivial that differs between responses."""
    return response.count("e") / 8


class StepClock:
    """Marks the beginnings of steps: wall and CPU seconds (user and system, of this process and
    all below it) from each to the next."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        self._marks.append((time.perf_counter(), cpu_seconds()))

    def steps(self) -> list[dict[str, float]]:
        """step_s and cpu_s of every step whose end was marked."""
        steps = []
        for (begin_s, begin_cpu_s), (end_s, end_cpu_s) in pairwise(self._marks):
            steps.append({"step_s": end_s - begin_s, "cpu_s": end_cpu_s - begin_cpu_s})
        return steps


def cpu_seconds() -> float:
    """User and system seconds of this process and every process below it that is alive."""
    total = 0.0
    for process in _tree():
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


class PeakMemory:
    """with PeakMemory() as memory: ...; memory.peak_bytes

    Largest sum over this process and all below it of memory that files on disk do not back, looked
    at twice a second; weights that several processes map count once.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._by_process: dict[tuple[int, str], int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def largest_process_bytes(self, prefix: str) -> int:
        """The peak of the largest process whose command line begins with prefix."""
        return max(
            (size for (_, name), size in self._by_process.items() if name.startswith(prefix)),
            default=0,
        )

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            sizes = bytes_of([process.pid for process in _tree()])
            for pid, size in sizes.items():
                key = (pid, command_line(pid))
                self._by_process[key] = max(size, self._by_process.get(key, 0))
            self.peak_bytes = max(self.peak_bytes, sum(sizes.values()))


def command_line(pid: int) -> str:
    """As the process calls itself; empty if it is gone. Ray's workers carry their actor's name."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0]
    except OSError:
        return ""


def bytes_of(pids: list[int]) -> dict[int, int]:
    """Anonymous memory of each process, and its part of the weights that processes share."""
    mapped = {pid: shared_weights(pid) for pid in pids}
    holders = Counter(chain.from_iterable(mapped.values()))
    sizes = {}
    for pid, shared in mapped.items():
        parts = sum(size // holders[file] for file, size in shared.items())
        sizes[pid] = private_bytes(pid) + parts
    return sizes


def shared_weights(pid: int) -> dict[str, int]:
    """Bytes of each piece of workers/engines/fsdp/shared_weights.py that a process maps, by inode;
    none if it is gone."""
    pieces = {}
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return {}
    for line in lines:
        if "/memfd:hybridflow-weights-" in line:
            addresses, _, _, _, inode, *_ = line.split()
            first, last = (int(address, 16) for address in addresses.split("-"))
            pieces[inode] = last - first
    return pieces


def private_bytes(pid: int) -> int:
    """Anonymous memory of a process; 0 if it is gone. Ray's object store is left out: every
    process that maps it shows it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def _tree() -> list[psutil.Process]:
    this = psutil.Process(os.getpid())
    return [this, *this.children(recursive=True)]


def write_result(path: Path, steps: list[dict[str, Any]], peak_bytes: int) -> None:
    """Writes the result of a system's process: each measured step with step_s, cpu_s, tokens
    and phases."""
    path.write_text(json.dumps({"steps": steps, "peak_bytes": peak_bytes}))
