"""What a run consists of while it lives: the cluster, pools, roles, data and metrics."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase

from cluster.connect import ClusterInfo, connect
from controllers import algorithm_entry, create_algorithm
from controllers.algorithm_base import Algorithm, Evaluated
from controllers.data import DATASETS, PromptDataset, RowDataset, RowLoader
from controllers.validation import HeldOutRows, ResponseReward, Validate
from hybridflow.checkpoint import MANIFEST, CheckpointStore
from hybridflow.dataflow import Dataflow
from hybridflow.group import spawn
from hybridflow.metrics import Tracker
from hybridflow.pool import LocalPool, PoolSpec, RayPool, ResourcePool
from hybridflow.tracing import trace, traced_roles
from recipes.checks import (
    check_loss_columns,
)
from recipes.compatibility import (
    check_columns_of,
    check_prompts,
    check_text,
)
from recipes.config import Device, PlacementMode, RunConfig, Runtime
from recipes.placing import placeholder_roles, pool_sizes
from recipes.roles import GENERATION, Role
from workers.roles import Actor
from workers.split_actor import SplitActor

LOGGER = logging.getLogger(__name__)


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


def start_tracker(config: RunConfig, directory: Path, store: CheckpointStore, num_steps: int) -> Tracker:
    """The metrics of this run, going on where the checkpoint that it resumes from was written."""
    settings = OmegaConf.to_container(OmegaConf.structured(config))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    start = start_step(config.loop.resume, store)
    return Tracker(
        config.metrics,
        directory,
        total_steps=num_steps,
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
