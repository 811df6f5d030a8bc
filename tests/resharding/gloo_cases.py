"""What four gloo processes do once for test_gloo.py: every pair of layouts, the golden executor
beside it, faults, two pools."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist

from hybridflow.layout import Layout
from hybridflow.resharding import (
    AttestationError,
    Attestor,
    Executor,
    LocalParameter,
    ShardMap,
    compile,
    verify,
)
from hybridflow.resharding.analytic import decoder_rules, fsdp, generation, threed, zero3
from hybridflow.resharding.golden import bytes_gathered, reshard_golden
from hybridflow.resharding.grouping import fewest_bytes, vanilla
from tests.resharding.simulated import allocate, assert_holds, full_tensors

NUM_RANKS = 4
RULES = decoder_rules(
    num_layers=2, hidden=128, intermediate=384, num_heads=4, num_kv_heads=2, vocab=1000
)
BUCKET_BYTES = 1 << 16
SOURCES = {
    "2-2-1": threed(RULES, Layout.of(pp=2, tp=2)).with_dtype("float32"),
    "1-2-2": threed(RULES, Layout.of(tp=2, dp=2)),
    "fsdp-4": fsdp(RULES, 4).with_dtype("float32"),
    "zero3-4": zero3(RULES, 4),
}


def run(
    rank: int,
    directory: str,
    backend: str = "gloo",
    spanning: dist.ProcessGroup | None = None,
) -> None:
    """`spanning`: the group of the case with two pools (None: the world)."""
    torch.set_num_threads(1)
    dist.init_process_group(
        backend, init_method=f"file://{directory}/world", rank=rank, world_size=NUM_RANKS
    )
    results = {
        name: {
            f"{pp}-{tp}": layouts(source, pp, tp, rank)
            for pp, tp in ((1, 1), (1, 2), (1, 4), (2, 2))
        }
        for name, source in SOURCES.items()
    }
    results |= {"faults": faults(rank), "pools": pools(rank, spanning)}
    Path(directory, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def layouts(source: ShardMap, pp: int, tp: int, rank: int) -> dict[str, int]:
    """Twice through the same executor with changing weights, each time equal to
    gather-and-slice, to the golden executor, and attested."""
    sources = allocate(source, full_tensors(source), only=rank)[0]
    grouping = fewest_bytes(
        source, generation(RULES, vanilla(NUM_RANKS, tp=tp, pp=pp)), tp=tp, pp=pp
    )
    wanted = generation(RULES, grouping)
    ours, golden = allocate(wanted, only=rank)[0], allocate(wanted, only=rank)[0]
    gathered, target = ShardMap.gather(sources), ShardMap.gather(ours)
    assert (gathered.digest(), target.digest()) == (source.digest(), wanted.digest())
    plan = compile(gathered, target, bucket_bytes=BUCKET_BYTES)
    verify(plan)
    executor, attestor = Executor(plan, sources, ours), Attestor(plan.source, sources, target, ours)
    digests = []
    for step in range(2):
        full = full_tensors(source, seed=step)
        refill(sources, full)
        report = executor.run()
        assert_holds([ours], full)
        digests.append(attestor.run())
        golden_bytes = reshard_golden(
            gathered,
            {spec.name: spec.dtype for spec in target.parameters},
            sources,
            golden,
            bucket_bytes=BUCKET_BYTES,
        )
        assert_holds([golden], full)
    assert all(digests[0][name] != digests[1][name] for name in digests[0])
    assert golden_bytes == bytes_gathered(gathered.with_dtype("bfloat16"))[rank]
    return {
        "received": report.received_bytes,
        "bound": int(plan.bytes_received[rank]),
        "staging": report.staging_bytes,
        "golden": golden_bytes,
    }


def refill(parameters: list[LocalParameter], full: dict[str, torch.Tensor]) -> None:
    for parameter in parameters:
        for shard in parameter.shards:
            shard.tensor.copy_(
                full[parameter.name][
                    tuple(
                        slice(a, a + n)
                        for a, n in zip(shard.box.start, shard.box.shape, strict=True)
                    )
                ]
            )


def faults(rank: int) -> str:
    """One bit on rank 2 flips after the sync: every rank raises and names it."""
    source, target = SOURCES["fsdp-4"], generation(RULES, vanilla(NUM_RANKS, tp=2))
    sources = allocate(source, full_tensors(source), only=rank)[0]
    held = allocate(target, full_tensors(source), only=rank)[0]
    attestor = Attestor(source, sources, target, held)
    attestor.run()
    if rank == 2:
        held[0].shards[0].tensor.view(torch.int16)[0, 0] ^= 4
    try:
        attestor.run()
    except AttestationError as error:
        return str(error)
    return "not noticed"


def pools(rank: int, group: dist.ProcessGroup | None = None) -> int:
    """Ranks 0, 1 train, ranks 2, 3 generate with tp=2; one group (None: the world) spans both
    pools; each side only knows its own parameters."""
    training = fsdp(RULES, 2).relabel([0, 1], NUM_RANKS)
    target = generation(RULES, vanilla(2, tp=2)).relabel([2, 3], NUM_RANKS)
    full = full_tensors(training)
    sources = allocate(training, full, only=rank)[0] if rank < 2 else []
    destinations = allocate(target, only=rank)[0] if rank >= 2 else []
    source, wanted = ShardMap.gather(sources, group), ShardMap.gather(destinations, group)
    plan = compile(source, wanted, bucket_bytes=BUCKET_BYTES)
    verify(plan)
    report = Executor(plan, sources, destinations, group).run()
    assert_holds([destinations], full)
    Attestor(plan.source, sources, plan.target, destinations, group).run()
    return report.received_bytes
