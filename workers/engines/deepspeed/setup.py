"""DeepSpeed as engine `deepspeed` uses it: the import, the settings, and a model that it takes over
(ZeRO 1, 2 and 3).

Everything that DeepSpeed reads from the environment is set here. Left out on purpose: its own AdamW
and its shared-memory collectives, which a compiler would have to build on first use; its clipping,
schedules and loss scaling, which engines here share with each other.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workers.config import Precision, TrainConfig
from workers.engines.base import Head
from workers.engines.model.attention import check_packable
from workers.engines.model.checkpointing import enable_activation_checkpointing
from workers.engines.model.layers import prepare_layers
from workers.engines.model.loading import ModelSource
from workers.engines.model.scored import ScoredModel, decoder_layers
from workers.engines.shared.optimizer import adamw

BUCKET_ELEMENTS = 50_000_000
"""Most elements that one collective moves."""
SHARED_MEMORY_OP = "deepspeed_shm_comm"

_seen_world: list[Any] = []
"""The torch.distributed world that DeepSpeed's cached process groups belong to."""


def library(device: torch.device) -> Any:
    """The module deepspeed, set up for `device` and for the present torch.distributed world."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # It reads the number of the device from here, at any time; a host with a GPU sees only its own.
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    import deepspeed
    from deepspeed.utils import groups

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False
    if _seen_world and _seen_world[0] is not dist.group.WORLD:
        groups._release_process_group_references()
    _seen_world[:] = [dist.group.WORLD]
    deepspeed.init_distributed(verbose=False)
    return deepspeed


def deepspeed_settings(config: TrainConfig, num_parameters: int) -> dict[str, Any]:
    """The settings of deepspeed.initialize. Batch sizes mean nothing: the engine sets every
    accumulation boundary itself."""
    bucket = max(1024, min(BUCKET_ELEMENTS, num_parameters))
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Off, not DeepSpeed's default of 1.0: the engine clips.
        "gradient_clipping": 0.0,
        "bf16": {"enabled": config.precision is Precision.bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": None,
        "zero_optimization": {
            "stage": config.zero_stage,
            # Its backward passes end with a wait for the whole device, in every micro-batch.
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": 2 * bucket,
            "stage3_prefetch_bucket_size": bucket,
            # It would exchange torch.nn.functional.linear for the whole process.
            "memory_efficient_linear": False,
        },
    }


class ZeroModel:
    """A ScoredModel under DeepSpeed:

    zero = ZeroModel(source, Head.lm, config, device, trains=True)
    zero.run(input_ids, read_positions, targets, entropy=..., temperature=...)
    """

    def __init__(
        self,
        source: ModelSource,
        head: Head,
        config: TrainConfig,
        device: torch.device,
        *,
        trains: bool,
    ) -> None:
        """Collective. trains=False: weights alone; under stages 1 and 2 that is the plain
        model, without DeepSpeed."""
        if config.packing:
            check_packable(source.model)
        self.config = config
        self.dtype = torch.bfloat16 if config.precision is Precision.bf16 else torch.float32
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Logical parameters."""
        num_elements = 0
        for name, parameter in source.model.named_parameters():
            self.shapes[name] = tuple(parameter.shape)
            num_elements += parameter.shape.numel()
        self.originals: dict[str, Tensor] = {}
        """Float32 values that bfloat16 cannot hold, until the master weights have them: host
        memory; under stage 3 the rank's part."""
        self.scored = ScoredModel(source.model, head)
        prepare_layers(source.model, config)
        keeps = trains and self.dtype is not torch.float32
        deepspeed = library(device)
        settings = deepspeed_settings(config, num_elements)
        layers: list[nn.Module] = []
        if config.zero_stage == 3 or self.dtype is not torch.float32:
            layers = decoder_layers(source.model)  # one at a time in float32
        for module in (*layers, source.model):
            source.materialize(module, device)
            names = {id(parameter): name for name, parameter in source.model.named_parameters()}
            self._take(module, names, keeps)
            if config.zero_stage == 3:
                deepspeed.zero.Init(module=module, config_dict_or_path=settings, dtype=self.dtype)
        self.parameters: dict[str, nn.Parameter] = dict(source.model.named_parameters())
        self.trained = {
            name: parameter
            for name, parameter in self.parameters.items()
            if parameter.requires_grad
        }
        self.adam = self._build_adam() if trains else None
        self.engine: Any = None
        if trains or config.zero_stage == 3:
            # It prints what memory is free between its steps.
            with redirect_stdout(io.StringIO()):
                self.engine, *_ = deepspeed.initialize(
                    model=self.scored, optimizer=self.adam, config=settings
                )
        self.scored.eval()
        if config.activation_checkpointing:  # eval() switched it off
            enable_activation_checkpointing(source.model, selective=config.selective_checkpointing)

    @property
    def run(self) -> Callable[..., dict[str, Tensor]]:
        return self.engine if self.engine is not None else self.scored

    def _take(self, module: nn.Module, names: dict[int, str], keeps: bool) -> None:
        """Weights of `module` in the compute dtype; what that loses is kept aside where
        training needs it."""
        if self.dtype is torch.float32:
            return
        for parameter in module.parameters():
            if parameter.dtype is not torch.float32 or not parameter.numel():
                continue
            full = parameter.data
            parameter.data = full.to(self.dtype)
            if keeps and parameter.requires_grad and not torch.equal(parameter.data.float(), full):
                flat = full.reshape(-1)
                if self.config.zero_stage == 3:
                    size = -(-len(flat) // dist.get_world_size())
                    flat = flat[dist.get_rank() * size : (dist.get_rank() + 1) * size].clone()
                self.originals[names[id(parameter)]] = flat.cpu()

    def _build_adam(self) -> torch.optim.AdamW:
        decays, others = [], []
        for name, parameter in self.trained.items():
            if len(self.shapes[name]) >= 2:
                decays.append(parameter)
            else:
                others.append(parameter)
        return adamw(decays, others, self.config.optimizer, fused=True)
