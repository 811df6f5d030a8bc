"""What the ranks of test_nccl_rules.py do: operations that NCCL does not do, and the suites of
resharding and pipelines under its rules."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.rehearsal import nccl_rules
from hybridflow.layout import Layout
from hybridflow.resharding import Executor, ShardMap, compile
from hybridflow.resharding.analytic import generation, threed
from hybridflow.resharding.grouping import vanilla
from hybridflow.resharding.transport import GroupTransport
from tests.engines import context_attention, threed_workers
from tests.experts import divided
from tests.resharding import gloo_cases
from tests.resharding.simulated import allocate, full_tensors

TIMEOUT_S = 60.0
Group = dist.ProcessGroup


def noncontiguous(rank: int, group: Group) -> None:
    dist.all_reduce(torch.ones(3, 2).t(), group=group)


def short_integers(rank: int, group: Group) -> None:
    dist.all_reduce(torch.ones(3, dtype=torch.int16), group=group)


def bitwise(rank: int, group: Group) -> None:
    dist.all_reduce(torch.ones(3, dtype=torch.int32), op=dist.ReduceOp.BOR, group=group)


def wrong_place(rank: int, group: Group) -> None:
    dist.all_gather_single(torch.zeros(5), torch.ones(2), group=group)


def other_sizes(rank: int, group: Group) -> None:
    dist.all_reduce(torch.ones(4 + rank), group=group, async_op=True)


def other_order(rank: int, group: Group) -> None:
    first = torch.ones(4)
    if rank:
        dist.all_gather_single(torch.zeros(8), first, group=group, async_op=True)
    else:
        dist.all_reduce(first, group=group, async_op=True)


def messages_alone(rank: int, group: Group) -> None:
    dist.all_reduce(torch.zeros(1), group=group)
    message = torch.ones(2)
    if rank:
        dist.irecv(message, group=group, group_src=0)
    else:
        dist.isend(message, group=group, group_dst=1)


def operations(rank: int, group: Group, tensor: torch.Tensor) -> list[dist.P2POp]:
    kind = dist.irecv if rank else dist.isend
    return [dist.P2POp(kind, tensor, group=group, group_peer=1 - rank)]


def messages_first(rank: int, group: Group) -> None:
    dist.batch_isend_irecv(operations(rank, group, torch.ones(2)))


def to_itself(rank: int, group: Group) -> None:
    dist.all_reduce(torch.zeros(1), group=group)
    group._start_coalescing(torch.device("cpu"))
    group.send([torch.ones(2)], rank, 0)


def written_early(rank: int, group: Group) -> None:
    """Rank 0's fault alone."""
    dist.all_reduce(torch.zeros(1), group=group)
    tensor = torch.ones(2)
    (work,) = dist.batch_isend_irecv(operations(rank, group, tensor))
    if not rank:
        tensor.zero_()
    work.wait()
    assert tensor.eq(1).all()


def read_early(rank: int, group: Group) -> None:
    """No rule is broken: what is read before wait() is not a number."""
    tensor = torch.ones(2)
    work = dist.all_reduce(tensor, group=group, async_op=True)
    assert tensor.isnan().all()
    work.wait()
    assert tensor.eq(2).all()


class OneByOne(GroupTransport):
    """Messages of a round as gloo takes them."""

    def post(self, receives: Any, sends: Any) -> Any:
        works = self._start(receives, sends)
        return [work.wait for work in works[: len(receives)]], lambda: None


class WithoutFirstCollective(GroupTransport):
    def __init__(self, group: Group) -> None:
        self.group, self.rank = group, group.rank()


def reshard(rank: int, transport: GroupTransport) -> None:
    """Two pipeline stages to tp=2: both ranks send and receive."""
    source = threed(gloo_cases.RULES, Layout.of(pp=2)).with_dtype("float32")
    target = generation(gloo_cases.RULES, vanilla(2, tp=2))
    sources = allocate(source, full_tensors(source), only=rank)[0]
    destinations = allocate(target, only=rank)[0]
    plan = compile(ShardMap.gather(sources), ShardMap.gather(destinations), bucket_bytes=1 << 16)
    Executor(plan, sources, destinations, transport=transport).run()


def rounds_one_by_one(rank: int, group: Group) -> None:
    reshard(rank, OneByOne(group))


def rounds_without_first_collective(rank: int, group: Group) -> None:
    reshard(rank, WithoutFirstCollective(group))


BREACHES: dict[Callable[[int, Group], None], str] = {
    noncontiguous: "not contiguous",
    short_integers: "torch.int16, which NCCL lacks",
    bitwise: "a bitwise reduction",
    wrong_place: "2 x float32 of 2 into 5 x float32",
    other_sizes: "x float32",
    other_order: "as its operation 1, where rank",
    messages_alone: "outside a batch",
    messages_first: "as the group's first operation",
    to_itself: "a message to itself",
    written_early: "was written before wait()",
    rounds_one_by_one: "outside a batch",
    rounds_without_first_collective: "as the group's first operation",
    read_early: "",
}
"""What each is refused with."""


def breaches(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    nccl_rules.register()
    store = dist.FileStore(f"{directory}/breaches", 2)
    dist.init_process_group(
        nccl_rules.BACKEND,
        store=store,
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    groups = [dist.new_group([0, 1]) for _ in BREACHES]
    texts: dict[str, str] = {}
    for breach, group in zip(BREACHES, groups, strict=True):
        try:
            breach(rank, group)
        except nccl_rules.NcclRuleError as error:
            texts[breach.__name__] = str(error)
    Path(directory, f"breaches{rank}.json").write_text(json.dumps(texts))
    dist.barrier()
    os._exit(0)  # collectives that the other rank never joined are still there


def resharding(rank: int, directory: str) -> None:
    """The suite of test_gloo.py, and its two pools over a group that torch does not know."""
    nccl_rules.register()
    size = gloo_cases.NUM_RANKS
    store = dist.FileStore(f"{directory}/spanning", size)
    spanning = nccl_rules.RuledGroup(store, rank, size, timedelta(seconds=TIMEOUT_S))
    gloo_cases.run(rank, directory, nccl_rules.BACKEND, spanning)


def pipelines(rank: int, root: Path, worlds: list[tuple[int, list[threed_workers.Job]]]) -> None:
    """Saving sends parts through host memory, which a world of GPUs sends over gloo."""
    nccl_rules.register(messages_from_host=True)
    threed_workers.run_worlds(rank, root, worlds, nccl_rules.BACKEND)


def rows_that_ranks_share(rank: int, root: Path, cases: list[context_attention.Case]) -> None:
    """Attention whose heads, keys or gradients travel between the ranks of a row."""
    nccl_rules.register()
    context_attention.run(rank, root, cases, nccl_rules.BACKEND)


def divided_experts(rank: int, root: Path, cases: list[divided.Case]) -> None:
    """Tokens that travel to their experts and back. Gathering parameters for the test sends from the
    host."""
    nccl_rules.register(messages_from_host=True)
    divided.run(rank, root, root, cases, nccl_rules.BACKEND)
