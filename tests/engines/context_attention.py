"""What the ranks of test_context_attention.py do, and attention over a packed row as its definition
has it: token by token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.ranks import worlds
from workers.config import ContextExchange
from workers.engines.model import blocks
from workers.engines.model.attention import attend
from workers.engines.model.context_parallel import cut_row
from workers.engines.model.packing import packing_of

LENGTHS, PREFIXES = (5, 1, 2, 30, 7, 9, 3), (-1, -1, -1, -1, 0, 0, -1)
"""Two responses go on after the first segment."""
TOKENS, HEADS, KEY_HEADS, HEAD_DIM = sum(LENGTHS), 4, 2, 8
SCALE, STEP = 0.3, 1e-4
"""STEP: of the numeric derivative."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    exchange: ContextExchange
    world_size: int = 2
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    dtype: torch.dtype = torch.float64
    tile_elements: int = blocks.TILE_ELEMENTS

    @property
    def name(self) -> str:
        words = [self.exchange.value, self.world_size, self.window, self.softcap, self.has_sinks]
        return "-".join(map(str, [*words, self.dtype, self.tile_elements]))


@dataclass(kw_only=True, slots=True)
class Result:
    """A rank's part."""

    tokens: Tensor
    output: Tensor
    gradients: tuple[Tensor, ...]
    """Of queries, keys and values, and of all sinks, where there are some, its share."""
    numeric: float
    """The derivative of the loss of all ranks along a direction, by differences."""
    analytic: float
    """The same by gradients."""


def inputs(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Queries, keys, values and weights of the outputs in the loss, [tokens, heads, head_dim], and
    sinks [heads]."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS):
        shape = (TOKENS, heads, HEAD_DIM)
        result.append(torch.randn(shape, generator=generator).to(dtype))
    return [*result, torch.randn(HEADS, generator=generator).to(dtype)]


def plain(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, case: Case) -> Tensor:
    """One token after the other."""
    ends = torch.cumsum(torch.tensor(LENGTHS), 0).tolist()
    outputs = []
    for segment, end in enumerate(ends):
        begin, prefix = end - LENGTHS[segment], PREFIXES[segment]
        before = list[int]()
        if prefix >= 0:
            before = list(range(ends[prefix] - LENGTHS[prefix], ends[prefix]))
        for token in range(begin, end):
            seen = [*before, *range(begin, token + 1)]
            if case.window is not None:
                seen = seen[-case.window :]
            for head in range(HEADS):
                of_head = head * KEY_HEADS // HEADS
                scores = SCALE * k[seen, of_head] @ q[token, head]
                if case.softcap is not None:
                    scores = case.softcap * torch.tanh(scores / case.softcap)
                if case.has_sinks:
                    scores = torch.cat([scores, sinks[head, None]])
                probs = torch.softmax(scores, 0)[: len(seen)]
                outputs.append(probs @ v[seen, of_head])
    return torch.stack(outputs).view(TOKENS, HEADS, HEAD_DIM)


def run(rank: int, root: Path, cases: list[Case], backend: str = "gloo") -> None:
    for world_size in worlds(rank, root, (4, 2), backend):
        dist.all_reduce(torch.zeros(1))  # a GPU's group begins with what all ranks join
        for case in cases:
            if case.world_size == world_size:
                torch.save(_attend(case), root / f"{case.name}.{rank}.pt")


def _attend(case: Case) -> Result:
    """This rank's part of the outputs and gradients, and a derivative by differences."""
    group = dist.group.WORLD
    assert group is not None
    blocks.TILE_ELEMENTS, blocks.FEWEST_QUERIES = case.tile_elements, 1
    packing = cut_row(packing_of(LENGTHS, PREFIXES), group, case.exchange)
    assert packing.part is not None
    tokens = packing.part.tokens
    *whole, weights, sinks = inputs(case.dtype)
    module = nn.Module()
    module.is_causal = True  # type: ignore[assignment]

    def loss_of(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        q, k, v = (part.transpose(0, 1)[None] for part in parts[:3])
        output, _ = attend(
            module,
            q,
            k,
            v,
            None,
            SCALE,
            fused=True,
            packing=packing,
            sliding_window=case.window,
            softcap=case.softcap,
            s_aux=parts[3] if case.has_sinks else None,
        )
        return (weights[tokens] * output[0]).sum(), output[0].detach()

    local = [part[tokens] for part in whole]
    directions = [direction[tokens] for direction in inputs(case.dtype, seed=1)[:3]]
    if case.has_sinks:
        local.append(sinks)
        directions.append(inputs(case.dtype, seed=1)[4])
    for part in local:
        part.requires_grad_()
    loss, output = loss_of(local)
    gradients = torch.autograd.grad(loss, local)
    sums = []
    for sign in (1, -1):
        moved = []
        for part, direction in zip(local, directions, strict=True):
            moved.append(part.detach() + sign * STEP * direction)
        sums.append(loss_of(moved)[0])
    slope = torch.zeros((), dtype=torch.float64)
    for gradient, direction in zip(gradients, directions, strict=True):
        slope += (gradient * direction).sum()
    both = torch.stack([(sums[0] - sums[1]) / (2 * STEP), slope])
    dist.all_reduce(both)
    return Result(
        tokens=tokens,
        output=output,
        gradients=gradients,
        numeric=float(both[0]),
        analytic=float(both[1]),
    )
