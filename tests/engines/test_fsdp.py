"""Engine `fsdp` on 1, 2 and 4 gloo processes against plain PyTorch in one process: outputs,
losses, gradient norms, weights, resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.engines.fsdp_workers import OPTIMIZER, Case, Result, batches, data_rows, run_worlds
from tests.engines.threed_cases import PlainRun, load_plain, plain_run, save_tiny_model
from tests.matrix import matrix
from tests.ranks import run_ranks
from workers.config import Precision
from workers.engines import ENGINES, engine_class
from workers.engines.base import Head, Outputs
from workers.engines.model.loading import _initialize_score
from workers.engines.model.scored import score_head
from workers.sequences import ragged_positions

FP32 = 1e-5
"""Of a loss, a gradient norm (relative), and of a weight after three steps of learning rate
1e-3, rounding through AdamW's division."""
BF16 = Precision.bf16
CASES = [
    Case(),
    Case(micro_batch_tokens=1, checkpointing=True),
    Case(model="gemma3_text"),
    Case(model="mistral"),
    Case(model="gemma2", packing=False),
    Case(model="llama", head=Head.value, offload=True),
    Case(model="llama", head=Head.score),
    Case(precision=BF16),
    Case(world_size=2),
    Case(world_size=2, zero3=True, checkpointing=True, offload=True),
    Case(world_size=2, tp=2, model="llama"),
    Case(world_size=2, head=Head.value),
    Case(world_size=2, num_rows=1),
    Case(world_size=2, num_rows=9, micro_batch_tokens=20, layered=True),
    Case(world_size=2, precision=BF16, zero3=True),
    Case(world_size=2, tp=2, head=Head.score, packing=False),
    Case(world_size=4, tp=2),
    Case(world_size=4, tp=2, precision=BF16, layered=True),
    Case(world_size=4, tp=2, zero3=True, head=Head.value, order=("tp", "pp", "cp", "dp")),
]
SLOW = [
    Case(micro_batch_tokens=10_000),
    Case(model="gemma2", precision=BF16, checkpointing=True),
    Case(model="mistral", precision=BF16),
    Case(packing=False, precision=BF16),
    Case(world_size=2, precision=BF16),
    Case(world_size=2, zero3=True, packing=False),
    Case(world_size=4, zero3=True),
    Case(world_size=4, model="gemma3_text"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, selected: Callable[[str], list[Any]]) -> Path:
    """Folder with the models and everything that the processes wrote."""
    root = tmp_path_factory.mktemp("fsdp")
    save_tiny_model(root / "qwen2", "qwen2", layers=2, tied=True)
    save_tiny_model(root / "llama", "llama", layers=2)
    save_tiny_model(root / "mistral", "mistral", layers=2)
    save_tiny_model(root / "gemma2", "gemma2", layers=2, tied=True)
    save_tiny_model(root / "gemma3_text", "gemma3_text", layers=2, tied=True)
    shutil.copytree(root / "llama", root / "broken")
    weights = load_file(root / "llama" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, root / "broken" / "model.safetensors", metadata={"format": "pt"})
    run_ranks(run_worlds, (root, selected("case")), 4)
    return root


def results(root: Path, case: Case) -> list[Result]:
    return [
        torch.load(root / f"{case.name}.{rank}.pt", weights_only=False)
        for rank in range(case.world_size)
    ]


def plain(root: Path, case: Case) -> PlainRun:
    model = load_plain(root / case.model, case.head)
    if case.head is not Head.lm:
        _initialize_score(score_head(model), 0)
    return plain_run(model, case.head, batches(case), OPTIMIZER)


@pytest.mark.parametrize("case", matrix(CASES, SLOW), ids=lambda case: case.name)
def test_equals_plain_pytorch(root: Path, case: Case) -> None:
    """Outputs before training; loss, gradient norm and weights of three steps; and every rank
    reports the same numbers."""
    found, expected = results(root, case), plain(root, case)
    loose = case.precision is BF16
    tolerance = {"rtol": 0.02, "atol": 0.03} if loose else {"rtol": FP32, "atol": FP32}
    for result in found:
        assert result.metrics == found[0].metrics
        for name, value in columns(result.outputs).items():
            whole = columns(expected.outputs)[name]
            assert_close(
                value,
                whole[places(case, result.data, name)],
                rtol=0.0,
                atol=0.05 if loose else 3e-6,
            )
    assert_close(
        torch.tensor([step["loss"] for step in found[0].metrics]),
        torch.tensor(expected.losses),
        **tolerance,
    )
    assert_close(
        torch.tensor([step["grad_norm"] for step in found[0].metrics]),
        torch.tensor(expected.grad_norms),
        **tolerance,
    )
    assert [step["learning_rate"] for step in found[0].metrics] == [OPTIMIZER.learning_rate] * 3
    for name, value in expected.parameters.items():
        # Three steps of AdamW move a weight by 3e-3 at most, whatever the gradient.
        assert_close(
            found[0].whole[name],
            value,
            rtol=0.0,
            atol=6e-3 if loose else FP32,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("case", matrix(CASES, SLOW), ids=lambda case: case.name)
def test_shards_cover_every_parameter_once_per_replica(root: Path, case: Case) -> None:
    """Boxes and memory of all ranks, pasted together, are the parameters; data ranks hold
    disjoint boxes."""
    found = results(root, case)
    for index, (name, whole) in enumerate(found[0].whole.items()):
        pasted, counts = torch.zeros_like(whole), torch.zeros(whole.shape, dtype=torch.int64)
        for result in found:
            shard_name, shape, shards = result.shards[index]
            assert (shard_name, shape) == (name, tuple(whole.shape))
            for box, tensor in shards:
                inside = tuple(
                    slice(start, start + size)
                    for start, size in zip(box.start, box.shape, strict=True)
                )
                pasted[inside] = tensor
                counts[inside] += 1
        assert torch.equal(pasted, whole)
        assert counts.unique().tolist() in ([1], [case.tp])


@pytest.mark.parametrize(
    "case",
    matrix([case for case in CASES if case.head is not Head.score], SLOW),
    ids=lambda case: case.name,
)
def test_transformers_loads_what_was_saved(root: Path, case: Case) -> None:
    auto = AutoModelForCausalLM if case.head is Head.lm else AutoModelForSequenceClassification
    model, info = auto.from_pretrained(
        root / f"{case.name}.hf", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    weights = dict(model.named_parameters())
    whole = results(root, case)[0].whole
    assert weights.keys() == whole.keys()
    assert all(torch.equal(weights[name], value) for name, value in whole.items())
    config = json.loads((root / f"{case.name}.hf" / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__] and config["dtype"] == "float32"


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_is_loaded_on_another_layout(root: Path, world_size: int) -> None:
    """Saved by two data ranks; loaded by one, and by two tensor ranks. (The same layout, bit
    for bit: in the processes.)"""
    metrics, weights = torch.load(root / f"resumed.{world_size}.pt", weights_only=False)
    expected = plain(root, Case())
    assert metrics["loss"] == pytest.approx(expected.losses[2], rel=FP32)
    assert metrics["grad_norm"] == pytest.approx(expected.grad_norms[2], rel=FP32)
    for name, value in expected.parameters.items():
        assert_close(weights[name], value, rtol=0.0, atol=FP32)
    assert all(path.suffix == ".safetensors" for path in (root / "checkpoint").iterdir())


def test_an_unknown_engine_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=f"known: {', '.join(ENGINES)}"):
        engine_class("megatron")


def columns(outputs: Outputs) -> dict[str, Tensor]:
    named = {
        "log_probs": outputs.log_probs,
        "entropy": outputs.entropy,
        "values": outputs.values,
        "scores": outputs.scores,
    }
    return {name: value for name, value in named.items() if value is not None}


def places(case: Case, data: int, name: str) -> Tensor:
    """Where a data rank's outputs are among those of the whole batch."""
    rows = data_rows(case.num_rows, case.world_size // case.tp, data)
    return rows if name == "scores" else ragged_positions(batches(case)[0].scored_lengths, rows)
