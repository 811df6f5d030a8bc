"""How many threads a process computes with where no setting says it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hybridflow.devices import requested_threads
from hybridflow.local_pool import LocalPool
from hybridflow.pool import PoolSpec


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("value", "number"), [("3", 3), ("4,2", 4), ("", 0), ("all", 0)])
def test_the_environment_is_read_as_pytorch_reads_it(
    value: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert requested_threads() == number


def test_this_process_takes_what_the_environment_says_and_the_setting_goes_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with LocalPool() as pool:
        assert pool.context.num_threads == torch.get_num_threads() == 3
    with LocalPool(PoolSpec(threads_per_device=2)) as pool:
        assert pool.context.num_threads == torch.get_num_threads() == 2
