"""Stage B: process groups that compute over gloo, hold NCCL's rules and fail with one line.

    nccl_rules.register()                                   # in every rank, once
    dist.init_process_group(nccl_rules.BACKEND, ...)        # groups made later follow it

Tensors lie in host memory and stand for those of a GPU. What NCCL answers by a hang, by wrong numbers
or by a communicator for each pair of ranks is an NcclRuleError here: another collective than the
other ranks', other sizes, types that it lacks, tensors that are not contiguous, a message as a
group's first operation, messages outside a batch, buffers that are used before wait(). Results
arrive at wait(), and their memory holds NaN until then. Streams and times are left out: operations
of one group that wait for each other in a circle are not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

BACKEND = "nccl_rules"
DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
REDUCTIONS = {
    "SUM": dist.ReduceOp.SUM,
    "AVG": dist.ReduceOp.AVG,
    "PRODUCT": dist.ReduceOp.PRODUCT,
    "MIN": dist.ReduceOp.MIN,
    "MAX": dist.ReduceOp.MAX,
}
"""Those that NCCL has."""
plain_batch = dist.batch_isend_irecv


class NcclRuleError(RuntimeError):
    """An operation that NCCL does not do; names the group, the rank and the rule."""


class Coalesces:
    """What torch.distributed asks a group's backend."""

    supports_coalescing = True
    supports_splitting = False


class Pending(dist.Work):
    """An operation whose results arrive at wait()."""

    def __init__(self, group: RuledGroup, name: str) -> None:
        super().__init__()
        self.group, self.name, self.done = group, name, False
        self.works: list[dist.Work] = []
        self.results: list[tuple[Tensor, Tensor]] = []
        """Memory of the caller, and where its contents are until wait()."""
        self.sources: list[tuple[Tensor, Tensor]] = []
        """Tensors that are read, and copies of what they held."""

    def reads(self, tensor: Tensor) -> Tensor:
        copy = tensor.detach().clone()
        self.sources.append((tensor.detach(), copy))
        return copy

    def writes(self, tensor: Tensor) -> Tensor:
        """Memory for a result that is written whole."""
        memory = torch.empty_like(tensor)
        self.results.append((tensor.detach(), memory))
        poison(tensor.detach())
        return memory

    def replaces(self, tensor: Tensor) -> Tensor:
        """A copy that the operation reads and writes."""
        memory = tensor.detach().clone()
        self.results.append((tensor.detach(), memory))
        poison(tensor.detach())
        return memory

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        if self.done:
            return True
        for work in self.works:
            work.wait()
        for source, copy in self.sources:
            if not same_bits(source, copy):
                self.group.refuse(self.name, "what it sends was written before wait()")
        for tensor, memory in self.results:
            tensor.copy_(memory)
        self.done = True
        self.group.pending.discard(self)
        return True

    def is_completed(self) -> bool:
        return self.done

    def is_success(self) -> bool:
        return self.done

    def get_future(self) -> torch.futures.Future[Any]:
        self.wait()
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result([tensor for tensor, _ in self.results])
        return future


def poison(tensor: Tensor) -> None:
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    else:
        tensor.view(-1).view(torch.uint8).fill_(1 if tensor.dtype is torch.bool else 0x5A)


def same_bits(left: Tensor, right: Tensor) -> bool:
    if not left.numel():
        return True
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def form(tensors: Sequence[Tensor]) -> str:
    """Sizes and types, which must be the same on all ranks."""
    return ", ".join(f"{tensor.numel()} x {str(tensor.dtype)[6:]}" for tensor in tensors)


def reduction(op: Any) -> str:
    """Its name, the same on all ranks; empty for one that NCCL lacks."""
    for name, kind in REDUCTIONS.items():
        if op == kind:
            return name
    return ""


class RuledGroup(dist.ProcessGroup):
    """One group. A group that torch.distributed does not know works too, as spanning groups do."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.number, self.count = rank, size
        self.store = dist.PrefixStore("rules", store)
        self.inner = dist.ProcessGroup(dist.PrefixStore("inner", store), rank, size)
        gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, timeout)
        gloo._set_sequence_number_for_group()
        self.inner._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        self.inner._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        self.collectives = 0
        self.batch: list[Callable[[Pending], dist.Work]] | None = None
        self.pending: set[Pending] = set()
        """Kept alive until wait(): torch holds their C++ halves only."""
        self.messages_from_host = False
        """Whether messages outside a batch are those of host memory, which gloo carries beside
        NCCL."""

    def size(self) -> int:
        return self.count

    def rank(self) -> int:
        return self.number

    @property
    def group_name(self) -> str:  # type: ignore[override]
        return c10d._world.pg_names.get(self, "spanning")

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def _get_backend(self, device: torch.device) -> Any:
        return Coalesces

    def getBackendName(self) -> str:
        return BACKEND

    def refuse(self, name: str, why: str) -> None:
        raise NcclRuleError(f"NCCL: {name} of group {self.group_name}, rank {self.number}: {why}")

    def check(self, name: str, tensors: Sequence[Tensor], op: Any = None) -> None:
        for tensor in tensors:
            shape = tuple(tensor.shape)
            if not tensor.is_contiguous():
                self.refuse(name, f"a tensor {shape} of strides {tensor.stride()}: not contiguous")
            if tensor.dtype not in DTYPES:
                self.refuse(name, f"a tensor {shape} of {tensor.dtype}, which NCCL lacks")
            if op is not None and op == dist.ReduceOp.AVG and tensor.dtype is torch.bool:
                self.refuse(name, "a mean of bools")
        if op is not None and not reduction(op):
            self.refuse(name, "a bitwise reduction, which NCCL lacks")

    def together(self, name: str, detail: str) -> None:
        """All ranks have the same operation next; the first to come says which."""
        self.collectives += 1
        text = f"{name}({detail})"
        first = self.store.compare_set(str(self.collectives), "", f"{self.number} {text}")
        rank, _, theirs = first.decode().partition(" ")
        if theirs != text:
            what = f"{text} as its operation {self.collectives}, where rank {rank} has {theirs}"
            self.refuse(name, what)

    def start(self, name: str, run: Callable[[Pending], dist.Work]) -> Pending:
        if self.batch is not None:
            self.refuse(name, "a collective inside a batch of messages")
        work = Pending(self, name)
        work.works.append(run(work))
        self.pending.add(work)
        return work

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Pending:
        opts = opts or dist.AllreduceOptions()
        self.check("all_reduce", tensors, opts.reduceOp)
        self.together("all_reduce", f"{form(tensors)}, {reduction(opts.reduceOp)}")
        return self.start(
            "all_reduce",
            lambda work: self.inner.allreduce([work.replaces(t) for t in tensors], opts),
        )

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Pending:
        works = [self.allreduce([tensor], opts) for tensor in tensors]
        return self.all_of("all_reduce", works)

    def all_of(self, name: str, works: Sequence[Pending]) -> Pending:
        whole = Pending(self, name)
        whole.works.extend(works)
        self.pending.add(whole)
        return whole

    def reduce(self, tensors: list[Tensor], opts: Any = None) -> Pending:
        self.check("reduce", tensors, opts.reduceOp)
        self.together("reduce", f"{form(tensors)}, {reduction(opts.reduceOp)}, to {opts.rootRank}")
        return self.start(
            "reduce", lambda work: self.inner.reduce([work.replaces(t) for t in tensors], opts)
        )

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Pending:
        self.check("broadcast", tensors)
        self.together("broadcast", f"{form(tensors)}, from {opts.rootRank}")
        return self.start(
            "broadcast",
            lambda work: self.inner.broadcast([work.replaces(t) for t in tensors], opts),
        )

    def allgather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> Pending:
        opts = opts or dist.AllgatherOptions()
        self.check("all_gather", [*outputs[0], *inputs])
        place = outputs[0][self.number]
        if place.numel() != inputs[0].numel() or place.dtype != inputs[0].dtype:
            self.refuse("all_gather", f"{form(inputs)} into a place of {form([place])}")
        self.together("all_gather", form(outputs[0]))
        return self.start(
            "all_gather",
            lambda work: self.inner.allgather(
                [[work.writes(t) for t in outputs[0]]], [work.reads(inputs[0])], opts
            ),
        )

    def all_gather_single(self, output: Tensor, part: Tensor, opts: Any = None) -> Pending:
        opts = opts or dist.AllgatherOptions()
        self.check("all_gather_single", [output, part])
        if output.numel() != part.numel() * self.count or output.dtype != part.dtype:
            self.refuse(
                "all_gather_single", f"{form([part])} of {self.count} into {form([output])}"
            )
        self.together("all_gather_single", form([part]))

        def run(work: Pending) -> dist.Work:
            source = part.detach().clone()  # it may be a part of the output
            return self.inner.all_gather_single(work.writes(output), source, opts)

        return self.start("all_gather_single", run)

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], parts: list[Tensor], opts: Any = None
    ) -> Pending:
        pairs = zip(outputs, parts, strict=True)
        return self.all_of("all_gather_single", [self.all_gather_single(o, p) for o, p in pairs])

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def reduce_scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None
    ) -> Pending:
        opts = opts or dist.ReduceScatterOptions()
        self.check("reduce_scatter", [*outputs, *inputs[0]], opts.reduceOp)
        self.together("reduce_scatter", f"{form(inputs[0])}, {reduction(opts.reduceOp)}")
        return self.start(
            "reduce_scatter",
            lambda work: self.inner.reduce_scatter(
                [work.writes(outputs[0])], [[work.reads(t) for t in inputs[0]]], opts
            ),
        )

    def reduce_scatter_single(self, output: Tensor, whole: Tensor, opts: Any = None) -> Pending:
        opts = opts or dist.ReduceScatterOptions()
        self.check("reduce_scatter_single", [output, whole], opts.reduceOp)
        if whole.numel() != output.numel() * self.count or output.dtype != whole.dtype:
            what = f"{form([whole])} into {form([output])} of {self.count}"
            self.refuse("reduce_scatter_single", what)
        self.together("reduce_scatter_single", f"{form([whole])}, {reduction(opts.reduceOp)}")

        def run(work: Pending) -> dist.Work:
            source = whole.detach().clone()
            return self.inner.reduce_scatter_single(work.writes(output), source, opts)

        return self.start("reduce_scatter_single", run)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> Pending:
        works = []
        for output, whole in zip(outputs, inputs, strict=True):
            works.append(self.reduce_scatter_single(output, whole, opts))
        return self.all_of("reduce_scatter_single", works)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def all_to_all_single(
        self,
        output: Tensor,
        whole: Tensor,
        received: list[int],
        sent: list[int],
        opts: Any = None,
    ) -> Pending:
        opts = opts or dist.AllToAllOptions()
        self.check("all_to_all_single", [output, whole])
        equal = "" if received or sent else f", {whole.numel()}"
        self.together("all_to_all_single", f"{whole.dtype}{equal}")
        return self.start(
            "all_to_all_single",
            lambda work: self.inner.all_to_all_single(
                work.writes(output), work.reads(whole), received, sent, opts
            ),
        )

    alltoall_base = all_to_all_single

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Pending:
        self.check("all_to_all", [*outputs, *inputs])
        self.together("all_to_all", str(inputs[0].dtype))

        def run(work: Pending) -> dist.Work:
            # gloo has the flat form only.
            flat = torch.cat([work.reads(t).reshape(-1) for t in inputs])
            arriving = torch.cat([torch.empty_like(t).reshape(-1) for t in outputs])
            received, sent = [t.numel() for t in outputs], [t.numel() for t in inputs]
            for tensor, part in zip(outputs, arriving.split(received), strict=True):
                work.results.append((tensor.detach(), part.view(tensor.shape)))
                poison(tensor.detach())
            return self.inner.all_to_all_single(
                arriving, flat, received, sent, dist.AllToAllOptions()
            )

        return self.start("all_to_all", run)

    def barrier(self, opts: Any = None) -> Pending:
        self.together("barrier", "")
        return self.start("barrier", lambda work: self.inner.barrier())

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> dist.Work | None:
        return self.message(
            "send", tensors, peer, lambda work, t: self.inner.send([work.reads(t)], peer, 0), tag
        )

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> dist.Work | None:
        return self.message(
            "recv", tensors, peer, lambda work, t: self.inner.recv([work.writes(t)], peer, 0), tag
        )

    def message(
        self,
        name: str,
        tensors: list[Tensor],
        peer: int,
        run: Callable[[Pending, Tensor], dist.Work],
        tag: int,
    ) -> dist.Work | None:
        self.check(name, tensors)
        if tag:
            self.refuse(name, f"tag {tag}: NCCL's messages have none")
        if self.batch is not None:
            if peer == self.number:
                self.refuse(name, "a message to itself")
            self.batch.append(lambda work: run(work, tensors[0]))
            return None
        if not self.messages_from_host:
            self.refuse(
                name,
                f"a message with rank {peer} outside a batch: NCCL keeps a communicator for each "
                "such pair, and two that wait for each other hang (batch_isend_irecv)",
            )
        return self.start(name, lambda work: run(work, tensors[0]))

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> dist.Work:
        self.refuse("recv", "from any rank, which NCCL lacks")
        raise AssertionError

    def _start_coalescing(self, device: torch.device) -> None:
        if self.batch is not None:
            self.refuse("batch", "inside another batch")
        self.batch = []

    def _end_coalescing(self, device: torch.device) -> Pending:
        """The messages of a batch start together and end together."""
        posted, self.batch = self.batch or [], None
        if posted and not self.collectives:
            self.refuse(
                "batch",
                "messages as the group's first operation, which all ranks must join "
                "(a small all_reduce before it)",
            )
        work = Pending(self, "batch")
        for run in posted:
            work.works.append(run(work))
        self.pending.add(work)
        return work


def batch_isend_irecv(operations: list[dist.P2POp]) -> list[dist.Work]:
    """torch.distributed's, which coalesces for groups of its own class only."""
    group = operations[0].group or dist.group.WORLD
    if not isinstance(group, RuledGroup):
        works: list[dist.Work] = plain_batch(operations)
        return works
    device = operations[0].tensor.device
    group._start_coalescing(device)
    for operation in operations:
        if operation.op is dist.isend:
            group.send([operation.tensor], operation.group_peer, operation.tag)
        else:
            group.recv([operation.tensor], operation.group_peer, operation.tag)
    return [group._end_coalescing(device)]


def register(*, messages_from_host: bool = False) -> None:
    """Make BACKEND known to torch.distributed in this process, for good. `messages_from_host`:
    messages outside a batch are of host memory, which a world of GPUs sends over gloo."""

    def create(
        store: dist.Store, rank: int, size: int, timeout: timedelta = c10d.default_pg_timeout
    ) -> RuledGroup:
        group = RuledGroup(store, rank, size, timeout)
        group.messages_from_host = messages_from_host
        return group

    dist.Backend.register_backend(BACKEND, create, devices=["cpu"])
    dist.batch_isend_irecv = batch_isend_irecv
