"""Rows of mixtures of experts: every engine on two gloo processes against plain PyTorch in one, with
the auxiliary loss, and the routes of one pass replayed in another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.multiprocessing as mp

from benchmarks.scale.routes import overhead
from benchmarks.scale.row import Row
from tests.experts.engines import rows_with_a_shared_prompt
from tests.experts.plain import FAMILIES, PlainStep, load_mixture, plain_step, save_tiny_mixture
from tests.experts.ranks import COEFFICIENT, WORLD, Case, Result, run

LAYOUTS: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = (
    ("fsdp", ()),
    ("fsdp", (("cp", 2),)),
    ("fsdp", (("ep", 2),)),
    ("deepspeed", (("zero_stage", 2),)),
    ("threed", (("pp", 2),)),
    ("threed", (("ep", 2),)),
)
WITHOUT_PIPELINE = ("olmoe",)
"""Families for which transformers has no pipeline plan, which engine threed refuses."""


def measure(directory: Path) -> Iterator[Row]:
    """Each family in each layout: errors of the first step, bytes of the routes of a rank's rows
    (two for every expert of a token and layer), and the seconds of the step that replays them. At
    last generation with and without routes."""
    cases = []
    for family in FAMILIES:
        save_tiny_mixture(directory / family, family)
        for engine, settings in LAYOUTS:
            if engine != "threed" or family not in WITHOUT_PIPELINE:
                cases.append(Case(engine=engine, family=family, settings=settings))
    mp.spawn(run, args=(directory, cases), nprocs=WORLD)
    for family in FAMILIES:
        model = load_mixture(directory / family)
        start = {name: value.detach().clone() for name, value in model.named_parameters()}
        expected = plain_step(model, rows_with_a_shared_prompt(), COEFFICIENT)
        for case in cases:
            if case.family == family:
                yield _row(directory, case, expected, start)
    ratio, sent, fewest = overhead(directory)
    yield Row(
        feature="experts",
        family="qwen3_moe",
        layout="vllm, routes recorded",
        loss_error=0.0,
        grad_norm_error=0.0,
        update_error=0.0,
        log_prob_gap=0.0,
        sync_bytes=sent,
        bound_bytes=fewest,
        peak_bytes=0,
        step_s=0.0,
        time_ratio=ratio,
    )


def _row(directory: Path, case: Case, expected: PlainStep, start: dict[str, torch.Tensor]) -> Row:
    results: list[Result] = []
    for rank in range(WORLD):
        results.append(torch.load(directory / f"{case.name}.{rank}.pt", weights_only=False))
    first = results[0]
    difference, change = 0.0, 0.0
    for name, value in expected.parameters.items():
        difference += float((first.parameters[name] - value).double().square().sum())
        change += float((value - start[name]).double().square().sum())
    settings = " ".join(f"{name}={value}" for name, value in case.settings)
    routes = first.routes
    return Row(
        feature="experts",
        family=case.family,
        layout=f"{case.engine} {settings or 'dp=2'}",
        loss_error=_relative(first.metrics["loss"], expected.loss),
        grad_norm_error=_relative(first.metrics["grad_norm"], expected.grad_norm),
        update_error=(difference / change) ** 0.5,
        log_prob_gap=max(result.replay_gap for result in results),
        sync_bytes=routes.numel() * routes.element_size(),
        bound_bytes=routes.numel() * routes.element_size(),
        peak_bytes=0,
        step_s=max(result.step_s for result in results),
    )


def _relative(measured: float, expected: float) -> float:
    return abs(measured - expected) / abs(expected)
