"""Pipeline: runs a timetable of forward and backward passes and carries activations and gradients
between the stages.

torch.distributed.pipelining is not used for this: its stages exchange tensors of one shape, fixed
at the first step, while micro-batches here differ in rows and time; padding them all to the longest
would compute the padding, and its traced stages refuse the models of transformers. Here every rank
of a pipeline has the same micro-batches, so both ends of a message know its shape. All messages of
one tick go out as one batch of sends and receives; a rank waits for a message only when it needs
it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import P2POp, ProcessGroup, Work

from workers.engines.shared.micro_batches import MicroBatch
from workers.engines.threed.schedule import Action, Tick, timetable
from workers.engines.threed.stages import Stages

Finish = Callable[[int, dict[str, Tensor]], Tensor]
"""(index of the micro-batch, ScoredModel's numbers) -> the tensor to differentiate; called on the
last stage.
"""


@dataclass(frozen=True, slots=True)
class _Message:
    tensor: Tensor
    works: list[Work]

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.tensor

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self.works)


class Pipeline:
    """pipeline.run(micro_batches, finish, train=True): afterwards gradients are where FlatGroup
    collects them."""

    def __init__(
        self,
        stages: Stages,
        group: ProcessGroup,
        tensor_size: int,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.stages = stages
        self.group = group
        self.place, self.size = group.rank(), group.size()
        self.tensor_size, self.hidden_size, self.dtype = tensor_size, hidden_size, dtype

    def run(
        self,
        micro_batches: list[MicroBatch],
        finish: Finish,
        *,
        train: bool,
        entropy: bool,
        temperature: float,
    ) -> None:
        """All passes of one step; collective over the ranks of the pipeline, which must have equal
        micro-batches."""
        step = _Step(self, micro_batches, finish, train, entropy, temperature)
        for tick in timetable(self.size, self.stages.num_stages, len(micro_batches), train):
            action = tick[self.place]
            step.exchange(tick, step.perform(action) if action is not None else None)
        step.close()


class _Step:
    """The passes and messages that are alive during one run."""

    def __init__(
        self,
        pipeline: Pipeline,
        micro_batches: list[MicroBatch],
        finish: Finish,
        train: bool,
        entropy: bool,
        temperature: float,
    ) -> None:
        self.pipeline = pipeline
        self.stages = pipeline.stages
        self.last_stage = pipeline.stages.num_stages - 1
        self.micro_batches, self.finish, self.train = micro_batches, finish, train
        self.entropy, self.temperature = entropy, temperature
        self.inbox: dict[Action, _Message] = {}
        """By the action that it feeds."""
        self.graphs: dict[Action, tuple[Tensor | None, Tensor]] = {}
        """Input and output of each forward pass whose backward pass is to come."""
        self.outgoing: list[_Message] = []

    def perform(self, action: Action) -> Tensor | None:
        """Run an action; the tensor to send on, if there is one."""
        return self._backward(action) if action.backward else self._forward(action)

    def exchange(self, tick: Tick, produced: Tensor | None) -> None:
        """Send what this rank made in the tick and start receiving what others made for it."""
        here, size = self.pipeline.place, self.pipeline.size
        operations: list[P2POp] = []
        arriving: list[tuple[Action, Tensor]] = []
        for place, action in enumerate(tick):
            fed = self._feeds(action)
            if fed is None or (place != here and fed.stage % size != here):
                continue
            if place == here:
                assert produced is not None
                operations.append(
                    P2POp(
                        dist.isend, produced, group=self.pipeline.group, group_peer=fed.stage % size
                    )
                )
            else:
                arriving.append((fed, self._buffer(fed.micro_batch)))
                operations.append(
                    P2POp(dist.irecv, arriving[-1][1], group=self.pipeline.group, group_peer=place)
                )
        if not operations:
            return
        works = dist.batch_isend_irecv(operations)
        apart = len(works) == len(operations)  # NCCL gives one handle for the whole batch
        received = iter(arriving)
        for index, operation in enumerate(operations):
            pending = [works[index]] if apart else works
            if operation.op is dist.isend:
                self.outgoing.append(_Message(operation.tensor, pending))
            else:
                fed, buffer = next(received)
                self.inbox[fed] = _Message(buffer, pending)
        self.outgoing = [message for message in self.outgoing if not message.is_completed()]

    def close(self) -> None:
        for message in self.outgoing:
            message.wait()
        assert not self.inbox and not self.graphs, "the timetable left messages or graphs behind"

    def _forward(self, action: Action) -> Tensor | None:
        received = self.inbox.pop(action).wait() if action.stage else None
        micro_batch = self.micro_batches[action.micro_batch]
        with torch.set_grad_enabled(self.train):
            if received is not None and self.train:
                received.requires_grad_()
            result = self.stages.forward(
                action.stage,
                micro_batch,
                received,
                entropy=self.entropy,
                temperature=self.temperature,
            )
            output = self.finish(action.micro_batch, result) if isinstance(result, dict) else result
        if self.train:
            self.graphs[action] = (received, output)
        return None if action.stage == self.last_stage else output.detach().contiguous()

    def _backward(self, action: Action) -> Tensor | None:
        received, output = self.graphs.pop(Action(action.stage, action.micro_batch))
        gradient = None if action.stage == self.last_stage else self.inbox.pop(action).wait()
        if (
            output.requires_grad
        ):  # else nothing up to here is trained: a first stage without adapters
            torch.autograd.backward(output, gradient)
        if received is None:
            return None
        assert received.grad is not None
        return received.grad.contiguous()

    def _feeds(self, action: Action | None) -> Action | None:
        """The action that needs what `action` makes."""
        if action is None:
            return None
        if action.backward:
            return Action(action.stage - 1, action.micro_batch, True) if action.stage else None
        return (
            Action(action.stage + 1, action.micro_batch) if action.stage < self.last_stage else None
        )

    def _buffer(self, micro_batch: int) -> Tensor:
        ids = self.micro_batches[micro_batch].input_ids
        shape = (len(ids), ids.shape[1] // self.pipeline.tensor_size, self.pipeline.hidden_size)
        return torch.empty(shape, dtype=self.pipeline.dtype, device=ids.device)
