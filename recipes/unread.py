"""check_unread(): settings whose reader another setting has switched off, such as asynchrony.look_ahead
in a run that draws nothing ahead.

Whoever sets one expects an effect, so that it is a ValueError with field, value and fix. Leaves out
the settings of models that a recipe does not have (main.py warns of them), losses and adapters
(checks.py), and a judge's words (workers/role_config.py).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from controllers import QUESTIONS, algorithm_entry
from controllers.algorithm_base import AlgorithmConfig
from recipes.config import NO_MODEL, PlacementMode, RunConfig
from recipes.roles import role_kind, role_names, section_of
from workers.config import LearningRateSchedule, OnNonfinite
from workers.engines import ENGINES
from workers.losses.aggregation import Aggregation
from workers.role_config import (
    Consistency,
    JudgeConfig,
    RewardConfig,
    VerdictKind,
)

LOGGER = logging.getLogger(__name__)
TRAINED = ("actor", "critic", "cost_critic", "policy", "reward_model")
DRAWS = ("temperature", "top_p", "top_k", "min_p")
"""Settings of sampling that choose among tokens."""
OF_VLLM = (
    "max_num_batched_tokens",
    "block_size",
    "enforce_eager",
    "prefix_caching",
    "release_during_training",
)
"""Settings of ROLE.generation that engine hf does not read."""
OF_ENGINES = {
    "reshard_after_forward": "fsdp",
    "pipeline_schedule": "threed",
    "virtual_stages": "threed",
    "zero_stage": "deepspeed",
}
"""Setting of ROLE.train -> the training engine that reads it."""


@dataclass(frozen=True, slots=True)
class Unread:
    """Unread("loop.stop_at_reward", "without data.validation", "set data.validation")"""

    name: str
    """A setting, or a group of settings."""
    why: str
    """With what, or without what, nothing reads it."""
    fix: str
    """The way to have it read."""
    speed_alone: bool = False
    """It changes speed and memory and never results, so that it is told of and not refused."""


def check_unread(config: RunConfig) -> None:
    """A ValueError for the first setting that has another value than its default and no reader."""
    defaults = defaults_of(type(config.algorithm))
    for unread in unread_settings(config):
        settings = value_of(config, unread.name)
        for name, value, default in leaves(settings, unread.name, defaults):
            # A recorded run has what auto was on its machine in the place of auto.
            if value != default and not name.endswith(".precision"):
                shown = value.value if isinstance(value, Enum) else value
                problem = (
                    f"{name} is {shown!r}, which nothing reads {unread.why}; {unread.fix}, or "
                    "leave it out"
                )
                if not unread.speed_alone:
                    raise ValueError(problem)
                LOGGER.warning("%s", problem)


def unread_settings(config: RunConfig) -> Iterator[Unread]:
    """Everything that the run's other settings have switched off."""
    names = set()
    for name in role_names(config):
        if role_kind(name).needed(config):
            names.add(section_of(name))
    yield from _of_the_run(config)
    yield from _of_sampling(config, names)
    for name in sorted(names & set(vars(config))):
        settings = vars(config)[name]
        if name in TRAINED:
            yield from _of_optimizer(config, name)
        if "generation" in vars(settings) and settings.generation.engine == "hf":
            for field in OF_VLLM:
                yield Unread(
                    f"{name}.generation.{field}",
                    f"with {name}.generation.engine=hf",
                    f"set {name}.generation.engine=vllm",
                    speed_alone=True,
                )
        if "train" in vars(settings):
            yield from _of_engine(name, settings.train.engine)
        if isinstance(settings, JudgeConfig):
            yield from _of_judge(name, settings)
        if isinstance(settings, RewardConfig):
            yield from _of_scorer(name, settings)
        if (
            name in ("critic", "cost_critic")
            and settings.loss.aggregation is not Aggregation.constant
        ):
            aggregation = f"{name}.loss.aggregation"
            yield Unread(
                f"{aggregation}_constant",
                f"with {aggregation}={settings.loss.aggregation.value}",
                f"set {aggregation}=constant",
            )


def _of_the_run(config: RunConfig) -> Iterator[Unread]:
    if config.asynchrony.staleness == 0:
        for field in ("look_ahead", "in_flight", "slice_steps"):
            yield Unread(
                f"asynchrony.{field}",
                "with asynchrony.staleness=0",
                "set asynchrony.staleness=1",
                speed_alone=field == "slice_steps",
            )
    trains, name = config.algorithm.name not in QUESTIONS, config.algorithm.name
    if not algorithm_entry(name).answers_prompts:
        yield Unread(
            "algorithm.samples_per_prompt",
            f"in {name}, which generates nothing",
            "run grpo or dapo",
        )
    if not trains:
        yield Unread(
            "algorithm.num_mini_batches", f"in {name}, which trains nothing", "run grpo or ppo"
        )
    if trains and not config.data.validation:
        for field in ("stop_at_reward", "validation_sampling", "validate_every"):
            if field != "validate_every" or config.loop.validate_every:  # 0 asks for none
                yield Unread(f"loop.{field}", "without data.validation", "set data.validation")
    if name == "generate":
        yield Unread("data.validation", "in generate, which answers data.train", "set data.train")
    yield Unread("model.new_head", "of the policy's model", "set reward_model.model.new_head")
    places = (config.model.path, config.model.tokenizer or config.model.path)
    if all(Path(place).is_dir() for place in places):
        yield Unread(
            "model.revision", f"with the directory {config.model.path}", "name a model of the hub"
        )
    if not config.data.pretraining:
        for field in ("column", "batch_size", "tokens"):
            yield Unread(
                f"data.pretraining_{field}", "without data.pretraining", "set data.pretraining"
            )
    if config.placement is not PlacementMode.auto:
        where = f"with placement={config.placement.value}"
        for field in ("mapping", "split_generation", "node_resources"):
            yield Unread(f"plan.{field}", where, "set placement=auto")
    if config.actor.consistency is Consistency.off:
        yield Unread(
            "actor.consistency_tolerance",
            "with actor.consistency=off",
            "set actor.consistency=warn or error",
        )


def _of_sampling(config: RunConfig, names: set[str]) -> Iterator[Unread]:
    """Among tokens nothing is chosen where the most likely one is taken. The temperature of a
    policy that is trained is that of its log-probs too."""
    trains = config.algorithm.name not in QUESTIONS
    samplings: dict[str, tuple[str, ...]] = {"loop.validation_sampling": DRAWS}
    if "actor" in names:
        samplings["actor.generation.sampling"] = DRAWS[1:] if trains else DRAWS
    if "judge" in names:
        samplings["judge.generation.sampling"] = DRAWS
    for name, fields in samplings.items():
        if value_of(config, name).greedy:
            for field in fields:
                yield Unread(
                    f"{name}.{field}", f"with {name}.greedy=true", f"set {name}.greedy=false"
                )
    training, validation = config.actor.generation.sampling, config.loop.validation_sampling
    if trains and validation.max_response_tokens != training.max_response_tokens:
        yield Unread(
            "loop.validation_sampling.max_response_tokens",
            "beside that of training",
            "set actor.generation.sampling.max_response_tokens",
        )


def _of_optimizer(config: RunConfig, role: str) -> Iterator[Unread]:
    name, optimizer = f"{role}.train.optimizer", vars(config)[role].train.optimizer
    if optimizer.schedule is LearningRateSchedule.constant:
        for field in ("total_steps", "min_learning_rate_fraction"):
            yield Unread(
                f"{name}.{field}",
                f"with {name}.schedule=constant",
                f"set {name}.schedule=linear or cosine",
            )
    if optimizer.on_nonfinite is OnNonfinite.stop:
        yield Unread(
            f"{name}.max_nonfinite",
            f"with {name}.on_nonfinite=stop",
            f"set {name}.on_nonfinite=skip or rewind",
        )


def _of_engine(role: str, engine: str) -> Iterator[Unread]:
    """An engine of another package reads what it likes."""
    for field, reader in OF_ENGINES.items():
        if engine in ENGINES.builtin and engine != reader:
            name = f"{role}.train"
            yield Unread(
                f"{name}.{field}", f"with {name}.engine={engine}", f"set {name}.engine={reader}"
            )


def _of_judge(role: str, settings: JudgeConfig) -> Iterator[Unread]:
    other, fields = VerdictKind.written, ("generation",)
    if settings.verdict is VerdictKind.written:
        other, fields = VerdictKind.probability, ("train",)
    for field in fields:
        yield Unread(
            f"{role}.{field}",
            f"with {role}.verdict={settings.verdict.value}",
            f"set {role}.verdict={other.value}",
        )


def _of_scorer(name: str, settings: RewardConfig) -> Iterator[Unread]:
    """A function has no model to lay out; a model is called as it is."""
    if settings.function is not None or settings.parts:
        yield Unread(f"{name}.train", f"with {name}.function", f"set {name}.model.path")
    elif settings.model is not None and settings.model.path != NO_MODEL:
        for field in ("timeout_s", "retries", "num_tasks", "sandbox"):
            yield Unread(f"{name}.{field}", f"with {name}.model.path", f"set {name}.function")


def value_of(config: RunConfig, name: str) -> Any:
    """The setting or group of that name."""
    value: Any = config
    for part in name.split("."):
        value = vars(value)[part]
    return value


def leaves(value: Any, name: str, defaults: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, default) of a setting, or of every setting of a group."""
    if is_dataclass(value):
        for field, inner in vars(value).items():
            yield from leaves(inner, f"{name}.{field}", defaults)
    else:
        yield name, value, value_of(defaults, name)


def defaults_of(algorithm: type[AlgorithmConfig]) -> RunConfig:
    """The settings of a run of that algorithm before anybody sets one."""
    return RunConfig(algorithm=algorithm())
