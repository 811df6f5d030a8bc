"""An adapter merged into the weights that it changes, on the shards of each rank.

A merged weight is W + scale * B A, computed in float32 from the frozen W every time: adding and
taking away would drift. Every rank merges its own boxes of W, for which it needs all of the small
matrices and nothing of any other weight; so layouts and engines play no part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from hybridflow.resharding import LocalParameter, LocalShard, ShardMap
from hybridflow.resharding.attest import Parts, gather
from workers.engines.model.lora import LORA_A, LORA_B, Adapter

WEIGHT = ".weight"


@dataclass(frozen=True, kw_only=True)
class _MergedShard:
    """A box of a weight, and where it goes with the adapter merged in."""

    layer: str
    base: LocalShard
    result: Tensor


class MergedWeights:
    """merging = MergedWeights(held, adapter, gather)
    with merging.filled():
        executor.run()      # with merging.parameters as sources
    """

    def __init__(
        self,
        held: Sequence[LocalParameter],
        adapter: Adapter,
        matrices: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        """`held`: this rank's shards of the model, the adapter's among them. `matrices`: the
        adapter's, whole, by name; collective."""
        self._scale, self._matrices = adapter.scale, matrices
        self._merged: list[_MergedShard] = []
        self.parameters: list[LocalParameter] = []
        """The model's, without the adapter's; those of adapted layers in memory that is there
        within `filled` only."""
        layers = set(adapter.layers)
        for parameter in held:
            if parameter.name.endswith((f".{LORA_A}", f".{LORA_B}")):
                continue
            layer = parameter.name.removesuffix(WEIGHT)
            if layer in layers and parameter.name.endswith(WEIGHT):
                parameter = self._with_memory(layer, parameter)
            self.parameters.append(parameter)

    def _with_memory(self, layer: str, parameter: LocalParameter) -> LocalParameter:
        shards = []
        for shard in parameter.shards:
            result = torch.empty(shard.box.shape, dtype=parameter.dtype, device=shard.tensor.device)
            result.untyped_storage().resize_(0)
            self._merged.append(_MergedShard(layer=layer, base=shard, result=result))
            shards.append(replace(shard, tensor=result))
        return replace(parameter, shards=tuple(shards))

    @contextmanager
    def filled(self) -> Iterator[None]:
        """Within, the merged weights are those of the adapter as it is now. Collective."""
        matrices = self._matrices()
        try:
            with torch.no_grad():
                for shard in self._merged:
                    self._merge(shard, matrices)
            yield
        finally:
            for shard in self._merged:
                shard.result.untyped_storage().resize_(0)

    def _merge(self, shard: _MergedShard, matrices: Mapping[str, Tensor]) -> None:
        shard.result.untyped_storage().resize_(shard.result.nbytes)
        rows, columns = shard.base.box.slices
        a, b = matrices[f"{shard.layer}.{LORA_A}"], matrices[f"{shard.layer}.{LORA_B}"]
        merged = torch.addmm(shard.base.tensor.float(), b[rows], a[:, columns], alpha=self._scale)
        shard.result.copy_(merged)


def gather_whole(parameters: Sequence[LocalParameter], device: torch.device) -> dict[str, Tensor]:
    """Small float32 parameters, whole on every rank, from shards that cover every element once.
    Collective: one all-reduce."""
    sizes = [torch.Size(parameter.shape).numel() for parameter in parameters]
    flat = torch.zeros(sum(sizes), device=device)
    whole: dict[str, Tensor] = {}
    for parameter, part in zip(parameters, flat.split(sizes), strict=True):
        tensor = part.view(parameter.shape)
        for shard in parameter.shards:
            tensor[shard.box.slices].copy_(shard.tensor.detach())
        whole[parameter.name] = tensor
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(flat)
    return whole


def base_digest(held: Sequence[LocalParameter], trained: Container[str]) -> int:
    """A number of 63 bits for the frozen weights, the same on every layout and in every data type
    that holds them. Collective."""
    frozen = [parameter for parameter in held if parameter.name not in trained]
    parts = Parts.of(ShardMap.gather(frozen))
    rank = dist.get_rank() if dist.is_initialized() else 0
    float32 = dict.fromkeys(parts.shard_map.names, "float32")
    values = gather(parts.digests(frozen, rank, float32))
    first = parts.holds.argmax(axis=1)
    sums = parts.sums(values[first, range(len(first))])
    text = json.dumps(sums, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
