"""How one model is cut over the devices of its pool: for training and forward passes, and for generation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLayout:
    """Pipeline x tensor x data, with what else decides time and memory of a training or forward pass.

    ModelLayout(p=1, t=8, d=2, zero=1, recompute=True, micro_batch_tokens=4096)  # the paper's 1-8-2
    """

    p: int = 1
    t: int = 1
    d: int = 1
    zero: int = 0
    """ZeRO stage over d: 1 cuts optimizer states, 2 also gradients, 3 also parameters (Rajbhandari et al.
    2020)."""
    recompute: bool = False
    """Recompute a layer's activations in the backward pass (activation checkpointing)."""
    micro_batch_tokens: int = 4096
    """Most tokens that one pass of one data replica holds."""
    offload: bool = False
    """Keep what only a training call needs (trained models: optimizer) or all parameters (others) in host
    memory between calls."""

    @property
    def num_devices(self) -> int:
        return self.p * self.t * self.d

    def __str__(self) -> str:
        extras = (
            [f"ZeRO-{self.zero}"] * bool(self.zero)
            + ["recompute"] * self.recompute
            + ["offload"] * self.offload
        )
        return " ".join([f"{self.p}-{self.t}-{self.d}", *extras])


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationLayout:
    """pg x tg per replica, `replicas` of them on the pool (the paper's dg * d).

    GenerationLayout(pg=1, tg=2, replicas=8, max_running=64)
    """

    pg: int = 1
    tg: int = 1
    replicas: int = 1
    max_running: int = 256
    """Most sequences that one replica decodes at once; its KV cache is sized for them."""
    kept: bool = False
    """Weights and cache of generation stay on the device during other calls (an engine that is not told to
    release them)."""

    @property
    def num_devices(self) -> int:
        return self.pg * self.tg * self.replicas

    def __str__(self) -> str:
        return f"{self.pg}-{self.tg} x{self.replicas} ({self.max_running} running)"
