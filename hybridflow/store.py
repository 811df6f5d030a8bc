"""Storage of blocks: in this process (Held) or in Ray's object store (an ObjectRef), both read by
fetch.

fetch() is the only function that waits for data. On the controller the wait also watches every
pending call (hybridflow/waiting.py), so that a dead or stuck producer ends in an error and never in
silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hybridflow import waiting
from hybridflow.columns import Block


class Held:
    """A block in this process' memory; `stored` is its reference once it is in Ray's store."""

    __slots__ = ("block", "stored")

    def __init__(self, block: Block) -> None:
        self.block = block
        self.stored: Any = None


class Abstract(Held):
    """Stands for a block while an algorithm is traced: it names the call that would write it."""

    __slots__ = ("writer",)

    def __init__(self, writer: str) -> None:
        self.writer = writer

    @property
    def block(self) -> Block:  # type: ignore[override]
        raise ValueError(
            f"the step reads a column of {self.writer} on the controller while it is traced; put "
            "what depends on numbers into a function marked @on_controller(reads=..., writes=...)"
        )


Ref = Any
"""Held, or ray.ObjectRef to a Block."""


def fetch(refs: Sequence[Ref]) -> list[Block]:
    """The blocks behind the references, waiting until they exist."""
    remote = [ref for ref in refs if not isinstance(ref, Held)]
    arrived = iter(waiting.get(remote) if remote else ())
    blocks = []
    for ref in refs:
        blocks.append(ref.block if isinstance(ref, Held) else next(arrived))
    return blocks


def fetch_rows(
    requests: Sequence[tuple[Ref, np.ndarray, str | None]], here: str | None
) -> list[Block]:
    """The rows of the block of each (reference, rows, node).

    A block of this node is mapped, not copied. From another node only the rows travel: a task there
    cuts them out.
    """
    remote: dict[tuple[str, bytes], list[int]] = {}
    for position, (ref, rows, node) in enumerate(requests):
        if not isinstance(ref, Held) and here is not None and node is not None and node != here:
            remote.setdefault((node, rows.tobytes()), []).append(position)
    refs: list[Ref] = [ref for ref, _, _ in requests]
    cut: set[int] = set()
    for (node, _), positions in remote.items():
        uncut = [refs[position] for position in positions]
        for position, ref in zip(
            positions, _cut_at(node, uncut, requests[positions[0]][1]), strict=True
        ):
            refs[position] = ref
            cut.add(position)
    blocks = fetch(refs)
    for position, block in enumerate(blocks):
        if position not in cut:
            blocks[position] = block.rows(requests[position][1])
    return blocks


def _cut_at(node: str, refs: list[Ref], rows: np.ndarray) -> list[Ref]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(_cut).options(
        num_cpus=0,
        num_returns=len(refs),
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True),
        name="hybridflow: cut rows",
    )
    result: Any = task.remote(refs, rows)
    return [result] if len(refs) == 1 else list(result)


def _cut(refs: list[Ref], rows: np.ndarray) -> Any:
    import ray

    blocks = [block.rows(rows) for block in ray.get(refs)]
    return blocks[0] if len(blocks) == 1 else blocks


def put(held: Held) -> Ref:
    """The reference of a block in Ray's store; a block is put there once, however often it is
    sent."""
    if held.stored is None:
        import ray

        held.stored = ray.put(held.block)
    return held.stored
