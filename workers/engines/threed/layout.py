"""Which pipeline x tensor x data layouts fit a model, and which layers each pipeline stage
holds."""

from __future__ import annotations

from itertools import accumulate, pairwise, product, starmap

from transformers import PretrainedConfig

from hybridflow.layout import AXES
from workers.config import TrainConfig
from workers.engines import pipeline_engines
from workers.engines.model.context_parallel import check_context_parallel
from workers.engines.model.expert_parallel import check_expert_parallel
from workers.engines.model.split_plan import check_fits, fitting_sizes, pipeline_plan
from workers.engines.model.tower import num_fed_layers

SCHEDULES = ("1f1b", "interleaved_1f1b")


def check_layout(model: PretrainedConfig, train: TrainConfig, world_size: int) -> None:
    """ValueError, with the layouts that fit, where that of `train` over `world_size` ranks does
    not."""
    _check_schedule(train)
    if sorted(train.rank_order) != sorted(AXES):
        raise ValueError(
            f"rank_order is {train.rank_order}; it must name each of {', '.join(AXES)} once, "
            "outermost first"
        )
    if train.tp < 1 or train.pp < 1:
        raise ValueError(f"tp={train.tp}, pp={train.pp}: sizes must be at least 1")
    stages, num_layers = train.pp * train.virtual_stages, _num_layers(model)
    if stages > num_layers:
        raise ValueError(
            f"pp={train.pp} with virtual_stages={train.virtual_stages} makes {stages} pipeline "
            f"stages, but the model has {num_layers} layers; "
            f"{_advice(train, model, world_size)}"
        )
    first, fed = len(stage_layers(num_layers, stages)[0]), num_fed_layers(model)
    if first < fed:
        raise ValueError(
            f"pp={train.pp} with virtual_stages={train.virtual_stages} leaves {first} layers in the first "
            f"stage, but the first {fed} layers of {model.model_type} add features of its vision tower; "
            f"use at most {num_layers // fed} stages"
        )
    if not pipeline_plan(model):
        raise ValueError(
            f"train.engine is threed, but transformers has no pipeline plan for {model.model_type};"
            f" set engine to one without pipeline stages: {pipeline_engines(with_pipeline=False)}"
        )
    try:
        check_fits(model, train.tp, divides_experts=train.ep > 1)
    except ValueError as error:
        raise ValueError(f"{error}; {_advice(train, model, world_size)}") from None
    check_context_parallel(model, train)
    if train.cp_by_length:
        raise ValueError(
            "train.cp_by_length is true, which engine threed has not: its stages agree on groups; set "
            "it to false, or engine to fsdp"
        )
    if world_size % (train.pp * train.cp * train.tp):
        shared = "" if train.cp == 1 else f"cp={train.cp} x "
        raise ValueError(
            f"pp={train.pp} x {shared}tp={train.tp} does not divide the {world_size} devices of the pool; "
            f"{_advice(train, model, world_size)}"
        )
    check_expert_parallel(model, train, world_size)


def fitting_layouts(
    model: PretrainedConfig,
    world_size: int,
    virtual_stages: int = 1,
    *,
    divides_experts: bool = False,
) -> list[tuple[int, int, int]]:
    """All (pp, tp, dp) over `world_size` ranks that fit the model, ascending."""
    sizes = fitting_sizes(model, divides_experts=divides_experts)
    deepest = _num_layers(model) // virtual_stages
    layouts = []
    for pipeline, tensor in product(range(1, min(world_size, deepest) + 1), sizes):
        if world_size % (pipeline * tensor) == 0:
            layouts.append((pipeline, tensor, world_size // (pipeline * tensor)))
    return layouts


def stage_layers(num_layers: int, num_stages: int) -> list[range]:
    """Contiguous layers of each stage; where they do not divide, the stages in the middle,
    without embedding or head, get one more."""
    counts = [num_layers // num_stages] * num_stages
    for stage in [*range(1, num_stages - 1), 0, num_stages - 1][: num_layers % num_stages]:
        counts[stage] += 1
    bounds = [0, *accumulate(counts)]
    return list(starmap(range, pairwise(bounds)))


def _num_layers(model: PretrainedConfig) -> int:
    return int(model.get_text_config().num_hidden_layers)


def _check_schedule(train: TrainConfig) -> None:
    if train.pipeline_schedule not in SCHEDULES:
        raise ValueError(
            f"pipeline_schedule is {train.pipeline_schedule!r}; known: {', '.join(SCHEDULES)}"
        )
    interleaved = train.pipeline_schedule == "interleaved_1f1b"
    if interleaved and (train.pp < 2 or train.virtual_stages < 2):
        raise ValueError(
            f"pipeline_schedule is interleaved_1f1b with pp={train.pp} and "
            f"virtual_stages={train.virtual_stages}; both must be at least 2, "
            "or use 1f1b"
        )
    if not interleaved and train.virtual_stages != 1:
        raise ValueError(
            f"virtual_stages is {train.virtual_stages} with pipeline_schedule 1f1b; use "
            "interleaved_1f1b or virtual_stages=1"
        )


def _advice(train: TrainConfig, model: PretrainedConfig, world_size: int) -> str:
    layouts = fitting_layouts(model, world_size, train.virtual_stages, divides_experts=train.ep > 1)
    listed = ", ".join(starmap("pp={} tp={} (dp={})".format, layouts))
    return f"on {world_size} devices fit: {listed or 'none'}"
