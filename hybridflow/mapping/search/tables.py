"""PoolTable: all pools that a set of roles fits into, with the least seconds of each call, for
the bounds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hybridflow.mapping.search.fronts import Fronts, least_seconds
from hybridflow.mapping.search.setting import Setting


class PoolTable:
    """The pools of a set of roles.

    PoolTable(setting, fronts, ("actor", "critic")).within((64,))  # seconds that no pool of up to 64 beats

    `choices` are (group, devices); `seconds` [choices, calls of the set] is the least of each call
    over all options that fit.
    """

    def __init__(self, setting: Setting, fronts: Fronts, roles: tuple[str, ...]) -> None:
        choices, rows = [], []
        for group, nodes in enumerate(setting.cluster.groups):
            for size in nodes.pool_sizes():
                options = fronts.together(roles, group, size)
                if options is not None:
                    choices.append((group, size))
                    rows.append(least_seconds(options))
        width = sum(len(setting.calls(role)) for role in roles)
        self.choices = choices
        self.groups, self.sizes = np.array(choices, dtype=np.int64).reshape(-1, 2).T
        self.seconds = np.array(rows).reshape(len(choices), width)
        self._least: dict[tuple[int, ...], np.ndarray | None] = {}

    def within(self, devices: Sequence[int]) -> np.ndarray | None:
        """[calls]: the least seconds of each call over all choices that take at most `devices`
        of each node group; None if there is no such choice."""
        key = tuple(devices)
        if key not in self._least:
            fits = self.sizes <= np.array(key)[self.groups]
            self._least[key] = self.seconds[fits].min(axis=0) if fits.any() else None
        return self._least[key]

    @property
    def smallest(self) -> int:
        """Devices of the smallest pool that the set fits into; more than there are if none."""
        if not len(self.sizes):
            return 1 << 40
        return int(self.sizes.min())
