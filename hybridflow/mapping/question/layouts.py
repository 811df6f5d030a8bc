"""How one model is cut over the devices of its pool: for training and forward passes, and for
generation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLayout:
    """Pipeline x tensor x data x context sizes, and the other choices that time and memory of a pass depend
    on.

    ModelLayout(p=1, t=8, d=2, zero=1, recompute=True, micro_batch_tokens=4096)  # the paper's 1-8-2
    """

    p: int = 1
    t: int = 1
    d: int = 1
    c: int = 1
    """Context parallelism: ranks that share the tokens of each row."""
    e: int = 1
    """Expert parallelism: ranks of a stage that share out each layer's experts, whole, folded over
    t, c and d. 1: experts are cut by t like everything else."""
    zero: int = 0
    """ZeRO stage over d x c: 1 cuts optimizer states, 2 also gradients, 3 also parameters
    (Rajbhandari et al. 2020)."""
    replicas: int = 1
    """Replicas of d x c over each of which ZeRO cuts by itself (HSDP)."""
    recompute: bool = False
    """Recompute a layer's activations in the backward pass (activation checkpointing)."""
    selective: bool = False
    """With recompute: outputs of matrix products and of attention are kept."""
    offload_activations: bool = False
    """What the backward pass needs lies in host memory until then."""
    compiled: bool = False
    """Layers run through torch.compile."""
    micro_batch_tokens: int = 4096
    """The most tokens that a pass of a data replica holds."""
    offload: bool = False
    """Keep optimizer states (of trained models) or all parameters (of others) in host memory
    between calls."""

    @property
    def num_devices(self) -> int:
        return self.p * self.t * self.d * self.c

    @property
    def shards(self) -> int:
        """Ranks over which ZeRO cuts, and gradients are added up; they are so over replicas too."""
        return self.d * self.c // self.replicas

    @property
    def expert_ranks(self) -> int:
        """Ranks that an expert layer's experts are cut over, before ZeRO cuts."""
        return max(self.e, self.t)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """The sizes that decide which part of a frozen weight a rank has."""
        return self.p, self.t, self.d, self.c, self.e

    def __str__(self) -> str:
        words = [f"{self.p}-{self.t}-{self.d}"]
        if self.c > 1:
            words.append(f"cp{self.c}")
        if self.e > 1:
            words.append(f"ep{self.e}")
        if self.zero:
            words.append(f"ZeRO-{self.zero}")
        if self.replicas > 1:
            words.append(f"{self.replicas} replicas")
        if self.recompute:
            words.append("selective recompute" if self.selective else "recompute")
        if self.offload_activations:
            words.append("activations on host")
        if self.compiled:
            words.append("compiled")
        if self.offload:
            words.append("offload")
        return " ".join(words)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationLayout:
    """pg x tg per replica, `replicas` of them on the pool (the paper's dg * d).

    GenerationLayout(pg=1, tg=2, replicas=8, max_running=64)
    """

    pg: int = 1
    tg: int = 1
    replicas: int = 1
    max_running: int = 256
    """The most sequences that a replica decodes at once; its KV cache is sized for them."""
    kept: bool = False
    """Weights and cache of generation stay on the device during other calls (an engine that is
    not told to release them)."""

    @property
    def num_devices(self) -> int:
        return self.pg * self.tg * self.replicas

    def __str__(self) -> str:
        return f"{self.pg}-{self.tg} x{self.replicas} ({self.max_running} running)"
