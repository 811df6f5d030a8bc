"""Log-probabilities and entropies of tokens from logits, in float32, with bounded memory.

The float32 copies of the logits live for one chunk of tokens at a time, forward and backward; what stays
alive between the two is the logits themselves in the dtype in which the model made them. Vocabulary-parallel
logits are not handled here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

LogProbFn = Callable[[Tensor, Tensor, float, bool], tuple[Tensor, Tensor | None]]
"""(logits [tokens, vocab], targets int64 [tokens], temperature, with entropy) -> float32 (log_probs [tokens],
entropy [tokens] or None)."""

CPU_CHUNK_ELEMENTS = 2**18
"""Logits of one chunk on a CPU: 1 MiB in float32 stays in a core's cache."""
DEVICE_CHUNK_ELEMENTS = 2**27
"""Logits of one chunk on an accelerator: 512 MiB in float32, enough to fill it."""


def token_log_probs(
    logits: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """log softmax(logits / temperature) at the targets, and the entropy of the full softmax if asked for.

    logits [tokens, vocab] in any float dtype, targets int64 [tokens] -> float32 [tokens]; both results can be
    differentiated once.
    """
    log_probs, entropies = _TokenLogProbs.apply(logits, targets, temperature, entropy)
    return log_probs, entropies


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        num_tokens = len(targets)
        chosen = torch.empty(num_tokens, dtype=torch.float32, device=logits.device)
        log_norm = torch.empty_like(chosen)
        entropies = torch.empty_like(chosen) if entropy else None
        for chunk in _chunks(logits):
            scaled = _scaled(logits[chunk], temperature)
            log_norm[chunk] = torch.logsumexp(scaled, -1)
            chosen[chunk] = scaled.gather(-1, targets[chunk, None]).squeeze(-1)
            if entropies is not None:
                # H = -sum_v p_v log p_v, which loses fewer digits than log Z - sum_v p_v x_v if the logits
                # are far from 0
                table = scaled.sub_(log_norm[chunk, None])
                entropies[chunk] = -torch.linalg.vecdot(table.exp(), table)
        ctx.save_for_backward(logits, targets, log_norm, *([entropies] if entropies is not None else []))
        ctx.temperature = temperature
        return chosen - log_norm, entropies

    @staticmethod
    def backward(
        ctx: Any, grad_log_probs: Tensor | None, grad_entropies: Tensor | None
    ) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        logits, targets, log_norm, *rest = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for chunk in _chunks(logits):
            scaled = _scaled(logits[chunk], ctx.temperature)
            log_probs = scaled.sub_(log_norm[chunk, None])
            # d log p_t / d x_v = [v = t] - p_v ; d H / d x_v = -p_v (log p_v + H); both through x = logits /
            # temperature
            weights = _minus(grad_log_probs, chunk)
            if rest and grad_entropies is not None:
                probs = log_probs.exp()
                slope = -grad_entropies[chunk, None]
                result = probs.mul_(torch.addcmul(weights + slope * rest[0][chunk, None], slope, log_probs))
            else:
                result = log_probs.exp_().mul_(weights)
            if grad_log_probs is not None:
                result.scatter_add_(-1, targets[chunk, None], grad_log_probs[chunk, None])
            gradient[chunk] = result if ctx.temperature == 1.0 else result.div_(ctx.temperature)
        return gradient, None, None, None


def _minus(grad: Tensor | None, chunk: slice) -> Tensor | float:
    return -grad[chunk, None] if grad is not None else 0.0


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """A fresh float32 copy of logits / temperature."""
    copy = logits.to(torch.float32, copy=True)
    return copy if temperature == 1.0 else copy.div_(temperature)


def _chunks(logits: Tensor) -> Iterator[slice]:
    elements = CPU_CHUNK_ELEMENTS if logits.device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
    size = max(1, elements // max(1, logits.shape[-1]))
    for start in range(0, logits.shape[0], size):
        yield slice(start, start + size)
