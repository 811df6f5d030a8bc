"""The sizes of a role's low-rank adapter, and which roles have the same frozen weights, as the mapper
reads them."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from hybridflow.mapping.question.adapter import AdapterSpec
from hybridflow.mapping.question.model import ModelSpec
from recipes.checks import RoleConfig
from workers.adapter_sync import sends_adapter
from workers.config import LoraConfig, ModelConfig
from workers.engines import engine_class
from workers.engines.base import Head
from workers.engines.model.loading import build_on_meta
from workers.engines.model.lora import target_layers
from workers.engines.model.peft_files import PeftFiles
from workers.role_config import ActorConfig, ReferenceConfig

ROW_PARALLEL = ("o_proj", "out_proj", "wo", "dense", "c_proj", "down_proj", "fc2", "w2")
"""Ends of the names of layers that tensor parallelism cuts by rows; it cuts others by columns."""


def with_adapter(spec: ModelSpec, settings: RoleConfig, head: Head) -> ModelSpec:
    """The role's model with its adapter, where it has one, and the name of its frozen weights."""
    assert settings.model is not None
    train = settings.train
    weights = settings.model.path, settings.model.revision, settings.model.attention
    numbers = train.engine, train.precision.value, *train.rank_order
    base = " ".join(map(str, (*weights, *numbers)))
    if not train.lora.enabled:
        # A reference is the policy's engine with the adapter left out.
        return replace(spec, base=base) if isinstance(settings, ReferenceConfig) else spec
    sent_alone = isinstance(settings, ActorConfig) and sends_adapter(settings)
    adapter = adapter_spec(settings.model, train.lora, head, sent_alone=sent_alone)
    shares = head is Head.lm or engine_class(train.engine).lends
    return replace(spec, adapter=adapter, base=base if shares else "")


def adapter_spec(
    model: ModelConfig, lora: LoraConfig, head: Head, *, sent_alone: bool
) -> AdapterSpec:
    """The adapter that `lora` asks for on this model, from its configuration alone."""
    if lora.adapter is not None:
        lora = PeftFiles.read(lora.adapter).config
    meta = build_on_meta(model, head)
    columns: list[tuple[float, float]] = []
    rows: list[tuple[float, float]] = []
    for name in target_layers(meta, lora):
        layer = meta.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        sizes = rows if name.rpartition(".")[2] in ROW_PARALLEL else columns
        sizes.append((float(layer.in_features), float(layer.out_features)))
    return AdapterSpec.of(
        lora.rank,
        columns=columns,
        rows=rows,
        num_layers=int(meta.config.get_text_config().num_hidden_layers),
        sent_alone=sent_alone,
    )
