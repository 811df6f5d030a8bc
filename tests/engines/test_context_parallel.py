"""Context parallelism on 2, 3 and 4 gloo processes against plain PyTorch in one process: outputs,
losses, gradient norms, weights."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig

from tests.engines.context_losses import LOSSES, loss_of
from tests.engines.context_workers import (
    NUM_STEPS,
    OPTIMIZER,
    Case,
    Result,
    batches,
    resume_elsewhere,
    run_worlds,
)
from tests.engines.fsdp_workers import data_rows
from tests.engines.test_fsdp import columns
from tests.engines.threed_cases import load_plain, plain_run, save_tiny_model
from tests.matrix import matrix
from tests.ranks import run_ranks
from workers.config import ContextExchange, ModelConfig, TrainConfig
from workers.engines.base import Head
from workers.engines.fsdp.engine import FsdpEngine
from workers.engines.model.loading import _initialize_score, check_packing
from workers.engines.model.scored import score_head
from workers.engines.shared.group_sizes import assign_groups, imbalance, nested_sizes
from workers.engines.shared.rows_together import pack
from workers.sequences import ragged_positions

FP32 = 1e-6
"""Of a loss (whose terms cancel), a gradient norm (relative), and of a weight after three steps of
learning rate 1e-3."""
ALLGATHER, RING = ContextExchange.allgather, ContextExchange.ring


def _loss(name: str, **options: Any) -> Case:
    return Case(loss=name, head=LOSSES[name].head, **options)


CASES = [
    Case(),
    Case(model="qwen3", head=Head.value, micro_batch_tokens=30),
    Case(model="gemma2", checkpointing=True),
    Case(model="gemma3_text", exchange=ALLGATHER, micro_batch_tokens=30, zero3=True),
    Case(world_size=4, cp=4, model="qwen3"),
    Case(world_size=4, tp=2, layered=True, micro_batch_tokens=30),
    Case(world_size=4, pp=2, engine="threed", micro_batch_tokens=30),
    Case(world_size=4, cp=4, by_length=True, layered=True, micro_batch_tokens=16),
    Case(world_size=4, cp=4, num_rows=1),
    Case(model="gemma2", exchange=RING, checkpointing=True),
    Case(world_size=4, cp=4, model="qwen3", exchange=RING, micro_batch_tokens=9),
    Case(world_size=4, tp=2, model="gemma3_text", exchange=RING, micro_batch_tokens=30),
    Case(model="gpt_oss", exchange=RING, micro_batch_tokens=30),
    Case(world_size=3, cp=3, micro_batch_tokens=9),
    Case(world_size=4, cp=4, model="mistral", exchange=RING, micro_batch_tokens=1),
    _loss("gspo", world_size=4, cp=4),
    _loss("dpo", world_size=4, tp=2, exchange=RING),
    _loss("reward_model", exchange=RING),
    _loss("distillation", world_size=4, pp=2, engine="threed", micro_batch_tokens=30),
]
SLOW = [
    Case(num_rows=1, head=Head.score),
    Case(world_size=4, model="mistral", micro_batch_tokens=40),
    Case(world_size=4, by_length=True, micro_batch_tokens=16),
    Case(exchange=RING),
    _loss("critic", exchange=ALLGATHER, micro_batch_tokens=30),
    _loss("sft", world_size=4, micro_batch_tokens=30),
    Case(exchange=ALLGATHER),
    Case(model="mistral", exchange=ALLGATHER),
    Case(model="gemma2", exchange=ALLGATHER, checkpointing=True),
    Case(model="gemma3_text"),
    Case(model="qwen3", num_rows=3, layered=True),
    Case(world_size=4, cp=4, checkpointing=True),
    Case(world_size=4, cp=4, exchange=ALLGATHER, micro_batch_tokens=9),
    Case(world_size=4, tp=2, exchange=ALLGATHER, head=Head.value),
    Case(world_size=4, pp=2, engine="threed", exchange=ALLGATHER, model="gemma3_text"),
    Case(world_size=4, tp=2, engine="threed", head=Head.value),
    Case(world_size=4, engine="threed", micro_batch_tokens=30),
    Case(engine="deepspeed", micro_batch_tokens=30),
    Case(world_size=4, zero3=True, engine="deepspeed", exchange=ALLGATHER),
    Case(world_size=4, cp=4, by_length=True, model="qwen3", head=Head.value, micro_batch_tokens=16),
    Case(world_size=4, by_length=True, zero3=True, checkpointing=True, micro_batch_tokens=16),
    Case(world_size=4, zero3=True, checkpointing=True, micro_batch_tokens=20),
    Case(model="gpt_oss", checkpointing=True),
    Case(world_size=4, cp=4, model="gpt_oss", exchange=ALLGATHER),
    Case(model="mistral", exchange=RING),
    Case(model="gemma3_text", exchange=RING, zero3=True, checkpointing=True),
    Case(world_size=4, cp=4, exchange=RING, layered=True),
    Case(world_size=4, pp=2, engine="threed", model="gemma2", exchange=RING),
    Case(world_size=4, tp=2, engine="threed", exchange=RING, checkpointing=True),
    Case(engine="deepspeed", exchange=RING, micro_batch_tokens=30),
    Case(world_size=4, cp=4, by_length=True, exchange=RING, micro_batch_tokens=16),
    Case(world_size=3, cp=3, model="qwen3", micro_batch_tokens=9),
    Case(world_size=3, cp=3, model="gemma2", exchange=RING),
    Case(world_size=3, cp=3, by_length=True, micro_batch_tokens=16),
    Case(world_size=3, cp=3, engine="threed", micro_batch_tokens=9),
    Case(world_size=3, cp=3, model="gpt_oss", micro_batch_tokens=9),
    Case(world_size=3, cp=3, num_rows=1, head=Head.value),
    Case(world_size=4, cp=4, model="gemma2", exchange=ALLGATHER, micro_batch_tokens=1),
    Case(world_size=4, cp=4, engine="threed", model="gemma2", micro_batch_tokens=1),
    Case(world_size=4, pp=2, engine="threed", num_rows=1, model="gpt_oss"),
    Case(world_size=4, tp=2, num_rows=1, model="gemma2", exchange=RING),
    Case(world_size=4, num_rows=1, model="gemma2"),
    Case(world_size=4, cp=4, by_length=True, num_rows=1, micro_batch_tokens=1),
    Case(world_size=4, cp=4, by_length=True, model="gpt_oss", micro_batch_tokens=16),
    *(_loss(name) for name in LOSSES),
    *(_loss(name, exchange=RING, micro_batch_tokens=30) for name in LOSSES),
    *(_loss(name, world_size=4, cp=4, exchange=ALLGATHER) for name in LOSSES),
    *(_loss(name, engine="threed", world_size=4, pp=2) for name in LOSSES),
    *(_loss(name, world_size=4, tp=2, checkpointing=True) for name in LOSSES),
]
SLOW = [case for case in dict.fromkeys(SLOW) if case not in CASES]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, selected: Callable[[str], list[Any]]) -> Path:
    """Folder with the models and everything that the processes wrote."""
    root = tmp_path_factory.mktemp("context")
    save_tiny_model(root / "llama", "llama", layers=2)
    save_tiny_model(root / "qwen3", "qwen3", heads=6, layers=2)
    save_tiny_model(root / "mistral", "mistral", layers=2)
    save_tiny_model(root / "gemma2", "gemma2", layers=2, tied=True)
    save_tiny_model(root / "gemma3_text", "gemma3_text", layers=2, tied=True)
    save_tiny_model(root / "gpt_oss", "gpt_oss", layers=2)
    run_ranks(run_worlds, (root, selected("case")), 4)
    return root


@pytest.mark.parametrize("case", matrix(CASES, SLOW), ids=lambda case: case.name)
def test_equals_one_process(root: Path, case: Case) -> None:
    """Rows of 1 to 97 tokens, some with one prompt, one without a response: outputs before
    training; loss, gradient norm and weights of three steps; every rank reports the same numbers.
    Parts of uneven sizes (finding T24), several micro-batches (T20), a temperature (T21), a single
    row of which some ranks have nothing but prompt (T22), GSPO and DPO, which need whole rows
    (T23), rows of fewer tokens than ranks, data ranks without a row."""
    if case.engine == "deepspeed":
        pytest.importorskip("deepspeed")
    results: list[Result] = []
    for rank in range(case.world_size):
        results.append(torch.load(root / f"{case.name}.{rank}.pt", weights_only=False))
    model = load_plain(root / case.model, case.head)
    if case.head is not Head.lm:
        _initialize_score(score_head(model), 0)
    expected = plain_run(model, case.head, batches(case), OPTIMIZER, loss_of(case.loss))
    for result in results:
        assert result.metrics == results[0].metrics
        if result.outputs is None:
            continue
        rows = data_rows(
            case.num_rows, case.world_size // (case.cp * case.tp * case.pp), result.data
        )
        scored = ragged_positions(batches(case)[0].scored_lengths, rows)
        for name, value in columns(result.outputs).items():
            whole = columns(expected.outputs)[name]
            places = rows if name == "scores" else scored
            assert_close(value, whole[places], rtol=0.0, atol=3e-6)
    for step in range(NUM_STEPS):
        metrics = results[0].metrics[step]
        assert metrics["loss"] == pytest.approx(expected.losses[step], rel=FP32, abs=FP32)
        assert metrics["grad_norm"] == pytest.approx(expected.grad_norms[step], rel=FP32)
    for name, value in expected.parameters.items():
        assert_close(
            results[0].whole[name],
            value,
            rtol=0.0,
            atol=FP32,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_a_run_goes_on_with_another_size(tmp_path: Path) -> None:
    """From cp 2 to dp 2 and back, with all weights and with an adapter: the third step."""
    pairs = []
    for lora in (False, True):
        alone, shared = Case(cp=1, lora=lora), Case(exchange=RING, lora=lora)
        pairs += [(alone, shared), (shared, alone)]
    save_tiny_model(tmp_path / "llama", "llama", layers=2)
    run_ranks(resume_elsewhere, (tmp_path, pairs), 2)
    for number in range(len(pairs)):
        for rank in range(2):
            there, here = torch.load(tmp_path / f"{number}.{rank}.pt", weights_only=False)
            assert here.metrics[0] == pytest.approx(there.metrics[0], rel=FP32, abs=FP32)
            assert here.whole.keys() == there.whole.keys()
            for name, value in there.whole.items():
                assert_close(here.whole[name], value, rtol=0.0, atol=FP32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": False}, "train.cp is 2, which cuts packed rows; set packing=true"),
        ({"cp": 4, "cp_exchange": "ulysses"}, r"set cp to one of \[1, 2, 3, 6\]"),
        ({"tp": 2, "cp_exchange": "ulysses"}, r"set cp to one of \[1, 3\]"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"cp": 2, **settings}
    options["cp_exchange"] = ContextExchange(options.get("cp_exchange", "auto"))
    model = AutoConfig.for_model("qwen3", num_attention_heads=6, num_key_value_heads=2)
    with pytest.raises(ValueError, match=message):
        FsdpEngine.check(model, TrainConfig(**options), Head.lm, 8)


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="it is installed here")
def test_attention_that_is_not_installed_is_refused(tmp_path: Path) -> None:
    """In one line, before a rank starts."""
    path = save_tiny_model(tmp_path / "llama", "llama", layers=1)
    model = ModelConfig(path=str(path), attention="flash_attention_2")
    with pytest.raises(ValueError, match=r"not installed .*set model\.attention=auto"):
        check_packing(model, Head.lm, cp=2)


def test_the_layout_counts_the_ranks_that_share_rows() -> None:
    layout = FsdpEngine.make_layout(TrainConfig(cp=2, tp=2), 8)
    assert layout.axes == (("dp", 2), ("pp", 1), ("cp", 2), ("tp", 2))
    with pytest.raises(ValueError, match="pp=1 x cp=3 x tp=1 does not divide the pool's 8 devices"):
        FsdpEngine.make_layout(TrainConfig(cp=3), 8)


def test_groups_are_as_small_as_the_rows_allow() -> None:
    """Rows of 96, 30, 11, ... computed tokens at 16 a rank: 4 ranks share the longest, 2 the next;
    every rank's list is in descending sizes, and ranks that share a micro-batch have shared all
    before it."""
    widths = np.array([96, 30, 11, 8, 8, 8, 4, 2, 1, 1])

    def cut(rows: np.ndarray, budget_tokens: int) -> list[np.ndarray]:
        return [rows[part] for part in pack(widths[rows], budget_tokens)]

    units = list(np.arange(len(widths)).reshape(-1, 1))
    near = np.arange(len(widths))
    assignments = assign_groups(widths, units, near, 16, 4, cut, 0.01)
    sizes = [assignment.size for assignment in assignments]
    assert sizes == sorted(sizes, reverse=True) and sizes[:2] == [4, 2]
    rows = np.concatenate([assignment.rows for assignment in assignments])
    assert sorted(rows.tolist()) == list(range(len(widths)))
    for number, assignment in enumerate(assignments):
        size, place = assignment.size, assignment.place
        assert widths[assignment.rows].sum() <= 16 * size or size == 4
        before = assignments[:number]
        earlier = []
        for rank in range(place * size, (place + 1) * size):
            earlier.append([other.place for other in before if rank // other.size == other.place])
        assert all(places == earlier[0] for places in earlier)


def test_work_is_even_and_the_rows_of_a_prompt_stay_together() -> None:
    """64 rows of 8 prompts: at most a tenth more than the mean for the busiest of 8 ranks, and with
    128 prompts of 4 rows no prompt is divided."""

    def cut(rows: np.ndarray, budget_tokens: int) -> list[np.ndarray]:
        return [rows[part] for part in pack(widths[rows], budget_tokens)]

    generator = np.random.default_rng(0)
    for num_rows, num_prompts in ((64, 8), (512, 128)):
        widths = np.clip(generator.lognormal(7, 1, num_rows), 64, 4000).astype(np.int64)
        near = np.arange(num_rows) % num_prompts
        units = list(np.arange(num_rows).reshape(-1, 1))
        assignments = assign_groups(widths, units, near, 20000, 8, cut, 1e-5)
        assert imbalance(assignments, widths, 1e-5) < 1.1
        places: dict[int, set[int]] = {}
        for assignment in assignments:
            for row in assignment.rows:
                places.setdefault(int(near[row]), set()).add(assignment.place)
        if num_prompts == 128:
            assert max(map(len, places.values())) == 1


@pytest.mark.parametrize(("ranks", "sizes"), [(8, [8, 4, 2, 1]), (6, [6, 3, 1]), (1, [1])])
def test_group_sizes_divide_one_another(ranks: int, sizes: list[int]) -> None:
    assert nested_sizes(ranks) == sizes
