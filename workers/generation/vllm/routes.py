"""The routes of a vLLM engine: which experts of a mixture each token was sent to.

They are kept by slot of the key/value cache, where vLLM keeps what else it knows of a token: a row
whose prompt was read for another row has its routes, and one that was preempted writes them anew
with its keys and values. A captured function writes into one table and takes nothing to the host.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class RouteTable:
    """table = RouteTable(runner)     # before the first request
    ...                               # vLLM's steps
    table.take(request, num_tokens)   # before the next step

    A request that has finished keeps its row of the block table until the next step begins.
    """

    def __init__(self, runner: GPUModelRunner, experts_per_token: int) -> None:
        routers = _routers(runner.get_model())
        groups = runner.kv_cache_config.kv_cache_groups
        if len(groups) != 1:
            raise ValueError(
                f"actor.router_replay is R3, but the layers of this model keep {len(groups)} kinds of "
                "keys and values, of which windows forget tokens; use R2"
            )
        self._batch = runner.input_batch
        self._blocks = runner.input_batch.block_table[0]
        manager_block = groups[0].kv_cache_spec.block_size
        slots = runner.kv_cache_config.num_blocks * manager_block
        self.shape = len(routers), experts_per_token
        # The last row takes what vLLM writes for padding, whose slot is -1.
        self._table = torch.full(
            (slots + 1, *self.shape), -1, dtype=torch.int16, device=runner.device
        )
        for layer, router in enumerate(routers):
            router.set_capture_fn(partial(self._capture, layer))

    def take(self, request: str, num_drawn: int) -> NDArray[np.int16]:
        """int16 [tokens - 1, layers, experts per token] of a request's prompt and its `num_drawn`
        tokens, the last of which was not read."""
        row = self._batch.req_id_to_index[request]
        num_read = int(self._batch.num_prompt_tokens[row]) + num_drawn - 1
        size = self._blocks.block_size
        positions = np.arange(num_read)
        blocks = self._blocks.block_table.np[row][positions // size].astype(np.int64)
        slots = torch.from_numpy(blocks * size + positions % size)
        routes: NDArray[np.int16] = self._table[slots.to(self._table.device)].cpu().numpy()
        return routes

    def _capture(self, layer: int, experts: torch.Tensor) -> None:
        """Called by the router of a layer with [tokens, experts per token] of the running step."""
        slots = self._blocks.slot_mapping.gpu[: len(experts)]
        self._table[slots, layer] = experts.to(torch.int16)


def _routers(model: nn.Module) -> list[BaseRouter]:
    """The router of each layer with experts, in the order of the layers."""
    from vllm.model_executor.layers.fused_moe.layer import MoERunner
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    runners = [module for module in model.modules() if isinstance(module, MoERunner)]
    routers: list[BaseRouter] = []
    for runner in sorted(runners, key=lambda runner: runner.layer_id):
        if not isinstance(runner.router, BaseRouter) or runner._quant_method.is_monolithic:
            raise ValueError(
                "actor.router_replay is R3, but vLLM's kernel for this model chooses its experts "
                "inside; use R2"
            )
        routers.append(runner.router)
    return routers
