"""Log-probs from hidden states and the head in chunks: against log_softmax of whole logits,
gradients too, and what follows the head against the family's own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from workers.engines.base import Head
from workers.engines.model import log_probs
from workers.engines.model.log_probs import head_log_probs, logits_tail
from workers.engines.model.scored import ScoredModel

TOKENS, HIDDEN, VOCAB = 23, 8, 101


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and bias, each of which wants a gradient."""
    random = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, HIDDEN), (VOCAB, HIDDEN), (VOCAB,))
    hidden, weight, bias = (
        (2 * torch.randn(shape, generator=random)).to(dtype).requires_grad_() for shape in shapes
    )
    return hidden, weight, bias


def capped(logits: Tensor) -> Tensor:
    return 5.0 * torch.tanh(logits / 5.0)


@pytest.mark.parametrize("chunk", [VOCAB * TOKENS, 4 * VOCAB], ids=["one chunk", "six chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("tail", [None, capped])
def test_values_and_gradients_equal_those_of_whole_logits(
    chunk: int, dtype: torch.dtype, temperature: float, entropy: bool, tail: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(log_probs, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(log_probs, "CACHE_ELEMENTS", 3 * VOCAB)
    targets = torch.arange(TOKENS) * 7 % VOCAB
    weights = torch.linspace(-1, 1, TOKENS)
    ours, plain = inputs(dtype), inputs(dtype)
    values, entropies = head_log_probs(
        *ours, targets, temperature=temperature, entropy=entropy, tail=tail
    )
    logits = F.linear(*plain)
    table = torch.log_softmax((logits if tail is None else tail(logits)).float() / temperature, -1)
    expected = table.gather(-1, targets[:, None]).squeeze(-1)
    assert_close(values, expected, rtol=1e-5, atol=2e-5)
    loss, reference = (weights * values).sum(), (weights * expected).sum()
    assert (entropies is not None) == entropy
    if entropies is not None:
        expected_entropies = -(table.exp() * table).sum(-1)
        assert_close(entropies, expected_entropies, rtol=1e-5, atol=2e-5)
        loss = loss + entropies.square().sum()
        reference = reference + expected_entropies.square().sum()
    loss.backward()
    reference.backward()
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 4e-2}
    )
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine.grad is not None and mine.grad.dtype is dtype
        assert_close(mine.grad, theirs.grad, **tolerance)


def test_logits_without_a_head() -> None:
    logits = inputs(torch.float32)[1].detach()
    targets = torch.arange(VOCAB) % HIDDEN
    values, _ = head_log_probs(logits, None, None, targets, temperature=0.5)
    expected = torch.log_softmax(logits / 0.5, -1).gather(-1, targets[:, None]).squeeze(-1)
    assert_close(values, expected)


def test_no_tokens_have_no_log_probs_but_gradients() -> None:
    hidden = torch.zeros(0, HIDDEN, requires_grad=True)
    weight = torch.ones(VOCAB, HIDDEN, requires_grad=True)
    values, _ = head_log_probs(hidden, weight, None, torch.zeros(0, dtype=torch.int64))
    values.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, HIDDEN)
    assert weight.grad is not None and not weight.grad.any()


def test_memory_is_that_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of tokens x vocabulary is made, forward or backward."""
    monkeypatch.setattr(log_probs, "CHUNK_ELEMENTS", 4 * VOCAB)
    monkeypatch.setattr(log_probs, "CACHE_ELEMENTS", 2 * VOCAB)
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = function(*args, **(kwargs or {}))
            largest.append(result.numel() if isinstance(result, Tensor) else 0)
            return result

    with Sizes():
        values, entropies = head_log_probs(
            *inputs(torch.float32), torch.zeros(TOKENS, dtype=torch.int64), entropy=True
        )
        assert entropies is not None
        (values.sum() + entropies.sum()).backward()
    assert max(largest) == VOCAB * HIDDEN  # the weight and its gradient


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 16},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "gpt2": {},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 48},
    "phi": {},
    "falcon_h1": {
        "lm_head_multiplier": 0.5,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_state": 16,
    },
    "mixtral": {"num_local_experts": 2},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_scores_equal_the_families_own_logits(kind: str) -> None:
    """Soft-caps, scalings, biases and projections are the family's own."""
    config = AutoConfig.for_model(
        kind,
        **{
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "vocab_size": 61,
            "max_position_embeddings": 32,
            "pad_token_id": 0,
            "bos_token_id": 0,
            "eos_token_id": 0,
            **FAMILIES[kind],
        },
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0)
    ids = torch.randint(1, 61, (2, 7), generator=torch.Generator().manual_seed(1))
    expected = torch.log_softmax(model(input_ids=ids, use_cache=False).logits.float(), -1)[0, 1:4]
    numbers = ScoredModel(model, Head.lm)(ids, torch.tensor([1, 2, 3]), torch.tensor([5, 6, 7]))
    picked = expected[torch.arange(3), torch.tensor([5, 6, 7])]
    assert_close(numbers["log_probs"], picked, rtol=1e-4, atol=1e-4)


def test_more_than_a_linear_layer_is_refused_by_name() -> None:
    config = AutoConfig.for_model("roberta", is_decoder=True, hidden_size=32, num_attention_heads=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="roberta has more than a linear layer"):
        logits_tail(model)


def test_the_tail_runs_no_hooks_of_the_decoder() -> None:
    """Those that an engine adds later (ZeRO-3's) look for what the decoder alone has."""
    config = AutoConfig.for_model(
        "granite", hidden_size=32, num_attention_heads=2, num_hidden_layers=1, logits_scaling=4.0
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tail = logits_tail(model)
    assert tail is not None
    model.base_model.register_forward_pre_hook(lambda *_: pytest.fail("a hook ran"))
    assert torch.equal(tail(torch.ones(3, 5)), torch.full((3, 5), 0.25))
