"""How tensor parallelism splits each module of a Hugging Face decoder, decided before anything is
loaded.

    plan = split_plan(model, tp)        # model may be on meta; ValueError for what can't be split
    plan.modules["model.layers.0.mlp.down_proj"].kind       # Kind.row

Which linears split by columns and which by rows is read from transformers' own
`base_model_tp_plan`; there is no table of models. Where that plan gathers the outputs of a
projection (fused projections, norms over all heads), the outputs stay split here: a fused
projection is split inside each of its parts, a norm over all heads gathers by itself. Attention is
split by heads, everything else by single columns; sizes that do not divide give parts that differ
by one. Experts are never split: with expert parallelism (expert_parallel.py) they stay whole, and routers
see the tokens of their rank alone. Left out, and refused: experts without it, latent attention,
layers that carry a state.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from enum import StrEnum, auto
from fnmatch import fnmatch
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel

from workers.engines.model.expert_parallel import find_experts
from workers.engines.model.router import router_modules
from workers.engines.model.tower import decoder_of
from workers.images import family_of

COLUMN = ("colwise", "colwise_gather_output")
ROW = ("rowwise", "rowwise_split_input")
REPLICATED = ("replicated_with_grad_allreduce", "replicated")
"""The entries of transformers' plans that are understood for the modules of a layer."""
FUSED_HEADS, FUSED_HALVES = "qkv_proj", "gate_up_proj"
"""Linears that fuse queries, keys and values one after the other, or two equal halves."""
KEYS = ("k_proj", "v_proj")
SPLIT_OUTPUTS = (FUSED_HEADS, FUSED_HALVES, "q_proj", *KEYS)
"""Linears whose outputs can stay split although transformers' plan gathers them."""
WIDE_NORMS = {"q_norm": "q_proj", "k_norm": "k_proj"}
"""Norms that some families take over all heads, and the linear before each."""


class Kind(StrEnum):
    """The treatment of a module's parameters."""

    column = auto()
    row = auto()
    embedding = auto()
    wide_norm = auto()
    """A norm over all heads: replicated, its input is gathered."""
    replicated = auto()
    """Each tensor rank computes its share of the gradient."""
    whole = auto()
    """Every tensor rank computes all of it, alike: the head of a critic, a vision tower."""
    experts = auto()
    """Divided over the expert group, each whole on its rank."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Features [start, start + size) of a module, in `units` of equal size that stay in one
    piece."""

    start: int
    size: int
    units: int
    keys: bool = False
    """The units are key-value heads, which ranks may share."""

    @property
    def unit(self) -> int:
        return self.size // self.units

    def interval(self, rank: int, tp: int) -> tuple[int, int]:
        """The features [begin, end) of a rank; all of them where key-value heads do not divide."""
        if self.keys and self.units % tp:
            return self.start, self.start + self.size
        first, last = bounds(self.units, rank, tp)
        return self.start + first * self.unit, self.start + last * self.unit


@dataclass(frozen=True, slots=True)
class ModuleSplit:
    kind: Kind
    segments: tuple[Segment, ...] = ()
    """The features that are split; several segments in a fused projection."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Query and key-value heads of a layer of attention."""

    queries: int
    keys: int

    def needed(self, rank: int, tp: int) -> tuple[int, ...]:
        """The key-value heads of a rank's queries: each once where equally many queries use it,
        else one for each query."""
        first, last = bounds(self.queries, rank, tp)
        used = [query * self.keys // self.queries for query in range(first, last)]
        heads = sorted(set(used))
        if len({used.count(head) for head in heads}) > 1:
            return tuple(used)
        return tuple(heads)


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitPlan:
    heads: Heads
    modules: dict[str, ModuleSplit] = field(default_factory=dict)
    """Every module that has parameters, by name."""
    gathering: set[str] = field(default_factory=set)
    """Modules of a layer (attention, MLP) whose input is gathered over time."""
    final: str = "norm"
    """The last module of the decoder."""


def bounds(count: int, rank: int, tp: int) -> tuple[int, int]:
    """The units [begin, end) of a rank; ranks differ by one at most."""
    return rank * count // tp, (rank + 1) * count // tp


def check_fits(config: PretrainedConfig, tp: int, *, divides_experts: bool = False) -> None:
    """ValueError, with the sizes that fit, for a model that can't be split over `tp` ranks; needs
    no weights. `divides_experts`: with expert parallelism."""
    if tp == 1:
        return
    why = _why_not(_Frozen(config), divides_experts)
    if why is not None:
        usable = "use tp=1"
        if not divides_experts and _why_not(_Frozen(config), True) is None:
            usable = "use tp=1, or train.ep, which leaves experts whole"
        raise ValueError(f"tp={tp}: {why}; {usable}")
    sizes = fitting_sizes(config, divides_experts=divides_experts)
    if tp not in sizes:
        raise ValueError(
            f"tp={tp} does not fit {config.model_type}: it must divide num_attention_heads "
            f"{heads_of(config).queries}; sizes that fit: {', '.join(map(str, sizes))}"
        )


def fitting_sizes(config: PretrainedConfig, *, divides_experts: bool = False) -> list[int]:
    """Tensor-parallel sizes that fit the model, ascending; only 1 for one that can't be split."""
    if _why_not(_Frozen(config), divides_experts) is not None:
        return [1]
    queries = heads_of(config).queries
    return [size for size in range(1, queries + 1) if queries % size == 0]


def heads_of(config: PretrainedConfig) -> Heads:
    """A decoder without a count of its own has one head: it can't be split."""
    queries = _setting(config, "num_attention_heads") or 1
    return Heads(queries, _setting(config, "num_key_value_heads") or queries)


def _setting(config: PretrainedConfig, name: str) -> int | None:
    text = config.get_text_config()
    value = text.to_dict().get(text.attribute_map.get(name, name))
    return value if isinstance(value, int) else None


class _Frozen:
    """A configuration as the key of a cache."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self.text = config.to_json_string(use_diff=False)

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and other.text == self.text


@lru_cache(maxsize=16)
def _why_not(frozen: _Frozen, divides_experts: bool) -> str | None:
    """Why a model of this configuration can't be split, None if it can."""
    config = copy.deepcopy(frozen.config)
    if not tensor_plan(config):
        return f"transformers has no tensor-parallel plan for {config.model_type}"
    try:
        with torch.device("meta"):
            split_plan(AutoModel.from_config(config), divides_experts=divides_experts)
    except ValueError as error:
        return str(error)
    return None


def tensor_plan(config: PretrainedConfig) -> dict[str, str]:
    """transformers' tensor-parallel plan of the decoder; empty if it has none."""
    return dict(_with_plans(config).base_model_tp_plan or {})


def pipeline_plan(config: PretrainedConfig) -> dict[str, Any]:
    """transformers' pipeline plan of the decoder: its modules in order; empty if it has none."""
    return dict(_with_plans(config).base_model_pp_plan or {})


def _with_plans(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration that has the decoder's plans."""
    family = family_of(config)
    if family is None:
        return config
    if not family.decoder:
        return config.get_text_config()
    kind: PretrainedConfig = CONFIG_MAPPING[family.decoder]()
    return kind


def split_plan(model: PreTrainedModel, *, divides_experts: bool = False) -> SplitPlan:
    """How the modules of `model` (a decoder, with or without a head) are split; ValueError that
    names the first one that can't be."""
    by_token: dict[str, Kind] = {}
    if divides_experts:
        by_token = dict.fromkeys(find_experts(model), Kind.experts)
        by_token |= dict.fromkeys(router_modules(model), Kind.replicated)
    config, base, decoder = model.config, model.base_model, decoder_of(model)
    entries, stages = tensor_plan(config), pipeline_plan(config)
    if not stages:
        raise ValueError(f"transformers does not say which module of {config.model_type} is last")
    plan = SplitPlan(heads=heads_of(config), final=list(stages)[-1])
    prefix = next(f"{name}." for name, module in model.named_modules() if module is decoder)
    prefix = prefix.removeprefix(".")
    for name, module in model.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        inner = name.removeprefix(prefix)
        entry = None
        for pattern, style in entries.items():
            if fnmatch(inner, pattern):
                entry = style
                break
        if module is model.get_input_embeddings():
            assert isinstance(module, nn.Embedding)
            size = module.num_embeddings
            plan.modules[name] = ModuleSplit(Kind.embedding, (Segment(0, size, size),))
        elif base is not model and module is model.get_output_embeddings():
            assert isinstance(module, nn.Linear)
            size = module.out_features
            plan.modules[name] = ModuleSplit(Kind.column, (Segment(0, size, size),))
        elif not f"{name}.".startswith(prefix):
            plan.modules[name] = ModuleSplit(Kind.whole)
        elif name in by_token:
            plan.modules[name] = ModuleSplit(by_token[name])
        else:
            split = _module_split(model, name, module, entry, plan.heads)
            plan.modules[name] = split
            if split.kind is Kind.column:
                plan.gathering.add(name.rpartition(".")[0])
    return plan


def _module_split(
    model: PreTrainedModel, name: str, module: nn.Module, entry: str | None, heads: Heads
) -> ModuleSplit:
    """The split of a module inside the decoder."""
    parent, _, last = name.rpartition(".")
    if isinstance(module, nn.Linear) and entry in COLUMN:
        if entry == "colwise" or last in SPLIT_OUTPUTS:
            segments = _segments(name, module.out_features, heads)
            return ModuleSplit(Kind.column, segments)
    elif isinstance(module, nn.Linear) and entry in ROW:
        units = heads.queries if _is_attention(parent) else module.in_features
        if module.in_features % units == 0:
            segment = Segment(0, module.in_features, units)
            return ModuleSplit(Kind.row, (segment,))
    elif entry in REPLICATED or entry is None:
        shapes = [parameter.shape for parameter in module.parameters(recurse=False)]
        is_leaf = not any(True for _ in module.children())
        if is_leaf and all(len(shape) == 1 for shape in shapes):
            before = f"{parent}.{WIDE_NORMS[last]}" if last in WIDE_NORMS else None
            if before is None or shapes[0][0] != model.get_submodule(before).out_features:
                return ModuleSplit(Kind.replicated)
            units = heads.queries if last == "q_norm" else heads.keys
            segment = Segment(0, shapes[0][0], units, last == "k_norm")
            if units == 1:
                return ModuleSplit(Kind.replicated)
            return ModuleSplit(Kind.wide_norm, (segment,))
    said = "does not name it" if entry is None else f"says {entry!r} for it"
    raise ValueError(
        f"{model.config.model_type} can't be split at {name}: transformers' tensor-parallel plan "
        f"{said}, which is not supported"
    )


def _segments(name: str, size: int, heads: Heads) -> tuple[Segment, ...]:
    """What the output features of a column-parallel linear consist of."""
    parent, _, last = name.rpartition(".")
    if last == FUSED_HEADS:
        width = size // (heads.queries + 2 * heads.keys)
        queries, keys = heads.queries * width, heads.keys * width
        if queries + 2 * keys == size:
            return (
                Segment(0, queries, heads.queries),
                Segment(queries, keys, heads.keys, True),
                Segment(queries + keys, keys, heads.keys, True),
            )
    elif last == FUSED_HALVES and size % 2 == 0:
        return Segment(0, size // 2, size // 2), Segment(size // 2, size // 2, size // 2)
    elif not _is_attention(parent):
        return (Segment(0, size, size),)
    elif last in KEYS and size % heads.keys == 0:
        return (Segment(0, size, heads.keys, True),)
    elif last not in KEYS and size % heads.queries == 0:
        return (Segment(0, size, heads.queries),)
    raise ValueError(f"{name} has {size} outputs, which are not whole heads of equal size")


def _is_attention(module_name: str) -> bool:
    last = module_name.rpartition(".")[2]
    return "attn" in last or "attention" in last
