"""G14, G15: what saving and building an engine hold at a time, and over which backend parts travel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hybridflow.local_pool import LocalPool
from hybridflow.pool import PoolSpec
from hybridflow.resharding import Box, LocalParameter, LocalShard
from tests.tiny import make_model
from workers.config import ModelConfig, Precision, TrainConfig
from workers.engines.base import Head
from workers.engines.deepspeed.setup import ZeroModel
from workers.engines.model.loading import ModelSource
from workers.engines.shared.export import write_safetensors
from workers.engines.shared.host_memory import HostMemory

CPU = torch.device("cpu")


class WatchedSource(ModelSource):
    """Records how many float32 numbers of matrices the model has after each materialization."""

    most = 0

    def materialize(self, module: nn.Module, device: torch.device) -> None:
        super().materialize(module, device)
        held = 0
        for parameter in module.parameters():
            if parameter.dtype is torch.float32:
                held += parameter.numel()
        self.most = max(self.most, held)


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_casts_layer_by_layer(tmp_path: Path, stage: int) -> None:
    """G15: stages 1 and 2 had the whole model in float32 on the device before they cast it."""
    path = make_model(tmp_path / "model", layers=4)
    config = TrainConfig(engine="deepspeed", zero_stage=stage, precision=Precision.bf16)
    with LocalPool(PoolSpec(name="main", num_devices=1)) as pool:
        source = WatchedSource(ModelConfig(path=str(path)), Head.lm, pool.context)
        total = sum(parameter.numel() for parameter in source.model.parameters())
        ZeroModel(source, Head.lm, config, CPU, trains=False)
    assert 0 < source.most < total


def test_a_state_on_the_host_is_where_it_was() -> None:
    """G33, on a CPU: nothing moves, and nothing is waited for."""
    memory, state = HostMemory(), torch.ones(3)
    assert memory.move("moment", state, CPU) is state
    memory.finish()
    assert memory.move("moment", state, CPU) is state


def test_parts_of_other_devices_are_written_from_the_host(tmp_path: Path) -> None:
    """G14: no device takes part in saving; NCCL would keep a communicator for each pair of ranks."""
    value = torch.arange(6.0).view(2, 3)
    parameter = LocalParameter(
        "w", (2, 3), torch.float32, (LocalShard(Box((0, 0), (2, 3)), value),)
    )
    with LocalPool(PoolSpec(name="main", num_devices=1)):
        write_safetensors([parameter], tmp_path)

    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], value)
