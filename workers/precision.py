"""precision=auto: bf16 where the device computes it natively, fp32 elsewhere.

A run decides once, for all of its machines, before its roles are built (recipes/session.py). A
worker that is built by itself decides for the machine that it is on.
"""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from workers.config import Precision

ConfigT = TypeVar("ConfigT")
CPU_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""A CPU with one of them multiplies bfloat16 in hardware (the last one is Arm's)."""
CUDA_CAPABILITY = (8, 0)
"""The first generation of GPUs with bfloat16."""
CPU_INFO = Path("/proc/cpuinfo")


def computes_bf16(device: str) -> bool:
    """Whether `device` of this machine, "cpu" or "cuda:<index>", computes bfloat16 natively; a
    device that this machine lacks is taken to."""
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            return True
        return torch.cuda.get_device_capability(device) >= CUDA_CAPABILITY
    return CPU_INFO.exists() and cpu_computes_bf16(CPU_INFO.read_text())


def cpu_computes_bf16(cpu_info: str) -> bool:
    """The same of a CPU, by the text that Linux has about it."""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", cpu_info, re.MULTILINE)
    return flags is not None and not CPU_FLAGS.isdisjoint(flags[1].split())


def native_precision(computes: bool) -> Precision:
    """What auto stands for where the devices compute bfloat16 natively, or do not."""
    return Precision.bf16 if computes else Precision.fp32


def automatic(config: Any, prefix: str = "") -> list[str]:
    """Names of the settings in the tree `config` that are Precision.auto: actor.train.precision."""
    names = []
    for entry in fields(config):
        value = vars(config)[entry.name]
        if value is Precision.auto:
            names.append(prefix + entry.name)
        elif is_dataclass(value):
            names += automatic(value, f"{prefix}{entry.name}.")
    return names


def with_precision(config: ConfigT, names: list[str], precision: Precision) -> ConfigT:
    """The same settings with `precision` for those of these names."""
    changes: dict[str, Any] = {}
    for name in names:
        first, _, rest = name.partition(".")
        if not rest:
            changes[first] = precision
            continue
        value = changes.get(first, vars(config)[first])
        changes[first] = with_precision(value, [rest], precision)
    return replace(config, **changes) if changes else config  # type: ignore[type-var]


def precision_of(config: Any, name: str) -> Precision:
    """The setting `name` of the tree `config`."""
    first, _, rest = name.partition(".")
    value = vars(config)[first]
    if rest:
        return precision_of(value, rest)
    assert isinstance(value, Precision)
    return value


def with_native_precision(config: ConfigT, device: str) -> ConfigT:
    """The same settings, auto replaced by what `device` of this machine computes natively."""
    if not is_dataclass(config):
        return config
    return with_precision(config, automatic(config), native_precision(computes_bf16(device)))


def explain(precision: Precision, device: str) -> str:
    """One line for the log: what auto came to, and why."""
    if device.startswith("cuda"):
        what = "these GPUs compute" if precision is Precision.bf16 else "these GPUs lack native"
    else:
        what = "these CPUs compute" if precision is Precision.bf16 else "these CPUs lack native"
    reason = f"{what} bfloat16"
    if precision is Precision.bf16:
        reason += " natively"
    return f"precision=auto is {precision.value}: {reason}"
