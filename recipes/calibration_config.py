"""The settings of recipes.calibrate, and the models that it measures."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from workers.config import Precision

SIZES = {"3M": (4, 192, 512, 4096), "11M": (6, 320, 896, 6144), "32M": (8, 512, 1408, 8192)}
"""name -> layers, hidden size, inner size, vocabulary of the models that are measured."""


@dataclass(kw_only=True)
class CalibrateConfig:
    """Every setting of `python -m recipes.calibrate`."""

    output: str = "calibration"
    """Directory for calibration.json, cluster.json and the measurements."""
    num_processes: int = 2
    """Processes that work at the same time: the devices of the pools that will be planned for."""
    precision: Precision = Precision.auto
    engine: str = "fsdp"
    generation_engine: str = "vllm"
    memory_gb: float = 8.0
    """Memory of a process to plan with."""
    repeats: int = 3
    """Each time is the fastest of this many repetitions, after another that warms up."""
    models: list[str] = field(default_factory=lambda: list(SIZES))
    """Which of SIZES; at least two, or overheads cannot be told from work."""
    rows: list[int] = field(default_factory=lambda: [8, 32])
    """Rows of forward passes and training steps."""
    generation_rows: list[int] = field(default_factory=lambda: [8, 16, 32])
    prompt: int = 8
    response: int = 64
    whole_steps: bool = True
    """End with some steps of recipes.ppo, in a pool of one rank and in a pool of all."""

    @property
    def threads_per_process(self) -> int:
        return max(1, (os.cpu_count() or 1) // self.num_processes)


def check(config: CalibrateConfig) -> None:
    """ValueErrors for values that nothing can be measured with; engines are checked by
    recipes.calibrate."""
    counts = {
        "num_processes": [config.num_processes],
        "repeats": [config.repeats],
        "prompt": [config.prompt],
        "response": [config.response],
        "rows": config.rows,
        "generation_rows": config.generation_rows,
    }
    for name, values in counts.items():
        if not values or min(values) < 1:
            shown = values if name.endswith("rows") else values[0]
            raise ValueError(f"{name} is {shown}; use at least 1")
    if config.response < 2:
        raise ValueError(
            f"response is {config.response}; use at least 2, half of it is measured too"
        )
    if config.memory_gb <= 0:
        raise ValueError(f"memory_gb is {config.memory_gb}; it must be positive")
    unknown = sorted(set(config.models) - set(SIZES))
    if unknown:
        raise ValueError(f"models: unknown {unknown}; known: {', '.join(SIZES)}")
    if len(set(config.models)) < 2:
        raise ValueError(f"models is {config.models}; give at least two of {', '.join(SIZES)}")
