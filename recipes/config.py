"""RunConfig: every setting of a run in one tree; Hydra loads it, OmegaConf.to_object makes it
plain, nothing writes to it after that."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import StrEnum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from cluster.config import ClusterConfig
from controllers import usable_algorithms
from controllers.algorithm_base import AlgorithmConfig
from controllers.data import DataConfig
from controllers.loop_config import LoopConfig
from hybridflow.metrics import MetricsConfig
from hybridflow.recovery.config import RecoveryConfig
from recipes.asynchrony_config import AsynchronyConfig
from recipes.mapper_config import MapperConfig
from recipes.path_settings import PathFields, expand_paths
from workers.agents.config import EpisodeConfig
from workers.config import LoraConfig, ModelConfig
from workers.generation.vllm.build import installed_kind
from workers.role_config import (
    ActorConfig,
    CriticConfig,
    JudgeConfig,
    PolicyConfig,
    PreferenceConfig,
    ReferenceConfig,
    RewardConfig,
)

# Settings that take another's value until they are given one. Hydra resolves the text.
RUN_SEED: Any = "${seed}"
TRUSTED: Any = "${model.trust_remote_code}"
SAVED_DTYPE: Any = "${model.dtype}"
END_TOKEN_IDS: Any = "${model.end_token_ids}"
SAMPLING_TEMPERATURE: Any = "${actor.generation.sampling.temperature}"


class Runtime(StrEnum):
    ray = "ray"
    local = "local"
    """All roles in this process, world size 1: breakpoints work, Ray is not started."""


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


def default_device() -> Device:
    """The kind of device that the installed vLLM computes on; cpu without it."""
    return Device.cuda if installed_kind() == "cuda" else Device.cpu


class PlacementMode(StrEnum):
    colocated = "colocated"
    """All roles on one pool of num_devices."""
    custom = "custom"
    """The pools in `pools`."""
    auto = "auto"
    """The mapper chooses pools and layouts for num_devices, or for plan.cluster."""


@dataclass(kw_only=True)
class PoolConfig:
    """pools.policy.num_devices=4 pools.policy.roles=[actor,reference]"""

    num_devices: int = 1
    roles: list[str] = field(default_factory=list)
    """The algorithm's roles, and `generation`: the actor then trains in one pool and generates
    in another."""
    node_resource: str = ""
    """A Ray resource that the nodes of this pool must have, such as accelerator_type:H100,
    where the cluster has several kinds."""


NO_MODEL = ""
"""model.path of a reward or cost that is no model, and of a teacher that is not named. Hydra
can set a field of a model that is there, not of null."""


def _run_model() -> ModelConfig:
    """The run's model, whatever `model.*` is set to."""
    return ModelConfig(
        path="${model.path}",
        tokenizer="${model.tokenizer}",
        revision="${model.revision}",
        trust_remote_code=TRUSTED,
        dtype=SAVED_DTYPE,
        chat_template="${model.chat_template}",
        end_token_ids=END_TOKEN_IDS,
        attention="${model.attention}",
    )


@dataclass(kw_only=True)
class RunConfig:
    """python -m recipes.ppo model.path=... data.train=... reward.function=package.module:name"""

    runtime: Runtime = Runtime.ray
    placement: PlacementMode = PlacementMode.colocated
    device: Device = field(default_factory=default_device)
    """Whether a device is a GPU or a process on CPU; cuda is the default where vLLM is installed
    for GPUs."""
    num_devices: int = 1
    """Devices of the run with placement colocated or auto."""
    pools: dict[str, PoolConfig] = field(default_factory=dict)
    """For placement=custom: which roles share which devices."""
    cpus_per_device: float = 1.0
    """CPUs that Ray reserves for each device's process."""
    threads_per_device: int = 0
    """CPU threads of each device's process. 0: the environment variable OMP_NUM_THREADS where it is
    set and the run starts its own cluster or needs none; otherwise an equal share of its node's
    cores."""
    deterministic: bool = False
    """On GPUs too the same run gives the same bits, on the same kind and number of them: slower
    kernels in PyTorch, and in vLLM those whose results do not depend on the other rows. On CPUs
    runs repeat anyway. A run that recovers and trains a step again with another result ends."""
    call_timeout_s: float = 1800.0
    """The run stops with a report of every rank's stack when no call finishes for this long."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The policy's model, and the start of critic and reference unless they name their own."""
    actor: ActorConfig = field(
        default_factory=lambda: ActorConfig(model=_run_model(), seed=RUN_SEED)
    )
    critic: CriticConfig = field(
        default_factory=lambda: CriticConfig(model=_run_model(), seed=RUN_SEED)
    )
    reference: ReferenceConfig = field(
        default_factory=lambda: ReferenceConfig(
            model=_run_model(),
            temperature=SAMPLING_TEMPERATURE,
        )
    )
    reward: RewardConfig = field(
        default_factory=lambda: RewardConfig(model=ModelConfig(path=NO_MODEL))
    )
    gold: RewardConfig = field(
        default_factory=lambda: RewardConfig(model=ModelConfig(path=NO_MODEL))
    )
    """A reward that nothing is trained on: validation reports it beside the learned one, so that
    over-optimisation shows."""
    cost: RewardConfig = field(
        default_factory=lambda: RewardConfig(model=ModelConfig(path=NO_MODEL))
    )
    """The cost that Safe-RLHF keeps under a threshold; a function or a model like the reward."""
    cost_critic: CriticConfig = field(
        default_factory=lambda: CriticConfig(model=_run_model(), seed=RUN_SEED)
    )
    """Safe-RLHF's second value model, of costs."""
    teacher: ReferenceConfig = field(
        default_factory=lambda: ReferenceConfig(
            model=ModelConfig(path=NO_MODEL),
            temperature=SAMPLING_TEMPERATURE,
        )
    )
    """The model that distillation learns from; it names its own (teacher.model.path) and shares
    the policy's vocabulary."""
    judge: JudgeConfig = field(
        default_factory=lambda: JudgeConfig(
            model=ModelConfig(path=NO_MODEL),
            seed=RUN_SEED,
        )
    )
    """The language model that judges answers; it names its own (judge.model.path)."""
    policy: PolicyConfig = field(
        default_factory=lambda: PolicyConfig(model=_run_model(), seed=RUN_SEED)
    )
    """The language model of recipes that generate nothing: sft, dpo."""
    reward_model: PreferenceConfig = field(
        default_factory=lambda: PreferenceConfig(
            model=replace(_run_model(), new_head=True), seed=RUN_SEED
        )
    )
    """The model that recipes.reward_model and recipes.cost_model train; `reward` is the frozen
    one that reinforcement learning asks."""
    environment: Any = None
    """package.module:name of an environment that the policy acts in, in many turns: an async
    function of (model, task), a class with reset and step, or a class whose methods are tools
    (docs/agents.md); from Python also the function or class itself. null: a response answers its
    prompt."""
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(seed=RUN_SEED))
    asynchrony: AsynchronyConfig = field(default_factory=AsynchronyConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    metrics: MetricsConfig = field(
        default_factory=lambda: MetricsConfig(
            console_metrics=["reward/mean", "kl/reference", "tokens_per_s"]
        )
    )
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    plan: MapperConfig = field(default_factory=MapperConfig)
    seed: int = 0
    """Everything random follows it, and can be set apart: data.seed (order of the rows),
    algorithm.seed (mini-batches), actor.seed (sampling), critic.seed, cost_critic.seed and
    reward_model.seed (new heads), policy.seed, judge.seed."""
    output_dir: str = "outputs/run"
    """Metrics, checkpoints, plots and the config itself."""
    graph: bool = False
    """Print the algorithm's dataflow (Mermaid) and stop."""
    dry_run: bool = False
    """Check config, model, data, layouts, dataflow and memory, say what would run where and in
    how many seconds, and stop."""

    def __post_init__(self) -> None:
        """A tree made in Python refers to its own settings as one made by Hydra does: a critic
        starts from model.path, samples are drawn with seed. Paths are expanded."""
        if not self.call_timeout_s > 0:
            raise ValueError(f"call_timeout_s is {self.call_timeout_s}; use more than 0")
        if self.cpus_per_device < 0 or self.threads_per_device < 0:
            raise ValueError(
                f"cpus_per_device is {self.cpus_per_device} and threads_per_device "
                f"{self.threads_per_device}; use 0 or more"
            )
        resolve_references(self, self)
        check_seeds(self)
        check_numbers(self)
        expand_paths(self, ["output_dir"], PATHS)


PATHS: PathFields = {
    ModelConfig: ("path", "tokenizer"),
    LoraConfig: ("adapter",),
    DataConfig: ("train", "validation", "pretraining", "chat_template"),
    LoopConfig: ("resume",),
    ClusterConfig: ("working_dir",),
    MapperConfig: ("cluster", "calibration", "mapping"),
}
LARGEST_SEED = 2**63 - 1
LIMITS = ("_s", "clip", "clip_high", "max_ratio", "high", "maximum")
"""Ends of the names of settings that are limits: infinity lets everything through."""
REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def resolve_references(node: Any, root: RunConfig) -> None:
    """Replaces every "${name}" below `node` by the setting of that name."""
    for field_ in fields(node):
        value = vars(node)[field_.name]
        if is_dataclass(value):
            resolve_references(value, root)
        elif isinstance(value, str) and (reference := REFERENCE.fullmatch(value)):
            setting: Any = root
            for name in reference[1].split("."):
                setting = vars(setting)[name]
            vars(node)[field_.name] = setting


def check_seeds(node: Any, prefix: str = "") -> None:
    """A ValueError for a setting called seed, of the run or of a part, that libraries can't take:
    they store it in 63 bits."""
    for field_ in fields(node):
        value = vars(node)[field_.name]
        if is_dataclass(value):
            check_seeds(value, f"{prefix}{field_.name}.")
        elif field_.name == "seed" and not 0 <= value <= LARGEST_SEED:
            raise ValueError(f"{prefix}seed is {value}; choose 0 to {LARGEST_SEED} (2**63 - 1)")


def check_numbers(node: Any, prefix: str = "") -> None:
    """A ValueError for NaN, which is neither above nor below any limit, for infinity where it is no
    limit, and for whole numbers beyond 63 bits."""
    for field_ in fields(node):
        name, value = field_.name, vars(node)[field_.name]
        if is_dataclass(value):
            check_numbers(value, f"{prefix}{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            if math.isnan(value) or value < 0 or not name.endswith(LIMITS):
                raise ValueError(f"{prefix}{name} is {value}; use a finite number")
        elif isinstance(value, int) and abs(value) > LARGEST_SEED:
            raise ValueError(f"{prefix}{name} is {value}; use a number of at most 63 bits")


def register() -> None:
    """Makes the schema and the algorithms, those of other packages too, known to Hydra. What it
    knows already stays: OmegaConf takes long to build a tree of settings."""
    store = ConfigStore.instance()
    if not _is_stored(store.repo, "schema", RunConfig):
        store.store(name="schema", node=RunConfig)
    for name, entry in usable_algorithms().items():
        kind = entry.load_config()
        if not _is_stored(store.repo.get("algorithm", {}), name, kind):
            store.store(group="algorithm", name=name, node=kind(seed=RUN_SEED))


def _is_stored(repository: dict[str, Any], name: str, kind: type) -> bool:
    stored = repository.get(f"{name}.yaml")
    return stored is not None and OmegaConf.get_type(stored.node) is kind
