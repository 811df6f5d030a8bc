"""Compiled plans on disk, under the hash of both shard maps and the compiler's settings.

Files hold arrays only, no pickles.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hybridflow.resharding.plan import (
    DEFAULT_BUCKET_BYTES,
    ReshardingPlan,
    aligned,
    compile,
    plan_key,
)
from hybridflow.resharding.shard_map import ShardMap
from hybridflow.whole_file import whole_file

COLUMNS = ("sender", "receiver", "parameter", "start", "shape", "round")


def compile_cached(
    source: ShardMap,
    target: ShardMap,
    directory: Path,
    *,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    nodes: Sequence[int] | None = None,
    unused: Sequence[str] = (),
) -> ReshardingPlan:
    """compile(), or the plan that an earlier call with equal arguments wrote into `directory`.

    A damaged file is replaced by a plan that is compiled again.
    """
    path = directory / f"{plan_key(source, target, bucket_bytes, nodes, unused)}.npz"
    columns = _load(path)
    if columns is not None:
        machines = tuple(nodes) if nodes is not None else (0,) * target.num_ranks
        source = aligned(source, target, machines, unused)
        return ReshardingPlan(
            source=source, target=target, bucket_bytes=bucket_bytes, nodes=machines, **columns
        )
    plan = compile(source, target, bucket_bytes=bucket_bytes, nodes=nodes, unused=unused)
    with whole_file(path) as temporary:  # several ranks may write the same plan
        np.savez(
            temporary,
            sender=plan.sender,
            receiver=plan.receiver,
            parameter=plan.parameter,
            start=plan.start,
            shape=plan.shape,
            round=plan.round,
        )
    return plan


def _load(path: Path) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.int64]]] | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            columns = {name: stored[name] for name in COLUMNS}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None
    lengths = {len(column) for column in columns.values()}
    return columns if len(lengths) == 1 else None
