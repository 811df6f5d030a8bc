"""The roles that a run can have, by name: which worker plays each and where its settings stand.

An algorithm's entry (controllers/__init__.py) names the ones that it uses. A new role is a line in
ROLES and a field of RunConfig.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from controllers import algorithm_entry
from hybridflow.batch import Batch
from hybridflow.mapping.search.setting import GENERATION
from hybridflow.registry import Registry
from hybridflow.wording import kind_of
from hybridflow.worker import Worker
from recipes.config import NO_MODEL, RunConfig
from workers.actor import ActorWorker
from workers.agents.config import EpisodeActorConfig, EpisodeScorerConfig
from workers.agents.interfaces import environment_name
from workers.agents.workers import (
    EpisodeActorWorker,
    EpisodeGenerationWorker,
    EpisodeGeneratorWorker,
    EpisodeRewardWorker,
)
from workers.critic import CriticWorker
from workers.engines.base import Head
from workers.generator import GeneratorWorker
from workers.judge import judge_worker
from workers.policy import PolicyWorker
from workers.preference import PreferenceWorker
from workers.reference import ReferenceWorker
from workers.reward import cost_worker, reward_worker
from workers.reward_function import function_name
from workers.rewards.combined import combined
from workers.role_config import (
    ActorConfig,
    JudgeRoleConfig,
    RewardConfig,
    ScorerConfig,
    StreamingActorConfig,
)
from workers.split_actor import GenerationWorker

GENERATOR = "generator"
"""The role of a recipe that only generates."""


class NoReference:
    """Stands for a reference that no coefficient asks for: its column is simply not there."""

    def compute_ref_log_prob(self, batch: Batch) -> Batch:
        return Batch({}, len(batch))


def always(config: RunConfig) -> bool:
    return True


def uses_reference(config: RunConfig) -> bool:
    return config.algorithm.needs_reference or config.actor.loss.kl_coefficient != 0


def kl_settings(config: RunConfig) -> str:
    """The coefficients of a KL to the reference."""
    in_loss = "actor.loss.kl_coefficient above 0"
    if "kl" in vars(config.algorithm):
        return f"algorithm.kl.coefficient or {in_loss}"
    return in_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleKind:
    """How a role comes into being."""

    settings: Callable[[RunConfig], Any]
    worker: Callable[[Any], type[Worker]]
    """Its class, given those settings."""
    head: Head
    """The head of its model, where it has one."""
    needed: Callable[[RunConfig], bool] = always
    absent: Callable[[], Any] | None = None
    """Makes what stands in its place where it is not needed."""
    asked_by: Callable[[RunConfig], str] = str
    """The settings that would need it, in words, where it is not needed."""


def actor_settings(config: RunConfig) -> ActorConfig:
    """The actor's settings, with the environment where the run has one, and with what becomes of
    rows in flight where responses are drawn ahead."""
    settings = vars(config.actor)
    if config.asynchrony.staleness:
        settings = settings | {"in_flight": config.asynchrony.in_flight}
    if config.environment is not None:
        return EpisodeActorConfig(
            **settings,
            environment=config.environment,
            episode=config.episode,
            date=config.data.date,
        )
    if config.asynchrony.staleness:
        return StreamingActorConfig(**settings)
    return config.actor


def reward_settings(config: RunConfig) -> ScorerConfig:
    """The reward's settings; with an environment, which gives rewards itself, it may have neither a
    function nor a model."""
    settings = scorer_settings(config, config.reward)
    if config.environment is None:
        return settings
    return EpisodeScorerConfig(**vars(settings))


def generating(plain: type[Worker], episodes: type[Worker]) -> Callable[[Any], type[Worker]]:
    """The class of a worker that generates, given its settings."""

    def worker(config: Any) -> type[Worker]:
        return episodes if isinstance(config, EpisodeActorConfig) else plain

    return worker


def worker_of_reward(config: Any) -> type[Worker]:
    """The class of the reward's worker, given its settings."""
    if isinstance(config, EpisodeScorerConfig):
        return EpisodeRewardWorker
    return reward_worker(config)


def scorer_settings(config: RunConfig, scorer: RewardConfig, name: str = "reward") -> ScorerConfig:
    """The settings of the role `name` with the policy's model, the parts as one function, and no
    model where none is named."""
    changes: dict[str, Any] = {"parts": {}, "policy": config.model}
    if scorer.parts:
        changes["function"] = combined(scorer.parts, name)
    if scorer.model is not None and scorer.model.path == NO_MODEL:
        changes["model"] = None
    return ScorerConfig(**(vars(scorer) | changes))


@dataclass(frozen=True, kw_only=True)
class Role:
    """One model of the run: which worker, with which settings, in which pool."""

    name: str
    worker: type[Worker]
    config: Any
    pool: str

    @property
    def section(self) -> str:
        """Where its settings stand."""
        return section_of(self.name)


ROLES: dict[str, RoleKind] = {
    "actor": RoleKind(
        settings=actor_settings, worker=generating(ActorWorker, EpisodeActorWorker), head=Head.lm
    ),
    GENERATION: RoleKind(
        settings=actor_settings,
        worker=generating(GenerationWorker, EpisodeGenerationWorker),
        head=Head.lm,
    ),
    "critic": RoleKind(
        settings=lambda config: config.critic, worker=lambda _: CriticWorker, head=Head.value
    ),
    "cost_critic": RoleKind(
        settings=lambda config: config.cost_critic, worker=lambda _: CriticWorker, head=Head.value
    ),
    "reference": RoleKind(
        settings=lambda config: config.reference,
        worker=lambda _: ReferenceWorker,
        head=Head.lm,
        needed=uses_reference,
        absent=NoReference,
        asked_by=kl_settings,
    ),
    "judge": RoleKind(
        settings=lambda config: JudgeRoleConfig(
            **vars(config.judge), policy=config.model, date=config.data.date
        ),
        worker=judge_worker,
        head=Head.lm,
    ),
    GENERATOR: RoleKind(
        settings=actor_settings,
        worker=generating(GeneratorWorker, EpisodeGeneratorWorker),
        head=Head.lm,
    ),
    "policy": RoleKind(
        settings=lambda config: config.policy, worker=lambda _: PolicyWorker, head=Head.lm
    ),
    "reward_model": RoleKind(
        settings=lambda config: config.reward_model,
        worker=lambda _: PreferenceWorker,
        head=Head.score,
    ),
    "teacher": RoleKind(
        settings=lambda config: config.teacher, worker=lambda _: ReferenceWorker, head=Head.lm
    ),
    "reward": RoleKind(
        settings=reward_settings,
        worker=worker_of_reward,
        head=Head.score,
    ),
    "gold": RoleKind(
        settings=lambda config: scorer_settings(config, config.gold, "gold"),
        worker=reward_worker,
        head=Head.score,
    ),
    "cost": RoleKind(
        settings=lambda config: scorer_settings(config, config.cost, "cost"),
        worker=cost_worker,
        head=Head.score,
    ),
}


EXTENSIONS = Registry(group="hybridflow.roles", builtin={})
"""Roles of other packages, each a RoleKind. Its settings are of a class in
workers/role_config.py."""
REGISTERED: dict[str, RoleKind] = {}
"""Roles of this process: register_role()."""

SCORERS = ("reward", "gold", "cost")
"""Roles that may be a function of a row's columns in place of a model."""


def with_named_functions(config: RunConfig) -> RunConfig:
    """The same settings with names in the place of functions that were passed as objects: what
    is written beside the run."""

    def named(scorer: RewardConfig) -> RewardConfig:
        if scorer.function is None:
            return scorer
        return replace(scorer, function=function_name(scorer.function))

    environment = config.environment
    if environment is not None:
        environment = environment_name(environment)
    return replace(
        config,
        reward=named(config.reward),
        gold=named(config.gold),
        cost=named(config.cost),
        environment=environment,
    )


def role_names(config: RunConfig) -> tuple[str, ...]:
    """The algorithm's roles, and the reward that validation scores with, whether the algorithm
    reads it or not."""
    entry = algorithm_entry(config.algorithm.name)
    if not entry.answers_prompts or not config.data.validation:
        return entry.roles
    gold = scorer_settings(config, config.gold, "gold")
    has_gold = gold.function is not None or gold.model is not None
    scorers = ("reward", "gold") if has_gold else ("reward",)
    return (*entry.roles, *(name for name in scorers if name not in entry.roles))


def register_role(name: str, kind: RoleKind) -> None:
    """Adds a role from a script or notebook, as register_algorithm() adds the algorithm that names
    it. A ValueError for what is no RoleKind, or whose name another role has; a cell that is run
    again may register its role again."""
    if not isinstance(kind, RoleKind):
        raise ValueError(
            f"role {name!r} is {kind_of(kind)} ({str(kind)[:60]!r}); register a RoleKind"
        )
    if name in ROLES:
        raise ValueError(f"role {name!r} is built in; register yours under another name")
    other = EXTENSIONS.locations().get(name)
    if other is not None:
        raise ValueError(
            f"role {name!r} is {other} of an installed package; register yours under another name"
        )
    known = REGISTERED.get(name)
    if known is not None and places_of(known) != places_of(kind):
        raise ValueError(
            f"role {name!r} is registered with the worker {known.worker.__module__}:"
            f"{known.worker.__qualname__}; register yours under another name"
        )
    REGISTERED[name] = kind


def places_of(kind: RoleKind) -> list[tuple[str, str]]:
    """Where its functions are defined: the same for a cell that is run again."""
    return [(call.__module__, call.__qualname__) for call in (kind.settings, kind.worker)]


def section_of(name: str) -> str:
    """Where the settings of the role `name` stand: a generator's are the actor's."""
    return "actor" if name == GENERATOR else name


def role_kind(name: str) -> RoleKind:
    """The role that an algorithm's entry names; a ValueError for an unknown one lists the known
    ones."""
    if name in ROLES:
        return ROLES[name]
    if name in REGISTERED:
        return REGISTERED[name]
    if name not in EXTENSIONS:
        raise ValueError(
            f"role {name!r} of an algorithm is unknown; known: "
            f"{', '.join([*ROLES, *REGISTERED, *EXTENSIONS])}; declare it as an entry point of the "
            f"group {EXTENSIONS.group}, or register it (recipes.roles.register_role)"
        )
    kind = EXTENSIONS.load(name, f"role {name}")
    if not isinstance(kind, RoleKind):
        raise ValueError(
            f"role {name}: {EXTENSIONS.locations()[name]} is no recipes.roles.RoleKind"
        )
    return kind
