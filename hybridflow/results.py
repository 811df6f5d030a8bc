"""What a call returns besides batches: metrics and lists that fill in when they are read, so that every call
returns at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar, overload

from hybridflow.batch import Batch

T = TypeVar("T")


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
        self._values: dict[str, float] = dict(values or {})
        self._sources = list(sources)
        self.rows = rows

    def __or__(self, other: Mapping[str, float]) -> Metrics:
        if isinstance(other, Metrics):
            return Metrics(
                {**self._values, **other._values},
                sources=[*self._sources, *other._sources],
                rows=self.rows or other.rows,
            )
        return Metrics({**self._values, **other}, sources=self._sources, rows=self.rows)

    def renamed(self, old: str, new: str) -> Metrics:
        """The same numbers with another prefix, for two roles of one kind; does not wait."""
        return Metrics(
            sources=[
                lambda: {
                    new + name.removeprefix(old) if name.startswith(old) else name: v
                    for name, v in self.items()
                }
            ]
        )

    def _read(self) -> dict[str, float]:
        while self._sources:
            self._values.update(self._sources[0]())
            del self._sources[0]
        return self._values

    def __getitem__(self, name: str) -> float:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __repr__(self) -> str:
        return f"Metrics({len(self._sources)} under way)" if self._sources else f"Metrics({self._values})"


class Results(Sequence[T], Generic[T]):
    """The list that a call collected from its ranks; reading waits."""

    def __init__(self, read: Callable[[], list[T]]) -> None:
        self._source: Callable[[], list[T]] | None = read
        self._list: list[T] = []

    def _read(self) -> list[T]:
        if self._source is not None:
            self._list, self._source = self._source(), None
        return self._list

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
