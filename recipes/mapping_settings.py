"""The translator between a run's settings and the mapper, both ways. Chooses nothing.

    setting = setting_of(inputs)                       # the run's question
    mapping = configured_mapping(inputs, pools, sizes) # the run's pools and layouts, as they are set
    config = apply_mapping(inputs, mapping)            # a mapping's pools and layouts as the run's settings

Reads model configurations and prompt lengths, no weights; the cluster need not exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

from controllers.data import PromptDataset
from hybridflow.dataflow import CallKind, Dataflow
from hybridflow.devices import preloaded_allocator
from hybridflow.mapping.answer.device_mapping import DeviceMapping, Pool, RolePlan
from hybridflow.mapping.question.layouts import GenerationLayout, ModelLayout
from hybridflow.mapping.question.model import ModelSpec
from hybridflow.mapping.question.space import SearchSpace
from hybridflow.mapping.question.workload import Asynchrony, Lengths
from hybridflow.mapping.search.setting import GENERATION, Setting
from hybridflow.mapping.simulate.footprint import kv_bytes_per_token
from recipes.checks import RoleConfig
from recipes.config import Device, PlacementMode, PoolConfig, RunConfig
from recipes.engine_facts import budget_of, limited_space, zero_stage_of
from recipes.mapping_adapters import with_adapter
from recipes.mapping_cluster import cluster_of, node_resources
from recipes.mapping_question import Question, precision_space, to_setting
from recipes.roles import role_kind, role_names
from workers.config import ContextExchange, Precision, TrainConfig, VisionTraining
from workers.engines.base import Head
from workers.engines.model.context_parallel import check_context_parallel
from workers.engines.model.loading import build_on_meta, model_config, standard_sizes
from workers.engines.model.log_probs import CHUNK_ELEMENTS
from workers.engines.model.split_plan import fitting_sizes, heads_of
from workers.engines.model.tower import tower_parameters
from workers.engines.shared.micro_batches import chosen_tokens
from workers.generation import generation_engine_class
from workers.generation.cache import DEFAULT_CACHE_BYTES
from workers.generation.config import GenerationConfig, InFlight
from workers.images import sees_images
from workers.role_config import ActorConfig, RewardConfig
from workers.weight_sync import BUCKET_BYTES

GENERATION_PARTS = ("generation_weights", "kv_cache", "activations", "logits")
"""The parts of a generation call's bytes that the generation engine allocates."""
ENGINE_BYTES = 1e9
"""Bytes that vLLM takes besides."""


@dataclass(frozen=True, kw_only=True)
class MapperInputs:
    """Everything of a run that the mapper's question depends on: its traced step, its roles'
    settings, its prompts."""

    config: RunConfig
    dataflow: Dataflow
    roles: Mapping[str, RoleConfig]
    """Role -> settings, in the algorithm's order; `generation` with the actor's where it has a
    pool of its own."""
    prompts: PromptDataset


def with_split_generation(inputs: MapperInputs) -> MapperInputs:
    """The run with generation as a role of its own."""
    return replace(inputs, roles={**inputs.roles, GENERATION: inputs.roles["actor"]})


def setting_of(inputs: MapperInputs) -> Setting:
    """The setting that every prediction for this run is computed from."""
    return to_setting(question_of(inputs))


def question_of(inputs: MapperInputs) -> Question:
    """The run's question. Prompt lengths are those of the data; the critic's epochs are taken
    to be the actor's."""
    config = inputs.config
    response = Lengths.fixed(config.actor.generation.sampling.max_response_tokens)
    if config.plan.response:
        response = Lengths.parse(config.plan.response)
    return Question(
        dataflow=inputs.dataflow,
        models={role: model_spec(role, settings) for role, settings in inputs.roles.items()},
        cluster=cluster_of(config),
        calibration=config.plan.calibration,
        batch_size=config.data.batch_size,
        samples_per_prompt=config.algorithm.samples_per_prompt,
        prompt=Lengths.observed(inputs.prompts.lengths.tolist()),
        response=response,
        num_mini_batches=config.algorithm.num_mini_batches,
        num_epochs=config.actor.num_epochs,
        split_generation=GENERATION in inputs.roles,
        space=space_of(inputs),
        asynchrony=asynchrony_of(config),
    )


def asynchrony_of(config: RunConfig) -> Asynchrony | None:
    """How far the run's responses are drawn ahead; None where every step draws its own."""
    settings = config.asynchrony
    if settings.staleness == 0:
        return None
    return Asynchrony(
        staleness=settings.staleness,
        look_ahead=settings.look_ahead,
        drains=settings.drains,
        rereads=settings.in_flight is InFlight.recompute,
    )


def model_spec(role: str, settings: RoleConfig) -> ModelSpec | None:
    """The sizes of a role's model, from its configuration; None for a Python function."""
    if isinstance(settings, RewardConfig) and settings.model is None:
        return None
    assert settings.model is not None
    head = role_kind(role).head
    content = standard_sizes(model_config(settings.model, head))
    content.setdefault("num_attention_heads", 1)  # state spaces have none
    spec = ModelSpec.from_hf(content, name=Path(settings.model.path).name)
    if sees_images(settings.model):
        spec = replace(
            spec,
            tower_parameters=tower_parameters(build_on_meta(settings.model, head)),
            tower_trains=settings.train.vision is VisionTraining.trained,
        )
    if head is not Head.lm:
        spec = spec.with_scalar_head()
    return with_adapter(spec, settings, head)


def space_of(inputs: MapperInputs) -> SearchSpace:
    """The bytes that the run's engines need per parameter, and the layouts that they have;
    engines and precisions are the actor's."""
    actor = next(kind for kind in inputs.roles.values() if isinstance(kind, ActorConfig))
    recomputes = False
    for call in inputs.dataflow.calls:
        if call.role == "actor" and "log_probs" in call.writes:
            recomputes = True
    engine = generation_engine_class(actor.generation.engine)
    space = replace(
        engine_space(actor.train.precision),
        cache_of_rows=not engine.releases,
        replicas=actor.train.fsdp_replicas,
        compiled=actor.train.compile,
        share_prompts=actor.train.packing and actor.train.share_prompts,
        remade=inputs.config.device is Device.cpu,
        selective=actor.train.selective_checkpointing,
        offload_activations=actor.train.offload_activations,
        old_log_prob_pass=not recomputes,
        max_num_seqs=actor.generation.max_num_seqs,
        max_num_batched_tokens=actor.generation.max_num_batched_tokens,
        max_generation_pipeline=1,
        tensor_sizes=_tensor_sizes(inputs),
        context_sizes=_context_sizes(inputs),
        generation_tensor_sizes=_generation_tensor_sizes(actor),
    )
    if inputs.config.device is Device.cpu:
        num_nodes = sum(group.num_nodes for group in cluster_of(inputs.config).groups)
        space = replace(
            space,
            reduction_copies=True,
            shared_shards=num_nodes == 1,
            logits_at_once=float(CHUNK_ELEMENTS),
            logits_in_parts=True,
            generation_library=engine.library != "torch",
            preloaded_allocator=bool(preloaded_allocator()),
            repacked_generation=engine.releases,
        )
    return limited_space(actor.train.engine, space)


def _tensor_sizes(inputs: MapperInputs) -> tuple[int, ...]:
    """Sizes of tensor parallelism that every model of the run can be split into, if any cannot be
    split at all; empty: all that divide its heads."""
    for role, settings in inputs.roles.items():
        if settings.model is not None:
            found = model_config(settings.model, role_kind(role).head)
            if fitting_sizes(found, divides_experts=True) == [1]:
                return (1,)
    return ()


def _context_sizes(inputs: MapperInputs) -> tuple[int, ...]:
    """Sizes of context parallelism that are tried: 1 where a model or its settings rule it out."""
    for role, settings in inputs.roles.items():
        if settings.model is not None:
            train = replace(settings.train, cp=2, tp=1, cp_exchange=ContextExchange.auto)
            try:
                check_context_parallel(model_config(settings.model, role_kind(role).head), train)
            except ValueError:
                return (1,)
    return SearchSpace().context_sizes


def _generation_tensor_sizes(actor: ActorConfig) -> tuple[int, ...]:
    """Those of the generation engine's own rules, among the divisors of the heads."""
    found = model_config(actor.model, Head.lm)
    engine = generation_engine_class(actor.generation.engine)
    heads = heads_of(found).queries
    sizes = []
    for size in range(1, heads + 1):
        if heads % size == 0:
            try:
                generation = replace(actor.generation, tp=size)
                engine.check(generation)
                engine.check_model(found, generation)
            except ValueError:
                continue
            sizes.append(size)
    return tuple(sizes) or (1,)


def engine_space(precision: Precision) -> SearchSpace:
    """The bytes that the project's engines need per parameter; the generation engine has its
    own weights."""
    return replace(
        precision_space(precision),
        shared_generation_weights=False,
        old_log_prob_pass=True,
        bucket_bytes=float(BUCKET_BYTES),
    )


def configured_mapping(
    inputs: MapperInputs, pool_of: Mapping[str, str], sizes: Mapping[str, int]
) -> DeviceMapping:
    """The run's pools (role -> pool, pool -> devices) and layouts as they are set, without
    predictions. Pools take the cluster's node groups in order, those of their kind where they
    ask for one."""
    setting = setting_of(inputs)
    plans = []
    for role in setting.roles:
        plans.append(_configured_role(inputs, setting, role, pool_of[role], sizes))
    return DeviceMapping(
        algorithm=inputs.dataflow.algorithm,
        cluster="",
        pools=tuple(_configured_pools(inputs.config, setting, pool_of, sizes)),
        roles=tuple(plans),
        capacity_bytes={},
    )


def _configured_pools(
    config: RunConfig, setting: Setting, pool_of: Mapping[str, str], sizes: Mapping[str, int]
) -> list[Pool]:
    resources: Mapping[str, str] = {}
    if any(pool.node_resource for pool in config.pools.values()):
        resources = node_resources(config, setting.cluster)
    free = [nodes.num_devices for nodes in setting.cluster.groups]
    pools = []
    for name, size in sizes.items():
        roles = tuple(role for role in setting.roles if pool_of[role] == name)
        if not roles:  # a pool of Python functions alone takes no device of the plan
            continue
        resource = config.pools[name].node_resource if name in config.pools else ""
        group = 0
        for number, nodes in enumerate(setting.cluster.groups):
            if free[number] >= size and resource in ("", resources.get(nodes.kind.name, "")):
                group = number
                break
        free[group] -= size
        pools.append(Pool(name=name, group=group, num_devices=size, roles=roles))
    return pools


def _configured_role(
    inputs: MapperInputs, setting: Setting, role: str, pool: str, sizes: Mapping[str, int]
) -> RolePlan:
    settings, num_devices = inputs.roles[role], sizes[pool]
    plan = RolePlan(role=role, pool=pool)
    if setting.generates(role):
        assert isinstance(settings, ActorConfig)
        rows = settings.generation.max_num_seqs
        if inputs.config.device is Device.cpu:  # a GPU's cache takes the memory that is left
            rows = _rows_in_cache(
                settings.generation, setting.model(role), setting.workload.longest_row
            )
        if setting.space.cache_of_rows:
            replicas = num_devices // (settings.generation.tp * settings.generation.pp)
            rows = -(-setting.workload.rows_in_flight // replicas)
        plan = replace(plan, generation=generation_layout(settings.generation, num_devices, rows))
    if role != GENERATION:
        assert settings.model is not None
        found = model_config(settings.model, role_kind(role).head)
        tokens = chosen_tokens(settings.train, found, inputs.config.device.value)
        train = replace(settings.train, micro_batch_tokens=tokens)
        replicas, work = num_devices // (train.pp * train.cp * train.tp), setting.workload
        rows = -(-work.num_rows // (work.num_mini_batches * replicas))
        budget = budget_of(train, int(rows * work.tokens_per_row))
        train = replace(train, micro_batch_tokens=budget)
        layout = train_layout(train, num_devices, trained=setting.trained(role))
        plan = replace(plan, layout=layout)
    return plan


def train_layout(train: TrainConfig, num_devices: int, *, trained: bool) -> ModelLayout:
    """The layout that the engine settings give on `num_devices`; recipes/checks.py says whether
    it fits."""
    zero = zero_stage_of(train)
    if not trained and zero < 3:
        zero = 0
    return ModelLayout(
        p=train.pp,
        t=train.tp,
        d=num_devices // (train.pp * train.cp * train.tp),
        c=train.cp,
        e=train.ep,
        zero=zero,
        replicas=train.fsdp_replicas,
        recompute=train.activation_checkpointing and trained,
        selective=train.selective_checkpointing and trained,
        offload_activations=train.offload_activations and trained,
        compiled=train.compile,
        micro_batch_tokens=train.micro_batch_tokens * train.cp,
        offload=train.offload_optimizer and trained,
    )


def generation_layout(
    generation: GenerationConfig, num_devices: int, rows_in_cache: int
) -> GenerationLayout:
    """`rows_in_cache`: sequences that the key/value cache holds."""
    return GenerationLayout(
        pg=generation.pp,
        tg=generation.tp,
        replicas=num_devices // (generation.pp * generation.tp),
        max_running=min(generation.max_num_seqs, rows_in_cache),
        kept=not generation.release_during_training,
    )


def _rows_in_cache(generation: GenerationConfig, model: ModelSpec, longest_row: int) -> int:
    """Sequences that the key/value cache of a CPU rank holds, at least one."""
    layout = GenerationLayout(pg=generation.pp, tg=generation.tp)
    per_token = kv_bytes_per_token(model, layout, precision_space(generation.precision))
    cache = generation.kv_cache_bytes or DEFAULT_CACHE_BYTES
    return max(1, int(cache / (per_token * longest_row)))


def apply_mapping(inputs: MapperInputs, mapping: DeviceMapping) -> RunConfig:
    """The run's settings with the mapping's pools and layouts, as a run with placement=custom."""
    config = inputs.config
    changes: dict[str, Any] = {}
    for plan in mapping.roles:
        if plan.layout is not None:
            settings = inputs.roles[plan.role]
            train = train_settings(mapping, plan.role, settings.train)
            # Those that the run has of the role: what its worker has besides is added once more.
            configured = vars(config)[plan.role]
            settled = {field.name: vars(settings)[field.name] for field in fields(configured)}
            changes[plan.role] = replace(configured, **(settled | {"train": train}))
    for plan in mapping.roles:
        if plan.generation is not None:
            actor: ActorConfig = changes["actor"]
            memory_bytes = None
            if config.device is Device.cuda:
                group = mapping.pool_of(plan.role).group
                memory_bytes = cluster_of(config).groups[group].kind.memory_bytes
            generation = generation_settings(mapping, plan.role, actor.generation, memory_bytes)
            changes["actor"] = replace(actor, generation=generation)
    pools = _pool_settings(config, mapping)
    return replace(config, placement=PlacementMode.custom, num_devices=1, pools=pools, **changes)


def _pool_settings(config: RunConfig, mapping: DeviceMapping) -> dict[str, PoolConfig]:
    """The mapping's pools; roles without devices are in the actor's."""
    roles = {pool.name: list(pool.roles) for pool in mapping.pools}
    placed = set(chain.from_iterable(roles.values()))
    for role in role_names(config):
        if role not in placed:
            roles[mapping.role("actor").pool].append(role)
    resources = node_resources(config, cluster_of(config))
    pools: dict[str, PoolConfig] = {}
    for pool in mapping.pools:
        pools[pool.name] = PoolConfig(
            num_devices=pool.num_devices,
            roles=roles[pool.name],
            node_resource=resources.get(pool.kind, ""),
        )
    return pools


def train_settings(mapping: DeviceMapping, role: str, train: TrainConfig) -> TrainConfig:
    """The role's engine settings with the mapping's layout; the engine must be one that the
    search was limited to."""
    layout = mapping.role(role).layout
    if layout is None:
        raise ValueError(
            f"mapping: role {role} has no layout; judge the mapping first, which fills it in"
        )
    return replace(
        train,
        tp=layout.t,
        pp=layout.p,
        cp=layout.c,
        ep=layout.e,
        micro_batch_tokens=max(1, layout.micro_batch_tokens // layout.c),
        activation_checkpointing=layout.recompute,
        selective_checkpointing=layout.selective,
        reshard_after_forward=layout.zero == 3,
        zero_stage=max(1, layout.zero),
        offload_optimizer=layout.offload,
    )


def generation_settings(
    mapping: DeviceMapping,
    role: str,
    generation: GenerationConfig,
    memory_bytes: float | None = None,
) -> GenerationConfig:
    """The generation engine's settings, with as much cache as was planned; `memory_bytes` are a
    GPU's, None for CPUs."""
    plan = mapping.role(role)
    if plan.generation is None:
        raise ValueError(
            f"mapping: role {role} has no generation layout; it does not generate in "
            f"{mapping.algorithm}"
        )
    needs = dict.fromkeys(GENERATION_PARTS, 0.0)
    for call in mapping.calls:
        if call.role == role and call.kind == CallKind.generation.value:
            for name in GENERATION_PARTS:
                needs[name] = max(needs[name], call.bytes.get(name, 0.0))
    num_bytes = sum(needs.values())
    fraction = generation.gpu_memory_fraction
    if memory_bytes is not None:
        fraction = min(0.95, (num_bytes + ENGINE_BYTES) / memory_bytes)
    return replace(
        generation,
        tp=plan.generation.tg,
        pp=plan.generation.pg,
        max_num_seqs=plan.generation.max_running,
        kv_cache_bytes=max(int(needs["kv_cache"]), generation.kv_cache_bytes),
        gpu_memory_fraction=fraction,
        release_during_training=plan.layout is not None and _must_release(mapping, role, num_bytes),
    )


def _must_release(mapping: DeviceMapping, role: str, generation_bytes: float) -> bool:
    """Whether another call of the pool has too little memory beside the generation engine's."""
    pool = mapping.role(role).pool
    capacity, generates = mapping.capacity_bytes[pool], CallKind.generation.value
    others = [call for call in mapping.calls_in(pool) if call.kind != generates]
    return any(call.total_bytes + generation_bytes > capacity for call in others)
