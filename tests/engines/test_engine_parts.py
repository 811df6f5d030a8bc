"""What the training engines share: log-probabilities, schedule, gradient norm, clipping, CPU
attention, loading."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hybridflow.context import RankContext
from tests.engines.threed_cases import FAMILIES, save_tiny_model
from workers.config import LearningRateSchedule, ModelConfig, OptimizerConfig
from workers.engines.base import Head, Outputs
from workers.engines.model import attention
from workers.engines.model.attention import (
    ATTENTION,
    FUSED_ATTENTION,
    LONGEST,
    attend,
    can_share_prompts,
    check_packable,
)
from workers.engines.model.loading import ModelSource
from workers.engines.model.packing import packing_of
from workers.engines.model.scored import ScoredModel
from workers.engines.shared.micro_batches import Cutting, gather_outputs, make_micro_batches
from workers.engines.shared.optimizer import (
    build_optimizer,
    clip_gradients,
    global_grad_norm,
    learning_rate,
)
from workers.sequences import Sequences


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
        name: parameter.grad.clone()
        for name, parameter in parameters.items()
        if parameter.grad is not None
    }
    gradients = [(gradient, 1) for gradient in before.values()]
    norm = global_grad_norm(gradients, world_size=1, device=torch.device("cpu"))
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
    """Outputs and gradients, of lengths on both sides of the longest that the matrix products
    take."""
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
        layer,
        *parts,
        None,
        fused=False,
        packing=packing_of(lengths),
        **options,
    )
    found.backward(gradient.to(dtype))
    rows = zip(*(leaf[0].split(lengths) for leaf in plain), strict=True)
    expected = torch.cat([naive_attention(*row, **options) for row in rows])[None]
    expected.backward(gradient.double())
    attention._bias.cache_clear()
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.03, "atol": 0.06}
    )
    for one, other in [
        (found, expected),
        *((a.grad, b.grad) for a, b in zip(packed, plain, strict=True)),
    ]:
        assert one is not None and other is not None
        assert_close(one.double(), other, **tolerance)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "padded"])
def test_responses_that_share_a_prompt_attend_as_if_each_had_its_own(
    dtype: torch.dtype, softcap: float | None, window: int | None, masked: bool, monkeypatch: Any
) -> None:
    """Outputs, and gradients, which are summed over the responses where they meet in the prompt."""
    monkeypatch.setattr(attention, "LONGEST", 20)
    monkeypatch.setattr(attention, "LARGEST_MASK", 10**6 if masked else 0)
    attention._bias.cache_clear()
    lengths, prefixes = [17, 9, 30, 6, 6, 6, 1, 4], [-1, -1, -1, 0, 0, 1, 1, -1]
    layer = nn.Module()
    layer.is_causal, layer.num_key_value_groups = True, 2  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 16), (2, 16), (2, 16))
    heads = [
        torch.randn(1, sum(lengths), *shape, generator=generator).to(dtype) for shape in shapes
    ]
    gradient = torch.randn(1, sum(lengths), 4, 16, generator=generator)
    packed, plain = (
        [tensor.detach().to(kind, copy=True).requires_grad_() for tensor in heads]
        for kind in (dtype, torch.float64)
    )
    options = {"scaling": 0.2, "sliding_window": window, "softcap": softcap}
    packing = packing_of(lengths, prefixes)
    parts = (leaf.transpose(1, 2) for leaf in packed)
    output, _ = attend(layer, *parts, None, fused=False, packing=packing, **options)
    output.backward(gradient.to(dtype))
    segments = [leaf[0].split(lengths) for leaf in plain]
    expected = []
    for number, (length, prefix) in enumerate(zip(lengths, prefixes, strict=True)):
        before = (
            [part[prefix] for part in segments]
            if prefix >= 0
            else [part[0][:0] for part in segments]
        )
        row = [
            torch.cat([first, part[number]]) for first, part in zip(before, segments, strict=True)
        ]
        expected.append(naive_attention(*row, **options)[-length:])
    reference = torch.cat(expected)[None]
    reference.backward(gradient.double())
    attention._bias.cache_clear()
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.04, "atol": 0.08}
    )
    assert_close(output.double(), reference, **tolerance)
    for leaf, other in zip(packed, plain, strict=True):
        assert leaf.grad is not None and other.grad is not None
        assert_close(leaf.grad.double(), other.grad, **tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompts_change_no_number(tmp_path: Path, family: str) -> None:
    """Log-probs, entropies and the gradient of a model with shared prompts and without."""
    path = str(save_tiny_model(tmp_path / family, family, layers=2))
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 50, (size,), generator=random) for size in (9, 9, 4)]
    responses = [torch.randint(3, 50, (size,), generator=random) for size in (5, 1, 8, 5, 7, 3, 2)]
    rows = [torch.cat([prompts[row % 3], response]) for row, response in enumerate(responses)]
    sequences = Sequences(
        token_ids=torch.cat(rows),
        lengths=torch.tensor([len(row) for row in rows]),
        scored_lengths=torch.tensor([len(response) for response in responses]),
    )
    results = []
    for share in (False, True):
        model = ModelSource(ModelConfig(path=path), Head.lm, RankContext()).model
        assert can_share_prompts(model)
        scored = ScoredModel(model, Head.lm)
        micro_batches = make_micro_batches(sequences, Head.lm, Cutting(40, True, share))
        outputs = []
        for part in micro_batches:
            numbers = scored(
                part.input_ids,
                part.read_positions,
                part.targets,
                packing=part.packing,
                entropy=True,
            )
            outputs.append(Outputs(**numbers))
            (numbers["log_probs"] * part.targets.cos()).sum().backward()
        everything = gather_outputs(micro_batches, outputs, sequences)
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        num_tokens = sum(part.input_ids.numel() for part in micro_batches)
        results.append((everything.log_probs, everything.entropy, gradients, num_tokens))
    (*plain, all_tokens), (*shared, fewer_tokens) = results
    for one, other in zip(shared, plain, strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert fewer_tokens < all_tokens


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
    heads = [
        torch.randn(3, time, count, 16, generator=generator) for count in (4, kv_heads, kv_heads)
    ]
    gradient = torch.randn(3, time, 4, 16, generator=generator)
    results = []
    for attends, dtype in (
        (partial(attend, fused=False), torch.bfloat16),
        (sdpa_attention_forward, torch.float32),
    ):
        leaves = [tensor.to(torch.bfloat16).to(dtype).requires_grad_() for tensor in heads]
        output, _ = attends(layer, *(leaf.transpose(1, 2) for leaf in leaves), None, scaling=0.2)
        output.backward(gradient.to(dtype))
        results.append(
            [output.float(), *(leaf.grad.float() for leaf in leaves if leaf.grad is not None)]
        )
    for short, fused in zip(*results, strict=True):
        assert_close(short, fused, rtol=0.03, atol=0.06)
    assert time <= LONGEST


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_in_a_packed_row_see_nothing_of_each_other(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    """Other tokens in one sequence: the hidden states of all others stay bit for bit, also in
    the layers' recomputation."""
    path = str(save_tiny_model(tmp_path / family, family, layers=2))
    model = ModelSource(ModelConfig(path=path), Head.lm, RankContext()).model.to(dtype)
    packing = packing_of([9, 9, 8, 2, 1])
    ids = torch.arange(3, 32)[None]
    begin, end = 9, 18
    other = ids.clone()
    other[0, begin:end] = 50
    with torch.no_grad():
        one, two = (
            model.base_model(input_ids=row, use_cache=False, **packing.arguments).last_hidden_state[
                0
            ]
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
        match=(
            r"packing is true, but attention eager .* set model\.attention=auto or set "
            r"packing=false"
        ),
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
    with pytest.raises(
        ValueError, match=r"do not fit LlamaForCausalLM.*unexpected \['score\.weight'\]"
    ):
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
