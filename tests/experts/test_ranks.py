"""Routers on two gloo ranks, on every engine, against one process (SCALE.md 5.3 a and d)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests.engines.threed_cases import TEMPERATURE
from tests.experts.engines import make_engine, rows_with_a_shared_prompt
from tests.experts.plain import PlainStep, load_mixture, plain_step
from tests.experts.ranks import COEFFICIENT, WORLD, Case, Result, run
from tests.experts.test_routers import EXACT, compare
from tests.ranks import run_ranks

CASES = [
    Case(),
    Case(settings=(("cp", 2),)),
    Case(settings=(("reshard_after_forward", True), ("activation_checkpointing", True))),
    Case(engine="deepspeed", settings=(("zero_stage", 2),)),
    Case(engine="threed", settings=(("pp", 2),)),
]


@pytest.fixture(scope="module")
def spawned(root: Path) -> Path:
    run_ranks(run, (root, CASES), WORLD)
    return root


@pytest.fixture(scope="module")
def expected(root: Path) -> PlainStep:
    return plain_step(load_mixture(root / "qwen3_moe"), rows_with_a_shared_prompt(), COEFFICIENT)


def results(root: Path, case: Case) -> list[Result]:
    paths = [root / f"{case.name}.{rank}.pt" for rank in range(WORLD)]
    return [torch.load(path, weights_only=False) for path in paths]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_one_process(spawned: Path, expected: PlainStep, case: Case) -> None:
    """Metrics of routers, auxiliary loss, gradient norm and weights after a step do not depend on
    the layout (finding T40); every rank reports the same."""
    both = results(spawned, case)
    for result in both:
        compare(result.metrics, expected)
        for name, value in expected.parameters.items():
            assert_close(result.parameters[name], value, rtol=0.0, atol=EXACT, msg=name)
    assert both[0].metrics == both[1].metrics


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_routes_reach_every_rank(spawned: Path, world: None, root: Path, case: Case) -> None:
    """Routes are those of one process on every rank, of all stages and of all parts of a row, and a
    step replays all of them."""
    batch = rows_with_a_shared_prompt()
    outputs = make_engine(root / "qwen3_moe").forward(batch, temperature=TEMPERATURE, routes=True)
    assert outputs is not None
    assert outputs.routes is not None
    parts = outputs.routes.split(batch.lengths.tolist())
    for result in results(spawned, case):
        wanted = torch.cat([parts[row] for row in result.rows.tolist()])
        assert torch.equal(result.routes, wanted)
        assert result.replay_gap == 0.0
        assert result.replayed["router/replayed"] == 1.0
        assert 0 < result.replayed["router/agreement"] <= 1.0
