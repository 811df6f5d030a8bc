"""forecast: what a run's settings come to on a cluster, in seconds and bytes per call, before anything
starts.

From the settings of a run to the mapper's words (hybridflow/mapping), and its verdict on them. Reads model
configurations and prompt lengths, no weights; the cluster need not exist. Leaves out the way back, from a
mapping to settings: recipes/mapping_settings.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from controllers.data import PromptDataset
from controllers.loop import Outcome
from hybridflow.dataflow import Dataflow
from hybridflow.mapping.answer.auto import shortage
from hybridflow.mapping.answer.device_mapping import DeviceMapping, Pool, RolePlan
from hybridflow.mapping.answer.explain import mapping_report
from hybridflow.mapping.answer.judge import Judgement, judge
from hybridflow.mapping.calibrate.compare import Run, side_by_side
from hybridflow.mapping.question.calibration import Calibration, usual_constants
from hybridflow.mapping.question.cluster import DEVICE_KINDS, Cluster, DeviceKind, NodeGroup
from hybridflow.mapping.question.model import ModelSpec
from hybridflow.mapping.question.space import SearchSpace
from hybridflow.mapping.question.workload import Lengths, Workload
from hybridflow.mapping.search.search import search
from hybridflow.mapping.search.setting import GENERATION, Setting, split_generation
from recipes.checks import RoleConfig
from recipes.config import Device, RunConfig
from recipes.mapping_settings import engine_space, generation_layout, train_layout
from recipes.roles import role_kind
from workers.config import Precision
from workers.engines import engine_class
from workers.engines.base import Head
from workers.engines.model.loading import model_config
from workers.role_config import ActorConfig, RewardConfig

CPU_KIND = "cpu"
MAPPING = "mapping.json"
"""In a run's directory: where its models are, their layouts, and what was predicted."""


@dataclass(frozen=True, kw_only=True)
class MapperInputs:
    """What the mapper needs of a run: its traced step, its roles' settings, its prompts."""

    config: RunConfig
    dataflow: Dataflow
    roles: Mapping[str, RoleConfig]
    """Role -> settings, in the algorithm's order; `generation` with the actor's where it has a pool of its
    own."""
    prompts: PromptDataset


def setting_of(plan: MapperInputs) -> Setting:
    """What every prediction for this run is computed from."""
    config = plan.config
    cluster = cluster_of(config)
    split = GENERATION in plan.roles
    return Setting(
        dataflow=split_generation(plan.dataflow) if split else plan.dataflow,
        models={role: model_spec(role, settings) for role, settings in plan.roles.items()},
        cluster=cluster,
        workload=workload_of(plan),
        calibration=calibration_of(config, cluster),
        space=space_of(plan),
        weights_from={GENERATION: "actor"} if split else {},
    )


def model_spec(role: str, settings: RoleConfig) -> ModelSpec | None:
    """Sizes from the model's configuration; None for a Python function."""
    if isinstance(settings, RewardConfig) and settings.model is None:
        return None
    assert settings.model is not None
    head = role_kind(role).head
    spec = ModelSpec.from_hf(
        model_config(settings.model, head).to_dict(), name=Path(settings.model.path).name
    )
    return spec if head is Head.lm else spec.with_scalar_head()


def workload_of(plan: MapperInputs) -> Workload:
    """Prompt lengths are those of the data; the critic's epochs are taken to be the actor's."""
    config = plan.config
    longest = config.actor.generation.sampling.max_response_tokens
    return Workload(
        num_prompts=config.data.batch_size,
        samples_per_prompt=config.algorithm.samples_per_prompt,
        prompt=Lengths.observed(plan.prompts.lengths.tolist()),
        response=Lengths.parse(config.plan.response) if config.plan.response else Lengths.fixed(longest),
        updates=config.algorithm.num_mini_batches,
        epochs=config.actor.num_epochs,
    )


def space_of(plan: MapperInputs) -> SearchSpace:
    """What the run's engines need per parameter, and which layouts they have; engines and precisions of the
    actor."""
    actor = next(settings for settings in plan.roles.values() if isinstance(settings, ActorConfig))
    scored = any(call.role == "actor" and "log_probs" in call.writes for call in plan.dataflow.calls)
    return replace(
        engine_class(actor.train.engine).limit(engine_space(actor.train.precision)),
        old_log_prob_pass=not scored,
        max_running=actor.generation.max_num_seqs,
        prefill_tokens=actor.generation.max_num_batched_tokens,
        max_generation_pipeline=1,
    )


def cluster_of(config: RunConfig) -> Cluster:
    """plan.cluster, or what this machine has for the run; its speed as calibrated, where the calibration's
    cluster lies beside it."""
    if config.plan.cluster:
        return Cluster.parse(config.plan.cluster)
    devices = sum(pool.num_devices for pool in config.pools.values()) or config.num_devices
    if (
        config.plan.calibration
        and (measured := Path(config.plan.calibration).parent / "cluster.json").is_file()
    ):
        return _one_node(Cluster.load(measured).groups[0].kind, devices)
    if config.device is Device.cpu:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / devices
        return _one_node(replace(DEVICE_KINDS[CPU_KIND], memory_bytes=memory), devices)
    if not torch.cuda.is_available():
        raise ValueError(
            "plan.cluster is not set and this machine has no CUDA device to look at; name the cluster, such "
            "as 2x8xH100-80GB"
        )
    kind, here = _cuda_kind(), torch.cuda.device_count()
    if devices <= here:
        return _one_node(kind, devices)
    return Cluster(
        groups=(NodeGroup(kind=replace(kind, devices_per_node=here), num_nodes=-(-devices // here)),)
    )


def node_resources(config: RunConfig, cluster: Cluster) -> dict[str, str]:
    """Device kind -> the Ray resource of its nodes, where there are several kinds; what tells no two kinds
    apart is an error."""
    kinds = list(dict.fromkeys(group.kind.name for group in cluster.groups))
    pairs = [text.partition(":") for text in config.plan.node_resources]
    named = {kind: resource for kind, _, resource in pairs}
    if not all(named.values()):
        raise ValueError(
            f"plan.node_resources is {config.plan.node_resources}; each is KIND:RESOURCE, such as "
            f"{kinds[0]}:big_nodes"
        )
    unknown = sorted(set(named) - set(kinds))
    if unknown:
        raise ValueError(
            f"plan.node_resources names {unknown}, which are no kinds of {cluster}; it has {', '.join(kinds)}"
        )
    if len(kinds) == 1:
        return named
    if config.device is Device.cuda and any(kind.startswith(CPU_KIND) for kind in kinds):
        raise ValueError(
            f"plan.cluster is {cluster} with device=cuda: the devices of a run are all GPUs or all CPU "
            "processes; leave cpu out"
        )
    chips = {name.partition("-")[0] for name in DEVICE_KINDS if name != CPU_KIND}
    for kind in kinds:
        chip = kind.partition("-")[0]
        if chip in chips and config.device is Device.cuda:
            named.setdefault(kind, f"accelerator_type:{chip}")
        elif kind not in named:
            raise ValueError(
                f"{cluster} has several kinds of devices, and nothing says which of Ray's nodes have {kind}; "
                "give those nodes a resource "
                f"(ray start --resources='{{\"{kind}\": 1}}') and set plan.node_resources=[{kind}:{kind}]"
            )
    if len(set(named.values())) < len(kinds):
        raise ValueError(
            f"plan.node_resources ({', '.join(f'{kind}:{name}' for kind, name in named.items())}) does not "
            f"tell the kinds of {cluster} "
            "apart; give the nodes of each kind a resource of their own"
        )
    return named


def _one_node(kind: DeviceKind, devices: int) -> Cluster:
    return Cluster(groups=(NodeGroup(kind=replace(kind, devices_per_node=devices), num_nodes=1),))


def _cuda_kind() -> DeviceKind:
    """The known kind of this machine's CUDA devices."""
    properties = torch.cuda.get_device_properties(0)
    same_chip = [kind for name, kind in DEVICE_KINDS.items() if name.partition("-")[0] in properties.name]
    if not same_chip:
        raise ValueError(
            f"plan.cluster is not set, and {properties.name} is none of {', '.join(DEVICE_KINDS)}; describe "
            "the devices in a JSON file"
        )
    return min(same_chip, key=lambda kind: abs(kind.memory_bytes - properties.total_memory))


def calibration_of(config: RunConfig, cluster: Cluster) -> Calibration:
    if config.plan.calibration:
        return Calibration.load(Path(config.plan.calibration))
    return usual_constants(cluster.groups[0].kind.name)


def given_mapping(plan: MapperInputs, pool_of: Mapping[str, str], sizes: Mapping[str, int]) -> DeviceMapping:
    """The run's own pools and layouts; pools take the cluster's node groups in order, those of their kind
    where they ask for one."""
    setting = setting_of(plan)
    room = [group.num_devices for group in setting.cluster.groups]
    chosen = any(pool.node_resource for pool in plan.config.pools.values())
    resources = node_resources(plan.config, setting.cluster) if chosen else {}
    marks = [resources.get(group.kind.name, "") for group in setting.cluster.groups]
    pools = []
    for name, size in sizes.items():
        roles = tuple(role for role in setting.roles if pool_of[role] == name)
        if roles:  # a pool of Python functions alone takes no device of the plan
            asked = plan.config.pools[name].node_resource if name in plan.config.pools else ""
            group = next(
                (number for number, left in enumerate(room) if left >= size and asked in ("", marks[number])),
                0,
            )
            room[group] -= size
            pools.append(Pool(name=name, group=group, num_devices=size, roles=roles))
    longest = setting.workload.longest_row
    plans = []
    for role in setting.roles:
        settings, size = plan.roles[role], sizes[pool_of[role]]
        generation, layout = None, None
        if setting.generates(role):
            assert isinstance(settings, ActorConfig)
            generation = generation_layout(
                settings.generation, size, _rows_in_cache(plan, setting.model(role), longest)
            )
        if role != GENERATION:
            layout = train_layout(settings.train, size, trained=setting.trained(role))
        plans.append(RolePlan(role=role, pool=pool_of[role], layout=layout, generation=generation))
    return DeviceMapping(
        algorithm=plan.dataflow.algorithm,
        cluster="",
        pools=tuple(pools),
        roles=tuple(plans),
        capacity_bytes={},
    )


def _rows_in_cache(plan: MapperInputs, model: ModelSpec, longest: int) -> int:
    """Sequences that the key/value cache of one CPU rank holds; a GPU's cache takes what memory is left."""
    config = plan.config
    if config.device is not Device.cpu:
        return config.actor.generation.max_num_seqs
    generation = config.actor.generation
    width = 4 if generation.precision is Precision.fp32 else 2
    per_row = (
        width
        * model.kv_elements_per_token
        / (generation.pp * min(generation.tp, model.num_kv_heads))
        * longest
    )
    return max(1, int(np.floor(generation.kv_cache_bytes / per_row)))


def forecast(plan: MapperInputs, pool_of: Mapping[str, str], sizes: Mapping[str, int]) -> Judgement:
    """Predictions for the run as it is set up."""
    return judge(setting_of(plan), given_mapping(plan, pool_of, sizes))


def verdict(plan: MapperInputs, pool_of: Mapping[str, str], sizes: Mapping[str, int]) -> str:
    """Time and memory per call; a ValueError with what would do where the memory is too small."""
    if not plan.config.plan.cluster and plan.config.device is Device.cuda and not torch.cuda.is_available():
        return "seconds and memory: name the devices with plan.cluster, such as plan.cluster=2x8xH100-80GB"
    judgement = forecast(plan, pool_of, sizes)
    text = mapping_report(judgement.mapping)
    if judgement.fits:
        return text
    setting = setting_of(plan)
    best = search(setting).best
    advice = (
        shortage(setting)
        if best is None
        else f"placement=auto fits on this cluster: {best.step_s:.3g} s a step"
    )
    raise ValueError(
        f"{text}\n\nthis placement does not fit on {setting.cluster}:\n{judgement.report()}\n{advice}"
    )


def predicted_vs_measured(mapping: DeviceMapping, outcome: Outcome) -> str:
    """Predicted and measured seconds per phase, once a run has ended."""
    return side_by_side(measured_run("run", mapping, outcome))


def measured_run(configuration: str, mapping: DeviceMapping, outcome: Outcome, group: str = "") -> Run:
    phases = {call.call.partition("#")[0] for call in mapping.calls}
    measured = {name: seconds for name, seconds in outcome.median_s.items() if name in phases}
    for name in measured:
        if name.startswith(GENERATION):
            measured[name] += outcome.median_s.get(f"{GENERATION}.sync_weights", 0.0)  # predicted as one
    return Run(
        configuration=configuration,
        mapping=mapping,
        measured_s=measured,
        step_s=outcome.median_s["step"],
        compare_group=group,
    )
