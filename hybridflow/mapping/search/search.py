"""Search: the best mapping (the paper's Algorithm 1), exact: what is not looked at is proved to be no better.

Every set partition of the roles is a placement; each is bounded first and left as soon as its bound loses.
Pools may leave devices idle, so that every device count up to the cluster's is covered.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hybridflow.mapping.search.branch import TIE, Allocation, Branch, Found, Statistics
from hybridflow.mapping.search.fronts import Fronts
from hybridflow.mapping.search.placements import Placement, placements
from hybridflow.mapping.search.setting import Setting
from hybridflow.mapping.search.tables import PoolTable


@dataclass(frozen=True, slots=True)
class PlacementResult:
    """What is known about one placement: its best plan (bound_s is its time), or that it takes at least
    `bound_s` (inf: does not fit)."""

    placement: Placement
    found: Found | None
    bound_s: float


@dataclass(frozen=True, slots=True)
class SearchResult:
    """`best` is None if nothing fits; `placements` are sorted from best to worst."""

    best: Found | None
    placements: tuple[PlacementResult, ...]
    statistics: Statistics = field(default_factory=Statistics)


class Search:
    """Search(setting).run(); Search(setting).best_of((("actor", "critic"), ("reference",)))"""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.statistics = Statistics()
        self._fronts = Fronts(setting)
        self._tables: dict[tuple[str, ...], PoolTable] = {}

    def run(self, *, every_placement: bool = False) -> SearchResult:
        """The fastest mapping. With `every_placement` the fastest of each placement too; otherwise a
        placement is left when it loses."""
        branches = [self._branch(placement) for placement in placements(self.setting.roles)]
        bounded = sorted(
            ((branch.root_bound(), len(branch.placement), number) for number, branch in enumerate(branches))
        )
        self.statistics.placements = len(branches)
        best: Found | None = None
        results = []
        for bound, _, number in bounded:
            limit = np.inf if best is None or every_placement else best.step_s
            found = branches[number].best(limit) if bound < limit * (1 - TIE) else None
            known = bound if limit == np.inf else max(bound, limit)
            results.append(
                PlacementResult(branches[number].placement, found, known if found is None else found.step_s)
            )
            if found is not None and (best is None or found.step_s < best.step_s * (1 - TIE)):
                best = found
        results.sort(key=lambda result: (result.found is not best or best is None, result.bound_s))
        return SearchResult(best, tuple(results), self.statistics)

    def best_of(self, placement: Placement) -> Found | None:
        """The fastest plan of one placement, or None if it does not fit."""
        return self._branch(placement).best(np.inf)

    def best_for(self, placement: Placement, allocation: Allocation) -> Found | None:
        """The fastest layouts for given pools, or None if none fit."""
        return Branch(self.setting, self._fronts, placement, [], self.statistics).solve(allocation, np.inf)

    def _branch(self, placement: Placement) -> Branch:
        for roles in placement:
            if roles not in self._tables:
                self._tables[roles] = PoolTable(self.setting, self._fronts, roles)
        return Branch(
            self.setting,
            self._fronts,
            placement,
            [self._tables[roles] for roles in placement],
            self.statistics,
        )


def search(setting: Setting, *, every_placement: bool = False) -> SearchResult:
    """The fastest mapping of `setting`; see Search.run."""
    return Search(setting).run(every_placement=every_placement)
