"""torch.compile, checkpointing and offload of decoder layers: the same losses, gradient norms and
weights as without, and what is compiled, computed again and kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from tests.engines.switch_workers import Case, Result, grouped_rows, make_engine, run_worlds, train
from tests.engines.threed_cases import TEMPERATURE, loss_fn, save_tiny_model
from tests.matrix import matrix
from tests.ranks import run_ranks
from workers.config import ContextExchange
from workers.engines.base import Head
from workers.engines.fsdp.engine import FsdpEngine
from workers.engines.model import offloading
from workers.engines.model.offloading import Mover

WHOLE = {"activation_checkpointing": True}
SELECTIVE = {**WHOLE, "selective_checkpointing": True}
OFFLOAD = {"offload_activations": True}
COMPILED = {"compile": True}
FP32 = 1e-5
"""Relative, of losses and gradient norms; absolute, of weights after three steps of 1e-3: kernels
that inductor fuses round in another order."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with the models, in a world of one."""
    root = tmp_path_factory.mktemp("layers")
    save_tiny_model(root / "llama", "llama")
    save_tiny_model(root / "gemma2", "gemma2", tied=True)
    if dist.is_initialized():
        yield root
        return
    dist.init_process_group("gloo", init_method=f"file://{root}/world", rank=0, world_size=1)
    yield root
    dist.destroy_process_group()


def both(root: Path, case: Case) -> tuple[Result, Result]:
    """Without the settings of the layers and with them."""
    ours = WHOLE | SELECTIVE | OFFLOAD | COMPILED
    plain = {name: value for name, value in case.train.items() if name not in ours}
    settings = {"train": plain, "model": case.model, "head": case.head, "layered": case.layered}
    return train(0, root, Case(name="plain", **settings)), train(0, root, case)


def assert_equal(found: Result, expected: Result, tolerance: float) -> None:
    assert_close(found.log_probs, expected.log_probs, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(found.metrics, expected.metrics, strict=True):
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance)
    for name, weights in expected.weights.items():
        assert_close(found.weights[name], weights, rtol=0.0, atol=tolerance, msg=name)


EXACT = [
    Case(name="offload", train=OFFLOAD),
    Case(name="all", train=SELECTIVE | OFFLOAD, layered=True),
]
EXACT_SLOW = [
    Case(name="whole", train=WHOLE),
    Case(name="selective", train=SELECTIVE),
    Case(name="threed", train=SELECTIVE | OFFLOAD | {"engine": "threed", "precision": "bf16"}),
    Case(name="lora", train=SELECTIVE | OFFLOAD | {"lora": {"rank": 2}}),
    Case(name="gemma2", train=SELECTIVE | OFFLOAD, model="gemma2"),
    Case(name="critic", train=SELECTIVE | OFFLOAD, head=Head.value),
]


@pytest.mark.parametrize("case", matrix(EXACT, EXACT_SLOW), ids=lambda case: case.name)
def test_checkpointing_and_offload_change_no_bit(
    root: Path, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offloading, "SMALLEST_BYTES", 0)
    expected, found = both(root, case)
    assert found.metrics == expected.metrics
    for name, weights in expected.weights.items():
        assert torch.equal(found.weights[name], weights), name


def test_selective_checkpointing_computes_no_product_again(root: Path) -> None:
    products = []
    for settings in ({}, SELECTIVE, WHOLE):
        engine = make_engine(0, root, Case(name="flops", train=settings))
        with FlopCounterMode(display=False) as counter:
            engine.train_step(grouped_rows(0), loss_fn, entropy=True, temperature=TEMPERATURE)
        counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
        products.append(counts["aten.mm"])
    none, selective, whole = products
    assert none == selective < whole


def test_what_layers_store_is_in_host_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor once, and no weight."""
    monkeypatch.setattr(offloading, "SMALLEST_BYTES", 0)
    moved: list[torch.Tensor] = []
    plain_out = Mover.out

    def out(mover: Mover, tensor: torch.Tensor) -> torch.Tensor:
        moved.append(tensor)
        return plain_out(mover, tensor)

    monkeypatch.setattr(Mover, "out", out)
    engine = make_engine(0, root, Case(name="moved", train=OFFLOAD))
    assert isinstance(engine, FsdpEngine)
    engine.forward(grouped_rows(0))
    assert not moved, "a pass without gradients stores nothing"
    (micro_batch, *_) = engine._micro_batches(grouped_rows(0), alike=False)
    engine._run(micro_batch, True, 1.0)
    tokens = micro_batch.input_ids.numel()
    places = {(tensor.untyped_storage().data_ptr(), tensor.storage_offset()) for tensor in moved}
    assert len(places) == len(moved)
    weights = {weight.untyped_storage().data_ptr() for weight in engine._scored.parameters()}
    assert not weights & {place for place, _ in places}
    assert sum(tensor.numel() for tensor in moved) > 4 * tokens * 10 * 32


COMPILE = [
    Case(name="fsdp", train=COMPILED),
    Case(name="inductor", train=COMPILED, backend="inductor"),
    Case(name="gemma2", train=COMPILED, model="gemma2", layered=True),
    Case(name="lora", train=COMPILED | {"lora": {"rank": 2}}),
    Case(name="threed", train=COMPILED | {"engine": "threed"}),
    Case(name="recomputed", train=COMPILED | WHOLE | OFFLOAD),
    Case(name="blocks", train=COMPILED | {"packing": False}),
    Case(name="critic", train=COMPILED, head=Head.value),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILE, ids=lambda case: case.name)
def test_compiled_layers_are_the_same_to_rounding(root: Path, case: Case) -> None:
    """All layers share the graphs, which end at attention only and serve every length of a row."""
    expected, found = both(root, case)
    assert_equal(found, expected, FP32)
    assert found.graphs
    assert all("torch.compiler.disable" in reason for reason in found.breaks), found.breaks
    # Before, between and behind attention and the MLP; with gradients and without, and twice for an
    # output of attention that is a view.
    assert found.graphs <= 16, found.graphs


@pytest.mark.slow
def test_compiled_layers_round_no_worse_in_bfloat16(root: Path) -> None:
    """Kernels that inductor fuses keep float32 in between: against float32 throughout, they are not
    farther off than the layers as they are."""
    bf16 = {"precision": "bf16"}
    eager, compiled = both(root, Case(name="bf16", train=COMPILED | bf16, backend="inductor"))
    exact = train(0, root, Case(name="fp32"))
    error = (compiled.log_probs - exact.log_probs).abs()
    of_eager = (eager.log_probs - exact.log_probs).abs()
    assert error.mean() < 1.25 * of_eager.mean() and error.max() < 2 * of_eager.max()
    for found, plain, wanted in zip(compiled.metrics, eager.metrics, exact.metrics, strict=True):
        for name in ("loss", "grad_norm"):
            allowed = 2 * abs(plain[name] - wanted[name]) + 0.01 * abs(wanted[name])
            assert abs(found[name] - wanted[name]) < allowed, name
    for name, weights in exact.weights.items():
        assert (compiled.weights[name] - weights).abs().max() < 4e-3, name


@pytest.mark.slow
def test_a_piece_with_too_many_versions_is_said_to_run_uncompiled(root: Path) -> None:
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logger, listener = logging.getLogger("torch._dynamo"), Listener()
    logger.addHandler(listener)
    from workers.engines.model import compiling

    before = compiling.MOST_VERSIONS
    compiling.MOST_VERSIONS = 1
    try:
        with torch._dynamo.config.patch(recompile_limit=1):
            expected, found = both(root, Case(name="limited", train=COMPILED))
    finally:
        compiling.MOST_VERSIONS = before
        logger.removeHandler(listener)
    assert_equal(found, expected, FP32)
    assert any("recompile_limit" in line for line in heard)


RANKS = [
    Case(name="zero3", world_size=2, train=COMPILED | WHOLE | {"reshard_after_forward": True}),
    Case(name="layered", world_size=2, train=SELECTIVE | OFFLOAD, layered=True),
    Case(
        name="fsdp3",
        world_size=2,
        train=SELECTIVE | OFFLOAD | {"reshard_after_forward": True},
        layered=True,
    ),
    Case(name="pp", world_size=2, train=COMPILED | WHOLE | {"engine": "threed", "pp": 2}),
    Case(name="pp-kept", world_size=2, train=SELECTIVE | OFFLOAD | {"engine": "threed", "pp": 2}),
    Case(name="tp", world_size=2, train=SELECTIVE | OFFLOAD | {"tp": 2}),
    Case(name="cp", world_size=2, train=COMPILED | {"cp": 2}),
    Case(
        name="cp-ring",
        world_size=2,
        train=COMPILED | {"cp": 2, "cp_exchange": ContextExchange.ring},
    ),
    Case(name="cp-threed", world_size=2, train=COMPILED | WHOLE | {"engine": "threed", "cp": 2}),
    Case(name="zero2", world_size=2, train=COMPILED | {"engine": "deepspeed"}),
    Case(
        name="zero3-kept",
        world_size=2,
        train=WHOLE | OFFLOAD | {"engine": "deepspeed", "zero_stage": 3},
    ),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, selected: Callable[[str], list[Any]]) -> Path:
    """What two ranks found, with the settings and without."""
    folder = tmp_path_factory.mktemp("ranks")
    save_tiny_model(folder / "llama", "llama")
    cases = list[Case]()
    for case in selected("case"):
        ours = WHOLE | SELECTIVE | OFFLOAD | COMPILED
        plain = {name: value for name, value in case.train.items() if name not in ours}
        cases += [
            case,
            Case(name=f"{case.name}-plain", world_size=2, train=plain, layered=case.layered),
        ]
    run_ranks(run_worlds, (folder, cases), 2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", RANKS, ids=lambda case: case.name)
def test_on_two_ranks(ranks: Path, case: Case) -> None:
    found, expected = (
        torch.load(ranks / f"{name}.pt", weights_only=False)
        for name in (case.name, f"{case.name}-plain")
    )
    assert_equal(found, expected, FP32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selective_checkpointing": True}, "activation_checkpointing is false"),
        (SELECTIVE | {"engine": "deepspeed", "zero_stage": 3}, "gathers weights within"),
        (SELECTIVE | COMPILED, "compiled layers choose by themselves"),
        (
            COMPILED | {"tp": 2},
            r"^train\.compile is true with tp=2: .*; set compile=false, or tp=1$",
        ),
        (COMPILED | {"engine": "threed", "tp": 2}, r"^train\.compile is true with tp=2"),
        (COMPILED | {"engine": "deepspeed", "zero_stage": 3}, "zero_stage to 1 or 2"),
    ],
)
def test_settings_that_do_not_go_together(
    root: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine(0, root, Case(name="refused", train=settings))
