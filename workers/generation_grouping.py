"""Which rank takes which generation coordinate, known before anything starts: from the training layout and
the engine's name alone."""

from __future__ import annotations

from math import lcm

from hybridflow.layout import Layout
from hybridflow.resharding import Box, ParameterSpec, ShardMap
from hybridflow.resharding.grouping import Grouping, fewest_bytes, vanilla, zero_redundancy
from workers.role_config import ActorConfig

SHARDED = ("fsdp", "deepspeed")
"""Engines whose data ranks share the weights out among themselves, along the first dim."""


def generation_grouping(config: ActorConfig, training: Layout) -> Grouping:
    """The grouping under which the fewest bytes have to move: the paper's zero-redundancy grouping where its
    sizes divide the training sizes, an assignment problem elsewhere (sharded data parallelism, tg that does
    not divide t)."""
    sizes = config.generation
    parallel = sizes.pp * sizes.tp
    if parallel < 1 or training.size % parallel:
        raise ValueError(
            f"actor.generation: pp={sizes.pp} x tp={sizes.tp} does not divide the pool's {training.size} "
            "devices; "
            "choose sizes whose product is one of "
            f"{[n for n in range(1, training.size + 1) if training.size % n == 0]}"
        )
    if training.axis_size("tp") % sizes.tp == 0 and training.axis_size("pp") % sizes.pp == 0:
        return zero_redundancy(training, tp=sizes.tp, pp=sizes.pp)
    source, shards = miniature(training, tp=sizes.tp, pp=sizes.pp, data_shards=config.train.engine in SHARDED)
    return fewest_bytes(source, shards, tp=sizes.tp, pp=sizes.pp)


def miniature(training: Layout, *, tp: int, pp: int, data_shards: bool) -> tuple[ShardMap, ShardMap]:
    """The model as one parameter [layers, width] with pipeline stages along the one dim and tensor parts
    along the other: (who trains what, what each coordinate generates with under the vanilla grouping).

    Where data ranks share the weights out (`data_shards`), each has a part of its tensor part: engines cut
    the first dim of a matrix over tensor ranks, then over data ranks, and vLLM cuts the same dim of most.
    """
    data = training.axis_size("dp") if data_shards else 1
    parts, stages = training.axis_size("tp") * data, training.axis_size("pp")
    spec = ParameterSpec("model", (lcm(stages, pp), lcm(parts, tp)), "int8")
    source: dict[int, list[tuple[str, Box]]] = {}
    for rank in range(training.size):
        at = training.coordinates(rank)
        part = at["tp"] * data + (at["dp"] if data_shards else 0)
        source[rank] = [("model", _cell(spec.shape, at["pp"], stages, part, parts))]
    target: dict[int, list[tuple[str, Box]]] = {}
    for replica in vanilla(training.size, tp=tp, pp=pp).replicas:
        for stage, ranks in enumerate(replica):
            target |= {
                rank: [("model", _cell(spec.shape, stage, pp, part, tp))] for part, rank in enumerate(ranks)
            }
    return (
        ShardMap.of([spec], source, num_ranks=training.size),
        ShardMap.of([spec], target, num_ranks=training.size),
    )


def _cell(shape: tuple[int, ...], row: int, num_rows: int, column: int, num_columns: int) -> Box:
    """One cell of a matrix cut into num_rows x num_columns equal ones."""
    height, width = shape[0] // num_rows, shape[1] // num_columns
    return Box((row * height, column * width), (height, width))
