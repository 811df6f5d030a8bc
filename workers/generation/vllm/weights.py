"""VllmWeights: where a vLLM engine takes its weights, as boxes of checkpoint parameters.

On GPU the boxes are the engine's own parameters: they are written in place, and commit only makes
anew what latent attention derives from them. Those that a training shard coincides with can be that
shard's memory (share). On CPU vLLM repacks linear weights for oneDNN and drops the originals: their
boxes are staging memory, and commit lets vLLM repack it. The prefix cache is the engine's business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from hybridflow.resharding import Box, LocalParameter, LocalShard, ShardMap
from hybridflow.resharding.attest import Parts
from hybridflow.resharding.boxes import Ints
from workers.engines.model.conversion import as_stored
from workers.engines.model.loading import language_model_class
from workers.generation.vllm.shard_map import (
    LoaderError,
    LoaderWrite,
    Region,
    Tensors,
    checkpoint_shapes,
    meta_model,
    missing,
    record,
)

if TYPE_CHECKING:
    import torch.distributed as dist
    from vllm import LLM
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase


class VllmWeights:
    """weights = VllmWeights(llm); plan = compile(source, weights.shard_map(), ...); execute(...,
    weights.destinations()); weights.commit()

    One object per rank, made after the engine and used as long as it lives.
    """

    def __init__(self, llm: LLM, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        """Discovers what this rank holds; collective over the replica's ranks.

        `shapes`: name and shape of every checkpoint parameter (the trainer's); None asks
        transformers. Raises LoaderError, naming the parameter, where a loader does something other
        than copying slices or ignores a parameter.
        """
        config = llm.llm_engine.vllm_config
        if config.model_config.quantization is not None:
            raise ValueError(
                f"generation: quantization={config.model_config.quantization} cannot be "
                "resharded; use an unquantised model"
            )
        self._model: nn.Module = (
            llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
        )
        self._dtype: torch.dtype = config.model_config.dtype
        if shapes is None:
            model_config = config.model_config
            shapes = checkpoint_shapes(
                model_config.model, model_config.revision, model_config.trust_remote_code
            )
        self._shapes = dict(shapes)
        twin = meta_model(config)
        for model in (self._model, twin):
            add_head_bias(model, self._shapes)
        self.placements = record(twin, self._shapes, self._dtype, self._named_as_stored(config))
        _check_no_parameter_is_lost(self.placements, self._shapes)
        self._memory = self._bind(twin)
        self._dtypes = self._dtypes_of_parameters()
        self._parameters = self._local_parameters()

    @staticmethod
    def _named_as_stored(config: VllmConfig) -> Callable[[Tensors], Tensors]:
        model_config = config.model_config
        with torch.device("meta"):
            model = language_model_class(model_config.hf_config).from_config(
                model_config.hf_config, trust_remote_code=model_config.trust_remote_code
            )
        return partial(as_stored, model)

    def destinations(self) -> list[LocalParameter]:
        """This rank's boxes of every parameter and the memory to write them to."""
        return self._parameters

    def share(self, sources: Sequence[LocalParameter]) -> None:
        """Make the engine's tensors views of the trainer's memory where one is exactly one of
        this rank's training shards: the same box of one parameter, data type, form and device.
        Fused projections are not, nor on CPU what vLLM repacks."""
        held: dict[tuple[str, Box], torch.Tensor] = {}
        for parameter in sources:
            for shard in parameter.shards:
                held[parameter.name, shard.box] = shard.tensor.detach()
        copies = Counter(placement.tensor for placement in self.placements)
        live = dict(self._model.named_parameters())
        for placement in self.placements:
            have, own = held.get((placement.name, placement.box)), self._memory[placement.tensor]
            alone = (
                copies[placement.tensor] == 1
                and placement.tensor in live
                and placement.tensor not in self._staged
            )
            whole = placement.region == Region(
                size=tuple(own.shape), stride=tuple(own.stride()), offset=0
            )
            if have is None or not alone or not whole:
                continue
            if (have.dtype, have.device, have.shape, have.stride()) == (
                own.dtype,
                own.device,
                own.shape,
                own.stride(),
            ):
                live[placement.tensor].data = have
                self._memory[placement.tensor] = have
        self._parameters = self._local_parameters()

    def shard_map(self, group: dist.ProcessGroup | None = None) -> ShardMap:
        """The boxes of all ranks of `group`. Collective."""
        return ShardMap.gather(self._parameters, group)

    def digests(self, parts: Parts, rank: int) -> Ints:
        """Digests of what this rank holds (on CPU: of what was handed to vLLM to repack)."""
        return parts.digests(self._parameters, rank)

    @torch.no_grad()
    def commit(self) -> None:
        """Make the engine compute with what was written. On CPU vLLM repacks every linear
        layer, tied heads included. Latent attention multiplies matrices that are made from others
        after loading: they are made anew, in place."""
        if self._repacks:
            self._repack()
        for module in self._deriving:
            module.process_weights_after_loading(self._dtype)

    def _repack(self) -> None:
        """A layer's staging memory is given back once it is repacked."""
        readers = self._staging_readers()
        for name, module in self._model.named_modules():
            staged = {}
            for own in module._parameters:
                key = self._tensor_of(name, own)
                if key in self._staged:
                    staged[own] = key
            for own, key in staged.items():
                module._parameters[own] = nn.Parameter(self._memory[key], requires_grad=False)
            method = _quant_method(module)
            if method is not None:
                _forget_kernel(method)
                method.process_weights_after_loading(module)
            readers.subtract(staged.values())
            for key in staged.values():
                if not readers[key] and method is not None:
                    self._memory[key].untyped_storage().resize_(0)

    def _staging_readers(self) -> Counter[str]:
        """How many modules take each staged tensor in."""
        readers: Counter[str] = Counter()
        for name, module in self._model.named_modules():
            keys = [self._tensor_of(name, own) for own in module._parameters]
            readers.update(key for key in keys if key in self._staged)
        return readers

    @property
    def staging_bytes(self) -> int:
        """Memory held beside the engine's own."""
        return sum(self._memory[name].nbytes for name in self._staged)

    def free_staging(self) -> int:
        """Give the staging memory back (the engine has repacked it) and say how many bytes it
        had; nothing may write to it before take_back_staging."""
        freed = 0
        for name in self._staged:
            storage = self._memory[name].untyped_storage()
            freed += storage.nbytes()
            storage.resize_(0)
        return freed

    def take_back_staging(self) -> None:
        """The staging memory again, contents undefined; the boxes stay the same objects."""
        for name in self._staged:
            tensor = self._memory[name]
            tensor.untyped_storage().resize_(tensor.nbytes)

    def _bind(self, twin: nn.Module) -> dict[str, torch.Tensor]:
        """The memory of every tensor that loaders fill: the running model's where it has kept
        its form, else staging memory."""
        live = dict(self._model.named_parameters(remove_duplicate=False)) | dict(
            self._model.named_buffers(remove_duplicate=False)
        )
        fresh = dict(twin.named_parameters()) | dict(twin.named_buffers())
        # A name that vLLM ties to another one is the same tensor: both names lead to the first.
        first = {id(tensor): name for name, tensor in reversed(fresh.items())}
        self._alias = {
            name: first[id(tensor)]
            for name, tensor in twin.named_parameters(remove_duplicate=False)
        }
        self._staged: set[str] = set()
        self._repacks = any(
            _quant_method(m) is not None for m in self._model.modules()
        ) and not _on_accelerator(self._model)
        rearranged = self._rearranged()
        memory: dict[str, torch.Tensor] = {}
        for name in dict.fromkeys(placement.tensor for placement in self.placements):
            have, want = live[name].detach(), fresh[name]
            in_place = (
                have.shape == want.shape
                and have.dtype == want.dtype
                and have.stride() == want.stride()
                and name not in rearranged
            )
            if not in_place:
                if not self._repacks:
                    kept = f"{tuple(have.shape)} {have.dtype}"
                    filled = f"{tuple(want.shape)} {want.dtype}"
                    raise LoaderError(
                        f"{name}: vLLM keeps it as {kept}, its loaders fill {filled}; it cannot "
                        "be written in place"
                    )
                have = torch.zeros(want.shape, dtype=want.dtype)
                self._staged.add(name)
            memory[name] = have
        self._deriving = self._modules_that_derive(memory)
        return memory

    def _rearranged(self) -> set[str]:
        """The parameters that vLLM may hold in another order in the same form: on CPU those of
        experts, whose kernel reads them in blocks. What another module has too (the bias by which a
        router chooses) is not the kernel's, and routers keep the tensor itself."""
        names, others = set[str](), set[str]()
        if not self._repacks:
            return names
        for module_name, module in self._model.named_modules():
            group = names if _computes_experts(_quant_method(module)) else others
            group |= {self._tensor_of(module_name, name) for name in module._parameters}
        return names - others

    def _modules_that_derive(self, filled: Container[str]) -> list[Any]:
        """The modules that compute with tensors made from weights after loading. LoaderError for a
        parameter that neither a loader nor such a module fills: no sync would refresh it."""
        from vllm.model_executor.layers.attention import (
            MLAAttention,
            is_deferred_attention_layer,
        )

        deriving: dict[str, Any] = {}
        for name, module in self._model.named_modules():
            if isinstance(module, MLAAttention):
                deriving[name] = module
        for name, parameter in self._model.named_parameters():
            if self._alias.get(name, name) in filled or not parameter.numel():
                continue
            owner = name.rpartition(".")[0]
            module = self._model.get_submodule(owner)
            if not is_deferred_attention_layer(module):
                raise LoaderError(
                    f"{name}: vLLM computes with it and no loader fills it; a sync would leave it as "
                    "it was"
                )
            deriving[owner] = module
        return list(deriving.values())

    def _tensor_of(self, module: str, parameter: str) -> str:
        name = f"{module}.{parameter}" if module else parameter
        return self._alias.get(name, name)

    def _dtypes_of_parameters(self) -> dict[str, torch.dtype]:
        """vLLM holds a router's bias in float32 whatever the precision of the weights. Collective
        over the pipeline stages."""
        dtypes = dict.fromkeys(self._shapes, self._dtype)
        for held in _of_all_stages(
            {place.name: self._memory[place.tensor].dtype for place in self.placements}
        ):
            dtypes |= held
        return dtypes

    def _local_parameters(self) -> list[LocalParameter]:
        shards: dict[str, list[LocalShard]] = {name: [] for name in self._shapes}
        for placement in self.placements:
            shards[placement.name].append(
                LocalShard(placement.box, _view(self._memory[placement.tensor], placement.region))
            )
        return [
            LocalParameter(name, shape, self._dtypes[name], tuple(shards[name]))
            for name, shape in self._shapes.items()
        ]


def add_head_bias(model: nn.Module, names: Container[str]) -> None:
    """Give the head the bias that the checkpoint has for it. vLLM's Transformers backend does so
    only when it loads that weight, and again each time."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for name, module in model.named_modules():
        if not isinstance(module, ParallelLMHead) or f"{name}.bias" not in names:
            continue
        if module.bias is None:
            with torch.device(next(model.parameters()).device):
                module._register_bias()
        module._register_bias = lambda: None


def _view(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    return tensor.as_strided(region.size, region.stride, tensor.storage_offset() + region.offset)


def _quant_method(module: nn.Module) -> QuantizeMethodBase | None:
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    method = module.__dict__.get("quant_method") or module._modules.get("quant_method")
    return method if isinstance(method, QuantizeMethodBase) else None


def _computes_experts(method: QuantizeMethodBase | None) -> bool:
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

    return isinstance(method, FusedMoEMethodBase)


def _forget_kernel(method: QuantizeMethodBase) -> None:
    """Experts' kernels take new weights in anew. With a kernel that is there vLLM would copy them
    beside it, in the order of the files, and compute with them as if they were rearranged."""
    if _computes_experts(method):
        vars(method)["moe_kernel"] = None


def _on_accelerator(model: nn.Module) -> bool:
    return any(parameter.device.type != "cpu" for parameter in model.parameters())


def _check_no_parameter_is_lost(
    placements: Sequence[LoaderWrite], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """LoaderError for a parameter that no pipeline stage of this replica takes. Collective over the
    stages."""
    lost = _of_all_stages(missing(placements, shapes))
    if nowhere := set.intersection(*map(set, lost)):
        raise LoaderError(
            f"{', '.join(sorted(nowhere)[:5])}: vLLM's loaders ignore it on every pipeline stage"
        )


T = TypeVar("T")


def _of_all_stages(value: T) -> list[T]:
    """The values of this replica's pipeline stages. Collective over them."""
    import torch.distributed as dist
    from vllm.distributed.parallel_state import get_pp_group

    stages = get_pp_group()
    if stages.world_size == 1:
        return [value]
    values: list[Any] = [None] * stages.world_size
    dist.all_gather_object(values, value, group=stages.cpu_group)
    return values
