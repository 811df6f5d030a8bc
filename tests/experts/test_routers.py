"""Metrics of routers and their auxiliary loss in one process, against loops over tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.engines.threed_cases import TEMPERATURE, loss_fn, make_sequences, save_tiny_model
from tests.experts.engines import make_engine, rows_with_a_shared_prompt
from tests.experts.plain import (
    EXPERTS,
    FAMILIES,
    PlainStep,
    load_mixture,
    plain_step,
    save_tiny_mixture,
)
from workers.config import ModelConfig
from workers.engines.base import Head
from workers.engines.model.expert_choice import check_choice
from workers.engines.model.loading import model_config
from workers.engines.model.routers import Load, check_routers

EXACT = 1e-6
COEFFICIENT = 0.3
ONE, SEVERAL, MANY = 10_000, 60, 18
"""Tokens of a micro-batch: all rows in one, in about three, a row or two in each."""


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_loops_over_tokens(root: Path, world: None, family: str) -> None:
    """Metrics, loss, gradient norm and weights after a step with the auxiliary loss, whatever the
    cut: 1, some and many micro-batches, with and without recomputation and packing (finding T40)."""
    batch = rows_with_a_shared_prompt()
    expected = plain_step(load_mixture(root / family), batch, COEFFICIENT)
    ways: list[dict[str, Any]] = [{"micro_batch_tokens": MANY, "activation_checkpointing": True}]
    if family == "qwen3_moe":
        ways.append({"micro_batch_tokens": ONE})
        ways.append({"micro_batch_tokens": SEVERAL, "packing": False})
        ways.append({"micro_batch_tokens": SEVERAL, "engine": "threed"})
    for way in ways:
        engine = make_engine(root / family, router_aux_loss_coefficient=COEFFICIENT, **way)
        metrics = engine.train_step(batch, loss_fn, entropy=True, temperature=TEMPERATURE)
        compare(metrics, expected)
        for parameter in engine.local_parameters():
            (shard,) = parameter.shards
            wanted = expected.parameters[parameter.name]
            assert_close(shard.tensor, wanted, rtol=0.0, atol=EXACT, msg=f"{way}: {parameter.name}")


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("deepseek_v3", {"n_shared_experts": 0}),
        ("mixtral", {"router_jitter_noise": 0.3}),
        ("qwen3_moe", {"tie_word_embeddings": True, "norm_topk_prob": False}),
    ],
    ids=str,
)
def test_mixtures_with_other_settings(
    tmp_path: Path, world: None, family: str, settings: dict[str, Any]
) -> None:
    """No shared experts, whose matrices then have no numbers; noise before the router, which is left out;
    tied embeddings."""
    path = save_tiny_mixture(tmp_path / "model", family, **settings)
    batch = rows_with_a_shared_prompt()
    expected = plain_step(load_mixture(path), batch, COEFFICIENT)
    for name in ("fsdp", "threed"):
        engine = make_engine(path, engine=name, router_aux_loss_coefficient=COEFFICIENT)
        compare(engine.train_step(batch, loss_fn, entropy=True, temperature=TEMPERATURE), expected)


def compare(metrics: dict[str, float], expected: PlainStep) -> None:
    assert metrics["loss"] == pytest.approx(expected.loss, abs=EXACT)
    assert metrics["router/aux_loss"] == pytest.approx(expected.aux_loss, abs=EXACT)
    assert metrics["grad_norm"] == pytest.approx(expected.grad_norm, rel=EXACT, abs=EXACT)
    imbalances, entropies, dead = [], [], 0
    for counts in expected.chosen:
        total = sum(counts)
        imbalances.append(max(counts) * EXPERTS / total)
        entropy = 0.0
        for count in counts:
            dead += count == 0
            if count:
                entropy -= count / total * math.log(count / total)
        entropies.append(entropy / math.log(EXPERTS))
    layers = len(expected.chosen)
    assert metrics["router/imbalance"] == pytest.approx(sum(imbalances) / layers)
    assert metrics["router/imbalance_max"] == pytest.approx(max(imbalances))
    assert metrics["router/load_entropy"] == pytest.approx(sum(entropies) / layers)
    assert metrics["router/load_entropy_min"] == pytest.approx(min(entropies))
    assert metrics["router/dead_experts"] == pytest.approx(dead / (EXPERTS * layers))


def test_the_loss_is_off_by_default(root: Path, world: None) -> None:
    """With recomputation, which does not count: it must save the same tensors nevertheless."""
    batch = make_sequences(6, 1)
    plain = plain_step(load_mixture(root / "qwen3_moe"), batch, 0.0)
    engine = make_engine(root / "qwen3_moe", activation_checkpointing=True)
    metrics = engine.train_step(batch, loss_fn, entropy=True, temperature=TEMPERATURE)
    assert "router/aux_loss" not in metrics
    assert metrics["grad_norm"] == pytest.approx(plain.grad_norm, rel=EXACT)


def test_a_model_without_experts_has_no_router_metrics(tmp_path: Path, world: None) -> None:
    engine = make_engine(save_tiny_model(tmp_path / "llama", "llama", layers=2))
    metrics = engine.train_step(
        make_sequences(4, 0), loss_fn, entropy=True, temperature=TEMPERATURE
    )
    assert not any(name.startswith("router/") for name in metrics)


def test_what_has_no_routers_is_refused(root: Path, tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "llama", "llama", layers=2)
    config = model_config(ModelConfig(path=str(path)), Head.lm)
    check_routers(config, 0.0)
    with pytest.raises(ValueError, match=r"router_aux_loss_coefficient is 0\.1, but llama has no"):
        check_routers(config, 0.1)
    mixture = model_config(ModelConfig(path=str(root / "mixtral")), Head.lm)
    check_routers(mixture, 0.1)
    for bad in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="use a finite number over 0"):
            check_routers(mixture, bad)


@pytest.mark.parametrize(
    ("family", "settings", "problem"),
    [
        ("qwen3_moe", {"num_experts_per_tok": 9}, "a token goes to 9 of 8 experts"),
        ("mixtral", {"num_experts_per_tok": 0}, "a token goes to 0 of 8 experts"),
        ("deepseek_v3", {"n_group": 3}, "n_group is 3 and topk_group 1"),
        ("deepseek_v3", {"n_group": 8}, "n_group is 8 and topk_group 1"),
        ("deepseek_v3", {"topk_group": 3}, "n_group is 2 and topk_group 3"),
        ("deepseek_v3", {"n_group": 4, "num_experts_per_tok": 3}, "n_group is 4"),
    ],
    ids=str,
)
def test_choices_that_can_not_be_made(
    root: Path, family: str, settings: dict[str, Any], problem: str
) -> None:
    config = model_config(ModelConfig(path=str(root / family)), Head.lm)
    check_choice(config)
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=problem) as error:
        check_choice(config)
    assert "\n" not in str(error.value)


def test_one_expert_has_an_even_load() -> None:
    load = Load.zeros(2, 1, torch.device("cpu"))
    load.chosen += 3
    metrics = load.metrics()
    assert metrics["router/load_entropy"] == metrics["router/load_entropy_min"] == 1.0
    assert metrics["router/imbalance"] == 1.0
