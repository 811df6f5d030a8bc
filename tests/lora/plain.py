"""LoRA as its paper has it, with plain PyTorch: every adapted layer multiplies by W + s B A, in one
matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.engines.threed_cases import PlainRun, loss_fn, plain_outputs
from workers.config import OptimizerConfig
from workers.engines.base import Head
from workers.sequences import Sequences


class Merged(nn.Module):
    """A linear layer with an adapter."""

    def __init__(self, layer: nn.Linear, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = layer.weight, layer.bias, scale
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight + self.scale * self.b @ self.a, self.bias)


def matrices_of(directory: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (A, B) of a PEFT directory."""
    stored = load_file(directory / "adapter_model.safetensors")
    result = {}
    for name, a in stored.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            result[layer] = (a, stored[name.replace("lora_A", "lora_B")])
    return result


def adapt(
    model: PreTrainedModel, matrices: Mapping[str, tuple[Tensor, Tensor]], scale: float
) -> None:
    """Puts the adapter on `model` and freezes everything else but a score head."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("score."))
    for name, (a, b) in matrices.items():
        parent, _, last = name.rpartition(".")
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(model.get_submodule(parent), last, Merged(layer, a, b, scale))


def plain_lora_run(
    model: PreTrainedModel, head: Head, batches: Sequence[Sequences], config: OptimizerConfig
) -> PlainRun:
    """One optimizer step per batch over what requires gradients; parameters are named as the
    engine names them."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        list(trained.values()),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )
    with torch.no_grad():
        run = PlainRun(outputs=plain_outputs(model, head, batches[0]))
    for batch in batches:
        optimizer.zero_grad()
        loss, _ = loss_fn(plain_outputs(model, head, batch), batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), config.clip_grad_norm)
        optimizer.step()
        run.losses.append(loss.item())
        run.grad_norms.append(norm.item())
    for name, parameter in trained.items():
        head_name, _, last = name.rpartition(".")
        name = f"{head_name}.lora_{last.upper()}" if last in "ab" else name
        run.parameters[name] = parameter.detach().clone()
    return run
