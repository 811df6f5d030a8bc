"""Sampler: turns rows of prompts into rows of responses with a generation engine.

It chooses the seeds and stamps the weights' version. Moving weights into the engine is left to
WeightSync (weight_sync.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.context import RankContext
from hybridflow.layout import Layout
from hybridflow.resharding import ParameterSpec
from hybridflow.seeds import spread_seed
from workers.columns import IMAGES, ROUTES
from workers.config import Precision
from workers.consistency import is_exact
from workers.generation import generation_engine_class
from workers.generation.base import Generations, generations
from workers.generation.checked import check_generations
from workers.generation.config import InFlight, SamplingConfig
from workers.generation.rows import FinishedRow
from workers.generation.sampling import load_model_config, most_tokens, with_special_stops
from workers.generation.weight_destination import WeightDestination
from workers.role_config import ActorConfig, RouterReplay, StreamingActorConfig
from workers.tokenizer import load_tokenizer


class Sampler:
    """sampler = Sampler(config, context, layout)
    ...                                         # weights are synchronised
    batch = sampler.generate(prompts, None)
    """

    def __init__(
        self,
        config: ActorConfig,
        context: RankContext,
        layout: Layout,
        *,
        load_weights: bool = False,
        adapter: bool = False,
    ) -> None:
        """Builds the generation engine; `load_weights=False` where a trainer will send them,
        `adapter` where it will send an adapter alone. Collective over the pool."""
        self.config, self.context = config, context
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._vocab_size = int(load_model_config(config.model).vocab_size)
        engine = generation_engine_class(config.generation.engine)
        self.engine = engine(
            model=config.model,
            config=config.generation,
            context=context,
            load_weights=load_weights or adapter,
            layout=layout,
            **({"lora": config.train.lora} if adapter else {}),
        )
        self._routes_shape: tuple[int, int] | None = None
        """Layers with experts and experts per token, where routes are recorded."""
        if config.router_replay is RouterReplay.R3 and not load_weights:
            self._routes_shape = self.engine.record_routes()

    def generate(
        self, prompts: Batch, sampling: SamplingConfig | None, *, do_sample: bool = True
    ) -> Batch:
        """One response for every row, with the version of the weights that drew it.

        `sampling`: None for the configured one; `do_sample=False` takes the most likely token.
        """
        sampling = self._settled(sampling or self.config.generation.sampling)
        prompt_ids = prompts.ragged("prompt_ids")
        limits = row_limits(prompts)
        generated = self.engine.generate(
            [prompt.numpy() for prompt in prompt_ids.unbind()],
            sample_seeds(self.config.seed, prompts),
            sampling if do_sample else replace(sampling, greedy=True),
            limits,
            **row_images(prompts),
        )
        most = np.array(most_tokens(len(prompts), sampling, limits), dtype=np.int64)
        check_generations(
            generated, len(prompts), self._vocab_size, self.config.generation.engine, most
        )
        lengths = torch.from_numpy(generated.lengths)
        batch = Batch.of(
            response_ids=Ragged(torch.from_numpy(generated.response_ids), lengths),
            rollout_log_probs=Ragged(torch.from_numpy(generated.log_probs), lengths),
            finish_reason=generated.finish_reasons,
            num_tokens=prompt_ids.lengths + lengths,
            weight_version=torch.full((len(prompts),), self.engine.weight_version),
        )
        return self._with_routes(batch, generated, prompt_ids.lengths + lengths)

    def close(self) -> None:
        """Ends the engine."""
        self.engine.close()

    def submit(self, prompts: Batch, *, do_sample: bool = True) -> list[int]:
        """Adds a row for every prompt, as generate draws them; returns the engine's keys."""
        sampling = self._settled(self.config.generation.sampling)
        return self.engine.submit(
            [prompt.numpy() for prompt in prompts.ragged("prompt_ids").unbind()],
            sample_seeds(self.config.seed, prompts),
            sampling if do_sample else replace(sampling, greedy=True),
            row_limits(prompts),
            **row_images(prompts),
        )

    def responses(self, rows: Sequence[FinishedRow], prompt_lengths: Tensor) -> Batch:
        """The columns of rows that were submitted and have finished; `prompt_lengths` int64
        [rows]."""
        generated = generations(rows, num_prompt_tokens=int(prompt_lengths.sum()), seconds=0.0)
        most = np.full(len(rows), self.config.generation.sampling.max_response_tokens)
        check_generations(
            generated, len(rows), self._vocab_size, self.config.generation.engine, most
        )
        lengths = torch.from_numpy(generated.lengths)
        versions = np.concatenate([np.empty(0, np.int64), *(row.weight_versions for row in rows)])
        first = np.array([row.weight_versions[0] for row in rows], dtype=np.int64)
        batch = Batch.of(
            response_ids=Ragged(torch.from_numpy(generated.response_ids), lengths),
            rollout_log_probs=Ragged(torch.from_numpy(generated.log_probs), lengths),
            finish_reason=generated.finish_reasons,
            num_tokens=prompt_lengths + lengths,
            weight_version=torch.from_numpy(first),
            token_version=Ragged(torch.from_numpy(versions), lengths),
        )
        return self._with_routes(batch, generated, prompt_lengths + lengths)

    def _with_routes(self, batch: Batch, generated: Generations, lengths: Tensor) -> Batch:
        """The batch with the column of routes, where they are recorded, of rows of `lengths`
        tokens."""
        if self._routes_shape is None:
            return batch
        routes = torch.zeros(0, *self._routes_shape, dtype=torch.int16)
        if generated.routes is not None:
            routes = torch.from_numpy(generated.routes)
        return batch | Batch.of(routes=Ragged(routes, lengths - 1))

    def _settled(self, sampling: SamplingConfig) -> SamplingConfig:
        """The settings with special tokens among their stop strings as ids."""
        if not sampling.stop_strings:
            return sampling
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.config.model)
        return with_special_stops(sampling, self._tokenizer, "sampling")

    def make_destination(self, parameters: Sequence[ParameterSpec]) -> WeightDestination:
        """The engine's memory for the trainer's `parameters`."""
        bf16 = self.config.generation.precision is Precision.bf16
        dtype = torch.bfloat16 if bf16 else torch.float32
        in_flight = InFlight.recompute
        if isinstance(self.config, StreamingActorConfig):
            in_flight = self.config.in_flight
        return self.engine.weight_destination(parameters, dtype, self.context.device, in_flight)


def further_writes(config: ActorConfig) -> dict[str, tuple[str, ...]]:
    """Columns that an actor's generation writes with these settings (Worker.further_writes)."""
    if config.router_replay is not RouterReplay.R3:
        return {}
    return {"generate_sequences": (ROUTES.name,), "collect": (ROUTES.name,)}


def row_limits(prompts: Batch) -> NDArray[np.int64] | None:
    """int64 [rows]: most response tokens of each row, where rows have limits of their own."""
    if "max_response_tokens" not in prompts:
        return None
    limits: NDArray[np.int64] = prompts.tensor("max_response_tokens").numpy()
    return limits


def row_images(prompts: Batch) -> dict[str, Any]:
    """The argument `images` of engines that take it, where the model sees images."""
    if IMAGES.name not in prompts:
        return {}
    return {"images": list(map(tuple, prompts.objects(IMAGES.name)))}


def probe_settings(config: ActorConfig) -> tuple[float, int]:
    """(tolerance of the probe after a sync, size of the vocabulary that its tokens are drawn
    from)."""
    tolerance = config.probe_tolerance
    if tolerance < 0:
        tolerance = 1e-3 if is_exact(config) else 0.1
    return tolerance, int(load_model_config(config.model).vocab_size)


def sample_seeds(seed: int, prompts: Batch) -> np.ndarray:
    """int64 [rows]: one seed for each (run, prompt's use, number of the sample), whatever rank
    or layout draws it."""
    uid = prompts.tensor("uid").numpy().astype(np.uint64)
    sample = np.zeros(len(uid), np.uint64)
    if "sample" in prompts:
        sample = prompts.tensor("sample").numpy().astype(np.uint64)
    mixed = (
        (uid * np.uint64(0x9E3779B97F4A7C15))
        ^ (sample * np.uint64(0xD1B54A32D192ED03))
        ^ np.uint64(spread_seed(seed))
    )
    return (mixed >> np.uint64(1)).astype(np.int64)
