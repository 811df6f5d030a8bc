"""Attestation: after every sync both sides sum their weights, and the sums of every parameter must
agree.

The digest (digest.py) does not depend on the layout and is taken over the target's bits: the source
is cast before it is summed. Replicas are compared too. Where the sides agree one small reduction
suffices, which other work may overlap; only a mismatch gathers the details that name parameters and
ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from hybridflow.resharding.boxes import Ints, contains, disjoint_parts, intersections, with_dims
from hybridflow.resharding.digest import BoxDigest, Scratch, block_words, weights_of_ranks
from hybridflow.resharding.memory import LocalMemory
from hybridflow.resharding.shard_map import DTYPES, ShardMap
from hybridflow.resharding.shards import LocalParameter
from hybridflow.resharding.transport import device_kinds, rank_in

_MOST_FAULTS = 20
"""Faults that an error lists."""


class AttestationError(RuntimeError):
    """Weights on the two sides of a sync differ; the text names parameters and ranks."""


@dataclass(frozen=True, eq=False)
class Parts:
    """The disjoint parts of every parameter and the ranks that hold them; the same on every rank.

    parts = Parts.of(shard_map)
    """

    shard_map: ShardMap
    parameter: Ints
    """[parts], index into the shard map's parameters."""
    start: Ints
    """[parts, dims]"""
    shape: Ints
    """[parts, dims]"""
    holds: np.ndarray[tuple[int, int], np.dtype[np.bool_]]
    """[parts, ranks], whether the rank holds the part."""

    @classmethod
    def of(cls, shard_map: ShardMap) -> Parts:
        dims = shard_map.dims
        numbers = [np.zeros(0, np.int64)]
        starts, shapes = [np.zeros((0, dims), np.int64)], [np.zeros((0, dims), np.int64)]
        holds = [np.zeros((0, shard_map.num_ranks), bool)]
        for number in range(len(shard_map.parameters)):
            rows = shard_map.rows(number)
            start, shape = disjoint_parts(shard_map.start[rows], shard_map.shape[rows])
            inside = contains(shard_map.start[rows], shard_map.shape[rows], start, shape)
            row, part = np.nonzero(inside)
            holders = np.zeros((len(start), shard_map.num_ranks), dtype=bool)
            holders[part, shard_map.rank[rows][row]] = True
            numbers.append(np.full(len(start), number, dtype=np.int64))
            starts.append(start)
            shapes.append(shape)
            holds.append(holders)
        return cls(
            shard_map,
            np.concatenate(numbers),
            np.concatenate(starts),
            np.concatenate(shapes),
            np.concatenate(holds),
        )

    def bind(
        self,
        parameters: Sequence[LocalParameter],
        rank: int,
        dtypes: Mapping[str, str] | None = None,
        blocks: Mapping[str, int] | None = None,
    ) -> list[tuple[int, BoxDigest]]:
        """(number of the part, its digest) of all parts that `rank` holds.

        `dtypes`: the data type to cast each parameter to (None: its own). `blocks`: words that
        share a weight, by parameter (None: 1).
        """
        memory, bound = LocalMemory(parameters), []
        scratch: dict[torch.device, Scratch] = {}
        for part in np.nonzero(self.holds[:, rank])[0].tolist():
            spec = self.shard_map.parameters[int(self.parameter[part])]
            start, shape = self._box(part)
            dtype = DTYPES[dtypes[spec.name] if dtypes is not None else spec.dtype]
            block = blocks[spec.name] if blocks is not None else 1
            view = memory.view(spec.name, start, shape)
            if view.device not in scratch:
                scratch[view.device] = Scratch(view.device)
            bound.append(
                (part, BoxDigest(view, start, spec.shape, dtype, block, scratch[view.device]))
            )
        return bound

    def digests(
        self,
        parameters: Sequence[LocalParameter],
        rank: int,
        dtypes: Mapping[str, str] | None = None,
        blocks: Mapping[str, int] | None = None,
    ) -> Ints:
        """Digests of the parts that `rank` holds, 0 elsewhere: int64 [parts]. The arguments are
        bind's."""
        return evaluate(self.bind(parameters, rank, dtypes, blocks), len(self.parameter))

    def sums(self, values: Ints) -> dict[str, int]:
        """The digest of every parameter, from the digests of its parts: int64 [parts]."""
        totals = np.zeros(len(self.shard_map.parameters), dtype=np.uint64)
        np.add.at(totals, self.parameter, values.view(np.uint64))
        return dict(zip(self.shard_map.names, totals.tolist(), strict=True))

    def narrowest(self) -> dict[str, int]:
        """Elements along the last dim of the narrowest part of every parameter."""
        result: dict[str, int] = {}
        for number, shape in zip(self.parameter.tolist(), self.shape, strict=True):
            spec = self.shard_map.parameters[number]
            width = int(shape[len(spec.shape) - 1]) if spec.shape else 1
            result[spec.name] = min(result.get(spec.name, width), width)
        return result

    def holders(self, name: str) -> list[int]:
        """The ranks that hold anything of a parameter."""
        number = self.shard_map.numbers[name]
        holders: list[int] = np.nonzero(self.holds[self.parameter == number].any(axis=0))[
            0
        ].tolist()
        return holders

    def describe(self, part: int) -> str:
        start, shape = self._box(part)
        return (
            f"{self.shard_map.parameters[int(self.parameter[part])].name} start {start} shape "
            f"{shape}"
        )

    def _box(self, part: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        dims = len(self.shard_map.parameters[int(self.parameter[part])].shape)
        return tuple(self.start[part, :dims].tolist()), tuple(self.shape[part, :dims].tolist())


class Attestor:
    """Both sides bound to this rank's memory; build it once where the memory stays, run it after
    every sync.

    attestor = Attestor(plan.source, engine.local_parameters(), plan.target, generator.destinations(), group)
    digests = attestor.run()    # collective: every parameter's digest, or an AttestationError on every rank
    """

    def __init__(
        self,
        source: ShardMap,
        sources: Sequence[LocalParameter],
        target: ShardMap,
        destinations: Sequence[LocalParameter],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.group = group
        self.rank = rank_in(group)
        self.source, self.target = Parts.of(source), Parts.of(target)
        self._dtypes = {spec.name: spec.dtype for spec in target.parameters}
        self._source_parameters = [
            parameter for parameter in sources if parameter.name in self._dtypes
        ]
        self._target_parameters = list(destinations)
        source_widths, target_widths = self.source.narrowest(), self.target.narrowest()
        blocks = {}
        for spec in self.target.shard_map.parameters:
            width = min(source_widths[spec.name], target_widths[spec.name])
            blocks[spec.name] = block_words(width * spec.itemsize // 8)
        self._source_digests = self.source.bind(
            self._source_parameters, self.rank, self._dtypes, blocks
        )
        self._target_digests = self.target.bind(destinations, self.rank, None, blocks)
        holds = np.concatenate([self.source.holds, self.target.holds])
        self._is_first_holder = (holds.argmax(axis=1) == self.rank) & holds[:, self.rank]
        """bool [parts of both sides], whether this rank is the first of the part's holders."""
        self._share = replica_shares(holds, self.rank)
        number = target.numbers
        index = np.array([number[name] for name in source.names], dtype=np.int64)
        self._parameter = np.concatenate([index[self.source.parameter], self.target.parameter])
        """[parts of both sides], index into the target's parameters."""

    def run(self) -> dict[str, int]:
        """Sums both sides now and compares them. Collective."""
        return self.start().finish()

    def start(self) -> Attestation:
        """Sums both sides now; the comparison is under way when this returns. Collective, and
        so is the attestation's finish()."""
        source_values = evaluate(self._source_digests, len(self.source.parameter))
        target_values = evaluate(self._target_digests, len(self.target.parameter))
        values = np.concatenate([source_values, target_values])
        return Attestation(self, values)

    def table(self, values: Ints) -> Ints:
        """This rank's part of the comparison: int64 [3, target's parameters].

        Summed over ranks, the rows are the target's digests, the excess of the source's digests (0
        if they agree), and a sum of differences between replicas (0 if they agree).
        """
        unsigned, count = values.view(np.uint64), len(self.source.parameter)
        result = np.zeros((3, len(self.target.shard_map.parameters)), dtype=np.uint64)
        counted_once = np.where(self._is_first_holder, unsigned, np.uint64(0))
        np.add.at(result[0], self._parameter[count:], counted_once[count:])
        np.add.at(result[1], self._parameter[:count], counted_once[:count])
        result[1] -= result[0]
        np.add.at(result[2], self._parameter, unsigned * self._share)
        return result.view(np.int64)

    def explain(self, values: Ints) -> list[str]:
        """A line per fault, after a comparison that found one. Collective."""
        count = len(self.source.parameter)
        gathered = gather(values, self.group)
        faults, names = differences(
            self.source, gathered[:, :count], self.target, gathered[:, count:]
        )
        return self._locate(names) or faults

    def _locate(self, names: set[str]) -> list[str]:
        """A line per part that some rank holds with other bits.

        It sums the parameters at fault again, over the intersections of both sides' parts.
        """
        source, target = common_parts(self.source, self.target, names)
        sent = gather(source.digests(self._source_parameters, self.rank, self._dtypes), self.group)
        received = gather(target.digests(self._target_parameters, self.rank), self.group)
        lines: list[str] = []
        expected = _agreed(source, sent, "training", lines)
        for part in range(len(target.parameter)):
            wrong = np.nonzero(target.holds[part] & (received[:, part] != expected[part]))[
                0
            ].tolist()
            if wrong:
                holders = np.nonzero(source.holds[part])[0].tolist()
                lines.append(
                    f"{target.describe(part)}: generation ranks {wrong} hold other bits than "
                    f"training ranks {holders}"
                )
        return lines


class Attestation:
    """A comparison under way: attestation = attestor.start(); ...; digests =
    attestation.finish()"""

    def __init__(self, attestor: Attestor, values: Ints) -> None:
        self._attestor, self._values = attestor, values
        self._table = torch.from_numpy(attestor.table(values)).to(_device(attestor.group))
        self._work: dist.Work | None = None
        if dist.is_initialized():
            self._work = dist.all_reduce(self._table, group=attestor.group, async_op=True)

    def finish(self) -> dict[str, int]:
        """The digest of every parameter, or an AttestationError on every rank."""
        if self._work is not None:
            self._work.wait()
        digests, excess, spread = self._table.cpu().numpy()
        if excess.any() or spread.any():
            raise _error(self._attestor.explain(self._values))
        names = self._attestor.target.shard_map.names
        return dict(zip(names, digests.view(np.uint64).tolist(), strict=True))


def replica_shares(
    holds: np.ndarray[tuple[int, int], np.dtype[np.bool_]], rank: int
) -> NDArray[np.uint64]:
    """This rank's factor of every part: uint64 [parts].

    Over a part's holders the factors add up to 0, and so do equal digests times them. The factors
    differ from rank to rank: replicas that differ add up to something else, but for a chance of
    about 2^-63.
    """
    factor, is_holder = weights_of_ranks(holds.shape[1]), holds[:, rank]
    first = is_holder & (holds.argmax(axis=1) == rank)
    result = np.where(is_holder, factor[rank], np.uint64(0))
    result[first] = factor[rank] - (holds[first] * factor).sum(axis=1, dtype=np.uint64)
    return result


def attest(
    source: Parts,
    sources: Sequence[LocalParameter],
    target: Parts,
    destinations: Sequence[LocalParameter],
    group: dist.ProcessGroup | None = None,
) -> dict[str, int]:
    """Attests once; Attestor is for repeated use."""
    return Attestor(source.shard_map, sources, target.shard_map, destinations, group).run()


def evaluate(bound: list[tuple[int, BoxDigest]], num_parts: int) -> Ints:
    """The digests of bound parts, 0 elsewhere: int64 [parts]."""
    result = np.zeros(num_parts, dtype=np.int64)
    if bound:
        parts, digests = zip(*bound, strict=True)
        with torch.no_grad():
            result[list(parts)] = torch.stack([digest() for digest in digests]).cpu().numpy()
    return result


def gather(values: Ints, group: dist.ProcessGroup | None = None) -> Ints:
    """Every rank's digests: int64 [ranks, parts]. Collective."""
    if not dist.is_initialized():
        return values[None]
    local = torch.from_numpy(values).to(_device(group))
    gathered = local.new_empty(dist.get_world_size(group), len(values))
    dist.all_gather(list(gathered.unbind()), local, group=group)
    result: Ints = gathered.cpu().numpy()
    return result


def compare(
    source: Parts, source_digests: Ints, target: Parts, target_digests: Ints
) -> dict[str, int]:
    """The digest per parameter from all ranks' digests [ranks, parts], or an AttestationError
    that names what differs."""
    faults, _ = differences(source, source_digests, target, target_digests)
    if faults:
        raise _error(faults)
    return target.sums(
        target_digests[target.holds.argmax(axis=1), np.arange(len(target.parameter))]
    )


def differences(
    source: Parts, source_digests: Ints, target: Parts, target_digests: Ints
) -> tuple[list[str], set[str]]:
    """(a line per fault, names of the parameters at fault): faults are replicas and sides that
    disagree."""
    faults: list[str] = []
    source_sums = source.sums(_agreed(source, source_digests, "training", faults))
    target_sums = target.sums(_agreed(target, target_digests, "generation", faults))
    names = {fault.split(" ", 1)[0] for fault in faults}
    for name, value in target_sums.items():
        if source_sums[name] != value:
            faults.append(
                f"{name}: generation ranks {target.holders(name)} hold digest {value:016x}, "
                f"training ranks {source.holders(name)} {source_sums[name]:016x}"
            )
            names.add(name)
    return faults, names


def common_parts(source: Parts, target: Parts, names: set[str]) -> tuple[Parts, Parts]:
    """The intersections of both sides' parts of the named parameters, once with the source's
    holders and once with the target's."""
    number = source.shard_map.numbers
    intersected = []
    for index, spec in enumerate(target.shard_map.parameters):
        if spec.name in names:
            have = np.nonzero(source.parameter == number[spec.name])[0]
            need = np.nonzero(target.parameter == index)[0]
            dims = target.shard_map.dims
            first, second, start, shape = intersections(
                with_dims(source.start[have], dims, 0),
                with_dims(source.shape[have], dims, 1),
                target.start[need],
                target.shape[need],
            )
            intersected.append((have[first], need[second], start, shape))
    have, need, start, shape = map(np.concatenate, zip(*intersected, strict=True))
    return (
        Parts(source.shard_map, source.parameter[have], start, shape, source.holds[have]),
        Parts(target.shard_map, target.parameter[need], start, shape, target.holds[need]),
    )


def _error(faults: list[str]) -> AttestationError:
    lines = ["weights differ after the sync:", *faults[:_MOST_FAULTS]]
    if len(faults) > _MOST_FAULTS:
        lines.append(f"... and {len(faults) - _MOST_FAULTS} more")
    return AttestationError("\n".join(lines))


def _agreed(parts: Parts, digests: Ints, side: str, faults: list[str]) -> Ints:
    """The digest of every part that most of its holders have; adds a line per disagreement to
    `faults`."""
    value: Ints = digests[parts.holds.argmax(axis=1), np.arange(len(parts.parameter))].copy()
    differs = parts.holds & (value[:, None] != digests.T)
    for part in np.nonzero(differs.any(axis=1))[0].tolist():
        holders: Ints = np.nonzero(parts.holds[part])[0]
        values, count = np.unique(digests[holders, part], return_counts=True)
        if (count == count.max()).sum() == 1:
            value[part] = values[count.argmax()]
        agrees = digests[holders, part] == value[part]
        faults.append(
            f"{parts.describe(part)}: {side} ranks {holders[~agrees].tolist()} differ from ranks "
            f"{holders[agrees].tolist()}"
        )
    return value


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """The device for small tensors of a collective: host memory if the group can use it."""
    kinds = device_kinds(group)
    if not kinds or torch.device("cpu") in kinds:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
