"""Requests: the boxes that every rank needs, each with the ranks that could send it.

Parameters whose boxes lie on the same ranks in the same way (the layers of a pipeline stage, say)
are worked out once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybridflow.resharding.boxes import (
    Ints,
    contains,
    disjoint_parts,
    distinct,
    intersections,
    split,
    volumes,
)
from hybridflow.resharding.shard_map import ShardMap


@dataclass(frozen=True, eq=False)
class Requests:
    """One row per (box, receiver)."""

    parameter: Ints
    start: Ints
    shape: Ints
    receiver: Ints
    candidates: Ints
    """[rows], index into candidate_sets."""
    candidate_sets: list[tuple[int, ...]]
    """Ranks that may send a box to its receiver."""


def make_requests(source: ShardMap, target: ShardMap, nodes: Ints, limit_bytes: int) -> Requests:
    """All requests, by parameter, for boxes of at most `limit_bytes`.

    Raises a ValueError where no rank holds a needed element.
    """
    sets: dict[tuple[int, ...], int] = {}
    known: dict[tuple[object, ...], tuple[Ints, Ints, Ints, Ints]] = {}
    parts: list[tuple[Ints, Ints, Ints, Ints, Ints]] = []
    for number, spec in enumerate(target.parameters):
        have, need = source.rows(number), target.rows(number)
        if need.start == need.stop:
            raise ValueError(
                f"{spec.name}: no target rank wants it; a parameter that is needed nowhere should "
                "not be in the target"
            )
        signature = (spec.itemsize, *_signature(source, have), *_signature(target, need))
        if signature not in known:
            limit = max(1, limit_bytes // spec.itemsize)
            known[signature] = _requests_for(
                source, have, target, need, nodes, limit, sets, spec.name
            )
        start, shape, receiver, candidates = known[signature]
        parts.append(
            (np.full(len(receiver), number, dtype=np.int64), start, shape, receiver, candidates)
        )
    dims = target.dims
    empty = np.zeros(0, dtype=np.int64)
    parts.append((empty, empty.reshape(0, dims), empty.reshape(0, dims), empty, empty))
    parameter, start, shape, receiver, candidates = map(np.concatenate, zip(*parts, strict=True))
    return Requests(parameter, start, shape, receiver, candidates, list(sets))


def _signature(shard_map: ShardMap, rows: slice) -> tuple[bytes, ...]:
    """Equal for parameters whose boxes lie on the same ranks in the same way."""
    arrays = (shard_map.rank, shard_map.start, shard_map.shape)
    return tuple(array[rows].tobytes() for array in arrays)


def _requests_for(
    source: ShardMap,
    have: slice,
    target: ShardMap,
    need: slice,
    nodes: Ints,
    limit: int,
    sets: dict[tuple[int, ...], int],
    name: str,
) -> tuple[Ints, Ints, Ints, Ints]:
    """start, shape, receiver, candidates of one parameter's requests."""
    atom_start, atom_shape = disjoint_parts(source.start[have], source.shape[have])
    box_start, box_shape, box_of_row = distinct(target.start[need], target.shape[need])
    atom, box, start, shape = intersections(atom_start, atom_shape, box_start, box_shape)
    covered = np.zeros(len(box_start), dtype=np.int64)
    np.add.at(covered, box, volumes(shape))
    if (covered != volumes(box_shape)).any():
        bad = int(np.nonzero(covered != volumes(box_shape))[0][0])
        rank = int(target.rank[need][np.nonzero(box_of_row == bad)[0][0]])
        where = f"start {box_start[bad]} shape {box_shape[bad]}"
        raise ValueError(
            f"{name}: target rank {rank} wants {where}; the source ranks together do not hold all "
            "of it"
        )
    atom, box, start, shape = _split_large(atom, box, start, shape, limit)
    # One row per part of a box and rank that wants the box.
    row_order = np.argsort(box_of_row, kind="stable")
    count = np.bincount(box_of_row, minlength=len(box_start))
    first = np.cumsum(count) - count
    part = np.repeat(np.arange(len(box)), count[box])
    offset = np.arange(len(part)) - np.repeat(np.cumsum(count[box]) - count[box], count[box])
    receiver = target.rank[need][row_order[first[box[part]] + offset]]
    holds = _holders(source, have, atom_start, atom_shape)
    candidates = _candidates(holds, atom[part], receiver, nodes, sets)
    return start[part], shape[part], receiver, candidates


def _split_large(
    atom: Ints, box: Ints, start: Ints, shape: Ints, limit: int
) -> tuple[Ints, Ints, Ints, Ints]:
    """The same rows with boxes of more than `limit` elements split."""
    large = volumes(shape) > limit
    if not large.any():
        return atom, box, start, shape
    rows: list[tuple[int, ...]] = []
    for i in np.nonzero(large)[0]:
        for part_start, part_shape in split(
            tuple(map(int, start[i])), tuple(map(int, shape[i])), limit
        ):
            rows.append((int(atom[i]), int(box[i]), *part_start, *part_shape))
    more = np.array(rows, dtype=np.int64)
    dims, keep = start.shape[1], ~large
    return (
        np.concatenate([atom[keep], more[:, 0]]),
        np.concatenate([box[keep], more[:, 1]]),
        np.concatenate([start[keep], more[:, 2 : 2 + dims]]),
        np.concatenate([shape[keep], more[:, 2 + dims :]]),
    )


def _holders(
    source: ShardMap, have: slice, atom_start: Ints, atom_shape: Ints
) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """The ranks that hold each atom: bool [atoms, ranks]."""
    box_start, box_shape, box_of_row = distinct(source.start[have], source.shape[have])
    inside = contains(box_start, box_shape, atom_start, atom_shape)
    box, atom = np.nonzero(inside)
    result = np.zeros((len(atom_start), source.num_ranks), dtype=bool)
    box_holders = np.zeros((len(box_start), source.num_ranks), dtype=bool)
    box_holders[box_of_row, source.rank[have]] = True
    np.logical_or.at(result, atom, box_holders[box])
    return result


def _candidates(
    holds: np.ndarray[tuple[int, int], np.dtype[np.bool_]],
    atom: Ints,
    receiver: Ints,
    nodes: Ints,
    sets: dict[tuple[int, ...], int],
) -> Ints:
    """The receiver alone where it holds the atom, else the holders on its machine, else all
    holders.

    int64 [rows], index into `sets`, to which new sets are added.
    """
    result = np.empty(len(atom), dtype=np.int64)
    local = holds[atom, receiver]
    for rank in np.unique(receiver[local]):
        result[local & (receiver == rank)] = sets.setdefault((int(rank),), len(sets))
    others = np.nonzero(~local)[0]
    pair, index = np.unique(
        np.stack([atom[others], nodes[receiver[others]]], axis=1), axis=0, return_inverse=True
    )
    set_of_pair = np.empty(len(pair), dtype=np.int64)
    for i, (number, node) in enumerate(pair):
        holders = np.nonzero(holds[number])[0]
        near = holders[nodes[holders] == node]
        chosen = near if len(near) else holders
        set_of_pair[i] = sets.setdefault(tuple(chosen.tolist()), len(sets))
    result[others] = set_of_pair[index.reshape(-1)]
    return result
