"""Transfer protocols: how a call's input is distributed over the ranks of a layout and how its
output is collected.

The paper's six (docs/paper.md section 2) and a user's own pair: Protocol(name="mine", distribute=f,
collect=g). Nothing is padded and no size needs to divide another: a split gives every data
coordinate some rows, possibly none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np

from hybridflow.balance import balance
from hybridflow.batch import Batch
from hybridflow.layout import Layout

MODEL_AXES = ("pp", "cp", "tp")
"""Axes whose ranks work on the same rows; all other axes cut the data."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of one call for one rank."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def batches(self) -> list[Batch]:
        """The batches among the arguments, positional ones first."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Batch)]

    def map_batches(self, change: Callable[[Batch], Batch]) -> Arguments:
        """The same arguments with `change` applied to every batch; other values stay."""

        def convert(value: Any) -> Any:
            return change(value) if isinstance(value, Batch) else value

        return self.map(convert)

    def map(self, change: Callable[[Any], Any]) -> Arguments:
        """The same arguments with `change` applied to every value."""
        return Arguments(
            tuple(map(change, self.args)),
            {name: change(value) for name, value in self.kwargs.items()},
        )


@dataclass(frozen=True, slots=True)
class Distribution:
    """The arguments of every rank, and for split calls the rows of the input that each rank got."""

    arguments: Sequence[Arguments]
    rows: Sequence[np.ndarray] | None = None


@dataclass(frozen=True, slots=True)
class Split:
    """How rows are split: columns that a method names with @remote(balance=..., within=...,
    together=..., near=...)."""

    balance: str | None = None
    """Column of costs (tokens of a row): parts get about the same sum (Karmarkar-Karp), not the
    same number of rows."""
    within: str | None = None
    """Column of labels (mini-batches): the rows of every label are cut evenly, so that each
    label is balanced."""
    together: str | None = None
    """Column of labels (pairs): rows with the same label go to the same part. They must have
    the same label of `within`."""
    near: str | None = None
    """Column of labels (prompts): rows with the same label go to the same part as far as the
    parts stay balanced, because they can share work there."""
    part: str | None = None
    """Column of numbers of parts: each row goes to the part that it names. The others do not
    count then."""


NEAR_COST = 1.1
"""How much more than an even cut the largest parts may cost, so that rows with one label of
`near` stay together."""


Distribute = Callable[[Layout, Arguments, Split], Distribution]
Collect = Callable[[Layout, Sequence[Any]], Any]


@dataclass(frozen=True, slots=True)
class Protocol:
    """A (distribute, collect) pair over a named layout of the worker.

    A pair of one's own:

        def distribute(layout, arguments, split): return Distribution([arguments] * layout.size)
        def collect(layout, results): return results[0]
        FIRST = Protocol(name="FIRST", distribute=distribute, collect=collect)
    """

    name: str
    distribute: Distribute
    collect: Collect
    """Gets the results of the collected ranks, in rank order: values, or Batches of references
    (rows as that rank returned them)."""
    collected: Callable[[Layout], Sequence[int]] = lambda layout: range(layout.size)
    """Ranks whose results are kept; the others store nothing."""
    layout: str = "train"
    """Which of the worker's layouts it is meant over."""
    every_rank: bool = False
    """collect returns a list with the answer of each collected rank: the caller asks for it
    with each() or start() (group.py)."""


def data_groups(layout: Layout) -> list[tuple[int, ...]]:
    """The ranks of every data coordinate: they get the same rows."""
    return layout.groups(*MODEL_AXES)


def _same_to_all(layout: Layout, arguments: Arguments, split: Split) -> Distribution:
    return Distribution([arguments] * layout.size)


def _one_each(layout: Layout, arguments: Arguments, split: Split) -> Distribution:
    """Distributes arguments that are lists with an element per rank."""
    for name, value in [*enumerate(arguments.args), *arguments.kwargs.items()]:
        if len(value) != layout.size:
            raise ValueError(
                f"ALL_TO_ALL: argument {name} has {len(value)} elements; give one for each of "
                f"{layout.size} ranks"
            )
    return Distribution([arguments.map(itemgetter(rank)) for rank in range(layout.size)])


def _split_over(groups: Callable[[Layout], list[tuple[int, ...]]]) -> Distribute:
    def distribute(layout: Layout, arguments: Arguments, split: Split) -> Distribution:
        batches = arguments.batches()
        counts = set(map(len, batches))
        if len(counts) != 1:
            raise ValueError(
                "a split call needs batches with the same number of rows, got "
                f"{sorted(counts) or 'no batch'}"
            )
        members = groups(layout)
        parts = cut_rows(batches[0], len(members), split)
        arguments_of_rank = [arguments] * layout.size
        rows_of_rank = [np.empty(0, dtype=np.int64)] * layout.size
        for ranks, rows in zip(members, parts, strict=True):
            shared = arguments.map_batches(lambda batch, rows=rows: batch.rows(rows))  # type: ignore[misc]
            for rank in ranks:
                arguments_of_rank[rank] = shared
                rows_of_rank[rank] = rows
        return Distribution(arguments_of_rank, rows_of_rank)

    return distribute


def cut_rows(batch: Batch, num_parts: int, split: Split) -> list[np.ndarray]:
    """The rows of each part, ascending; every row is in exactly one part."""
    if num_parts == 1:
        return [np.arange(len(batch))]
    if split.part is not None:
        named = np.asarray(batch[split.part])
        return [np.flatnonzero(named == part) for part in range(num_parts)]
    costs = np.asarray(batch[split.balance]) if split.balance in batch.columns else None
    labels = np.zeros(len(batch), dtype=np.int64)
    if split.within in batch.columns:
        labels = np.asarray(batch[split.within])
    if split.together not in batch.columns:
        if split.near in batch.columns:
            return _cut_near(labels, costs, np.asarray(batch[split.near]), num_parts)
        return _cut_units(labels, costs, num_parts)
    _, first, unit = np.unique(
        np.asarray(batch[split.together]), return_index=True, return_inverse=True
    )
    if (labels != labels[first][unit]).any():
        raise ValueError(
            f"rows with one {split.together} must have one {split.within}; label all rows of a "
            f"{split.together} alike"
        )
    if costs is not None:
        costs = np.bincount(unit, weights=costs, minlength=len(first)).astype(np.int64)
    return _rows_of_units(unit, _cut_units(labels[first], costs, num_parts))


def _rows_of_units(unit: np.ndarray, parts: list[np.ndarray]) -> list[np.ndarray]:
    """The rows of each part of units; `unit` is the unit of each row."""
    return [np.flatnonzero(np.isin(unit, units)) for units in parts]


def _cut_near(
    labels: np.ndarray, costs: np.ndarray | None, near: np.ndarray, num_parts: int
) -> list[np.ndarray]:
    """Rows of one label of `near` stay together, or halves, quarters, ... of them where whole
    ones would leave the parts uneven."""
    costs = np.ones(len(labels), dtype=np.int64) if costs is None else costs
    even = _cut_units(labels, costs, num_parts)
    groups = np.unique(np.stack([labels, near]), axis=1, return_inverse=True)[1].reshape(-1)
    order = np.argsort(groups, kind="stable")
    first = (
        np.concatenate([[0], np.flatnonzero(np.diff(groups[order])) + 1]) if len(order) else order
    )
    number = np.empty(len(groups), dtype=np.int64)  # of each row in its group
    number[order] = np.arange(len(order)) - np.repeat(first, np.diff([*first, len(order)]))
    pieces = 1
    while pieces <= number.max(initial=0):
        _, leader, unit = np.unique(
            groups * pieces + number % pieces, return_index=True, return_inverse=True
        )
        unit_costs = np.bincount(unit, weights=costs).astype(np.int64)
        parts = _rows_of_units(unit, _cut_units(labels[leader], unit_costs, num_parts))
        if _slowest(parts, labels, costs) <= NEAR_COST * _slowest(even, labels, costs):
            return parts
        pieces *= 2
    return even


def _slowest(parts: list[np.ndarray], labels: np.ndarray, costs: np.ndarray) -> float:
    """The cost of the largest part of every label, added up: labels are worked on one after the
    other."""
    size = int(labels.max(initial=0)) + 1
    of_parts = [np.bincount(labels[part], weights=costs[part], minlength=size) for part in parts]
    return float(np.stack(of_parts).max(axis=0).sum())


def _cut_units(labels: np.ndarray, costs: np.ndarray | None, num_parts: int) -> list[np.ndarray]:
    """The units of each part, ascending; a unit is a row, or rows that stay together."""
    parts: list[list[np.ndarray]] = [[np.empty(0, dtype=np.int64)] for _ in range(num_parts)]
    for turn, label in enumerate(np.unique(labels)):
        units = np.flatnonzero(labels == label)
        if costs is None:
            cut = np.array_split(units, num_parts)
        else:
            cut = [units[part] for part in balance(costs[units], num_parts)]
        for part, units_of_part in enumerate(cut):
            # Turning the assignment keeps the parts that are one unit longer from piling up on the
            # first ranks.
            parts[(part + turn) % num_parts].append(units_of_part)
    return [np.sort(np.concatenate(units_of_part)) for units_of_part in parts]


def _every_rank(layout: Layout) -> list[tuple[int, ...]]:
    return [(rank,) for rank in range(layout.size)]


def _last_stage(layout: Layout) -> list[int]:
    """The rank with p = last, t = 0 of every data coordinate."""
    return _ranks_at(layout, pp=layout.axis_size("pp") - 1, cp=0, tp=0)


def _first_of_stage(layout: Layout) -> list[int]:
    """The rank with t = 0, d = 0 of every pipeline stage."""
    zeros = dict.fromkeys(layout.names, 0)
    zeros.pop("pp", None)
    return _ranks_at(layout, **zeros)


def _ranks_at(layout: Layout, **coordinates: int) -> list[int]:
    """The ranks with these coordinates; an axis that the layout does not have counts as 0."""
    ranks = []
    for rank in range(layout.size):
        here = dict.fromkeys(coordinates, 0) | layout.coordinates(rank)
        if coordinates.items() <= here.items():
            ranks.append(rank)
    return ranks


def _as_list(layout: Layout, results: Sequence[Any]) -> Any:
    return list(results)


def _concatenated(layout: Layout, results: Sequence[Any]) -> Any:
    """Batches and lists are concatenated; of other results, which are equal on all ranks
    (metrics), the first is taken."""
    if isinstance(results[0], Batch):
        return Batch.concat(results)
    if isinstance(results[0], list):
        return list(chain.from_iterable(results))
    return results[0]


ONE_TO_ALL = Protocol(name="ONE_TO_ALL", distribute=_same_to_all, collect=_as_list, every_rank=True)
ALL_TO_ALL = Protocol(name="ALL_TO_ALL", distribute=_one_each, collect=_as_list, every_rank=True)
THREE_D = Protocol(
    name="3D_PROTO",
    distribute=_split_over(data_groups),
    collect=_concatenated,
    collected=_last_stage,
)
THREE_D_ALL_MICRO_DP = Protocol(
    name="3D_ALL_MICRO_DP",
    distribute=_split_over(data_groups),
    collect=_concatenated,
    collected=_last_stage,
    layout="generation",
)
THREE_D_PP_ONLY = Protocol(
    name="3D_PP_ONLY",
    distribute=_same_to_all,
    collect=_as_list,
    collected=_first_of_stage,
    every_rank=True,
)
DP = Protocol(name="DP_PROTO", distribute=_split_over(_every_rank), collect=_concatenated)
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (ONE_TO_ALL, THREE_D, THREE_D_ALL_MICRO_DP, THREE_D_PP_ONLY, DP, ALL_TO_ALL)
}
