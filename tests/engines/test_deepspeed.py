"""Engine `deepspeed` on one and two gloo processes against plain PyTorch in one process, and
its checkpoints on other ranks and engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import LlamaConfig

from hybridflow.resharding.analytic import ParameterRule, zero3
from hybridflow.resharding.shard_map import ParameterSpec
from tests.engines.deepspeed_workers import Case, Result, batches, named, own_rows, run
from tests.engines.threed_cases import PlainRun, load_plain, plain_run, save_tiny_model
from tests.engines.threed_workers import OPTIMIZER
from tests.matrix import matrix
from tests.ranks import run_ranks
from workers.config import Precision, TrainConfig
from workers.engines.base import Head
from workers.engines.deepspeed.engine import DeepspeedEngine
from workers.engines.model.loading import _initialize_score
from workers.engines.model.scored import score_head

FP32 = 1e-5
"""Relative and absolute, of everything: float32 rounding of other summation orders, through
three steps."""
BF16 = Precision.bf16
CASES = [
    Case(stage=1),
    Case(stage=2, model="qwen2"),
    Case(stage=3, model="qwen2", offload=True),
    Case(stage=3, head=Head.value, checkpointing=True),
    Case(stage=2, head=Head.score, checkpointing=True, offload=True),
    Case(stage=3, precision=BF16, offload=True),
    Case(stage=1, world_size=1, head=Head.value),
    Case(stage=3, world_size=1, packing=False),
]
SLOW = [
    Case(stage=1, precision=BF16, offload=True),
    Case(stage=2, precision=BF16),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, selected: Callable[[str], list[Any]]) -> Path:
    """Everything that needs several processes runs here, in one go; the tests look at what it
    left."""
    root = tmp_path_factory.mktemp("deepspeed")
    save_tiny_model(root / "qwen2", "qwen2", layers=2, tied=True)
    save_tiny_model(root / "llama", "llama", layers=2)
    for head in (Head.value, Head.score):
        model = load_plain(root / "llama", head)
        _initialize_score(score_head(model), 0)
        model.save_pretrained(root / f"llama-{head.value}")
    run_ranks(run, (root, selected("case")), 2)
    return root


@pytest.fixture(scope="module")
def plain(root: Path) -> dict[tuple[str, Head], PlainRun]:
    """The same training by plain PyTorch in this process."""
    runs = {}
    for case in [*CASES, *SLOW]:
        key = (case.model, case.head)
        if key not in runs:
            folder = root / (
                case.model if case.head is Head.lm else f"{case.model}-{case.head.value}"
            )
            runs[key] = plain_run(
                load_plain(folder, case.head), case.head, batches(case), OPTIMIZER
            )
    return runs


@pytest.mark.parametrize("case", matrix(CASES, SLOW), ids=lambda case: case.name)
def test_equals_one_plain_process(
    root: Path, plain: dict[tuple[str, Head], PlainRun], case: Case
) -> None:
    """Outputs before training; losses, gradient norms and weights of three steps, with steps in
    between that failed."""
    expected = plain[case.model, case.head]
    loose = case.precision is BF16
    results: list[Result] = [
        torch.load(root / case.name / f"result{rank}.pt", weights_only=False)
        for rank in range(case.world_size)
    ]
    assert all(result.metrics == results[0].metrics for result in results), (
        "metrics differ between ranks"
    )
    tolerance = {"rtol": 0.05, "atol": 0.03} if loose else {"rtol": FP32, "atol": FP32}
    assert_close([step["loss"] for step in results[0].metrics], expected.losses, **tolerance)
    assert_close(
        [step["grad_norm"] for step in results[0].metrics], expected.grad_norms, **tolerance
    )
    batch = batches(case)[0].with_columns(
        per_token={
            name: value for name, value in named(expected.outputs).items() if name != "scores"
        },
        per_row={
            name: value for name, value in named(expected.outputs).items() if name == "scores"
        },
    )
    for rank, result in enumerate(results):
        own = own_rows(case, batch, rank)
        for name, value in result.outputs.items():
            wanted = own.per_row[name] if name == "scores" else own.per_token[name]
            assert_close(value, wanted, rtol=0.0, atol=0.05 if loose else FP32)
    weights = load_plain(root / case.name, case.head).state_dict()
    if not loose:
        assert_close(
            {name: weights[name] for name in expected.parameters},
            expected.parameters,
            rtol=FP32,
            atol=FP32,
        )
        return
    start = load_plain(root / case.model, case.head).state_dict()
    for name, value in expected.parameters.items():
        # Bfloat16 has steps of 8e-3 at 1: moves of 3e-3 are only seen in float32 master weights
        # that started from the checkpoint.
        moved, wanted = (weights[name] - start[name]).flatten(), (value - start[name]).flatten()
        assert torch.nn.functional.cosine_similarity(moved, wanted, dim=0) > 0.9, name
        assert float((moved - wanted).abs().max()) < 4e-3, name


@pytest.mark.parametrize("case", matrix(CASES, SLOW), ids=lambda case: case.name)
def test_shard_map_covers_the_weights(root: Path, case: Case) -> None:
    shown = load_file(root / case.name / "shards" / "model.safetensors")
    saved = load_file(root / case.name / "model.safetensors")
    assert shown.keys() == saved.keys()
    assert all(torch.equal(shown[name], saved[name].to(shown[name].dtype)) for name in saved)


def test_stage_3_lies_where_plans_expect_it(root: Path) -> None:
    """recipes.reshard_plan source=zero3-2 computes its shard map without running anything."""
    case = next(case for case in CASES if case.stage == 3 and case.world_size == 2)
    results: list[Result] = [
        torch.load(root / case.name / f"result{rank}.pt", weights_only=False) for rank in range(2)
    ]
    rules = [
        ParameterRule(ParameterSpec(name, shape, "float32"), layer=0)
        for name, shape, _ in results[0].shards
    ]
    planned = zero3(rules, 2)
    for rank, result in enumerate(results):
        assert {name: boxes for name, _, boxes in result.shards} == {
            rule.spec.name: planned.boxes(rule.spec.name, rank) for rule in rules
        }


@pytest.mark.parametrize("stage", [2, 3])
def test_forward_without_an_optimizer(
    root: Path, plain: dict[tuple[str, Head], PlainRun], stage: int
) -> None:
    case = Case(stage=stage)
    batch = batches(case)[0].with_columns(per_token=named(plain["llama", Head.lm].outputs))
    for rank in range(case.world_size):
        found = torch.load(root / f"forward-{stage}-{rank}.pt")
        own = own_rows(case, batch, rank)
        assert_close(found, {name: own.per_token[name] for name in found}, rtol=0.0, atol=FP32)


@pytest.mark.parametrize("place", ["2-2", "3-2", "bf16", "2-1", "3-1", "fsdp"])
def test_checkpoint_resumes_on_other_ranks_stages_and_engines(root: Path, place: str) -> None:
    """Saved by two ranks under stage 2. On the same ranks bit for bit."""
    weights, never = (
        load_file(root / f"resumed-{name}" / "model.safetensors") for name in (place, "never")
    )
    metrics, metrics_never = (
        torch.load(root / f"resumed-{name}" / "metrics.pt") for name in (place, "never")
    )
    if place == "2-2":
        assert metrics == metrics_never
        assert all(torch.equal(weights[name], never[name]) for name in never)
    elif place == "bf16":
        assert_close(metrics["loss"], metrics_never["loss"], rtol=0.05, atol=0.03)
        # One step of 1e-3 in bfloat16, from float32 master weights that no rounding has moved.
        assert all(float((weights[name] - never[name]).abs().max()) < 2e-3 for name in never)
    else:
        assert_close(metrics, metrics_never, rtol=FP32, atol=FP32)
        assert_close(weights, never, rtol=FP32, atol=FP32)
    assert all(path.suffix == ".safetensors" for path in (root / "checkpoint").iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tp": 2}, "train.tp is 2, but engine deepspeed is data parallel only"),
        ({"pp": 2}, "train.pp is 2, but engine deepspeed is data parallel only"),
        ({"zero_stage": 0}, "train.zero_stage is 0; use 1"),
    ],
)
def test_layouts_that_do_not_exist(settings: dict[str, int], message: str) -> None:
    config = TrainConfig(engine="deepspeed", **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        DeepspeedEngine.check(LlamaConfig(), config, Head.lm, 4)
