"""Shard maps of layouts that do not run: for plans without weights, for predictions and for tests.

A model is a list of rules: shape, the dim that tensor parallelism splits, the pipeline stage's
layer. Real engines describe themselves (ShardMap.gather); nothing in a training run depends on this
file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

from hybridflow.layout import Layout
from hybridflow.resharding.boxes import flat_range_boxes
from hybridflow.resharding.grouping import Grouping
from hybridflow.resharding.shard_map import ParameterSpec, ShardMap
from hybridflow.resharding.shards import Box

FIRST, LAST, BOTH = -1, -2, -3
"""The layer of the embedding, of the final norm and head, and of an embedding tied to the head
(which the first and the last stage hold)."""
VOCAB_PADDING = 64
"""vLLM splits a vocabulary that is padded to a multiple of this."""


@dataclass(frozen=True, slots=True)
class ParameterRule:
    """ParameterRule(ParameterSpec("model.layers.3.self_attn.k_proj.weight", (1024, 8192),
    "bfloat16"), layer=3, split=0, unit=128)"""

    spec: ParameterSpec
    layer: int
    """Number of the decoder layer, FIRST, LAST or BOTH."""
    split: int | None = None
    """Dim that tensor parallelism splits; None: every tensor rank holds the whole parameter."""
    unit: int = 1
    """Indivisible elements along `split` (a head); fewer units than tensor ranks are
    replicated, as key-value heads are."""
    vocabulary: bool = False
    """Whether `split` is the vocabulary, which vLLM pads."""
    experts: bool = False
    """A stack [experts, ...], which expert parallelism divides."""


def decoder_rules(
    *,
    num_layers: int,
    hidden: int,
    intermediate: int,
    num_heads: int,
    num_kv_heads: int,
    vocab: int,
    head_dim: int | None = None,
    tied: bool = False,
    norms: bool = True,
    dtype: str = "bfloat16",
    experts: int = 0,
) -> list[ParameterRule]:
    """A Llama-shaped decoder. Llama 70B: decoder_rules(num_layers=80, hidden=8192,
    intermediate=28672, num_heads=64, num_kv_heads=8, vocab=32000); norms=False leaves out
    everything that tensor parallelism cannot split. `experts`: every layer's MLP is that many of
    them, behind a router."""
    head = head_dim or hidden // num_heads
    matrices = [
        ("self_attn.q_proj", (num_heads * head, hidden), 0, head),
        ("self_attn.k_proj", (num_kv_heads * head, hidden), 0, head),
        ("self_attn.v_proj", (num_kv_heads * head, hidden), 0, head),
        ("self_attn.o_proj", (hidden, num_heads * head), 1, head),
    ]
    mlp = [
        ("mlp.gate_proj", (intermediate, hidden), 0, 1),
        ("mlp.up_proj", (intermediate, hidden), 0, 1),
        ("mlp.down_proj", (hidden, intermediate), 1, 1),
    ]
    if not experts:
        matrices += mlp

    def rule(
        name: str,
        shape: tuple[int, ...],
        layer: int,
        split: int | None = None,
        unit: int = 1,
        vocabulary: bool = False,
    ) -> ParameterRule:
        return ParameterRule(
            ParameterSpec(f"{name}.weight", shape, dtype), layer, split, unit, vocabulary
        )

    rules = [rule("model.embed_tokens", (vocab, hidden), BOTH if tied else FIRST, 0, 1, True)]
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        for name, shape, split, unit in matrices:
            rules.append(rule(prefix + name, shape, layer, split, unit))
        for name, shape, split, _ in mlp if experts else ():
            name = f"{prefix}{name.replace('mlp', 'mlp.experts')}"
            spec = ParameterSpec(name, (experts, *shape), dtype)
            rules.append(ParameterRule(spec, layer, split + 1, experts=True))
        if experts:
            rules.append(rule(prefix + "mlp.gate", (experts, hidden), layer))
        if norms:
            rules.append(rule(prefix + "input_layernorm", (hidden,), layer))
            rules.append(rule(prefix + "post_attention_layernorm", (hidden,), layer))
    if norms:
        rules.append(rule("model.norm", (hidden,), LAST))
    if not tied:
        rules.append(rule("lm_head", (vocab, hidden), LAST, 0, 1, True))
    return rules


def threed(rules: Sequence[ParameterRule], layout: Layout, ep: int = 1) -> ShardMap:
    """Pipeline x tensor x data training: layers in even contiguous stages, split dims in even
    parts, replicated over dp. ep > 1: experts are whole, divided over the runs of `ep` ranks of a
    stage (workers/engines/model/expert_parallel.py)."""
    num_stages = layout.axis_size("pp")
    split = [rule for rule in rules if ep == 1 or not rule.experts]
    boxes = _boxes_by_coordinate(split, num_stages, layout.axis_size("tp"), padding=1)
    stages = _stages(rules, num_stages)
    boxes_of_rank = {}
    for rank in range(layout.size):
        at = layout.coordinates(rank)
        boxes_of_rank[rank] = list(boxes[at.get("pp", 0), at.get("tp", 0)])
        place = 0
        for axis in ("dp", "cp", "tp"):
            place = place * layout.axis_size(axis) + at.get(axis, 0)
        for rule in rules:
            if ep > 1 and rule.experts and stages[rule.layer] == at.get("pp", 0):
                boxes_of_rank[rank].append(_experts(rule, place % ep, ep))
    return _shard_map(rules, boxes_of_rank, layout.size)


def _experts(
    rule: ParameterRule, place: int, ep: int, piece: int = 0, pieces: int = 1
) -> tuple[str, Box]:
    """The experts of one of `ep` ranks, or one of the pieces that they are cut into (the last ones
    smaller or empty)."""
    experts, *rest = rule.spec.shape
    count = experts // ep
    step = -(-count // pieces)
    low = min(piece * step, count)
    start = (place * count + low, *[0] * len(rest))
    return rule.spec.name, Box(start, (min(step, count - low), *rest))


def fsdp(
    rules: Sequence[ParameterRule], num_ranks: int, shard_ranks: int | None = None, ep: int = 1
) -> ShardMap:
    """FSDP2: dim 0 of every parameter in torch.chunk's parts over `shard_ranks` neighbours (all
    ranks by default), replicated beyond. ep > 1: experts are divided over runs of `ep` ranks, and
    each part is cut over the ranks that have the same one."""
    size = shard_ranks or num_ranks
    boxes_of_rank: dict[int, list[tuple[str, Box]]] = defaultdict(list)
    for rule in rules:
        shape = rule.spec.shape
        if ep > 1 and rule.experts:
            for rank in range(num_ranks):
                box = _experts(rule, rank % ep, ep, rank // ep, num_ranks // ep)
                boxes_of_rank[rank].append(box)
            continue
        step = -(-shape[0] // size)
        for rank in range(num_ranks):
            low = min(rank % size * step, shape[0])
            high = min(low + step, shape[0])
            boxes_of_rank[rank].append(
                (rule.spec.name, Box((low, *(0,) * (len(shape) - 1)), (high - low, *shape[1:])))
            )
    return _shard_map(rules, boxes_of_rank, num_ranks)


def zero3(rules: Sequence[ParameterRule], num_ranks: int) -> ShardMap:
    """DeepSpeed ZeRO-3: every flattened parameter in equal ranges."""
    boxes_of_rank: dict[int, list[tuple[str, Box]]] = defaultdict(list)
    for rule in rules:
        numel = prod(rule.spec.shape)
        step = -(-numel // num_ranks)
        for rank in range(num_ranks):
            low, high = min(rank * step, numel), min((rank + 1) * step, numel)
            for box in flat_range_boxes(rule.spec.shape, low, high):
                boxes_of_rank[rank].append((rule.spec.name, box))
    return _shard_map(rules, boxes_of_rank, num_ranks)


def generation(rules: Sequence[ParameterRule], grouping: Grouping) -> ShardMap:
    """vLLM's layout under `grouping`: padded vocabulary, replicated key-value heads, even
    contiguous stages."""
    boxes = _boxes_by_coordinate(rules, grouping.pp, grouping.tp, padding=VOCAB_PADDING)
    boxes_of_rank = {}
    for rank, (_, stage, part) in enumerate(grouping.coordinates):
        boxes_of_rank[rank] = boxes[stage, part]
    return _shard_map(rules, boxes_of_rank, grouping.num_ranks)


def _shard_map(
    rules: Sequence[ParameterRule],
    boxes_of_rank: Mapping[int, list[tuple[str, Box]]],
    num_ranks: int,
) -> ShardMap:
    return ShardMap.of([rule.spec for rule in rules], boxes_of_rank, num_ranks=num_ranks)


def _boxes_by_coordinate(
    rules: Sequence[ParameterRule], pp: int, tp: int, padding: int
) -> dict[tuple[int, int], list[tuple[str, Box]]]:
    """The boxes of every (pipeline stage, tensor part)."""
    stages = _stages(rules, pp)
    boxes = {}
    for stage, part in product(range(pp), range(tp)):
        boxes[stage, part] = _boxes(rules, stages, stage, pp, part, tp, padding)
    return boxes


def _stages(rules: Sequence[ParameterRule], num_stages: int) -> list[int]:
    """Stage of every layer; the last stages take one layer more where it does not divide."""
    num_layers = max((rule.layer for rule in rules), default=-1) + 1
    if num_layers and num_layers < num_stages:
        raise ValueError(
            f"pp={num_stages}: the model has {num_layers} layers; choose at most that many stages"
        )
    bounds = num_layers * np.arange(1, num_stages + 1) // num_stages
    stages: list[int] = np.searchsorted(bounds, np.arange(num_layers), side="right").tolist()
    return stages


def _boxes(
    rules: Sequence[ParameterRule],
    stages: list[int],
    stage: int,
    num_stages: int,
    part: int,
    num_parts: int,
    padding: int,
) -> list[tuple[str, Box]]:
    """(parameter name, box) of a stage's tensor part; see _part for `padding`."""
    outside_layers = {FIRST: {0}, LAST: {num_stages - 1}, BOTH: {0, num_stages - 1}}
    result = []
    for rule in rules:
        holders = {stages[rule.layer]} if rule.layer >= 0 else outside_layers[rule.layer]
        if stage not in holders:
            continue
        start, shape = [0] * len(rule.spec.shape), list(rule.spec.shape)
        if rule.split is not None:
            low, high = _part(rule, part, num_parts, padding)
            start[rule.split], shape[rule.split] = low, high - low
        result.append((rule.spec.name, Box(tuple(start), tuple(shape))))
    return result


def _part(rule: ParameterRule, part: int, num_parts: int, padding: int) -> tuple[int, int]:
    """Where a part begins and ends along the split dim; a vocabulary is padded to a multiple of
    `padding`."""
    assert rule.split is not None
    size = rule.spec.shape[rule.split]
    if rule.vocabulary:
        padded = -(-size // padding) * padding
        step = -(-padded // num_parts)
        return min(part * step, size), min((part + 1) * step, size)
    units = size // rule.unit
    if units < num_parts:
        if num_parts % units:
            raise ValueError(
                f"tp={num_parts}: {rule.spec.name} has {units} heads; tp must divide by them or "
                "divide them"
            )
        part, num_parts = part // (num_parts // units), units
    if units % num_parts:
        raise ValueError(
            f"tp={num_parts}: {rule.spec.name} has {units} parts along dim {rule.split}; choose a "
            "divisor"
        )
    step = size // num_parts
    return part * step, (part + 1) * step
