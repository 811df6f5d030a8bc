"""Distributed checkpoints of named tensors: safetensors files that torch.distributed.checkpoint
writes, one or more a rank.

No file is a pickle: each safetensors header says which box of which tensor it holds, so that a
checkpoint can be loaded on any layout. Names, shapes and dtypes must agree; what else belongs to a
run (data position, RNG states) is saved elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save


class _Writer(HuggingFaceStorageWriter):
    """A safetensors file holds one box of a name: a rank's second box of a name (of a fused
    projection, say) goes into its second file, and so on."""

    def _split_by_storage_plan(
        self, storage_plan: dict[str, int] | None, items: list[WriteItem]
    ) -> dict[int, list[WriteItem]]:
        files: dict[int, list[WriteItem]] = {}
        seen: Counter[str] = Counter()
        for item in items:
            seen[item.index.fqn] += 1
            files.setdefault(seen[item.index.fqn], []).append(item)
        return files


def save_tensors(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Write plain (the same on all ranks) and distributed tensors into `directory`; collective
    over the default group."""
    directory.mkdir(parents=True, exist_ok=True)
    save(
        dict(tensors),
        storage_writer=_Writer(str(directory), save_distributed=True),
        no_dist=_alone(),
    )


def load_tensors(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Fill `tensors` in place from `directory`, whatever layout wrote it; collective.
    ValueError if it is not such a directory."""
    if not any(directory.glob("*.safetensors")):
        raise ValueError(
            f"checkpoint directory is {str(directory)!r}; it holds no safetensors files: use a "
            "directory written by save"
        )
    load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=_alone())


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1
