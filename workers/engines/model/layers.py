"""Settings of the decoder layers of a model: checkpointing, activations in host memory,
torch.compile, what is made again."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel

from workers.config import TrainConfig
from workers.engines.model.checkpointing import enable_activation_checkpointing
from workers.engines.model.compiling import compile_layers
from workers.engines.model.expert_choice import check_choice
from workers.engines.model.offloading import offload_activations
from workers.engines.model.remade import remake


def check_layers(model: PretrainedConfig, config: TrainConfig) -> None:
    """ValueError for settings of the layers that do not go together, or not with `model`, and for a
    model whose routers can't choose their experts."""
    check_choice(model)
    if config.compile and getattr(model.get_text_config(), "num_experts_per_tok", None):
        raise ValueError(
            f"train.compile is true, but {model.model_type} is a mixture of experts, whose tokens go "
            "where the data says; set compile=false"
        )
    if config.compile and config.tp > 1:
        raise ValueError(
            f"train.compile is true with tp={config.tp}: compiled layers were never compared with "
            "uncompiled ones under tensor parallelism; set compile=false, or tp=1"
        )
    if config.selective_checkpointing and not config.activation_checkpointing:
        raise ValueError(
            "train.selective_checkpointing is true, but activation_checkpointing is false; set it to "
            "true too, or selective_checkpointing to false"
        )
    if config.selective_checkpointing and config.compile:
        raise ValueError(
            "train.selective_checkpointing is true with compile=true: compiled layers choose by "
            "themselves what they compute again; set one of them to false"
        )


def prepare_layers(model: PreTrainedModel, config: TrainConfig) -> None:
    """Once, before FSDP wraps the layers; their parameters keep their names."""
    if config.activation_checkpointing:
        enable_activation_checkpointing(model, selective=config.selective_checkpointing)
    if config.offload_activations:
        offload_activations(model)
    if config.compile:
        compile_layers(model)
    if not (config.activation_checkpointing or config.offload_activations or config.compile):
        remake(model)
