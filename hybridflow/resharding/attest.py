"""Attestation: a 64-bit digest per logical parameter that does not depend on the layout, compared on both sides of a sync.

    digest = sum over elements (row i, column j) of bits(element) * 2^(bits of the type * (j mod k)) * A(i) * B(j div k)   mod 2^64

with k elements to a 64-bit word and fixed odd pseudo-random weights A, B; rows are the leading dims flattened. A sum over boxes
is the digest of their union, so every rank sums what it holds. One changed bit always changes the digest (a power of two times
an odd number is never 0 mod 2^64); other changes go unnoticed with a chance of about 2^-63. It is a check against faults, not
against an adversary. Bits are those of the target's data type: the source is cast before it is summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist

from hybridflow.resharding.boxes import Ints, contains, disjoint_parts
from hybridflow.resharding.memory import LocalMemory
from hybridflow.resharding.shard_map import DTYPES, ShardMap
from hybridflow.resharding.shards import LocalParameter

_CHUNK_WORDS = 1 << 15
"""Words summed at a time where a cast or a copy is needed first: small enough for the second-level cache."""
_ROW_SEED, _WORD_SEED = 0x51ED_270B_9D15_F4A1, 0x0F3C_6A99_B7D2_4E87


class AttestationError(RuntimeError):
    """Weights on the two sides of a sync differ; the text names parameters and ranks."""


@dataclass(frozen=True, eq=False)
class Digests:
    """Of one rank: digest of every disjoint part it holds, in the order of the map's parts."""

    values: Ints
    """[parts], the sums mod 2^64 as int64; 0 where this rank does not hold the part."""


@dataclass(frozen=True, eq=False)
class Parts:
    """The disjoint parts of every parameter and who holds them; the same on every rank.

    parts = Parts.of(shard_map)
    """

    shard_map: ShardMap
    parameter: Ints
    start: Ints
    shape: Ints
    holds: np.ndarray[tuple[int, int], np.dtype[np.bool_]]
    """[parts, ranks]"""

    @classmethod
    def of(cls, shard_map: ShardMap) -> Parts:
        numbers, starts, shapes, holds = [], [], [], []
        for number in range(len(shard_map.parameters)):
            rows = shard_map.rows(number)
            start, shape = disjoint_parts(shard_map.start[rows], shard_map.shape[rows])
            inside = contains(shard_map.start[rows], shard_map.shape[rows], start, shape)
            row, part = np.nonzero(inside)
            held = np.zeros((len(start), shard_map.num_ranks), dtype=bool)
            held[part, shard_map.rank[rows][row]] = True
            numbers.append(np.full(len(start), number, dtype=np.int64))
            starts.append(start)
            shapes.append(shape)
            holds.append(held)
        return cls(shard_map, np.concatenate(numbers), np.concatenate(starts), np.concatenate(shapes), np.concatenate(holds))

    def digests(self, parameters: Sequence[LocalParameter], rank: int, dtypes: dict[str, str] | None = None) -> Ints:
        """Digests of the parts that `rank` holds, 0 elsewhere: int64 [parts]. `dtypes`: data types to cast to (the target's)."""
        memory = LocalMemory(parameters)
        result = np.zeros(len(self.parameter), dtype=np.int64)
        for part in np.nonzero(self.holds[:, rank])[0].tolist():
            spec = self.shard_map.parameters[int(self.parameter[part])]
            dims = len(spec.shape)
            start, shape = tuple(self.start[part, :dims].tolist()), tuple(self.shape[part, :dims].tolist())
            dtype = DTYPES[dtypes[spec.name] if dtypes is not None else spec.dtype]
            result[part] = box_digest(memory.view(spec.name, start, shape), start, spec.shape, dtype)
        return result


def attest(
    source: Parts, sources: Sequence[LocalParameter], target: Parts, held: Sequence[LocalParameter], group: dist.ProcessGroup | None = None
) -> dict[str, int]:
    """Compare what the two sides hold; returns the digest per parameter. Collective over `group`.

    Raises AttestationError on every rank, naming parameters and ranks, where replicas or the two sides disagree.
    """
    rank = dist.get_rank(group) if dist.is_initialized() else 0
    dtypes = {spec.name: spec.dtype for spec in target.shard_map.parameters}
    used = [parameter for parameter in sources if parameter.name in dtypes]
    return compare(source, gather(source.digests(used, rank, dtypes), group), target, gather(target.digests(held, rank), group))


def gather(values: Ints, group: dist.ProcessGroup | None = None) -> Ints:
    """Every rank's digests: int64 [ranks, parts]. Collective."""
    if not dist.is_initialized():
        return values[None]
    device = torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")
    mine = torch.from_numpy(values).to(device)
    everyone = torch.empty((dist.get_world_size(group), len(values)), dtype=torch.int64, device=device)
    dist.all_gather(list(everyone.unbind(0)), mine, group=group)
    return everyone.cpu().numpy()


def compare(source: Parts, source_digests: Ints, target: Parts, target_digests: Ints) -> dict[str, int]:
    """The digest per parameter, or an AttestationError that names every parameter and rank at fault."""
    faults: list[str] = []
    source_sums = _sums(source, source_digests, "training", faults)
    target_sums = _sums(target, target_digests, "generation", faults)
    for name, value in target_sums.items():
        if source_sums[name] != value:
            ours, theirs = _holders(target, name), _holders(source, name)
            faults.append(f"{name}: generation ranks {ours} hold digest {value:016x}, training ranks {theirs} {source_sums[name]:016x}")
    if faults:
        more = f"\n... and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise AttestationError("weights differ after the sync:\n" + "\n".join(faults[:20]) + more)
    return target_sums


def _sums(parts: Parts, digests: Ints, side: str, faults: list[str]) -> dict[str, int]:
    """Digest per parameter from the first holder of every part; replicas that disagree are added to `faults`."""
    first = parts.holds.argmax(axis=1)
    value = digests[first, np.arange(len(first))]
    differs = parts.holds & (value[:, None] != digests.T)
    for part in np.nonzero(differs.any(axis=1))[0].tolist():
        holders = np.nonzero(parts.holds[part])[0]
        values, count = np.unique(digests[holders, part], return_counts=True)
        most = values[count.argmax()] if (count == count.max()).sum() == 1 else value[part]
        odd = [int(rank) for rank in holders if digests[rank, part] != most]
        spec = parts.shard_map.parameters[int(parts.parameter[part])]
        dims = len(spec.shape)
        where = f"start {tuple(parts.start[part, :dims].tolist())} shape {tuple(parts.shape[part, :dims].tolist())}"
        faults.append(f"{spec.name} {where}: {side} ranks {odd} differ from ranks {[int(r) for r in holders if int(r) not in odd]}")
    sums = np.zeros(len(parts.shard_map.parameters), dtype=np.uint64)
    np.add.at(sums, parts.parameter, value.view(np.uint64))
    return {spec.name: int(total) for spec, total in zip(parts.shard_map.parameters, sums, strict=True)}


def _holders(parts: Parts, name: str) -> list[int]:
    number = next(i for i, spec in enumerate(parts.shard_map.parameters) if spec.name == name)
    return [int(rank) for rank in np.nonzero(parts.holds[parts.parameter == number].any(axis=0))[0]]


def box_digest(tensor: torch.Tensor, start: Sequence[int], global_shape: Sequence[int], dtype: torch.dtype) -> int:
    """Digest of one box (shape of `tensor`, at `start` of a parameter of `global_shape`), as a signed 64-bit number."""
    if tensor.numel() == 0:
        return 0
    per_word = 8 // dtype.itemsize
    column = int(start[-1]) if len(start) else 0
    width = int(tensor.shape[-1]) if tensor.dim() else 1
    rows = _row_weights(tuple(start[:-1]), tuple(tensor.shape[:-1]), tuple(global_shape[:-1]))
    lead = column % per_word
    words = -(-(lead + width) // per_word)
    weights = torch.from_numpy(_weights(_WORD_SEED, column // per_word + words)[column // per_word :])
    matrix = tensor.detach().reshape(len(rows), width)
    aligned = lead == 0 and width % per_word == 0
    total = 0
    as_is = aligned and tensor.dtype == dtype and matrix.is_contiguous() and matrix.data_ptr() % 8 == 0
    step = len(rows) if as_is else max(1, _CHUNK_WORDS // words)
    for begin in range(0, len(rows), step):
        chunk = matrix[begin : begin + step]
        if not as_is:
            padded = torch.empty((len(chunk), words * per_word), dtype=dtype, device=chunk.device)
            if not aligned:
                padded.view(torch.uint8).zero_()
            padded[:, lead : lead + width].copy_(chunk)
            chunk = padded
        total += int(_weighted_sum(chunk.view(torch.int64), weights, torch.from_numpy(rows[begin : begin + step])))
    total %= 1 << 64
    return total - (1 << 64) if total >= 1 << 63 else total


def _weighted_sum(words: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    if words.device.type == "cpu":
        return (words @ weights) @ rows  # wraps around, at memory speed; CUDA has no integer matrix product
    weights, rows = weights.to(words.device), rows.to(words.device)
    return ((words * weights).sum(1) * rows).sum()


def _row_weights(start: tuple[int, ...], shape: tuple[int, ...], global_shape: tuple[int, ...]) -> Ints:
    """A(i) of every row of a box: int64 [rows]."""
    index = np.zeros((1,), dtype=np.int64)
    for first, size, whole in zip(start, shape, global_shape, strict=True):
        index = (index[:, None] * whole + np.arange(first, first + size)[None]).reshape(-1)
    return _weights(_ROW_SEED, int(index.max()) + 1)[index]


@lru_cache(maxsize=64)
def _power(size: int) -> int:
    return 1 << max(10, (size - 1).bit_length())


def _weights(seed: int, size: int) -> Ints:
    """At least the first `size` weights of a seed, odd: int64."""
    return _all_weights(seed, _power(size))[:size]


@lru_cache(maxsize=64)
def _all_weights(seed: int, size: int) -> Ints:
    """splitmix64 (Steele, Lea and Flood 2014) of 1..size, made odd."""
    with np.errstate(over="ignore"):
        x = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((x ^ (x >> np.uint64(31))) | np.uint64(1)).view(np.int64)
