"""Between layouts of the mapper and settings of the engines, both ways. Chooses nothing itself."""

from __future__ import annotations

from dataclasses import replace

from hybridflow.dataflow import CallKind
from hybridflow.mapping.answer.device_mapping import DeviceMapping
from hybridflow.mapping.question.layouts import GenerationLayout, ModelLayout
from hybridflow.mapping.question.space import SearchSpace
from workers.config import Precision, TrainConfig
from workers.engines import engine_class
from workers.generation.config import GenerationConfig
from workers.weight_sync import BUCKET_BYTES

GENERATING = ("generation_weights", "kv_cache", "activations", "logits")
"""What a generation engine counts as its own."""
ENGINE_BYTES = 1e9
"""What vLLM takes besides."""


def train_settings(mapping: DeviceMapping, role: str, train: TrainConfig) -> TrainConfig:
    """The role's engine settings with the mapping's layout; the engine must be one that the search was
    limited to."""
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


def generation_settings(
    mapping: DeviceMapping, role: str, generation: GenerationConfig, memory_bytes: float | None = None
) -> GenerationConfig:
    """The generation engine's settings, with as much cache as was planned for; memory_bytes: of a GPU."""
    layout = mapping.role(role).generation
    if layout is None:
        raise ValueError(
            f"mapping: role {role} has no generation layout; it does not generate in {mapping.algorithm}"
        )
    calls = [
        call.bytes for call in mapping.calls if call.role == role and call.kind == CallKind.generation.value
    ]
    needs = {name: max(parts.get(name, 0.0) for parts in calls) for name in GENERATING}
    fraction = generation.gpu_memory_fraction
    if memory_bytes is not None:
        fraction = min(0.95, (sum(needs.values()) + ENGINE_BYTES) / memory_bytes)
    return replace(
        generation,
        tp=layout.tg,
        pp=layout.pg,
        max_num_seqs=layout.max_running,
        kv_cache_bytes=max(int(needs["kv_cache"]), generation.kv_cache_bytes),
        gpu_memory_fraction=fraction,
        release_during_training=mapping.role(role).layout is not None
        and _must_release(mapping, role, sum(needs.values())),
    )


def _must_release(mapping: DeviceMapping, role: str, generating: float) -> bool:
    """Whether another call of the pool has no room beside what generation holds."""
    pool = mapping.role(role).pool
    others = [call for call in mapping.calls if call.pool == pool and call.kind != CallKind.generation.value]
    return any(call.total_bytes + generating > mapping.capacity_bytes[pool] for call in others)


def train_layout(train: TrainConfig, num_devices: int, *, trained: bool) -> ModelLayout:
    """What the engine settings come to on `num_devices`; recipes/checks.py says whether they fit."""
    zero = engine_class(train.engine).zero_stage(train)
    return ModelLayout(
        p=train.pp,
        t=train.tp,
        d=num_devices // (train.pp * train.tp),
        zero=zero if trained or zero == 3 else 0,
        recompute=train.activation_checkpointing and trained,
        micro_batch_tokens=train.micro_batch_tokens,
        offload=train.offload_optimizer and trained,
    )


def generation_layout(generation: GenerationConfig, num_devices: int, rows_in_cache: int) -> GenerationLayout:
    """`rows_in_cache`: sequences that the key/value cache holds."""
    return GenerationLayout(
        pg=generation.pp,
        tg=generation.tp,
        replicas=num_devices // (generation.pp * generation.tp),
        max_running=min(generation.max_num_seqs, rows_in_cache),
        kept=not generation.release_during_training,
    )


def engine_space(precision: Precision) -> SearchSpace:
    """Bytes of the project's engines: float32 master weights, gradients and moments; the generation engine
    keeps its own weights."""
    compute = 4.0 if precision is Precision.fp32 else 2.0
    return SearchSpace(
        parameter_bytes=compute,
        gradient_bytes=4.0,
        optimizer_bytes=12.0 if compute == 2.0 else 8.0,
        activation_bytes=compute,
        shared_generation_weights=False,
        old_log_prob_pass=True,
        bucket_bytes=float(BUCKET_BYTES),
    )
