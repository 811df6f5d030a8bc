"""An adapter merged into the weights that it changes, on the shards of each rank.

A merged weight is W + scale * B A, computed in float32 from the frozen W every time: adding and
taking away would drift. Every rank merges its own boxes of W, for which it needs all of the small
matrices and nothing of any other weight; so layouts and engines play no part.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
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
class _Result:
    """A box of a frozen or trained parameter, and the memory for what is sent in its place."""

    layer: str
    source: LocalShard
    memory: Tensor


class TransientWeights(ABC):
    """source = MergedWeights(held, adapter, matrices)
    with source.filled():
        executor.run()      # with source.parameters as sources
    """

    def __init__(self) -> None:
        self.parameters: list[LocalParameter] = []
        """The parameters to send; `names` of them in memory that is there within `filled` only."""
        self._results: list[_Result] = []

    @property
    def names(self) -> frozenset[str]:
        memory = {id(result.memory) for result in self._results}
        names = []
        for parameter in self.parameters:
            if any(id(shard.tensor) in memory for shard in parameter.shards):
                names.append(parameter.name)
        return frozenset(names)

    @contextmanager
    def filled(self) -> Iterator[None]:
        """Within, what is sent is the adapter as it is now. Collective."""
        try:
            with torch.no_grad():
                self._fill()
            yield
        finally:
            for result in self._results:
                result.memory.untyped_storage().resize_(0)

    @abstractmethod
    def _fill(self) -> None:
        """Compute every result into its memory."""

    def _add(self, layer: str, parameter: LocalParameter) -> None:
        """Sends a parameter from memory of its own."""
        shards = []
        for source in parameter.shards:
            memory = torch.empty(
                source.box.shape, dtype=parameter.dtype, device=source.tensor.device
            )
            memory.untyped_storage().resize_(0)
            self._results.append(_Result(layer=layer, source=source, memory=memory))
            shards.append(replace(source, tensor=memory))
        self.parameters.append(replace(parameter, shards=tuple(shards)))


class MergedWeights(TransientWeights):
    """The model with the adapter merged into it."""

    def __init__(
        self,
        held: Sequence[LocalParameter],
        adapter: Adapter,
        matrices: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        """`held`: this rank's shards of the model, the adapter's among them. `matrices`: the
        adapter's, whole, by name; collective."""
        super().__init__()
        self._scale, self._matrices = adapter.scale, matrices
        layers = set(adapter.layers)
        for parameter in held:
            layer = parameter.name.removesuffix(WEIGHT)
            if layer in layers and parameter.name.endswith(WEIGHT):
                self._add(layer, parameter)
            elif not parameter.name.endswith((f".{LORA_A}", f".{LORA_B}")):
                self.parameters.append(parameter)

    def _fill(self) -> None:
        matrices = self._matrices()
        for result in self._results:
            base, memory = result.source, result.memory
            memory.untyped_storage().resize_(memory.nbytes)
            rows, columns = base.box.slices
            a, b = matrices[f"{result.layer}.{LORA_A}"], matrices[f"{result.layer}.{LORA_B}"]
            merged = torch.addmm(base.tensor.float(), b[rows], a[:, columns], alpha=self._scale)
            memory.copy_(merged)


class ScaledMatrices(TransientWeights):
    """The adapter alone: A as it is, and scale * B, which is rounded once to what the generation
    engine computes with."""

    def __init__(self, held: Sequence[LocalParameter], adapter: Adapter) -> None:
        super().__init__()
        self._scale = adapter.scale
        for parameter in held:
            if parameter.name.endswith(f".{LORA_A}"):
                self.parameters.append(parameter)
            elif parameter.name.endswith(f".{LORA_B}"):
                self._add(parameter.name.removesuffix(f".{LORA_B}"), parameter)

    def _fill(self) -> None:
        for result in self._results:
            result.memory.untyped_storage().resize_(result.memory.nbytes)
            torch.mul(result.source.tensor.detach(), self._scale, out=result.memory)


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
