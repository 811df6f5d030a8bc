"""Log-probabilities and entropies of tokens from hidden states and the output embedding, in
float32, with bounded memory.

Logits exist for one chunk of tokens at a time, forward and backward: the backward pass computes
them again, unless all of them fit into one chunk. Where the vocabulary is split over tensor ranks,
four numbers a token travel between the ranks, never logits. What a model family does to its logits
after the output embedding (soft-capping, scaling) is its own forward code, found by logits_tail.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup, ReduceOp
from transformers import PreTrainedModel

Tail = Callable[[Tensor], Tensor]
"""What follows the output embedding, number by number: logits [tokens, vocab] -> logits."""

CHUNK_ELEMENTS = 2**24
"""Logits of one chunk on a CPU: 64 MiB in float32, and enough rows for a matrix product at full
speed."""
DEVICE_CHUNK_ELEMENTS = 2**27
"""Logits of one chunk on an accelerator: 512 MiB in float32, enough to fill it."""
CACHE_ELEMENTS = 2**18
"""Logits that are looked at together on a CPU: 1 MiB in float32 stays in a core's cache."""


def head_log_probs(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    tail: Tail | None = None,
    group: ProcessGroup | None = None,
    first_token: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(tail(hidden W^T + b) / temperature) at the targets, and the entropy of the full
    softmax.

    hidden [tokens, hidden], weight [vocab, hidden], bias [vocab] in any float dtype, targets int64
    [tokens]
    -> float32 [tokens] each; both can be differentiated once. weight=None: `hidden` holds the logits. With
    `group`, weight and bias are a part of the vocabulary, from `first_token` on, of any size; targets are
    of the whole one, and the results are the same on every rank; the gradient of `hidden` is then
    this rank's part of a sum.
    """
    settings = (
        temperature,
        entropy,
        tail,
        group if group is not None and group.size() > 1 else None,
        first_token,
    )
    log_probs, entropies = _HeadLogProbs.apply(hidden, weight, bias, targets, settings)
    return log_probs, entropies


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        targets: Tensor,
        settings: Any,
    ) -> tuple[Tensor, Tensor | None]:
        temperature, entropy, tail, group, first_token = settings
        vocab = hidden.shape[-1] if weight is None else len(weight)
        chunks = list(_chunks(len(targets), vocab, hidden.device))
        places, mine = _places(targets, vocab, group, first_token)
        # Per token, of x = logits / temperature - max: sum exp(x), x of the target, sum exp(x) x.
        highest = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        sums = torch.zeros(3, len(targets), dtype=torch.float32, device=hidden.device)
        kept = None
        for chunk in chunks:
            logits = _logits(hidden[chunk], weight, bias)
            if len(chunks) == 1 and any(ctx.needs_input_grad):
                kept = logits
            if tail is not None:
                logits = tail(logits)
            for part in _parts(chunk, logits):
                scaled = _scaled(
                    logits[part.start - chunk.start : part.stop - chunk.start], temperature
                )
                highest[part] = scaled.amax(-1)
                shifted = scaled.sub_(highest[part, None])
                sums[1, part] = shifted.gather(-1, places[part, None]).squeeze(-1)
                if entropy:
                    weights = shifted.exp()
                    sums[2, part] = torch.linalg.vecdot(weights, shifted)
                else:
                    weights = shifted.exp_()
                sums[0, part] = weights.sum(-1)
            del logits  # not beside the next chunk's
        if group is not None:
            highest = _sum_over_ranks(sums, highest, mine, group)
        log_sum = sums[0].log()
        # H = log Z - sum_v p_v x_v
        entropies = log_sum - sums[2] / sums[0] if entropy else None
        ctx.settings, ctx.chunks, ctx.mine = settings, chunks, mine
        ctx.save_for_backward(hidden, weight, bias, places, highest + log_sum, entropies, kept)
        return sums[1] - log_sum, entropies

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_log_probs: Tensor | None, grad_entropies: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden, weight, bias, places, log_norm, entropies, kept = ctx.saved_tensors
        temperature, _, tail, _, _ = ctx.settings
        if grad_log_probs is None:
            grad_log_probs = torch.zeros_like(log_norm)
        grad_hidden = torch.empty_like(hidden)
        # Sums over chunks are taken in float32, whatever the weights are kept in. That of the weight
        # is as large as the weight: the first chunk writes it, so that it is not filled before.
        grad_weight = None
        if ctx.needs_input_grad[1]:
            assert weight is not None
            make = torch.empty_like if ctx.chunks else torch.zeros_like
            grad_weight = make(weight, dtype=torch.float32)
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for chunk in ctx.chunks:
            raw = kept if kept is not None else _logits(hidden[chunk], weight, bias)
            logits = raw if tail is None else tail(raw)
            slopes = torch.empty_like(raw)
            for part in _parts(chunk, logits):
                inner = slice(part.start - chunk.start, part.stop - chunk.start)
                log_probs = _scaled(logits[inner], temperature).sub_(log_norm[part, None])
                # d log p_t / d x_v = [v = t] - p_v ; d H / d x_v = -p_v (log p_v + H); both through
                # x = logits / temperature
                down = -grad_log_probs[part, None]
                if entropies is not None and grad_entropies is not None:
                    slope = -grad_entropies[part, None]
                    probs = log_probs.exp()
                    result = probs.mul_(
                        torch.addcmul(down + slope * entropies[part, None], slope, log_probs)
                    )
                else:
                    result = log_probs.exp_().mul_(down)
                up = (
                    grad_log_probs[part]
                    if ctx.mine is None
                    else grad_log_probs[part] * ctx.mine[part]
                )
                result.scatter_add_(-1, places[part, None], up[:, None])
                slopes[inner] = result if temperature == 1.0 else result.div_(temperature)
            if tail is not None:
                slopes = _through(tail, raw, slopes)
            grad_hidden[chunk] = slopes if weight is None else slopes @ weight
            if grad_weight is not None:
                _add_product(grad_weight, slopes, hidden[chunk], first=chunk.start == 0)
            if grad_bias is not None:
                grad_bias += slopes.sum(0, dtype=torch.float32)
            del raw, logits, slopes  # not beside the next chunk's
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def _logits(hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return hidden if weight is None else F.linear(hidden, weight, bias)


def _places(
    targets: Tensor, vocab: int, group: ProcessGroup | None, first_token: int
) -> tuple[Tensor, Tensor | None]:
    """Where each target is in this rank's part of the vocabulary, and whether it is there
    (None: always)."""
    if group is None:
        return targets, None
    places = targets - first_token
    mine = (places >= 0) & (places < vocab)
    return places.clamp(0, vocab - 1), mine


def _sum_over_ranks(
    sums: Tensor, highest: Tensor, mine: Tensor | None, group: ProcessGroup
) -> Tensor:
    """Brings the sums of all parts of the vocabulary, each relative to its own maximum, to a
    common one."""
    assert mine is not None
    total = highest.clone()
    dist.all_reduce(total, op=ReduceOp.MAX, group=group)
    lower = highest - total
    sums[2] = (sums[2] + lower * sums[0]) * lower.exp()
    sums[1] = (sums[1] + lower) * mine
    sums[0] *= lower.exp()
    dist.all_reduce(sums, group=group)
    return total


def _through(tail: Tail, raw: Tensor, slopes: Tensor) -> Tensor:
    """The gradient before the tail, from the one after it."""
    with torch.enable_grad():
        before = raw.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(tail(before), before, slopes)
    return gradient


def _add_product(total: Tensor, slopes: Tensor, hidden: Tensor, *, first: bool) -> None:
    """total += slopes^T hidden; total = slopes^T hidden where `first`."""
    if first and slopes.dtype is total.dtype:
        torch.mm(slopes.t(), hidden, out=total)
    elif first:
        total.copy_(slopes.t() @ hidden)
    elif slopes.dtype is total.dtype:
        total.addmm_(slopes.t(), hidden)
    else:
        total += slopes.t() @ hidden


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """A fresh float32 copy of logits / temperature."""
    scaled = logits.to(torch.float32, copy=True)
    return scaled if temperature == 1.0 else scaled.div_(temperature)


def _chunks(num_tokens: int, vocab: int, device: torch.device) -> Iterator[slice]:
    elements = CHUNK_ELEMENTS if device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
    yield from _slices(0, num_tokens, max(1, elements // max(1, vocab)))


def _parts(chunk: slice, logits: Tensor) -> Iterator[slice]:
    """The tokens of a chunk, as many at a time as a cache holds."""
    size = (
        len(logits)
        if logits.device.type != "cpu"
        else max(1, CACHE_ELEMENTS // max(1, logits.shape[-1]))
    )
    yield from _slices(chunk.start, chunk.stop, max(1, size))


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    for begin in range(start, stop, size):
        yield slice(begin, min(begin + size, stop))


class TokenScorer:
    """The forward of an output embedding that answers with numbers per token in place of logits.

    scorer = TokenScorer(head, tail)       # head.forward is replaced
    log_probs, entropy = head(hidden, targets, temperature=1.0, entropy=True)

    Called as a module, so that whoever gathers the head's weight (FSDP2, ZeRO-3, tensor
    parallelism) does it.
    """

    def __init__(self, head: nn.Linear, tail: Tail | None) -> None:
        self.head, self.tail = head, tail
        self.group: ProcessGroup | None = None
        """The tensor ranks over which the vocabulary is split."""
        self.first_token = 0
        """Where this rank's part of the vocabulary begins."""
        head.forward = self  # type: ignore[method-assign, assignment]

    def __call__(
        self, hidden: Tensor, targets: Tensor, *, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.head.weight, self.head.bias
        return head_log_probs(
            hidden,
            weight,
            bias,
            targets,
            temperature=temperature,
            entropy=entropy,
            tail=self.tail,
            group=self.group,
            first_token=self.first_token,
        )


def logits_tail(model: PreTrainedModel) -> Tail | None:
    """The things that the family's own forward does to the numbers that the output embedding gives; None:
    nothing.

    Runs that forward with the decoder and the head taken out, which needs no weights. ValueError
    for a model that puts more between its decoder and its logits than one linear layer and a
    function of single numbers.
    """
    head = model.get_output_embeddings()
    others = [
        name
        for name, child in model.named_children()
        if child is not model.base_model
        and child is not head
        and any(True for _ in child.parameters())
    ]
    if type(head) is not nn.Linear or model.base_model is model or others:
        kind = model.config.model_type
        raise ValueError(
            f"{kind} has more than a linear layer between its decoder and its logits: {others}"
        )
    decoder = _Decoder()
    shell, base = copy.copy(model), copy.copy(model.base_model)
    base._modules = dict.fromkeys(base._modules, decoder)
    # A copy shares the decoder's hooks, those that engines add later (ZeRO-3's) included.
    vars(base).update({name: none for name, none in vars(nn.Module()).items() if "_hooks" in name})
    base.forward = decoder.forward  # type: ignore[method-assign]
    stand_ins = {id(model.base_model): base, id(head): _Unchanged()}
    shell._modules = {
        name: stand_ins.get(id(child), child) for name, child in model._modules.items()
    }

    def tail(logits: Tensor) -> Tensor:
        decoder.numbers = logits[None]
        ids = torch.zeros(1, len(logits), dtype=torch.int64, device=logits.device)
        result: Tensor = type(model).forward(shell, input_ids=ids, use_cache=False).logits
        decoder.numbers = None
        return result[0]

    numbers = torch.linspace(-50.0, 50.0, 24).view(4, 6)
    changed = tail(numbers)
    if torch.equal(changed, numbers):
        return None
    if changed.shape != numbers.shape or not torch.equal(tail(numbers.t()), changed.t()):
        raise ValueError(
            f"{model.config.model_type} does more to its logits than a function of single numbers"
        )
    return tail


class _Decoder(nn.Module):
    """Stands for the decoder, or the module inside it that a family calls (OPT), and answers
    with given numbers."""

    numbers: Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> _Answer:
        assert self.numbers is not None
        return _Answer(self.numbers)


class _Answer:
    """A decoder's outputs of any family: the hidden states, and None for all that a family adds
    to them."""

    def __init__(self, numbers: Tensor) -> None:
        self.last_hidden_state = numbers

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


class _Unchanged(nn.Identity):
    """Stands for the output embedding; some families look at its dtype."""

    weight = torch.empty(0)
