"""GeneratorWorker: a language model that only answers (evaluation, a data set of responses), over a
generation engine alone.

The weights are those on disk: there is no trainer, and nothing to synchronise.
"""

from __future__ import annotations

from typing import ClassVar

from hybridflow.batch import Batch
from hybridflow.context import RankContext
from hybridflow.layout import Layout
from workers.generation.config import SamplingConfig
from workers.layouts import generation_layout
from workers.precision import with_native_precision
from workers.role_config import ActorConfig
from workers.roles import Generator
from workers.sampler import Sampler


class GeneratorWorker(Generator):
    """Takes the actor's settings, so that what was trained is asked in the same words."""

    config: ActorConfig
    sampler_class: ClassVar[type[Sampler]] = Sampler

    def __init__(self, config: ActorConfig, context: RankContext) -> None:
        super().__init__(with_native_precision(config, context.device), context)
        self.sampler = self.sampler_class(
            self.config,
            context,
            self.layouts(config, context.world_size)["generation"],
            load_weights=True,
        )

    @classmethod
    def layouts(cls, config: ActorConfig, world_size: int) -> dict[str, Layout]:
        return {"generation": generation_layout(config.generation, world_size, "actor")}

    def generate_sequences(
        self, prompts: Batch, sampling: SamplingConfig | None = None, *, do_sample: bool = True
    ) -> Batch:
        return self.sampler.generate(prompts, sampling, do_sample=do_sample)

    def close(self) -> None:
        self.sampler.close()
