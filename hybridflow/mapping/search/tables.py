"""PoolTable: all pools that a set of roles fits into, with the least seconds of each call: the bounds of the
search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hybridflow.mapping.search.fronts import Fronts
from hybridflow.mapping.search.setting import Setting


class PoolTable:
    """PoolTable(setting, fronts, ("actor", "critic")).within((64,)): what no pool of at most 64 devices can
    beat.

    `choices` are (group, devices); `seconds` [choices, calls of the set] is the least of each call over all
    options that fit.
    """

    def __init__(self, setting: Setting, fronts: Fronts, roles: tuple[str, ...]) -> None:
        choices, rows = [], []
        for group, nodes in enumerate(setting.cluster.groups):
            for size in nodes.pool_sizes():
                options = fronts.together(roles, group, size)
                if options is not None:
                    choices.append((group, size))
                    rows.append(np.concatenate([front.seconds.min(axis=0) for front in options]))
        width = sum(len(setting.calls(role)) for role in roles)
        self.choices = choices
        self.groups = np.array([group for group, _ in choices], dtype=np.int64)
        self.sizes = np.array([size for _, size in choices], dtype=np.int64)
        self.seconds = np.array(rows).reshape(len(choices), width)
        self._envelopes: dict[tuple[int, ...], np.ndarray | None] = {}

    def within(self, room: Sequence[int]) -> np.ndarray | None:
        """[calls]: the least of each call over all choices that leave each group within `room` devices; None
        if there is none."""
        key = tuple(room)
        if key not in self._envelopes:
            fits = self.sizes <= np.array(key)[self.groups] if len(self.sizes) else np.zeros(0, dtype=bool)
            self._envelopes[key] = self.seconds[fits].min(axis=0) if fits.any() else None
        return self._envelopes[key]

    @property
    def smallest(self) -> int:
        """Devices of the smallest pool that the set fits into; more than there are if none."""
        return int(self.sizes.min()) if len(self.sizes) else 1 << 40
