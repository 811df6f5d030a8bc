"""ZeRO-1: AdamW whose float32 master weights and states are split over the data ranks (Rajbhandari
et al. 2020, stage 1).

A rank's parameters lie one after the other in a few flat buffers (FlatGroup), in the compute dtype;
the modules' parameters are views of them. Gradients add up in a float32 buffer of the same shape
over all micro-batches; a reduce-scatter of each buffer gives each data rank the sum for its part; it
updates that part and an all-gather brings the new weights to all. A buffer's reduce-scatter begins
when its gradients are final, while the backward pass of the last micro-batch goes on with the layers
before; data ranks begin them in the same order, the last layers' first, whatever their passes are.
In float32 the master weights are the working weights themselves. Memory for gradients and states is
taken by the first training step: a model that only scores has its weights and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from operator import add

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from hybridflow.resharding.shards import Box
from workers.config import OptimizerConfig
from workers.engines.shared.flat_views import flat_views
from workers.engines.shared.gloo_sums import PartsUnderWay
from workers.engines.shared.host_memory import HostMemory
from workers.engines.shared.optimizer import (
    clip,
    learning_rate,
    no_moments,
    set_learning_rate,
    sum_of_squares,
)

BUCKET_ELEMENTS = 25_000_000
"""Elements from which on a group has its own reduction: enough to use a link fully, and few beside
the gradients that are still to come."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatSlice:
    """This rank's part of one logical parameter, or one of its parts of a fused projection.

    FlatSlice(name="model.norm.weight", shape=(64,), box=Box((0,), (64,)), places=((norm, "weight"),),
    replicated=True, partial=True, tied=False, copies=2)
    """

    name: str
    """The checkpoint's name."""
    shape: tuple[int, ...]
    """Global shape."""
    box: Box
    places: tuple[tuple[nn.Module, str], ...]
    """Modules and attributes that use it: two for tied embeddings on one rank."""
    replicated: bool
    """All ranks of the tensor axis hold the same elements."""
    partial: bool
    """Replicated, and each of those ranks has only its share of the gradient."""
    tied: bool
    """The first and the last pipeline stage hold the same elements, and each has only its share
    of the gradient."""
    copies: int
    """How many ranks of one data coordinate hold the same elements."""
    divided: bool = False
    """Experts, which ranks of different data coordinates hold different ones of."""
    index: int = 0
    """Its place among the rank's parameters, in the order of modules."""

    @property
    def decays(self) -> bool:
        """Weight decay is for matrices only."""
        return len(self.shape) >= 2


class FlatGroup:
    """Pieces with the same treatment in one buffer, split over the data ranks in equal parts
    (the last one is padded)."""

    def __init__(
        self,
        pieces: list[FlatSlice],
        dtype: torch.dtype,
        device: torch.device,
        data_group: ProcessGroup,
        sum_groups: list[ProcessGroup],
    ) -> None:
        self.pieces = pieces
        self.dtype = dtype
        self.data_group = data_group
        self.sum_groups = sum_groups
        """Axes besides data whose ranks hold shares of the same gradients."""
        self.copies, self.decays = pieces[0].copies, pieces[0].decays
        *self.starts, total = accumulate((piece.box.numel for piece in pieces), initial=0)
        self.part_size = -(-total // data_group.size())
        begin = data_group.rank() * self.part_size
        self.part = slice(begin, begin + self.part_size)
        """The data rank's part of the buffers."""
        self.weights = torch.zeros(self.part_size * data_group.size(), dtype=dtype, device=device)
        self.gradient: Tensor | None = None
        self.missing = 0
        """Gradients of pieces and micro-batches that are still to come in this step."""
        self.final: Callable[[], None] = _nothing
        """Called when none is missing."""
        self._part: Tensor | None = None
        self._reduction: dist.Work | PartsUnderWay | None = None
        self._master = self.weights[self.part] if dtype is torch.float32 else None
        for piece, view in zip(pieces, self.views(self.weights), strict=True):
            parameter = nn.Parameter(view)
            for module, name in piece.places:
                module._parameters[name] = parameter
            parameter.register_post_accumulate_grad_hook(self._accumulate(piece))

    @property
    def master(self) -> Tensor:
        """float32 [part_size]; made from the working weights when first asked for."""
        if self._master is None:
            self._master = self.weights[self.part].float()
        return self._master

    def views(self, flat: Tensor) -> list[Tensor]:
        """The pieces' local tensors inside a flat buffer."""
        views = []
        for start, piece in zip(self.starts, self.pieces, strict=True):
            views.append(flat[start : start + piece.box.numel].view(piece.box.shape))
        return views

    def part_of(self, piece: int) -> tuple[int, int]:
        """The elements [begin, end) of a piece, counted within it, that are in this data rank's
        part; empty if begin >= end."""
        start = self.starts[piece]
        return max(0, self.part.start - start), min(
            self.pieces[piece].box.numel, self.part.stop - start
        )

    def boxes(self, piece: int, part: Tensor) -> Iterator[tuple[Box, Tensor]]:
        """The boxes of a piece that `part`, this data rank's part of a buffer, holds; views."""
        around = self.pieces[piece].box
        begin, end = self.part_of(piece)
        if begin >= end:
            return
        first = self.starts[piece] - self.part.start + begin
        for box, view in flat_views(around.shape, begin, end, part[first:]):
            yield Box(tuple(map(add, box.start, around.start)), box.shape), view

    def write(self, piece: int, value: Tensor) -> None:
        """Set a piece from float32 values; master weights come to life early if the compute
        dtype cannot hold the values."""
        view = self.views(self.weights)[piece]
        rounded = value.to(self.dtype)
        if self._master is None and not torch.equal(rounded.float(), value.float()):
            self._master = self.weights[self.part].float()
        view.copy_(rounded)
        begin, end = self.part_of(piece)
        if self._master is not None and begin < end:
            offset = self.starts[piece] - self.part.start
            self._master[offset + begin : offset + end] = value.reshape(-1)[begin:end]

    def begin_step(self, num_passes: int) -> None:
        """A gradient buffer of zeros that the next `num_passes` backward passes add to."""
        self.missing = num_passes * len(self.pieces)
        self._settle()
        if self.gradient is None:
            self.gradient = torch.zeros(
                len(self.weights), dtype=torch.float32, device=self.weights.device
            )
        else:
            self.gradient.zero_()
        if self.dtype is torch.float32:
            for piece, view in zip(self.pieces, self.views(self.gradient), strict=True):
                module, name = piece.places[0]
                module.get_parameter(name).grad = view

    def reduce(self) -> Tensor:
        """The sum of the gradient over all ranks that have a share of it, for this data rank's
        part: float32 [part_size]."""
        self.begin_reduction()
        assert self._part is not None
        part = self._part
        self._settle()
        for group in self.sum_groups:
            dist.all_reduce(part, group=group)
        return part

    def begin_reduction(self) -> None:
        """Over data ranks, beside what this rank goes on with; once a step. Collective."""
        assert self.gradient is not None, "reduce before begin_step"
        if self._part is not None:
            return
        self._part = self.gradient
        if self.data_group.size() > 1:
            self._part = torch.empty(
                self.part_size, dtype=torch.float32, device=self.weights.device
            )
            if dist.get_backend(self.data_group) == "gloo":
                self._reduction = PartsUnderWay.begin(self._part, self.gradient, self.data_group)
            else:
                self._reduction = dist.reduce_scatter_single(
                    self._part, self.gradient, group=self.data_group, async_op=True
                )

    def _settle(self) -> None:
        """Waits for a reduction that is under way."""
        if self._reduction is not None:
            self._reduction.wait()
        self._reduction = self._part = None

    def publish(self) -> None:
        """Bring the master weights of all data ranks into everybody's working weights."""
        if self.dtype is not torch.float32:
            self.weights[self.part].copy_(self.master)
        if self.data_group.size() > 1:
            dist.all_gather_single(
                self.weights, self.weights[self.part].clone(), group=self.data_group
            )

    def free(self) -> None:
        """Drop the gradient buffer until the next step."""
        self._settle()
        self.gradient = None
        for piece in self.pieces:
            module, name = piece.places[0]
            module.get_parameter(name).grad = None

    def move_master(self, key: Hashable, device: torch.device, memory: HostMemory) -> None:
        """Move the master weights, if they are not the working weights."""
        if self.dtype is not torch.float32 and self._master is not None:
            self._master = memory.move(key, self._master, device)

    def _accumulate(self, piece: FlatSlice) -> Callable[[Tensor], None]:
        index = self.pieces.index(piece)

        def accumulate(parameter: Tensor) -> None:
            assert self.gradient is not None and parameter.grad is not None, (
                "backward before begin_step"
            )
            if self.dtype is not torch.float32:
                start = self.starts[index]
                self.gradient[start : start + piece.box.numel].view(piece.box.shape).add_(
                    parameter.grad
                )
                parameter.grad = None
            self.missing -= 1
            assert self.missing >= 0, f"{piece.name}: a gradient came after all were there"
            if not self.missing:
                self.final()

        return accumulate


def _nothing() -> None:
    pass


def group_pieces(pieces: list[FlatSlice]) -> list[list[FlatSlice]]:
    """Pieces by treatment, cut into groups of about BUCKET_ELEMENTS; every rank of an axis that
    shares gradients forms the same groups in the same order."""
    groups: dict[tuple[bool, bool, bool, int, bool], list[FlatSlice]] = {}
    for piece in pieces:
        key = (piece.tied, piece.partial, piece.decays, piece.copies, piece.divided)
        groups.setdefault(key, []).append(piece)
    result = []
    for key in sorted(groups):
        bucket, elements = list[FlatSlice](), 0
        for piece in groups[key]:
            bucket.append(piece)
            elements += piece.box.numel
            if elements >= BUCKET_ELEMENTS:
                result.append(bucket)
                bucket, elements = [], 0
        if bucket:
            result.append(bucket)
    return result


class ZeroOptimizer:
    """optimizer.begin_step(num_passes); backward passes; norm, rate = optimizer.step()."""

    def __init__(
        self, groups: list[FlatGroup], config: OptimizerConfig, device: torch.device
    ) -> None:
        """`groups`: none on a pipeline stage where nothing is trained."""
        self.groups = groups
        self.config = config
        self.device = device
        self.num_steps = 0
        """Steps taken: where the learning-rate schedule stands."""
        self.adam: torch.optim.AdamW | None = None
        self.num_early = 0
        """Groups whose reduction began before the backward passes of the latest step ended."""
        self._unreduced = list[FlatGroup]()
        for group in groups:
            group.final = self._reduce_final

    def begin_step(self, num_passes: int) -> None:
        """`num_passes`: backward passes of every stage, one for each micro-batch."""
        self.num_early = 0
        self._unreduced = sorted(self.groups, key=lambda group: group.pieces[0].index)
        for group in self.groups:
            group.begin_step(num_passes)

    def _reduce_final(self) -> None:
        """Begins the reductions whose turn it is, the last layers' first: data ranks have the same
        order, though some of them may have no micro-batch."""
        while self._unreduced and not self._unreduced[-1].missing:
            self._unreduced.pop().begin_reduction()
            self.num_early += 1

    def step(self) -> tuple[float, float]:
        """(gradient norm over all ranks before clipping, learning rate); NotFiniteError for a
        norm that is not finite."""
        while self._unreduced:
            self._unreduced.pop().begin_reduction()
        parts = [group.reduce() for group in self.groups]
        norm = self._norm(parts)
        clip(parts, norm, self.config.clip_grad_norm, self._not_finite)
        adam = self.states()
        rate = learning_rate(self.config, self.num_steps)
        set_learning_rate(adam, rate)
        for group, part in zip(self.groups, parts, strict=True):
            group.master.grad = part
        adam.step()
        for group in self.groups:
            group.master.grad = None
            group.publish()
        self.num_steps += 1
        return norm, rate

    def states(self) -> torch.optim.AdamW:
        """The AdamW over the data rank's parts, with its states; made when first asked for."""
        if self.adam is None:
            options = []
            for group in self.groups:
                decay = self.config.weight_decay * group.decays
                options.append({"params": [group.master], "weight_decay": decay})
            if not options:  # AdamW wants a parameter
                options.append({"params": [torch.zeros(0, device=self.device)]})
            self.adam = torch.optim.AdamW(
                options,
                lr=self.config.learning_rate,
                betas=(self.config.beta1, self.config.beta2),
                eps=self.config.epsilon,
                fused=True,
            )
            for group in self.groups:
                self.adam.state[group.master] = no_moments(group.master)
        return self.adam

    def restored(self, num_steps: int) -> None:
        """After weights and states were overwritten with those of step `num_steps`."""
        self.num_steps = num_steps
        for state in self.states().state.values():
            state["step"].fill_(float(num_steps))
        for group in self.groups:
            group.publish()

    def free_gradients(self) -> None:
        for group in self.groups:
            group.free()

    def move(self, device: torch.device, memory: HostMemory) -> None:
        """Master weights and states to `device`, through `memory`."""
        old = [group.master for group in self.groups] if self.adam is not None else []
        for index, group in enumerate(self.groups):
            group.move_master(("master", index), device, memory)
        if self.adam is None or not self.groups:
            return
        triples = zip(self.groups, old, self.adam.param_groups, strict=True)
        for index, (group, before, options) in enumerate(triples):
            state = self.adam.state.pop(before)
            for name, value in state.items():
                state[name] = memory.move((name, index), value, device)
            self.adam.state[group.master] = state
            options["params"] = [group.master]

    def _norm(self, parts: list[Tensor]) -> float:
        """L2 norm of the whole gradient: each element once, however many ranks hold it."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for group, part in zip(self.groups, parts, strict=True):
            total += sum_of_squares(part) / group.copies
        dist.all_reduce(total)
        return float(total.sqrt())

    def _not_finite(self) -> list[str]:
        """Names of this rank's parameters whose own gradients are not finite."""
        names = []
        for group in self.groups:
            assert group.gradient is not None
            for piece, view in zip(group.pieces, group.views(group.gradient), strict=True):
                if not bool(torch.isfinite(view).all()):
                    names.append(piece.name)
        return names
