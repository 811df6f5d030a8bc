"""Engines of another package that break their contract are refused in one line that names them
(issue 10, tried by a stranger, B)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hybridflow.mapping.question.space import SearchSpace
from recipes.engine_facts import ask_engine, limited_space, zero_stage_of
from workers.config import TrainConfig
from workers.engines import pipeline_engines
from workers.engines.fsdp.engine import FsdpEngine
from workers.generation import other_engines
from workers.generation.base import Generations
from workers.generation.checked import check_generations


class Wrong(FsdpEngine):
    @classmethod
    def limit(cls, space: SearchSpace) -> Any:
        return None

    @classmethod
    def zero_stage(cls, config: TrainConfig) -> int:
        return 7

    @classmethod
    def check(cls, *arguments: Any) -> None:
        raise KeyError("rope")


NAME = f"{__name__}:Wrong"
GOOD = Generations(
    response_ids=np.array([8, 2, 7]),
    lengths=np.array([2, 1]),
    log_probs=np.array([-0.1, -0.2, -0.3], dtype=np.float32),
    finish_reasons=["stop", "length"],
    num_prompt_tokens=4,
    seconds=0.1,
)
BROKEN: dict[str, dict[str, Any]] = {
    "finish_reason 'eos', which is neither stop nor length": {"finish_reasons": ["eos", "length"]},
    "token id 10, outside the vocabulary 0..9": {"response_ids": np.array([8, 10, 7])},
    "token id -1, outside": {"response_ids": np.array([8, -1, 7])},
    "3 response_ids and 2 log_probs, where the lengths add up to 3": {
        "log_probs": GOOD.log_probs[:2]
    },
    "0 tokens in row 1, where 1 to 2 are allowed": {"lengths": np.array([2, 0])},
    "3 tokens in row 0": {"lengths": np.array([3, 1])},
    "1 lengths and 2 finish_reasons for 2 prompts": {"lengths": np.array([3])},
    "a log_prob that is not finite": {"log_probs": np.array([-1, np.nan, -1], dtype=np.float32)},
}


def test_facts_of_a_training_engine() -> None:
    with pytest.raises(ValueError, match=rf"engine '{NAME}': limit\(\) returns None, not a Search"):
        limited_space(NAME, SearchSpace())
    with pytest.raises(ValueError, match=rf"engine '{NAME}': zero_stage\(\) returns 7; it is one"):
        zero_stage_of(TrainConfig(engine=NAME))
    with pytest.raises(ValueError, match=rf"engine '{NAME}': check\(\) fails \(KeyError: 'rope'\)"):
        ask_engine(NAME, "check", Wrong.check, None)
    assert zero_stage_of(TrainConfig(engine="fsdp")) in (2, 3)


@pytest.mark.parametrize("message", BROKEN)
def test_responses_of_a_generation_engine(message: str) -> None:
    limit = np.array([2, 2])
    check_generations(GOOD, 2, 10, "theirs", limit)
    with pytest.raises(ValueError, match=f"^generation.engine 'theirs' returned {message}"):
        check_generations(replace(GOOD, **BROKEN[message]), 2, 10, "theirs", limit)


def test_no_responses_are_fine() -> None:
    empty = np.array([], dtype=np.int64)
    nothing = replace(
        GOOD,
        response_ids=empty,
        lengths=empty,
        log_probs=empty.astype(np.float32),
        finish_reasons=[],
    )
    check_generations(nothing, 0, 10, "theirs", empty)


def test_advice_comes_from_the_registries() -> None:
    """The engines with pipeline stages are those whose class says so (G)."""
    assert pipeline_engines(with_pipeline=True) == "threed"
    assert pipeline_engines(with_pipeline=False) == "fsdp, deepspeed"
    assert (other_engines("hf"), other_engines("vllm")) == ("vllm", "hf")
