"""WeightDestination: the generation side of a weight sync, memory to fill and then a commit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hybridflow.resharding import Box, LocalParameter, LocalShard, ParameterSpec
from workers.generation.config import InFlight

if TYPE_CHECKING:
    from workers.generation.base import GenerationEngine


class WeightDestination(ABC):
    """Where the generation side takes weights: memory to fill, then a commit."""

    @abstractmethod
    def destinations(self) -> list[LocalParameter]:
        """This rank's boxes of every parameter that the engine needs, and memory to write them
        to."""

    @abstractmethod
    def share(self, sources: Sequence[LocalParameter]) -> None:
        """Let the engine compute with the trainer's own memory (`sources`, of this rank) where
        the two hold the same part in the same form: nothing is moved there any more. For memory
        that both sides keep as long as they live; before destinations()."""

    @abstractmethod
    def commit(self, version: int) -> None:
        """The memory is filled: make the engine use it, and forget everything computed with
        older weights."""

    @abstractmethod
    def release(self) -> int:
        """Give back memory of its own until restore, and say how many bytes that were; the
        engine has its weights without it."""

    @abstractmethod
    def restore(self) -> None:
        """The memory again, at the same places, contents undefined."""


class FullWeights(WeightDestination):
    """For an engine that takes full tensors under checkpoint names: every rank receives the
    whole model."""

    def __init__(
        self,
        engine: GenerationEngine,
        parameters: Sequence[ParameterSpec],
        dtype: torch.dtype,
        device: str,
        in_flight: InFlight = InFlight.recompute,
    ) -> None:
        self.engine, self.in_flight = engine, in_flight
        self.parameters = [
            LocalParameter(
                spec.name,
                spec.shape,
                dtype,
                (
                    LocalShard(
                        Box((0,) * len(spec.shape), spec.shape),
                        torch.empty(spec.shape, dtype=dtype, device=device),
                    ),
                ),
            )
            for spec in parameters
        ]

    def destinations(self) -> list[LocalParameter]:
        return self.parameters

    def share(self, sources: Sequence[LocalParameter]) -> None:
        """The engine copies what it is given."""

    def commit(self, version: int) -> None:
        self.engine.load_weights(
            [(parameter.name, parameter.shards[0].tensor) for parameter in self.parameters],
            version=version,
            in_flight=self.in_flight,
        )

    def release(self) -> int:
        freed = 0
        for parameter in self.parameters:
            storage = parameter.shards[0].tensor.untyped_storage()
            freed += storage.nbytes()
            storage.resize_(0)
        return freed

    def restore(self) -> None:
        for parameter in self.parameters:
            tensor = parameter.shards[0].tensor
            tensor.untyped_storage().resize_(tensor.nbytes)


class OwnWeights(WeightDestination):
    """For an engine that computes with full tensors under checkpoint names: a sync writes them where
    they are, and the model is there once. Until commit the engine has no version."""

    def __init__(
        self,
        engine: GenerationEngine,
        weights: Mapping[str, Tensor],
        in_flight: InFlight = InFlight.recompute,
    ) -> None:
        """`weights`: the engine's, every one of which a sync brings."""
        self.engine, self.in_flight = engine, in_flight
        self.parameters = []
        for name, weight in weights.items():
            tensor, shape = weight.detach(), tuple(weight.shape)
            shard = LocalShard(Box((0,) * len(shape), shape), tensor)
            self.parameters.append(LocalParameter(name, shape, tensor.dtype, (shard,)))

    def destinations(self) -> list[LocalParameter]:
        return self.parameters

    def share(self, sources: Sequence[LocalParameter]) -> None:
        """The engine's memory is its own."""

    def commit(self, version: int) -> None:
        self.engine.weights_written(version, self.in_flight)

    def release(self) -> int:
        return 0

    def restore(self) -> None:
        # A sync that ends half-way leaves weights of two versions.
        self.engine.weight_version = -1
