"""A subset of benchmarks.invariance: the same step on three engines in small and large
micro-batches, against plain float64.

Packed, and once in padded blocks; in this process, one after the other. The layouts with
several ranks are the benchmark's, and tests/e2e/test_layouts_agree.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from benchmarks.invariance import case
from benchmarks.invariance.combinations import LARGE, SMALL, Combination
from benchmarks.invariance.outcome import errors, numbers, rollouts
from benchmarks.invariance.reference import Numbers, Rows, reference_step
from recipes.main import to_settings
from recipes.run import run

TOLERANCE = 2e-5
COMBINATIONS = [
    Combination(algorithm="ppo", engine="fsdp", micro_batch_tokens=LARGE),
    Combination(algorithm="ppo", engine="threed", micro_batch_tokens=SMALL),
    Combination(algorithm="gspo", engine="fsdp", micro_batch_tokens=SMALL),
    Combination(
        algorithm="gspo",
        engine="deepspeed",
        micro_batch_tokens=LARGE,
        train=("zero_stage=3", "packing=false"),
    ),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("invariance")
    case.make_case(directory)
    return directory


@pytest.fixture(scope="module")
def samples() -> dict[str, tuple[Rows, dict[str, Numbers]]]:
    """By algorithm: the samples of its first run, and the numbers that plain PyTorch computes
    from them."""
    return {}


@pytest.mark.parametrize(
    "combination",
    COMBINATIONS,
    ids=lambda case: f"{case.algorithm}-{case.engine}-{case.micro_batch_tokens}",
)
def test_the_step_does_not_depend_on_the_cut(
    combination: Combination,
    composed: Callable[..., DictConfig],
    directory: Path,
    samples: dict[str, tuple[Rows, dict[str, Numbers]]],
    tmp_path: Path,
) -> None:
    run(
        to_settings(
            composed(
                combination.algorithm,
                case.settings(combination.algorithm, directory, tmp_path) + combination.settings(),
            )
        )
    )
    algorithm = combination.algorithm
    actual, sampled = numbers(algorithm, directory, tmp_path), rollouts(tmp_path)
    if algorithm not in samples:
        samples[algorithm] = sampled, reference_step(algorithm, directory, sampled)
    rows, expected = samples[algorithm]
    assert sampled == rows
    differences = errors(actual, expected)
    assert max(differences.values()) < TOLERANCE, differences
