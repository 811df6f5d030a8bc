"""What compile promises and refuses, that verify sees through wrong plans, the cache, ranges of
flat parameters, zero copy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridflow.layout import Layout
from hybridflow.resharding import (
    Box,
    LocalParameter,
    LocalShard,
    ParameterSpec,
    PlanError,
    ReshardingPlan,
    ShardMap,
    compile,
    verify,
)
from hybridflow.resharding.analytic import decoder_rules, fsdp, generation, threed, zero3
from hybridflow.resharding.boxes import flat_range_boxes
from hybridflow.resharding.cache import compile_cached
from hybridflow.resharding.grouping import fewest_bytes, vanilla, zero_redundancy
from tests.resharding.simulated import allocate, assert_holds, full_tensors, run_in_threads

RULES = decoder_rules(
    num_layers=4, hidden=64, intermediate=96, num_heads=4, num_kv_heads=2, vocab=200
)
W = ParameterSpec("w", (8, 4), "float32")
WHOLE = ("w", Box((0, 0), (8, 4)))


def make_plan(bucket_bytes: int = 1 << 14, nodes: list[int] | None = None) -> ReshardingPlan:
    layout = Layout.of(pp=2, tp=2, dp=2)
    return compile(
        threed(RULES, layout),
        generation(RULES, zero_redundancy(layout, tp=1)),
        bucket_bytes=bucket_bytes,
        nodes=nodes,
    )


@pytest.mark.parametrize(
    "source",
    [
        threed(RULES, Layout.of(pp=2, tp=2, dp=2)),
        fsdp(RULES, 8),
        fsdp(RULES, 8, 4),
        zero3(RULES, 8),
    ],
)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2)])
def test_every_layout_to_every_layout(source: ShardMap, tp: int, pp: int) -> None:
    """Padded vocabulary, replicated key-value heads, flat ranges: bit for bit, at the lower
    bound, in small buckets."""
    if tp == 8:
        source = _replace_rules(source)
    rules = RULES if tp < 8 else EIGHT_HEADS
    grouping = fewest_bytes(source, generation(rules, vanilla(8, tp=tp, pp=pp)), tp=tp, pp=pp)
    target, full = generation(rules, grouping), full_tensors(source)
    plan = compile(source, target, bucket_bytes=1 << 13)
    certificate = verify(plan)
    destinations = allocate(target)
    reports = run_in_threads(plan, allocate(source, full), destinations)
    assert_holds(destinations, full)
    assert sum(report.received_bytes for report in reports) == certificate.bound_total
    assert max(report.staging_bytes for report in reports) <= 2 << 13


EIGHT_HEADS = decoder_rules(
    num_layers=4, hidden=64, intermediate=96, num_heads=8, num_kv_heads=2, vocab=200
)


def _replace_rules(source: ShardMap) -> ShardMap:
    """The same kind of layout for the model with 8 heads."""
    if len(np.unique(source.parameter[source.rank == 0])) < len(source.parameters):
        return threed(EIGHT_HEADS, Layout.of(pp=2, tp=2, dp=2))
    return fsdp(EIGHT_HEADS, 8)


def test_training_masters_are_cast_by_the_sender() -> None:
    source, target = fsdp(RULES, 4).with_dtype("float32"), generation(RULES, vanilla(4, tp=2))
    plan, full, destinations = compile(source, target), full_tensors(source), allocate(target)
    reports = run_in_threads(plan, allocate(source, full), destinations)
    assert_holds(destinations, full)
    # Bytes of bf16, not of fp32.
    assert plan.bytes_received.sum() == sum(report.received_bytes for report in reports)


def test_senders_of_replicas_are_balanced_and_near() -> None:
    plan = make_plan(nodes=[0, 0, 0, 0, 1, 1, 1, 1])
    certificate = verify(plan)
    assert certificate.between_machines_bytes == 0  # each machine holds a training replica
    assert certificate.sent_max - plan.bytes_sent.min() <= plan.bucket_bytes
    everywhere = ShardMap.of([W], {0: [WHOLE], 1: [WHOLE]}, num_ranks=6)
    wanted = ShardMap.of([W], {rank: [WHOLE] for rank in range(6)}, num_ranks=6)
    assert compile(everywhere, wanted, bucket_bytes=256).bytes_sent.tolist() == [
        256,
        256,
        0,
        0,
        0,
        0,
    ]


def test_two_pools_in_one_rank_space() -> None:
    """Actor trains on ranks 0..3 of a group, generates on ranks 4..7: point to point, from
    shards to shards."""
    training = threed(RULES, Layout.of(pp=2, tp=2)).relabel(range(4), 8)
    target = generation(RULES, vanilla(4, tp=2)).relabel([4, 5, 6, 7], 8)
    plan, full, destinations = compile(training, target), full_tensors(training), allocate(target)
    certificate = verify(plan)
    run_in_threads(plan, allocate(training, full), destinations)
    assert_holds(destinations, full)
    assert set(plan.sender) <= {0, 1, 2, 3} and set(plan.receiver) == {4, 5, 6, 7}
    assert certificate.received_total == target.bytes_per_rank.sum()


def test_coinciding_shards_are_not_copied() -> None:
    """Generation memory that is training memory stays where it is."""
    layout = Layout.of(tp=2)
    source, target = threed(RULES, layout), generation(RULES, zero_redundancy(layout, tp=2))
    sources = allocate(source, full_tensors(source))
    destinations = [
        [
            LocalParameter(p.name, p.shape, p.dtype, p.shards) if "mlp" in p.name else q
            for p, q in zip(have, want, strict=True)
        ]
        for have, want in zip(sources, allocate(target), strict=True)
    ]
    reports = run_in_threads(compile(source, target), sources, destinations)
    assert_holds(destinations, full_tensors(source))
    mlp = sum(rule.spec.num_bytes for rule in RULES if "mlp" in rule.spec.name)
    assert [report.shared_bytes for report in reports] == [mlp // 2, mlp // 2]


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ({0: [WHOLE]}, {}, "w: no target rank wants it"),
        (
            {0: [("w", Box((0, 0), (7, 4)))]},
            {1: [WHOLE]},
            "w: target rank 1 wants .* do not hold all",
        ),
        ({0: [WHOLE]}, {1: [WHOLE, ("w", Box((2, 0), (1, 4)))]}, "w: boxes of rank 1 overlap"),
        ({0: [WHOLE]}, {1: [("w", Box((5, 0), (4, 4)))]}, "does not lie in its shape"),
        ({2: [WHOLE]}, {1: [WHOLE]}, "rank 2 is outside 0..1"),
    ],
)
def test_bad_maps_are_refused_by_name(source: dict, target: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile(
            ShardMap.of([W], source, num_ranks=2),
            ShardMap.of([W], target, num_ranks=2),
            bucket_bytes=1024,
        )


def test_models_that_differ_are_refused_by_name() -> None:
    other = ParameterSpec("v", (2,), "float32")
    both = ShardMap.of([W, other], {0: [WHOLE, ("v", Box((0,), (2,)))]}, num_ranks=1)
    one = ShardMap.of([W], {0: [WHOLE]}, num_ranks=1)
    with pytest.raises(ValueError, match="no target rank wants v"):
        compile(both, one)
    with pytest.raises(ValueError, match="the target wants v, which no source rank holds"):
        compile(one, both)
    verify(compile(both, one, unused=["v"]))
    reshaped = ShardMap.of(
        [ParameterSpec("w", (4, 8), "float32")], {0: [("w", Box((0, 0), (4, 8)))]}, num_ranks=1
    )
    with pytest.raises(ValueError, match=r"w has shape \(4, 8\) in the source and \(8, 4\)"):
        compile(reshaped, one)
    with pytest.raises(ValueError, match="bucket_bytes=8 is too small"):
        compile(one, one, bucket_bytes=8)


def test_verify_sees_through_wrong_plans() -> None:
    plan = make_plan(1 << 12)
    remote = np.nonzero(plan.remote)[0]

    def without(row: int) -> ReshardingPlan:
        keep = np.arange(len(plan.sender)) != row
        columns = {
            name: getattr(plan, name)[keep]
            for name in ("sender", "receiver", "parameter", "start", "shape", "round")
        }
        return replace(plan, **columns)

    with pytest.raises(PlanError, match=r"rank \d gets \d+ of \d+ elements"):
        verify(without(int(remote[0])))
    wrong_sender = plan.sender.copy()
    # The embedding, on the first stage only.
    row = next(int(i) for i in remote if plan.parameter[i] == 0)
    wrong_sender[row] = 6
    with pytest.raises(
        PlanError, match=r"model.embed_tokens.weight: rank 6 sends .* does not hold"
    ):
        verify(replace(plan, sender=wrong_sender))
    twice = plan.start.copy()
    embedding = [int(i) for i in remote if plan.receiver[i] == 7 and plan.parameter[i] == 0]
    largest = max(embedding, key=lambda i: int(plan.shape[i].prod()))
    equal = [i for i in embedding if (plan.shape[i] == plan.shape[largest]).all()]
    twice[equal[1]] = plan.start[equal[0]]
    with pytest.raises(PlanError, match=r"written twice|does not hold"):
        verify(replace(plan, start=twice))
    with pytest.raises(PlanError, match="extra memory"):
        verify(replace(plan, round=np.where(plan.remote, 0, plan.round)))
    one_sender = np.where(plan.remote & (plan.sender >= 4), plan.sender - 4, plan.sender)
    with pytest.raises(PlanError, match=r"differ by|receives"):
        verify(replace(plan, sender=one_sender))
    needless = replace(plan, round=np.where(plan.remote, plan.round, 0))
    with pytest.raises(PlanError, match="receives"):
        verify(needless)


def test_plans_are_cached_by_the_hash_of_both_layouts(tmp_path: Path) -> None:
    source, target = fsdp(RULES, 8), generation(RULES, vanilla(8, tp=2))
    first = compile_cached(source, target, tmp_path)
    (path,) = tmp_path.iterdir()
    stamp = path.stat().st_mtime_ns
    again = compile_cached(source, target, tmp_path)
    for name in ("sender", "receiver", "parameter", "start", "shape", "round"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert verify(again) == verify(first)
    assert path.stat().st_mtime_ns == stamp
    path.write_bytes(path.read_bytes()[:100])  # a damaged file is compiled anew
    assert verify(compile_cached(source, target, tmp_path)) == verify(first)
    compile_cached(source, target, tmp_path, bucket_bytes=1 << 20)
    compile_cached(fsdp(RULES, 8, 4), target, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 5), max_size=3).map(tuple), st.data())
def test_flat_ranges_are_boxes_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    whole = torch.arange(int(np.prod(shape))).reshape(shape)
    begin = data.draw(st.integers(0, whole.numel()))
    end = data.draw(st.integers(begin, whole.numel()))
    boxes = flat_range_boxes(shape, begin, end)
    parts = [
        whole[tuple(slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True))].reshape(-1)
        for box in boxes
    ]
    assert torch.equal(
        torch.cat([*parts, torch.zeros(0, dtype=torch.int64)]), torch.arange(begin, end)
    )
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_a_shard_map_says_the_same_everywhere() -> None:
    one, two = fsdp(RULES, 4), fsdp(RULES, 4)
    assert one.digest() == two.digest() != fsdp(RULES, 8).digest()
    assert LocalShard(Box((0,), (2,)), torch.zeros(2)).box.numel == 2
