"""Fronts: the options of a role that no other option beats in everything, and how roles of one pool fit
together.

A role's front keeps memory as a criterion, because others share the pool. Dropping a beaten option never
changes the best plan: a step's time grows with every call's time (schedule.py), and a pool's memory with
every role's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from hybridflow.dataflow import CallKind
from hybridflow.mapping.search.options import (
    GenerationOption,
    PassOption,
    RoleOption,
    entry_seconds,
    generation_only,
    generation_options,
    paired,
    pass_options,
    role_options,
)
from hybridflow.mapping.search.setting import Setting


def nondominated(rows: np.ndarray) -> np.ndarray:
    """Indices of the rows that no other row beats or equals in all columns (of equal rows the first stays),
    in ascending order."""
    if len(rows) <= 1:
        return np.arange(len(rows))
    left = np.lexsort((np.arange(len(rows)), rows.sum(axis=1)))
    kept = []
    while len(left):
        best = left[0]
        kept.append(best)
        left = left[1:][(rows[left[1:]] < rows[best]).any(axis=1)]
    return np.sort(np.array(kept))


@dataclass(frozen=True, slots=True)
class RoleFront:
    """A role's options on one pool, as arrays [options] and [options, calls of the role]."""

    options: tuple[RoleOption, ...]
    resident: np.ndarray
    transient: np.ndarray
    seconds: np.ndarray

    def take(self, index: np.ndarray) -> RoleFront:
        return RoleFront(
            tuple(self.options[i] for i in index),
            self.resident[index],
            self.transient[index],
            self.seconds[index],
        )


@dataclass(frozen=True, slots=True)
class Plans:
    """Choices of one option per role of a pool: `chosen` [plans, roles] indexes the fronts, `seconds` is
    [plans, columns]."""

    chosen: np.ndarray
    resident: np.ndarray
    transient: np.ndarray
    seconds: np.ndarray

    def take(self, index: np.ndarray) -> Plans:
        return Plans(self.chosen[index], self.resident[index], self.transient[index], self.seconds[index])


def merge_plans(
    fronts: tuple[RoleFront, ...],
    columns: list[np.ndarray],
    capacity: float,
    promising: Callable[[np.ndarray], np.ndarray],
) -> Plans:
    """All plans of a pool that fit, that no other plan beats, and that are `promising`.

    `columns[r]` [calls of role r, columns] adds a role's calls up into the criteria. `promising` gets [plans,
    columns], the least seconds that each partial plan can still end with, and returns a mask. Works role by
    role and prunes after each by all three tests.
    """
    least_resident = [front.resident.min() for front in fronts]
    weighted = [front.seconds @ weights for front, weights in zip(fronts, columns, strict=True)]
    least_seconds = np.array([seconds.min(axis=0) for seconds in weighted])
    plans = Plans(
        np.zeros((1, 0), dtype=np.int64), np.zeros(1), np.zeros(1), np.zeros((1, columns[0].shape[1]))
    )
    for position, (front, seconds) in enumerate(zip(fronts, weighted, strict=True)):
        front_rows = nondominated(
            np.concatenate([front.resident[:, None], front.transient[:, None], seconds], axis=1)
        )
        left, right = (
            index.ravel() for index in np.meshgrid(np.arange(len(plans.resident)), front_rows, indexing="ij")
        )
        resident = plans.resident[left] + front.resident[right]
        transient = np.maximum(plans.transient[left], front.transient[right])
        total = plans.seconds[left] + seconds[right]
        fits = resident + transient + sum(least_resident[position + 1 :]) <= capacity
        fits[fits] = promising(total[fits] + least_seconds[position + 1 :].sum(axis=0))
        grown = Plans(
            np.concatenate([plans.chosen[left], right[:, None]], axis=1), resident, transient, total
        ).take(np.flatnonzero(fits))
        last = position == len(fronts) - 1
        criteria = (
            grown.seconds
            if last
            else np.concatenate([grown.resident[:, None], grown.transient[:, None], grown.seconds], axis=1)
        )
        plans = grown.take(nondominated(criteria))
    return plans


def greedy_choice(fronts: tuple[RoleFront, ...], capacity: float) -> tuple[int, ...] | None:
    """Indices of a good plan that fits, found by pricing memory: each role takes its cheapest option at the
    price, and the price rises until all fit. Not always the best, sometimes nothing: it only gives the exact
    search a bound to start from."""
    best: tuple[float, tuple[int, ...]] | None = None
    totals = [front.seconds.sum(axis=1) for front in fronts]
    scale = sum(float(total.min()) for total in totals) / capacity
    for resident_price in (0.0, *(scale * 4.0**power for power in range(-6, 4))):
        for transient_price in (0.0, 0.1 * resident_price, resident_price):
            chosen = tuple(
                int(np.argmin(total + resident_price * front.resident + transient_price * front.transient))
                for front, total in zip(fronts, totals, strict=True)
            )
            resident = sum(front.resident[index] for front, index in zip(fronts, chosen, strict=True))
            transient = max(front.transient[index] for front, index in zip(fronts, chosen, strict=True))
            seconds = sum(total[index] for total, index in zip(totals, chosen, strict=True))
            if resident + transient <= capacity and (best is None or seconds < best[0]):
                best = (seconds, chosen)
    return best[1] if best is not None else None


class Fronts:
    """Fronts(setting).of_role("actor", group=0, num_devices=16); everything is computed once."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._roles: dict[tuple[object, ...], RoleFront] = {}
        self._together: dict[tuple[tuple[str, ...], int, int], tuple[RoleFront, ...] | None] = {}
        self._cheapest: dict[tuple[tuple[str, ...], int, int], tuple[RoleOption, ...] | None] = {}
        self._signatures = {role: self._signature(role) for role in setting.roles}

    def of_role(self, role: str, group: int, num_devices: int) -> RoleFront:
        """Roles with the same model and the same kinds of calls share their front."""
        key = (self._signatures[role], group, num_devices)
        if key not in self._roles:
            self._roles[key] = self._role_front(role, group, num_devices)
        return self._roles[key]

    def together(self, roles: tuple[str, ...], group: int, num_devices: int) -> tuple[RoleFront, ...] | None:
        """Each role's front, without the options for which the others have no room even at their leanest;
        None if the set does not fit."""
        key = (roles, group, num_devices)
        if key not in self._together:
            self._together[key] = _fitting(
                [self.of_role(role, group, num_devices) for role in roles], self._setting.capacity(group)
            )
        return self._together[key]

    def cheapest(self, roles: tuple[str, ...], group: int, num_devices: int) -> tuple[RoleOption, ...] | None:
        """Options, one per role, that fit together and have the least sum of seconds; None if nothing
        fits."""
        key = (roles, group, num_devices)
        if key not in self._cheapest:
            self._cheapest[key] = self._least_sum(*key)
        return self._cheapest[key]

    def _least_sum(
        self, roles: tuple[str, ...], group: int, num_devices: int
    ) -> tuple[RoleOption, ...] | None:
        fronts = self.together(roles, group, num_devices)
        if fronts is None:
            return None
        capacity = self._setting.capacity(group)
        chosen = greedy_choice(fronts, capacity)
        bound = (
            np.inf
            if chosen is None
            else sum(float(front.seconds[index].sum()) for front, index in zip(fronts, chosen, strict=True))
        )
        ones = [np.ones((front.seconds.shape[1], 1)) for front in fronts]
        plans = merge_plans(fronts, ones, capacity, lambda seconds: seconds[:, 0] < bound * (1 - 1e-12))
        if len(plans.resident):
            chosen = tuple(plans.chosen[int(np.argmin(plans.seconds[:, 0]))])
        return (
            None
            if chosen is None
            else tuple(front.options[index] for front, index in zip(fronts, chosen, strict=True))
        )

    def _signature(self, role: str) -> tuple[object, ...]:
        setting = self._setting
        kinds = tuple(call.kind for call in setting.calls(role))
        return (replace(setting.model(role), name=""), kinds, role in setting.weights_from)

    def _role_front(self, role: str, group: int, num_devices: int) -> RoleFront:
        capacity = self._setting.capacity(group)
        options = [
            option
            for option in self._candidates(role, group, num_devices)
            if option.resident + option.transient <= capacity
        ]
        rows = np.array([(option.resident, option.transient, *option.seconds) for option in options])
        rows = rows.reshape(len(options), 2 + len(self._setting.calls(role)))
        kept = nondominated(rows)
        return RoleFront(
            tuple(options[index] for index in kept), rows[kept, 0], rows[kept, 1], rows[kept, 2:]
        )

    def _candidates(self, role: str, group: int, num_devices: int) -> list[RoleOption]:
        """role_options, without pass options that lose to one with the same shards: those alike in p, t, ZeRO
        stage and offloading have the same transition and leave the same room for generation, so that only
        their own bytes and seconds count."""
        setting = self._setting
        kinds = {call.kind for call in setting.calls(role)}
        if CallKind.generation not in kinds:
            return role_options(setting, role, group, num_devices)
        generating = generation_options(setting, role, group, num_devices)
        if kinds == {CallKind.generation}:
            return [generation_only(setting, role, group, option) for option in generating]
        alike: dict[tuple[object, ...], list[PassOption]] = {}
        for option in pass_options(setting, role, group, num_devices):
            layout = option.layout
            if option.resident + option.transient <= setting.capacity(group):
                alike.setdefault((layout.p, layout.t, layout.zero, layout.offload), []).append(option)
        return [pair for options in alike.values() for pair in self._pairs(role, group, options, generating)]

    def _pairs(
        self, role: str, group: int, alike: list[PassOption], generating: list[GenerationOption]
    ) -> Iterator[RoleOption]:
        """Pass options that share their shards with every generation option, as far as they fit."""
        capacity = self._setting.capacity(group)
        rows = np.array([(option.resident, option.transient, *option.seconds) for option in alike])
        passing = [alike[index] for index in nondominated(rows)]
        transitions: dict[tuple[int, int], float] = {}
        for other in generating:
            shape = (other.layout.pg, other.layout.tg)
            if shape not in transitions:
                transitions[shape] = entry_seconds(self._setting, role, group, alike[0].layout, other.layout)
            for one in passing:
                if one.resident + other.others + max(0.0, other.weights - one.held) <= capacity:
                    yield paired(self._setting, role, one, other, transitions[shape])


def _fitting(fronts: list[RoleFront], capacity: float) -> tuple[RoleFront, ...] | None:
    if any(not front.options for front in fronts):
        return None
    result = []
    for position, front in enumerate(fronts):
        others = fronts[:position] + fronts[position + 1 :]
        resident = sum(other.resident.min() for other in others)
        transient = max((float(other.transient.min()) for other in others), default=0.0)
        result.append(
            front.take(
                np.flatnonzero(front.resident + np.maximum(front.transient, transient) + resident <= capacity)
            )
        )
    return tuple(result) if all(front.options for front in result) else None
