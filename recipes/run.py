"""run(): from settings to a trained model. Checks everything that can be checked, places the roles, hands
over to the loop."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from controllers import QUESTIONS, algorithm_entry, create_algorithm
from controllers.data import PromptDataset, RowDataset, RowLoader, load_tokenizer
from controllers.loop import Loop, Outcome
from controllers.samples import SampleReader
from controllers.streams import EmptyStream, PromptStream, Stream, TextStream
from hybridflow.checkpoint import CheckpointStore
from hybridflow.dataflow import Dataflow
from hybridflow.mapping.answer.device_mapping import DeviceMapping
from hybridflow.mapping.answer.explain import mapping_report
from hybridflow.progress import activity
from hybridflow.progress_display import shown
from hybridflow.tracing import to_mermaid
from hybridflow.waiting import CALLS
from recipes.auto import choose
from recipes.compatibility import (
    check_context_lengths,
    check_vocabularies,
)
from recipes.config import PlacementMode, RunConfig
from recipes.forecast import MAPPING, forecast, predicted_vs_measured, verdict
from recipes.mapping_settings import MapperInputs, apply_mapping
from recipes.placing import check_models, place, placement_report, pool_sizes, pools_of
from recipes.roles import Role
from recipes.schedules import with_schedules
from recipes.session import (
    check_dataflow,
    connect_cluster,
    load_pretraining,
    load_rows,
    start_roles,
    start_tracker,
    validation,
)
from workers.role_config import JudgeConfig, VerdictKind
from workers.roles import TrainedRole

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
    length = config.loop.length(len(train), config.data.batch_size)
    config = with_schedules(config, length.num_steps)
    roles = place(config)
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
        stack.enter_context(shown(live=config.metrics.console))
        with activity("start"):
            cluster = stack.enter_context(connect_cluster(config))
            store = CheckpointStore(
                directory / "checkpoints",
                keep_last=config.loop.keep_last,
                keep_best=config.loop.keep_best,
                metric=entry.objective,
                mode=entry.best,
            )
            tracker = stack.enter_context(start_tracker(config, directory, store, length.num_steps))
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
            samples=SampleReader(config.metrics.samples, tokenizer, seed=config.seed),
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
