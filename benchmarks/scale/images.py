"""Rows of models with images: engine fsdp on one and two gloo processes, of which one has no image, against
plain transformers in one; and GRPO with vLLM against the same run with engine hf."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.scale.errors import relative_error, update_error
from benchmarks.scale.row import Row
from benchmarks.scale.weights import state_bytes, synced
from hybridflow import open_session
from hybridflow.context import RankContext
from tests.engines.fsdp_workers import gathered
from tests.images.plain import TEMPERATURE, load, make_rows, whole_log_probs
from tests.images.ranks import ROWS, loss_fn
from tests.images.rewards import by_length
from tests.images.runs import settings
from tests.images.tiny import make_model
from tests.ranks import run_ranks, worlds
from workers.config import (
    ModelConfig,
    OptimizerConfig,
    Precision,
    TrainConfig,
    VisionTraining,
)
from workers.engines.base import Head
from workers.engines.fsdp.engine import FsdpEngine
from workers.images import family_of
from workers.images.families import FAMILIES

STEPS, TIMED_STEPS, GRPO_STEPS = 2, 3, 3
OPTIMIZER = OptimizerConfig(learning_rate=5e-3, clip_grad_norm=0.0, epsilon=1e-3)
LAYOUTS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("fsdp", 1, {}),
    ("fsdp dp2", 2, {}),
    ("fsdp dp2 zero3", 2, {"reshard_after_forward": True}),
    ("fsdp dp2 frozen tower", 2, {"vision": VisionTraining.frozen}),
    ("fsdp dp2 unpacked", 2, {"packing": False}),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """The measurements of one rank."""

    log_probs: Tensor
    """Of this rank's rows, before the first step."""
    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Tensor]
    sync_bytes: int
    bound_bytes: int
    peak_bytes: int
    step_s: float


def measure(directory: Path) -> Iterator[Row]:
    """Each family in each layout, and each that vLLM takes with it."""
    for family in FAMILIES:
        make_model(directory / family, family=family)
    (directory / "stores-images").mkdir()
    run_ranks(_run, (directory,), 2)
    for family in FAMILIES:
        for layout, world, changes in LAYOUTS:
            yield _row(directory, family, layout, world, changes)
    for family in FAMILIES:
        if "vllm" in FAMILIES[family].generators:
            for vision in VisionTraining:
                yield _generation_row(directory, family, vision)


def _run(rank: int, directory: Path) -> None:
    for world in worlds(rank, directory / "stores-images", (2, 1)):
        for family in FAMILIES:
            for layout, size, changes in LAYOUTS:
                if size == world:
                    measured = _measure(directory / family, rank, world, changes)
                    torch.save(measured, directory / f"{family}.{layout}.{rank}.pt")


def _numbers(rank: int, world: int) -> list[int]:
    """The rows of a rank."""
    return ROWS[rank] if world == 2 else [*ROWS[0], *ROWS[1]]


def _measure(path: Path, rank: int, world: int, changes: dict[str, Any]) -> Measured:
    engine = FsdpEngine(
        model=ModelConfig(path=str(path)),
        config=TrainConfig(precision=Precision.fp32, optimizer=OPTIMIZER, **changes),
        head=Head.lm,
        context=RankContext(rank=rank, world_size=world),
    )
    rows = make_rows(path, sampled=False)[0].rows(_numbers(rank, world))
    log_probs = engine.forward(rows, temperature=TEMPERATURE).log_probs
    assert log_probs is not None
    steps = [engine.train_step(rows, loss_fn, temperature=TEMPERATURE) for _ in range(STEPS)]
    weights = gathered(engine)
    sync_bytes, bound_bytes = synced(engine, adapter=False)
    peak_bytes = state_bytes(engine)
    seconds = []
    for _ in range(TIMED_STEPS):
        started = time.perf_counter()
        engine.train_step(rows, loss_fn, temperature=TEMPERATURE)
        seconds.append(time.perf_counter() - started)
    return Measured(
        log_probs=log_probs,
        losses=[step["loss"] for step in steps],
        grad_norms=[step["grad_norm"] for step in steps],
        weights=weights,
        sync_bytes=sync_bytes,
        bound_bytes=bound_bytes,
        peak_bytes=peak_bytes,
        step_s=statistics.median(seconds),
    )


def _row(directory: Path, family: str, layout: str, world: int, changes: dict[str, Any]) -> Row:
    ranks: list[Measured] = []
    for rank in range(world):
        ranks.append(torch.load(directory / f"{family}.{layout}.{rank}.pt", weights_only=False))
    model = load(directory / family)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    if changes.get("vision") is VisionTraining.frozen:
        seen = family_of(model.config)
        assert seen is not None
        for name in seen.tower:
            model.base_model.get_submodule(name).requires_grad_(False)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(),
        lr=OPTIMIZER.learning_rate,
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        eps=OPTIMIZER.epsilon,
        weight_decay=0.0,
    )
    rows, plain = make_rows(directory / family, sampled=False)
    losses, norms, first = [], [], None
    for _ in range(STEPS):
        parts = [whole_log_probs(model, inputs) for inputs in plain]
        log_probs = torch.cat(parts)
        first = [part.detach() for part in parts] if first is None else first
        loss = (log_probs * rows.per_token["weights"]).sum()
        optimizer.zero_grad()
        loss.backward()
        grads = [value.grad.norm() for value in trained.values() if value.grad is not None]
        losses.append(float(loss.detach()))
        norms.append(float(torch.stack(grads).norm()))
        optimizer.step()
    assert first is not None
    gap = 0.0
    for rank, measured in enumerate(ranks):
        expected = torch.cat([first[number] for number in _numbers(rank, world)])
        gap = max(gap, float((measured.log_probs - expected).abs().max()))
    return Row(
        feature="images",
        family=family,
        layout=layout,
        loss_error=relative_error(ranks[0].losses, losses),
        grad_norm_error=relative_error(ranks[0].grad_norms, norms),
        update_error=update_error(ranks[0].weights, trained, start),
        log_prob_gap=gap,
        sync_bytes=ranks[0].sync_bytes,
        bound_bytes=ranks[0].bound_bytes,
        peak_bytes=max(measured.peak_bytes for measured in ranks),
        step_s=max(measured.step_s for measured in ranks),
    )


def _generation_row(directory: Path, family: str, vision: VisionTraining) -> Row:
    """GRPO with vLLM against GRPO with engine hf: in float32 both draw the same tokens. The gap is
    that of vLLM to the trainer. In one process a sync moves nothing."""
    given = settings(directory / f"{family}-{vision.value}", family)
    runs, weights, seconds, gap = [], [], [], 0.0
    for engine in ("hf", "vllm"):
        place = directory / f"{family}-{vision.value}-{engine}"
        changes = {
            "output_dir": place,
            "actor.generation.engine": engine,
            "actor.train.vision": vision.value,
        }
        with open_session("grpo", given | changes, reward=by_length) as session:
            steps = []
            for _ in range(GRPO_STEPS):
                started = time.perf_counter()
                steps.append(session.step())
                seconds.append(time.perf_counter() - started)
            session.save(place / "saved")
        runs.append(steps)
        weights.append(load(place / "saved").state_dict())
        gap = max(step["actor/log_prob_gap_max"] for step in steps)
    start = load(Path(str(given["model.path"]))).state_dict()
    hf, vllm = runs
    return Row(
        feature="images",
        family=family,
        layout=f"vllm, {vision.value} tower",
        loss_error=_largest_error(vllm, hf, "actor/loss"),
        grad_norm_error=_largest_error(vllm, hf, "actor/grad_norm"),
        update_error=update_error(weights[1], weights[0], start),
        log_prob_gap=gap,
        sync_bytes=0,
        bound_bytes=0,
        peak_bytes=0,
        step_s=statistics.median(seconds[GRPO_STEPS:]),
    )


def _largest_error(
    measured: list[dict[str, float]], expected: list[dict[str, float]], name: str
) -> float:
    return relative_error([step[name] for step in measured], [step[name] for step in expected])
