"""placement=auto: the mapper's answer becomes the run's settings; from then on it is a run with
placement=custom.

    mapping = choose(plan)             # searched, or the one saved with the run that goes on, or plan.mapping
    config = apply_mapping(plan, mapping)     # pools, and every role's layouts

With several kinds of devices every pool asks for nodes of its kind. Leaves out roles with different training
engines or precisions, and CPUs beside GPUs.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybridflow.checkpoint import CheckpointStore
from hybridflow.mapping.answer.auto import mapping_of, shortage
from hybridflow.mapping.answer.device_mapping import DeviceMapping, Pool
from hybridflow.mapping.answer.judge import judge
from hybridflow.mapping.search.search import search
from hybridflow.mapping.search.setting import GENERATION, Setting
from recipes.config import Device, PlacementMode, PoolConfig, RunConfig, Runtime
from recipes.forecast import MAPPING, MapperInputs, cluster_of, node_resources, setting_of
from recipes.mapping_settings import generation_settings, train_settings
from recipes.roles import role_names
from workers.role_config import ActorConfig

LOGGER = logging.getLogger(__name__)


def choose(plan: MapperInputs) -> DeviceMapping:
    """The mapping of this run: a saved one as it is, or the fastest that fits."""
    setting = setting_of(plan)
    _check(plan, setting)
    saved = saved_mapping(plan.config)
    if saved is not None and (again := _again(plan, setting, saved)) is not None:
        return again
    found = search(setting).best
    if plan.config.plan.split_generation:
        apart = setting_of(_split(plan))
        other = search(apart).best
        together = other is None or any({"actor", GENERATION} <= set(roles) for roles in other.placement)
        if other is not None and not together and (found is None or other.step_s < found.step_s):
            return mapping_of(apart, other)
    if found is None:
        raise ValueError(shortage(setting))
    return mapping_of(setting, found)


def _again(plan: MapperInputs, setting: Setting, saved: Path) -> DeviceMapping | None:
    """A saved mapping, with today's predictions; None for a run that goes on with other devices and did not
    name it."""
    mapping = DeviceMapping.load(saved)
    if not plan.config.plan.mapping and mapping.cluster != str(setting.cluster):
        LOGGER.info(
            "placement=auto: %s was made for %s, this is %s: chosen anew",
            saved,
            mapping.cluster,
            setting.cluster,
        )
        return None
    if any(placed.role == GENERATION for placed in mapping.roles):
        setting = setting_of(_split(plan))
    judgement = judge(setting, mapping)
    if not judgement.fits:
        raise ValueError(f"mapping {saved} does not fit on {setting.cluster}:\n{judgement.report()}")
    LOGGER.info("placement=auto: as in %s", saved)
    return judgement.mapping


def _split(plan: MapperInputs) -> MapperInputs:
    """The run with generation as a role of its own."""
    return replace(plan, roles={**plan.roles, GENERATION: plan.roles["actor"]})


def saved_mapping(config: RunConfig) -> Path | None:
    """plan.mapping, or what a run saved that this one goes on from."""
    if config.plan.mapping:
        path = Path(config.plan.mapping)
        if not path.is_file():
            raise ValueError(
                f"plan.mapping is {config.plan.mapping!r}, which is no file; give one that a run or "
                "recipes.plan has saved"
            )
        return path
    directory = Path(config.output_dir)
    kept = directory / MAPPING
    if config.loop.resume == "never" or not kept.is_file():
        return None
    goes_on = (
        config.loop.resume != "auto"
        or CheckpointStore(directory / "checkpoints", keep_last=1, keep_best=0).latest() is not None
    )
    return kept if goes_on else None


def apply_mapping(plan: MapperInputs, mapping: DeviceMapping) -> RunConfig:
    """The run's settings with the mapping's pools and layouts. Roles without a model of their own live with
    the actor."""
    config = plan.config
    homes = {pool.name: list(pool.roles) for pool in mapping.pools}
    homeless = [role for role in role_names(config) if not any(role in roles for roles in homes.values())]
    homes[mapping.role("actor").pool] += homeless
    resources = node_resources(config, cluster_of(config))
    pools = {
        pool.name: PoolConfig(
            num_devices=pool.num_devices, roles=homes[pool.name], node_resource=resources.get(pool.kind, "")
        )
        for pool in mapping.pools
    }
    changes: dict[str, Any] = {}
    for placed in mapping.roles:
        if placed.layout is not None:
            settings = plan.roles[placed.role]
            changes[placed.role] = replace(
                settings, train=train_settings(mapping, placed.role, settings.train)
            )
    for placed in mapping.roles:
        if placed.generation is not None:
            actor: ActorConfig = changes["actor"]
            generation = generation_settings(
                mapping, placed.role, actor.generation, _memory(plan, mapping.pool_of(placed.role))
            )
            changes["actor"] = replace(actor, generation=generation)
    return replace(config, placement=PlacementMode.custom, num_devices=1, pools=pools, **changes)


def _memory(plan: MapperInputs, pool: Pool) -> float | None:
    """Bytes of a GPU of the pool, which the generation engine's share is a fraction of."""
    return (
        cluster_of(plan.config).groups[pool.group].kind.memory_bytes
        if plan.config.device is Device.cuda
        else None
    )


def _check(plan: MapperInputs, setting: Setting) -> None:
    config = plan.config
    if config.runtime is Runtime.local:
        raise ValueError(
            "placement=auto with runtime=local, which is one process: there is nothing to place; leave one "
            "of them out"
        )
    if config.pools:
        raise ValueError(
            f"pools ({', '.join(config.pools)}) are set with placement=auto, which makes its own; use "
            "placement=custom for yours"
        )
    node_resources(config, setting.cluster)
    if config.num_devices not in (1, setting.cluster.num_devices):
        raise ValueError(
            f"num_devices is {config.num_devices}, plan.cluster has {setting.cluster.num_devices} devices; "
            "leave one of them out"
        )
    kinds = {
        role: (plan.roles[role].train.engine, plan.roles[role].train.precision) for role in setting.roles
    }
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{role} {engine} {precision}" for role, (engine, precision) in kinds.items())
        raise ValueError(
            f"placement=auto needs one training engine and precision for all roles: {listed}; set them "
            "alike, or place them yourself "
            "with placement=custom"
        )
