"""Routes that are recorded and replayed in training, in one process, against forward passes by hand
(SCALE.md 5.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, PreTrainedModel

from tests.engines.threed_cases import TEMPERATURE, loss_fn
from tests.experts.engines import make_engine, rows_with_a_shared_prompt
from tests.experts.plain import (
    CHOSEN,
    COMMON,
    EXPERTS,
    FAMILIES,
    ROUTERS,
    load_mixture,
    observed,
)
from workers.engines.model.routers import check_replays
from workers.engines.shared.sharded_engine import ShardedEngine
from workers.sequences import Sequences

EXACT = 1e-6
LAYERS = 2
"""Layers with experts in Qwen3-MoE and DeepSeek-V3, where one of three is dense."""
ENGINES = ("fsdp", "threed")


def recorded(engine: ShardedEngine, batch: Sequences) -> tuple[Tensor, Tensor]:
    """Log-probs, and the routes of the same pass."""
    outputs = engine.forward(batch, temperature=TEMPERATURE, routes=True)
    assert outputs is not None
    assert outputs.log_probs is not None
    assert outputs.routes is not None
    return outputs.log_probs, outputs.routes


def log_probs_of(engine: ShardedEngine, batch: Sequences) -> Tensor:
    outputs = engine.forward(batch, temperature=TEMPERATURE)
    assert outputs is not None
    assert outputs.log_probs is not None
    return outputs.log_probs


def other_routes(routes: Tensor, seed: int = 0) -> Tensor:
    """Experts drawn at random, different ones of a token, where there are routes."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(*routes.shape[:2], EXPERTS, generator=generator).argsort(-1)[..., :CHOSEN]
    return torch.where(routes >= 0, drawn.to(torch.int16), routes)


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_routes_are_those_of_single_rows(root: Path, world: None, family: str) -> None:
    """Every computed token has the experts that transformers gives it in its row alone; the last
    token of a row has none."""
    batch = rows_with_a_shared_prompt()
    engine = make_engine(root / family, micro_batch_tokens=40)
    _, routes = recorded(engine, batch)
    model = load_mixture(root / family)
    tokens = batch.token_ids.split(batch.lengths.tolist())
    for ids, part in zip(tokens, routes.split(batch.lengths.tolist()), strict=True):
        read = max(len(ids) - 1, 1)
        with torch.no_grad(), observed(model) as seen:
            model(input_ids=ids[None, :read])
        expected = torch.stack([experts for _, experts in seen], 1)
        assert torch.equal(part[:read].sort(-1).values, expected.sort(-1).values.to(torch.int16))
        assert (part[read:] == -1).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_routes_give_the_same_bits(root: Path, world: None, family: str) -> None:
    batch = rows_with_a_shared_prompt()
    engine = make_engine(root / family, micro_batch_tokens=40)
    plain, routes = recorded(engine, batch)
    replayed = log_probs_of(engine, replace(batch, routes=routes))
    assert torch.equal(plain, replayed)
    nothing_known = torch.full_like(routes, -1)
    assert torch.equal(plain, log_probs_of(engine, replace(batch, routes=nothing_known)))


@pytest.mark.parametrize("family", FAMILIES)
def test_forced_routes_change_log_probs_as_by_hand(root: Path, world: None, family: str) -> None:
    """Random routes: the experts are exchanged and their weights are the router's scores of them,
    normalised as the family does."""
    batch = rows_with_a_shared_prompt().rows([0, 3, 4])
    engine = make_engine(root / family)
    plain, routes = recorded(engine, batch)
    forced = other_routes(routes)
    changed = log_probs_of(engine, replace(batch, routes=forced))
    assert (changed - plain).abs().max() > 1e-3
    model = load_mixture(root / family)
    lengths = batch.lengths.tolist()
    rows = zip(batch.token_ids.split(lengths), forced.split(lengths), strict=True)
    expected = []
    for (ids, part), scored in zip(rows, batch.scored_lengths.tolist(), strict=True):
        with torch.no_grad(), by_hand(model, part[:-1].long()):
            logits = model(input_ids=ids[None, :-1]).logits[0] / TEMPERATURE
        first = len(ids) - scored
        table = logits.log_softmax(-1)[first - 1 : first - 1 + scored]
        expected.append(table.gather(-1, ids[first:, None]).squeeze(-1))
    assert_close(changed, torch.cat(expected), rtol=0.0, atol=5e-6)


@contextmanager
def by_hand(model: PreTrainedModel, routes: Tensor) -> Iterator[list[Tensor]]:
    """Has every router send tokens to `routes` [tokens, layers, experts] (-1: where it would), with
    weights that are computed here from its logits; yields the experts that each would have chosen."""
    native: list[Tensor] = []
    handles = []
    for name, module in model.named_modules():
        if name.endswith(ROUTERS):
            handles.append(module.register_forward_hook(_forced(routes, native)))
    try:
        yield native
    finally:
        for handle in handles:
            handle.remove()


def _forced(routes: Tensor, native: list[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    def hook(router: nn.Module, _: object, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits, settings = outputs[0], vars(router)
        wanted = routes[:, len(native)]
        experts = torch.where(wanted >= 0, wanted, outputs[2])
        native.append(outputs[2])
        is_sigmoid = "routed_scaling_factor" in settings
        scores = logits.sigmoid() if is_sigmoid else logits.softmax(-1)
        weights = scores.gather(-1, experts)
        if settings.get("norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights * settings.get("routed_scaling_factor", 1.0), experts

    return hook


@pytest.mark.parametrize("engine_name", ENGINES)
@pytest.mark.parametrize("recomputes", [False, True])
def test_routers_learn_under_replay(
    root: Path, world: None, engine_name: str, recomputes: bool
) -> None:
    """Gradients flow through the scores of replayed experts (finding T35), the same with
    recomputation, and the metrics say what was replayed and what the routers would have done."""
    batch = rows_with_a_shared_prompt()
    settings = {"engine": engine_name, "micro_batch_tokens": 40}
    engine = make_engine(root / "qwen3_moe", **settings, activation_checkpointing=recomputes)
    _, routes = recorded(engine, batch)
    forced = other_routes(routes)
    first = int(batch.lengths[0])
    forced[:first] = routes[:first]
    forced[first : first + int(batch.lengths[1])] = -1
    before = weights_of(engine)
    metrics = step(engine, replace(batch, routes=forced))
    moved = {}
    for name, value in weights_of(engine).items():
        moved[name] = float((value - before[name]).abs().max())
    routers = {name: size for name, size in moved.items() if name.endswith("gate.weight")}
    assert len(routers) == LAYERS
    assert min(routers.values()) > 1e-5
    assert metrics["router/replayed"] == pytest.approx(share_replayed(batch, forced))
    agreeing = share_agreeing(load_mixture(root / "qwen3_moe"), batch, forced)
    assert 0 < agreeing < 1
    assert metrics["router/agreement"] == pytest.approx(agreeing)
    other = make_engine(root / "qwen3_moe", micro_batch_tokens=10_000)
    assert step(other, replace(batch, routes=forced)) == pytest.approx(metrics, abs=EXACT)
    for name, value in weights_of(other).items():
        assert_close(value, weights_of(engine)[name], rtol=0.0, atol=EXACT)


def step(engine: ShardedEngine, batch: Sequences) -> dict[str, float]:
    return engine.train_step(batch, loss_fn, entropy=True, temperature=TEMPERATURE)


def weights_of(engine: ShardedEngine) -> dict[str, Tensor]:
    whole = {}
    for parameter in engine.local_parameters():
        (shard,) = parameter.shards
        whole[parameter.name] = shard.tensor.clone()
    return whole


def computed(batch: Sequences) -> Tensor:
    """bool [tokens]: all but the last of each row, or the only one."""
    result = torch.ones(len(batch.token_ids), dtype=torch.bool)
    ends = torch.cumsum(batch.lengths, 0) - 1
    result[ends[batch.lengths > 1]] = False
    return result


def share_replayed(batch: Sequences, forced: Tensor) -> float:
    return float((forced[computed(batch)][..., 0] >= 0).float().mean())


def share_agreeing(model: PreTrainedModel, batch: Sequences, forced: Tensor) -> float:
    """Of the replayed choices of all layers those that the routers would have made, row by row."""
    same, total = 0, 0
    lengths = batch.lengths.tolist()
    rows = zip(batch.token_ids.split(lengths), forced.split(lengths), strict=True)
    for ids, part in rows:
        read = max(len(ids) - 1, 1)
        with torch.no_grad(), by_hand(model, part[:read].long()) as native:
            model(input_ids=ids[None, :read])
        for layer, experts in enumerate(native):
            wanted = part[:read, layer]
            for token in range(read):
                if wanted[token, 0] >= 0:
                    total += 1
                    same += set(wanted[token].tolist()) == set(experts[token].tolist())
    return same / total


def test_routers_that_cant_be_given_routes() -> None:
    """Phi-MoE's choose by two maxima: said before anything starts. The other families' can."""
    for family, settings in FAMILIES.items():
        check_replays(AutoConfig.for_model(family, **{**COMMON, **settings}), "router_replay is R3")
    phi = AutoConfig.for_model("phimoe", **{**COMMON, "num_local_experts": EXPERTS})
    with pytest.raises(ValueError, match="does not choose its experts by topk over all 8 of them"):
        check_replays(phi, "router_replay is R3")
    dense = AutoConfig.for_model("llama", hidden_size=32, num_attention_heads=4)
    with pytest.raises(ValueError, match="router_replay is R3, but llama has no routers"):
        check_replays(dense, "router_replay is R3")
