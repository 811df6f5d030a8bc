"""Drawing tokens: one definition for every engine, layout and device, decided by a row's seed and
the position in its response.

Gumbel-max in two steps. The vocabulary is cut into blocks of consecutive tokens; a block is drawn
by Gumbel noise on the logarithms of the blocks' masses, then a token inside it by Gumbel noise on
its logits. That is exactly the softmax, with about 2 * sqrt(vocab) noise numbers a token in place
of vocab. Noise is a hash of (seed, position, round, index), so nothing is kept between steps and no
random generator of the process is touched. Rounding moves a draw only where two sums of logit and
noise are equal within rounding, about once in a million tokens for float32: the same seeds give the
same samples on other layouts.

top-p is a rejection: draw from all tokens, keep the draw if the tokens more likely than it hold
less than top_p, else draw again with the next round's noise. Over top_p of the draws are kept, and
nothing is sorted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workers.generation.config import SamplingConfig

GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""Constants of SplitMix64 (Steele, Lea, Flood 2014)."""

FIXED_POINT = 2**40
MOST_ROUNDS = 16
"""Rejections by top-p before the rest is sorted; the round's number is part of the hash, below
2048."""


def sample_tokens(
    logits: Tensor, seeds: Tensor, positions: Tensor, sampling: SamplingConfig
) -> tuple[Tensor, Tensor]:
    """Token ids [rows] and their log-probs [rows] (float32) under the full softmax at the
    temperature, before every filter.

    logits [rows, vocab], any float type, not yet divided by the temperature; seeds and positions
    int64 [rows].
    """
    logits = logits.float()
    if sampling.greedy:
        highest, ids = logits.max(dim=-1, keepdim=True)
        return ids.squeeze(-1), -(logits - highest).exp_().sum(dim=-1).log_()
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    masses = BlockMasses(logits)
    kept = keep_most_likely(logits, sampling)
    ids = sample_within_top_p(
        kept, masses if kept is logits else BlockMasses(kept), seeds, positions, sampling.top_p
    )
    return ids, logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - masses.log_total()


@dataclass(frozen=True, slots=True)
class Draws:
    """How the tokens of one row are drawn."""

    seed: int = 0
    position: int = 0
    """The position of its first token among the draws of the seed."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    forced: Sequence[int] = ()
    """Tokens to take in place of draws, with their log-probs at temperature 1."""


DrawGroup = tuple[SamplingConfig, Tensor]
"""Settings, and the rows (places in a batch, int64) that are drawn with them."""


def draw_groups(
    samplings: Mapping[int, SamplingConfig], device: torch.device | str
) -> list[DrawGroup]:
    """Rows (places in a batch) by the settings that decide their draws."""
    places: dict[tuple[float, ...], list[int]] = {}
    for place, sampling in samplings.items():
        places.setdefault(draw_settings(sampling), []).append(place)
    groups = []
    for same in places.values():
        groups.append((samplings[same[0]], torch.tensor(same, device=device)))
    return groups


def draw_settings(sampling: SamplingConfig) -> tuple[float, ...]:
    """The settings that decide a draw; the others decide when a response ends."""
    if sampling.greedy:
        return ()
    return (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p)


def sample_grouped(
    logits: Tensor, seeds: Tensor, positions: Tensor, groups: Sequence[DrawGroup]
) -> tuple[Tensor, Tensor]:
    """sample_tokens for rows of several settings; rows in no group have undefined results."""
    if len(groups) == 1 and len(groups[0][1]) == len(seeds):
        return sample_tokens(logits, seeds, positions, groups[0][0])
    ids, log_probs = torch.empty_like(seeds), torch.empty(len(seeds), device=logits.device)
    for sampling, rows in groups:
        ids[rows], log_probs[rows] = sample_tokens(
            logits[rows], seeds[rows], positions[rows], sampling
        )
    return ids, log_probs


class BlockMasses:
    """exp(logits - highest) of each row, and its sums over blocks of consecutive tokens."""

    def __init__(self, logits: Tensor) -> None:
        rows, vocab = logits.shape
        self.block = 2 ** math.ceil(math.log2(vocab) / 2)
        self.highest = logits.amax(dim=-1, keepdim=True)
        self.masses = (logits - self.highest).exp_()
        whole = vocab // self.block * self.block
        self.sums = self.masses[:, :whole].reshape(rows, -1, self.block).sum(dim=-1)
        if whole < vocab:
            self.sums = torch.cat(
                [self.sums, self.masses[:, whole:].sum(dim=-1, keepdim=True)], dim=-1
            )
        self.total = self.sums.sum(dim=-1)

    def log_total(self) -> Tensor:
        """logsumexp [rows] of the logits."""
        return self.total.log() + self.highest.squeeze(-1)


def keep_most_likely(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """The logits with -inf at tokens that min_p drops, then top_k; the same tensor if neither
    is asked for."""
    kept = logits
    if sampling.min_p > 0:
        kept = kept.masked_fill(
            kept < kept.amax(dim=-1, keepdim=True) + math.log(sampling.min_p), -math.inf
        )
    if 0 < sampling.top_k < logits.shape[-1]:
        kept = kept.masked_fill(kept < kept.topk(sampling.top_k, dim=-1).values[:, -1:], -math.inf)
    return kept


def sample_within_top_p(
    logits: Tensor, masses: BlockMasses, seeds: Tensor, positions: Tensor, top_p: float
) -> Tensor:
    """Ids [rows] drawn from the softmax of `logits`, cut to the fewest most likely tokens that hold
    `top_p`."""
    ids = sample_once(logits, masses, seeds, positions, round_number=0)
    if top_p == 1:
        return ids
    rows = torch.arange(len(ids), device=ids.device)
    drawn = ids
    for round_number in range(1, MOST_ROUNDS + 1):
        above = (masses.masses * (logits > logits.gather(-1, drawn.unsqueeze(-1)))).sum(dim=-1)
        rejected = (above >= top_p * masses.total).nonzero().squeeze(-1)
        if not len(rejected):
            break
        rows, logits, seeds, positions = (
            rows[rejected],
            logits[rejected],
            seeds[rejected],
            positions[rejected],
        )
        # A small top_p; what is left is drawn from the sorted and cut distribution.
        if round_number == MOST_ROUNDS:
            logits = cut_top_p(logits, top_p)
        masses = BlockMasses(logits)
        drawn = sample_once(logits, masses, seeds, positions, round_number)
        ids[rows] = drawn
    return ids


def cut_top_p(logits: Tensor, top_p: float) -> Tensor:
    """The logits with -inf at every token that has at least `top_p` of the mass above it."""
    order = logits.argsort(dim=-1, descending=True)
    # Whole numbers: their sums are the same in whatever order a GPU takes them.
    masses = (logits.gather(-1, order).softmax(dim=-1).double() * FIXED_POINT).long()
    dropped = masses.cumsum(dim=-1) - masses >= top_p * FIXED_POINT
    return logits.masked_fill(torch.empty_like(dropped).scatter_(-1, order, dropped), -math.inf)


def sample_once(
    logits: Tensor, masses: BlockMasses, seeds: Tensor, positions: Tensor, round_number: int
) -> Tensor:
    """Ids [rows] drawn from the softmax of `logits` [rows, vocab]."""
    vocab = logits.shape[-1]
    keys = mix(
        mix(seeds + _signed(GOLDEN)) + (positions * 4096 + 2 * round_number) * _signed(GOLDEN)
    )
    block = (masses.sums.double().log_() + gumbel(keys, masses.sums.shape[-1])).argmax(dim=-1)
    index = block.unsqueeze(-1) * masses.block + torch.arange(masses.block, device=logits.device)
    inside = logits.gather(-1, index.clamp(max=vocab - 1)).double()
    inside = inside.masked_fill_(index >= vocab, -math.inf) if vocab % masses.block else inside
    return block * masses.block + (inside + gumbel(mix(keys + 1), masses.block)).argmax(dim=-1)


def gumbel(keys: Tensor, count: int) -> Tensor:
    """Standard Gumbel noise, float64 [rows, count], a function of keys int64 [rows]."""
    index = torch.arange(1, count + 1, device=keys.device) * _signed(GOLDEN)
    bits = _shift_right(mix(keys.unsqueeze(-1) + index), 11)
    uniform = bits.double().add_(0.5).mul_(2.0**-53)  # in (0, 1): neither logarithm is infinite
    return uniform.log_().neg_().log_().neg_()


def mix(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of 64-bit patterns held as int64."""
    bits = (bits ^ _shift_right(bits, 30)) * _signed(MULTIPLIERS[0])
    bits = (bits ^ _shift_right(bits, 27)) * _signed(MULTIPLIERS[1])
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift; torch's is arithmetic for int64."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _signed(bits: int) -> int:
    """The int64 with the bit pattern of an unsigned number."""
    return bits - (1 << 64) if bits >= 1 << 63 else bits
