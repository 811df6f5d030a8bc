"""The results of a call besides batches: metrics and lists that fill in when they are read, so
that every call returns at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar, overload

from hybridflow.batch import Batch

T = TypeVar("T")
Part = Mapping[str, float] | Callable[[], Mapping[str, float]]


class Metrics(Mapping[str, float]):
    """Numbers by name. `a | b` joins two without waiting for either; reading waits.

    >>> metrics = critic.update_critic(batch) | actor.update_actor(batch)    # both under way
    >>> metrics["actor/loss"]                                                # waits
    """

    def __init__(
        self,
        values: Mapping[str, float] | None = None,
        *,
        sources: Sequence[Callable[[], Mapping[str, float]]] = (),
        rows: Batch | None = None,
    ) -> None:
        """rows: what the numbers describe, so that a run can show some of it."""
        self._parts: list[Part] = [dict(values or {}), *sources]
        """In the order in which they are laid over each other; a callable one is read when any
        is."""
        self.rows = rows

    def __or__(self, other: Mapping[str, float]) -> Metrics:
        """Both; of a name that is in both, the right one."""
        if isinstance(other, Metrics):
            return _joined([*self._parts, *other._parts], self.rows or other.rows)
        return _joined([*self._parts, dict(other)], self.rows)

    def __ror__(self, other: Mapping[str, float]) -> Metrics:
        return _joined([dict(other), *self._parts], self.rows)

    def renamed(self, old: str, new: str) -> Metrics:
        """The same numbers with another prefix, for two roles of one kind; does not wait."""

        def read() -> dict[str, float]:
            renamed = {}
            for name, value in self.items():
                if name.startswith(old):
                    name = new + name.removeprefix(old)
                renamed[name] = value
            return renamed

        return Metrics(sources=[read])

    def _read(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for number, part in enumerate(self._parts):
            if callable(part):
                part = self._parts[number] = part()  # read once, whichever of the others fails
            values.update(part)
        self._parts = [values]
        return values

    def __getitem__(self, name: str) -> float:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __repr__(self) -> str:
        under_way = sum(callable(part) for part in self._parts)
        return f"Metrics({under_way} under way)" if under_way else f"Metrics({self._read()})"


def prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    """prefixed("actor", {"loss": 0.5}) -> {"actor/loss": 0.5}"""
    return {f"{prefix}/{name}": value for name, value in values.items()}


def _joined(parts: Sequence[Part], rows: Batch | None) -> Metrics:
    joined = Metrics(rows=rows)
    joined._parts = list(parts)
    return joined


class Results(Sequence[T], Generic[T]):
    """The answers of a call that every rank answers, in rank order; reading waits."""

    def __init__(
        self, read: Callable[[], list[T]], arrived: Callable[[], bool] = lambda: True
    ) -> None:
        """`arrived`: whether reading would not wait."""
        self._source: Callable[[], list[T]] | None = read
        self._arrived = arrived
        self._list: list[T] = []

    def _read(self) -> list[T]:
        if self._source is not None:
            self._list, self._source = self._source(), None
        return self._list

    def arrived(self) -> bool:
        """Whether every rank has answered; does not wait."""
        return self._source is None or self._arrived()

    def wait(self) -> None:
        """Returns when every rank has answered."""
        self._read()

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: Any) -> Any:
        return self._read()[index]

    def __len__(self) -> int:
        return len(self._read())

    def __eq__(self, other: object) -> bool:
        return self._read() == (list(other) if isinstance(other, Sequence) else other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "Results(under way)" if self._source is not None else repr(self._list)
