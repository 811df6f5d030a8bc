"""The ranks of a test as processes of their own, without Ray: run_ranks(function, args, 4).

They are forked from a server, one per pytest process, that has imported what they all need
(preloaded.py): a fresh Python would take seconds for that, every time.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., None], args: Sequence[Any], num_ranks: int) -> None:
    """function(rank, *args) in `num_ranks` processes with this one's environment; the first error
    of a rank is raised here, and ends the others."""
    multiprocessing.set_forkserver_preload(["tests.preloaded"])
    mp.start_processes(
        _run_rank,
        (dict(os.environ), function, *args),
        nprocs=num_ranks,
        start_method="forkserver",
    )


def worlds(rank: int, root: Path, sizes: Sequence[int], backend: str = "gloo") -> Iterator[int]:
    """Worlds of these sizes one after the other in the same processes; one that has no rank `rank`
    is left out. Each is there until the next size is asked for:

    for world_size in worlds(rank, root, (4, 2)):
        ...
    """
    torch.set_num_threads(1)
    for world_size in sizes:
        if rank < world_size:
            dist.init_process_group(
                backend,
                init_method=f"file://{root}/store{world_size}",
                rank=rank,
                world_size=world_size,
            )
            yield world_size
            dist.destroy_process_group()


def _run_rank(
    rank: int, environment: Mapping[str, str], function: Callable[..., None], *args: Any
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    function(rank, *args)
