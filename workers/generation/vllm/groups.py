"""vLLM's process groups for any generation grouping, built before the engine.

vLLM groups consecutive ranks. The paper's zero-redundancy grouping does not (docs/paper.md section
3): its generation TP groups take ranks at intervals. vLLM keeps groups that exist already, so these
are built first. Engines that are data-parallel inside (expert parallel) and context parallelism are
left out.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.distributed as dist


def build_vllm_groups(
    replicas: Sequence[Sequence[Sequence[int]]], *, fast_sum: bool = False
) -> None:
    """Create vLLM's groups in this process; call it on every rank of the default group, before
    vllm.LLM. Collective.

    `replicas[i][stage]` lists the ranks of one generation replica's pipeline stage in the order of
    their tensor coordinate: build_vllm_groups([[[0, 2]], [[1, 3]]]) is two replicas with tp=2,
    pp=1. All replicas have equal sizes. Worth calling for consecutive ranks too: vLLM's own CPU
    groups name their shared memory alike in every pool of a machine. The groups stay until
    vllm.distributed.parallel_state.destroy_model_parallel(). `fast_sum`: whether vLLM may sum tensor
    parts by reading other GPUs' memory (setup.sums_through_peers).
    """
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    sizes: set[tuple[int, int]] = set()
    order: list[int] = []
    for replica in replicas:
        for stage in replica:
            sizes.add((len(replica), len(stage)))
            order += stage
    if len(sizes) != 1 or sorted(order) != list(range(dist.get_world_size())):
        raise ValueError(
            f"generation groups {replicas}: need replicas of equal pp and tp sizes that hold "
            "every rank of the pool once"
        )
    pipeline, tensor = sizes.pop()
    build, new_group = parallel_state.init_model_parallel_group, dist.new_group

    def build_permuted(
        group_ranks: list[list[int]], *args: Any, **kwargs: Any
    ) -> parallel_state.GroupCoordinator:
        permuted = [[order[place] for place in group] for group in group_ranks]
        return build(permuted, *args, **kwargs)

    # The name of the CPU groups' shared memory: two pools of one machine must not meet in it.
    name = [secrets.token_hex(8)]
    dist.broadcast_object_list(name)
    os.environ["VLLM_DIST_IDENT"] = name[0]
    # vllm.LLM has an argument for it, which it reads after the groups are there.
    parallel_state.set_custom_all_reduce(fast_sum)
    with set_current_vllm_config(VllmConfig()):
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        parallel_state.init_distributed_environment(
            world_size=len(order),
            rank=dist.get_rank(),
            local_rank=local_rank,
            backend=dist.get_backend(),
        )
        # vLLM numbers places as replica, stage, tensor coordinate; the rank at a place is ours to
        # choose. torch sorts a group's ranks unless it is told not to, and vLLM does not tell it:
        # gathered tensor parts would come in the order of the ranks.
        parallel_state.init_model_parallel_group = build_permuted
        dist.new_group = partial(new_group, sort_ranks=False)
        try:
            parallel_state.initialize_model_parallel(tensor, pipeline, backend=dist.get_backend())
        finally:
            parallel_state.init_model_parallel_group, dist.new_group = build, new_group
