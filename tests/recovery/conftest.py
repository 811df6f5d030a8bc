"""Shared memory of a test's own, and the run that nothing disturbs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from controllers.recovery import Driver
from tests.controllers.hand_role import make_loop, weights


@pytest.fixture
def shm() -> Iterator[Path]:
    with TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
def expected(tmp_path: Path, shm: Path) -> torch.Tensor:
    """Weights and moments of the undisturbed run."""
    loop = make_loop(tmp_path / "undisturbed", shm)
    Driver(loop).run()
    return weights(loop)
