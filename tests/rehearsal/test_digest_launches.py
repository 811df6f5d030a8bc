"""G32: a digest's launches on an accelerator, counted on tensors without data."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hybridflow.resharding.digest import BoxDigest, chunk_words

MOST_LAUNCHES = 20


class Launches(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_a_large_shard_takes_few_launches() -> None:
    """The gate projection of a 7B model, one of 8 shards in float32, digested as bfloat16: 66 steps
    and 266 launches in chunks for a CPU's cache."""
    whole, rows = (18944, 3584), 18944 // 8
    shard = torch.empty(rows, whole[1], device="meta")
    digest = BoxDigest(shard, (0, 0), whole, torch.bfloat16, block=64)
    with Launches() as launches:
        digest()
    assert launches.count <= MOST_LAUNCHES
    assert chunk_words(torch.device("cpu")) < chunk_words(torch.device("cuda"))
