"""Fixtures of the tests on mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hybridflow.local_pool import LocalPool
from hybridflow.pool import PoolSpec
from tests.experts.plain import FAMILIES, save_tiny_mixture


@pytest.fixture(scope="package")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixtures")
    for family in (*FAMILIES, "ernie4_5_moe"):  # whose shared experts get tokens without rows
        save_tiny_mixture(root / family, family)
    return root


@pytest.fixture(scope="package")
def world() -> Iterator[None]:
    with LocalPool(PoolSpec(name="experts")):
        yield
