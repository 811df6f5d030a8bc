"""The digest of one box: a 64-bit sum that does not depend on how a parameter is cut into boxes.

    digest = sum over elements (row i, column j) of
             bits(element) * 2^(bits of the type * (j mod k)) * A(i) * B(j div k div block) mod 2^64

with k elements to a 64-bit word and fixed odd pseudo-random weights A, B; rows are the leading dims
flattened. The digest of a union of disjoint boxes is the sum of theirs. One changed bit always
changes it (a power of two times an odd number is never 0 mod 2^64); other changes go unnoticed with
a chance of about 2^-63, save one kind: words that change places inside one block of a row.
Additions run at the memory's speed and multiplications do not, so blocks pay; `block_words` chooses
them much narrower than every box. It is a check against faults, not against an adversary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from hybridflow.resharding.boxes import Ints

_CPU_CHUNK_WORDS = 1 << 15
"""Words summed at a time where a cast or a copy is needed first: small enough for a CPU's
second-level cache. Elsewhere launches count, and _SUMMED_WORDS are."""
_SUMMED_WORDS = 1 << 22
"""Words summed at a time otherwise: bounds the memory of the blocks' sums."""
MOST_BLOCK_WORDS, LEAST_BLOCK_WORDS = 64, 16
_ROW_SEED = 0x51ED_270B_9D15_F4A1
_WORD_SEED = 0x0F3C_6A99_B7D2_4E87
_RANK_SEED = 0x2B99_2DDF_A232_49D6


class Scratch:
    """Working memory that the digests of a rank use in turn: a chunk cast to the data type, and
    the sums of its blocks."""

    def __init__(self, device: torch.device, row_words: int = 0) -> None:
        """`row_words`: words of the longest row."""
        words = max(chunk_words(device), row_words)
        self.words = torch.empty(words, dtype=torch.int64, device=device)
        self.sums = torch.empty(
            max(_SUMMED_WORDS // LEAST_BLOCK_WORDS, row_words), dtype=torch.int64, device=device
        )


@dataclass(slots=True)
class _Step:
    """The work on some rows: views of the rows, of their words, of the sums over blocks of
    words, and of the sum of every row."""

    rows: torch.Tensor
    words: torch.Tensor
    """[rows, words]; the rows' own memory where they need no cast."""
    cast: torch.Tensor | None
    """The part of `words` that the rows are copied to, in the data type; None: words is their
    own memory."""
    clear: bool
    """Whether words have ends that the rows do not fill: these count as 0."""
    sums: list[tuple[torch.Tensor, torch.Tensor]]
    """(words [rows, blocks, words of a block], their sums [rows, blocks])."""
    factors: torch.Tensor
    """[rows, blocks], multiplied by the weights: all sums, or the words themselves."""
    result: torch.Tensor
    """[rows], the sum of every row."""


class BoxDigest:
    """A box bound to its memory; calling it sums the memory's present contents.

    BoxDigest(tensor, start=(8, 0), global_shape=(16, 64), dtype=torch.bfloat16)()
    """

    def __init__(
        self,
        tensor: torch.Tensor,
        start: Sequence[int],
        global_shape: Sequence[int],
        dtype: torch.dtype,
        block: int = 1,
        scratch: Scratch | None = None,
    ) -> None:
        """`dtype`: the data type whose bits are summed; `tensor` is cast to it where it has
        another one. `block`: words that share a weight; digests compare where it is the same."""
        per_word = 8 // dtype.itemsize
        column = int(start[-1]) if len(start) else 0
        width = int(tensor.shape[-1]) if tensor.dim() else 1
        self._rows = _rows_on(
            tensor.device, tuple(start[:-1]), tuple(tensor.shape[:-1]), tuple(global_shape[:-1])
        )
        self._results = torch.empty_like(self._rows)
        self._lead, self._width, self._per_word = column % per_word, width, per_word
        self._num_words = -(-(self._lead + width) // per_word)
        self._block, self._cuts = block, _cuts(column // per_word, self._num_words, block)
        first = column // per_word // block
        last = (column // per_word + self._num_words - 1) // block
        self._weights = _words_on(tensor.device, first, last + 1)
        self._dtype = dtype
        self._scratch = scratch if scratch is not None else Scratch(tensor.device)
        self._tensor = tensor.detach()
        matrix = self._tensor.reshape(len(self._rows), width)
        # reshape copies where rows do not lie at one distance; then everything must be redone at
        # every call.
        self._steps = self._plan(matrix) if matrix.data_ptr() == tensor.data_ptr() else None

    def __call__(self) -> torch.Tensor:
        """int64 [], the sum mod 2^64."""
        steps = self._steps
        if steps is None:
            steps = self._plan(self._tensor.reshape(len(self._rows), self._width))
        for step in steps:
            if step.clear:
                step.words.zero_()
            if step.cast is not None:
                step.cast.copy_(step.rows)
            for words, sums in step.sums:
                torch.sum(words, -1, out=sums)
            if step.factors.device.type == "cpu":
                torch.mv(step.factors, self._weights, out=step.result)  # wraps around
            else:
                # CUDA has no integer matrix product.
                torch.sum(step.factors * self._weights, 1, out=step.result)
        if self._rows.device.type == "cpu":
            return torch.dot(self._results, self._rows)
        return (self._results * self._rows).sum()

    def _plan(self, matrix: torch.Tensor) -> list[_Step]:
        """The steps for the rows of `matrix` [rows, width], made of views only."""
        aligned = self._lead == 0 and self._width % self._per_word == 0
        as_is = (
            aligned
            and matrix.dtype == self._dtype
            and matrix.is_contiguous()
            and matrix.data_ptr() % 8 == 0
        )
        as_is = as_is and matrix.storage_offset() * self._dtype.itemsize % 8 == 0
        if self._num_words > chunk_words(matrix.device):
            self._scratch = Scratch(matrix.device, self._num_words)
        scratch = self._scratch
        at_once = _SUMMED_WORDS if as_is else len(scratch.words)
        step = max(1, min(at_once // self._num_words, len(scratch.sums) // len(self._weights)))
        steps = []
        for begin in range(0, len(matrix), step):
            rows = matrix[begin : begin + step]
            result = self._results[begin : begin + step]
            cast = None
            if as_is:
                words = rows.view(torch.int64)
            else:
                words = scratch.words[: len(rows) * self._num_words].view(
                    len(rows), self._num_words
                )
                cast = words.view(self._dtype)[:, self._lead : self._lead + self._width]
            sums, factors = self._blocks(words)
            steps.append(
                _Step(rows, words, cast, cast is not None and not aligned, sums, factors, result)
            )
        return steps

    def _blocks(
        self, words: torch.Tensor
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        """(words to be added up with the memory for their sums, memory of all sums)."""
        if self._block == 1:
            return [], words
        low, high = self._cuts
        num_rows, count = len(words), len(self._weights)
        assert count == (low > 0) + (high - low) // self._block + (high < self._num_words), (
            "a weight for each block that the row touches"
        )
        sums = self._scratch.sums[: num_rows * count].view(num_rows, count)
        whole, at = (high - low) // self._block, int(low > 0)
        parts = []
        if low:
            parts.append((words[:, None, :low], sums[:, :1]))
        if whole:
            blocks = words[:, low:high].unflatten(1, (whole, self._block))
            parts.append((blocks, sums[:, at : at + whole]))
        if high < self._num_words:
            parts.append((words[:, None, high:], sums[:, at + whole :]))
        return parts, sums


def chunk_words(device: torch.device) -> int:
    """Words that are cast or copied at a time."""
    return _CPU_CHUNK_WORDS if device.type == "cpu" else _SUMMED_WORDS


def block_words(narrowest_words: int) -> int:
    """Words to a block where the narrowest box of a parameter has rows of `narrowest_words` words:
    at most a quarter of them, at most MOST_BLOCK_WORDS.

    Boxes swapped by mistake then differ in whole blocks. Short rows are summed word by word.
    """
    block = MOST_BLOCK_WORDS
    while block > narrowest_words // 4:
        block //= 2
    return block if block >= LEAST_BLOCK_WORDS else 1


def _cuts(first_word: int, num_words: int, block: int) -> tuple[int, int]:
    """The first and the last position of whole blocks in a row's words; the words on either
    side are part of one block each."""
    low = min(-first_word % block, num_words)
    return low, low + (num_words - low) // block * block


@lru_cache(maxsize=1024)
def _rows_on(
    device: torch.device,
    start: tuple[int, ...],
    shape: tuple[int, ...],
    global_shape: tuple[int, ...],
) -> torch.Tensor:
    """A(i) of every row of a box. Layers have boxes of the same shape, and the same ones at every
    step: a GPU has them already."""
    return torch.from_numpy(_row_weights(start, shape, global_shape)).to(device)


@lru_cache(maxsize=1024)
def _words_on(device: torch.device, first: int, last: int) -> torch.Tensor:
    """B of the blocks of words [first, last)."""
    return torch.from_numpy(_weights(_WORD_SEED, last)[first:]).to(device)


def _row_weights(
    start: tuple[int, ...], shape: tuple[int, ...], global_shape: tuple[int, ...]
) -> Ints:
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
        x = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(
            seed
        )
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((x ^ (x >> np.uint64(31))) | np.uint64(1)).view(np.int64)
