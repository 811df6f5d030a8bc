"""The ranks of a test as processes of their own, without Ray: run_ranks(function, args, 4).

They are forked from a server, one per pytest process, that has imported what they all need
(preloaded.py): a fresh Python would take seconds for that, every time.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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


def _run_rank(
    rank: int, environment: Mapping[str, str], function: Callable[..., None], *args: Any
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    function(rank, *args)
