"""read_config(): a model's config.json, read in one way for everybody who asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from workers.config import ModelConfig
from workers.hub import check_reachable

PLACES = ("huggingface", "*/huggingface", "checkpoints/*/huggingface", "snapshots/*", "*")
"""Where a model stands below a directory that is none."""
ADAPTER = "adapter_config.json"
MISFITS = (StrictDataclassError, AttributeError, LookupError, TypeError, ArithmeticError)
"""Errors that transformers' code raises for values that its authors did not think of ("dtype": "bf16", a kind
of rotary embedding that does not exist, fewer layer_types than layers)."""


def read_config(model: ModelConfig) -> PretrainedConfig:
    """The published configuration, that of a vision tower included. An OSError where there is none, a
    ValueError for one that transformers can't read."""
    check_reachable(model.path, model.revision)
    try:
        config: Any = AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except MISFITS as error:
        raise ValueError(in_a_line(error)) from error
    assert isinstance(config, PretrainedConfig)
    return config


def model_below(path: str) -> Path | None:
    """The newest model within the directory of a run, of a step, of its checkpoints, or of the hub's
    cache; None where there is none."""
    for pattern in PLACES:
        place = Path(path)
        found = [*place.glob(f"{pattern}/config.json"), *place.glob(f"{pattern}/{ADAPTER}")]
        if found:
            return max(found).parent
    return None


def in_a_line(error: BaseException) -> str:
    """An error and its cause."""
    cause = error.__cause__
    said = error if cause is None else cause
    text = " ".join(str(said).split())
    return text if isinstance(said, ValueError) else f"{type(said).__name__}: {text}"
