"""Checks of generation settings: names and ranges of one role, and roles that generate in one pool.

Every problem is a ValueError with field, value and fix. Leaves out what needs the model (model_checks.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from hybridflow.layout import Layout
from recipes.engine_facts import ask_engine, check_library
from workers.generation import ENGINES, generation_engine_class
from workers.generation.config import GenerationConfig
from workers.generation.sampling import check_sampling


def check_generation(role: str, config: GenerationConfig) -> None:
    field = f"{role}.generation.engine"
    engine = generation_engine_class(config.engine, field)
    check_library(field, config.engine, engine.library, ENGINES)
    for name in ("tp", "pp", "max_num_seqs", "max_num_batched_tokens"):
        if vars(config)[name] < 1:
            raise ValueError(f"{role}.generation.{name} is {vars(config)[name]}; use at least 1")
    for name in ("max_model_len", "kv_cache_bytes", "block_size"):
        if vars(config)[name] < 0:
            raise ValueError(
                f"{role}.generation.{name} is {vars(config)[name]}; use at least 1, or 0, which "
                "chooses"
            )
    if not 0 < config.gpu_memory_fraction <= 1:
        raise ValueError(
            f"{role}.generation.gpu_memory_fraction is {config.gpu_memory_fraction}; use a share of "
            "the device's memory, more than 0 and at most 1"
        )
    try:
        ask_engine(config.engine, "check", engine.check, config)
    except ValueError as error:
        raise ValueError(f"{role}.{error}") from None
    try:
        check_sampling(config.sampling)
    except ValueError as error:
        raise ValueError(f"{role}.generation.{error}") from None


def check_generation_groups(pool: str, layouts: Mapping[str, Layout]) -> None:
    """Roles of a pool whose generation engines share one set of groups in each process."""
    for first, other in pairwise(layouts):
        if any(
            sorted(layouts[first].groups(axis)) != sorted(layouts[other].groups(axis))
            for axis in ("tp", "pp")
        ):
            raise ValueError(
                f"{other}.generation: {other} ({layouts[other]}) and {first} ({layouts[first]}) "
                f"generate in pool {pool}, in groups of other ranks; set tp and pp of "
                f"{other}.generation to those of {first}.generation, or give {other} a pool of "
                "its own (placement=custom)"
            )


def check_generation_memory(pool: str, fractions: Mapping[str, float]) -> None:
    """Each engine takes its share of a GPU's memory and keeps it."""
    if sum(fractions.values()) >= 1:
        listed = ", ".join(
            f"{role}.generation.gpu_memory_fraction={fraction}"
            for role, fraction in fractions.items()
        )
        raise ValueError(
            f"pool {pool}: {listed} take all memory of a GPU; lower them, or give each a pool of "
            "its own"
        )


def check_token_ids(field: str, token_ids: Sequence[int], size: int) -> None:
    """Each stands for one of the `size` tokens that the model can draw."""
    for token_id in token_ids:
        if not 0 <= token_id < size:
            raise ValueError(
                f"{field} has {token_id}, and the model's tokens are 0 to {size - 1}; correct it"
            )
