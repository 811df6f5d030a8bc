"""What the weights of an engine take, and what a sync of them moves."""

from __future__ import annotations

import torch
import torch.distributed as dist

from hybridflow.resharding import LocalParameter, ShardMap, compile, verify
from workers.engines.shared.sharded_engine import ShardedEngine

BUCKET_BYTES = 1 << 20
FLOAT = 4


def state_bytes(engine: ShardedEngine) -> int:
    """Bytes of this rank's weights and optimizer states."""
    states = engine.local_parameters() + engine.state(moments=True, copies=True)
    storages = {}
    for parameter in states:
        for shard in parameter.shards:
            memory = shard.tensor.untyped_storage()
            storages[memory.data_ptr()] = memory.nbytes()
    return sum(storages.values())


def synced(engine: ShardedEngine, *, adapter: bool) -> tuple[int, int]:
    """(bytes that all ranks receive in a sync, of the adapter alone or of all weights, to a whole copy
    on every rank, the fewest: what they lack)."""
    source = engine.weight_source(adapter=adapter)
    whole = []
    for parameter in source.parameters:
        whole.append(LocalParameter.whole(parameter.name, torch.empty(parameter.shape)))
    plan = compile(
        ShardMap.gather(source.parameters), ShardMap.gather(whole), bucket_bytes=BUCKET_BYTES
    )
    certificate = verify(plan)
    lacking = 0
    for parameter, target in zip(source.parameters, whole, strict=True):
        held = sum(shard.box.numel for shard in parameter.shards)
        lacking += FLOAT * (target.shards[0].box.numel - held)
    total = torch.tensor(lacking)
    dist.all_reduce(total)
    return certificate.received_total, int(total)
