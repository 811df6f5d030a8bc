"""Engine `threed` on gloo processes against plain PyTorch in one process: losses, gradient
norms, outputs and weights after 3 steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from tests.engines.threed_cases import FAMILIES, PlainRun, load_plain, plain_run, save_tiny_model
from tests.engines.threed_workers import (
    OPTIMIZER,
    Case,
    Job,
    Result,
    batches,
    own_rows,
    run_worlds,
    vocabulary_table,
)
from tests.matrix import matrix
from tests.ranks import run_ranks
from workers.config import Precision
from workers.engines.base import Head, Outputs

FP32 = 1e-5
"""Relative and absolute, of everything: float32 rounding of other summation orders, through
three steps."""

LAYOUTS = [
    Case(),
    Case(p=2),
    Case(t=2),
    Case(d=2),
    Case(p=2, t=2),
    Case(p=2, model="llama-tied"),
    Case(p=2, d=2, virtual=2, model="llama-tied"),
    Case(p=2, d=2, order="tp cp pp dp", model="llama-tied"),
    Case(p=2, t=2, model="qwen2", num_rows=3),
    Case(p=2, d=2, num_rows=1, checkpointing=True, offload=True),
    Case(p=2, t=2, head=Head.value),
    Case(t=2, d=2, head=Head.score),
    Case(p=2, t=2, packing=False),
]
QUICK_FAMILIES = ("qwen3", "gemma3_text")
"""Families with layers that others lack: norms of queries and keys, sliding windows, norms
after sublayers."""
SLOW_FAMILIES = [family for family in FAMILIES if family not in ("llama", *QUICK_FAMILIES)]
CASES = [*LAYOUTS, *(Case(p=2, t=2, model=family, num_rows=4) for family in QUICK_FAMILIES)]
SLOW = [
    Case(p=2, d=2),
    Case(t=2, d=2),
    Case(p=4),
    Case(d=4),
    Case(p=2, t=2, virtual=2, order="pp dp cp tp"),
    Case(t=2, d=2, order="pp tp cp dp", checkpointing=True),
    *(Case(p=2, t=2, model=family, num_rows=4) for family in SLOW_FAMILIES),
]
BF16 = Case(p=2, t=2, precision=Precision.bf16, model="llama-tied")
RESUMED = [
    Case(p=2, t=2, virtual=2, model="llama-tied"),
    Case(d=4, model="llama-tied"),
    Case(t=2, d=2, model="llama-tied", order="tp cp pp dp"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, selected: Callable[[str], list[Any]]) -> Path:
    """Everything that needs several processes runs here, in one go; the tests look at what it
    left."""
    root = tmp_path_factory.mktemp("threed")
    for family in FAMILIES:
        # Gemma ties its embeddings by default; the checkpoints of the others come both ways.
        save_tiny_model(root / family, family, tied=family.startswith("gemma"))
    save_tiny_model(root / "llama-tied", "llama", tied=True)
    for head in (Head.value, Head.score):
        load_plain(root / "llama", head).save_pretrained(root / f"llama-{head.value}")
    vocabulary: list[Job] = [("vocabulary", Precision.fp32), ("vocabulary", Precision.bf16)]
    cases = [*selected("case"), BF16]
    worlds: list[tuple[int, list[Job]]] = [
        (size, [("train", case) for case in cases if case.world_size == size]) for size in (4, 2, 1)
    ]
    worlds[0][1].extend([("save_and_resume", RESUMED), *vocabulary])
    run_ranks(run_worlds, (root, worlds), 4)
    return root


@pytest.fixture(scope="module")
def plain(root: Path) -> Callable[[Case], PlainRun]:
    """The same training by plain PyTorch in this process."""
    runs: dict[tuple[str, Head, int], PlainRun] = {}

    def run(case: Case) -> PlainRun:
        key = (case.model, case.head, case.num_rows)
        if key not in runs:
            folder = root / (
                case.model if case.head is Head.lm else f"{case.model}-{case.head.value}"
            )
            runs[key] = plain_run(
                load_plain(folder, case.head), case.head, batches(case), OPTIMIZER
            )
        return runs[key]

    return run


@pytest.mark.parametrize("case", matrix(CASES, SLOW), ids=lambda case: case.name)
def test_equals_one_plain_process(
    root: Path, plain: Callable[[Case], PlainRun], case: Case
) -> None:
    expected = plain(case)
    results: list[Result] = [
        torch.load(root / case.name / f"result{rank}.pt", weights_only=False)
        for rank in range(case.world_size)
    ]
    assert all(result.metrics == results[0].metrics for result in results), (
        "metrics differ between ranks"
    )
    assert_close(
        [step["loss"] for step in results[0].metrics], expected.losses, rtol=FP32, atol=FP32
    )
    assert_close(
        [step["grad_norm"] for step in results[0].metrics],
        expected.grad_norms,
        rtol=FP32,
        atol=FP32,
    )
    weights = load_plain(root / case.name, case.head).state_dict()
    assert_close(
        {name: weights[name] for name in expected.parameters},
        expected.parameters,
        rtol=FP32,
        atol=FP32,
    )
    assert sum(result.outputs is not None for result in results) == case.t * case.d
    for result in results:
        if result.outputs is not None:
            assert_close(
                result.outputs, rows_of(expected.outputs, case, result.data), rtol=FP32, atol=FP32
            )


@pytest.mark.parametrize("case", matrix(CASES, SLOW), ids=lambda case: case.name)
def test_shard_map_covers_the_weights(root: Path, case: Case) -> None:
    shown: dict[str, Tensor] = {}
    for file in (root / case.name / "shards").glob("*.safetensors"):
        shown |= load_file(file)
    saved = load_file(root / case.name / "model.safetensors")
    assert shown.keys() == saved.keys()
    assert all(torch.equal(shown[name], saved[name]) for name in saved)


def test_bf16_keeps_float32_master_weights(root: Path, plain: Callable[[Case], PlainRun]) -> None:
    expected = plain(BF16)
    result: Result = torch.load(root / BF16.name / "result0.pt", weights_only=False)
    assert_close([step["loss"] for step in result.metrics], expected.losses, rtol=0.03, atol=0.03)
    assert_close(
        [step["grad_norm"] for step in result.metrics], expected.grad_norms, rtol=0.05, atol=0.05
    )
    weights = load_plain(root / BF16.name, Head.lm).state_dict()
    start = load_plain(root / BF16.model, Head.lm).state_dict()
    for name, value in expected.parameters.items():
        moved, wanted = weights[name] - start[name], value - start[name]
        # bfloat16 weights of size 1 have steps of 8e-3: none of these moves of up to 3e-3 would be
        # seen in them.
        agree = torch.nn.functional.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0)
        assert agree > 0.9, f"{name}: the float32 update differs in direction ({agree:.3f})"


@pytest.mark.parametrize(
    "place",
    [*map(str, range(len(RESUMED))), "fsdp"],
    ids=[*(case.name for case in RESUMED), "engine-fsdp"],
)
def test_checkpoint_resumes_on_any_layout(root: Path, place: str) -> None:
    weights, never = (
        load_file(root / folder / "model.safetensors")
        for folder in (f"resumed-{place}", "resumed-never")
    )
    metrics, metrics_never = (
        torch.load(root / folder / "metrics.pt") for folder in (f"resumed-{place}", "resumed-never")
    )
    if place == "0":
        assert metrics == metrics_never
        assert all(torch.equal(weights[name], never[name]) for name in never)
    else:
        assert_close(metrics, metrics_never, rtol=FP32, atol=FP32)
        assert_close(weights, never, rtol=FP32, atol=FP32)


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_vocabulary_parallel_log_probs(root: Path, precision: Precision) -> None:
    logits, targets = vocabulary_table()
    whole = logits.to(
        torch.float32 if precision is Precision.fp32 else torch.bfloat16
    ).requires_grad_()
    table = torch.log_softmax(whole.float() / 0.7, -1)
    log_probs = table.gather(-1, targets[:, None]).squeeze(-1)
    entropy = -(table.exp() * table).sum(-1)
    (log_probs.sin().sum() + entropy.square().sum()).backward()
    parts = [torch.load(root / f"vocabulary-{precision.value}-{rank}.pt") for rank in range(4)]
    for part in parts:
        assert_close(part[0], log_probs.detach(), rtol=1e-5, atol=1e-5)
        assert_close(part[1], entropy.detach(), rtol=1e-5, atol=1e-5)
    tolerance = 5e-5 if precision is Precision.fp32 else 1e-2
    assert whole.grad is not None
    assert_close(
        torch.cat([part[2] for part in parts], -1), whole.grad, rtol=tolerance, atol=tolerance
    )


def rows_of(outputs: Outputs, case: Case, data: int) -> dict[str, Tensor]:
    """What a data rank should have seen of the outputs of the whole first batch."""
    batch = batches(case)[0]
    named = {"log_probs": outputs.log_probs, "entropy": outputs.entropy, "values": outputs.values}
    per_token = {name: value for name, value in named.items() if value is not None}
    per_row = {} if outputs.scores is None else {"scores": outputs.scores}
    own = own_rows(case, batch.with_columns(per_token=per_token, per_row=per_row), data)
    return {
        **{name: own.per_token[name] for name in per_token},
        **{name: own.per_row[name] for name in per_row},
    }
