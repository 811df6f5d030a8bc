"""run(): from settings to a trained model. Checks everything that can be checked, places the roles, hands
over to the loop."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase

from cluster.connect import ClusterInfo, connect
from controllers import QUESTIONS, algorithm_entry, create_algorithm
from controllers.algorithm_base import Algorithm, Evaluated
from controllers.data import DATASETS, PromptDataset, RowDataset, RowLoader, load_tokenizer
from controllers.loop import Loop, Outcome
from controllers.streams import EmptyStream, PromptStream, Stream, TextStream
from controllers.validation import HeldOutRows, ResponseReward, Validate
from hybridflow.checkpoint import MANIFEST, CheckpointStore
from hybridflow.dataflow import Dataflow
from hybridflow.group import spawn
from hybridflow.layout import Layout
from hybridflow.mapping.answer.device_mapping import DeviceMapping
from hybridflow.mapping.answer.explain import mapping_report
from hybridflow.metrics import Tracker
from hybridflow.pool import LocalPool, PoolSpec, RayPool, ResourcePool
from hybridflow.tracing import to_mermaid, trace, traced_roles
from hybridflow.waiting import CALLS
from recipes.auto import apply_mapping, choose
from recipes.checks import (
    check_algorithm,
    check_generation_groups,
    check_generation_memory,
    check_loss_columns,
    check_model,
    check_output,
    check_resume,
    check_settings,
)
from recipes.compatibility import (
    check_columns_of,
    check_context_lengths,
    check_prompts,
    check_text,
    check_vocabularies,
)
from recipes.config import Device, PlacementMode, RunConfig, Runtime
from recipes.forecast import MAPPING, MapperInputs, forecast, predicted_vs_measured, verdict
from recipes.roles import GENERATION, Role, role_kind, role_names
from workers.role_config import JudgeConfig, VerdictKind
from workers.roles import Actor, TrainedRole
from workers.split_actor import SplitActor, SplitTrainingWorker

LOGGER = logging.getLogger(__name__)


def run(config: RunConfig) -> Outcome | None:
    """The whole run; None for graph=true and dry_run=true, which start nothing."""
    if config.algorithm.name in QUESTIONS:
        raise ValueError(
            f"algorithm.name is {config.algorithm.name!r}, which trains nothing; run python -m "
            f"recipes.{config.algorithm.name}"
        )
    roles = place(config)
    dataflow = check_dataflow(config, roles)
    if config.graph:
        print(to_mermaid(dataflow))
        return None
    check_models(config, roles)
    tokenizer = load_tokenizer(config.model)
    check_vocabularies(config, roles, tokenizer)
    entry = algorithm_entry(config.algorithm.name)
    train = load_rows(config, "train", tokenizer)
    held_out = load_rows(config, "validation", tokenizer) if config.data.validation else None
    texts = load_pretraining(config, tokenizer)
    if isinstance(train, PromptDataset):
        check_context_lengths(config, roles, train.longest_prompt_tokens)
    plan = plan_of(config, dataflow, roles, train)
    mapping = None
    if config.placement is PlacementMode.auto and plan is not None:
        mapping = choose(plan)
        config = apply_mapping(plan, mapping)
        roles = place(config)
        check_models(config, roles)
    if config.dry_run:
        print(placement_report(config, roles, dataflow))
        if plan is not None:
            print(
                "\n"
                + (
                    verdict(plan, pools_of(roles), pool_sizes(config))
                    if mapping is None
                    else mapping_report(mapping)
                )
            )
        return None
    if mapping is not None:
        LOGGER.info("placement=auto\n%s", mapping_report(mapping))
    if config.plan.calibration and mapping is None and plan is not None:
        mapping = forecast(plan, pools_of(roles), pool_sizes(config)).mapping
    CALLS.timeout_s = config.call_timeout_s
    directory = Path(config.output_dir).absolute()
    with ExitStack() as stack:
        cluster = stack.enter_context(connect_cluster(config))
        store = CheckpointStore(
            directory / "checkpoints",
            keep_last=config.loop.keep_last,
            keep_best=config.loop.keep_best,
            metric=entry.objective,
            mode=entry.best,
        )
        tracker = stack.enter_context(start_tracker(config, directory, store))
        handles = start_roles(stack, config, cluster, roles)
        data = RowLoader(train, config.data)
        streams: dict[str, Stream] = {
            "prompts": PromptStream(data, config.algorithm.samples_per_prompt),
            "pretraining": TextStream(texts) if texts else EmptyStream(),
        }
        algorithm = create_algorithm(config.algorithm.name, handles, config.algorithm, streams)
        loop = Loop(
            algorithm,
            trained={role.name: handles[role.name] for role in roles if issubclass(role.worker, TrainedRole)},
            data=data,
            validate=None if held_out is None else validation(config, algorithm, handles, held_out),
            tracker=tracker,
            store=store,
            config=config.loop,
            further={"pretraining": texts} if texts else {},
        )
        if mapping is not None:
            mapping.save(directory / MAPPING)
        outcome = loop.run()
        tracker.summary(asdict(outcome))
        if mapping is not None and outcome.median_s:
            LOGGER.info("predicted and measured\n%s", predicted_vs_measured(mapping, outcome))
        return outcome


def foresee(config: RunConfig) -> DeviceMapping:
    """What a run with these settings would take; nothing is started."""
    roles = place(config)
    prompts = PromptDataset.load(config.data, config.data.train, load_tokenizer(config.model))
    plan = MapperInputs(
        config=config,
        dataflow=check_dataflow(config, roles),
        roles={r.name: r.config for r in roles},
        prompts=prompts,
    )
    return forecast(plan, pools_of(roles), pool_sizes(config)).mapping


def spawn_roles(roles: Sequence[Role], pools: Mapping[str, ResourcePool]) -> dict[str, Any]:
    """A handle for every role; an actor whose generation has a pool of its own is still one handle."""
    handles: dict[str, Any] = {
        role.name: spawn(role.worker, pools[role.pool], role.config, role=role.name) for role in roles
    }
    pool_of = {role.name: pools[role.pool] for role in roles}
    if GENERATION in handles:
        handles["actor"] = SplitActor.of(
            handles["actor"], handles.pop(GENERATION), pool_of["actor"], pool_of[GENERATION]
        )
    return handles


def validation(
    config: RunConfig, algorithm: Algorithm, handles: Mapping[str, Any], held_out: RowDataset
) -> Validate:
    """The reward of responses where the rows are prompts, the algorithm's own numbers elsewhere."""
    if not algorithm_entry(config.algorithm.name).answers_prompts:
        return HeldOutRows(cast(Evaluated, algorithm).evaluate, held_out)
    longest = config.actor.generation.sampling.max_response_tokens
    return ResponseReward(
        handles["actor"],
        handles["reward"],
        held_out,
        config.loop.validation_sampling,
        longest,
        gold=handles.get("gold"),
    )


def load_rows(config: RunConfig, name: str, tokenizer: PreTrainedTokenizerBase) -> RowDataset:
    """data.train or data.validation, as the rows that the algorithm's steps begin with."""
    where = {"train": config.data.train, "validation": config.data.validation}[name]
    rows = DATASETS[algorithm_entry(config.algorithm.name).rows].load(config.data, where, tokenizer)
    if isinstance(rows, PromptDataset):
        check_prompts(f"data.{name}", rows.longest_prompt_tokens, config.actor)
        check_columns_of(config, name, rows.column_names)
    else:
        check_text(f"data.{name}", rows.longest_tokens, config.model, f"data.{rows.length_limit}")
    return rows


def plan_of(
    config: RunConfig, dataflow: Dataflow, roles: Sequence[Role], rows: RowDataset
) -> MapperInputs | None:
    """What the mapper needs to know; it knows steps that answer prompts only, and one generation in them."""
    writes = any(
        isinstance(role.config, JudgeConfig) and role.config.verdict is VerdictKind.written for role in roles
    )
    if isinstance(rows, PromptDataset) and not writes:
        return MapperInputs(
            config=config, dataflow=dataflow, roles={role.name: role.config for role in roles}, prompts=rows
        )
    if config.placement is PlacementMode.auto:
        what = "a judge that writes (judge.verdict=written)" if writes else config.algorithm.name
        raise ValueError(
            f"placement=auto: the mapper plans steps that answer prompts, not {what}; use colocated or custom"
        )
    return None


def start_roles(
    stack: ExitStack, config: RunConfig, cluster: ClusterInfo | None, roles: Sequence[Role]
) -> dict[str, Any]:
    """Pools and a handle for every role; `stack` closes them."""
    pools = {
        name: stack.enter_context(start_pool(config, cluster, name, roles))
        for name in dict.fromkeys(r.pool for r in roles)
    }
    handles = spawn_roles(roles, pools)
    return handles | placeholder_roles(config, handles)


def place(config: RunConfig) -> list[Role]:
    """Every role of the algorithm with its worker, settings and pool."""
    pool_of = _pools(config)
    roles = []
    for name in (*role_names(config), *([GENERATION] if GENERATION in pool_of else [])):
        kind = role_kind(name)
        if not kind.needed(config):
            LOGGER.info("no %s model: no coefficient asks for it", name)
            continue
        settings = kind.settings(config)
        worker = SplitTrainingWorker if name == "actor" and GENERATION in pool_of else kind.worker(settings)
        roles.append(Role(name=name, worker=worker, config=settings, pool=pool_of[name]))
    check_layouts(config, roles)
    check_algorithm(config, algorithm_entry(config.algorithm.name))
    check_output(config.output_dir)
    check_resume(config.loop.resume)
    return roles


def check_layouts(config: RunConfig, roles: Sequence[Role]) -> None:
    """Settings of every role, its layouts on its pool, and those of generation engines that share one."""
    sizes = pool_sizes(config)
    engines: dict[str, dict[str, Layout]] = {}
    shares: dict[str, dict[str, float]] = {}
    for role in roles:
        check_settings(role.name, role.config)
        layouts = role.worker.layouts(role.config, sizes[role.pool])
        if "generation" in layouts and role.config.generation.engine == "vllm":
            engines.setdefault(role.pool, {})[role.name] = layouts["generation"]
            shares.setdefault(role.pool, {})[role.name] = role.config.generation.gpu_memory_fraction
    for pool, of_roles in engines.items():
        check_generation_groups(pool, of_roles)
        if config.device is Device.cuda:
            check_generation_memory(pool, shares[pool])


def check_models(config: RunConfig, roles: Sequence[Role]) -> None:
    """Every model's directory has a configuration, and its layouts fit it; no weights are read."""
    sizes = pool_sizes(config)
    for role in roles:
        if role.name != GENERATION:  # the model is the actor's, and checked with it
            check_model(role.name, role.config, role_kind(role.name).head, sizes[role.pool])


def placeholder_roles(config: RunConfig, placed: Container[str]) -> dict[str, Any]:
    """What stands for the roles of the algorithm that were not placed because nothing asks for them."""
    absent = {name: role_kind(name).absent for name in role_names(config) if name not in placed}
    return {name: make() for name, make in absent.items() if make is not None}


def pools_of(roles: Sequence[Role]) -> dict[str, str]:
    return {role.name: role.pool for role in roles}


def _pools(config: RunConfig) -> dict[str, str]:
    """Role -> name of its pool; all in one until placement=auto has chosen."""
    names = role_names(config)
    may_be_placed = (*names, *([GENERATION] if "actor" in names else []))
    if config.placement is PlacementMode.colocated and config.pools:
        raise ValueError(
            f"pools ({', '.join(config.pools)}) are set with placement=colocated; set placement=custom or "
            "leave them out"
        )
    if config.placement is not PlacementMode.custom or config.runtime is Runtime.local:
        return dict.fromkeys(names, "main")
    if not config.pools:
        raise ValueError(
            "placement=custom needs pools, for example pools.policy.num_devices=2 "
            "'pools.policy.roles=[actor,reference]'"
        )
    owners: dict[str, list[str]] = {}
    for pool, settings in config.pools.items():
        for role in settings.roles:
            owners.setdefault(role, []).append(pool)
    unknown = sorted(set(owners) - set(may_be_placed))
    wrong = {role: owners.get(role, []) for role in names if len(owners.get(role, [])) != 1}
    wrong |= {role: pools for role, pools in owners.items() if len(pools) > 1}
    if unknown or wrong:
        raise ValueError(
            f"pools: every role of {config.algorithm.name} ({', '.join(names)}) must be in exactly one pool; "
            f"unknown roles {unknown}, roles with their pools {wrong}"
        )
    if GENERATION in owners and owners[GENERATION] == owners["actor"]:
        raise ValueError(
            f"pools.{owners['actor'][0]}.roles names both actor and {GENERATION}: an actor generates in its "
            "own pool anyway; "
            f"leave {GENERATION} out, or give it another pool"
        )
    return {role: pools[0] for role, pools in owners.items()}


def pool_sizes(config: RunConfig) -> dict[str, int]:
    """Devices of every pool."""
    if config.runtime is Runtime.local:
        if config.num_devices > 1:
            raise ValueError(
                f"num_devices={config.num_devices} with runtime=local, which is one process; leave it out or "
                "use runtime=ray"
            )
        return {"main": 1}
    if config.placement is PlacementMode.custom:
        if config.num_devices > 1:
            raise ValueError(
                f"num_devices={config.num_devices} with placement=custom, where every pool has its own; "
                "leave it out"
            )
        sizes = {name: pool.num_devices for name, pool in config.pools.items()}
    else:
        sizes = {"main": config.num_devices}
    for name, size in sizes.items():
        if size < 1:
            field = f"pools.{name}.num_devices" if config.placement is PlacementMode.custom else "num_devices"
            raise ValueError(f"{field} is {size}; use at least 1")
    return sizes


def load_pretraining(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> RowLoader | None:
    """The texts of PPO-ptx, if there are any."""
    if config.data.pretraining is None:
        return None
    dataset = PromptDataset.load_text(config.data, config.data.pretraining, tokenizer)
    check_text("data.pretraining", dataset.longest_tokens, config.actor.model, "data.pretraining_tokens")
    return RowLoader(dataset, replace(config.data, batch_size=config.data.pretraining_batch_size))


def check_dataflow(config: RunConfig, roles: Sequence[Role]) -> Dataflow:
    """Runs the algorithm's step on abstract batches: a column that nobody writes is found before anything
    starts."""
    workers = {role.name: role.worker for role in roles}
    if workers.pop(GENERATION, None) is not None:
        workers["actor"] = Actor
    traced, recorder = traced_roles(workers)
    algorithm = create_algorithm(
        config.algorithm.name, traced | placeholder_roles(config, traced), config.algorithm
    )
    inputs = DATASETS[algorithm_entry(config.algorithm.name).rows].columns
    dataflow = trace(config.algorithm.name, algorithm.step, inputs, recorder)
    check_loss_columns(config.actor.loss.name, dataflow)
    return dataflow


def connect_cluster(config: RunConfig) -> AbstractContextManager[ClusterInfo | None]:
    """Ray with room for all pools; nothing with runtime=local."""
    if config.runtime is Runtime.local:
        if config.device is Device.cuda and not torch.cuda.is_available():
            raise ValueError(
                "device=cuda with runtime=local, but this machine has no CUDA device; use device=cpu"
            )
        return nullcontext()
    devices = sum(pool_sizes(config).values())
    gpus = devices if config.device is Device.cuda else 0
    return connect(config.cluster, cpu_slots=devices * config.cpus_per_device, gpus=gpus)


def start_tracker(config: RunConfig, directory: Path, store: CheckpointStore) -> Tracker:
    """The metrics of this run, going on where the checkpoint that it resumes from was written."""
    settings = OmegaConf.to_container(OmegaConf.structured(config))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    start = start_step(config.loop.resume, store)
    return Tracker(
        config.metrics,
        directory,
        total_steps=config.loop.num_steps,
        start_step=start,
        run_config=cast(dict[str, object], settings),
    )


def start_step(resume: str, store: CheckpointStore) -> int:
    """The step that the run goes on from; metrics of later ones are dropped."""
    if resume == "never":
        return 0
    if resume == "auto":
        latest = store.latest()
        return latest.step if latest else 0
    return int(json.loads((Path(resume) / MANIFEST).read_text())["step"])


def start_pool(
    config: RunConfig, cluster: ClusterInfo | None, name: str, roles: Sequence[Role]
) -> ResourcePool:
    spec = PoolSpec(
        name=name,
        num_devices=pool_sizes(config)[name],
        device=config.device.value,
        node_resource=config.pools[name].node_resource if config.placement is PlacementMode.custom else "",
        cpus_per_device=config.cpus_per_device,
        threads_per_device=config.threads_per_device or _threads(config, cluster),
        roles=tuple(role.name for role in roles if role.pool == name),
        collective_timeout_s=config.call_timeout_s,
    )
    return LocalPool(spec) if cluster is None else RayPool(spec)


def _threads(config: RunConfig, cluster: ClusterInfo | None) -> int:
    """Cores of this machine for each device of the run, so that pools that work at the same time do not take
    each other's; 0 where the devices are on several nodes, which their pools look at."""
    if cluster is None or len(cluster.nodes) > 1 or config.device is Device.cuda:
        return 0
    return max(1, (os.cpu_count() or 1) // sum(pool_sizes(config).values()))


def placement_report(config: RunConfig, roles: Sequence[Role], dataflow: Dataflow) -> str:
    """What would run where."""
    lines = [f"{config.algorithm.name}: {len(dataflow.calls)} calls a step"]
    sizes = pool_sizes(config)
    for role in roles:
        layouts = ", ".join(
            f"{name} {layout}" for name, layout in role.worker.layouts(role.config, sizes[role.pool]).items()
        )
        lines.append(f"  {role.name:<10} pool {role.pool} ({sizes[role.pool]} devices): {layouts}")
    return "\n".join(lines)
