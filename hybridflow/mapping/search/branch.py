"""Branch: the best solution of a placement, by branch and bound over device counts, then over
options.

With fixed device counts a step cannot be faster than the schedule in which every call takes the
least time of any option that fits. Only where that bound beats the best solution so far are the
options combined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hybridflow.mapping.search.fronts import (
    Combinations,
    Fronts,
    RoleFront,
    all_pairs,
    combine_roles,
    least_seconds,
    options_at,
)
from hybridflow.mapping.search.options import RoleOption
from hybridflow.mapping.search.placements import Placement, packs
from hybridflow.mapping.search.setting import Setting
from hybridflow.mapping.search.tables import PoolTable

TIE = 1e-9
"""The relative difference by which a solution must be faster to replace another."""

Allocation = tuple[tuple[int, int], ...]
"""(node group, devices) of every pool of a placement."""


Steps = list[np.ndarray]
"""Seconds of every call in program order; the arrays broadcast against each other."""


@dataclass(frozen=True, slots=True)
class Solution:
    """The best devices and layouts of a placement: options[pool][role], in the placement's
    order."""

    placement: Placement
    allocation: Allocation
    options: tuple[tuple[RoleOption, ...], ...]
    step_s: float


@dataclass(slots=True)
class Statistics:
    """Counts of what a search looked at."""

    placements: int = 0
    allocations_bounded: int = 0
    allocations_solved: int = 0


class Branch:
    """Branch(setting, fronts, placement, tables, statistics).best(limit)"""

    def __init__(
        self,
        setting: Setting,
        fronts: Fronts,
        placement: Placement,
        tables: Sequence[PoolTable],
        statistics: Statistics,
    ) -> None:
        self.placement = placement
        self._setting = setting
        self._fronts = fronts
        self._tables = tables
        self._statistics = statistics
        position = setting.dataflow.positions
        pool_of: dict[str, str] = {}
        self._columns: list[list[int]] = []
        for pool, roles in enumerate(placement):
            columns = []
            for role in roles:
                pool_of[role] = str(pool)
                for call in setting.calls(role):
                    columns.append(position[call.name])
            self._columns.append(columns)
        self._schedule = setting.schedule(pool_of)
        self._off_pools = list(map(setting.fixed_seconds, setting.dataflow.calls))
        """Seconds of the calls that run in no pool; those of a pool are filled in over them."""
        self._devices = tuple(group.num_devices for group in setting.cluster.groups)
        self._limit = np.inf
        self._solution: Solution | None = None

    def root_bound(self) -> float:
        """Seconds that no solution of this placement beats; inf if nothing fits."""
        return self._bound({}, self._devices)

    def best(self, limit: float) -> Solution | None:
        """The fastest solution that takes less than `limit` seconds, or None."""
        self._limit, self._solution = limit, None
        self._descend({}, self._devices)
        return self._solution

    def _descend(self, fixed: dict[int, int], free: tuple[int, ...]) -> None:
        """Fixes the devices of a pool after the other, best bound first, until two pools are
        open; `free` are the unused devices of every node group."""
        open_pools = [pool for pool in range(len(self.placement)) if pool not in fixed]
        if len(open_pools) <= 2:
            self._last_pools(fixed, open_pools, free)
            return
        pool = open_pools[0]
        branches = []
        for choice, (group, size) in enumerate(self._tables[pool].choices):
            if size <= free[group]:
                rest = (*free[:group], free[group] - size, *free[group + 1 :])
                branches.append((self._bound({**fixed, pool: choice}, rest), choice, rest))
        for bound, choice, rest in sorted(branches):
            if bound >= self._limit * (1 - TIE):
                break
            self._descend({**fixed, pool: choice}, rest)

    def _bound(self, fixed: dict[int, int], free: tuple[int, ...]) -> float:
        """The makespan when pools in `fixed` (pool -> choice) take the least seconds of their
        choice, and the others the least of any choice within the devices that the rest leaves."""
        self._statistics.allocations_bounded += 1
        seconds = list(self._off_pools)
        for pool, table in enumerate(self._tables):
            least: np.ndarray | None
            if pool in fixed:
                least = table.seconds[fixed[pool]]
            else:
                least = table.within(self._devices_for(pool, fixed, free))
            if least is None:
                return float("inf")
            for column, value in zip(self._columns[pool], least.tolist(), strict=True):
                seconds[column] = value
        return self._schedule.makespan(seconds)

    def _devices_for(
        self, pool: int, fixed: dict[int, int], free: tuple[int, ...]
    ) -> tuple[int, ...]:
        """The devices that the other open pools leave at their smallest; with several node
        groups those may be in another group and leave all."""
        if len(free) > 1:
            return free
        others = 0
        for other, table in enumerate(self._tables):
            if other != pool and other not in fixed:
                others += table.smallest
        return (max(0, free[0] - others),)

    def _last_pools(
        self, fixed: dict[int, int], open_pools: list[int], free: tuple[int, ...]
    ) -> None:
        """Bounds all choices of the last one or two pools at once and solves the promising
        ones, best bound first."""
        shape = tuple(len(self._tables[pool].choices) for pool in open_pools)
        if 0 in shape:
            return
        used = np.zeros((len(free), *shape), dtype=np.int64)
        seconds: Steps = list(map(np.array, self._off_pools))
        for pool, choice in fixed.items():
            for column, value in zip(
                self._columns[pool], self._tables[pool].seconds[choice], strict=True
            ):
                seconds[column] = np.array(value)
        for axis, pool in enumerate(open_pools):
            table, along = self._tables[pool], _along(axis, len(shape))
            for group, amount in enumerate(used):
                amount += np.where(table.groups == group, table.sizes, 0).reshape(along)
            for index, column in enumerate(self._columns[pool]):
                seconds[column] = table.seconds[:, index].reshape(along)
        fits = np.ones(shape, dtype=bool)
        for amount, devices in zip(used, free, strict=True):
            fits &= amount <= devices
        bounds = np.where(
            fits, np.broadcast_to(self._schedule.makespans(seconds), shape), np.inf
        ).ravel()
        self._statistics.allocations_bounded += bounds.size

        def choices_of(index: int) -> dict[int, int]:
            positions = map(int, np.unravel_index(index, shape))
            return {**fixed, **dict(zip(open_pools, positions, strict=True))}

        self._solve_in_order(bounds, choices_of)

    def _solve_in_order(
        self, bounds: np.ndarray, choices_of: Callable[[int], dict[int, int]]
    ) -> None:
        promising = np.flatnonzero(bounds < self._limit * (1 - TIE))
        for index in promising[np.argsort(bounds[promising], kind="stable")]:
            if bounds[index] >= self._limit * (1 - TIE):
                break
            choices = choices_of(int(index))
            allocation = tuple(
                table.choices[choices[pool]] for pool, table in enumerate(self._tables)
            )
            if packs(self._setting.cluster, allocation):
                solution = self.solve(allocation, self._limit)
                if solution is not None:
                    self._solution, self._limit = solution, solution.step_s

    def solve(self, allocation: Allocation, limit: float) -> Solution | None:
        """The best options for these device counts, if they take less than `limit` seconds."""
        self._statistics.allocations_solved += 1
        cheapest = self._from_cheapest(allocation)
        if cheapest is None:
            return None
        fallback = None
        if cheapest.step_s <= limit:
            fallback, limit = cheapest, cheapest.step_s
        fronts: list[tuple[RoleFront, ...]] = []
        for roles, (group, size) in zip(self.placement, allocation, strict=True):
            pool_fronts = self._fronts.together(roles, group, size)
            assert pool_fronts is not None, "the cheapest options of the pool fit"
            fronts.append(pool_fronts)
        ideals = list(map(least_seconds, fronts))
        combinations: list[Combinations] = []
        for pool, (group, _) in enumerate(allocation):
            combined = combine_roles(
                fronts[pool],
                _identity_columns(fronts[pool]),
                self._setting.capacity(group),
                self._promising(pool, ideals, limit),
            )
            if not len(combined):
                return fallback
            combinations.append(combined)
        return self._combine_pools(allocation, fronts, combinations, ideals, limit) or fallback

    def _from_cheapest(self, allocation: Allocation) -> Solution | None:
        """Every pool with the options of least total seconds: feasible, and often already the
        best."""
        options = []
        seconds = list(self._off_pools)
        for roles, (group, size), columns in zip(
            self.placement, allocation, self._columns, strict=True
        ):
            chosen = self._fronts.cheapest(roles, group, size)
            if chosen is None:
                return None
            options.append(chosen)
            values: list[float] = []
            for option in chosen:
                values += option.seconds
            for column, value in zip(columns, values, strict=True):
                seconds[column] = value
        return Solution(
            self.placement, allocation, tuple(options), self._schedule.makespan(seconds)
        )

    def _promising(
        self, pool: int, ideals: list[np.ndarray], limit: float
    ) -> Callable[[np.ndarray], np.ndarray]:
        """A mask of the rows [combinations, calls of `pool`] that can be part of a solution
        below `limit`."""
        return lambda rows: self._makespans({pool: rows}, ideals) < limit * (1 - TIE)

    def _makespans(self, rows: dict[int, np.ndarray], ideals: list[np.ndarray]) -> np.ndarray:
        """[rows]: makespans with the seconds of `rows` in their pools and the ideal ones in the
        others."""
        seconds: Steps = list(map(np.array, self._off_pools))
        for pool, columns in enumerate(self._columns):
            for index, column in enumerate(columns):
                if pool in rows:
                    seconds[column] = rows[pool][:, index]
                else:
                    seconds[column] = ideals[pool][index]
        count = len(next(iter(rows.values())))
        return np.broadcast_to(self._schedule.makespans(seconds), (count,))

    def _combine_pools(
        self,
        allocation: Allocation,
        fronts: list[tuple[RoleFront, ...]],
        combinations: list[Combinations],
        ideals: list[np.ndarray],
        limit: float,
    ) -> Solution | None:
        """The best choice of a combination for every pool."""
        index = np.zeros((1, 0), dtype=np.int64)
        for pool, combined in enumerate(combinations):
            left, right = all_pairs(np.arange(len(index)), np.arange(len(combined)))
            index = np.concatenate([index[left], right[:, None]], axis=1)
            rows = {}
            for number in range(pool + 1):
                rows[number] = combinations[number].seconds[index[:, number]]
            spans = self._makespans(rows, ideals)
            index, spans = index[spans < limit * (1 - TIE)], spans[spans < limit * (1 - TIE)]
            if not len(index):
                return None
        options = []
        for pool, combination in enumerate(index[int(np.argmin(spans))]):
            options.append(options_at(fronts[pool], combinations[pool].chosen[combination]))
        return Solution(self.placement, allocation, tuple(options), float(spans.min()))


def _along(axis: int, dims: int) -> tuple[int, ...]:
    """The shape of an array of `dims` dimensions that extends along `axis` only."""
    shape = [1] * dims
    shape[axis] = -1
    return tuple(shape)


def _identity_columns(fronts: tuple[RoleFront, ...]) -> list[np.ndarray]:
    """For every role the matrix that puts its calls into columns of their own."""
    total = sum(front.seconds.shape[1] for front in fronts)
    result, start = [], 0
    for front in fronts:
        width = front.seconds.shape[1]
        result.append(np.eye(total)[start : start + width])
        start += width
    return result
