"""Sampler: the half of the actor that generates. Rows become responses; seeds, versions and the engine's
memory are its business."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.context import RankContext
from hybridflow.layout import Layout
from hybridflow.resharding import ParameterSpec
from workers.config import Precision
from workers.consistency import is_exact
from workers.generation import generation_engine_class
from workers.generation.config import SamplingConfig
from workers.generation.sampling import load_model_config
from workers.generation.weight_destination import WeightDestination
from workers.role_config import ActorConfig


class Sampler:
    """sampler = Sampler(config, context, layout); ...weights in...; batch = sampler.generate(prompts,
    None)"""

    def __init__(
        self, config: ActorConfig, context: RankContext, layout: Layout, *, load_weights: bool = False
    ) -> None:
        """Builds the generation engine, without weights where a trainer will bring them; collective over the
        pool."""
        self.config, self.context = config, context
        engine = generation_engine_class(config.generation.engine)
        self.engine = engine(
            model=config.model,
            config=config.generation,
            context=context,
            load_weights=load_weights,
            layout=layout,
        )

    def generate(self, prompts: Batch, sampling: SamplingConfig | None, *, do_sample: bool = True) -> Batch:
        """One response for every row, with the version of the weights that drew it."""
        sampling = sampling or self.config.generation.sampling
        prompt_ids = prompts.ragged("prompt_ids")
        limits = prompts.tensor("max_response_tokens").numpy() if "max_response_tokens" in prompts else None
        made = self.engine.generate(
            [prompt.numpy() for prompt in prompt_ids.unbind()],
            sample_seeds(self.config.seed, prompts),
            sampling if do_sample else replace(sampling, greedy=True),
            limits,
        )
        lengths = torch.from_numpy(made.lengths)
        return Batch.of(
            response_ids=Ragged(torch.from_numpy(made.response_ids), lengths),
            rollout_log_probs=Ragged(torch.from_numpy(made.log_probs), lengths),
            finish_reason=made.finish_reasons,
            num_tokens=prompt_ids.lengths + lengths,
            weight_version=torch.full((len(prompts),), self.engine.weight_version),
        )

    def make_destination(self, parameters: Sequence[ParameterSpec]) -> WeightDestination:
        """Where the engine takes the trainer's `parameters`."""
        bf16 = self.config.generation.precision is Precision.bf16
        dtype = torch.bfloat16 if bf16 else torch.float32
        return self.engine.weight_destination(parameters, dtype, self.context.device)


def probe_settings(config: ActorConfig) -> tuple[float, int]:
    """(probe's tolerance, vocabulary to draw its tokens from)."""
    tolerance = config.probe_tolerance if config.probe_tolerance >= 0 else 1e-3 if is_exact(config) else 0.1
    return tolerance, int(load_model_config(config.model).vocab_size)


def sample_seeds(seed: int, prompts: Batch) -> np.ndarray:
    """int64 [rows]: one seed for each (run, prompt's use, number of the sample), whatever rank or layout
    draws it."""
    uid = cast(Tensor, prompts["uid"]).numpy().astype(np.uint64)
    sample = (
        cast(Tensor, prompts["sample"]).numpy().astype(np.uint64)
        if "sample" in prompts
        else np.zeros(len(uid), np.uint64)
    )
    mixed = (
        (uid * np.uint64(0x9E3779B97F4A7C15))
        ^ (sample * np.uint64(0xD1B54A32D192ED03))
        ^ np.uint64((seed * 0x2545F4914F6CDD1D) % 2**64)
    )
    return (mixed >> np.uint64(1)).astype(np.int64)
