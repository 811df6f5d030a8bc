"""Rows of low-rank adapters: every engine on 1, 2 and 4 gloo processes against LoRA in plain PyTorch
in one, and a sync of the adapter to a copy of the model on every rank."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.scale.errors import relative_error, update_error
from benchmarks.scale.row import Row
from benchmarks.scale.weights import state_bytes, synced
from tests.engines.fsdp_workers import data_rows
from tests.engines.threed_cases import TEMPERATURE, PlainRun, load_plain, loss_fn, save_tiny_model
from tests.lora.plain import adapt, matrices_of, plain_lora_run
from tests.lora.workers import (
    ALPHA,
    NUM_STEPS,
    OPTIMIZER,
    RANK,
    Case,
    batches,
    make_engine,
    own_rows,
)
from tests.ranks import run_ranks, worlds
from workers.config import ContextExchange
from workers.engines.base import Outputs
from workers.sequences import ragged_positions

FAMILIES = ("llama", "qwen3", "gemma3_text")
LAYERS = 2
TIMED_STEPS = 5


@dataclass(frozen=True, slots=True)
class Measured:
    """The measurements of one rank."""

    data: int
    outputs: Outputs | None
    metrics: list[dict[str, float]]
    trained: dict[str, Tensor]
    sync_bytes: int
    bound_bytes: int
    peak_bytes: int
    step_s: float


def measure(directory: Path) -> Iterator[Row]:
    """Each family on one rank, with one kind of parallelism, and with two."""
    cases: list[Case] = []
    for family in FAMILIES:
        save_tiny_model(directory / family, family, layers=LAYERS, tied=family == "gemma3_text")
        cases += [
            Case(family=family),
            Case(family=family, engine="deepspeed", world_size=2),
            Case(family=family, world_size=2, tp=2),
            Case(family=family, engine="threed", world_size=2, pp=2),
            Case(family=family, engine="threed", world_size=4, tp=2),
            Case(family=family, world_size=2, cp=2),
            Case(family=family, world_size=4, cp=2, exchange=ContextExchange.ring),
            Case(family=family, engine="threed", world_size=4, cp=2, pp=2),
        ]
    (directory / "stores-lora").mkdir()
    run_ranks(_run, (directory, cases), 4)
    for case in cases:
        yield _row(directory, case)


def _run(rank: int, directory: Path, cases: list[Case]) -> None:
    for world_size in worlds(rank, directory / "stores-lora", (4, 2, 1)):
        for case in cases:
            if case.world_size == world_size:
                measured = _measure(rank, directory, case)
                torch.save(measured, directory / f"{case.name}.{rank}.pt")


def _measure(rank: int, directory: Path, case: Case) -> Measured:
    engine = make_engine(case, directory, rank)
    engine.save_pretrained(directory / f"{case.name}.first")
    rows = [own_rows(engine, batch, rank) for batch in batches()]
    outputs = engine.forward(rows[0], entropy=True, temperature=TEMPERATURE)
    metrics = []
    for batch in rows:
        metrics.append(engine.train_step(batch, loss_fn, entropy=True, temperature=TEMPERATURE))
    trained = engine._gathered_trained()
    peak_bytes = state_bytes(engine)
    sync_bytes, bound_bytes = synced(engine, adapter=True)
    seconds = []
    for _ in range(TIMED_STEPS):
        started = time.perf_counter()
        engine.train_step(rows[0], loss_fn, entropy=True, temperature=TEMPERATURE)
        seconds.append(time.perf_counter() - started)
    return Measured(
        data=engine.layout.coordinates(rank)["dp"],
        outputs=outputs,
        metrics=metrics,
        trained=trained,
        sync_bytes=sync_bytes,
        bound_bytes=bound_bytes,
        peak_bytes=peak_bytes,
        step_s=statistics.median(seconds),
    )


def _plain(directory: Path, case: Case) -> tuple[PlainRun, dict[str, Tensor]]:
    """The run in plain PyTorch, and its parameters before it."""
    model = load_plain(directory / case.family, case.head)
    matrices = matrices_of(directory / f"{case.name}.first")
    start = {}
    for name, (a, b) in matrices.items():
        start[f"{name}.lora_A"], start[f"{name}.lora_B"] = a.clone(), b.clone()
    adapt(model, matrices, ALPHA / RANK)
    return plain_lora_run(model, case.head, batches(), OPTIMIZER), start


def _row(directory: Path, case: Case) -> Row:
    ranks: list[Measured] = []
    for rank in range(case.world_size):
        ranks.append(torch.load(directory / f"{case.name}.{rank}.pt", weights_only=False))
    expected, start = _plain(directory, case)
    metrics = ranks[0].metrics
    assert len(metrics) == NUM_STEPS
    return Row(
        feature="lora",
        family=case.family,
        layout=_layout(case),
        loss_error=relative_error([step["loss"] for step in metrics], expected.losses),
        grad_norm_error=relative_error(
            [step["grad_norm"] for step in metrics], expected.grad_norms
        ),
        update_error=update_error(ranks[0].trained, expected.parameters, start),
        log_prob_gap=max(_gap(case, measured, expected) for measured in ranks),
        sync_bytes=ranks[0].sync_bytes,
        bound_bytes=ranks[0].bound_bytes,
        peak_bytes=max(measured.peak_bytes for measured in ranks),
        step_s=max(measured.step_s for measured in ranks),
    )


def _layout(case: Case) -> str:
    data = case.world_size // (case.tp * case.pp * case.cp)
    sizes = {"pp": case.pp, "cp": case.cp, "tp": case.tp, "dp": data}
    words = [f"{axis}{size}" for axis, size in sizes.items() if size > 1]
    if case.exchange is not ContextExchange.auto:
        words.append(case.exchange.value)
    return " ".join([case.engine, *words])


def _gap(case: Case, measured: Measured, expected: PlainRun) -> float:
    if measured.outputs is None:
        return 0.0
    batch = batches()[0]
    rows = data_rows(
        batch.num_rows, case.world_size // (case.tp * case.pp * case.cp), measured.data
    )
    places = ragged_positions(batch.scored_lengths, rows)
    assert measured.outputs.log_probs is not None and expected.outputs.log_probs is not None
    return float((measured.outputs.log_probs - expected.outputs.log_probs[places]).abs().max())
