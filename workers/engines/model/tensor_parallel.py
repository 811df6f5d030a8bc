"""Tensor parallelism, with sequence-parallel norms, for any Hugging Face decoder that brings its
own tensor-parallel plan.

    scored = ScoredModel(model, Head.lm)
    parts = parallelize(model, mesh["tp"])   # once, before fully_shard; parameters become parts
    scored.split_vocabulary(mesh.get_group("tp"))       # log-probs from every rank's part of the vocabulary
    micro_batch = pad_time(micro_batch, tp)             # time must divide by tp
    scored(micro_batch.input_ids, ...)                  # the same numbers on every tensor rank

split_plan.py decides what is split how. A parameter of the model is then the rank's own part of the
checkpoint's, a plain tensor; `parts` says which. Between attention and MLP the activations are
split along time; the inputs of attention and MLP are gathered, their outputs reduce-scattered.

Every rank has equally many query heads. Key-value heads that tp does not divide are on every rank,
which computes those that its queries use. A fused projection is stored as one parameter for each of
its parts. Gradients of replicated parameters (norms, biases of row-parallel layers, those key-value
heads) are sums over the tensor ranks: the engine takes them once a step (TensorPart.partial). Of an
adapted layer (lora.py) the large side is split as the weight is: B's rows of a column-parallel
layer, A's columns of a row-parallel one, whose product joins the sum over ranks; the other matrix
is on every rank. The head of a critic or reward model is whole: every tensor rank computes all of
it from the same hidden states and has its whole gradient. So is a vision tower.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from hybridflow.resharding.shards import Box
from workers.engines.model.lora import LORA_A, LORA_B, Adapter
from workers.engines.model.scored import decoder_layers
from workers.engines.model.split_plan import (
    Kind,
    ModuleSplit,
    Segment,
    SplitPlan,
    check_fits,
    split_plan,
)
from workers.engines.model.tensor_collectives import (
    GatherHeads,
    GatherTime,
    GatherTimeOnce,
    ScatterTime,
    SliceTime,
    SumRanks,
)
from workers.engines.model.tensor_parts import TensorPart, whole_parts
from workers.engines.model.tower import decoder_of, split_features

QUERY_COUNTS = ("num_heads", "num_attention_heads", "n_heads")
KEY_COUNTS = ("num_key_value_heads", "num_kv_heads")
"""Attributes of attention modules that count the heads of the activations."""
Rows = list[tuple[int, int]]
"""Intervals [begin, end) of rows or columns."""


def parallelize(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    adapter: Adapter | None = None,
    *,
    divides_experts: bool = False,
) -> dict[str, TensorPart]:
    """Split `model` (a causal LM or a sequence classifier, whole or a pipeline stage of one) over
    the one-dimensional `mesh`, in place; what each of its parameters is, by its new name.

    Every rank must hold the same full weights, or weights on the meta device; nothing is sent. A
    mesh of one rank changes nothing. ValueError if the model has no plan or does not fit. `adapter`:
    the one that was put on the model. `divides_experts`: experts stay whole, for split_experts.
    """
    if mesh.size() == 1:
        return whole_parts(model)
    check_fits(model.config, mesh.size(), divides_experts=divides_experts)
    plan, group = split_plan(model, divides_experts=divides_experts), mesh.get_group()
    splitter = _Splitter(model, plan, group, adapter)
    splitter.split()
    for name, module in model.named_modules():
        if name in plan.gathering:
            module.register_forward_pre_hook(_gather_input(group), with_kwargs=True)
    split_features(model, group)
    first = decoder_layers(model)[0]
    if any(True for _ in first.parameters()):
        first.register_forward_pre_hook(
            lambda _, args: (SliceTime.apply(args[0], group), *args[1:])
        )
    gather = GatherTimeOnce if model.get_output_embeddings() is None else GatherTime
    decoder_of(model).get_submodule(plan.final).register_forward_hook(
        lambda _, args, output: gather.apply(output, group)
    )
    return splitter.parts()


class _Splitter:
    """Exchanges the parameters of all modules for this rank's parts, and wraps the modules whose
    forward pass changes."""

    def __init__(
        self,
        model: PreTrainedModel,
        plan: SplitPlan,
        group: ProcessGroup,
        adapter: Adapter | None,
    ) -> None:
        self.model, self.plan, self.group, self.adapter = model, plan, group, adapter
        self._adapted = frozenset(adapter.layers if adapter is not None else ())
        self.rank, self.tp = group.rank(), group.size()
        self._whole = whole_parts(model)
        self._exchanged: dict[tuple[int, Box], nn.Parameter] = {}
        """By the id of the whole parameter and the box: tied parameters stay tied."""
        self._alive = list(model.parameters())
        self._part_of: dict[int, TensorPart] = {}
        """By the id of the local parameter."""

    def split(self) -> None:
        for name, module in list(self.model.named_modules()):
            if name in self.plan.modules:
                self._split_module(name, module, self.plan.modules[name])
        for name, module in self.model.named_modules():
            if name in self.plan.gathering:
                self._count_heads(module)

    def parts(self) -> dict[str, TensorPart]:
        parameters = self.model.named_parameters(remove_duplicate=False)
        return {name: self._part_of[id(parameter)] for name, parameter in parameters}

    def _split_module(self, name: str, module: nn.Module, split: ModuleSplit) -> None:
        if split.kind is Kind.column:
            self._split_column(name, module, split.segments)
        elif split.kind is Kind.row:
            assert isinstance(module, nn.Linear)
            self._exchange(name, module, "weight", split.segments[0], dim=1)
            self._replicate(name, module, "bias")
            self._exchange(name, module, LORA_A, split.segments[0], dim=1)
            self._replicate(name, module, LORA_B)
            adapter = self._adapter_of(name)
            module.forward = _row(module, self.group, adapter)  # type: ignore[method-assign]
        elif split.kind is Kind.embedding:
            assert isinstance(module, nn.Embedding)
            self._exchange(name, module, "weight", split.segments[0])
            interval = split.segments[0].interval(self.rank, self.tp)
            module.forward = _embedding(module, interval, self.group)  # type: ignore[method-assign]
        elif split.kind is Kind.experts:
            for attribute, parameter in list(module.named_parameters(recurse=False)):
                self._set(module, parameter, attribute, self._whole[f"{name}.{attribute}"])
        else:
            for attribute, _ in list(module.named_parameters(recurse=False)):
                self._replicate(name, module, attribute, partial=split.kind is not Kind.whole)
        if split.kind is Kind.wide_norm:
            segment = split.segments[0]
            if self._is_shared(segment):
                norm = _norm_of_all(module.forward, self._rows_used(segment))
            else:
                norm = _norm_of_parts(module.forward, self.group)
            module.forward = norm  # type: ignore[method-assign]

    def _split_column(self, name: str, module: nn.Module, segments: tuple[Segment, ...]) -> None:
        """One parameter for each segment: weight, or weight_0, weight_1 and so on."""
        fused = len(segments) > 1
        suffixes = [f"_{index}" for index in range(len(segments))] if fused else [""]
        rows_used: list[Rows | None] = []
        for segment, suffix in zip(segments, suffixes, strict=True):
            for attribute in ("weight", "bias", LORA_B):
                self._exchange(name, module, attribute, segment, new=attribute + suffix)
            selects = self._is_shared(segment) and not self._norm_selects(name)
            rows_used.append(self._rows_used(segment) if selects else None)
        self._replicate(name, module, LORA_A)
        adapter = self._adapter_of(name)
        if fused:
            module._parameters.update(weight=None, bias=None)
            if adapter is not None:
                module._parameters[LORA_B] = None
        if fused or any(rows_used):
            column = _column(module, suffixes, rows_used, adapter)
            module.forward = column  # type: ignore[method-assign]

    def _adapter_of(self, name: str) -> Adapter | None:
        return self.adapter if name in self._adapted else None

    def _norm_selects(self, name: str) -> bool:
        """Whether a norm over all heads follows: it needs them all, and selects."""
        parent, _, last = name.rpartition(".")
        norm = self.plan.modules.get(f"{parent}.k_norm")
        return last == "k_proj" and norm is not None and norm.kind is Kind.wide_norm

    def _is_shared(self, segment: Segment) -> bool:
        """Whether all ranks hold all of it."""
        return segment.keys and segment.units % self.tp != 0

    def _rows_used(self, segment: Segment) -> Rows:
        """Where the key-value heads that this rank uses are among those of the segment."""
        heads = self.plan.heads.needed(self.rank, self.tp)
        return [(head * segment.unit, (head + 1) * segment.unit) for head in heads]

    def _count_heads(self, module: nn.Module) -> None:
        """What an attention module knows of its heads, as this rank has them."""
        heads = self.plan.heads
        queries, keys = heads.queries // self.tp, heads.keys // self.tp
        if heads.keys % self.tp:
            keys = len(heads.needed(self.rank, self.tp))
        known = vars(module)
        counts = {name: queries for name in QUERY_COUNTS if known.get(name) == heads.queries}
        counts |= {name: keys for name in KEY_COUNTS if known.get(name) == heads.keys}
        if "num_key_value_groups" in known:
            counts["num_key_value_groups"] = queries // keys
            config = copy.copy(known["config"])
            config.num_attention_heads, config.num_key_value_heads = queries, keys
            known["config"] = config
        known.update(counts)

    def _exchange(
        self,
        name: str,
        module: nn.Module,
        attribute: str,
        segment: Segment,
        *,
        new: str | None = None,
        dim: int = 0,
    ) -> None:
        """The rank's interval of a parameter in its place, or under the name `new`."""
        parameter = module._parameters.get(attribute)
        if parameter is None:
            return
        begin, end = segment.interval(self.rank, self.tp)
        start, shape = [0] * parameter.ndim, list(parameter.shape)
        start[dim], shape[dim] = begin, end - begin
        box, shared = Box(tuple(start), tuple(shape)), self._is_shared(segment)
        part = replace(
            self._whole[f"{name}.{attribute}"], box=box, replicated=shared, partial=shared
        )
        self._set(module, parameter, new or attribute, part)

    def _replicate(
        self, name: str, module: nn.Module, attribute: str, *, partial: bool = True
    ) -> None:
        parameter = module._parameters.get(attribute)
        if parameter is not None:
            whole = self._whole[f"{name}.{attribute}"]
            part = replace(whole, replicated=True, partial=partial)
            self._set(module, parameter, attribute, part)

    def _set(
        self, module: nn.Module, whole: nn.Parameter, attribute: str, part: TensorPart
    ) -> None:
        key = id(whole), part.box
        if key not in self._exchanged:
            local = part.of(whole.detach()).clone(memory_format=torch.contiguous_format)
            self._exchanged[key] = nn.Parameter(local, requires_grad=whole.requires_grad)
            self._part_of[id(self._exchanged[key])] = part
        module._parameters[attribute] = self._exchanged[key]


# Forward passes on a rank's parts.


def _column(
    module: nn.Module,
    suffixes: list[str],
    rows_used: list[Rows | None],
    adapter: Adapter | None,
) -> Callable[..., Tensor]:
    """A linear of several segments, or of key-value heads of which the rank uses some."""

    def run(hidden: Tensor) -> Tensor:
        outputs = []
        for suffix, rows in zip(suffixes, rows_used, strict=True):
            weight = module._parameters[f"weight{suffix}"]
            bias = module._parameters.get(f"bias{suffix}")
            assert weight is not None
            chosen = weight if rows is None else _select(weight, rows, 0)
            if bias is not None and rows is not None:
                output = F.linear(hidden, chosen, _select(bias, rows, 0))
            else:
                output = F.linear(hidden, chosen, bias)
            if adapter is not None and adapter.enabled:
                a, b = module._parameters[LORA_A], module._parameters[f"{LORA_B}{suffix}"]
                assert b is not None
                used = b if rows is None else _select(b, rows, 0)
                output = output + adapter.added(hidden, a, used)
            outputs.append(output)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    return run


def _row(module: nn.Linear, group: ProcessGroup, adapter: Adapter | None) -> Callable[..., Tensor]:
    """The output is summed over ranks and split along time; the bias is added once, after the
    sum."""

    def run(hidden: Tensor) -> Tensor:
        product = F.linear(hidden, module.weight)
        if adapter is not None and adapter.enabled:
            matrices = module._parameters[LORA_A], module._parameters[LORA_B]
            product = product + adapter.added(hidden, *matrices)
        if product.ndim == 2:
            product = product.unflatten(0, (-1, group.size()))
        output: Tensor = ScatterTime.apply(product, group).view(
            *hidden.shape[:-2], -1, product.shape[-1]
        )
        return output if module.bias is None else output + module.bias

    return run


def _embedding(
    module: nn.Embedding, interval: tuple[int, int], group: ProcessGroup
) -> Callable[..., Tensor]:
    """A token's row comes from the rank that has it."""
    start, end = interval
    forward = module.forward
    if module.padding_idx is not None:  # its row gets no gradient, on the rank that has it
        inside = start <= module.padding_idx < end
        module.padding_idx = module.padding_idx - start if inside else None

    def run(input_ids: Tensor) -> Tensor:
        outside = (input_ids < start) | (input_ids >= end)
        rows = forward((input_ids - start).masked_fill(outside, 0))
        total: Tensor = SumRanks.apply(rows.masked_fill(outside[..., None], 0.0), group)
        return total

    return run


def _norm_of_parts(forward: Callable[[Tensor], Tensor], group: ProcessGroup) -> Any:
    """A norm over the heads of all ranks, each of which goes on with its own."""

    def run(part: Tensor) -> Tensor:
        whole: Tensor = GatherHeads.apply(part, group)
        return forward(whole).chunk(group.size(), dim=-1)[group.rank()]

    return run


def _norm_of_all(forward: Callable[[Tensor], Tensor], rows: Rows) -> Any:
    """A norm over heads that are all here, of which the rank goes on with some."""

    def run(whole: Tensor) -> Tensor:
        return _select(forward(whole), rows, -1)

    return run


def _select(tensor: Tensor, rows: Rows, dim: int) -> Tensor:
    if len(rows) == 1:
        begin, end = rows[0]
        return tensor.narrow(dim, begin, end - begin)
    return torch.cat([tensor.narrow(dim, begin, end - begin) for begin, end in rows], dim)


def _gather_input(group: ProcessGroup) -> Callable[..., Any]:
    def gather(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "hidden_states" in kwargs:
            whole = GatherTime.apply(kwargs["hidden_states"], group)
            return args, {**kwargs, "hidden_states": whole}
        if args[0].ndim == 2:  # an MLP's tokens of all rows: those of all ranks, side by side
            tokens = GatherTime.apply(args[0][:, None], group).flatten(0, 1)
            return (tokens, *args[1:]), kwargs
        return (GatherTime.apply(args[0], group), *args[1:]), kwargs

    return gather
