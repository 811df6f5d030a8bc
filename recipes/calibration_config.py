"""The settings of recipes.calibrate, and the models that it measures."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

from workers.config import Precision

SIZES = {
    "3M": (4, 192, 512, 4096),
    "11M": (6, 320, 896, 6144),
    "32M": (8, 512, 1408, 8192),
    "400M": (24, 1024, 4096, 32768),
    "1B": (16, 2048, 8192, 32768),
    "2B": (20, 2560, 8192, 32768),
}
"""name -> layers, hidden size, inner size, vocabulary of the models that are measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Amounts:
    """How much work is measured: enough for the device to be busy, and not its launches."""

    models: tuple[str, ...]
    rows: tuple[int, ...]
    generation_rows: tuple[int, ...]
    prompt: int
    response: int
    product: tuple[int, int, int]
    """Sizes m, k and n of the matrix product."""
    copied: int
    """float32 numbers of the copy."""


ON_CPUS = Amounts(
    models=("3M", "11M", "32M"),
    rows=(8, 32),
    generation_rows=(8, 16, 32),
    prompt=8,
    response=64,
    product=(2048, 1024, 1024),
    copied=32 << 20,
)
ON_GPUS = Amounts(
    models=("400M", "1B", "2B"),
    rows=(4, 16),
    generation_rows=(16, 64, 128),
    prompt=64,
    response=512,
    product=(8192, 8192, 8192),
    copied=256 << 20,
)
CPU_PROCESSES, CPU_MEMORY_GB = 2, 8.0


@dataclass(kw_only=True)
class CalibrateConfig:
    """Every setting of `python -m recipes.calibrate`."""

    output: str = "calibration"
    """Directory for calibration.json, cluster.json and the measurements."""
    num_processes: int = 0
    """Processes that work at the same time: the devices of the pools that will be planned for.
    0: as many as there are GPUs, or 2 on CPUs."""
    precision: Precision = Precision.auto
    engine: str = "fsdp"
    generation_engine: str = "vllm"
    memory_gb: float = 0.0
    """Memory of a process to plan with. 0: the GPU's, or 8 on CPUs."""
    repeats: int = 3
    """Each time is the fastest of this many repetitions, after another that warms up."""
    models: list[str] = field(default_factory=list)
    """Which of SIZES; at least two, or overheads cannot be told from work. These and the amounts
    below are by device where they are left out: 400M, 1B and 2B on GPUs, 3M, 11M and 32M on CPUs."""
    rows: list[int] = field(default_factory=list)
    """Rows of forward passes and training steps: 4 and 16 on GPUs, 8 and 32 on CPUs."""
    generation_rows: list[int] = field(default_factory=list)
    """16, 64 and 128 on GPUs, 8, 16 and 32 on CPUs."""
    prompt: int = 0
    """Tokens: 64 on GPUs, 8 on CPUs."""
    response: int = 0
    """Tokens: 512 on GPUs, 64 on CPUs."""
    whole_steps: bool = True
    """End with some steps of recipes.ppo, in a pool of one rank and in a pool of all."""

    @property
    def threads_per_process(self) -> int:
        return max(1, (os.cpu_count() or 1) // self.num_processes)


def for_devices(config: CalibrateConfig, num_gpus: int) -> CalibrateConfig:
    """The settings with those that were left out by device; `num_gpus` 0: CPUs. memory_gb stays 0
    on GPUs, whose processes ask them."""
    amounts = ON_GPUS if num_gpus else ON_CPUS
    return replace(
        config,
        num_processes=config.num_processes or num_gpus or CPU_PROCESSES,
        memory_gb=config.memory_gb or (0.0 if num_gpus else CPU_MEMORY_GB),
        models=config.models or list(amounts.models),
        rows=config.rows or list(amounts.rows),
        generation_rows=config.generation_rows or list(amounts.generation_rows),
        prompt=config.prompt or amounts.prompt,
        response=config.response or amounts.response,
    )


def check(config: CalibrateConfig, num_gpus: int) -> None:
    """ValueErrors for values that nothing can be measured with; engines are checked by
    recipes.calibrate, after for_devices."""
    if 0 < num_gpus < config.num_processes:
        raise ValueError(
            f"num_processes is {config.num_processes}, but there are {num_gpus} GPUs; use at most that"
        )
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
    if config.memory_gb < 0:
        raise ValueError(
            f"memory_gb is {config.memory_gb}; it must be positive, or 0 for the device's"
        )
    unknown = sorted(set(config.models) - set(SIZES))
    if unknown:
        raise ValueError(f"models: unknown {unknown}; known: {', '.join(SIZES)}")
    if len(set(config.models)) < 2:
        raise ValueError(f"models is {config.models}; give at least two of {', '.join(SIZES)}")
