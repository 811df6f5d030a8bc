"""Log-probabilities and entropies of tokens from logits whose vocabulary is split over tensor ranks;
log_probs.py's other half.

Three numbers a token travel between the ranks, never logits: the maximum, then, in one sum, the normaliser,
the target's logit and the expected logit. As there, float32 copies live for one chunk of tokens at a time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from workers.engines.model.log_probs import LogProbFn, _chunks, _scaled, token_log_probs


def vocabulary_parallel(group: ProcessGroup) -> LogProbFn:
    """The LogProbFn for this rank's logits [tokens, vocab / tp]; the plain one for a group of one rank."""
    return token_log_probs if group.size() == 1 else partial(parallel_token_log_probs, group=group)


def parallel_token_log_probs(
    logits: Tensor, targets: Tensor, temperature: float, entropy: bool, *, group: ProcessGroup
) -> tuple[Tensor, Tensor | None]:
    """log softmax(logits / temperature) at the targets, and the entropy of the full softmax if asked for.

    logits [tokens, vocab / tp] of the vocabulary's contiguous part `group.rank()`, targets int64 [tokens] of
    the whole vocabulary
    -> float32 [tokens], the same on every rank. The gradient reaches each rank's own logits.
    """
    log_probs, entropies = _ParallelTokenLogProbs.apply(logits, targets, temperature, entropy, group)
    return log_probs, entropies


class _ParallelTokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, entropy: bool, group: ProcessGroup
    ) -> tuple[Tensor, Tensor | None]:
        size = logits.shape[-1]
        places = targets - group.rank() * size
        mine = (places >= 0) & (places < size)
        places = places.clamp(0, size - 1)
        highest = logits.amax(-1).float() / temperature
        dist.all_reduce(highest, op=ReduceOp.MAX, group=group)
        # Per token, of x = logits / temperature - max: sum exp(x), x of the target, sum exp(x) x.
        sums = torch.zeros(3, len(targets), dtype=torch.float32, device=logits.device)
        for chunk in _chunks(logits):
            shifted = _scaled(logits[chunk], temperature).sub_(highest[chunk, None])
            sums[1, chunk] = shifted.gather(-1, places[chunk, None]).squeeze(-1) * mine[chunk]
            weights = shifted.exp()
            sums[0, chunk] = weights.sum(-1)
            if entropy:
                sums[2, chunk] = torch.linalg.vecdot(weights, shifted)
        dist.all_reduce(sums, group=group)
        log_sum = sums[0].log()
        # H = log Z - sum_v p_v x_v
        entropies = log_sum - sums[2] / sums[0] if entropy else None
        ctx.save_for_backward(
            logits, places, mine, highest + log_sum, *([entropies] if entropies is not None else [])
        )
        ctx.temperature = temperature
        return sums[1] - log_sum, entropies

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_log_probs: Tensor | None, grad_entropies: Tensor | None
    ) -> tuple[Tensor, None, None, None, None]:
        logits, places, mine, log_norm, *rest = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for chunk in _chunks(logits):
            log_probs = _scaled(logits[chunk], ctx.temperature).sub_(log_norm[chunk, None])
            probs = log_probs.exp()
            # d log p_t / d x_v = [v = t] - p_v ; d H / d x_v = -p_v (log p_v + H); both through x = logits /
            # temperature
            slope = torch.zeros_like(log_probs)
            if rest and grad_entropies is not None:
                slope = (log_probs + rest[0][chunk, None]).mul_(-grad_entropies[chunk, None])
            if grad_log_probs is not None:
                slope -= grad_log_probs[chunk, None]
            result = probs.mul_(slope)
            if grad_log_probs is not None:
                result.scatter_add_(-1, places[chunk, None], (grad_log_probs[chunk] * mine[chunk])[:, None])
            gradient[chunk] = result.div_(ctx.temperature)
        return gradient, None, None, None, None
