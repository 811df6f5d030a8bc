"""Views into a rank's shards: the memory of a box of a logical parameter, never a copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybridflow.resharding.shards import Box, LocalParameter


class LocalMemory:
    """All shards of one rank, by parameter.

    memory = LocalMemory(engine.local_parameters())
    memory.view("model.embed_tokens.weight", start=(0, 0), shape=(8, 64))
    """

    def __init__(self, parameters: Sequence[LocalParameter]) -> None:
        self._shards: dict[str, list[tuple[Box, torch.Tensor]]] = {}
        for parameter in parameters:
            shards = self._shards.setdefault(parameter.name, [])
            for shard in parameter.shards:
                if tuple(shard.tensor.shape) != shard.box.shape:
                    raise ValueError(
                        f"parameter {parameter.name}: tensor of shape {tuple(shard.tensor.shape)} "
                        f"for {shard.box}"
                    )
                if shard.tensor.dtype != parameter.dtype:
                    raise ValueError(
                        f"parameter {parameter.name}: tensor of {shard.tensor.dtype}, declared "
                        f"{parameter.dtype}"
                    )
                shards.append((shard.box, shard.tensor.detach()))

    def view(self, name: str, start: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """The memory of a box that lies inside one shard.

        Raises a ValueError where the rank does not hold it.
        """
        for box, tensor in self._shards.get(name, ()):
            inside = all(
                low <= first and first + size <= low + whole
                for low, whole, first, size in zip(box.start, box.shape, start, shape, strict=True)
            )
            if inside:
                for dim, (low, whole, first, size) in enumerate(
                    zip(box.start, box.shape, start, shape, strict=True)
                ):
                    if size != whole:
                        tensor = tensor.narrow(dim, first - low, size)
                return tensor
        raise ValueError(
            f"parameter {name}: this rank has no memory for start {tuple(start)} shape "
            f"{tuple(shape)}; is the plan of this layout?"
        )


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's own memory as uint8 [bytes]."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def same_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether both views show the same elements in the same order."""
    return (
        first.data_ptr() == second.data_ptr()
        and first.dtype == second.dtype
        and first.shape == second.shape
        and first.stride() == second.stride()
    )
