"""compile, verify and execute against gather-and-slice, for random shard maps."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridflow.resharding import Box, ParameterSpec, Parts, ShardMap, compile, verify
from hybridflow.resharding.attest import compare
from tests.resharding.simulated import allocate, assert_holds, full_tensors, run_in_threads

NUM_RANKS = 4
SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def _cuts(draw: st.DrawFn, box: Box, depth: int) -> list[Box]:
    """Disjoint boxes that fill `box`."""
    dims = [i for i, size in enumerate(box.shape) if size > 1]
    if depth == 0 or not dims or draw(st.booleans()):
        return [box]
    dim = draw(st.sampled_from(dims))
    at = draw(st.integers(1, box.shape[dim] - 1))
    first = Box(box.start, (*box.shape[:dim], at, *box.shape[dim + 1 :]))
    second = Box(
        (*box.start[:dim], box.start[dim] + at, *box.start[dim + 1 :]),
        (*box.shape[:dim], box.shape[dim] - at, *box.shape[dim + 1 :]),
    )
    return _cuts(draw, first, depth - 1) + _cuts(draw, second, depth - 1)


@st.composite
def maps(draw: st.DrawFn) -> tuple[ShardMap, ShardMap]:
    """A source that holds everything (with replicas, also of overlapping boxes) and a target
    that wants anything."""
    shapes = draw(
        st.lists(st.lists(st.integers(1, 6), max_size=3).map(tuple), min_size=1, max_size=3)
    )
    dtypes = draw(
        st.lists(
            st.sampled_from(["float32", "bfloat16", "float64"]),
            min_size=len(shapes),
            max_size=len(shapes),
        )
    )
    source: dict[int, list[tuple[str, Box]]] = {rank: [] for rank in range(NUM_RANKS)}
    target: dict[int, list[tuple[str, Box]]] = {rank: [] for rank in range(NUM_RANKS)}
    for number, shape in enumerate(shapes):
        name, whole = f"p{number}", Box((0,) * len(shape), shape)
        # A second, differently cut copy overlaps the first.
        for _ in range(draw(st.integers(1, 2))):
            taken = {rank for rank, boxes in source.items() if any(n == name for n, _ in boxes)}
            free = [rank for rank in range(NUM_RANKS) if rank not in taken]
            if not free:
                break
            for box in _cuts(draw, whole, 3):
                for rank in draw(st.sets(st.sampled_from(free), min_size=1)):
                    source[rank].append((name, box))
        wanting = draw(st.sets(st.integers(0, NUM_RANKS - 1), min_size=1))
        for rank in wanting:
            boxes = _cuts(draw, whole, 3)
            target[rank] += [
                (name, box)
                for box in draw(st.lists(st.sampled_from(boxes), min_size=1, unique=True))
            ]
    source_specs = [ParameterSpec(f"p{i}", shape, "float32") for i, shape in enumerate(shapes)]
    target_specs = [
        ParameterSpec(f"p{i}", shape, dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    return ShardMap.of(source_specs, source, num_ranks=NUM_RANKS), ShardMap.of(
        target_specs, target, num_ranks=NUM_RANKS
    )


@SETTINGS
@given(
    maps(),
    st.sampled_from([96, 128, 1024, 1 << 20]),
    st.sampled_from([None, [0, 0, 1, 1]]),
    st.booleans(),
)
def test_compile_and_execute_equal_gather_and_slice(
    pair: tuple[ShardMap, ShardMap], bucket_bytes: int, nodes: list[int] | None, strided: bool
) -> None:
    source, target = pair
    plan = compile(source, target, bucket_bytes=bucket_bytes, nodes=nodes)
    certificate = verify(plan)
    full = full_tensors(source)
    sources, destinations = allocate(source, full, strided), allocate(target, strided=strided)
    reports = run_in_threads(plan, sources, destinations)
    assert_holds(destinations, full)
    assert (
        [report.received_bytes for report in reports]
        == plan.bytes_received.tolist()
        == _naive_bound(source, target)
    )
    assert certificate.received_total == sum(report.received_bytes for report in reports)
    assert max(report.staging_bytes for report in reports) <= 2 * bucket_bytes


@SETTINGS
@given(maps())
def test_digests_do_not_depend_on_the_layout(pair: tuple[ShardMap, ShardMap]) -> None:
    source, target = pair
    full = full_tensors(source)
    dtypes = {spec.name: spec.dtype for spec in target.parameters}
    have, want = Parts.of(source), Parts.of(_completed(target))
    for block in (1, 2, 64):
        blocks = dict.fromkeys(full, block)
        sources = np.stack(
            [
                have.digests(memory, rank, dtypes, blocks)
                for rank, memory in enumerate(allocate(source, full))
            ]
        )
        held = np.stack(
            [
                want.digests(memory, rank, None, blocks)
                for rank, memory in enumerate(allocate(want.shard_map, full))
            ]
        )
        assert set(compare(have, sources, want, held)) == set(full)


def _completed(target: ShardMap) -> ShardMap:
    """`target` with one more rank that wants every parameter whole, so that all of it is held
    somewhere."""
    held = {
        rank: [(s.name, box) for s in target.parameters for box in target.boxes(s.name, rank)]
        for rank in range(NUM_RANKS)
    }
    held[NUM_RANKS] = [
        (spec.name, Box((0,) * len(spec.shape), spec.shape)) for spec in target.parameters
    ]
    return ShardMap.of(target.parameters, held, num_ranks=NUM_RANKS + 1)


def _naive_bound(source: ShardMap, target: ShardMap) -> list[int]:
    """Element by element."""
    result = []
    for rank in range(NUM_RANKS):
        missing = 0
        for spec in target.parameters:
            have, want = (np.zeros(spec.shape, dtype=bool) for _ in range(2))
            for grid, shard_map in ((have, source), (want, target)):
                for box in shard_map.boxes(spec.name, rank):
                    grid[
                        tuple(slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True))
                    ] = True
            missing += int((want & ~have).sum()) * spec.itemsize
        result.append(missing)
    return result
