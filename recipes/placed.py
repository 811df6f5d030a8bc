"""From a computed mapping to settings: what `placement: auto` writes into the roles' engines. Chooses nothing itself."""

from __future__ import annotations

from dataclasses import replace

from hybridflow.mapping.mapping import Mapping
from workers.config import TrainConfig
from workers.generation.config import GenerationConfig


def train_settings(mapping: Mapping, role: str, train: TrainConfig) -> TrainConfig:
    """The role's engine settings with the mapping's layout; the engine must be one that the search was limited to."""
    layout = mapping.role(role).layout
    if layout is None:
        raise ValueError(f"mapping: role {role} has no layout; judge the mapping first, which fills it in")
    return replace(
        train,
        tp=layout.t,
        pp=layout.p,
        micro_batch_tokens=layout.micro_batch_tokens,
        activation_checkpointing=layout.recompute,
        reshard_after_forward=layout.zero == 3,
        zero_stage=max(1, layout.zero),
        offload_optimizer=layout.offload,
    )


def generation_settings(mapping: Mapping, role: str, generation: GenerationConfig) -> GenerationConfig:
    """The generation engine's settings, with as much cache as was planned for."""
    layout = mapping.role(role).generation
    if layout is None:
        raise ValueError(f"mapping: role {role} has no generation layout; it does not generate in {mapping.algorithm}")
    cache = max(call.bytes.get("kv_cache", 0.0) for call in mapping.calls if call.role == role)
    return replace(
        generation,
        tp=layout.tg,
        pp=layout.pg,
        max_num_seqs=layout.max_running,
        kv_cache_bytes=int(cache) or generation.kv_cache_bytes,
    )
