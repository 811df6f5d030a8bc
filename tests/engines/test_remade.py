"""What the backward pass makes again: the same gradients, bit for bit, with less kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.engines.kept import kept_bytes
from workers.engines.model.attention import use_sequence_attention
from workers.engines.model.packing import packing_of
from workers.engines.model.remade import remake

KINDS = {
    "llama": {},
    "phi3": {"pad_token_id": 0},  # gate and up in one matrix
    "gemma2": {"head_dim": 16, "sliding_window": 6, "attn_logit_softcapping": None},
    "starcoder2": {},  # no gate
}
LENGTHS, PREFIXES = [9, 4, 4, 7, 5], [-1, 0, 0, 0, -1]


def tiny(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        num_hidden_layers=2,
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=80,
        vocab_size=61,
        **KINDS[kind],
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    use_sequence_attention(model, fused=True)
    return model


def gradients(model: nn.Module, *, shared: bool) -> list[Tensor]:
    prefixes = PREFIXES if shared else None
    packing = packing_of(LENGTHS, prefixes)
    ids = torch.arange(sum(LENGTHS))[None] * 7 % 61
    logits = model(input_ids=ids, use_cache=False, **packing.arguments).logits
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    return list(torch.autograd.grad((logits * weights).sum(), list(model.parameters())))


@pytest.mark.parametrize("shared", [True, False], ids=["shared prompts", "apart"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_equal_bit_for_bit(kind: str, shared: bool) -> None:
    model = tiny(kind)
    plain = gradients(model, shared=shared)
    remake(model)
    for one, other in zip(plain, gradients(model, shared=shared), strict=True):
        assert torch.equal(one, other)


def test_copies_of_a_prompts_keys_and_values_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine responses of 4 tokens to a prompt of 50. 2 of 6 heads have keys; without recipes each
    layer keeps what is taken for 50 + 9 x 54 places and repeats them for the responses' heads."""
    lengths, prefixes = [50] + [4] * 9, [-1] + [0] * 9
    packing = packing_of(lengths, prefixes)
    ids = torch.arange(sum(lengths))[None] % 61

    def run(model: PreTrainedModel) -> Tensor:
        return model(input_ids=ids, use_cache=False, **packing.arguments).logits

    model = tiny("llama")
    plain, none = kept_bytes(lambda: run(model), monkeypatch)
    remake(model)
    less, number = kept_bytes(lambda: run(model), monkeypatch)
    assert none == 0 and number == 2 * (2 * 2 + 2)  # layers x (runs x keys and values + the MLP's)
    taken = (50 + 9 * 54) * 2 * 8
    repeated = 9 * 54 * 6 * 8
    products = 2 * 80 * sum(lengths)
    assert plain - less == 2 * 4 * (2 * taken + 2 * repeated + products)


class Odd(nn.Module):
    """Modules of the known names that compute something else."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(6, 8), nn.Linear(6, 8)
        self.act_fn, self.down_proj = nn.SiLU(), nn.Linear(8, 6)
        self.is_causal = True

    def forward(self, x: Tensor, case: str) -> Tensor:
        active, up = self.act_fn(self.gate_proj(x)), self.up_proj(x)
        if case == "scaled":
            inner = active * up * 2
        elif case == "activation twice":
            inner = active * active
        elif case == "up changed":
            inner = active * up.tanh()
        elif case == "no product":
            inner = active + up
        else:
            inner = active * up
        return self.down_proj(inner)


class Transposed(nn.Linear):
    """Autograd keeps a transposed view of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ x.T).T


def test_a_transposed_view_of_the_product_is_kept_itself() -> None:
    torch.manual_seed(0)
    module, x = Odd(), torch.randn(3, 6, requires_grad=True)
    module.down_proj = Transposed(8, 6, bias=False)
    leaves = [x, *module.parameters()]
    expected = torch.autograd.grad(module(x, "plain").square().sum(), leaves)
    remake(module)
    for one, other in zip(
        expected, torch.autograd.grad(module(x, "plain").square().sum(), leaves), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "case", ["plain", "scaled", "activation twice", "up changed", "no product"]
)
def test_another_mlp_of_the_same_names_has_its_own_gradients(case: str) -> None:
    torch.manual_seed(0)
    module, x = Odd(), torch.randn(3, 6, requires_grad=True)
    leaves = [
        x,
        *(p for n, p in module.named_parameters() if case != "activation twice" or "up" not in n),
    ]
    expected = torch.autograd.grad(module(x, case).square().sum(), leaves)
    remake(module)
    for _ in range(2):
        for one, other in zip(
            expected, torch.autograd.grad(module(x, case).square().sum(), leaves), strict=True
        ):
            assert torch.equal(one, other)


def test_an_error_inside_an_mlp_leaves_no_hooks() -> None:
    module = Odd()
    remake(module)
    with pytest.raises(RuntimeError):
        module(torch.randn(3, 5), "plain")
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
