"""How engine fsdp lays a model out: process mesh, FSDP2 groups, and which box of a parameter a
rank holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hybridflow.layout import Layout
from hybridflow.resharding.shards import Box, LocalParameter, LocalShard
from workers.config import Precision, TrainConfig
from workers.engines.base import Head
from workers.engines.fsdp.shared_weights import SharedWeights
from workers.engines.model.attention import check_packable
from workers.engines.model.expert_parallel import find_experts, split_experts
from workers.engines.model.layers import prepare_layers
from workers.engines.model.loading import ModelSource
from workers.engines.model.lora import Adapter
from workers.engines.model.scored import (
    ScoredModel,
    decoder_layers,
    parameter_bytes,
)
from workers.engines.model.tensor_parallel import parallelize
from workers.engines.model.tensor_parts import Parts, TensorPart, whole_parts
from workers.engines.shared.gloo_sums import GlooReduceScatter

ONE_GROUP_BYTES = 512 * 2**20
"""Float32 bytes up to which the whole model is one FSDP group: one gather and one reduction a
step instead of one per layer."""


def check_replicas(config: TrainConfig, world_size: int) -> None:
    """ValueError for replicas that the data ranks can't be divided into."""
    count, data = config.fsdp_replicas, world_size // (config.tp * config.cp)
    if count < 1 or data % count or (count > 1 and world_size // (config.tp * count) < 2):
        sizes = [size for size in range(1, data + 1) if data % size == 0]
        if config.cp == 1:
            sizes = sizes[:-1] or [1]
        raise ValueError(
            f"train.fsdp_replicas is {count} with {data} data ranks; use one of {sizes}, which leave "
            "each replica at least two ranks to cut weights over"
        )
    if count > 1 and config.ep > 1:
        raise ValueError(
            f"train.fsdp_replicas is {count} with ep={config.ep}: experts are cut over all data ranks; "
            "set fsdp_replicas=1"
        )


def make_mesh(layout: Layout, device_type: str, replicas: int = 1) -> DeviceMesh:
    """Mesh [dp] or [dp, tp] in the layout's rank order, where "dp" are all ranks that share the
    weights out: data ranks, and those of context parallelism; with several replicas an axis
    "replica" before it. Collective."""
    dp, cp, tp = (layout.axis_size(axis) for axis in ("dp", "cp", "tp"))
    ranks = torch.empty(dp, cp, tp, dtype=torch.int64)
    for data, context, tensor in product(range(dp), range(cp), range(tp)):
        ranks[data, context, tensor] = layout.rank(dp=data, cp=context, tp=tensor)
    names, mesh = ["dp"], ranks.flatten(0, 1)
    if replicas > 1:
        names, mesh = ["replica", "dp"], mesh.unflatten(0, (replicas, -1))
    if tp == 1:
        return DeviceMesh(device_type, mesh[..., 0], mesh_dim_names=tuple(names))
    return DeviceMesh(device_type, mesh, mesh_dim_names=(*names, "tp"))


def shard_model(
    source: ModelSource,
    head: Head,
    config: TrainConfig,
    mesh: DeviceMesh,
    experts: DeviceMesh | None,
    device: torch.device,
    adapter: Adapter | None,
    lent: Mapping[str, nn.Parameter],
    shared: SharedWeights | None,
) -> ScoredModel:
    """The model over `mesh`, shards of its weights on `device`; never more than one group is whole
    at a time. Trained weights are in float32, the base of an adapter in what it computes in; where
    there is one data rank it is not gathered, but used where it lies. `lent`: that of another
    engine, whose memory is used where the values are the same. `experts`: with expert parallelism
    its mesh; each layer's experts are then a group of their own over axis edp. `shared` takes the
    shards of all others. Collective."""
    model = source.model
    if config.packing:
        check_packable(model)
    scored = ScoredModel(model, head)
    if config.tp > 1:
        source.parts = parallelize(model, mesh["tp"], adapter, divides_experts=experts is not None)
        scored.split_vocabulary(mesh.get_group("tp"))
    else:
        source.parts = whole_parts(model)
    if experts is not None:
        source.parts = split_experts(model, source.parts, experts.get_group("ep"))
    prepare_layers(model, config)
    bf16 = config.precision is Precision.bf16
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if bf16
        else MixedPrecisionPolicy()
    )
    in_place = adapter is not None and mesh["dp"].size() == 1
    if adapter is not None and bf16:
        source.frozen_dtype = torch.bfloat16
    if experts is not None:
        # Routers' weights keep the precision that the family gives them.
        _shard_experts(
            source,
            experts["edp"],
            replace(policy, cast_forward_inputs=False),
            config.reshard_after_forward,
            device,
            lent,
        )
    large = parameter_bytes(model) > ONE_GROUP_BYTES or config.reshard_after_forward
    layers = decoder_layers(model) if large and not in_place else []
    for module in (*layers, scored):
        source.materialize(model if module is scored else module, device)
        ignored = set[nn.Parameter]()
        if in_place:
            ignored = {
                parameter for parameter in module.parameters() if not parameter.requires_grad
            }
        fully_shard(
            module,
            mesh=mesh["replica", "dp"] if config.fsdp_replicas > 1 else mesh["dp"],
            mp_policy=policy,
            reshard_after_forward=config.reshard_after_forward,
            ignored_params=ignored,
        )
        _use_lent(model, module, lent)
        if shared is not None:
            assert isinstance(module, FSDPModule)
            shared.take(module)
    assert isinstance(scored, FSDPModule)
    if mesh["dp"].size() == 1:
        return scored
    _sum_gradients(scored, mesh)
    # Experts that only other ranks' tokens use.
    scored.set_reduce_scatter_unused_params(True)
    return scored


def _sum_gradients(scored: ScoredModel, mesh: DeviceMesh) -> None:
    """A loss is a sum over data ranks; FSDP would take the mean."""
    for module in scored.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo can only sum
            module.set_gradient_divide_factor(1.0)
            if dist.get_backend(mesh["dp"].get_group()) == "gloo":
                # Its type is private to PyTorch.
                module.set_custom_reduce_scatter(GlooReduceScatter())  # type: ignore[arg-type]


def _shard_experts(
    source: ModelSource,
    mesh: DeviceMesh,
    policy: MixedPrecisionPolicy,
    reshard_after_forward: bool,
    device: torch.device,
    lent: Mapping[str, nn.Parameter],
) -> None:
    for module in find_experts(source.model).values():
        source.materialize(module, device)
        fully_shard(
            module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward
        )
        _use_lent(source.model, module, lent)


def _use_lent(model: nn.Module, module: nn.Module, lent: Mapping[str, nn.Parameter]) -> None:
    """Puts lent parameters in the place of equal ones under `module`, whose memory is then free."""
    inside = {id(parameter) for parameter in module.parameters()}
    shared: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        other = lent.get(name)
        if id(parameter) not in inside or parameter.requires_grad or other is None:
            continue
        mine, theirs = local_part(parameter), local_part(other)
        alike = type(other) is type(parameter) and mine.dtype is theirs.dtype
        if alike and torch.equal(mine, theirs):
            shared[id(parameter)] = nn.Parameter(other.detach(), requires_grad=False)
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if id(parameter) in shared:
                # FSDP2 looks for exchanged parameters before its first gather.
                owner.register_parameter(name, shared[id(parameter)])


def is_one_group(scored: ScoredModel) -> bool:
    """Whether the whole model is gathered at once and not freed in the forward pass."""
    groups = [module for module in scored.modules() if isinstance(module, FSDPModule)]
    return len(groups) == 1


def abandon_step(scored: ScoredModel) -> None:
    """After an exception in a forward or backward pass: sharded weights, no gradients anywhere. No
    collective: others may not fail."""
    assert isinstance(scored, FSDPModule)
    scored.reset_iter_state()
    # It leaves what unsynchronised micro-batches have added up; there is no public way to drop
    # that.
    for module in scored.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for parameter in group.fsdp_params:
                    parameter.unsharded_accumulated_grad = None
                    if "_unsharded_param" in vars(parameter):
                        parameter._unsharded_param.grad = None


def local_part(parameter: torch.Tensor) -> torch.Tensor:
    """The rank's own memory of a parameter."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local.detach()


def local_box(parameter: nn.Parameter, part: TensorPart) -> Box:
    """This rank's box of the checkpoint's parameter: tensor parallelism cuts first, data
    parallelism cuts what that leaves along its first dim, into pieces of equal rounded-up size
    (the last ones smaller or empty)."""
    if not isinstance(parameter, DTensor):
        return part.box
    whole, mesh = part.box.shape[0], parameter.device_mesh
    cut = mesh.ndim - 1  # an axis before it has replicas
    piece = -(-whole // mesh.size(cut))
    before = min(piece * mesh.get_local_rank(cut), whole)
    start = (part.box.start[0] + before, *part.box.start[1:])
    return Box(start, (min(piece, whole - before), *part.box.shape[1:]))


def logical_parameters(
    parameters: Mapping[str, nn.Parameter],
    parts: Parts,
    tensors: Mapping[str, torch.Tensor],
    *,
    copies: bool,
) -> list[LocalParameter]:
    """Every parameter of the checkpoint with the boxes that this rank holds, where `tensors` are
    laid out as its parameters are; views. copies=False leaves out those that every tensor rank
    has."""
    shards: dict[str, list[LocalShard]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name, parameter in parameters.items():
        part, tensor = parts[name], tensors[name].detach()
        box = local_box(parameter, part)
        assert tuple(tensor.shape) == box.shape, f"{name}: {box}"
        shapes[part.name], dtypes[part.name] = part.shape, tensor.dtype
        if box.numel and (copies or not part.replicated):
            shards.setdefault(part.name, []).append(LocalShard(box, tensor))
    result = []
    for name, shape in shapes.items():
        boxes = tuple(shards.get(name, ()))
        result.append(LocalParameter(name, shape, dtypes[name], boxes))
    return result
