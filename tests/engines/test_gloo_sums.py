"""The reduce-scatter over gloo against a sum of all ranks' tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks, worlds
from workers.engines.shared import gloo_sums


def make_parts(rank: int, size: int, numel: int) -> torch.Tensor:
    return torch.randn(size, numel, generator=torch.Generator().manual_seed(rank))


def check(rank: int, root: Path, sizes: tuple[int, ...]) -> None:
    gloo_sums.PIECE = 7
    for size in worlds(rank, root, sizes):
        for numel in (1, 7, 20):
            expected = make_parts(0, size, numel)
            for other in range(1, size):
                expected = expected + make_parts(other, size, numel)
            own = torch.empty(numel)
            parts = make_parts(rank, size, numel)
            gloo_sums.reduce_scatter(own, parts.flatten(), dist.group.WORLD)
            torch.testing.assert_close(own, expected[rank], rtol=0, atol=0)
            torch.testing.assert_close(parts, make_parts(rank, size, numel), rtol=0, atol=0)
            own = torch.empty(numel)
            gloo_sums.PartsUnderWay.begin(own, parts, dist.group.WORLD).wait()
            torch.testing.assert_close(own, expected[rank], rtol=0, atol=0)
        if size == 3:  # a group whose ranks are not those of the world
            members = dist.new_group([1, 2])
            if rank:
                own = torch.empty(9)
                gloo_sums.reduce_scatter(own, make_parts(rank, 2, 9), members)
                both = make_parts(1, 2, 9) + make_parts(2, 2, 9)
                torch.testing.assert_close(own, both[rank - 1], rtol=0, atol=0)


def test_it_is_the_sum_in_the_order_of_the_ranks(tmp_path: Path) -> None:
    run_ranks(check, (tmp_path, (3, 2)), 3)


def test_it_only_sums() -> None:
    one = torch.ones(1)
    with pytest.raises(AssertionError, match="only sums"):
        gloo_sums.GlooReduceScatter()(one, one, dist.group.WORLD, dist.ReduceOp.MAX)
