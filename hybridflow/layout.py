"""Layout: named axes over the ranks of a pool; every rank's coordinates and every axis' groups.

A layout has sizes and an order only. Workers build process groups and device meshes from it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

AXES = ("dp", "pp", "cp", "tp")
"""The known axes in the paper's rank order (docs/paper.md section 3): data outermost, tensor
innermost."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the axes, outermost first; rank = mixed-radix number of the coordinates.

        >>> layout = Layout.of(dp=2, pp=1, tp=4)
        >>> layout.size, layout.coordinates(5)
        (8, {'dp': 1, 'pp': 0, 'cp': 0, 'tp': 1})
        >>> layout.groups("tp")
        [(0, 1, 2, 3), (4, 5, 6, 7)]

    The order is a parameter: `order=("pp", "dp", "cp", "tp")` is Megatron's default.
    """

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"layout: axis named twice in {list(self.names)}; name each axis once")
        for name, size in self.axes:
            if size < 1:
                raise ValueError(
                    f"layout: axis {name!r} has size {size}; every size must be at least 1"
                )

    @classmethod
    def of(cls, *, order: tuple[str, ...] = AXES, **sizes: int) -> Layout:
        """A layout over `order`, axes that are not named having size 1."""
        unknown = sorted(set(sizes) - set(order))
        if unknown:
            raise ValueError(f"layout: unknown axes {unknown}; known: {', '.join(order)}")
        return cls(tuple((name, sizes.get(name, 1)) for name in order))

    @property
    def size(self) -> int:
        """The number of ranks: the product of the axes' sizes."""
        return prod(size for _, size in self.axes)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the axes, outermost first."""
        return tuple(name for name, _ in self.axes)

    def axis_size(self, axis: str) -> int:
        """Size of `axis`; an axis that the layout does not have is an axis of size 1."""
        return dict(self.axes).get(axis, 1)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Coordinates of `rank` along every axis."""
        if not 0 <= rank < self.size:
            raise ValueError(f"layout: rank {rank} is outside 0..{self.size - 1} of {self}")
        result: dict[str, int] = {}
        for name, size in reversed(self.axes):
            rank, result[name] = divmod(rank, size)
        return dict(reversed(result.items()))

    def rank(self, **coordinates: int) -> int:
        """The rank at `coordinates`; axes that are not named count as 0."""
        rank = 0
        for name, size in self.axes:
            coordinate = coordinates.get(name, 0)
            if not 0 <= coordinate < size:
                raise ValueError(f"layout: {name}={coordinate} is outside 0..{size - 1} of {self}")
            rank = rank * size + coordinate
        return rank

    def groups(self, *axes: str) -> list[tuple[int, ...]]:
        """All groups of ranks that differ along `axes` only, in rank order."""
        groups = []
        for outer in self._points(set(self.names) - set(axes)):
            groups.append(tuple(self.rank(**outer, **inner) for inner in self._points(axes)))
        return groups

    def group(self, rank: int, *axes: str) -> tuple[int, ...]:
        """The group of `groups(*axes)` that holds `rank`."""
        here = self.coordinates(rank)
        return tuple(self.rank(**{**here, **inner}) for inner in self._points(axes))

    def torn(self, axis: str, nodes: Sequence[str]) -> tuple[int, ...]:
        """The first group along `axis` whose ranks are on more nodes than they need: `nodes` is
        the node of every rank, and a group needs one where some node has that many ranks. Empty
        where there is none.

            >>> Layout.of(dp=2, tp=4).torn("tp", ["a"] * 5 + ["b"] * 3)
            (4, 5, 6, 7)
        """
        most = max(map(nodes.count, nodes))
        for group in self.groups(axis):
            if len(group) <= most and len({nodes[rank] for rank in group}) > 1:
                return group
        return ()

    def __str__(self) -> str:
        return " x ".join(f"{name}{size}" for name, size in self.axes if size > 1) or "1 device"

    def _points(self, axes: Collection[str]) -> Iterator[dict[str, int]]:
        """All coordinates along `axes`, in rank order."""
        names, ranges = [], []
        for name, size in self.axes:
            if name in axes:
                names.append(name)
                ranges.append(range(size))
        for point in product(*ranges):
            yield dict(zip(names, point, strict=True))
