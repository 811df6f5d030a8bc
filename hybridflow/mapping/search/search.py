"""Search: the fastest mapping (the paper's Algorithm 1), exact: what is skipped is proved to be no
better. Of roles with the same frozen weights in a pool (Setting.sharing) the common layout is a
greedy choice (Fronts).

Every set partition of the roles is a placement; each is bounded first and left as soon as its bound
loses. Pools may leave devices idle, so that every device count up to the cluster's is covered.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hybridflow.mapping.search.branch import TIE, Allocation, Branch, Solution, Statistics
from hybridflow.mapping.search.fronts import Fronts
from hybridflow.mapping.search.placements import Placement, placements
from hybridflow.mapping.search.setting import Setting
from hybridflow.mapping.search.tables import PoolTable


@dataclass(frozen=True, slots=True)
class PlacementResult:
    """A placement with its best solution, whose time is bound_s; or without a solution, when
    the placement takes at least `bound_s` (inf: it does not fit)."""

    placement: Placement
    solution: Solution | None
    bound_s: float


@dataclass(frozen=True, slots=True)
class SearchResult:
    """`best` is None if nothing fits; `placements` are sorted from best to worst."""

    best: Solution | None
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
        """The fastest mapping. With `every_placement` the fastest of each placement too;
        otherwise a placement is left when it loses."""
        branches: list[Branch] = []
        bounded = []
        for placement in placements(self.setting.roles):
            branch = self._branch(placement)
            bounded.append((branch.root_bound(), len(placement), len(branches)))
            branches.append(branch)
        self.statistics.placements = len(branches)
        best: Solution | None = None
        results = []
        for bound, _, number in sorted(bounded):
            limit, at_least = float("inf"), bound
            if best is not None and not every_placement:
                limit, at_least = best.step_s, max(bound, best.step_s)
            solution = None
            if bound < limit * (1 - TIE):
                solution = branches[number].best(limit)
            if solution is not None:
                at_least = solution.step_s
                if best is None or solution.step_s < best.step_s * (1 - TIE):
                    best = solution
            results.append(PlacementResult(branches[number].placement, solution, at_least))
        results.sort(
            key=lambda result: (result.solution is not best or best is None, result.bound_s)
        )
        return SearchResult(best, tuple(results), self.statistics)

    def best_of(self, placement: Placement) -> Solution | None:
        """The fastest solution of a placement, or None if it does not fit."""
        return self._branch(placement).best(float("inf"))

    def best_for(self, placement: Placement, allocation: Allocation) -> Solution | None:
        """The fastest layouts for pools of these sizes, or None if none fit."""
        branch = Branch(self.setting, self._fronts, placement, [], self.statistics)
        return branch.solve(allocation, float("inf"))

    def _branch(self, placement: Placement) -> Branch:
        tables = []
        for roles in placement:
            if roles not in self._tables:
                self._tables[roles] = PoolTable(self.setting, self._fronts, roles)
            tables.append(self._tables[roles])
        return Branch(self.setting, self._fronts, placement, tables, self.statistics)


def search(setting: Setting, *, every_placement: bool = False) -> SearchResult:
    """The fastest mapping of `setting`; see Search.run."""
    return Search(setting).run(every_placement=every_placement)
