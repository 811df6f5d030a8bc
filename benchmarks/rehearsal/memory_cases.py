"""The cases of memory.py: models of full width on worlds of GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3MoeConfig


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on a world; one data replica's rows are `rows` of prompt and response."""

    model: str
    family: type[PretrainedConfig]
    devices: int
    engine: str
    settings: dict[str, Any]
    prompt: int = 512
    response: int = 1536
    rows: int = 2
    rows_at_once: int = 1
    """Rows of a micro-batch."""


CASES = {
    "7B on 8": Case(model="qwen2.5-7b", family=Qwen2Config, devices=8, engine="fsdp", settings={}),
    "7B on 8, ZeRO-3, recomputed": Case(
        model="qwen2.5-7b",
        family=Qwen2Config,
        devices=8,
        engine="fsdp",
        settings={"reshard_after_forward": True, "activation_checkpointing": True},
        rows_at_once=2,
        rows=4,
    ),
    "7B on 8, selective": Case(
        model="qwen2.5-7b",
        family=Qwen2Config,
        devices=8,
        engine="fsdp",
        settings={"activation_checkpointing": True, "selective_checkpointing": True},
        rows_at_once=4,
        rows=4,
    ),
    "7B on 8, activations on host": Case(
        model="qwen2.5-7b",
        family=Qwen2Config,
        devices=8,
        engine="fsdp",
        settings={"offload_activations": True},
        rows_at_once=4,
        rows=4,
    ),
    "70B on 64": Case(
        model="llama3-70b",
        family=LlamaConfig,
        devices=64,
        engine="threed",
        settings={"tp": 8, "pp": 8},
    ),
    "70B on 64, fsdp": Case(
        model="llama3-70b",
        family=LlamaConfig,
        devices=64,
        engine="fsdp",
        settings={"reshard_after_forward": True, "activation_checkpointing": True},
    ),
    "30B-A3B on 16": Case(
        model="qwen3-30b-a3b",
        family=Qwen3MoeConfig,
        devices=16,
        engine="fsdp",
        settings={"reshard_after_forward": True, "activation_checkpointing": True},
    ),
}
LAYERS = {
    "7B on 8": 10,
    "7B on 8, ZeRO-3, recomputed": 6,
    "7B on 8, selective": 10,
    "7B on 8, activations on host": 10,
    "70B on 64": 16,
    "70B on 64, fsdp": 3,
    "30B-A3B on 16": 4,
}
"""The layers of each model that are there: an operation without data takes 0.2 ms."""
