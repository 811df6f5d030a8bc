"""Rows of models with images: every engine on one and two gloo processes, of which one has no image where
they are data ranks, against plain transformers in one; and GRPO with vLLM against the same run with
engine hf."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
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
from tests.images.ranks import loss_fn, make_engine, own_rows
from tests.images.rewards import by_length
from tests.images.runs import settings
from tests.images.tiny import make_model
from tests.ranks import run_ranks, worlds
from workers.config import OptimizerConfig, Precision, VisionTraining
from workers.images import family_of
from workers.images.families import FAMILIES

STEPS, TIMED_STEPS, GRPO_STEPS = 2, 3, 3
OPTIMIZER = OptimizerConfig(learning_rate=5e-3, clip_grad_norm=0.0, epsilon=1e-3)
MIXTURES = ("qwen3_vl_moe",)
"""Families with experts, which transformers' own tensor parallelism would split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Layout(name="threed pp2", engine="threed", changes={"pp": 2})"""

    name: str
    engine: str = "fsdp"
    world: int = 2
    changes: dict[str, Any] = field(default_factory=dict)
    families: tuple[str, ...] = tuple(FAMILIES)


OTHERS = tuple(family for family in FAMILIES if family not in MIXTURES)
CAUSAL = tuple(family for family, seen in FAMILIES.items() if not seen.sees_itself)
LAYOUTS = (
    Layout(name="fsdp", world=1),
    Layout(name="fsdp dp2"),
    Layout(name="fsdp dp2 zero3", changes={"reshard_after_forward": True}),
    Layout(name="fsdp dp2 frozen tower", changes={"vision": VisionTraining.frozen}),
    Layout(name="fsdp dp2 unpacked", changes={"packing": False}),
    Layout(name="fsdp tp2", changes={"tp": 2}, families=OTHERS),
    Layout(name="fsdp cp2", changes={"cp": 2}, families=CAUSAL),
    Layout(name="fsdp ep2", changes={"ep": 2}, families=MIXTURES),
    Layout(name="fsdp tp2 ep2", changes={"tp": 2, "ep": 2}, families=MIXTURES),
    Layout(name="deepspeed zero2", engine="deepspeed", changes={"zero_stage": 2}),
    Layout(name="deepspeed zero3", engine="deepspeed", changes={"zero_stage": 3}),
    Layout(name="threed pp2", engine="threed", changes={"pp": 2}),
    Layout(name="threed tp2", engine="threed", changes={"tp": 2}, families=OTHERS),
    Layout(name="threed ep2", engine="threed", changes={"ep": 2}, families=MIXTURES),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """The measurements of one rank."""

    rows: list[int]
    log_probs: Tensor | None
    """Of these rows, before the first step; None on a pipeline stage that is not the last."""
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
        for layout in LAYOUTS:
            if family in layout.families:
                yield _row(directory, family, layout)
    for family in FAMILIES:
        if "vllm" in FAMILIES[family].generators:
            for vision in VisionTraining:
                yield _generation_row(directory, family, vision)


def _run(rank: int, directory: Path) -> None:
    for world in worlds(rank, directory / "stores-images", (2, 1)):
        for family in FAMILIES:
            for layout in LAYOUTS:
                if layout.world == world and family in layout.families:
                    measured = _measure(directory / family, rank, layout)
                    torch.save(measured, directory / f"{family}.{layout.name}.{rank}.pt")


def _measure(path: Path, rank: int, layout: Layout) -> Measured:
    engine = make_engine(
        path,
        RankContext(rank=rank, world_size=layout.world),
        engine=layout.engine,
        precision=Precision.fp32,
        optimizer=OPTIMIZER,
        **layout.changes,
    )
    numbers = own_rows(engine, rank)
    rows = make_rows(path, sampled=False)[0].rows(numbers)
    outputs = engine.forward(rows, temperature=TEMPERATURE)
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
        rows=numbers,
        log_probs=None if outputs is None else outputs.log_probs,
        losses=[step["loss"] for step in steps],
        grad_norms=[step["grad_norm"] for step in steps],
        weights=weights,
        sync_bytes=sync_bytes,
        bound_bytes=bound_bytes,
        peak_bytes=peak_bytes,
        step_s=statistics.median(seconds),
    )


def _row(directory: Path, family: str, layout: Layout) -> Row:
    ranks: list[Measured] = []
    for rank in range(layout.world):
        path = directory / f"{family}.{layout.name}.{rank}.pt"
        ranks.append(torch.load(path, weights_only=False))
    model = load(directory / family)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    if layout.changes.get("vision") is VisionTraining.frozen:
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
    for measured in ranks:
        expected = torch.cat([first[number] for number in measured.rows])
        if measured.log_probs is not None:
            gap = max(gap, float((measured.log_probs - expected).abs().max()))
    return Row(
        feature="images",
        family=family,
        layout=layout.name,
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
