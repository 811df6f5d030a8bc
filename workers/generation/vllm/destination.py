"""VllmShards: where a weight sync writes for vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hybridflow.resharding import LocalParameter, ParameterSpec
from workers.generation.config import InFlight
from workers.generation.vllm.weights import VllmWeights
from workers.generation.weight_destination import WeightDestination

if TYPE_CHECKING:
    from workers.generation.vllm.engine import VllmEngine


class VllmShards(WeightDestination):
    """Every rank receives the boxes that its part of the model consists of, written in place
    where vLLM allows it."""

    def __init__(
        self, engine: VllmEngine, parameters: Sequence[ParameterSpec], in_flight: InFlight
    ) -> None:
        self.engine, self.in_flight = engine, in_flight
        self.weights = VllmWeights(
            engine.llm, {parameter.name: parameter.shape for parameter in parameters}
        )

    def destinations(self) -> list[LocalParameter]:
        return self.weights.destinations()

    def share(self, sources: Sequence[LocalParameter]) -> None:
        if self.engine.has_graphs:
            return  # they compute with the memory that the weights had when they were captured
        self.weights.share(sources)

    def commit(self, version: int) -> None:
        self.weights.commit()
        self.engine.weights_written(version, self.in_flight)

    def release(self) -> int:
        return self.weights.free_staging()

    def restore(self) -> None:
        self.weights.take_back_staging()
