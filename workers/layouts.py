"""The layouts of a role's engines, from its settings and the size of its pool.

They are known before anything starts, so that placement, dry runs and workers compute them with the
same functions.
"""

from __future__ import annotations

from math import lcm

from hybridflow.layout import Layout
from hybridflow.resharding import Box, ParameterSpec, ShardMap
from hybridflow.resharding.grouping import Grouping, fewest_bytes, vanilla, zero_redundancy
from workers.config import TrainConfig
from workers.engines import engine_class
from workers.generation.config import GenerationConfig
from workers.role_config import ActorConfig


def training_layout(config: TrainConfig, world_size: int, role: str) -> Layout:
    """The layout of a role's training engine, over the pool's devices.

    Raises a ValueError that names `role` where the engine has none for them.
    """
    engine = engine_class(config.engine, f"{role}.train.engine")
    try:
        return engine.make_layout(config, world_size)
    except ValueError as error:
        raise ValueError(f"{role}.{error}") from None


def generation_layout(config: GenerationConfig, world_size: int, role: str) -> Layout:
    """The layout of a generation engine in a pool of its own: consecutive ranks form a replica.

    Raises a ValueError that names `role` where pp x tp does not divide `world_size`.
    """
    parallel = config.pp * config.tp
    devices = f"the {world_size} devices of generation's pool"
    _check_divides(f"{role}.generation", config.pp, config.tp, world_size, devices)
    return Layout.of(dp=world_size // parallel, pp=config.pp, tp=config.tp)


def generation_grouping(config: ActorConfig, training: Layout) -> Grouping:
    """The grouping of an actor's training ranks into generation replicas that moves the fewest
    bytes.

    That is the paper's zero-redundancy grouping where its sizes divide the training sizes, and the
    solution of an assignment problem elsewhere (sharded data parallelism, generation tp that does
    not divide training tp). Raises a ValueError where pp x tp does not divide the pool's devices.
    """
    sizes = config.generation
    devices = f"the pool's {training.size} devices"
    _check_divides("actor.generation", sizes.pp, sizes.tp, training.size, devices)
    if training.axis_size("tp") % sizes.tp == 0 and training.axis_size("pp") % sizes.pp == 0:
        return zero_redundancy(training, tp=sizes.tp, pp=sizes.pp)
    engine = engine_class(config.train.engine, "actor.train.engine")
    source, target = miniature(
        training, tp=sizes.tp, pp=sizes.pp, data_shards=engine.shards_data(config.train)
    )
    return fewest_bytes(source, target, tp=sizes.tp, pp=sizes.pp)


def miniature(
    training: Layout, *, tp: int, pp: int, data_shards: bool
) -> tuple[ShardMap, ShardMap]:
    """A small stand-in for the model's shard maps: (training, generation under the vanilla
    grouping).

    The model is one parameter [layers, width] with pipeline stages along the first dim and tensor
    parts along the second. Where data ranks share the weights out (`data_shards`), each has a part
    of its tensor part: engines cut the first dim of a matrix over tensor ranks, then over data
    ranks, and vLLM cuts the same dim of most matrices.
    """
    cp = training.axis_size("cp")
    data = training.axis_size("dp") * cp if data_shards else 1
    parts, stages = training.axis_size("tp") * data, training.axis_size("pp")
    spec = ParameterSpec("model", (lcm(stages, pp), lcm(parts, tp)), "int8")
    source: dict[int, list[tuple[str, Box]]] = {}
    for rank in range(training.size):
        at = training.coordinates(rank)
        part = at["tp"] * data + (at["dp"] * cp + at["cp"] if data_shards else 0)
        source[rank] = [("model", _cell(spec.shape, at["pp"], stages, part, parts))]
    target: dict[int, list[tuple[str, Box]]] = {}
    for replica in vanilla(training.size, tp=tp, pp=pp).replicas:
        for stage, ranks in enumerate(replica):
            for part, rank in enumerate(ranks):
                target[rank] = [("model", _cell(spec.shape, stage, pp, part, tp))]
    return (
        ShardMap.of([spec], source, num_ranks=training.size),
        ShardMap.of([spec], target, num_ranks=training.size),
    )


def _cell(shape: tuple[int, ...], row: int, num_rows: int, column: int, num_columns: int) -> Box:
    """One cell of a matrix cut into num_rows x num_columns equal ones."""
    height, width = shape[0] // num_rows, shape[1] // num_columns
    return Box((row * height, column * width), (height, width))


def _check_divides(prefix: str, pp: int, tp: int, world_size: int, devices: str) -> None:
    """Raises a ValueError where pp x tp does not divide the devices of a pool, which `devices`
    describes."""
    parallel = pp * tp
    if parallel >= 1 and world_size % parallel == 0:
        return
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    raise ValueError(
        f"{prefix}: pp={pp} x tp={tp} does not divide {devices}; choose sizes whose product is "
        f"one of {divisors}"
    )
