"""SearchSpace: which layouts are tried, and what the engines need per parameter. Chooses nothing itself."""

from __future__ import annotations

from dataclasses import dataclass

from hybridflow.mapping.question.cluster import NodeGroup
from hybridflow.mapping.question.model import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSpace:
    """SearchSpace() for bf16 with fp32 master weights; SearchSpace(parameter_bytes=4, optimizer_bytes=8) for
    fp32."""

    parameter_bytes: float = 2.0
    gradient_bytes: float = 4.0
    optimizer_bytes: float = 12.0
    """fp32 master weight and Adam's two moments; with the above 18 bytes a parameter (the paper's section
    8.1: bf16 parameters, fp32 gradients and Adam states; Rajbhandari et al. 2020 count 16 with bf16
    gradients)."""
    activation_bytes: float = 2.0
    zero_stages: tuple[int, ...] = (1, 3)
    """Tried for trained models. Stage 3 only without pipeline. Stage 0 is never better than 1: same bytes
    moved, more memory."""
    recompute: tuple[bool, ...] = (False, True)
    offload: tuple[bool, ...] = (False,)
    micro_batch_rows: tuple[int, ...] = (1, 2, 4, 8)
    """Micro-batches of this many longest rows."""
    max_pipeline: int = 8
    max_tensor: int = 64
    """Tensor parallelism never leaves a node, whatever is allowed here."""
    max_generation_pipeline: int = 1
    """Pipeline-parallel generation reads the weights once per stage and micro-batch; engines rarely gain from
    it."""
    waves: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    """Into how many parts a replica's rows are cut where the KV cache does not hold all of them."""
    max_running: int = 256
    """Most sequences that one engine decodes at once (vLLM's default)."""
    prefill_tokens: int = 8192
    """Prompt tokens of one prefill pass."""
    shared_generation_weights: bool = True
    """Generation computes on the training shards where they suffice (zero redundancy); False: the engine
    keeps its own copy."""
    cut_between_steps: bool = False
    """Between steps parameters lie cut over d below ZeRO-3 too (FSDP2's shards), so that generation gets them
    from all data ranks."""
    old_log_prob_pass: bool = False
    """The actor's update begins with a forward pass that scores the responses under the training engine,
    where there is more than one optimizer update."""
    bucket_bytes: float = 512e6
    """Staging buffer of the resharding."""

    def __post_init__(self) -> None:
        for name, value in (("max_running", self.max_running), ("prefill_tokens", self.prefill_tokens)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")

    def model_layouts(
        self, model: ModelSpec, group: NodeGroup, num_devices: int
    ) -> list[tuple[int, int, int]]:
        """All (p, t, d) with p * t * d = num_devices that fit the model: t divides the heads and stays inside
        a node, p divides the layers."""
        result = []
        for t in self._tensor_sizes(model, group, num_devices):
            for p in range(1, min(self.max_pipeline, model.num_layers, num_devices // t) + 1):
                if model.num_layers % p == 0 and num_devices % (p * t) == 0:
                    result.append((p, t, num_devices // (p * t)))
        return result

    def generation_layouts(
        self, model: ModelSpec, group: NodeGroup, num_devices: int
    ) -> list[tuple[int, int, int]]:
        """All (pg, tg, replicas) on num_devices."""
        result = []
        for tg in self._tensor_sizes(model, group, num_devices):
            for pg in range(1, min(self.max_generation_pipeline, model.num_layers, num_devices // tg) + 1):
                if model.num_layers % pg == 0 and num_devices % (pg * tg) == 0:
                    result.append((pg, tg, num_devices // (pg * tg)))
        return result

    def _tensor_sizes(self, model: ModelSpec, group: NodeGroup, num_devices: int) -> list[int]:
        """Divisors of the heads that divide the node (or the smaller pool), so that groups never straddle
        nodes."""
        inside = min(group.kind.devices_per_node, num_devices)
        return [
            t
            for t in range(1, min(inside, self.max_tensor) + 1)
            if model.num_heads % t == 0 and inside % t == 0
        ]
