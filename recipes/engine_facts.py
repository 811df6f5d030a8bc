"""Facts that engines state of themselves before a run, held to their contract: an engine may be another
package's, and whatever is wrong with it is a ValueError in one line that names it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from hybridflow.mapping.question.space import SearchSpace
from hybridflow.registry import Registry
from workers.config import TrainConfig
from workers.engines import engine_class

ZERO_STAGES = (0, 1, 2, 3)


def ask_engine(name: str, fact: str, answer: Callable[..., Any], *arguments: Any) -> Any:
    """answer(*arguments), a class method of the engine `name`. A ValueError is the engine's own
    refusal and passes; anything else that it raises is a fault of the engine."""
    try:
        return answer(*arguments)
    except ValueError:
        raise
    except Exception as error:
        # The engine is somebody else's: whatever it raises, the run does not start.
        raise ValueError(
            f"engine {name!r}: {fact}() fails ({type(error).__name__}: {error})"
        ) from error


def limited_space(name: str, space: SearchSpace) -> SearchSpace:
    """The mapper's search space, narrowed to what the training engine has."""
    limited = ask_engine(name, "limit", engine_class(name).limit, space)
    if not isinstance(limited, SearchSpace):
        raise ValueError(
            f"engine {name!r}: limit() returns {limited!r}, not a SearchSpace; return the one that "
            "it gets, narrowed by dataclasses.replace"
        )
    if not engine_class(name).shares_rows:
        limited = replace(limited, context_sizes=(1,))
    if not engine_class(name).divides_experts:
        limited = replace(limited, expert_sizes=(1,))
    return limited


def budget_of(config: TrainConfig, num_tokens: int) -> int:
    """Tokens of the engine's micro-batches where a data coordinate has rows of `num_tokens`."""
    budget = engine_class(config.engine).budget_tokens
    return int(ask_engine(config.engine, "budget_tokens", budget, config, num_tokens))


def zero_stage_of(config: TrainConfig) -> int:
    """The ZeRO stage that the mapper counts with."""
    stage = ask_engine(config.engine, "zero_stage", engine_class(config.engine).zero_stage, config)
    if stage not in ZERO_STAGES:
        raise ValueError(
            f"engine {config.engine!r}: zero_stage() returns {stage!r}; it is one of 0 (nothing is "
            "sharded), 1, 2 and 3 (weights too)"
        )
    return int(stage)


def check_library(field: str, name: str, library: str, registry: Registry) -> None:
    """The engine's library is installed; `registry` lists the engines that there are."""
    if find_spec(library) is None:
        raise ValueError(
            f"{field} is {name!r}, but {library} is not installed; install it, or choose another "
            f"of {', '.join(registry)}"
        )
