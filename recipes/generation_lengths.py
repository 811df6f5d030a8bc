"""The lengths and the memory of generation, from the data: known once the prompts are read.

max_model_len is the longest prompt with the longest response, the key/value cache of a CPU is what
the rows of a step need, and a CPU's generation releases its memory where it is large. Leaves out
the judge, whose questions are not known before the run: its engine takes the longest that its cache
holds.
"""

from __future__ import annotations

from dataclasses import replace

from controllers.data import PromptDataset, RowDataset
from hybridflow.layout import Layout
from hybridflow.mapping.question.model import ModelSpec
from recipes.config import Device, RunConfig
from recipes.model_checks import most_tokens
from recipes.placing import Placement
from workers.config import Precision
from workers.engines.base import Head
from workers.engines.model.loading import model_config, standard_sizes
from workers.generation import generation_engine_class
from workers.generation.cache import MAX_CACHE_BYTES, cache_bytes_of_rows
from workers.generation.config import GenerationConfig

RELEASED_BYTES = 256 * 2**20
"""Weights and cache of a CPU's generation engine that are given back between generations."""
SHORTEST = 64
"""The smallest max_model_len that is chosen: the probe of a sync must fit."""


def with_generation_lengths(
    placement: Placement, train: RowDataset, held_out: RowDataset | None
) -> RunConfig:
    """The settings with actor.generation.max_model_len and kv_cache_bytes where they are 0, and
    release_during_training where it is null.

    ValueError where kv_cache_bytes is set and does not hold a single row, and for a model that the
    engine can't run at that length.
    """
    config, generation = placement.config, placement.config.actor.generation
    longest = 0
    for dataset in (train, held_out):
        if isinstance(dataset, PromptDataset):
            longest = max(longest, dataset.longest_prompt_tokens)
    if not isinstance(train, PromptDataset):
        return config
    limit, _ = most_tokens(config.actor.model, generation, "actor")
    length = generation.max_model_len
    if not length:
        length = min(limit, max(SHORTEST, longest + generation.sampling.max_response_tokens))
        if config.environment is not None:
            length = limit
    generation = replace(generation, max_model_len=length)
    model = model_config(config.actor.model, Head.lm)
    generation_engine_class(generation.engine).check_model(model, generation)
    if config.device is Device.cpu:
        sizes = standard_sizes(model)
        replicas = 1
        for role in placement.roles:
            layouts = placement.layouts(role)
            if role.name != "judge" and "generation" in layouts:
                replicas = layouts["generation"].axis_size("dp")
        rows = config.data.batch_size * config.algorithm.samples_per_prompt
        one = cache_bytes_of_rows(sizes, generation, 1)
        if generation.kv_cache_bytes and generation.kv_cache_bytes < one:
            raise ValueError(
                f"actor.generation.kv_cache_bytes is {generation.kv_cache_bytes}, and a single "
                f"response of actor.generation.max_model_len={length} tokens needs {one}; raise it, "
                "lower max_model_len, or leave both out"
            )
        if not generation.kv_cache_bytes:
            needed = cache_bytes_of_rows(sizes, generation, -(-rows // replicas))
            generation = replace(generation, kv_cache_bytes=max(one, min(needed, MAX_CACHE_BYTES)))
    if generation.release_during_training is None:
        releases = config.device is Device.cpu and _release_pays(placement, generation)
        generation = replace(generation, release_during_training=releases)
    return replace(config, actor=replace(config.actor, generation=generation))


def _release_pays(placement: Placement, generation: GenerationConfig) -> bool:
    """Whether a CPU's generation engine shares its process with training, and has much to give
    back."""
    if not generation_engine_class(generation.engine).releases:
        return False
    layouts: dict[str, Layout] = {}
    for role in placement.roles:
        if role.name == "actor":
            layouts = placement.layouts(role)
    if not {"train", "generation"} <= layouts.keys():
        return False
    sizes = standard_sizes(model_config(placement.config.actor.model, Head.lm))
    try:
        numbers = ModelSpec.from_hf(sizes).num_parameters / generation.tp / generation.pp
    except ValueError:  # not a plain decoder
        return False
    weights = numbers * (4 if generation.precision is Precision.fp32 else 2)
    return weights + generation.kv_cache_bytes > RELEASED_BYTES
