"""vLLM after a sync scores like transformers, for every family, tensor and pipeline parallel,
groups that vLLM would not build."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.matrix import matrix
from tests.ranks import run_ranks
from tests.resharding import vllm_cases
from workers.config import Precision

NAMES = matrix([name for name in vllm_cases.CASES if name not in vllm_cases.SLOW], vllm_cases.SLOW)


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, selected: Callable[[str], list[Any]]
) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("vllm")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    run_ranks(vllm_cases.run, (port, str(directory), selected("name")), 2)
    return [json.loads(Path(directory, f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_scores_equal_transformers_after_every_sync(
    results: list[dict[str, Any]], name: str
) -> None:
    _, _, precision = vllm_cases.CASES[name]
    tolerance = 5e-5 if precision is Precision.fp32 else 0.05
    for result in results:
        assert max(result[name]["gaps"]) < tolerance
        # Where the CPU has no packed form of bfloat16 weights, the engine computes with the memory
        # that was written, and nothing can be stale.
        packs = (
            precision is Precision.fp32
            or result[name]["without commit"] not in result[name]["gaps"]
        )
        assert not packs or result[name]["without commit"] > 20 * max(result[name]["gaps"])
        assert result[name]["received"] == result[name]["bound"]


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_in_the_engine_is_named(results: list[dict[str, Any]], name: str) -> None:
    texts = {result[name]["fault"] for result in results}
    assert len(texts) == 1
    assert (
        ".weight" in (text := texts.pop())
        and "generation ranks [1] hold other bits than training ranks" in text
    )
