"""Adapters in training: 1, 2 and 4 gloo processes against LoRA in plain PyTorch in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from hybridflow.local_pool import LocalPool
from recipes.merge import merge_into
from tests.engines.threed_cases import PlainRun, load_plain, save_tiny_model
from tests.experts.plain import save_tiny_mixture
from tests.lora.plain import adapt, matrices_of, plain_lora_run
from tests.lora.workers import (
    ALPHA,
    NUM_STEPS,
    OPTIMIZER,
    RANK,
    Case,
    Result,
    batches,
    refuses_another_base,
    resumed_elsewhere,
    run_worlds,
)
from tests.matrix import matrix
from tests.ranks import run_ranks
from workers.config import ContextExchange, ModelConfig, Precision
from workers.engines.base import Head
from workers.engines.model.loading import _initialize_score, load_pretrained
from workers.engines.model.peft_files import PeftFiles
from workers.engines.model.scored import score_head

EXACT = 1e-6
"""Of a loss, a gradient norm, and an element of A and B after three steps."""
CLOSE = 0.02
"""The same where the base computes in bfloat16."""
SCALE = ALPHA / RANK
REGEX = r".*layers\.0\..*(q|down)_proj"
FIRST_LAYER = r".*layers\.0\..*_proj"
LAST_LAYER = r".*layers\.1\..*_proj"
FOUR = Case(engine="threed", world_size=4, tp=2, family="qwen3")
CASES = [
    Case(),
    Case(family="qwen3"),
    Case(family="gemma3_text", targets=REGEX),
    Case(world_size=2),
    Case(world_size=2, head=Head.value, layered=True),
    Case(world_size=4, family="qwen3", layered=True, targets=("q_proj", "v_proj")),
    Case(engine="deepspeed", world_size=2, zero=2),
    Case(engine="deepspeed", world_size=2, zero=3, family="qwen3"),
    Case(world_size=2, tp=2, head=Head.value),
    Case(world_size=4, tp=2, family="phi3"),
    Case(engine="threed", world_size=2, pp=2, family="gemma3_text", targets=FIRST_LAYER),
    Case(world_size=2, cp=2),
    Case(world_size=4, cp=2, family="gemma3_text", exchange=ContextExchange.ring, layered=True),
    Case(engine="threed", world_size=4, cp=2, pp=2, head=Head.value),
    Case(family="qwen3_moe", world_size=2, cp=2, targets=("q_proj", "o_proj")),
    Case(world_size=2, layered=True, precision=Precision.bf16),
    FOUR,
]
SLOW = [
    Case(head=Head.score),
    Case(engine="deepspeed", world_size=2, zero=1, head=Head.value),
    Case(world_size=2, family="gemma3_text"),
    Case(world_size=4),
    Case(world_size=2, layered=True, targets=FIRST_LAYER),
    Case(world_size=4, tp=4),
    Case(world_size=4, tp=2, family="gemma3_text", layered=True),
    Case(engine="threed", world_size=2, tp=2, family="phi3"),
    Case(engine="threed", world_size=2, pp=2, head=Head.score),
    Case(engine="threed", world_size=2, pp=2, family="qwen3", targets=LAST_LAYER),
    Case(engine="threed", world_size=4, pp=2, tp=2, family="gemma3_text"),
    Case(engine="threed", world_size=2, pp=2, family="deep", stages=2),
    Case(engine="threed", world_size=2, cp=2, exchange=ContextExchange.ring),
    Case(world_size=4, cp=4, family="qwen3"),
    Case(world_size=4, cp=2, tp=2, exchange=ContextExchange.allgather, head=Head.score),
    Case(engine="threed", world_size=4, cp=2, tp=2, family="phi3"),
    Case(engine="threed", world_size=4, cp=4, exchange=ContextExchange.allgather),
    Case(engine="deepspeed", world_size=2, cp=2, zero=3),
    Case(world_size=2, family="gpt_oss", targets=("q_proj", "o_proj")),
    Case(world_size=4, ep=2, family="qwen3_moe", targets=("q_proj", "o_proj"), layered=True),
    Case(world_size=4, ep=4, tp=2, family="qwen3_moe", targets=("v_proj", "o_proj")),
    Case(engine="threed", world_size=4, ep=2, pp=2, family="qwen3_moe", targets=("q_proj",)),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, selected: Callable[[str], list[Any]]) -> Path:
    """Folder with the models and everything that the processes wrote."""
    root = tmp_path_factory.mktemp("lora")
    for family in ("llama", "qwen3", "gemma3_text", "phi3", "gpt_oss"):
        save_tiny_model(root / family, family, layers=2, tied=family == "gemma3_text")
    save_tiny_model(root / "deep", "llama", layers=4)
    save_tiny_mixture(root / "qwen3_moe", "qwen3_moe")
    run_ranks(run_worlds, (root, selected("case")), 4)
    return root


def results(root: Path, case: Case) -> list[Result]:
    return [
        torch.load(root / f"{case.name}.{rank}.pt", weights_only=False)
        for rank in range(case.world_size)
    ]


def plain(root: Path, case: Case) -> PlainRun:
    """From the same matrices A, which the engine drew."""
    model = load_plain(root / case.family, case.head)
    if case.head is not Head.lm:
        _initialize_score(score_head(model), 0)
    matrices = matrices_of(root / f"{case.name}.first")
    assert all(not b.any() for _, b in matrices.values()), "B begins at zero"
    adapt(model, matrices, SCALE)
    return plain_lora_run(model, case.head, batches(), OPTIMIZER)


@pytest.mark.parametrize("case", matrix(CASES, SLOW), ids=lambda case: case.name)
def test_equals_plain_lora(root: Path, case: Case) -> None:
    """Loss, gradient norm, A and B of three steps, on every layout (SCALE.md 5.1). A float32 adapter
    on a bfloat16 base trains over ranks too (finding T12)."""
    expected = plain(root, case)
    tolerance = EXACT if case.precision is Precision.fp32 else CLOSE
    for result in results(root, case):
        for name in ("loss", "grad_norm"):
            wanted = expected.losses if name == "loss" else expected.grad_norms
            reported = [step[name] for step in result.metrics]
            assert_close(
                torch.tensor(reported), torch.tensor(wanted), rtol=tolerance, atol=tolerance
            )
        assert result.trained.keys() == expected.parameters.keys()
        moved = 0.0
        for name, value in expected.parameters.items():
            assert_close(result.trained[name], value, rtol=0.0, atol=tolerance)
            if name.endswith("lora_B"):
                moved = max(moved, float(value.abs().max()))
        assert moved > 1e-4, "B has moved far beyond the tolerance"


@pytest.mark.parametrize("case", matrix(CASES, SLOW), ids=lambda case: case.name)
def test_the_base_keeps_its_bits(root: Path, case: Case) -> None:
    """After three steps every weight of the base has the bits of the file (finding T2), and the
    first outputs are those of the base bit for bit, because B begins at zero."""
    stored = load_file(root / case.family / "model.safetensors")
    for result in results(root, case):
        trained = result.trained.keys()
        for name, value in result.base_before.items():
            if name in trained:
                continue
            assert torch.equal(result.base_after[name], value), name
            if case.family != "qwen3_moe":  # whose file names the matrices of each expert
                expected = stored[name]
                if case.precision is Precision.bf16:  # which the base is rounded to, once
                    expected = expected.bfloat16().float()
                assert torch.equal(expected, value), name
        if case.head is Head.lm and result.outputs is not None:
            for name in ("log_probs", "entropy"):
                before = {"log_probs": result.outputs.log_probs, "entropy": result.outputs.entropy}
                after = result.base_outputs
                again = {"log_probs": after.log_probs, "entropy": after.entropy}
                assert torch.equal(before[name], again[name]), name


@pytest.mark.parametrize("case", matrix(CASES, SLOW), ids=lambda case: case.name)
def test_a_sync_takes_merged_weights(root: Path, case: Case) -> None:
    """W + s B A from the base, of adapted layers alone (finding T2)."""
    matrices = matrices_of(root / f"{case.name}.last")
    for result in results(root, case):
        assert {f"{name}.weight" for name in matrices} <= result.merged.keys()
        assert not any("lora_" in name for name in result.merged)
        for name, value in result.merged.items():
            layer = name.removesuffix(".weight")
            if layer in matrices:
                a, b = matrices[layer]
                expected = result.base_before[name].double() + SCALE * b.double() @ a.double()
                rounding = 0.0 if case.precision is Precision.fp32 else 2**-8
                assert_close(value.double(), expected, rtol=rounding, atol=3e-7)
            elif name not in result.trained:
                assert torch.equal(value, result.base_before[name])


def test_files_of_ranks_merge_into_what_the_ranks_send(root: Path) -> None:
    """Finding T10: the adapter that the ranks of a divided base saved, merged in one process by
    recipes.merge's function, gives the weights that a sync computed on their shards."""
    for case in (CASES[4], CASES[7], CASES[9], CASES[10]):
        config = ModelConfig(path=str(root / case.family), new_head=True)
        model = load_pretrained(config, case.head)
        merge_into(model, PeftFiles.read(str(root / f"{case.name}.last")))
        sent = results(root, case)[0].merged
        weights = dict(model.named_parameters())
        assert sent.keys() == weights.keys()
        for name, value in sent.items():
            assert_close(value, weights[name].detach(), rtol=0.0, atol=3e-7)


def test_resumes_on_another_layout(root: Path, tmp_path: Path) -> None:
    """A checkpoint of two or four processes goes on in one, whatever its engine and layout; one of
    another base is refused."""
    with LocalPool():
        for case in (CASES[3], CASES[5], FOUR):
            checkpoint = root / f"{case.name}.checkpoint"
            alone = Case(family=case.family, targets=case.targets)
            norm, trained = resumed_elsewhere(root, checkpoint, alone)
            expected = results(root, case)[0]
            assert norm == pytest.approx(expected.metrics[2]["grad_norm"], rel=EXACT)
            for name, value in trained.items():
                assert_close(value, expected.trained[name], rtol=0.0, atol=EXACT)
        save_tiny_model(root / "other" / "llama", "llama", layers=2, tied=True)
        refuses_another_base(root / "other", root / f"{CASES[3].name}.checkpoint", Case())
    assert NUM_STEPS == 3
