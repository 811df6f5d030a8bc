"""A vLLM engine that also lets vLLM label its tokens with the weights' versions."""

from __future__ import annotations

from typing import Any

from workers.generation.config import InFlight
from workers.generation.rows import FinishedRow
from workers.generation.vllm.engine import VllmEngine


class LabelledEngine(VllmEngine):
    labels: dict[int, list[int]]
    """vLLM's version of every token of a row, by the row's key."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.labels = {}

    def weights_written(self, version: int, in_flight: InFlight = InFlight.recompute) -> None:
        super().weights_written(version, in_flight)
        self.llm.llm_engine.set_weight_version(str(version))

    def _take(self, key: int, output: Any) -> FinishedRow:
        self.labels[key] = []
        for span in output.outputs[0].weight_versions:
            self.labels[key] += [span.version] * (span.end - span.start)
        return super()._take(key, output)
