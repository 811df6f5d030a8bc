"""The boxes that a vLLM rank holds, discovered by running the model's own loaders on recording
tensors.

A second model is built on the meta device (no memory), every checkpoint parameter is given to its
load_weights as a meta tensor, and a dispatch mode watches what is copied from which part of which
parameter into which part of which of the model's tensors. So sharding, fusing (qkv, gate_up),
padding, replication and pipeline stages are whatever the loaders do; there is no table of models.
Quantised models are left out: their loaders transform.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hybridflow.resharding import Box
from workers.engines.model.loading import language_model_class, stored_buffers
from workers.generation.vllm.own_classes import own_classes

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ATEN = torch.ops.aten
_CONSTANT_WRITES = (ATEN.fill_.Scalar, ATEN.fill_.Tensor, ATEN.zero_.default)


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """A strided part of a tensor's memory: what torch.as_strided takes, in elements."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Region:
        return cls(
            size=tuple(tensor.shape),
            stride=tuple(tensor.stride()),
            offset=int(tensor.storage_offset()),
        )

    @property
    def numel(self) -> int:
        return prod(self.size)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderWrite:
    """One copy that a loader made.

    LoaderWrite(name="model.layers.0.self_attn.k_proj.weight", box=Box((8, 0), (8, 64)),
    tensor="model.layers.0.self_attn.qkv_proj.weight",
              region=Region(size=(8, 64), stride=(64, 1), offset=2048))
    """

    name: str
    """The checkpoint's parameter."""
    box: Box
    """The part of it that this rank keeps."""
    tensor: str
    """Qualified name of the model's parameter or buffer that it goes into."""
    region: Region


class LoaderError(ValueError):
    """A weight loader did something that cannot be expressed as copies of boxes; names the
    parameter."""


class _Recorder(TorchDispatchMode):
    """Records copies from checkpoint parameters into the model's tensors; executes views,
    refuses everything else."""

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        super().__init__()
        self.names = {_storage(tensor): name for name, tensor in parameters.items()}
        self.parameters = parameters
        self.tensors = {_storage(tensor): name for name, tensor in reversed(list(tensors.items()))}
        self.placements: list[LoaderWrite] = []
        self.written = dict.fromkeys(tensors, 0)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is ATEN.copy_.default:
            self._copy(args[0], args[1])
            return args[0]
        if func in _CONSTANT_WRITES and _storage(args[0]) in self.tensors:
            self.written[self.tensors[_storage(args[0])]] += args[0].numel()
            return args[0]
        if func is ATEN.clone.default and _storage(args[0]) in self.names:
            return args[0]  # a loader's or converter's contiguous(): the same numbers
        if not _is_view(func):
            for value in (*args, *(kwargs or {}).values()):
                for tensor in value if isinstance(value, (list, tuple)) else (value,):
                    if (
                        isinstance(tensor, torch.Tensor)
                        and (name := self.names.get(_storage(tensor))) is not None
                    ):
                        raise LoaderError(
                            f"{name}: its weight loader applies {func} before it is stored; only "
                            "slices can be resharded"
                        )
            written = args[0] if args and isinstance(args[0], torch.Tensor) else None
            if (
                func._schema.is_mutable
                and written is not None
                and _storage(written) in self.tensors
            ):
                raise LoaderError(
                    f"{self.tensors[_storage(written)]}: a weight loader applies {func} to it; "
                    "only copies can be resharded"
                )
        return func(*args, **(kwargs or {}))

    def _copy(self, into: torch.Tensor, out: torch.Tensor) -> None:
        name, tensor = self.names.get(_storage(out)), self.tensors.get(_storage(into))
        if name is None and tensor is None:
            return  # scratch memory of the loader
        if name is None:
            raise LoaderError(
                f"{tensor}: a weight loader fills it from something that is no slice of a "
                "checkpoint parameter"
            )
        if tensor is None:
            raise LoaderError(
                f"{name}: its weight loader copies it into something that is no parameter or "
                "buffer of the model"
            )
        if into.shape != out.shape:
            shapes = f"{tuple(out.shape)} to {tuple(into.shape)}"
            raise LoaderError(
                f"{name}: its weight loader broadcasts {shapes}; only slices can be resharded"
            )
        self.written[tensor] += into.numel()
        if into.numel():
            box, region = _place(name, self.parameters[name], into, out)
            self.placements.append(LoaderWrite(name=name, box=box, tensor=tensor, region=region))


Tensors = dict[str, torch.Tensor]


@contextmanager
def record_writes(
    parameters: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> Iterator[list[LoaderWrite]]:
    """Records what the body copies from `parameters` into `tensors`, all on the meta device, into
    the list that it yields."""
    with _Recorder(parameters, tensors) as recorder:
        yield recorder.placements


def record(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    named_as_stored: Callable[[Tensors], Tensors] = dict,
) -> list[LoaderWrite]:
    """Run `model`'s load_weights (a model on the meta device) over parameters of the given shapes.

    `named_as_stored` turns transformers' parameters into those of its files, where they differ:
    one stack of experts into their matrices (conversion.py). The placements name the former.

    Parameters that this rank does not hold (of another pipeline stage) have no placement. Raises
    LoaderError for a loader that does more than copy slices, and for a tensor of the model that the
    loaders leave partly unwritten.
    """
    parameters = {
        name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()
    }
    tensors = dict(model.named_parameters()) | {
        name: buffer for name, buffer in model.named_buffers() if buffer.device.type == "meta"
    }
    with _Recorder(parameters, tensors) as recorder:
        stored = named_as_stored(parameters)
        try:
            cast(Any, model).load_weights(stored.items())
        except KeyError as error:
            raise LoaderError(f"{error.args[0]}: vLLM's model has no such parameter") from error
    for name, parameter in model.named_parameters():
        if recorder.written[name] != parameter.numel():
            raise LoaderError(
                f"{name}: the loaders write {recorder.written[name]} of its {parameter.numel()} "
                "elements"
            )
    return recorder.placements


def meta_model(config: VllmConfig) -> nn.Module:
    """The model of this rank as vLLM builds it before loading, without memory and without
    touching the running engine."""
    from vllm.model_executor.model_loader.utils import initialize_model

    twin = copy.copy(config)
    # Layers enter themselves here under their names, which the running model has taken.
    twin.compilation_config = copy.copy(config.compilation_config)
    twin.compilation_config.static_forward_context = {}
    twin.compilation_config.static_all_moe_layers = []
    before = torch.get_default_dtype()
    torch.set_default_dtype(config.model_config.dtype)
    built: list[nn.Module] = []
    try:
        with torch.device("meta"), own_classes(built):
            built.append(initialize_model(vllm_config=twin))
    finally:
        torch.set_default_dtype(before)
    return built[0]


def checkpoint_shapes(
    path: str, revision: str | None = None, trust_remote_code: bool = False
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every checkpoint parameter (tied weights once) and stored buffer, from
    transformers' model on the meta device."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        path, revision=revision, trust_remote_code=trust_remote_code
    )
    with torch.device("meta"):
        model = language_model_class(config).from_config(
            config, trust_remote_code=trust_remote_code
        )
    tensors = dict(model.named_parameters()) | stored_buffers(model)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def missing(placements: Iterable[LoaderWrite], names: Iterable[str]) -> list[str]:
    """The parameters without any placement."""
    placed = {placement.name for placement in placements}
    return [name for name in names if name not in placed]


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_view(func: Any) -> bool:
    """Returns an alias of an argument and writes nothing."""
    returns = func._schema.returns
    return bool(returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )


def _place(
    name: str, whole: torch.Tensor, into: torch.Tensor, out: torch.Tensor
) -> tuple[Box, Region]:
    """Which box of the parameter `whole` (contiguous) the view `out` shows, and where in the memory of
    `into`, of the same shape, each axis of that box goes.

    The view may have lost axes (one expert of a stack), or have them in another order (GPT-2's
    checkpoint has its matrices transposed, and vLLM's loader stores them the other way round).
    """
    offset, start = int(out.storage_offset()), []
    for stride in whole.stride():
        index, offset = divmod(offset, int(stride))
        start.append(index)
    axes = {int(out.stride(axis)): axis for axis in range(out.dim()) if out.shape[axis] != 1}
    size, strides, step = list[int](), list[int](), 1
    for length, stride in zip(reversed(whole.shape), reversed(whole.stride()), strict=True):
        axis = axes.pop(int(stride), None) if length != 1 else None
        size.insert(0, 1 if axis is None else int(out.shape[axis]))
        strides.insert(0, step if axis is None else int(into.stride(axis)))
        step = size[0] * strides[0]
    inside = all(
        low + have <= full for low, have, full in zip(start, size, whole.shape, strict=True)
    )
    if axes or not inside or prod(size) != out.numel():
        layout = f"shape {tuple(out.shape)} stride {tuple(out.stride())}"
        raise LoaderError(
            f"{name}: its weight loader stores a view of {layout}, which is no box of shape "
            f"{tuple(whole.shape)}"
        )
    region = Region(size=tuple(size), stride=tuple(strides), offset=int(into.storage_offset()))
    return Box(tuple(start), tuple(size)), region
