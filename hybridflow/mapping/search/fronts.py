"""Fronts: the options of a role that no other option beats in every respect, and how roles of a
pool fit together.

A role's front has memory as a criterion, because others share the pool. Dropping a beaten option
never changes the best solution: a step's time grows with every call's time (schedule.py), and a
pool's memory with every role's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hybridflow.mapping.search.options import (
    GenerationOption,
    PassOption,
    RoleOption,
    entry_seconds,
    generation_options,
    paired,
    pass_options,
    role_options,
)
from hybridflow.mapping.search.setting import Setting
from hybridflow.mapping.simulate.footprint import shared_bytes

Shape = tuple[int, int, int, int, int]
"""ModelLayout.shape."""
RESIDENT_PRICES = (0.0, *(4.0 ** np.arange(-6, 4)).tolist())
"""Prices of a device's whole memory that `greedy_choice` tries, as multiples of the least seconds
of all roles."""


def nondominated(rows: np.ndarray) -> np.ndarray:
    """Indices of the rows that no other row beats or equals in all columns (of equal rows the
    first stays), in ascending order."""
    if len(rows) <= 1:
        return np.arange(len(rows))
    candidates = np.lexsort((np.arange(len(rows)), rows.sum(axis=1)))
    unbeaten = []
    while len(candidates):
        best, others = candidates[0], candidates[1:]
        unbeaten.append(best)
        candidates = others[(rows[others] < rows[best]).any(axis=1)]
    return np.sort(np.array(unbeaten))


def all_pairs(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every pair of an entry of `left` and one of `right`, as two flat arrays."""
    first, second = np.meshgrid(left, right, indexing="ij")
    return first.ravel(), second.ravel()


@dataclass(frozen=True, slots=True)
class RoleFront:
    """A role's options on a pool, as arrays [options] and [options, calls of the role]."""

    options: tuple[RoleOption, ...]
    resident: np.ndarray
    transient: np.ndarray
    seconds: np.ndarray

    def take(self, index: np.ndarray) -> RoleFront:
        """The options at `index`."""
        return RoleFront(
            tuple(self.options[i] for i in index),
            self.resident[index],
            self.transient[index],
            self.seconds[index],
        )


def options_at(
    fronts: tuple[RoleFront, ...], chosen: Sequence[int] | np.ndarray
) -> tuple[RoleOption, ...]:
    """The option of every front at its index in `chosen`."""
    return tuple(front.options[index] for front, index in zip(fronts, chosen, strict=True))


def least_seconds(fronts: tuple[RoleFront, ...]) -> np.ndarray:
    """[calls of all fronts]: the least seconds of each call over the options of its role."""
    return np.concatenate([front.seconds.min(axis=0) for front in fronts])


@dataclass(frozen=True, slots=True)
class Combinations:
    """Choices of an option for every role of a pool: `chosen` [combinations, roles] indexes the
    fronts, `resident` and `transient` are [combinations], `seconds` is [combinations, columns]."""

    chosen: np.ndarray
    resident: np.ndarray
    transient: np.ndarray
    seconds: np.ndarray

    def __len__(self) -> int:
        return len(self.resident)

    def take(self, index: np.ndarray) -> Combinations:
        """The combinations at `index`."""
        return Combinations(
            self.chosen[index], self.resident[index], self.transient[index], self.seconds[index]
        )


def combine_roles(
    fronts: tuple[RoleFront, ...],
    columns: list[np.ndarray],
    capacity: float,
    promising: Callable[[np.ndarray], np.ndarray],
) -> Combinations:
    """All combinations of a pool that fit, that no other beats, and that are `promising`.

    `columns[r]` [calls of role r, columns] adds a role's calls up into the criteria. `promising`
    gets [combinations, columns], the least seconds that each partial combination can end with, and
    returns a mask. Works role by role and prunes after each by all three tests.
    """
    least_resident, weighted, least = [], [], []
    for front, weights in zip(fronts, columns, strict=True):
        seconds = front.seconds @ weights
        least_resident.append(front.resident.min())
        weighted.append(seconds)
        least.append(seconds.min(axis=0))
    least_weighted = np.array(least)
    result = Combinations(
        np.zeros((1, 0), dtype=np.int64),
        np.zeros(1),
        np.zeros(1),
        np.zeros((1, columns[0].shape[1])),
    )
    for position, (front, seconds) in enumerate(zip(fronts, weighted, strict=True)):
        unbeaten = nondominated(_criteria(front.resident, front.transient, seconds))
        left, right = all_pairs(np.arange(len(result)), unbeaten)
        resident = result.resident[left] + front.resident[right]
        transient = np.maximum(result.transient[left], front.transient[right])
        total = result.seconds[left] + seconds[right]
        fits = resident + transient + sum(least_resident[position + 1 :]) <= capacity
        fits[fits] = promising(total[fits] + least_weighted[position + 1 :].sum(axis=0))
        chosen = np.concatenate([result.chosen[left], right[:, None]], axis=1)
        extended = Combinations(chosen, resident, transient, total).take(np.flatnonzero(fits))
        criteria = extended.seconds
        if position < len(fronts) - 1:
            criteria = _criteria(extended.resident, extended.transient, extended.seconds)
        result = extended.take(nondominated(criteria))
    return result


def _criteria(resident: np.ndarray, transient: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """[options, 2 + columns]: everything in which an option can beat another."""
    return np.concatenate([resident[:, None], transient[:, None], seconds], axis=1)


def greedy_choice(fronts: tuple[RoleFront, ...], capacity: float) -> tuple[int, ...] | None:
    """Indices of a good combination that fits, by pricing memory: each role takes its cheapest
    option at the price, and the price rises until all fit. It is not always the best, and may
    be None where something fits: the exact search only starts from its bound."""
    best: tuple[float, tuple[int, ...]] | None = None
    totals = [front.seconds.sum(axis=1) for front in fronts]
    scale = sum(float(total.min()) for total in totals) / capacity
    for factor in RESIDENT_PRICES:
        resident_price = scale * factor
        for transient_price in (0.0, 0.1 * resident_price, resident_price):
            chosen, resident, transient, seconds = [], 0.0, 0.0, 0.0
            for front, total in zip(fronts, totals, strict=True):
                priced = total + resident_price * front.resident + transient_price * front.transient
                index = int(np.argmin(priced))
                chosen.append(index)
                resident += front.resident[index]
                transient = max(transient, front.transient[index])
                seconds += total[index]
            if resident + transient <= capacity and (best is None or seconds < best[0]):
                best = (seconds, tuple(chosen))
    if best is None:
        return None
    return best[1]


class Fronts:
    """Fronts(setting).of_role("actor", group=0, num_devices=16); every answer is computed once."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._roles: dict[tuple[object, ...], RoleFront] = {}
        self._shapes: dict[tuple[object, ...], dict[Shape, RoleFront]] = {}
        self._together: dict[tuple[tuple[str, ...], int, int], tuple[RoleFront, ...] | None] = {}
        self._cheapest: dict[tuple[tuple[str, ...], int, int], tuple[RoleOption, ...] | None] = {}
        self._signatures = {role: self._signature(role) for role in setting.roles}

    def of_role(self, role: str, group: int, num_devices: int) -> RoleFront:
        """Roles with the same model and the same kinds of calls share their front."""
        key = (self._signatures[role], group, num_devices)
        if key not in self._roles:
            self._roles[key] = self._role_front(role, group, num_devices)
        return self._roles[key]

    def together(
        self, roles: tuple[str, ...], group: int, num_devices: int
    ) -> tuple[RoleFront, ...] | None:
        """Each role's front, without the options that leave the others too little memory even
        at their leanest; None if the roles do not fit together."""
        key = (roles, group, num_devices)
        if key not in self._together:
            fronts = [self.of_role(role, group, num_devices) for role in roles]
            apart = _fitting(fronts, self._setting.capacity(group))
            self._together[key] = self._sharing(*key, fronts, apart)
        return self._together[key]

    def _sharing(
        self,
        roles: tuple[str, ...],
        group: int,
        num_devices: int,
        fronts: list[RoleFront],
        apart: tuple[RoleFront, ...] | None,
    ) -> tuple[RoleFront, ...] | None:
        """Where roles of the pool have the same frozen weights: their fronts in the layout that is
        the best to share them in, or `apart` where that is faster. Which is decided by
        `greedy_choice`: trying all to the end would take as long as a search each."""
        members = self._setting.sharing(roles)
        if not members:
            return apart
        capacity = self._setting.capacity(group)
        best, least = apart, _greedy_seconds(apart, capacity)
        of_shapes = {}
        for role in members:
            lent = role != members[0]
            of_shapes[role] = self._role_shapes(role, group, num_devices, lent=lent)
        for shape in of_shapes[members[0]]:
            if any(shape not in of_shapes[role] for role in members):
                continue
            chosen = list(fronts)
            for role in members:
                chosen[roles.index(role)] = of_shapes[role][shape]
            shared = _fitting(chosen, capacity)
            seconds = _greedy_seconds(shared, capacity)
            if shared is not None and (best is None or seconds < least):
                best, least = shared, seconds
        return best

    def _role_shapes(
        self, role: str, group: int, num_devices: int, *, lent: bool
    ) -> dict[Shape, RoleFront]:
        """A role's front for every layout of its shards; `lent`: without the memory of the frozen
        weights, which another role has."""
        key = (self._signatures[role], group, num_devices, lent)
        if key not in self._shapes:
            setting = self._setting
            of_shape: dict[Shape, list[RoleOption]] = {}
            for option in self._candidates(role, group, num_devices):
                layout, trained = option.layout, setting.trained(role)
                assert layout is not None
                if lent:
                    saved = shared_bytes(
                        setting.model(role), layout, setting.space, trained=trained
                    )
                    option = replace(option, resident=option.resident - saved)
                of_shape.setdefault(layout.shape, []).append(option)
            fronts = {}
            for shape, options in of_shape.items():
                fronts[shape] = self._front(role, group, options)
            self._shapes[key] = fronts
        return self._shapes[key]

    def cheapest(
        self, roles: tuple[str, ...], group: int, num_devices: int
    ) -> tuple[RoleOption, ...] | None:
        """An option for every role: they fit together and have the least sum of seconds; None
        if nothing fits."""
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
        bound = float("inf")
        if chosen is not None:
            bound = 0.0
            for front, index in zip(fronts, chosen, strict=True):
                bound += float(front.seconds[index].sum())
        ones = [np.ones((front.seconds.shape[1], 1)) for front in fronts]
        cheaper = combine_roles(
            fronts, ones, capacity, lambda sums: sums[:, 0] < bound * (1 - 1e-12)
        )
        if len(cheaper):
            chosen = tuple(cheaper.chosen[int(np.argmin(cheaper.seconds[:, 0]))])
        if chosen is None:
            return None
        return options_at(fronts, chosen)

    def _signature(self, role: str) -> tuple[object, ...]:
        setting = self._setting
        kinds = tuple(call.kind for call in setting.calls(role))
        return (replace(setting.model(role), name=""), kinds, role in setting.weights_from)

    def _role_front(self, role: str, group: int, num_devices: int) -> RoleFront:
        return self._front(role, group, self._candidates(role, group, num_devices))

    def _front(self, role: str, group: int, candidates: list[RoleOption]) -> RoleFront:
        """The candidates that fit and that no other beats."""
        capacity = self._setting.capacity(group)
        options, rows = [], []
        for option in candidates:
            if option.resident + option.transient <= capacity:
                options.append(option)
                rows.append((option.resident, option.transient, *option.seconds))
        table = np.array(rows).reshape(len(options), 2 + len(self._setting.calls(role)))
        unbeaten = nondominated(table)
        chosen = tuple(options[index] for index in unbeaten)
        return RoleFront(chosen, table[unbeaten, 0], table[unbeaten, 1], table[unbeaten, 2:])

    def _candidates(self, role: str, group: int, num_devices: int) -> list[RoleOption]:
        """role_options, without pass options that lose to another with the same shards: those
        alike in p, t, ZeRO stage and offloading have the same transition and leave the same
        memory for generation, so that only their bytes and seconds count."""
        setting = self._setting
        if not setting.generates(role) or setting.only_generates(role):
            return role_options(setting, role, group, num_devices)
        generating = generation_options(setting, role, group, num_devices)
        alike: dict[tuple[object, ...], list[PassOption]] = {}
        for option in pass_options(setting, role, group, num_devices):
            layout = option.layout
            if option.resident + option.transient <= setting.capacity(group):
                alike.setdefault((layout.p, layout.t, layout.zero, layout.offload), []).append(
                    option
                )
        candidates: list[RoleOption] = []
        for options in alike.values():
            candidates += self._pairs(role, group, options, generating)
        return candidates

    def _pairs(
        self, role: str, group: int, alike: list[PassOption], generating: list[GenerationOption]
    ) -> Iterator[RoleOption]:
        """Pass options that share their shards with every generation option, as far as they fit."""
        capacity = self._setting.capacity(group)
        rows = np.array([(option.resident, option.transient, *option.seconds) for option in alike])
        passing = [alike[index] for index in nondominated(rows)]
        transitions: dict[tuple[int, int], float] = {}
        for other in generating:  # the loop that decides how long the fronts take
            shape = (other.layout.pg, other.layout.tg)
            if shape not in transitions:
                transitions[shape] = entry_seconds(
                    self._setting, role, group, alike[0].layout, other.layout
                )
            for option in passing:
                if (
                    option.resident + other.others + max(0.0, other.weights - option.held)
                    <= capacity
                ):
                    yield paired(self._setting, role, option, other, transitions[shape])


def _greedy_seconds(fronts: tuple[RoleFront, ...] | None, capacity: float) -> float:
    """The sum of seconds of `greedy_choice`; inf where it finds none."""
    chosen = greedy_choice(fronts, capacity) if fronts is not None else None
    if fronts is None or chosen is None:
        return float("inf")
    seconds = 0.0
    for front, index in zip(fronts, chosen, strict=True):
        seconds += float(front.seconds[index].sum())
    return seconds


def _fitting(fronts: list[RoleFront], capacity: float) -> tuple[RoleFront, ...] | None:
    """The fronts without options that cannot fit beside the leanest of the others; None if
    nothing fits."""
    if any(not front.options for front in fronts):
        return None
    result = []
    for position, front in enumerate(fronts):
        others = fronts[:position] + fronts[position + 1 :]
        resident = sum(other.resident.min() for other in others)
        transient = max((float(other.transient.min()) for other in others), default=0.0)
        needed = front.resident + np.maximum(front.transient, transient) + resident
        smaller = front.take(np.flatnonzero(needed <= capacity))
        if not smaller.options:
            return None
        result.append(smaller)
    return tuple(result)
