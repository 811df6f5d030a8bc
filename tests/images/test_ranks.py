"""Two gloo ranks, of which one has no image where they are data ranks, against one process (SCALE.md 5.4,
finding T44)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from hybridflow.context import RankContext
from tests.images.ranks import WORLD, Case, run, two_steps
from tests.images.tiny import make_model
from tests.ranks import run_ranks
from workers.config import ContextExchange, TrainConfig, VisionTraining
from workers.engines.threed.layout import check_layout

ALONE = {
    "tp",
    "pp",
    "cp",
    "ep",
    "cp_exchange",
    "cp_by_length",
    "reshard_after_forward",
    "zero_stage",
}
"""Settings that one process does not have."""
CASES = [
    Case(),
    Case(settings={"reshard_after_forward": True, "micro_batch_tokens": 40}),
    Case(settings={"vision": VisionTraining.frozen}),
    Case(settings={"packing": False}),
    Case(engine="deepspeed", settings={"zero_stage": 3, "micro_batch_tokens": 40}),
    Case(engine="threed", family="qwen3_vl", settings={"pp": 2}),
    Case(engine="threed", family="qwen3_vl", settings={"tp": 2}),
    Case(family="qwen3_vl", settings={"cp": 2}),
]
SLOW_CASES = [
    Case(family="qwen2_vl", settings={"tp": 2}),
    Case(family="qwen2_vl", engine="threed", settings={"pp": 2}),
    Case(settings={"cp": 2, "cp_exchange": ContextExchange.ring, "micro_batch_tokens": 40}),
    Case(settings={"cp": 2, "cp_by_length": True, "micro_batch_tokens": 40}),
    Case(engine="deepspeed", settings={"cp": 2, "zero_stage": 3}),
    Case(engine="threed", family="qwen3_vl", settings={"cp": 2}),
    Case(family="qwen3_vl_moe", settings={"cp": 2}),
    Case(settings={"tp": 2, "micro_batch_tokens": 40}),
    Case(family="qwen3_vl", settings={"tp": 2, "packing": False}),
    Case(engine="deepspeed", settings={"zero_stage": 1, "packing": False}),
    Case(engine="deepspeed", family="qwen3_vl", settings={"zero_stage": 2}),
    Case(engine="deepspeed", settings={"zero_stage": 3, "vision": VisionTraining.frozen}),
    Case(engine="deepspeed", family="gemma3", settings={"zero_stage": 3}),
    Case(engine="deepspeed", settings={"zero_stage": 3, "activation_checkpointing": True}),
    Case(engine="threed", settings={"micro_batch_tokens": 40}),
    Case(engine="threed", settings={"vision": VisionTraining.frozen, "pp": 2}),
    Case(engine="threed", settings={"pp": 2, "packing": False, "micro_batch_tokens": 40}),
    Case(engine="threed", family="gemma3", settings={"pp": 2}),
    Case(engine="threed", family="gemma3", settings={"tp": 2}),
    Case(engine="threed", family="qwen3_vl_moe", settings={"pp": 2}),
    Case(engine="threed", family="qwen3_vl_moe", settings={"ep": 2}),
    Case(family="qwen3_vl_moe", settings={"ep": 2}),
    Case(family="qwen3_vl_moe", settings={"tp": 2, "ep": 2}),
]


def compare(cases: list[Case], tmp_path: Path) -> None:
    """Loss and gradient norm of two steps of both ranks are those of engine fsdp in one process. A
    pipeline stage without the tower makes no pixels."""
    for family in {case.family for case in cases}:
        make_model(tmp_path / family, family=family)
    run_ranks(run, (tmp_path, tmp_path, cases), WORLD)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]
    for number, case in enumerate(cases):
        settings = {name: case.settings[name] for name in case.settings.keys() - ALONE}
        alone = two_steps(tmp_path, RankContext(), replace(case, engine="fsdp", settings=settings))
        if "pp" in case.settings:
            counts = [results[number][-1]["images"] for results in both]
            assert counts == [alone[-1]["images"], 0], case
        for results in both:
            for step in range(2):
                for name in ("loss", "grad_norm"):
                    expected = pytest.approx(alone[step][name], abs=2e-6, rel=1e-5)
                    assert results[number][step][name] == expected, (case, step, name)


def test_a_rank_without_images(world: None, tmp_path: Path) -> None:
    """Nobody waits for it: with one group of FSDP and with one for each layer, with a frozen tower, with
    a tower that is gathered for every pass (ZeRO-3), on pipeline stages and in tensor parts."""
    compare(CASES, tmp_path)


@pytest.mark.slow
def test_every_engine(world: None, tmp_path: Path) -> None:
    """The same of further families and settings; experts divided over ranks among them."""
    compare(SLOW_CASES, tmp_path)


def test_stages_that_the_tower_feeds(tmp_path: Path) -> None:
    """Layers that add features of the tower (Qwen3-VL) are all on the first stage, with the tower."""
    made: dict[str, Any] = {"family": "qwen3_vl", "layers": 4, "fed_layers": 2}
    model = AutoConfig.from_pretrained(make_model(tmp_path / "model", **made))
    check_layout(model, TrainConfig(engine="threed", pp=2), 2)
    with pytest.raises(ValueError, match="first 2 layers of qwen3_vl add features") as error:
        check_layout(model, TrainConfig(engine="threed", pp=4), 4)
    assert "use at most 2 stages" in str(error.value)
    assert "\n" not in str(error.value)
