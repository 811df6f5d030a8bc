"""Plans over a real gloo group of four processes (gloo_cases.py holds what they assert
themselves)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.resharding import gloo_cases
from tests.resharding.gloo_cases import BUCKET_BYTES, NUM_RANKS, RULES, SOURCES


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("gloo")
    run_ranks(gloo_cases.run, (str(directory),), NUM_RANKS)
    return [json.loads(Path(directory, f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]


@pytest.mark.parametrize("source", list(SOURCES))
@pytest.mark.parametrize("target", ["1-1", "1-2", "1-4", "2-2"])
def test_every_rank_receives_the_lower_bound(
    results: list[dict[str, Any]], source: str, target: str
) -> None:
    rows = [result[source][target] for result in results]
    assert [row["received"] for row in rows] == [row["bound"] for row in rows]
    assert all(row["staging"] <= 2 * BUCKET_BYTES for row in rows)
    assert sum(row["received"] for row in rows) <= sum(row["golden"] for row in rows)


def test_a_fault_on_one_rank_is_named_on_every_rank(results: list[dict[str, Any]]) -> None:
    texts = {result["faults"] for result in results}
    assert len(texts) == 1
    assert "model.embed_tokens.weight" in (text := texts.pop()) and "lm_head" not in text
    assert "generation ranks [2] hold other bits than training ranks [0]" in text


def test_two_pools(results: list[dict[str, Any]]) -> None:
    received = [result["pools"] for result in results]
    assert received[:2] == [0, 0]
    model_bytes = sum(rule.spec.num_bytes for rule in RULES)
    assert model_bytes <= sum(received) <= 1.01 * model_bytes  # norms go to both
