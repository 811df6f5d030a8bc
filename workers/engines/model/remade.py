"""Tensors that the backward pass makes again instead of keeping them from the forward pass: copies, and
element-wise results whose inputs are kept anyway.

    remake(model)   # once; every pass with gradients from then on

Not together with activation checkpointing, offloading or torch.compile, which see to it themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv

from workers.engines.model.packing import Run

Make = Callable[[], Tensor]
Strides = tuple[torch.dtype, tuple[int, ...]]
REMAKES = "remakes_copies"
"""Attribute of a model's attention modules: attend() keeps no copies of keys and values."""


def remake(model: PreTrainedModel) -> None:
    """From now on passes with gradients keep neither copies of keys and values nor, on a CPU, what
    gated MLPs make of gate and up."""
    for module in model.modules():
        if hasattr(module, "is_causal"):
            setattr(module, REMAKES, True)
        act = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
        down = getattr(module, "down_proj", None)
        if isinstance(act, nn.Module) and isinstance(down, nn.Module):
            _GatedProduct(module, act, down)


@dataclass(frozen=True, slots=True)
class Remade:
    """Stands in autograd's graph for a tensor."""

    make: Make
    shape: torch.Size


class Recipes:
    """Tensors by memory, each with what makes the same numbers again."""

    def __init__(self) -> None:
        self._makes: dict[tuple[int, int], tuple[Strides, Make]] = {}

    def add(self, tensor: Tensor, make: Make) -> None:
        """`tensor` must live until the hooks end."""
        self._makes[tensor.data_ptr(), tensor.numel()] = _strides(tensor), make

    def hooks(self) -> saved_tensors_hooks:
        """While they hold autograd keeps a recipe in place of its tensor."""
        return saved_tensors_hooks(self.pack, _unpack)

    def pack(self, tensor: Tensor) -> Tensor | Remade:
        """The recipe in place of a tensor that has one."""
        strides, make = self._makes.get((tensor.data_ptr(), tensor.numel()), (None, None))
        # A view of another order, such as the transposed one, is kept.
        alike = strides == _strides(tensor)
        return Remade(make, tensor.shape) if make is not None and alike else tensor

    def of(self, tensor: Tensor) -> Make:
        """Makes `tensor`, which has a recipe."""
        return self._makes[tensor.data_ptr(), tensor.numel()][1]


def _strides(tensor: Tensor) -> Strides:
    """Equal for views in which the numbers have the same order and type: contiguous ones have one."""
    shape = () if tensor.is_contiguous() else (*tensor.shape, *tensor.stride())
    return tensor.dtype, shape


def _unpack(kept: Tensor | Remade) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    with torch.no_grad():
        return kept.make().reshape(kept.shape)


@dataclass(frozen=True, slots=True)
class Copied:
    """Where copies of keys and values come from: rows of what the layer computed, as often as
    segments of a packed row see them, for every head that reads them."""

    sources: tuple[Tensor, Tensor]
    """Keys and values [tokens, key_value_heads, head_dim]."""
    rows: Tensor | None
    """int64 [keys]: those that are copied; None: all, once."""
    run: Run | None = None
    """The segments whose keys they are; None: the result stays [keys, key_value_heads, head_dim]."""
    copies: int = 1
    """For each head."""

    def of_run(self, begin: int, run: Run) -> Copied:
        """The rows from `begin` on that `run` reads."""
        end = begin + run.num_keys
        if self.rows is not None:
            return replace(self, rows=self.rows[begin:end], run=run)
        keys, values = self.sources
        return replace(self, sources=(keys[begin:end], values[begin:end]), run=run)

    def hooks(self, key: Tensor, value: Tensor) -> AbstractContextManager[Any]:
        """While they hold autograd keeps the sources in place of their copies key and value."""
        if self.rows is None and self.copies == 1:
            return nullcontext()
        recipes = Recipes()
        for copy, source in zip((key, value), self.sources, strict=True):
            recipes.add(copy, partial(self._again, source))
        return recipes.hooks()

    def _again(self, source: Tensor) -> Tensor:
        taken = source if self.rows is None else source.index_select(0, self.rows)
        if self.run is None:
            return taken
        shape = (self.run.count, self.run.prefix + self.run.length)
        return repeat_kv(taken.unflatten(0, shape).transpose(1, 2), self.copies)


class _GatedProduct:
    """The hooks of one MLP, down(act(gate) * up): the backward pass makes act(gate) and the product
    again. How the product came about is read off autograd's graph; anything else is kept."""

    def __init__(self, mlp: nn.Module, act: nn.Module, down: nn.Module) -> None:
        self._recipes = Recipes()
        self._hooks: saved_tensors_hooks | None = None
        self._active: Tensor | None = None
        self._factors: list[Tensor] = []
        """Autograd has kept them since the activation."""
        mlp.register_forward_pre_hook(self._begin)
        mlp.register_forward_hook(self._end, always_call=True)
        act.register_forward_hook(self._activated)
        down.register_forward_pre_hook(self._multiplied)

    def _begin(self, _mlp: nn.Module, arguments: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() and arguments and arguments[0].device.type == "cpu":
            self._recipes = Recipes()
            self._hooks = saved_tensors_hooks(self._pack, _unpack)
            self._hooks.__enter__()

    def _end(self, *_: Any) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(None, None, None)
        self._hooks = self._active = None
        self._recipes, self._factors = Recipes(), []

    def _activated(self, act: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if self._hooks is not None and arguments and output.grad_fn is not None:
            self._active = output
            self._recipes.add(output, partial(act.forward, arguments[0].detach()))

    def _multiplied(self, _down: nn.Module, arguments: tuple[Any, ...]) -> None:
        active = self._active
        if active is None or not arguments:
            return
        product = arguments[0]
        node = product.grad_fn
        if node is None or node.name() != "MulBackward0":
            return
        factors = list(node.next_functions)
        if (active.grad_fn, active.output_nr) not in factors:
            return
        factors.remove((active.grad_fn, active.output_nr))
        for other in self._factors:
            if (other.grad_fn, other.output_nr) == factors[0] and other.shape == product.shape:
                remade = self._recipes.of(active)
                self._recipes.add(product, partial(_product, remade, other.detach()))

    def _pack(self, tensor: Tensor) -> Tensor | Remade:
        if self._active is not None:
            self._factors.append(tensor)
        return self._recipes.pack(tensor)


def _product(make: Make, other: Tensor) -> Tensor:
    return make() * other
