"""Faults on either side of a sync are caught and named: parameter and ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hybridflow.layout import Layout
from hybridflow.resharding import (
    AttestationError,
    Box,
    LocalParameter,
    LocalShard,
    ParameterSpec,
    Parts,
    ShardMap,
    compile,
)
from hybridflow.resharding.analytic import decoder_rules, generation, threed
from hybridflow.resharding.attest import compare
from hybridflow.resharding.digest import block_words
from hybridflow.resharding.grouping import zero_redundancy
from tests.resharding.simulated import allocate, full_tensors, run_in_threads

RULES = decoder_rules(
    num_layers=2, hidden=32, intermediate=48, num_heads=4, num_kv_heads=4, vocab=128
)
LAYOUT = Layout.of(pp=2, tp=2, dp=2)
Q = "model.layers.0.self_attn.q_proj.weight"
Memory = list[list[LocalParameter]]


@pytest.fixture(scope="module")
def maps() -> tuple[ShardMap, ShardMap]:
    """fp32 training 2-2-2 to bf16 generation with tp=2."""
    return threed(RULES, LAYOUT).with_dtype("float32"), generation(
        RULES, zero_redundancy(LAYOUT, tp=2)
    )


@pytest.fixture
def synced(maps: tuple[ShardMap, ShardMap]) -> tuple[Memory, Memory]:
    source, target = maps
    sources, destinations = allocate(source, full_tensors(source)), allocate(target)
    run_in_threads(compile(source, target), sources, destinations)
    return sources, destinations


def attest_all(
    maps: tuple[ShardMap, ShardMap], sources: Memory, destinations: Memory
) -> dict[str, int]:
    source, target = (Parts.of(one) for one in maps)
    dtypes = {spec.name: spec.dtype for spec in maps[1].parameters}
    have = np.stack([source.digests(memory, rank, dtypes) for rank, memory in enumerate(sources)])
    held = np.stack([target.digests(memory, rank) for rank, memory in enumerate(destinations)])
    return compare(source, have, target, held)


def shard(memory: Memory, rank: int, name: str) -> torch.Tensor:
    return next(parameter for parameter in memory[rank] if parameter.name == name).shards[0].tensor


def test_a_good_sync_passes(maps: tuple[ShardMap, ShardMap], synced: tuple[Memory, Memory]) -> None:
    assert set(attest_all(maps, *synced)) == {spec.name for spec in maps[1].parameters}


def test_one_flipped_bit_names_parameter_and_rank(
    maps: tuple[ShardMap, ShardMap], synced: tuple[Memory, Memory]
) -> None:
    shard(synced[1], 5, Q).view(torch.int16)[3, 7] ^= 1
    with pytest.raises(AttestationError, match=rf"{Q} .*generation ranks \[5\] differ"):
        attest_all(maps, *synced)


def test_every_single_bit_counts(
    maps: tuple[ShardMap, ShardMap], synced: tuple[Memory, Memory]
) -> None:
    target = Parts.of(maps[1])
    clean = target.digests(synced[1][0], 0)
    for name in ("model.norm.weight", Q, "lm_head.weight"):
        bits = shard(synced[1], 0, name).view(torch.int16)
        for bit in range(16):
            place = tuple(int(torch.randint(size, ())) for size in bits.shape)
            bits[place] ^= 1 << bit if bit < 15 else -(1 << 15)
            assert (target.digests(synced[1][0], 0) != clean).sum() == 1
            bits[place] ^= 1 << bit if bit < 15 else -(1 << 15)


def test_a_flipped_bit_in_a_block_of_words() -> None:
    """Wide rows are summed in blocks that share a weight: every bit still counts, and boxes
    that changed places do."""
    spec = ParameterSpec("w", (6, 1000), "bfloat16")
    source = ShardMap.of([spec], {0: [("w", Box((0, 0), (6, 1000)))]}, num_ranks=1)
    parts, full = Parts.of(source), torch.randn(6, 1000).bfloat16()
    assert (
        parts.narrowest() == {"w": 1000}
        and block_words(250) == 32
        and block_words(4096) == 64
        and block_words(63) == 1
    )

    def digest() -> int:
        memory = [
            LocalParameter(
                "w", (6, 1000), torch.bfloat16, (LocalShard(Box((0, 0), (6, 1000)), full),)
            )
        ]
        return int(parts.digests(memory, 0, None, {"w": 32})[0])

    clean, bits = digest(), full.view(torch.int16)
    for row, column in ((0, 0), (5, 999), (3, 500), (2, 127), (2, 128)):
        bits[row, column] ^= 2
        assert digest() != clean
        bits[row, column] ^= 2
    full.copy_(torch.cat([full[:, 500:], full[:, :500]], 1))
    assert digest() != clean


def test_swapped_shards(maps: tuple[ShardMap, ShardMap], synced: tuple[Memory, Memory]) -> None:
    """All replicas got the two tensor parts the wrong way round: equal among themselves, wrong
    together."""
    parts = maps[1].rank[maps[1].rows(0)]
    assert len(parts) == 8
    groups = zero_redundancy(LAYOUT, tp=2).tensor_groups
    for first, second in groups:
        one, two = shard(synced[1], first, Q), shard(synced[1], second, Q)
        kept = one.clone()
        one.copy_(two)
        two.copy_(kept)
    with pytest.raises(
        AttestationError, match=rf"{Q}: generation ranks \[0, 1, 2, 3, 4, 5, 6, 7\] hold digest"
    ):
        attest_all(maps, *synced)


def test_rows_in_the_wrong_order(
    maps: tuple[ShardMap, ShardMap], synced: tuple[Memory, Memory]
) -> None:
    for rank in range(8):
        shard(synced[1], rank, Q).copy_(shard(synced[1], rank, Q).flip(0))
    with pytest.raises(AttestationError, match=Q):
        attest_all(maps, *synced)


def test_a_stale_parameter(maps: tuple[ShardMap, ShardMap], synced: tuple[Memory, Memory]) -> None:
    """Training went on, one parameter was not sent again."""
    sources, destinations = synced
    with torch.no_grad():
        for memory in sources:
            next(p for p in memory if p.name == "lm_head.weight").shards and shard(
                [memory], 0, "lm_head.weight"
            ).add_(0.5)
    with pytest.raises(AttestationError, match=r"lm_head.weight: generation ranks") as caught:
        attest_all(maps, sources, destinations)
    assert Q not in str(caught.value)


def test_training_replicas_that_drifted_apart(
    maps: tuple[ShardMap, ShardMap], synced: tuple[Memory, Memory]
) -> None:
    shard(synced[0], 6, "model.norm.weight").mul_(1.5)
    with pytest.raises(
        AttestationError,
        match=r"model.norm.weight .*training ranks \[6\] differ from ranks \[2, 3, 7\]",
    ):
        attest_all(maps, *synced)
