"""Ranks as threads of one process, joined by queues: the transport of the tests. And memory for
a shard map."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import numpy as np
import torch

from hybridflow.resharding.execute import ExecutionReport, Executor
from hybridflow.resharding.plan import ReshardingPlan
from hybridflow.resharding.shard_map import DTYPES, ShardMap
from hybridflow.resharding.shards import LocalParameter, LocalShard
from hybridflow.resharding.transport import Message

TIMEOUT_S = 20


class QueueTransport:
    """Messages are copied when they are posted, as a network would."""

    def __init__(self, rank: int, queues: dict[tuple[int, int], SimpleQueue]) -> None:
        self.rank = rank
        self.queues = queues
        self.staged = 0

    def post(
        self, receives: Sequence[Message], sends: Sequence[Message]
    ) -> tuple[list[Callable[[], None]], Callable[[], None]]:
        for peer, tensor in sends:
            assert tensor.is_contiguous() and tensor.dtype == torch.uint8
            self.queues[self.rank, peer].put(tensor.clone())

        def receiver(peer: int, tensor: torch.Tensor) -> Callable[[], None]:
            return lambda: tensor.copy_(self.queues[peer, self.rank].get(timeout=TIMEOUT_S))

        return [receiver(peer, tensor) for peer, tensor in receives], lambda: None


def run_in_threads(
    plan: ReshardingPlan,
    sources: list[list[LocalParameter]],
    destinations: list[list[LocalParameter]],
) -> list[ExecutionReport]:
    """Execute the plan with one thread per rank."""
    queues: dict[tuple[int, int], SimpleQueue] = defaultdict(SimpleQueue)
    for pair in zip(plan.sender.tolist(), plan.receiver.tolist(), strict=True):
        queues[pair]

    def one(rank: int) -> ExecutionReport:
        return Executor(
            plan, sources[rank], destinations[rank], transport=QueueTransport(rank, queues)
        ).run()

    with ThreadPoolExecutor(plan.num_ranks) as pool:
        return list(pool.map(one, range(plan.num_ranks)))


def full_tensors(shard_map: ShardMap, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random bits-and-all values for every parameter."""
    generator = torch.Generator().manual_seed(seed)
    return {
        spec.name: torch.randn(spec.shape, generator=generator).to(DTYPES[spec.dtype])
        for spec in shard_map.parameters
    }


def allocate(
    shard_map: ShardMap,
    full: dict[str, torch.Tensor] | None = None,
    strided: bool = False,
    only: int | None = None,
) -> list[list[LocalParameter]]:
    """Memory of every rank (or of rank `only`): slices of `full`, or NaN without it.

    `strided` puts every box into every other column of its memory.
    """
    ranks: list[list[LocalParameter]] = []
    for rank in range(shard_map.num_ranks) if only is None else [only]:
        parameters = []
        for spec in shard_map.parameters:
            shards = []
            for box in shard_map.boxes(spec.name, rank):
                tensor = torch.full(box.shape, float("nan"), dtype=DTYPES[spec.dtype])
                if strided and box.shape:
                    tensor = torch.full(
                        (*box.shape[:-1], box.shape[-1] * 2), float("nan"), dtype=DTYPES[spec.dtype]
                    )[..., ::2]
                if full is not None:
                    tensor.copy_(
                        full[spec.name][
                            tuple(
                                slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True)
                            )
                        ]
                    )
                shards.append(LocalShard(box, tensor))
            parameters.append(
                LocalParameter(spec.name, spec.shape, DTYPES[spec.dtype], tuple(shards))
            )
        ranks.append(parameters)
    return ranks


def assert_holds(held: list[list[LocalParameter]], full: dict[str, torch.Tensor]) -> None:
    """Every shard is, bit for bit, its slice of the full parameter in the shard's data type."""
    for parameters in held:
        for parameter in parameters:
            for shard in parameter.shards:
                expected = full[parameter.name][
                    tuple(
                        slice(a, a + n)
                        for a, n in zip(shard.box.start, shard.box.shape, strict=True)
                    )
                ]
                expected = expected.to(parameter.dtype)
                same = np.array_equal(_bits(shard.tensor), _bits(expected))
                assert same, f"{parameter.name} {shard.box}"


def _bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy()
