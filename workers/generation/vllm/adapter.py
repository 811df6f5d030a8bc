"""An adapter in vLLM's own slot for one, where a weight sync writes it: the base stays as vLLM
loaded it, and only the small matrices travel.

Which part of which matrix lies where in the slot (tensor ranks, fused projections) is discovered by
running vLLM's own set_lora on recording tensors, as shard_map.py does with loaders. The slot is
pinned: vLLM would otherwise copy its own idea of the adapter over what was written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hybridflow.resharding import LocalParameter, LocalShard, ParameterSpec
from workers.config import LoraConfig
from workers.engines.model.lora import LORA_A, LORA_B
from workers.engines.model.peft_files import adapter_rank
from workers.generation.config import InFlight
from workers.generation.vllm.shard_map import LoaderError, LoaderWrite, missing, record_writes
from workers.generation.weight_destination import WeightDestination

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.lora.request import LoRARequest

    from workers.generation.vllm.engine import VllmEngine

SLOT_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM has slots for; a smaller adapter leaves rows at zero."""
SAME_NAMES = ("gemma3_text", "llama", "mistral", "qwen2", "qwen3")
"""Families whose layers vLLM knows by the checkpoint's names, each projection by itself."""
NUMBER, NAME = 1, "policy"


def has_slot(model: PretrainedConfig, lora: LoraConfig) -> bool:
    """Whether an adapter of this model can be sent to vLLM as it is."""
    return model.model_type in SAME_NAMES and adapter_rank(lora) <= SLOT_RANKS[-1]


def engine_options(lora: LoraConfig | None) -> dict[str, Any]:
    """Arguments of vLLM's engine for one adapter; none without."""
    if lora is None:
        return {}
    rank = next(size for size in SLOT_RANKS if size >= adapter_rank(lora))
    return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": rank}


def take_slot(runner: Any) -> LoRARequest:
    """Registers an adapter of zeros without files and pins its slot; what a request must carry to
    be answered with it."""
    from vllm.lora.request import LoRARequest

    request = LoRARequest(lora_name=NAME, lora_int_id=NUMBER, lora_path=NAME)
    runner.lora_manager.add_dummy_lora(request, rank=1)
    runner.lora_manager.pin_adapter(NUMBER)
    return request


class VllmAdapter(WeightDestination):
    """The memory of the slot, as boxes of the trainer's matrices A and scale * B."""

    def __init__(
        self,
        engine: VllmEngine,
        runner: Any,
        parameters: Sequence[ParameterSpec],
        in_flight: InFlight,
    ) -> None:
        """LoaderError for a matrix that vLLM has no place for."""
        self.engine, self.in_flight = engine, in_flight
        manager = runner.lora_manager._adapter_manager
        slot = manager.lora_index_to_id.index(NUMBER)
        shapes = {parameter.name: parameter.shape for parameter in parameters}
        self._parameters = _destinations(manager, slot, shapes)

    def destinations(self) -> list[LocalParameter]:
        return self._parameters

    def share(self, sources: Sequence[LocalParameter]) -> None:
        """The slot is vLLM's own memory."""

    def commit(self, version: int) -> None:
        """The slot's new contents act at once."""
        self.engine.weights_written(version, self.in_flight)

    def release(self) -> int:
        """There is no memory beside the slot."""
        return 0

    def restore(self) -> None:
        """See release."""


def _destinations(
    manager: Any, slot: int, shapes: Mapping[str, tuple[int, ...]]
) -> list[LocalParameter]:
    shards: dict[str, list[LocalShard]] = {name: [] for name in shapes}
    writes: list[LoaderWrite] = []
    dtype = torch.float32
    for name, layer in manager.modules.items():
        parts = manager.packed_modules.get(name, [name])
        if not any(f"{part}.{LORA_A}" in shapes for part in parts):
            continue
        memory = _stacked(layer)
        found = _record(layer, parts, shapes, slot, packed=name in manager.packed_modules)
        for write in found:
            tensor, region = memory[write.tensor], write.region
            dtype = tensor.dtype
            view = tensor.as_strided(region.size, region.stride, region.offset)
            shards[write.name].append(LocalShard(write.box, view))
        writes += found
    if lost := missing(writes, shapes):
        raise LoaderError(
            f"{', '.join(sorted(lost)[:3])}: vLLM has no slot for it; set actor.adapter_sync=merged"
        )
    return [
        LocalParameter(name, shape, dtype, tuple(shards[name])) for name, shape in shapes.items()
    ]


def _record(
    layer: Any,
    parts: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    slot: int,
    *,
    packed: bool,
) -> list[LoaderWrite]:
    """The copies that vLLM's set_lora makes of the matrices of a layer's `parts` into its slot."""
    live = layer.lora_a_stacked, layer.lora_b_stacked
    a: list[torch.Tensor | None] = []
    b: list[torch.Tensor | None] = []
    matrices: dict[str, torch.Tensor] = {}
    for part in parts:
        for suffix, into in ((LORA_A, a), (LORA_B, b)):
            shape = shapes.get(f"{part}.{suffix}")
            matrix = None if shape is None else torch.empty(shape, device="meta")
            if matrix is not None:
                matrices[f"{part}.{suffix}"] = matrix
            into.append(matrix)
    fresh = [tuple(torch.empty_like(t, device="meta") for t in stacked) for stacked in live]
    layer.lora_a_stacked, layer.lora_b_stacked = fresh
    layer.reset_lora = lambda index: None
    try:
        with record_writes(matrices, _stacked(layer)) as writes:
            layer.set_lora(slot, a if packed else a[0], b if packed else b[0])
    finally:
        layer.lora_a_stacked, layer.lora_b_stacked = live
        del layer.reset_lora
    return writes


def _stacked(layer: Any) -> dict[str, torch.Tensor]:
    """The slots of a layer by name: one of A and one of B for each projection that it fuses."""
    named = {}
    for suffix, stacked in ((LORA_A, layer.lora_a_stacked), (LORA_B, layer.lora_b_stacked)):
        for number, tensor in enumerate(stacked):
            named[f"{suffix}.{number}"] = tensor
    return named
