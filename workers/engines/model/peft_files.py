"""Adapters as PEFT's directories: adapter_config.json and adapter_model.safetensors, read and
written without PEFT.

Left out, and refused: every other kind of adapter that PEFT has (DoRA, biases, layers that are saved
whole other than a score head, ranks and alphas that differ between layers, adapters on embeddings
and parameters, ...), and initializations that leave another base behind.
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
SCORE_WEIGHT = "score.weight"
"""The head of a critic or reward model, the one layer that may be saved whole."""
NEUTRAL: tuple[Any, ...] = (None, False, "none", [], {})
"""Values under which a setting of PEFT changes nothing."""
KNOWN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "modules_to_save": (*NEUTRAL, ["score"], ["classifier", "score"]),
    "init_lora_weights": (True, *NEUTRAL, "gaussian", "eva", "orthogonal"),
}
"""Settings of PEFT -> the values that mean what is trained here. The other ways to begin (PiSSA,
OLoRA, CorDA, LoftQ) take something away from the base, which the files do not hold."""
HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "r",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
"""Settings of PEFT that are read here, or that say how the files came about and nothing about what
they mean."""


@dataclass(frozen=True, kw_only=True)
class PeftFiles:
    """An adapter's directory: PeftFiles.read("checkpoints/step-00000100/huggingface")."""

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
        rank = int(settings["r"])
        return cls(
            config=LoraConfig(
                rank=rank,
                alpha=float(settings["lora_alpha"]),
                rslora=bool(settings.get("use_rslora")),
                target_modules=_layers(directory, tensors, rank),
                adapter=directory,
            ),
            base=str(settings.get("base_model_name_or_path") or ""),
            revision=settings.get("revision"),
            tensors=tensors,
        )


def is_adapter(path: str) -> bool:
    """Whether `path` is the directory of an adapter."""
    return (Path(path) / CONFIG).is_file()


def adapter_rank(config: LoraConfig) -> int:
    """The rank of the adapter that the settings ask for."""
    return config.rank if config.adapter is None else int(read_settings(config.adapter)["r"])


def read_settings(directory: str) -> dict[str, Any]:
    """adapter_config.json, after a look at what it asks for."""
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise ValueError(
            f"lora.adapter is {directory!r}, which has no {CONFIG}; give a PEFT directory, of a run "
            "OUTPUT_DIR/checkpoints/step-.../huggingface"
        )
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
        rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"lora.adapter is {directory!r}, whose {CONFIG} is no adapter's: r and lora_alpha must "
            f"be numbers ({type(error).__name__}: {error}); give a PEFT directory"
        ) from None
    if rank < 1 or not alpha > 0:
        raise ValueError(
            f"lora.adapter is {directory!r}, whose r is {rank} and lora_alpha {alpha}; both must be "
            "more than 0"
        )
    for name, value in settings.items():
        values = KNOWN.get(name, NEUTRAL)
        if name not in HARMLESS and value not in values:
            raise ValueError(
                f"lora.adapter is {directory!r}, whose {name} is {value!r}, which is not trained here; "
                "merge it with PEFT and use the merged model"
            )
    return settings


def _layers(directory: str, tensors: Mapping[str, Tensor], rank: int) -> list[str]:
    """Names of the layers whose matrices the files have: two of each, of rank `rank`, and nothing
    else but a score head."""
    layers = []
    for name, tensor in tensors.items():
        if name == SCORE_WEIGHT:
            continue
        layer, _, matrix = name.rpartition(".")
        if not name.endswith(MATRICES) or tensor.ndim != 2:
            raise ValueError(
                f"lora.adapter is {directory!r}, whose {WEIGHTS} has {name}, which is no matrix of a "
                "linear layer's adapter; merge it with PEFT and use the merged model"
            )
        stored = tensor.shape[0 if name.endswith(MATRICES[0]) else 1]
        other = {"lora_A": "lora_B", "lora_B": "lora_A"}[matrix]
        if stored != rank or f"{layer}.{other}" not in tensors:
            raise ValueError(
                f"lora.adapter is {directory!r}, whose {name} has shape {tuple(tensor.shape)}: it "
                f"must come with {layer}.{other}, both of rank r={rank}; use the whole directory as "
                "it was saved"
            )
        if name.endswith(MATRICES[0]):
            layers.append(layer)
    if not layers:
        raise ValueError(
            f"lora.adapter is {directory!r}, whose {WEIGHTS} has no LoRA matrices; give the "
            "directory of an adapter"
        )
    return layers


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
    base = model.path  # whole: peft looks for it from wherever it runs
    if Path(base).is_dir():
        base = str(Path(base).absolute())
    alpha = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
    settings = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
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
