"""Causal attention within each sequence of a micro-batch, whether sequences are the rows of a
padded block or share one packed row.

Neighbours of equal length are one batched call, so nothing is padded and no mask of tokens x tokens
exists. Responses to one prompt that share its tokens (packing.py) are queries of their own over the
prompt's keys and theirs. Three kernels: two matrix products and a softmax for short bfloat16
sequences on a CPU, where PyTorch's fused kernel has a slow backward pass; PyTorch's variable-length
kernel for packed half-precision rows on CUDA; its fused kernel for all else. Sliding windows and
soft-capping are applied here, not by masks of transformers. Attention sinks take products of tiles
(ring.py). Position biases are left out and refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from inspect import signature
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, use_gqa_in_sdpa

from workers.engines.model.attention_probe import hands_packing_on
from workers.engines.model.blocks import Scores
from workers.engines.model.capped_attention import capped, visible
from workers.engines.model.context_parallel import exchange_inputs, exchange_output
from workers.engines.model.packing import Packing, Run
from workers.engines.model.remade import REMAKES, Copied
from workers.engines.model.ring import block_attention, ring_attention
from workers.engines.model.rotary import depends_on_length

ATTENTION, FUSED_ATTENTION = "sequences", "sequences_fused"
"""The names under which transformers finds it: with all kernels, and with PyTorch's only."""
BLOCKS = "image_blocks"
"""Keyword argument of a model's forward: int64 [rows, time], the number of the image that a token
belongs to, whose tokens see each other; -1 for text."""
LONGEST = 768
"""Tokens up to which the matrix products are faster than the fused kernel (docs/training.md has the
figures).
"""
LARGEST_HEAD, HEAD_MULTIPLE = 256, 8
"""Numbers of a head that the variable-length kernel takes: at most the first, a multiple of the
second."""
LARGEST_MASK = 2**22
"""Elements up to which a response that shares its prompt attends under a mask of its own tokens
x all that it sees; a longer one attends as if the prompt's queries stood before its own, which
needs no mask."""
KERNEL_OPTIONS = frozenset(signature(varlen_attn).parameters)
"""The names of its arguments: PyTorch 2.11 has none for grouped heads, and takes them."""
PACKED_ATTENTIONS = (ATTENTION, FUSED_ATTENTION, "flash_attention_2", "flash_attention_3")
"""Attentions that keep the sequences of a row apart without a mask."""
LAYER_TYPES = {"full_attention", "sliding_attention"}


def use_sequence_attention(model: PreTrainedModel, *, fused: bool) -> None:
    """In every layer of `model` that would use PyTorch's fused kernel, or has attention sinks, which
    that lacks; fused=True: with PyTorch's kernels only."""
    chosen = model.config._attn_implementation
    replaces = chosen == "sdpa" or (chosen == "eager" and not fused and _has_sinks(model))
    if replaces and _why_not(model) is None:
        name = FUSED_ATTENTION if fused else ATTENTION
        # A vision tower keeps its own: an image's patches all see each other.
        model.set_attn_implementation({"": name, "text_config": name})


def _has_sinks(model: PreTrainedModel) -> bool:
    return any(name.endswith(".sinks") for name, _ in model.named_parameters())


def check_packable(model: PreTrainedModel) -> None:
    """ValueError if sequences that share a row would see each other, or only a mask of tokens x
    tokens would keep them apart."""
    why, attention = _why_not(model), model.config._attn_implementation
    if why is None and attention not in PACKED_ATTENTIONS:
        why = (
            f"attention {attention} would need a mask over the whole row; set "
            "model.attention=auto or"
        )
    if why is not None:
        raise ValueError(f"train.packing is true, but {why} set packing=false")


def can_share_prompts(model: PreTrainedModel) -> bool:
    """Whether responses to one prompt can go on after the same tokens of a packed row:
    attention is ours, and a token's position means the same whatever follows it."""
    return _is_ours(model) and not depends_on_length(model.config)


def check_shares_rows(model: PreTrainedModel, cp: int) -> None:
    """ValueError if the ranks of context parallelism can't share the rows of `model`."""
    check_packable(model)
    if not _is_ours(model):
        raise ValueError(
            f"train.cp is {cp}, but attention {model.config._attn_implementation} works on whole "
            "rows; set model.attention=auto, or cp=1"
        )


def _is_ours(model: PreTrainedModel) -> bool:
    return model.config._attn_implementation in (ATTENTION, FUSED_ATTENTION)


def _why_not(model: PreTrainedModel) -> str | None:
    """Why the model's layers do more than causal attention as transformers' interface describes
    it; None if they do not."""
    config = model.config
    text = config.get_text_config().to_dict()
    others = sorted(set(text.get("layer_types") or ()) - LAYER_TYPES)
    if model._is_stateful or others:
        kinds = ", ".join(others) or "they carry a state"
        return f"{config.model_type} has layers that are no plain attention ({kinds});"
    if not (model._supports_attention_backend and model._supports_flash_attn):
        return f"the attention of {config.model_type} can't be told where sequences begin;"
    if not hands_packing_on(model):
        return f"the layers of {config.model_type} don't tell attention where sequences begin;"
    return None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    fused: bool,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    image_blocks: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [rows, heads, time, head_dim], key and value [rows, key_value_heads, time, ...] ->
    [rows, time, heads, head_dim].

    With `packing` there is one row, or this rank's part of it; without, each row is a sequence, and
    padding at its end is seen by nothing.
    """
    if position_bias is not None or not module.is_causal or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{type(module).__name__} does more than causal attention; set model.attention=eager "
            "and packing=false"
        )
    assert attention_mask is None, "a mask that _no_mask did not make"
    plain = softcap is None and s_aux is None and (packing is None or packing.part is None)
    assert image_blocks is None or plain, "image_layouts.py saw to it"
    rows, _heads, time, head_dim = query.shape
    scale = head_dim**-0.5 if scaling is None else scaling
    queries, keys, values = (heads.transpose(1, 2).flatten(0, 1) for heads in (query, key, value))
    part = None if packing is None else packing.part
    scores = Scores(scale, sliding_window, softcap)
    if part is not None and part.ring is not None:
        output = ring_attention(
            queries, keys, values, part.ring, part.sizes, part.group, scores, s_aux
        )
        return output.unflatten(0, (rows, time)), None
    if part is not None:
        queries, keys, values = exchange_inputs(queries, keys, values, part)
        packing = packing if part.seen is None else part.seen
        if s_aux is not None and part.seen is None:
            s_aux = s_aux.chunk(part.group.size())[part.group.rank()]
    remakes = getattr(module, REMAKES, False) and keys.requires_grad
    index = None if packing is None else packing.keys
    copied = Copied((keys.detach(), values.detach()), index) if remakes else None
    if index is not None:
        keys, values = _Take.apply(keys, index), _Take.apply(values, index)
    variable = (
        query.is_cuda
        and query.dtype is not torch.float32
        and softcap is None
        and value.shape[3] == head_dim <= LARGEST_HEAD
        and head_dim % HEAD_MULTIPLE == 0
    )
    runs = (Run(rows, time),) if packing is None else packing.runs
    if s_aux is not None:
        shapes = [((run.length, run.prefix),) * run.count for run in runs]
        output = block_attention(queries, keys, values, sum(shapes, ()), scores, s_aux)
    elif image_blocks is not None:
        blocks = image_blocks.flatten()
        output = _among_images((queries, keys, values), runs, blocks, scale, sliding_window)
    elif packing is not None and variable:
        with nullcontext() if copied is None else copied.hooks(keys, values):
            output = _variable_length((queries, keys, values), packing, scale, sliding_window)
    else:
        products = (
            not fused
            and softcap is None
            and query.dtype is torch.bfloat16
            and query.device.type == "cpu"
        )
        parts = (queries, keys, values)
        output = _run_by_run(parts, runs, products, scores, copied)
    if part is not None:
        output = exchange_output(output, part)
    return output.unflatten(0, (rows, time)), None


class _Take(torch.autograd.Function):
    """Rows of a tensor, each as often as asked for; gradients are summed in a fixed order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = rows.shape
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        total = gradient.new_zeros(ctx.shape)
        if gradient.is_cuda:  # index_add_ adds in any order there
            return total.index_put_((index,), gradient, accumulate=True), None
        return total.index_add_(0, index, gradient), None


def _no_mask(*, attention_mask: Tensor | None = None, use_vmap: bool = False, **_: Any) -> None:
    """Causality, windows and the ends of sequences are known to attend()."""
    if use_vmap or (attention_mask is not None and not bool(attention_mask.all())):
        raise ValueError(
            "the model asks for an attention mask that is not plainly causal; set "
            "model.attention=eager and packing=false"
        )


def _variable_length(
    parts: tuple[Tensor, Tensor, Tensor], packing: Packing, scale: float, window: int | None
) -> Tensor:
    """One call for the whole row [tokens, heads, head_dim]; CUDA, half precision.

    The kernel's causal mask is aligned at the end of keys and queries, as a response after its
    prefix needs it.
    """
    before = -1 if window is None else window - 1
    key_ends = packing.ends if packing.key_ends is None else packing.key_ends
    most_keys = max(run.prefix + run.length for run in packing.runs)
    options: dict[str, Any] = {
        "enable_gqa": True,
        "num_splits": 1 if torch.are_deterministic_algorithms_enabled() else None,
    }
    output = varlen_attn(
        *parts,
        packing.ends,
        key_ends,
        packing.longest,
        most_keys,
        scale=scale,
        window_size=(before, 0),
        **{name: options[name] for name in KERNEL_OPTIONS & options.keys()},
    )
    assert isinstance(output, Tensor)
    return output


def _run_by_run(
    parts: tuple[Tensor, Tensor, Tensor],
    runs: tuple[Run, ...],
    products: bool,
    scores: Scores,
    copied: Copied | None,
) -> Tensor:
    """Queries [tokens, heads, head_dim], keys and values [keys, key_value_heads, head_dim] ->
    [tokens, heads, head_dim]."""
    scale, window = scores.scale, scores.window
    units: list[tuple[Run, ...]] = []
    for short, group in groupby(runs, lambda run: products and run.prefix + run.length <= LONGEST):
        together = tuple(group)
        if short:
            units.append(together)
        else:
            units.extend((run,) for run in together)
    outputs, end = [], 0
    for unit, queries, keys, values in zip(units, *_split(units, *parts), strict=True):
        run, begin, end = unit[0], end, end + len(keys)
        if products and run.prefix + run.length <= LONGEST:
            outputs.append(_Products.apply(queries, keys, values, unit, scale, window))
            continue
        query = queries.unflatten(0, (run.count, run.length)).transpose(1, 2)
        key, value = (
            tensor.unflatten(0, (run.count, run.prefix + run.length)).transpose(1, 2)
            for tensor in (keys, values)
        )
        if scores.softcap is not None:
            output = capped(query, key, value, scale, window, scores.softcap)
        else:
            of_run = None if copied is None else copied.of_run(begin, run)
            output = _fused_kernel(query, key, value, scale, window, copied=of_run)
        outputs.append(output.flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _among_images(
    parts: tuple[Tensor, Tensor, Tensor],
    runs: tuple[Run, ...],
    blocks: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """As _run_by_run, where tokens with the same number in `blocks` (int64 [tokens], -1: none) see each
    other too, within the window: Gemma 3's images."""
    outputs = []
    units = [(run,) for run in runs]
    by_run = zip(runs, *_split(units, *parts), *_split(units, blocks), strict=True)
    for run, queries, keys, values, own in by_run:
        query = queries.unflatten(0, (run.count, run.length)).transpose(1, 2)
        key, value = (
            tensor.unflatten(0, (run.count, run.prefix + run.length)).transpose(1, 2)
            for tensor in (keys, values)
        )
        numbers = own.unflatten(0, (run.count, 1, run.length))
        same = (numbers[..., None] == numbers[..., None, :]) & (numbers >= 0)[..., None]
        mask = visible(run.length, run.prefix + run.length, None, own.device)
        mask = mask | F.pad(same, (run.prefix, 0))
        if window is not None:
            mask = mask.triu(run.prefix + 1 - window)
        outputs.append(_fused_kernel(query, key, value, scale, window, mask).flatten(0, 1))
    return torch.cat(outputs)


def _split(
    units: Sequence[tuple[Run, ...]], queries: Tensor, *others: Tensor
) -> list[tuple[Tensor, ...]]:
    """Each unit's queries, and its rows of the other tensors, which have one for each key."""
    if len(units) == 1:
        return [(queries,), *((tensor,) for tensor in others)]
    num_queries = [sum(run.num_queries for run in unit) for unit in units]
    num_keys = [sum(run.num_keys for run in unit) for unit in units]
    return [queries.split(num_queries), *(tensor.split(num_keys) for tensor in others)]


def _fused_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    mask: Tensor | None = None,
    copied: Copied | None = None,
) -> Tensor:
    """PyTorch's fused kernel: [rows, heads, time, ...] -> [rows, time, heads, ...]. `mask`: bool [rows,
    1, time, keys], what each token sees, where that is more than what is before it. `copied`: what
    key and value were copied from; autograd keeps that."""
    time, seen = query.shape[2], key.shape[2]
    prefix = seen - time
    if mask is not None:
        pass
    elif (window is not None and window < seen) or 0 < time * prefix <= LARGEST_MASK:
        mask = visible(time, seen, window, query.device)
    elif prefix:
        query = F.pad(query, (0, 0, prefix, 0))
    copies = query.shape[1] // key.shape[1]
    grouped = copies > 1 and takes_groups(mask, key, value)
    if copies > 1 and not grouped:
        key, value = repeat_kv(key, copies), repeat_kv(value, copies)
        copied = None if copied is None else replace(copied, copies=copies)
    with nullcontext() if copied is None else copied.hooks(key, value):
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            scale=scale,
            is_causal=mask is None and query.shape[2] > 1,
            enable_gqa=grouped,
        )
    return output.transpose(1, 2)[:, output.shape[2] - time :]


def takes_groups(mask: Tensor | None, key: Tensor, value: Tensor) -> bool:
    """Whether a fused kernel takes fewer key-value heads than query heads. On CUDA only the
    half-precision one does: in float32 PyTorch would compute all scores at once."""
    if key.is_cuda and key.dtype is torch.float32:
        return False
    return bool(use_gqa_in_sdpa(mask, key, value))


class _Products(torch.autograd.Function):
    """Short bfloat16 sequences: the query heads of one key-value head are rows of one product, so
    keys and values are not repeated.

    One node for all runs of a row; autograd would pad every run's gradient to the row's length, and
    copy more often.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        runs: tuple[Run, ...],
        scale: float,
        window: int | None,
    ) -> Tensor:
        kv_heads = key.shape[1]
        output = query.new_empty(*query.shape[:2], value.shape[2])
        bias = _bias(window)
        trains, saved = any(ctx.needs_input_grad), list[Tensor]()
        units = [(run,) for run in runs]
        by_run = _split(units, query, key, value)
        by_run += _split(units, output)
        for run, queries, keys, values, out in zip(runs, *by_run, strict=True):
            q = _grouped(queries, run.count, kv_heads) * scale
            k, v = (_grouped(part, run.count, kv_heads) for part in (keys, values))
            scores = torch.bmm(q, k.transpose(1, 2))
            seen = run.prefix + run.length
            scores.unflatten(1, (-1, run.length)).add_(bias[run.prefix : seen, :seen])
            probs = torch.softmax(scores, -1)
            _ungroup(torch.bmm(probs, v), run.count, out)
            if trains:
                saved += [q, k, v, probs]
        ctx.save_for_backward(*saved)
        ctx.runs, ctx.scale, ctx.shapes = runs, scale, (query.shape, key.shape, value.shape)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """P = softmax(S), S = scale Q K^T: dV = P^T dO, dP = dO V^T, dS = P (dP - sum(P dP)),
        dQ = scale dS K, dK = dS^T (scale Q)."""
        runs, saved = ctx.runs, ctx.saved_tensors
        grads = [gradient.new_empty(shape) for shape in ctx.shapes]
        kv_heads = ctx.shapes[1][1]
        units = [(run,) for run in runs]
        by_run = _split(units, gradient) + _split(units, *grads)
        for index, (run, out, *parts) in enumerate(zip(runs, *by_run, strict=True)):
            q, k, v, probs = saved[4 * index : 4 * index + 4]
            grad = _grouped(out, run.count, kv_heads)
            slope = torch.bmm(grad, v.transpose(1, 2))
            slope = torch._softmax_backward_data(slope, probs, -1, probs.dtype)
            _ungroup(torch.bmm(slope, k).mul_(ctx.scale), run.count, parts[0])
            _ungroup(torch.bmm(slope.transpose(1, 2), q), run.count, parts[1])
            _ungroup(torch.bmm(probs.transpose(1, 2), grad), run.count, parts[2])
        return *grads, None, None, None


def _grouped(part: Tensor, count: int, kv_heads: int) -> Tensor:
    """[count * time, heads, head_dim] -> [count * kv_heads, heads / kv_heads * time, head_dim]."""
    return (
        part.reshape(count, -1, kv_heads, part.shape[1] // kv_heads, part.shape[2])
        .permute(0, 2, 3, 1, 4)
        .reshape(count * kv_heads, -1, part.shape[2])
    )


def _ungroup(grouped: Tensor, count: int, part: Tensor) -> None:
    """The inverse of _grouped, into `part`."""
    time = len(part) // count
    kv_heads = len(grouped) // count
    part.view(count, time, kv_heads, -1, part.shape[2]).copy_(
        grouped.view(count, kv_heads, -1, time, part.shape[2]).permute(0, 3, 1, 2, 4)
    )


@lru_cache(maxsize=4)
def _bias(window: int | None) -> Tensor:
    """bfloat16 [LONGEST, LONGEST]: 0 where a token may look, -inf where it may not; its corner
    serves every shorter sequence."""
    with torch.inference_mode(False):
        seen = visible(LONGEST, LONGEST, window, torch.device("cpu"))
        return torch.zeros(LONGEST, LONGEST, dtype=torch.bfloat16).masked_fill_(~seen, -torch.inf)


for _name, _fused in ((ATTENTION, False), (FUSED_ATTENTION, True)):
    AttentionInterface.register(_name, partial(attend, fused=_fused))
    AttentionMaskInterface.register(_name, _no_mask)
