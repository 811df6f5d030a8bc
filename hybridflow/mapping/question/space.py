"""SearchSpace: which layouts are tried, and how many bytes the engines need per parameter. It
chooses nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from hybridflow.mapping.question.cluster import NodeGroup
from hybridflow.mapping.question.model import ModelSpec

LARGEST_SHARE = 0.5
"""The share of a node's memory that weights may take for generation within it: training state is
there too."""
LEAST_PART = 4096
"""Tokens of the longest row below which a rank's part is not worth an exchange in every layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSpace:
    """SearchSpace() for bf16 with fp32 master weights; SearchSpace(parameter_bytes=4,
    optimizer_bytes=8) for fp32."""

    parameter_bytes: float = 2.0
    gradient_bytes: float = 4.0
    optimizer_bytes: float = 12.0
    """fp32 master weight and Adam's two moments; with parameters and gradients 18 bytes a
    parameter (the paper's section 8.1: bf16 parameters, fp32 gradients and Adam states;
    Rajbhandari et al. 2020 count 16 with bf16 gradients)."""
    activation_bytes: float = 2.0
    zero_stages: tuple[int, ...] = (1, 3)
    """ZeRO stages that are tried for trained models, stage 3 only without pipeline. Stage 0 is
    never better than 1: it moves the same bytes and takes more memory."""
    recompute: tuple[bool, ...] = (False, True)
    replicas: int = 1
    """Replicas of the data ranks over each of which ZeRO cuts by itself (train.fsdp_replicas)."""
    compiled: bool = False
    """Layers run through torch.compile (train.compile), and without tensor parallelism."""
    remade: bool = False
    """Gated MLPs make their products again in the backward pass, as the engines do on CPUs."""
    selective: bool = False
    """Recomputation keeps the outputs of products and of attention (train.selective_checkpointing)."""
    offload_activations: bool = False
    """Activations lie in host memory until the backward pass (train.offload_activations)."""
    offload: tuple[bool, ...] = (False,)
    micro_batch_rows: tuple[int, ...] = (1, 2, 4, 8)
    """Micro-batches of this many longest rows."""
    max_pipeline: int = 8
    max_tensor: int = 64
    """Tensor parallelism never leaves a node, whatever is allowed here."""
    tensor_sizes: tuple[int, ...] = ()
    """Only these sizes of tensor parallelism in training, which the models can be split into;
    empty: every divisor of the heads."""
    context_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Sizes of context parallelism that are tried where the longest row leaves every rank at least
    LEAST_PART tokens."""
    expert_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Sizes of expert parallelism that are tried for a mixture of experts."""
    splits_experts: bool = True
    """Without expert parallelism tensor ranks have a part of every expert. False: it takes experts
    that are divided to have tensor parallelism in training."""
    splits_latent: bool = True
    """Tensor ranks have a part of the heads of latent attention, in training."""
    generation_tensor_sizes: tuple[int, ...] = ()
    """The same for generation."""
    max_generation_pipeline: int = 1
    """Pipeline-parallel generation reads the weights once per stage and micro-batch; engines
    rarely gain from it."""
    waves: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    """Numbers of parts into which a replica's rows are cut where the KV cache does not hold all
    of them."""
    max_num_seqs: int = 256
    """The most sequences that an engine decodes at once (vLLM's default)."""
    max_num_batched_tokens: int = 8192
    """The most prompt tokens of a prefill pass."""
    shared_generation_weights: bool = True
    """Generation computes on the training shards where they suffice (zero redundancy). False:
    the engine holds a copy of the weights."""
    cut_between_steps: bool = False
    """Between steps parameters are sharded over d below ZeRO-3 too (FSDP2's shards), so that
    generation gets them from all data ranks."""
    whole_up_to_bytes: float = 0.0
    """With cut_between_steps: a model of at most so many float32 bytes is gathered, kept between
    passes and reduced as a whole, a larger one layer by layer."""
    shared_shards: bool = False
    """With cut_between_steps: data ranks are processes on one machine's CPUs, and compute with each
    other's shards where they are, unless these are in another data type than what is computed in."""
    reduction_copies: bool = False
    """Reducing gradients copies them (gloo)."""
    bucket_elements: float = 0.0
    """Gradients are copied to a buffer of at most so many (DeepSpeed's reduce_bucket_size)."""
    logits_at_once: float = 2.0**27
    """Most numbers of logits that a training engine holds at a time."""
    logits_in_parts: bool = False
    """A training engine's softmax looks at a few rows of logits at a time (CPUs), so that beside the
    logits there is their gradient and nothing else of that size."""
    share_prompts: bool = False
    """The samples of a prompt share its tokens in training (train.share_prompts)."""
    cache_of_rows: bool = False
    """The generation engine's keys and values come and go with its rows (hf), in place of a cache of
    fixed size that stays between calls."""
    generation_library: bool = True
    """The generation engine is a library of its own (vLLM), which every process that generates
    imports."""
    preloaded_allocator: bool = False
    """Hosts on CPUs use tcmalloc, which is installed."""
    repacked_generation: bool = False
    """The generation engine computes with a repacked copy of its weights (vLLM on a CPU): a sync
    needs the weights twice unless the engine was asleep, and a tied head is a copy."""
    old_log_prob_pass: bool = False
    """The actor's update begins with a forward pass that scores the responses under the
    training engine, where there is more than one optimizer update."""
    bucket_bytes: float = 512e6
    """Staging buffer of the resharding."""

    def __post_init__(self) -> None:
        sizes = {
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")

    def model_layouts(
        self, model: ModelSpec, group: NodeGroup, num_devices: int
    ) -> list[tuple[int, int, int]]:
        """All (p, t, d) with p * t * d = num_devices that fit the model: t divides the heads
        and stays inside a node, p divides the layers (of a deep model where none of the sizes does, any)."""
        sizes = self.tensor_sizes
        if model.latent is not None and not self.splits_latent:
            sizes = (1,)
        return self._layouts(model, group, num_devices, self.max_pipeline, sizes)

    def expert_layouts(self, model: ModelSpec, tensor: int, num_devices: int) -> list[int]:
        """The sizes of expert parallelism to try on the `num_devices` ranks of a stage: multiples of
        `tensor` that divide the experts and the ranks."""
        sizes = [1] if not model.num_experts or tensor == 1 or self.splits_experts else []
        for size in self.expert_sizes:
            fits = size % tensor == 0 and num_devices % size == 0
            if size > 1 and model.num_experts and model.num_experts % size == 0 and fits:
                sizes.append(size)
        return sizes

    def contexts(self, longest_row: int, num_devices: int) -> list[int]:
        """The sizes of context parallelism to try on `num_devices` data ranks."""
        sizes = []
        for size in self.context_sizes:
            if num_devices % size == 0 and (size == 1 or longest_row >= size * LEAST_PART):
                sizes.append(size)
        return sizes

    def generation_layouts(
        self, model: ModelSpec, group: NodeGroup, num_devices: int
    ) -> list[tuple[int, int, int]]:
        """All (pg, tg, replicas) on num_devices, by the same rules; deeper pipelines than are allowed
        only where the weights do not fit a node."""
        deepest = self.max_generation_pipeline
        weights = self.parameter_bytes * model.num_parameters
        node_bytes = LARGEST_SHARE * group.kind.devices_per_node * group.kind.memory_bytes
        if weights > node_bytes:
            deepest = max(deepest, 2 * ceil(weights / node_bytes))
        return self._layouts(model, group, num_devices, deepest, self.generation_tensor_sizes)

    def _layouts(
        self,
        model: ModelSpec,
        group: NodeGroup,
        num_devices: int,
        max_pipeline: int,
        tensor_sizes: tuple[int, ...],
    ) -> list[tuple[int, int, int]]:
        depths: Sequence[int] = range(1, min(max_pipeline, model.num_layers) + 1)
        is_deep = model.num_layers > 4 * max_pipeline  # a layer more on a stage is little then
        if not is_deep or any(model.num_layers % depth == 0 for depth in depths[1:]):
            depths = [depth for depth in depths if model.num_layers % depth == 0]
        result = []
        for tensor in self._tensor_sizes(model, group, num_devices):
            if tensor_sizes and tensor not in tensor_sizes:
                continue
            for pipeline in depths:
                if num_devices % (pipeline * tensor) == 0:
                    result.append((pipeline, tensor, num_devices // (pipeline * tensor)))
        return result

    def _tensor_sizes(self, model: ModelSpec, group: NodeGroup, num_devices: int) -> list[int]:
        """Divisors of the heads that divide the node (or the smaller pool), so that groups
        never straddle nodes."""
        inside = min(group.kind.devices_per_node, num_devices)
        sizes = []
        for size in range(1, min(inside, self.max_tensor) + 1):
            if model.num_heads % size == 0 and inside % size == 0:
                sizes.append(size)
        return sizes
