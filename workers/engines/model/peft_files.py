"""Adapters as PEFT's directories: adapter_config.json and adapter_model.safetensors, read and
written without PEFT.

Left out, and refused: DoRA, biases, layers that are saved whole other than a score head, ranks and
alphas that differ between layers, adapters on parameters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from workers.config import LoraConfig, ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Beginning of the names in the files."""
MATRICES = (".lora_A", ".lora_B")
UNREAD: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "modules_to_save": (None, [], ["score"], ["classifier", "score"]),
}
"""Settings of PEFT -> the values under which an adapter is the one that is trained here."""


@dataclass(frozen=True, kw_only=True)
class PeftFiles:
    """An adapter's directory: PeftFiles.read("outputs/run/final")."""

    config: LoraConfig
    """Its target_modules are the names of the layers that the files have."""
    base: str
    """The model that it was trained on, as it was named then."""
    revision: str | None
    tensors: Mapping[str, Tensor]
    """By the names that the model has for them: NAME.lora_A, NAME.lora_B, score.weight."""

    @classmethod
    def read(cls, directory: str) -> PeftFiles:
        """A ValueError for a directory that is none, and for kinds of adapters that are not
        trained here."""
        settings = read_settings(directory)
        try:
            stored = load_file(Path(directory) / WEIGHTS)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"lora.adapter is {directory!r}, whose {WEIGHTS} can't be read; {error}"
            ) from error
        tensors = {own_name(name): tensor for name, tensor in stored.items()}
        layers = []
        for name in tensors:
            if name.endswith(MATRICES[0]):
                layers.append(name.removesuffix(MATRICES[0]))
        if not layers:
            raise ValueError(
                f"lora.adapter is {directory!r}, whose {WEIGHTS} has no LoRA matrices; give the "
                "directory of an adapter"
            )
        return cls(
            config=LoraConfig(
                rank=int(settings["r"]),
                alpha=float(settings["lora_alpha"]),
                rslora=bool(settings.get("use_rslora")),
                target_modules=layers,
                adapter=directory,
            ),
            base=str(settings.get("base_model_name_or_path") or ""),
            revision=settings.get("revision"),
            tensors=tensors,
        )


def adapter_rank(config: LoraConfig) -> int:
    """The rank of the adapter that the settings ask for."""
    return config.rank if config.adapter is None else int(read_settings(config.adapter)["r"])


def read_settings(directory: str) -> dict[str, Any]:
    """adapter_config.json, after a look at what it asks for."""
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise ValueError(
            f"lora.adapter is {directory!r}, which has no {CONFIG}; give a PEFT directory"
        )
    settings: dict[str, Any] = json.loads(path.read_text())
    for name, values in UNREAD.items():
        if name in settings and settings[name] not in values:
            raise ValueError(
                f"lora.adapter is {directory!r}, whose {name} is {settings[name]!r}; only "
                f"{values[0]!r} is known here: merge it with PEFT and use the merged model"
            )
    return settings


def write_adapter(
    directory: Path,
    tensors: Mapping[str, Tensor],
    config: LoraConfig,
    layers: Sequence[str],
    model: ModelConfig,
    *,
    task: str,
) -> None:
    """Writes an adapter as PEFT does. `tensors`: by the model's names, a score head among them
    where `task` is SEQ_CLS."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {peft_name(name): tensor.contiguous() for name, tensor in tensors.items()},
        directory / WEIGHTS,
        metadata={"format": "pt"},
    )
    heads = sorted({name.rpartition(".")[0] for name in tensors if not name.endswith(MATRICES)})
    alpha = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
    settings = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": model.path,
        "revision": model.revision,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": config.rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": list(layers),
        "modules_to_save": heads or None,
    }
    (directory / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def own_name(name: str) -> str:
    """base_model.model.NAME.lora_A.weight -> NAME.lora_A; a head's name without the prefix."""
    name = name.removeprefix(PREFIX)
    matrix = name.removesuffix(".weight")
    return matrix if matrix.endswith(MATRICES) else name


def peft_name(name: str) -> str:
    """The inverse of own_name."""
    return f"{PREFIX}{name}.weight" if name.endswith(MATRICES) else f"{PREFIX}{name}"
