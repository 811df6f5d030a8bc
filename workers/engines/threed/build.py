"""Building a rank's share of the model: cut on the meta device, then filled parameter by
parameter, so that nothing is ever held whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from hybridflow.layout import Layout
from workers.config import ModelConfig, Precision, TrainConfig
from workers.engines.base import Head
from workers.engines.model.attention import check_packable, use_sequence_attention
from workers.engines.model.expert_parallel import expert_mesh, split_experts
from workers.engines.model.layers import prepare_layers
from workers.engines.model.loading import AUTO, ModelSource, build_on_meta
from workers.engines.model.lora import Adapter
from workers.engines.model.scored import ScoredModel
from workers.engines.model.tensor_parallel import parallelize
from workers.engines.model.tensor_parts import Parts
from workers.engines.shared.row_groups import axis_group
from workers.engines.threed.frozen import FrozenPart, FrozenParts
from workers.engines.threed.layout import stage_layers
from workers.engines.threed.optimizer import FlatGroup, FlatSlice, group_pieces
from workers.engines.threed.pipeline import Pipeline
from workers.engines.threed.stages import Stages


@dataclass(frozen=True, slots=True)
class Share:
    """A rank's part of a model."""

    pipeline: Pipeline
    groups: list[FlatGroup]
    """The trained parameters: with an adapter, its matrices and a head."""
    frozen: FrozenParts
    """The base of an adapter."""
    logical: dict[str, tuple[int, ...]]
    """Global shape of every parameter of the whole model, by checkpoint name; tied ones once."""
    trained_shapes: dict[str, tuple[int, ...]]
    """Those in `groups`."""


def build_share(
    source: ModelSource,
    model: ModelConfig,
    train: TrainConfig,
    head: Head,
    layout: Layout,
    rank: int,
    device: torch.device,
    adapter: Adapter | None,
    lent: Iterable[FrozenPart],
) -> Share:
    """Collective over the default group, whose ranks are those of `layout`. `lent`: the base of
    another engine, whose memory is used where the values are the same."""
    if train.packing:
        check_packable(source.model)
    dtype = torch.float32 if train.precision is Precision.fp32 else torch.bfloat16
    sizes = list(map(layout.axis_size, layout.names))
    mesh = DeviceMesh(
        device.type, torch.arange(layout.size).view(sizes), mesh_dim_names=layout.names
    )
    aliases = _aliases(source.model)
    logical, trained_shapes = {}, {}
    for name, parameter in source.model.named_parameters():
        logical[name] = tuple(parameter.shape)
        if parameter.requires_grad:
            trained_shapes[name] = logical[name]
    shell = build_on_meta(model, head)
    use_sequence_attention(shell, fused=model.attention != AUTO)
    if adapter is not None:
        adapter.put_on(shell, head)
    scored = ScoredModel(shell, head)
    parts = parallelize(shell, mesh["tp"], adapter, divides_experts=train.ep > 1)
    scored.split_vocabulary(mesh.get_group("tp"))
    experts = None
    if train.ep > 1:
        experts = expert_mesh(layout, train.ep, device.type)
        parts = split_experts(shell, parts, experts.get_group("ep"))
    prepare_layers(shell, train)
    num_stages = train.pp * train.virtual_stages
    text = shell.config.get_text_config()
    layers = stage_layers(int(text.num_hidden_layers), num_stages)
    local = list(range(layout.coordinates(rank)["pp"], num_stages, train.pp))
    stages = Stages(scored, layers, local, dtype, device)
    tied = train.pp > 1 and len(set(aliases.values())) < len(aliases)
    pieces = _pieces(shell, parts, _tied_names(aliases) if tied else set(), train.tp)
    ends = _ends_group(layout, rank) if tied else None
    # Ranks that share rows share the optimizer out too, as data ranks do.
    data = axis_group(layout, "dp", "cp") if train.cp > 1 else mesh.get_group("dp")
    groups = []
    for members in group_pieces([piece for piece in pieces if piece.name in trained_shapes]):
        sharing = data
        if members[0].divided:
            assert experts is not None
            sharing = experts.get_group("edp")
        groups.append(_flat_group(members, dtype, device, mesh, sharing, ends))
    frozen = FrozenParts(
        [piece for piece in pieces if piece.name not in trained_shapes], dtype, lent
    )
    _copy_weights(source, shell, groups, frozen, device)
    pipe = mesh.get_group("pp")
    # NCCL wants a collective of all ranks before the first message.
    dist.all_reduce(torch.zeros(1, device=device), group=pipe)
    pipeline = Pipeline(stages, pipe, train.tp, int(text.hidden_size), dtype)
    return Share(pipeline, groups, frozen, logical, trained_shapes)


def _aliases(model: nn.Module) -> dict[str, str]:
    """Every parameter's name -> the first name of the same parameter."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases[name] = first.setdefault(id(parameter), name)
    return aliases


def _tied_names(aliases: dict[str, str]) -> set[str]:
    return {first for name, first in aliases.items() if name != first}


def _pieces(
    shell: PreTrainedModel, parts: Parts, twice: set[str], tensor_size: int
) -> list[FlatSlice]:
    """The parameters of the model that are left on this rank, in the order of its modules; those
    named in `twice` are on the first and on the last stage."""
    first_name: dict[int, str] = {}
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module_name, module in shell.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            first_name.setdefault(id(parameter), f"{module_name}.{name}".removeprefix("."))
            places.setdefault(id(parameter), []).append((module, name))
    pieces = list[FlatSlice]()
    for number, full_name in first_name.items():
        part = parts[full_name]
        tied = part.name in twice
        pieces.append(
            FlatSlice(
                name=part.name,
                shape=part.shape,
                box=part.box,
                places=tuple(places[number]),
                replicated=part.replicated,
                partial=part.partial,
                divided=part.divided,
                tied=tied,
                index=len(pieces),
                copies=(tensor_size if part.replicated else 1) * (2 if tied else 1),
            )
        )
    return pieces


def _flat_group(
    pieces: list[FlatSlice],
    dtype: torch.dtype,
    device: torch.device,
    mesh: DeviceMesh,
    data: ProcessGroup,
    ends: ProcessGroup | None,
) -> FlatGroup:
    sums = [mesh.get_group("tp")] if pieces[0].partial else []
    if pieces[0].tied:
        assert ends is not None
        sums.append(ends)
    return FlatGroup(pieces, dtype, device, data, sums)


def _ends_group(layout: Layout, rank: int) -> ProcessGroup | None:
    """The first and last stage of this rank's pipeline, if it is one of them; collective."""
    ends = None
    for ranks in layout.groups("pp"):
        group = dist.new_group([ranks[0], ranks[-1]])
        if rank in (ranks[0], ranks[-1]):
            ends = group
    return ends


def _copy_weights(
    source: ModelSource,
    shell: nn.Module,
    groups: list[FlatGroup],
    frozen: FrozenParts,
    device: torch.device,
) -> None:
    """Every module's checkpoint values in turn: this rank keeps its boxes and its buffers, and
    drops the rest."""
    places: dict[str, list[tuple[FlatGroup, int]]] = {}
    for flat_group in groups:
        for index, piece in enumerate(flat_group.pieces):
            places.setdefault(piece.name, []).append((flat_group, index))
    targets = dict(shell.named_modules())
    for module_name, module in list(source.model.named_modules()):
        if not module._parameters and not module._buffers:
            continue
        source.materialize(module, device)
        for name, parameter in list(module.named_parameters(recurse=False)):
            for group, index in places.get(f"{module_name}.{name}", ()):
                group.write(index, parameter.detach()[group.pieces[index].box.slices])
            frozen.fill(f"{module_name}.{name}", parameter.detach())
            module._parameters[name] = nn.Parameter(
                torch.empty_like(parameter, device="meta"), requires_grad=False
            )
        for name, buffer in module.named_buffers(recurse=False):
            if module_name in targets and name in targets[module_name]._buffers:
                targets[module_name]._buffers[name] = buffer
