"""Branch: the best plan of one placement, by branch and bound over device counts, then over options.

With given device counts a step cannot be faster than the schedule in which every call takes the least time of
any option that fits. Only where that bound beats the best plan so far are the options themselves combined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hybridflow.dataflow import CallKind
from hybridflow.mapping.search.fronts import Fronts, Plans, RoleFront, merge_plans
from hybridflow.mapping.search.options import RoleOption
from hybridflow.mapping.search.placements import Placement, packs
from hybridflow.mapping.search.setting import Setting
from hybridflow.mapping.search.tables import PoolTable

TIE = 1e-9
"""Relative: a plan must be this much faster to replace another."""

Allocation = tuple[tuple[int, int], ...]
"""(node group, devices) of every pool of a placement."""


@dataclass(frozen=True, slots=True)
class Found:
    """The best plan of one placement: options[pool][role], in the placement's order."""

    placement: Placement
    allocation: Allocation
    options: tuple[tuple[RoleOption, ...], ...]
    step_s: float


@dataclass(slots=True)
class Statistics:
    """How much work a search was."""

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
        self._setting, self._fronts, self._tables, self._statistics = setting, fronts, tables, statistics
        self._schedule = setting.schedule(
            {role: str(pool) for pool, roles in enumerate(placement) for role in roles}
        )
        position = {call.name: index for index, call in enumerate(setting.dataflow.calls)}
        self._columns = [
            [position[call.name] for role in roles for call in setting.calls(role)] for roles in placement
        ]
        self._fixed = [
            0.0
            if call.role in setting.roles and call.kind is not CallKind.controller
            else setting.fixed_seconds(call)
            for call in setting.dataflow.calls
        ]
        self._room = tuple(group.num_devices for group in setting.cluster.groups)
        self._limit = np.inf
        self._found: Found | None = None

    def root_bound(self) -> float:
        """No plan of this placement is faster; inf if none fits."""
        return self._bound({}, self._room)

    def best(self, limit: float) -> Found | None:
        """The fastest plan that takes less than `limit` seconds, or None."""
        self._limit, self._found = limit, None
        self._descend({}, self._room)
        return self._found

    def _descend(self, fixed: dict[int, int], room: tuple[int, ...]) -> None:
        """Fix one pool after the other, best bound first, until two are left."""
        open_pools = [pool for pool in range(len(self.placement)) if pool not in fixed]
        if len(open_pools) <= 2:
            self._last_pools(fixed, open_pools, room)
            return
        pool = open_pools[0]
        branches = []
        for choice, (group, size) in enumerate(self._tables[pool].choices):
            if size <= room[group]:
                left = tuple(have - size if number == group else have for number, have in enumerate(room))
                branches.append((self._bound({**fixed, pool: choice}, left), choice, left))
        for bound, choice, left in sorted(branches):
            if bound >= self._limit * (1 - TIE):
                break
            self._descend({**fixed, pool: choice}, left)

    def _bound(self, fixed: dict[int, int], room: tuple[int, ...]) -> float:
        """Makespan when pools in `fixed` (pool -> choice) take their least and the others the least within
        what the rest leaves."""
        self._statistics.allocations_bounded += 1
        seconds = list(self._fixed)
        for pool, table in enumerate(self._tables):
            least = (
                table.seconds[fixed[pool]]
                if pool in fixed
                else table.within(self._room_for(pool, fixed, room))
            )
            if least is None:
                return float("inf")
            for column, value in zip(self._columns[pool], least.tolist(), strict=True):
                seconds[column] = value
        return self._schedule.makespan(seconds)

    def _room_for(self, pool: int, fixed: dict[int, int], room: tuple[int, ...]) -> tuple[int, ...]:
        """What the other open pools leave at their smallest; with several node groups they may stand
        elsewhere and leave all."""
        if len(room) > 1:
            return room
        others = sum(
            self._tables[other].smallest
            for other in range(len(self._tables))
            if other != pool and other not in fixed
        )
        return (max(0, room[0] - others),)

    def _last_pools(self, fixed: dict[int, int], open_pools: list[int], room: tuple[int, ...]) -> None:
        """Bound all choices of the last one or two pools at once and solve the promising ones, best bound
        first."""
        tables = [self._tables[pool] for pool in open_pools]
        shape = tuple(len(table.choices) for table in tables)
        if 0 in shape:
            return
        used = [
            sum(
                np.where(axis.groups == g, axis.sizes, 0).reshape(_axis(i, len(shape)))
                for i, axis in enumerate(tables)
            )
            for g in range(len(room))
        ]
        fits = np.all(
            [np.broadcast_to(amount <= have, shape) for amount, have in zip(used, room, strict=True)], axis=0
        )
        seconds: list[np.ndarray] = [np.array(value) for value in self._fixed]
        for pool, choice in fixed.items():
            for column, value in zip(self._columns[pool], self._tables[pool].seconds[choice], strict=True):
                seconds[column] = np.array(value)
        for axis, pool in enumerate(open_pools):
            for index, column in enumerate(self._columns[pool]):
                seconds[column] = self._tables[pool].seconds[:, index].reshape(_axis(axis, len(shape)))
        bounds = np.where(fits, np.broadcast_to(self._schedule.makespans(seconds), shape), np.inf).ravel()
        self._statistics.allocations_bounded += bounds.size
        self._solve_in_order(
            bounds,
            lambda index: {
                **fixed,
                **{
                    pool: int(at) for pool, at in zip(open_pools, np.unravel_index(index, shape), strict=True)
                },
            },
        )

    def _solve_in_order(self, bounds: np.ndarray, choices_of: Callable[[int], dict[int, int]]) -> None:
        promising = np.flatnonzero(bounds < self._limit * (1 - TIE))
        for index in promising[np.argsort(bounds[promising], kind="stable")]:
            if bounds[index] >= self._limit * (1 - TIE):
                break
            choices = choices_of(int(index))
            allocation = tuple(
                self._tables[pool].choices[choices[pool]] for pool in range(len(self.placement))
            )
            if packs(self._setting.cluster, allocation):
                found = self.solve(allocation, self._limit)
                if found is not None:
                    self._found, self._limit = found, found.step_s

    def solve(self, allocation: Allocation, limit: float) -> Found | None:
        """The best options for given device counts, if they take less than `limit` seconds."""
        self._statistics.allocations_solved += 1
        found = self._from_cheapest(allocation)
        if found is None:
            return None
        limit = min(limit, found.step_s)
        pools = [
            self._fronts.together(roles, *where)
            for roles, where in zip(self.placement, allocation, strict=True)
        ]
        fronts = [pool for pool in pools if pool is not None]
        ideals = [np.concatenate([front.seconds.min(axis=0) for front in pool]) for pool in fronts]
        merged: list[Plans] = []
        for pool, (group, _) in enumerate(allocation):
            plans = merge_plans(
                fronts[pool],
                _identity_columns(fronts[pool]),
                self._setting.capacity(group),
                self._promising(pool, ideals, limit),
            )
            if not len(plans.resident):
                return found if found.step_s <= limit else None
            merged.append(plans)
        better = self._combine(allocation, fronts, merged, ideals, limit)
        return better or (found if found.step_s <= limit else None)

    def _from_cheapest(self, allocation: Allocation) -> Found | None:
        """Each pool with the options of least total seconds: feasible, and often already the best."""
        options = []
        seconds = list(self._fixed)
        for roles, where, columns in zip(self.placement, allocation, self._columns, strict=True):
            chosen = self._fronts.cheapest(roles, *where)
            if chosen is None:
                return None
            options.append(chosen)
            for column, value in zip(
                columns, (value for option in chosen for value in option.seconds), strict=True
            ):
                seconds[column] = value
        return Found(self.placement, allocation, tuple(options), self._schedule.makespan(seconds))

    def _promising(
        self, pool: int, ideals: list[np.ndarray], limit: float
    ) -> Callable[[np.ndarray], np.ndarray]:
        """Mask of rows [plans, calls of `pool`] that can still be part of a plan below `limit`."""
        return lambda rows: self._makespans({pool: rows}, ideals) < limit * (1 - TIE)

    def _makespans(self, rows: dict[int, np.ndarray], ideals: list[np.ndarray]) -> np.ndarray:
        seconds: list[np.ndarray] = [np.array(value) for value in self._fixed]
        for pool, columns in enumerate(self._columns):
            for index, column in enumerate(columns):
                seconds[column] = rows[pool][:, index] if pool in rows else ideals[pool][index]
        count = len(next(iter(rows.values())))
        return np.broadcast_to(self._schedule.makespans(seconds), (count,))

    def _combine(
        self,
        allocation: Allocation,
        fronts: list[tuple[RoleFront, ...]],
        merged: list[Plans],
        ideals: list[np.ndarray],
        limit: float,
    ) -> Found | None:
        """The best choice of one plan per pool."""
        index = np.zeros((1, 0), dtype=np.int64)
        for pool, plans in enumerate(merged):
            left, right = (
                part.ravel()
                for part in np.meshgrid(np.arange(len(index)), np.arange(len(plans.resident)), indexing="ij")
            )
            index = np.concatenate([index[left], right[:, None]], axis=1)
            rows = {number: merged[number].seconds[index[:, number]] for number in range(pool + 1)}
            spans = self._makespans(rows, ideals)
            index, spans = index[spans < limit * (1 - TIE)], spans[spans < limit * (1 - TIE)]
            if not len(index):
                return None
        best = index[int(np.argmin(spans))]
        options = tuple(
            tuple(
                front.options[choice]
                for front, choice in zip(fronts[pool], merged[pool].chosen[plan], strict=True)
            )
            for pool, plan in enumerate(best)
        )
        return Found(self.placement, allocation, options, float(spans.min()))


def _axis(axis: int, dims: int) -> tuple[int, ...]:
    return tuple(-1 if number == axis else 1 for number in range(dims))


def _identity_columns(fronts: tuple[RoleFront, ...]) -> list[np.ndarray]:
    """For every role the matrix that puts its calls into their own columns of the set's."""
    total = sum(front.seconds.shape[1] for front in fronts)
    result, start = [], 0
    for front in fronts:
        width = front.seconds.shape[1]
        result.append(np.eye(total)[start : start + width])
        start += width
    return result
