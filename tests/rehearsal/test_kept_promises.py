"""What a GPU needs of code that computes nothing itself: streams and clocks, a kernel by the size of
heads, and what the cluster's files give to processes (docs/gpu.md)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hybridflow.context import RankContext
from tests.cluster.test_manifest import raycluster, rayjob
from workers.config import ModelConfig
from workers.engines.model import attention
from workers.engines.model.packing import packing_of
from workers.generation.vllm.setup import preserve_process_state
from workers.reward import FunctionScorer
from workers.role_config import ScorerConfig
from workers.weight_sync import device_time

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "cluster" / "templates"


@pytest.fixture
def one_process_world() -> Any:
    if torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_vllm_leaves_stream_and_precision_as_they_were(
    monkeypatch: pytest.MonkeyPatch, one_process_world: None
) -> None:
    """G27, G28: it makes a stream of its own the current one and products in float32 the slowest."""
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "before")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("waited"))
    monkeypatch.setattr(torch.cuda, "set_stream", calls.append)
    precision = torch.get_float32_matmul_precision()
    # What stays in place of the process' own, which other tests need.
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    environment = dict(os.environ)
    try:
        with preserve_process_state(RankContext(device="cuda:0"), environment):
            torch.set_float32_matmul_precision("medium")
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(precision)
    assert calls == ["waited", "before"]


def test_a_clock_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """G23: without, a transfer takes as long as it takes to ask for it."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("waited"))
    device_time()
    assert calls == ["waited"]


@pytest.mark.parametrize(("head_dim", "expected"), [(64, True), (20, False), (264, False)])
def test_heads_that_the_kernel_does_not_take_get_another(
    monkeypatch: pytest.MonkeyPatch, head_dim: int, expected: bool
) -> None:
    """G42."""
    taken = []
    for name in ("_variable_length", "_run_by_run"):

        def kernel(parts: Any, *_: Any, name: str = name) -> torch.Tensor:
            taken.append(name)
            output: torch.Tensor = parts[0]
            return output

        monkeypatch.setattr(attention, name, kernel)
    packing, layer = packing_of([5, 3]), torch.nn.Identity()
    layer.is_causal = True
    with FakeTensorMode(allow_non_fake_inputs=True):
        heads = torch.empty(1, 2, 8, head_dim, device="cuda", dtype=torch.bfloat16)
        attention.attend(layer, heads, heads, heads, None, fused=False, packing=packing)
    assert taken == (["_variable_length"] if expected else ["_run_by_run"])


class Asked(Exception):
    """Ray was asked for a task."""


class Task:
    def options(self, **options: Any) -> None:
        raise Asked(options)


def test_tasks_of_rewards_see_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """G40: Ray leaves all GPUs visible to a task that asks for none."""
    monkeypatch.setattr(ray, "remote", lambda function: Task())
    scorer = FunctionScorer.__new__(FunctionScorer)
    scorer.config = ScorerConfig(
        function="tests.recipes.rewards:plain", policy=ModelConfig(path="model")
    )
    with pytest.raises(Asked) as asked:
        scorer._run_in_tasks([{}])
    (options,) = asked.value.args
    assert options["runtime_env"]["env_vars"]["CUDA_VISIBLE_DEVICES"] == ""


def test_slurm_steps_get_the_cores_of_the_allocation(tmp_path: Path) -> None:
    """G36: the lines of the script that set srun's environment, run by bash."""
    lines = (TEMPLATES / "slurm.sbatch").read_text().splitlines()
    exports = [line for line in lines if line.startswith("export SRUN_")]
    first_step = next(number for number, line in enumerate(lines) if line.startswith("step="))
    assert all(lines.index(line) < first_step for line in exports)
    script = "\n".join([*exports, "printenv SRUN_CPUS_PER_TASK"])
    run = subprocess.run(
        ["bash", "-euc", script],
        env={"PATH": "/usr/bin:/bin", "SLURM_CPUS_PER_TASK": "7"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip() == "7", run.stderr


def test_images_and_pods_can_use_rdma() -> None:
    """G37: without the library, or the right to lock memory, NCCL talks TCP."""
    assert "libibverbs1" in (TEMPLATES / "cuda.Dockerfile").read_text()
    for spec in (rayjob()["spec"]["rayClusterSpec"], raycluster()["spec"]):
        (workers,) = spec["workerGroupSpecs"]
        (container,) = workers["template"]["spec"]["containers"]
        assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
