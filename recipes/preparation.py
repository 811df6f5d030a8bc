"""prepare(): everything between settings and the first process. Checks what can be checked, reads
the data, lets the mapper place the models.

    prepared = prepare(config)       # a ValueError with field, value and fix, or all that a session needs
    with Session(prepared) as session: ...

Reads data and model configurations; starts nothing and loads no weights.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from controllers import QUESTIONS, create_algorithm
from controllers.data import DATASETS, PromptDataset, RowDataset, RowLoader, load_tokenizer
from hybridflow.dataflow import Dataflow
from hybridflow.mapping.answer.device_mapping import DeviceMapping
from hybridflow.mapping.answer.explain import mapping_report
from hybridflow.tracing import trace, traced_roles
from recipes.asynchrony import check_asynchrony
from recipes.auto import choose
from recipes.checks import check_loss_columns, check_metrics, check_output, check_resume
from recipes.compatibility import (
    check_columns_of,
    check_context_lengths,
    check_prompts,
    check_text,
    check_validation_stops,
    check_vocabularies,
    log_overlap,
)
from recipes.config import PlacementMode, RunConfig
from recipes.episodes import check_environment, check_template
from recipes.forecast import forecast, verdict
from recipes.generation_lengths import with_generation_lengths
from recipes.images import check_images
from recipes.mapping_settings import MapperInputs, apply_mapping
from recipes.placing import (
    Placement,
    check_models,
    place,
    placeholder_roles,
    placement_report,
    without_weights,
)
from recipes.questions import check_question
from recipes.roles import GENERATION, role_kind
from recipes.same_run import check_same_data, check_same_run
from recipes.schedules import with_schedules
from recipes.settings_history import derived_names
from recipes.text_settings import (
    log_left_out,
    log_other_sampling,
    smallest_vocabulary,
    with_date,
    with_text,
)
from recipes.trial import try_policy_loss
from recipes.unread import check_unread
from workers.agents.workers import EpisodeActor
from workers.columns import IMAGES
from workers.config import ModelConfig, Precision
from workers.images import ImageProcessor, sees_images
from workers.precision import (
    automatic,
    explain,
    precision_of,
    with_native_precision,
    with_precision,
)
from workers.role_config import JudgeConfig, VerdictKind
from workers.roles import Actor

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """All that a session needs: checked, read, and nothing started."""

    placement: Placement
    dataflow: Dataflow
    """The traced step."""
    tokenizer: PreTrainedTokenizerBase
    train: RowDataset
    """The rows that the algorithm's steps begin with."""
    held_out: RowDataset | None
    pretraining: RowLoader | None
    """The texts of PPO-ptx."""
    mapper_inputs: MapperInputs | None
    """None where the mapper cannot plan the step."""
    precisions: tuple[str, ...] = ()
    """Settings that were auto, such as actor.train.precision, and are now what this machine computes
    natively."""
    derived: frozenset[str] = frozenset()
    """Settings that were left open, and follow from others now."""
    mapping: DeviceMapping | None = None
    """What placement=auto chose."""

    @property
    def config(self) -> RunConfig:
        return self.placement.config

    @property
    def precision_line(self) -> str:
        """What precision=auto is in this run; empty where no model has it."""
        for role in self.placement.roles:
            if role.config.model is not None:
                for name in self.precisions:
                    if name.startswith(f"{role.section}."):
                        precision = precision_of(self.config, name)
                        return explain(precision, self.config.device.value)
        return ""

    def with_precision(self, precision: Precision) -> Preparation:
        """The same run with another precision where it was auto, once the machines are known."""
        config = with_precision(self.config, list(self.precisions), precision)
        return replace(self, placement=place(config))


def prepare(config: RunConfig) -> Preparation:
    """Every mistake that can be found before a process starts is a ValueError here."""
    precisions, written = automatic(config), config
    config = with_native_precision(config, config.device.value)
    placement = place(config)
    check_unread(written)
    for name in placement.role_names:
        if not role_kind(name).needed(config):
            LOGGER.info("no %s model: no coefficient asks for it", name)
    check_environment(placement)
    check_metrics(config)
    check_output(config.output_dir)
    check_resume(config.loop.resume)
    if config.algorithm.name not in QUESTIONS:
        check_same_run(placement)
    else:
        check_question(config)
    dataflow = check_dataflow(placement)
    check_models(placement)
    tokenizer = load_tokenizer(config.model)
    config = with_date(with_text(config, tokenizer), tokenizer)
    check_template(config, tokenizer)
    placement = place(config)
    check_validation_stops(config, placement.roles)
    check_vocabularies(config, placement.roles, tokenizer)
    log_left_out(placement.roles, config)
    log_other_sampling(placement.roles)
    train = load_rows(placement, "train", tokenizer)
    num_steps = config.loop.length(len(train), config.data.batch_size).num_steps
    config = with_schedules(config, num_steps)
    placement = place(config)
    held_out = None
    if asks_only(config):
        held_out = train
    elif config.data.validation:
        held_out = load_rows(placement, "validation", tokenizer)
        log_overlap(train, held_out)
    check_images(placement.roles, [train, held_out], config.model)
    pretraining = load_pretraining(placement, tokenizer)
    if config.algorithm.name not in QUESTIONS:
        check_same_data(placement, train, pretraining)
    placement = place(with_generation_lengths(placement, train, held_out))
    if isinstance(train, PromptDataset):
        check_context_lengths(config, placement.roles, train.longest_prompt_tokens)
    prepared = Preparation(
        placement=placement,
        dataflow=dataflow,
        tokenizer=tokenizer,
        train=train,
        held_out=held_out,
        pretraining=pretraining,
        mapper_inputs=mapper_inputs(placement, dataflow, train),
        precisions=tuple(precisions),
        derived=derived_names(written, placement.config),
    )
    if config.placement is PlacementMode.auto and prepared.mapper_inputs is not None:
        return _placed_by_the_mapper(prepared, prepared.mapper_inputs)
    return prepared


def check_dataflow(placement: Placement) -> Dataflow:
    """Runs the algorithm's step on abstract batches: a column that nobody writes is found
    before anything starts."""
    config = placement.config
    workers = {role.name: role.worker for role in placement.roles}
    if workers.pop(GENERATION, None) is not None:
        workers["actor"] = Actor if config.environment is None else EpisodeActor
    traced, recorder = traced_roles(workers)
    roles = traced | placeholder_roles(placement, traced)
    algorithm = create_algorithm(config.algorithm.name, roles, config.algorithm)
    inputs = DATASETS[rows_of(placement)].columns
    if rows_of(placement) != "tasks" and sees_images(config.model):
        inputs = (*inputs, IMAGES.name)
    dataflow = trace(config.algorithm.name, algorithm.step, inputs, recorder)
    check_loss_columns(config.actor.loss.name, dataflow)
    check_asynchrony(config, placement.entry, dataflow)
    if "actor" in placement.role_names:
        try_policy_loss(config.actor.loss)
    return dataflow


def rows_of(placement: Placement) -> str:
    """The kind of rows that the run's steps begin with: tasks in place of prompts where there is an
    environment."""
    if placement.config.environment is None:
        return placement.entry.rows
    return "tasks"


def load_rows(placement: Placement, name: str, tokenizer: PreTrainedTokenizerBase) -> RowDataset:
    """data.train or data.validation, as the rows that the algorithm's steps begin with."""
    config = placement.config
    where = {"train": config.data.train, "validation": config.data.validation}[name]
    rows = DATASETS[rows_of(placement)].load(
        config.data,
        where,
        tokenizer,
        field=_field(config, name),
        vocabulary=smallest_vocabulary(placement.roles),
        images=image_processor(config.model),
    )
    if isinstance(rows, PromptDataset):
        check_prompts(_field(config, name), rows.longest_prompt_tokens, config.actor)
        check_columns_of(config, name, _field(config, name), rows)
    else:
        check_text(f"data.{name}", rows.longest_tokens, config.model, f"data.{rows.length_limit}")
    return rows


def image_processor(model: ModelConfig) -> ImageProcessor | None:
    """That of a model that sees images."""
    return ImageProcessor(model) if sees_images(model) else None


def _field(config: RunConfig, name: str) -> str:
    """The setting that names the rows: recipes that train nothing ask those of data.validation,
    which stand in data.train too."""
    return "data.validation" if asks_only(config) else f"data.{name}"


def asks_only(config: RunConfig) -> bool:
    """Whether the rows of data.validation are all that there is: nothing is trained."""
    return config.algorithm.name in QUESTIONS and config.data.train == config.data.validation


def load_pretraining(placement: Placement, tokenizer: PreTrainedTokenizerBase) -> RowLoader | None:
    """The texts of PPO-ptx, if there are any."""
    config = placement.config
    if config.data.pretraining is None:
        return None
    dataset = PromptDataset.load_text(
        config.data,
        config.data.pretraining,
        tokenizer,
        vocabulary=smallest_vocabulary(placement.roles),
    )
    check_text(
        "data.pretraining", dataset.longest_tokens, config.actor.model, "data.pretraining_tokens"
    )
    return RowLoader(dataset, replace(config.data, batch_size=config.data.pretraining_batch_size))


def mapper_inputs(
    placement: Placement, dataflow: Dataflow, rows: RowDataset
) -> MapperInputs | None:
    """What the mapper reads; it plans training steps that answer prompts, with one generation
    in them."""
    config = placement.config
    if config.algorithm.name in QUESTIONS:
        return None
    settings = {role.name: role.config for role in placement.roles}
    writes = any(
        isinstance(role, JudgeConfig) and role.verdict is VerdictKind.written
        for role in settings.values()
    )
    if isinstance(rows, PromptDataset) and not writes:
        return MapperInputs(config=config, dataflow=dataflow, roles=settings, prompts=rows)
    if config.placement is PlacementMode.auto:
        what = "a judge that writes (judge.verdict=written)" if writes else config.algorithm.name
        raise ValueError(
            f"placement=auto: the mapper plans steps that answer prompts, not {what}; use "
            "colocated or custom"
        )
    return None


def _placed_by_the_mapper(prepared: Preparation, inputs: MapperInputs) -> Preparation:
    """The same run on the pools and with the layouts that the mapper chose."""
    mapping = choose(inputs)
    placement = place(apply_mapping(inputs, mapping))
    check_models(placement)
    if not prepared.config.dry_run:  # whose report has it
        LOGGER.info("placement=auto\n%s", mapping_report(mapping))
    return replace(prepared, placement=placement, mapping=mapping)


def dry_run_report(prepared: Preparation) -> str:
    """What would run where and, where the mapper can plan the step, in how many seconds and
    bytes."""
    placement = prepared.placement
    report = placement_report(placement, prepared.dataflow)
    if prepared.precision_line:
        report += f"\n  {prepared.precision_line}"
    for line in without_weights(placement):
        report += f"\n  a run would end: {line}"
    if prepared.mapping is not None:
        return f"{report}\n\n{mapping_report(prepared.mapping)}"
    if prepared.mapper_inputs is not None:
        return f"{report}\n\n{verdict(prepared.mapper_inputs, placement.pool_of, placement.pool_sizes)}"
    what = placement.config.algorithm.name
    if placement.config.algorithm.name not in QUESTIONS and placement.entry.answers_prompts:
        what = "a judge that writes"
    return (
        f"{report}\n\nseconds and memory: not predicted; the mapper plans training steps that answer "
        f"prompts, not {what}"
    )


def predicted_mapping(prepared: Preparation) -> DeviceMapping | None:
    """The run's placement with predicted seconds: chosen by placement=auto, or asked for by
    plan.calibration."""
    inputs, placement = prepared.mapper_inputs, prepared.placement
    if prepared.mapping is None and prepared.config.plan.calibration and inputs is not None:
        return forecast(inputs, placement.pool_of, placement.pool_sizes).mapping
    return prepared.mapping


def foresee(config: RunConfig) -> DeviceMapping:
    """What a run with these settings would take; nothing is started."""
    prepared = prepare(config)
    assert prepared.mapper_inputs is not None, "a recipe that the mapper plans"
    return forecast(
        prepared.mapper_inputs, prepared.placement.pool_of, prepared.placement.pool_sizes
    ).mapping
