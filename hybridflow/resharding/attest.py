"""Attestation: after every sync both sides sum what they hold, and the sums must agree, parameter by
parameter.

The digest (digest.py) does not depend on the layout and is taken over the target's bits: the source is cast
before it is summed. Replicas are compared too. Where all is well one small reduction suffices, which other
work may overlap; only a mismatch gathers the details that name parameters and ranks.
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
    """The disjoint parts of every parameter and who holds them; the same on every rank: parts =
    Parts.of(shard_map)"""

    shard_map: ShardMap
    parameter: Ints
    start: Ints
    shape: Ints
    holds: np.ndarray[tuple[int, int], np.dtype[np.bool_]]
    """[parts, ranks]"""

    @classmethod
    def of(cls, shard_map: ShardMap) -> Parts:
        dims = shard_map.dims
        numbers, starts, shapes = (
            [np.zeros(0, np.int64)],
            [np.zeros((0, dims), np.int64)],
            [np.zeros((0, dims), np.int64)],
        )
        holds = [np.zeros((0, shard_map.num_ranks), bool)]
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
        """(number of the part, its digest) of all parts that `rank` holds. `dtypes`: data types to cast to
        (the target's); `blocks`: words to a block of every parameter (1)."""
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
            bound.append((part, BoxDigest(view, start, spec.shape, dtype, block, scratch[view.device])))
        return bound

    def digests(
        self,
        parameters: Sequence[LocalParameter],
        rank: int,
        dtypes: Mapping[str, str] | None = None,
        blocks: Mapping[str, int] | None = None,
    ) -> Ints:
        """Digests of the parts that `rank` holds, 0 elsewhere: int64 [parts]. See bind."""
        return evaluate(self.bind(parameters, rank, dtypes, blocks), len(self.parameter))

    def sums(self, values: Ints) -> dict[str, int]:
        """Digest per parameter from one value per part."""
        totals = np.zeros(len(self.shard_map.parameters), dtype=np.uint64)
        np.add.at(totals, self.parameter, values.view(np.uint64))
        return {spec.name: int(total) for spec, total in zip(self.shard_map.parameters, totals, strict=True)}

    def narrowest(self) -> dict[str, int]:
        """Elements along the last dim of the narrowest part of every parameter."""
        result: dict[str, int] = {}
        for number, shape in zip(self.parameter.tolist(), self.shape, strict=True):
            spec = self.shard_map.parameters[number]
            width = int(shape[len(spec.shape) - 1]) if spec.shape else 1
            result[spec.name] = min(result.get(spec.name, width), width)
        return result

    def holders(self, name: str) -> list[int]:
        number = next(i for i, spec in enumerate(self.shard_map.parameters) if spec.name == name)
        return [int(rank) for rank in np.nonzero(self.holds[self.parameter == number].any(axis=0))[0]]

    def describe(self, part: int) -> str:
        start, shape = self._box(part)
        return f"{self.shard_map.parameters[int(self.parameter[part])].name} start {start} shape {shape}"

    def _box(self, part: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        dims = len(self.shard_map.parameters[int(self.parameter[part])].shape)
        return tuple(self.start[part, :dims].tolist()), tuple(self.shape[part, :dims].tolist())


class Attestor:
    """Both sides bound to this rank's memory; build it once where the memory stays, run it after every sync.

    attestor = Attestor(plan.source, engine.local_parameters(), plan.target, generator.destinations(), group)
    digests = attestor.run()    # collective; the digest of every parameter, or an AttestationError on every
    rank
    """

    def __init__(
        self,
        source: ShardMap,
        sources: Sequence[LocalParameter],
        target: ShardMap,
        held: Sequence[LocalParameter],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.group = group
        self.rank = rank_in(group)
        self.source, self.target = Parts.of(source), Parts.of(target)
        self._dtypes = {spec.name: spec.dtype for spec in target.parameters}
        self._source_parameters = [parameter for parameter in sources if parameter.name in self._dtypes]
        self._held_parameters = list(held)
        ours, theirs = self.source.narrowest(), self.target.narrowest()
        blocks = {
            spec.name: block_words(min(ours[spec.name], theirs[spec.name]) * spec.itemsize // 8)
            for spec in self.target.shard_map.parameters
        }
        self._sources = self.source.bind(self._source_parameters, self.rank, self._dtypes, blocks)
        self._held = self.target.bind(held, self.rank, None, blocks)
        holds = np.concatenate([self.source.holds, self.target.holds])
        self._speaks = (holds.argmax(axis=1) == self.rank) & holds[:, self.rank]
        """Parts whose first holder this rank is."""
        self._share = replica_shares(holds, self.rank)
        owner = {spec.name: i for i, spec in enumerate(self.target.shard_map.parameters)}
        index = np.array([owner[spec.name] for spec in self.source.shard_map.parameters], dtype=np.int64)
        self._parameter = np.concatenate([index[self.source.parameter], self.target.parameter])
        """Of every part of both sides, index into the target's parameters."""

    def run(self) -> dict[str, int]:
        """Sum both sides now and compare. Collective."""
        return self.start().finish()

    def start(self) -> Attestation:
        """Sum both sides now; the comparison is under way when this returns. Collective, and so is the
        verdict's finish()."""
        values = np.concatenate(
            [
                evaluate(self._sources, len(self.source.parameter)),
                evaluate(self._held, len(self.target.parameter)),
            ]
        )
        return Attestation(self, values)

    def table(self, values: Ints) -> Ints:
        """What this rank adds to the verdict, of one value per part: int64 [3, target's parameters].

        Summed over ranks: the target's digests, what the source's exceed them by (0), and a sum over
        replicas' differences (0).
        """
        unsigned, count = values.view(np.uint64), len(self.source.parameter)
        result = np.zeros((3, len(self.target.shard_map.parameters)), dtype=np.uint64)
        spoken = np.where(self._speaks, unsigned, np.uint64(0))
        np.add.at(result[0], self._parameter[count:], spoken[count:])
        np.add.at(result[1], self._parameter[:count], spoken[:count])
        result[1] -= result[0]
        np.add.at(result[2], self._parameter, unsigned * self._share)
        return result.view(np.int64)

    def explain(self, values: Ints) -> list[str]:
        """A line per fault; collective, after a verdict that is not good."""
        count = len(self.source.parameter)
        everyone = gather(values, self.group)
        faults, names = differences(self.source, everyone[:, :count], self.target, everyone[:, count:])
        return self._locate(names) or faults

    def _locate(self, names: set[str]) -> list[str]:
        """Sum the parameters at fault again, now over the parts that both sides cut alike: that tells which
        rank holds other bits."""
        source, target = common_parts(self.source, self.target, names)
        have = gather(source.digests(self._source_parameters, self.rank, self._dtypes), self.group)
        held = gather(target.digests(self._held_parameters, self.rank), self.group)
        lines: list[str] = []
        expected = _agreed(source, have, "training", lines)
        for part in range(len(target.parameter)):
            odd = np.nonzero(target.holds[part] & (held[:, part] != expected[part]))[0].tolist()
            if odd:
                holders = np.nonzero(source.holds[part])[0].tolist()
                lines.append(
                    f"{target.describe(part)}: generation ranks {odd} hold other bits than training ranks "
                    f"{holders}"
                )
        return lines


class Attestation:
    """A comparison under way: verdict = attestor.start(); ...; digests = verdict.finish()"""

    def __init__(self, attestor: Attestor, values: Ints) -> None:
        self._attestor, self._values = attestor, values
        self._table = torch.from_numpy(attestor.table(values)).to(_device(attestor.group))
        self._work = (
            dist.all_reduce(self._table, group=attestor.group, async_op=True)
            if dist.is_initialized()
            else None
        )

    def finish(self) -> dict[str, int]:
        """The digest of every parameter, or an AttestationError on every rank."""
        if self._work is not None:
            self._work.wait()
        digests, excess, spread = self._table.cpu().numpy()
        if excess.any() or spread.any():
            raise _error(self._attestor.explain(self._values))
        return {
            spec.name: int(digest)
            for spec, digest in zip(
                self._attestor.target.shard_map.parameters, digests.view(np.uint64), strict=True
            )
        }


def replica_shares(holds: np.ndarray[tuple[int, int], np.dtype[np.bool_]], rank: int) -> NDArray[np.uint64]:
    """This rank's factor of every part: uint64 [parts]. Over a part's holders they add up to 0, so equal
    digests times them do, too.

    The factors differ from rank to rank: replicas that differ add up to something else, but for a chance of
    about 2^-63.
    """
    factor, mine = weights_of_ranks(holds.shape[1]), holds[:, rank]
    first = mine & (holds.argmax(axis=1) == rank)
    result = np.where(mine, factor[rank], np.uint64(0))
    result[first] = factor[rank] - (holds[first] * factor).sum(axis=1, dtype=np.uint64)
    return result


def attest(
    source: Parts,
    sources: Sequence[LocalParameter],
    target: Parts,
    held: Sequence[LocalParameter],
    group: dist.ProcessGroup | None = None,
) -> dict[str, int]:
    """Attestor for a single use."""
    return Attestor(source.shard_map, sources, target.shard_map, held, group).run()


def evaluate(bound: list[tuple[int, BoxDigest]], num_parts: int) -> Ints:
    """The digests of bound parts, 0 elsewhere: int64 [parts]."""
    result = np.zeros(num_parts, dtype=np.int64)
    with torch.no_grad():
        if bound:
            result[[part for part, _ in bound]] = torch.stack([digest() for _, digest in bound]).cpu().numpy()
    return result


def gather(values: Ints, group: dist.ProcessGroup | None = None) -> Ints:
    """Every rank's digests: int64 [ranks, parts]. Collective."""
    if not dist.is_initialized():
        return values[None]
    mine = torch.from_numpy(values).to(_device(group))
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    result: Ints = torch.stack(everyone).cpu().numpy()
    return result


def compare(source: Parts, source_digests: Ints, target: Parts, target_digests: Ints) -> dict[str, int]:
    """The digest per parameter from all ranks' digests [ranks, parts], or an AttestationError that names what
    differs."""
    faults, _ = differences(source, source_digests, target, target_digests)
    if faults:
        raise _error(faults)
    return target.sums(target_digests[target.holds.argmax(axis=1), np.arange(len(target.parameter))])


def differences(
    source: Parts, source_digests: Ints, target: Parts, target_digests: Ints
) -> tuple[list[str], set[str]]:
    """(a line per fault, names of the parameters at fault): replicas that disagree, and sides that
    disagree."""
    faults: list[str] = []
    source_sums = source.sums(_agreed(source, source_digests, "training", faults))
    target_sums = target.sums(_agreed(target, target_digests, "generation", faults))
    names = {fault.split(" ", 1)[0] for fault in faults}
    for name, value in target_sums.items():
        if source_sums[name] != value:
            ours, theirs = target.holders(name), source.holders(name)
            faults.append(
                f"{name}: generation ranks {ours} hold digest {value:016x}, training ranks {theirs} "
                f"{source_sums[name]:016x}"
            )
            names.add(name)
    return faults, names


def common_parts(source: Parts, target: Parts, names: set[str]) -> tuple[Parts, Parts]:
    """The intersections of both sides' parts of some parameters, once with the source's holders and once with
    the target's."""
    number = {spec.name: i for i, spec in enumerate(source.shard_map.parameters)}
    ours: list[Ints] = []
    theirs: list[Ints] = []
    starts, shapes = [], []
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
            theirs.append(have[first])
            ours.append(need[second])
            starts.append(start)
            shapes.append(shape)
    have, need, start, shape = (
        np.concatenate(theirs),
        np.concatenate(ours),
        np.concatenate(starts),
        np.concatenate(shapes),
    )
    return (
        Parts(source.shard_map, source.parameter[have], start, shape, source.holds[have]),
        Parts(target.shard_map, target.parameter[need], start, shape, target.holds[need]),
    )


def _error(faults: list[str]) -> AttestationError:
    more = f"\n... and {len(faults) - _MOST_FAULTS} more" if len(faults) > _MOST_FAULTS else ""
    return AttestationError("weights differ after the sync:\n" + "\n".join(faults[:_MOST_FAULTS]) + more)


def _agreed(parts: Parts, digests: Ints, side: str, faults: list[str]) -> Ints:
    """One digest per part, that of most of its holders; holders that disagree are added to `faults`."""
    value: Ints = digests[parts.holds.argmax(axis=1), np.arange(len(parts.parameter))].copy()
    differs = parts.holds & (value[:, None] != digests.T)
    for part in np.nonzero(differs.any(axis=1))[0].tolist():
        holders = np.nonzero(parts.holds[part])[0]
        values, count = np.unique(digests[holders, part], return_counts=True)
        if (count == count.max()).sum() == 1:
            value[part] = values[count.argmax()]
        odd = [int(rank) for rank in holders if digests[rank, part] != value[part]]
        faults.append(
            f"{parts.describe(part)}: {side} ranks {odd} differ from ranks "
            f"{[int(r) for r in holders if int(r) not in odd]}"
        )
    return value


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where small tensors of a collective lie: in host memory if the group can."""
    kinds = device_kinds(group)
    return (
        torch.device("cpu")
        if not kinds or torch.device("cpu") in kinds
        else torch.device("cuda", torch.cuda.current_device())
    )
