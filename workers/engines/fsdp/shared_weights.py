"""SharedWeights: the weights of one engine in memory that its data ranks share, where these are CPU
processes of one machine.

Every rank's shards lie side by side in memory that all ranks map, and each writes its own. A gather
is then a view of it: nothing is sent, and the gathered weights take no memory beside the shards.
Gradients and optimizer states stay each rank's own.

FSDP2 asks a shard for what to gather and how to put it together (fsdp_pre_all_gather and
fsdp_post_all_gather). Here it gathers one number of each parameter: no rank reads before all others
have come so far, which is after their last step. Left out: parameters that the ranks can't divide
evenly, those that are gathered in another data type, and experts; they are gathered as elsewhere.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from workers.process_memory import count_shared

ALIGNMENT = 64
"""Bytes: where a parameter begins in the memory."""
PREFIX = "hybridflow-weights-"
"""Beginning of the memory's name in /proc."""
LOGGER = logging.getLogger(__name__)


class SharedWeights:
    """shared = SharedWeights(mesh.get_group("dp"), torch.float32)
    fully_shard(layer, ...); shared.take(layer)       # layer by layer, on all ranks alike
    ...forward pass...; shared.wait()                 # now the weights may change
    """

    def __init__(self, group: ProcessGroup, dtype: torch.dtype) -> None:
        """`dtype`: what the model computes in."""
        self._group, self._dtype = group, dtype
        self._may_share = True
        self.num_bytes = 0
        """The memory of all ranks' shards."""

    def take(self, module: FSDPModule) -> None:
        """Move the shards of `module`'s own FSDP group into memory of all ranks. Collective."""
        rank, size = self._group.rank(), self._group.size()
        chosen, begin = [], 0
        for group in module._get_fsdp_state()._fsdp_param_groups if self._may_share else ():
            for parameter in group.fsdp_params:
                shard = parameter._sharded_param_data
                even = parameter.padded_sharded_param_size[0] * size == parameter._orig_size[0]
                # Lent weights have taken the place of this engine's own.
                own = parameter.sharded_param is getattr(
                    parameter._module_info.module, parameter._module_info.param_name
                )
                if even and own and shard.dtype is self._dtype:
                    chosen.append((parameter, begin))
                    begin += -(-shard.nbytes * size // ALIGNMENT) * ALIGNMENT
        memory = shared_memory(begin, self._group) if chosen else None
        if memory is None:
            self._may_share = self._may_share and not chosen
            return
        for parameter, start in chosen:
            shard, sizes = parameter._sharded_param_data, parameter.padded_sharded_param_size
            # A storage of its own: FSDP2 takes the gathered parameter from its beginning.
            part = memory.numpy()[start : start + shard.nbytes * size]
            whole = torch.from_numpy(part).view(self._dtype)
            mine = whole.view(size, -1)[rank]
            mine.copy_(shard)
            parameter._sharded_param_data = mine
            local = mine.view(sizes)
            vars(local).update(_gathering(whole))
            sharded = parameter.sharded_param
            assert isinstance(sharded, DTensor), "FSDP2's shards are distributed tensors"
            sharded._local_tensor = local
        self.num_bytes += begin
        count_shared(self, self.num_bytes // size)

    def wait(self) -> None:
        """Returns when every rank has called it: none reads the weights any more. Collective."""
        if self.num_bytes:
            dist.barrier(self._group)


def _gathering(whole: Tensor) -> dict[str, Any]:
    """The attributes by which FSDP2 gathers a shard of `whole`."""
    number = whole.new_zeros(1)

    def fsdp_pre_all_gather(
        mesh: object, outer_size: object, outer_stride: object, module: object, mp_policy: object
    ) -> tuple[tuple[Tensor, ...], None]:
        return (number,), None

    def fsdp_post_all_gather(
        outputs: Sequence[Tensor],
        metadata: None,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        return (whole, ()) if out is None else None  # nothing that FSDP2 may free

    return {
        "fsdp_pre_all_gather": fsdp_pre_all_gather,
        "fsdp_post_all_gather": fsdp_post_all_gather,
    }


def shared_memory(num_bytes: int, group: ProcessGroup) -> Tensor | None:
    """uint8 [num_bytes], zeros, the same memory on every rank of `group`, which the kernel frees
    with the last process that maps it; None, and a line in the log, where the ranks are not on one
    machine that has such memory. Collective."""
    name, place, file = f"{PREFIX}{secrets.token_hex(8)}", "", -1
    if group.rank() == 0 and sys.platform == "linux":
        # A system that refuses it is one that has none: the others wait for the name.
        with suppress(OSError):
            file = os.memfd_create(name)
            os.ftruncate(file, num_bytes)
            place = f"/proc/{os.getpid()}/fd/{file}"
    said: list[str] = [place, name]
    dist.broadcast_object_list(said, group=group, group_src=0)
    memory, problem = None, ""
    try:
        memory = mapped(said[0], said[1], num_bytes)
    except (OSError, RuntimeError) as error:
        problem = str(error)
    problems = [""] * group.size()
    dist.all_gather_object(problems, problem, group=group)
    if file >= 0:
        os.close(file)
    if any(problems):
        if group.rank() == 0:
            LOGGER.info("fsdp: each rank gathers weights of its own: %s", max(problems))
        return None
    return memory


def mapped(place: str, name: str, num_bytes: int) -> Tensor:
    """uint8 [num_bytes], the memory `name` that is open at `place`, a path in /proc; an OSError
    where there is nothing or something else, as on another machine."""
    if name not in str(Path(place).readlink()):
        raise FileNotFoundError(f"{place or 'this system'} does not have the memory {name}")
    return torch.from_file(place, shared=True, size=num_bytes, dtype=torch.uint8)
