"""The digest of one box: a 64-bit sum that does not depend on how a parameter is cut into boxes.

    digest = sum over elements (row i, column j) of bits(element) * 2^(bits of the type * (j mod k)) * A(i) * B(j div k div block) mod 2^64

with k elements to a 64-bit word and fixed odd pseudo-random weights A, B; rows are the leading dims flattened. The digest of a
union of disjoint boxes is the sum of theirs. One changed bit always changes it (a power of two times an odd number is never
0 mod 2^64); other changes go unnoticed with a chance of about 2^-63, save one kind: words that change places inside one block of a
row. Additions run at the memory's speed and multiplications do not, so blocks pay; `block_words` chooses them much narrower than
every box. It is a check against faults, not against an adversary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from hybridflow.resharding.boxes import Ints

_CHUNK_WORDS = 1 << 15
"""Words summed at a time where a cast or a copy is needed first: small enough for the second-level cache."""
_SUMMED_WORDS = 1 << 22
"""Words summed at a time otherwise: bounds the memory of the blocks' sums."""
MOST_BLOCK_WORDS, LEAST_BLOCK_WORDS = 64, 16
_ROW_SEED, _WORD_SEED, _RANK_SEED = 0x51ED_270B_9D15_F4A1, 0x0F3C_6A99_B7D2_4E87, 0x2B99_2DDF_A232_49D6


class BoxDigest:
    """A box bound to its memory; calling it sums what the memory holds now.

    BoxDigest(tensor, start=(8, 0), global_shape=(16, 64), dtype=torch.bfloat16)()
    """

    def __init__(self, tensor: torch.Tensor, start: Sequence[int], global_shape: Sequence[int], dtype: torch.dtype, block: int = 1) -> None:
        """`dtype`: the data type whose bits are summed; `tensor` is cast to it where it has another one. `block`: words that share a
        weight; digests compare where it is the same."""
        per_word = 8 // dtype.itemsize
        column = int(start[-1]) if len(start) else 0
        width = int(tensor.shape[-1]) if tensor.dim() else 1
        rows = _row_weights(tuple(start[:-1]), tuple(tensor.shape[:-1]), tuple(global_shape[:-1]))
        self._rows = torch.from_numpy(rows).to(tensor.device)
        self._lead = column % per_word
        self._num_words = -(-(self._lead + width) // per_word)
        self._cuts = _cuts(column // per_word, self._num_words, block)
        first, last = column // per_word // block, (column // per_word + self._num_words - 1) // block
        self._weights = torch.from_numpy(_weights(_WORD_SEED, last + 1)[first:]).to(tensor.device)
        self._dtype, self._per_word, self._width, self._block = dtype, per_word, width, block
        matrix = tensor.detach().reshape(len(rows), width)
        self._aligned = self._lead == 0 and width % per_word == 0
        as_is = self._aligned and tensor.dtype == dtype and matrix.is_contiguous() and matrix.storage_offset() * dtype.itemsize % 8 == 0
        self._words = matrix.view(torch.int64) if as_is and matrix.data_ptr() % 8 == 0 else None
        # reshape copies where rows do not lie at one distance; then it must be redone at every call.
        self._matrix = matrix if matrix.data_ptr() == tensor.data_ptr() else None
        self._tensor = tensor.detach()

    def __call__(self) -> torch.Tensor:
        """int64 [], the sum mod 2^64."""
        matrix = self._words if self._words is not None else self._matrix
        matrix = matrix if matrix is not None else self._tensor.reshape(len(self._rows), self._width)
        total = torch.zeros((), dtype=torch.int64, device=matrix.device)
        step = len(self._rows)
        if matrix.device.type == "cpu":
            step = max(1, (_CHUNK_WORDS if self._words is None else _SUMMED_WORDS) // self._num_words)
        for begin in range(0, len(self._rows), step):
            some = matrix[begin : begin + step]
            total += self._sum(some if self._words is not None else self._as_words(some), self._rows[begin : begin + step])
        return total

    def _sum(self, words: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Of the words [rows, words] of some rows."""
        if self._block > 1:
            low, high = self._cuts
            parts = [words[:, low:high].unflatten(1, (-1, self._block)).sum(-1)] if high > low else []
            parts = ([words[:, :low].sum(1, keepdim=True)] if low else []) + parts
            parts += [words[:, high:].sum(1, keepdim=True)] if high < self._num_words else []
            words = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if words.device.type == "cpu":
            return torch.mv(words, self._weights).dot(rows)  # wraps around; CUDA has no integer matrix product
        return ((words * self._weights).sum(1) * rows).sum()

    def _as_words(self, rows: torch.Tensor) -> torch.Tensor:
        padded = torch.empty((len(rows), self._num_words * self._per_word), dtype=self._dtype, device=rows.device)
        if not self._aligned:
            padded.view(torch.uint8).zero_()
        padded[:, self._lead : self._lead + self._width].copy_(rows)
        return padded.view(torch.int64)


def block_words(narrowest_words: int) -> int:
    """Words to a block where the narrowest box of a parameter has rows of so many: at most a quarter of it, at most MOST_BLOCK_WORDS.

    Boxes swapped by mistake then differ in whole blocks. Short rows are summed word by word.
    """
    block = MOST_BLOCK_WORDS
    while block > narrowest_words // 4:
        block //= 2
    return block if block >= LEAST_BLOCK_WORDS else 1


def _cuts(first_word: int, num_words: int, block: int) -> tuple[int, int]:
    """Where the whole blocks of a row's words begin and end; what is left on either side is part of one block."""
    low = min(-first_word % block, num_words)
    return low, low + (num_words - low) // block * block


def _row_weights(start: tuple[int, ...], shape: tuple[int, ...], global_shape: tuple[int, ...]) -> Ints:
    """A(i) of every row of a box: int64 [rows]."""
    if len(start) == 1:
        return _weights(_ROW_SEED, start[0] + shape[0])[start[0] :]
    index = np.zeros((1,), dtype=np.int64)
    for first, size, whole in zip(start, shape, global_shape, strict=True):
        index = (index[:, None] * whole + np.arange(first, first + size)[None]).reshape(-1)
    return _weights(_ROW_SEED, int(index.max()) + 1)[index]


def weights_of_ranks(num_ranks: int) -> NDArray[np.uint64]:
    """A factor for every rank, odd: uint64 [ranks]."""
    return _weights(_RANK_SEED, num_ranks).view(np.uint64)


def _weights(seed: int, size: int) -> Ints:
    """The first `size` weights of a seed, odd: int64."""
    return _all_weights(seed, 1 << max(10, (size - 1).bit_length()))[:size]


@lru_cache(maxsize=64)
def _all_weights(seed: int, size: int) -> Ints:
    """splitmix64 (Steele, Lea and Flood 2014) of 1..size, made odd."""
    with np.errstate(over="ignore"):
        x = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((x ^ (x >> np.uint64(31))) | np.uint64(1)).view(np.int64)
