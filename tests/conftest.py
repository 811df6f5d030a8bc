"""Fixtures that several folders share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One embedded Ray for the whole session: starting it takes seconds."""
    from cluster.connect import ClusterConfig, connect

    with connect(ClusterConfig(address="local", worker_logs=False), cpu_slots=16):
        yield
