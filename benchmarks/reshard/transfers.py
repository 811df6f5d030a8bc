"""One plan against the two ways of gathering everything, on 8 gloo processes of this machine.

Run by benchmarks.reshard, whose processes import this module.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hybridflow.layout import Layout
from hybridflow.resharding import (
    Attestor,
    Executor,
    LocalParameter,
    LocalShard,
    ShardMap,
    compile,
    verify,
)
from hybridflow.resharding.analytic import ParameterRule, decoder_rules, fsdp, generation, threed
from hybridflow.resharding.golden import reshard_golden
from hybridflow.resharding.grouping import fewest_bytes, vanilla
from hybridflow.resharding.paper import hybridflow
from hybridflow.resharding.shard_map import DTYPES

NUM_RANKS = 8
THREED = {"1-8-1": (1, 8, 1), "1-4-2": (1, 4, 2), "2-2-2": (2, 2, 2), "2-4-1": (2, 4, 1)}
"""Training layouts p-t-d."""
EXPERTS = {"fsdp-8 ep2": 2, "fsdp-8 ep8": 8, "1-2-4 ep4": 4}
"""Layouts of a mixture of experts, and their expert-parallel sizes."""
CASES = [(source, 1, tg) for source in (*THREED, "fsdp-8", *EXPERTS) for tg in (1, 2, 4, 8)] + [
    ("2-2-2", 2, 1),
    ("2-4-1", 2, 2),
]
"""(source, pg, tg)"""


@dataclass(kw_only=True)
class Case:
    """One row: the maps of both groupings, and this rank's memory."""

    source: ShardMap
    ours: ShardMap
    vanilla: ShardMap
    sources: list[LocalParameter]
    destinations: list[LocalParameter]
    vanilla_destinations: list[LocalParameter]


def worker(rank: int, directory: str, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/world", rank=rank, world_size=NUM_RANKS
    )
    groups = training_groups()
    rows = []
    for source, pg, tg in CASES:
        if arguments.only not in (None, source):
            continue
        rules = model(arguments.dtype, experts=8 if source in EXPERTS else 0)
        row = measure(rules, source, pg, tg, groups.get(source), arguments)
        rows.append(row)
        if rank == 0:
            times = " ".join(
                f"{row[key]:.3f}"
                for key in ("seconds", "seconds_golden", "seconds_vanilla", "seconds_attest")
            )
            print(f"{source} -> {pg}-{tg}: {times} s", flush=True)
    if rank == 0:
        (Path(directory) / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def model(dtype: str, experts: int = 0) -> list[ParameterRule]:
    """About 100 MB, Llama's shape, or that of a mixture of experts."""
    half = DTYPES[dtype].itemsize == 2
    return decoder_rules(
        num_layers=8 if half else 4,
        hidden=512,
        intermediate=2048 // max(experts, 1),
        experts=experts,
        num_heads=8,
        num_kv_heads=8,
        vocab=16000 if half else 8000,
        dtype=dtype,
    )


def training_groups() -> dict[str, dist.ProcessGroup | None]:
    """The model-parallel group (one training replica) of this rank in every source layout."""
    result: dict[str, dist.ProcessGroup | None] = {"fsdp-8": None}
    for name, (pp, tp, dp) in THREED.items():
        for group in Layout.of(pp=pp, tp=tp, dp=dp).groups("pp", "tp"):
            process_group = dist.new_group(list(group))
            if dist.get_rank() in group:
                result[name] = process_group
    return result


def measure(
    rules: list[ParameterRule],
    name: str,
    pg: int,
    tg: int,
    group: dist.ProcessGroup | None,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    case = make_case(rules, name, pg, tg, arguments.source_dtype)
    bucket_bytes = arguments.bucket_mb << 20
    plan = compile(case.source, case.ours, bucket_bytes=bucket_bytes)
    certificate = verify(plan)
    executor = Executor(plan, case.sources, case.destinations)
    dtypes = {spec.name: spec.dtype for spec in case.ours.parameters}
    replica = ShardMap.gather(case.sources, group)

    def golden() -> None:
        reshard_golden(
            plan.source, dtypes, case.sources, case.destinations, bucket_bytes=bucket_bytes
        )

    def hybridflow_v() -> None:
        reshard_golden(
            replica,
            dtypes,
            case.sources,
            case.vanilla_destinations,
            group,
            bucket_bytes=bucket_bytes,
        )

    attestor = Attestor(plan.source, case.sources, case.ours, case.destinations)
    for move, held_map, held in (
        (executor.run, case.ours, case.destinations),
        (golden, case.ours, case.destinations),
        (hybridflow_v, case.vanilla, case.vanilla_destinations),
    ):
        spoil(held)
        move()
        Attestor(plan.source, case.sources, held_map, held).run()
    seconds = in_turns(
        {"ours": executor.run, "golden": golden, "vanilla": hybridflow_v, "attest": attestor.run},
        arguments.repeats,
    )
    extra = torch.tensor([executor.staging_bytes])
    dist.all_reduce(extra, op=dist.ReduceOp.MAX)
    return {
        "source": name,
        "target": f"{pg}-{tg}",
        "received_max": certificate.received_max,
        "received_total": certificate.received_total,
        "bound_max": certificate.bound_max,
        "bound_total": certificate.bound_total,
        "extra_peak_bytes": int(extra),
        "bucket_bytes": bucket_bytes,
        "seconds": seconds["ours"],
        "seconds_golden": seconds["golden"],
        "seconds_vanilla": seconds["vanilla"],
        "paper_received_max": paper_received(name, pg, tg, certificate.model_bytes),
        "seconds_attest": seconds["attest"],
        "model_bytes": certificate.model_bytes,
        "num_rounds": certificate.num_rounds,
        "received_max_vanilla_grouping": int(
            compile(case.source, case.vanilla, bucket_bytes=bucket_bytes).bytes_received.max()
        ),
    }


def make_case(
    rules: list[ParameterRule], name: str, pg: int, tg: int, source_dtype: str | None
) -> Case:
    source = fsdp(rules, NUM_RANKS, ep=EXPERTS.get(name, 1))
    if name == "1-2-4 ep4":
        source = threed(rules, Layout.of(tp=2, dp=4), ep=EXPERTS[name])
    if name in THREED:
        pp, tp, dp = THREED[name]
        source = threed(rules, Layout.of(pp=pp, tp=tp, dp=dp))
    if source_dtype:
        source = source.with_dtype(source_dtype)
    by_v = generation(rules, vanilla(NUM_RANKS, tp=tg, pp=pg))
    ours = generation(rules, fewest_bytes(source, by_v, tp=tg, pp=pg))
    return Case(
        source=source,
        ours=ours,
        vanilla=by_v,
        sources=allocate(source, filled=True),
        destinations=allocate(ours),
        vanilla_destinations=allocate(by_v),
    )


def allocate(shard_map: ShardMap, filled: bool = False) -> list[LocalParameter]:
    """This rank's memory; filled with numbers that depend on the place in the parameter, equal
    on all replicas."""
    rank, result = dist.get_rank(), []
    for number, spec in enumerate(shard_map.parameters):
        shards = []
        for box in shard_map.boxes(spec.name, rank):
            tensor = torch.empty(box.shape, dtype=DTYPES[spec.dtype])
            if filled:
                tensor.fill_(1 + number)
                for k, (start, size) in enumerate(zip(box.start, box.shape, strict=True)):
                    along = torch.arange(start, start + size).mul(k + 0.37).cos()
                    tensor += along.view([-1 if i == k else 1 for i in range(len(box.shape))])
            shards.append(LocalShard(box, tensor))
        result.append(LocalParameter(spec.name, spec.shape, DTYPES[spec.dtype], tuple(shards)))
    return result


def spoil(parameters: list[LocalParameter]) -> None:
    for parameter in parameters:
        for shard in parameter.shards:
            shard.tensor.fill_(float("nan"))


def in_turns(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each call, all ranks from barrier to barrier; the calls alternate, so
    that a busy machine hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            dist.barrier()
            start = time.perf_counter()
            call()
            dist.barrier()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def paper_received(name: str, pg: int, tg: int, model_bytes: int) -> int | None:
    """The paper's prediction for the zero-redundancy grouping; None where it has none."""
    if name not in THREED:
        return None
    pp, tp, _ = THREED[name]
    if tp % tg or pp % pg:
        return None
    return round(
        hybridflow(pp=pp, tp=tp, generation_pp=pg, generation_tp=tg).received * model_bytes
    )
