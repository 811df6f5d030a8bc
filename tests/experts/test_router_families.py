"""Routers that return something else than (logits, weights, experts), that score otherwise than by a
softmax, or that keep their matrix in a module within, against loops over tokens in plain transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from tests.engines.threed_cases import TEMPERATURE, loss_fn
from tests.experts.engines import make_engine, rows_with_a_shared_prompt
from tests.experts.plain import (
    COMMON,
    OTHER_ROUTERS,
    load_mixture,
    observed,
    plain_step,
    save_tiny_mixture,
)
from tests.experts.test_replay import log_probs_of, recorded
from tests.experts.test_routers import COEFFICIENT, compare
from workers.engines.model.routers import check_replays, experts_per_token

UNPACKED = ("llama4_text", "lfm2_moe")
"""Families that train on one row at a time."""


@pytest.fixture(scope="module", params=OTHER_ROUTERS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixture(tmp_path_factory.mktemp("routers") / request.param, request.param)


def test_a_step_with_the_auxiliary_loss(path: Path, world: None) -> None:
    """Metrics, loss and gradient norm."""
    batch = rows_with_a_shared_prompt()
    expected = plain_step(load_mixture(path), batch, COEFFICIENT)
    engine = make_engine(
        path,
        router_aux_loss_coefficient=COEFFICIENT,
        micro_batch_tokens=60,
        activation_checkpointing=True,
        packing=path.name not in UNPACKED,
    )
    metrics = engine.train_step(batch, loss_fn, entropy=True, temperature=TEMPERATURE)
    compare(metrics, expected)


def test_routes(path: Path, world: None) -> None:
    """Recorded ones are transformers', row by row; replayed ones give the same bits."""
    batch = rows_with_a_shared_prompt()
    engine = make_engine(path, micro_batch_tokens=40, packing=path.name not in UNPACKED)
    plain, routes = recorded(engine, batch)
    model = load_mixture(path)
    lengths = batch.lengths.tolist()
    rows = zip(batch.token_ids.split(lengths), routes.split(lengths), strict=True)
    for ids, part in rows:
        read = max(len(ids) - 1, 1)
        with torch.no_grad(), observed(model) as seen:
            model(input_ids=ids[None, :read])
        expected = torch.stack([experts for _, experts in seen], 1)
        assert torch.equal(part[:read].sort(-1).values, expected.sort(-1).values.to(torch.int16))
    assert torch.equal(plain, log_probs_of(engine, replace(batch, routes=routes)))


@pytest.mark.parametrize("family", OTHER_ROUTERS)
def test_they_can_be_given_routes(family: str) -> None:
    config = AutoConfig.for_model(family, **{**COMMON, **OTHER_ROUTERS[family]})
    check_replays(config, "router_replay is R3")


def test_layers_that_choose_differently_many() -> None:
    settings = {**COMMON, **OTHER_ROUTERS["hunyuan_v1_moe"]}
    del settings["num_experts_per_tok"]
    same = AutoConfig.for_model("hunyuan_v1_moe", **settings | {"moe_topk": [2, 2, 2]})
    assert experts_per_token(same) == 2
    other = AutoConfig.for_model("hunyuan_v1_moe", **settings | {"moe_topk": [2, 1, 2]})
    with pytest.raises(ValueError, match=r"hunyuan_v1_moe: layers send a token to \[2, 1, 2\]"):
        experts_per_token(other)
