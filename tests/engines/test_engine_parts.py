"""What the training engines share: log-probabilities, schedule, gradient norm, clipping, CPU attention,
loading."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hybridflow.context import RankContext
from tests.engines.threed_cases import FAMILIES, save_tiny_model
from workers.config import LearningRateSchedule, ModelConfig, OptimizerConfig
from workers.engines.base import Head
from workers.engines.model import attention, log_probs
from workers.engines.model.attention import ATTENTION, FUSED_ATTENTION, LONGEST, attend, check_packable
from workers.engines.model.loading import ModelSource
from workers.engines.model.packing import packing_of
from workers.engines.shared.optimizer import build_optimizer, clip_gradients, global_grad_norm, learning_rate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy", [False, True])
def test_log_probs_and_gradients_equal_log_softmax(
    dtype: torch.dtype, temperature: float, entropy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_probs, "CPU_CHUNK_ELEMENTS", 500)
    logits = (5 * torch.randn(23, 101, generator=torch.Generator().manual_seed(0))).to(dtype)
    targets = torch.arange(23) % 101
    weights = torch.linspace(-1, 1, 23)
    mine, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found, found_entropy = log_probs.token_log_probs(mine, targets, temperature, entropy)
    table = torch.log_softmax(plain.float() / temperature, -1)
    expected, expected_entropy = (
        table.gather(-1, targets[:, None]).squeeze(-1),
        -(table.exp() * table).sum(-1),
    )
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    loss, reference = (weights * found).sum(), (weights * expected).sum()
    if entropy:
        assert found_entropy is not None
        assert_close(found_entropy, expected_entropy, rtol=1e-5, atol=1e-5)
        loss, reference = loss + found_entropy.square().sum(), reference + expected_entropy.square().sum()
    else:
        assert found_entropy is None
    loss.backward()
    reference.backward()
    assert mine.grad is not None and mine.grad.dtype == dtype
    assert_close(mine.grad, plain.grad, rtol=1e-4 if dtype is torch.float32 else 1e-2, atol=1e-6)


def test_no_tokens_have_no_log_probs_but_a_gradient() -> None:
    logits = torch.zeros(0, 7, requires_grad=True)
    found, _ = log_probs.token_log_probs(logits, torch.zeros(0, dtype=torch.int64), 1.0, False)
    found.sum().backward()
    assert logits.grad is not None and logits.grad.shape == (0, 7)


def test_schedules_by_hand() -> None:
    config = OptimizerConfig(
        learning_rate=1.0,
        warmup_steps=4,
        total_steps=12,
        schedule=LearningRateSchedule.linear,
        min_learning_rate_fraction=0.2,
    )
    assert [learning_rate(config, step) for step in (0, 3, 4, 8, 12, 50)] == pytest.approx(
        [0.25, 1.0, 1.0, 0.6, 0.2, 0.2]
    )
    config.schedule = LearningRateSchedule.cosine
    assert learning_rate(config, 6) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    config.schedule = LearningRateSchedule.constant
    assert learning_rate(config, 50) == 1.0
    with pytest.raises(ValueError, match=r"optimizer\.total_steps is 0"):
        build_optimizer([], OptimizerConfig(schedule=LearningRateSchedule.cosine))


def test_clipping_equals_pytorchs_and_zero_turns_it_off() -> None:
    parameters = {name: nn.Parameter(torch.randn(size)) for name, size in (("a", 5), ("b", 7))}
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    before = {
        name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None
    }
    norm = global_grad_norm(parameters.values(), world_size=1)
    clip_gradients(parameters, norm, 0.0)
    assert all(torch.equal(parameter.grad, before[name]) for name, parameter in parameters.items())
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in parameters.values()]
    for copy, gradient in zip(copies, before.values(), strict=True):
        copy.grad = gradient.clone()
    assert_close(float(norm), float(nn.utils.clip_grad_norm_(copies, 0.3)))
    clip_gradients(parameters, norm, 0.3)
    for copy, parameter in zip(copies, parameters.values(), strict=True):
        assert_close(parameter.grad, copy.grad)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_attention_equals_one_sequence_at_a_time(
    dtype: torch.dtype,
    kv_heads: int,
    softcap: float | None,
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Outputs and gradients, of lengths on both sides of the longest that the matrix products take."""
    monkeypatch.setattr(attention, "LONGEST", 40)
    attention._bias.cache_clear()
    lengths = [71, 41, 40, 13, 13, 13, 2, 1, 1, 7]
    layer = nn.Module()
    layer.is_causal, layer.num_key_value_groups = True, 4 // kv_heads  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    heads = [
        torch.randn(1, sum(lengths), count, 16, generator=generator).to(dtype)
        for count in (4, kv_heads, kv_heads)
    ]
    gradient = torch.randn(1, sum(lengths), 4, 16, generator=generator)
    packed, plain = (
        [tensor.detach().to(kind, copy=True).requires_grad_() for tensor in heads]
        for kind in (dtype, torch.float64)
    )
    options = {"scaling": 0.2, "sliding_window": window, "softcap": softcap}
    parts = (leaf.transpose(1, 2) for leaf in packed)
    found, _ = attend(
        layer, *parts, None, fused=False, packing=packing_of(lengths, torch.device("cpu")), **options
    )
    found.backward(gradient.to(dtype))
    rows = zip(*(leaf[0].split(lengths) for leaf in plain), strict=True)
    expected = torch.cat([naive_attention(*row, **options) for row in rows])[None]
    expected.backward(gradient.double())
    attention._bias.cache_clear()
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.03, "atol": 0.06}
    for one, other in [(found, expected), *((a.grad, b.grad) for a, b in zip(packed, plain, strict=True))]:
        assert one is not None and other is not None
        assert_close(one.double(), other, **tolerance)


def naive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """Of one sequence, token by token and head by head: [time, heads, head_dim] each."""
    time, heads, _ = query.shape
    copies = heads // key.shape[1]
    rows = []
    for token in range(time):
        first = 0 if sliding_window is None else max(0, token - sliding_window + 1)
        seen = slice(first, token + 1)
        for head in range(heads):
            scores = scaling * key[seen, head // copies] @ query[token, head]
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            rows.append(torch.softmax(scores, -1) @ value[seen, head // copies])
    return torch.stack(rows).view(time, heads, -1)


@pytest.mark.parametrize("time", [2, 71])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_short_attention_equals_the_fused_kernel(time: int, kv_heads: int) -> None:
    """And is the same under gradients; both round to bfloat16."""
    layer = nn.Module()
    layer.is_causal, layer.num_key_value_groups = True, 4 // kv_heads  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(3, time, count, 16, generator=generator) for count in (4, kv_heads, kv_heads)]
    gradient = torch.randn(3, time, 4, 16, generator=generator)
    results = []
    for attends, dtype in (
        (partial(attend, fused=False), torch.bfloat16),
        (sdpa_attention_forward, torch.float32),
    ):
        leaves = [tensor.to(torch.bfloat16).to(dtype).requires_grad_() for tensor in heads]
        output, _ = attends(layer, *(leaf.transpose(1, 2) for leaf in leaves), None, scaling=0.2)
        output.backward(gradient.to(dtype))
        results.append([output.float(), *(leaf.grad.float() for leaf in leaves if leaf.grad is not None)])
    for short, fused in zip(*results, strict=True):
        assert_close(short, fused, rtol=0.03, atol=0.06)
    assert time <= LONGEST


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_in_a_packed_row_see_nothing_of_each_other(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    """Other tokens in one sequence: the hidden states of all others stay bit for bit, also in the layers'
    recomputation."""
    path = str(save_tiny_model(tmp_path / family, family, layers=2))
    model = ModelSource(ModelConfig(path=path), Head.lm, RankContext()).model.to(dtype)
    packing = packing_of([9, 9, 8, 2, 1], torch.device("cpu"))
    ids = torch.arange(3, 32)[None]
    begin, end = 9, 18
    other = ids.clone()
    other[0, begin:end] = 50
    with torch.no_grad():
        one, two = (
            model.base_model(input_ids=row, use_cache=False, **packing.arguments).last_hidden_state[0]
            for row in (ids, other)
        )
    assert (
        torch.equal(one[:begin], two[:begin])
        and torch.equal(one[end:], two[end:])
        and not torch.equal(one[begin:end], two[begin:end])
    )


def test_auto_attention_and_a_named_one(tmp_path: Path) -> None:
    path = str(save_tiny_model(tmp_path / "model", "llama", layers=2))
    found = {
        name: ModelSource(ModelConfig(path=path, attention=name), Head.lm, RankContext()).model
        for name in ("auto", "sdpa", "eager")
    }
    assert [model.config._attn_implementation for model in found.values()] == [
        ATTENTION,
        FUSED_ATTENTION,
        "eager",
    ]
    check_packable(found["sdpa"])
    with pytest.raises(
        ValueError,
        match=r"packing is true, but attention eager .* set model\.attention=auto or set packing=false",
    ):
        check_packable(found["eager"])


def test_what_is_not_attention_cannot_be_packed() -> None:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = AutoConfig.for_model(
        "lfm2", **sizes, num_key_value_heads=2, layer_types=["conv", "full_attention"]
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        ValueError, match=r"lfm2 has layers that are no plain attention \(conv\); set packing=false"
    ):
        check_packable(model)


def test_a_new_head_is_the_same_every_time_and_a_saved_critic_keeps_its_own(tmp_path: Path) -> None:
    path = str(save_tiny_model(tmp_path / "model", "llama", layers=2))
    torch.manual_seed(1)
    first = ModelSource(ModelConfig(path=path), Head.value, RankContext()).model
    torch.manual_seed(2)
    with pytest.raises(ValueError, match=r"without a score head.*python -m recipes\.reward_model"):
        ModelSource(ModelConfig(path=path), Head.score, RankContext())
    second = ModelSource(ModelConfig(path=path, new_head=True), Head.score, RankContext()).model
    assert torch.equal(first.get_submodule("score").weight, second.get_submodule("score").weight)
    other = ModelSource(ModelConfig(path=path), Head.value, RankContext(), seed=1).model
    assert not torch.equal(first.get_submodule("score").weight, other.get_submodule("score").weight)
    with torch.no_grad():
        first.get_submodule("score").weight.fill_(0.5)
    first.save_pretrained(tmp_path / "critic")
    saved = ModelSource(ModelConfig(path=str(tmp_path / "critic")), Head.score, RankContext()).model
    assert bool((saved.get_submodule("score").weight == 0.5).all())
    with pytest.raises(ValueError, match=r"do not fit LlamaForCausalLM.*unexpected \['score\.weight'\]"):
        ModelSource(ModelConfig(path=str(tmp_path / "critic")), Head.lm, RankContext())


def test_a_bidirectional_model_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "bert",
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"model.path is '{tmp_path}': bert is not a causal"):
        ModelSource(ModelConfig(path=str(tmp_path)), Head.lm, RankContext())
