"""What can be known of a run before anything starts: names and sizes of every role's settings.

Every problem is a ValueError with field, value and fix. Leaves out what others check: values of
single fields (the dataclasses), generation (generation_checks.py), whether the models fit their
layouts (model_checks.py), settings without a reader (unread.py), data (controllers/data), whether
data, models and functions fit each other (compatibility.py), columns
(hybridflow/tracing.py), the machines (cluster/connect.py).
"""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from controllers import ALGORITHMS, AlgorithmEntry
from hybridflow.checkpoint import MANIFEST
from hybridflow.dataflow import CallKind, Dataflow
from hybridflow.layout import AXES
from recipes.config import NO_MODEL, RunConfig, Runtime
from recipes.engine_facts import check_library
from recipes.generation_checks import check_generation
from recipes.roles import GENERATOR, section_of
from recipes.untrained import check_untrained
from workers.agents.config import EpisodeActorConfig, EpisodeScorerConfig
from workers.config import (
    ContextExchange,
    LearningRateSchedule,
    LoraConfig,
    TrainConfig,
)
from workers.engines import ENGINES, engine_class
from workers.engines.shared.optimizer import check_optimizer_config
from workers.generation import generation_engine_class
from workers.generation.sampling import check_sampling
from workers.losses.aggregation import Aggregation
from workers.losses.config import (
    Correction,
    OldPolicy,
    PolicyLossConfig,
    RolloutCorrectionConfig,
)
from workers.losses.surrogates import POLICY_LOSSES, surrogate
from workers.reward_function import resolve
from workers.role_config import (
    ActorConfig,
    AdapterSync,
    CriticConfig,
    JudgeConfig,
    PolicyConfig,
    PreferenceConfig,
    ReferenceConfig,
    RewardConfig,
    RouterReplay,
)

RoleConfig = (
    ActorConfig
    | CriticConfig
    | JudgeConfig
    | PolicyConfig
    | PreferenceConfig
    | ReferenceConfig
    | RewardConfig
)


def check_settings(role: str, config: RoleConfig) -> None:
    """Names and values of one role; reads no file, save the reward function's module."""
    trains, role = role != GENERATOR, section_of(role)
    if isinstance(config, RewardConfig) and config.function is not None:
        resolve(config.function, role)
        return
    if isinstance(config, EpisodeScorerConfig) and config.model is None:
        return
    assert config.model is not None, "is_function() saw to it"
    if config.model.path == NO_MODEL:
        raise ValueError(
            f"{role}.model.path is not set; give the directory or hub name of its model"
        )
    check_train(f"{role}.train", config.train)
    if trains and config.train.packing and config.model.attention in ("eager", "flex_attention"):
        raise ValueError(
            f"{role}.model.attention is {config.model.attention!r}, which would need a mask over "
            f"whole packed rows; set {role}.model.attention=auto or {role}.train.packing=false"
        )
    if isinstance(config, ReferenceConfig | RewardConfig | JudgeConfig):
        check_untrained(role, config.train)
    if isinstance(config, ActorConfig):
        check_loss(config.loss)
        check_generation("actor", config.generation)
    if isinstance(config, JudgeConfig):
        check_generation("judge", config.generation)
        if config.generation.release_during_training:
            raise ValueError(
                "judge.generation.release_during_training is true, which nothing reads: only the "
                "actor trains; leave it out"
            )
    if isinstance(config, ActorConfig):
        check_adapter_sync(role, config)
        check_router_replay(role, config)
    if not trains and config.train.lora.enabled:
        raise ValueError(
            "actor.train.lora is set, but a recipe that only generates takes whole models; merge the "
            "adapter (python -m recipes.merge) and set model.path to the result"
        )
    if isinstance(config, ActorConfig):
        check_tolerances(role, config)
    if isinstance(config, ActorConfig) and config.critic_warmup_steps < 0:
        raise ValueError(
            f"{role}.critic_warmup_steps is {config.critic_warmup_steps}; use 0 or more"
        )
    if isinstance(config, ActorConfig | CriticConfig) and config.num_epochs < 1:
        raise ValueError(f"{role}.num_epochs is {config.num_epochs}; use at least 1")
    if isinstance(config, PolicyConfig) and config.passes_per_batch < 1:
        raise ValueError(f"{role}.passes_per_batch is {config.passes_per_batch}; use at least 1")


def check_tolerances(role: str, config: ActorConfig) -> None:
    """A difference that counts as rounding is no less than 0; -1 stands for the precision's own."""
    for name in ("probe_tolerance", "consistency_tolerance"):
        value = vars(config)[name]
        if value < 0 and value != -1:
            raise ValueError(
                f"{role}.{name} is {value}; use 0 or more, or -1 for that of the precision"
            )


def check_adapter_sync(role: str, config: ActorConfig) -> None:
    """It is set where there is an adapter only."""
    if not config.train.lora.enabled and config.adapter_sync is not AdapterSync.auto:
        raise ValueError(
            f"{role}.adapter_sync is {config.adapter_sync.value}, which nothing reads without an "
            f"adapter; set {role}.train.lora.rank, or leave it out"
        )


def check_router_replay(role: str, config: ActorConfig) -> None:
    """Whether routes can be recorded where router_replay wants them; the model is not read."""
    if config.router_replay is not RouterReplay.R3:
        return
    name = f"{role}.router_replay is R3"
    if isinstance(config, EpisodeActorConfig):
        raise ValueError(f"{name}, but episodes with an environment keep no routes; use R2")
    generation = config.generation
    if not generation_engine_class(generation.engine).records:
        raise ValueError(
            f"{name}, but engine {generation.engine} of {role}.generation does not record routes; use "
            "R2"
        )
    if generation.pp > 1:
        raise ValueError(
            f"{name} with {role}.generation.pp={generation.pp}, where each rank sees the routes of its "
            "own layers; set pp=1, or use R2"
        )


def check_train(field: str, config: TrainConfig) -> None:
    """`field` is the setting's name, such as actor.train."""
    engine = engine_class(config.engine, f"{field}.engine")
    check_library(f"{field}.engine", config.engine, engine.library, ENGINES)
    if sorted(config.rank_order) != sorted(AXES):
        raise ValueError(
            f"{field}.rank_order is {config.rank_order}; it must name each of {', '.join(AXES)} "
            "once, outermost first"
        )
    for name in ("tp", "pp", "cp", "ep"):
        if vars(config)[name] < 1:
            raise ValueError(f"{field}.{name} is {vars(config)[name]}; use at least 1")
    if config.ep > 1 and not engine.divides_experts:
        usable = [name for name in ENGINES.builtin if engine_class(name).divides_experts]
        raise ValueError(
            f"{field}.ep is {config.ep}, but engine {config.engine!r} has all experts on every rank; "
            f"set ep=1, or {field}.engine to {' or '.join(usable)}"
        )
    if config.cp > 1 and not engine.shares_rows:
        usable = [name for name in ENGINES.builtin if engine_class(name).shares_rows]
        raise ValueError(
            f"{field}.cp is {config.cp}, but engine {config.engine!r} computes whole rows; set cp=1, "
            f"or {field}.engine to {' or '.join(usable)}"
        )
    unread = {
        "cp_exchange": config.cp_exchange is not ContextExchange.auto,
        "cp_by_length": config.cp_by_length,
    }
    for name, is_set in unread.items():
        if is_set and config.cp == 1:
            raise ValueError(
                f"{field}.{name} is set, which nothing reads with cp=1; set {field}.cp, or leave it "
                "out"
            )
    if config.micro_batch_tokens < 0:
        raise ValueError(
            f"{field}.micro_batch_tokens is {config.micro_batch_tokens}; use at least 1, or 0, "
            "which chooses"
        )
    check_lora(f"{field}.lora", config)
    optimizer = config.optimizer
    for name, value in vars(optimizer).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{field}.optimizer.{name} is {value}; use a finite number")
    # The run's own length, which is not known before the data is read.
    if not optimizer.total_steps:
        optimizer = replace(optimizer, schedule=LearningRateSchedule.constant)
    try:
        check_optimizer_config(optimizer)
    except ValueError as error:
        raise ValueError(f"{field}.{error}") from None


def check_lora(field: str, config: TrainConfig) -> None:
    """The adapter's numbers, and that the engine trains it; its layers are held against the model
    in check_model."""
    lora, defaults = config.lora, LoraConfig()
    if lora.rank < 0:
        raise ValueError(f"{field}.rank is {lora.rank}; use 1 or more, or 0 for no adapter")
    if not (lora.alpha > 0 and math.isfinite(lora.alpha)):
        raise ValueError(f"{field}.alpha is {lora.alpha}; use more than 0")
    changed = [name for name, value in vars(lora).items() if value != vars(defaults)[name]]
    if not lora.enabled and changed:
        raise ValueError(
            f"{field}.{changed[0]} is {vars(lora)[changed[0]]!r}, which nothing reads without an "
            f"adapter; set {field}.rank, or leave it out"
        )
    if lora.adapter is not None and changed != ["adapter"]:
        other = next(name for name in changed if name != "adapter")
        raise ValueError(
            f"{field}.{other} and {field}.adapter are both set, and the adapter's files decide "
            f"{other}; leave one out"
        )
    if lora.enabled and not engine_class(config.engine).trains_adapters:
        usable = [name for name in ENGINES.builtin if engine_class(name).trains_adapters]
        raise ValueError(
            f"{field} is set, but engine {config.engine!r} trains no adapters; set "
            f"{field.removesuffix('.lora')}.engine to {' or '.join(usable)}"
        )


def check_loss(loss: PolicyLossConfig) -> None:
    """The name is known, and every value that was set is read by something."""
    read = surrogate(loss.name).settings
    defaults = vars(PolicyLossConfig())
    for name, losses in _readers_of_loss_settings().items():
        if vars(loss)[name] != defaults[name] and name not in read:
            fix = f"actor.loss.name={losses[0]}"
            if len(losses) > 1:
                fix = f"actor.loss.name to one of {', '.join(losses)}"
            _refuse_unread(name, vars(loss)[name], fix)
    if loss.aggregation_constant and loss.aggregation is not Aggregation.constant:
        _refuse_unread(
            "aggregation_constant", loss.aggregation_constant, "actor.loss.aggregation=constant"
        )
    correction = loss.rollout_correction
    changed = [
        name
        for name, default in vars(RolloutCorrectionConfig()).items()
        if vars(correction)[name] != default
    ]
    if loss.old_policy is OldPolicy.rollout and changed:
        _refuse_unread(
            f"rollout_correction.{changed[0]}",
            vars(correction)[changed[0]],
            "actor.loss.old_policy=recomputed",
        )
    if correction.correction is Correction.none and changed:
        _refuse_unread(
            f"rollout_correction.{changed[0]}",
            vars(correction)[changed[0]],
            "actor.loss.rollout_correction.correction=truncate or mask",
        )


def _readers_of_loss_settings() -> dict[str, list[str]]:
    """Each setting that only some policy losses read -> the built-in ones that do."""
    readers: dict[str, list[str]] = {}
    for loss in POLICY_LOSSES.builtin:
        for name in surrogate(loss).settings:
            readers.setdefault(name, []).append(loss)
    return readers


def _refuse_unread(name: str, value: object, fix: str) -> None:
    raise ValueError(
        f"actor.loss.{name} is {value}, which nothing reads; set {fix}, or leave it out"
    )


def check_loss_columns(name: str, dataflow: Dataflow) -> None:
    """The update gets what its loss reads."""
    updates = [
        call for call in dataflow.calls if call.kind is CallKind.training and call.role == "actor"
    ]
    for column in surrogate(name).columns:
        if all(column in call.reads for call in updates):
            continue
        writers = [
            known for known, entry in ALGORITHMS.items() if name in entry.load_config().losses
        ]
        usable = [known for known in POLICY_LOSSES.builtin if not surrogate(known).columns]
        run = f"run python -m recipes.{' or recipes.'.join(writers)}, or " if writers else ""
        raise ValueError(
            f"actor.loss.name is {name!r}, which reads {column}, and {dataflow.algorithm} does "
            f"not write it; {run}use one of {', '.join(usable)}"
        )


def check_algorithm(config: RunConfig, entry: AlgorithmEntry) -> None:
    """Settings of the actor and the data against what the algorithm is and has."""
    algorithm, loss = config.algorithm, config.actor.loss
    if type(algorithm) is not entry.load_config():
        raise ValueError(
            f"algorithm.name is {algorithm.name!r}, but the settings are those of another recipe's "
            f"algorithm ({type(algorithm).__name__}); run python -m recipes.{algorithm.name}"
        )
    if algorithm.losses and loss.name not in algorithm.losses:
        raise ValueError(
            f"actor.loss.name is {loss.name!r}, but {algorithm.name} is trained with "
            f"{' or '.join(algorithm.losses)}; set actor.loss.name={algorithm.losses[0]}, or run "
            f"python -m recipes.{algorithm.name}, which does"
        )
    if loss.kl_coefficient and "reference" not in entry.roles:
        raise ValueError(
            f"actor.loss.kl_coefficient is {loss.kl_coefficient}, but {algorithm.name} has no "
            "reference; set it to 0"
        )
    if config.actor.critic_warmup_steps and "critic" not in entry.roles:
        raise ValueError(
            f"actor.critic_warmup_steps is {config.actor.critic_warmup_steps}, but "
            f"{algorithm.name} has no critic; set it to 0"
        )
    try:
        check_sampling(config.loop.validation_sampling)
    except ValueError as error:
        raise ValueError(f"loop.validation_{error}") from None
    num_rows = config.data.batch_size * algorithm.samples_per_prompt
    if algorithm.num_mini_batches > num_rows:
        raise ValueError(
            f"algorithm.num_mini_batches is {algorithm.num_mini_batches}, but a step has "
            f"{num_rows} rows (data.batch_size x algorithm.samples_per_prompt); lower it, or "
            "raise data.batch_size"
        )
    if (
        config.data.pretraining is None
        and loss.pretraining_coefficient != PolicyLossConfig().pretraining_coefficient
    ):
        raise ValueError(
            f"actor.loss.pretraining_coefficient is {loss.pretraining_coefficient}, which nothing "
            "reads; set data.pretraining, or leave it out"
        )
    if config.data.pretraining is not None and "pretraining" not in entry.streams:
        usable = [name for name, known in ALGORITHMS.items() if "pretraining" in known.streams]
        raise ValueError(
            f"data.pretraining is {config.data.pretraining!r}, but {algorithm.name} trains on no "
            f"text; set it to null, or use {' or '.join(usable)}"
        )


def check_metrics(config: RunConfig) -> None:
    """Prometheus is served by Ray."""
    if config.metrics.prometheus and config.runtime is Runtime.local:
        raise ValueError(
            "metrics.prometheus is true with runtime=local, which starts no Ray that would serve it; set "
            "runtime=ray, or metrics.prometheus=false"
        )


def check_output(directory: str) -> None:
    """Whether output_dir can be made."""
    if not directory.strip():
        raise ValueError("output_dir is empty; name a directory, such as outputs/run")
    path = Path(directory).absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        why = "is a file" if not existing.is_dir() else "can't be written to"
        raise ValueError(
            f"output_dir is {directory!r}, but {existing} {why}; choose another directory"
        )
    if existing == path:
        return
    try:  # what root may write to is not always a place for directories (/proc)
        Path(tempfile.mkdtemp(prefix=".hybridflow-", dir=existing)).rmdir()
    except OSError as error:
        raise ValueError(
            f"output_dir is {directory!r}, but no directory can be made in {existing} "
            f"({error.strerror}); choose another directory"
        ) from error


def check_resume(resume: str) -> None:
    if resume not in ("auto", "never") and not (Path(resume) / MANIFEST).is_file():
        raise ValueError(
            f"loop.resume is {resume!r}, which is no checkpoint (no {MANIFEST}); give auto, "
            "never, or .../checkpoints/step-..."
        )
