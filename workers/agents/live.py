"""LiveEpisodes: episodes that run elsewhere, as the thread that draws sees them: which are live, what
they ask for, and how they ended."""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from workers.agents.model import Drawn, Request, Segments
from workers.agents.outcome import Failure, Outcome

Task = dict[str, Any]
"""The row of data that an episode is about: its columns, and `prompt` where it has one."""
LOOK_S = 1.0


@dataclass(kw_only=True)
class Finished:
    """An episode that came to its end, or that failed every time."""

    segments: Segments
    """Those of its last attempt."""
    outcome: Outcome | None
    """None where it failed."""
    failures: list[Failure] = field(default_factory=list)
    """Why each failed attempt failed."""
    laps: list[float] = field(default_factory=list)
    """Seconds of the last attempt outside of replies: before each reply, and after the last one."""


@dataclass(eq=False, slots=True)
class PendingRequest:
    """A request that an episode waits with."""

    request: Request
    number: int
    """No two requests of the same LiveEpisodes have the same."""
    is_gone: bool = False
    """Whether the episode no longer waits for its answer."""


class LiveEpisodes(ABC):
    """episodes.start({0: task, 1: other})
    while episodes.num_live:
        episodes.wait(share=1.0)
        for pending in episodes.requests():
            episodes.answer([(pending, drawn)])
    finished = episodes.finished()          # {0: Finished, 1: Finished}
    episodes.close()
    """

    def __init__(self, *, look: Callable[[], None] | None = None, look_s: float = LOOK_S) -> None:
        """`look`: raises where the episodes don't go on; a thread that waits calls it every look_s."""
        self._look, self._look_s = look, look_s
        self._changed = threading.Condition()
        """Guards what follows, which several threads read and write."""
        self._live: set[int] = set()
        self._pending: dict[int, PendingRequest] = {}
        self._finished: dict[int, Finished] = {}
        self._error: Exception | None = None

    @abstractmethod
    def start(self, tasks: Mapping[int, Task]) -> None:
        """Starts an episode for every row."""

    @abstractmethod
    def answer(self, answers: Sequence[tuple[PendingRequest, Drawn]]) -> None:
        """The replies to requests; one that the episode no longer waits for is dropped."""

    @abstractmethod
    def close(self) -> None:
        """Cancels what is live, and returns when it has closed what it had open."""

    @property
    def num_live(self) -> int:
        """Episodes that have not come to their end."""
        return len(self._live)

    @property
    def num_pending(self) -> int:
        """Requests that nobody has taken."""
        return len(self._pending)

    def wait(self, share: float, timeout_s: float | None = None) -> bool:
        """Returns True when at least that share of the live episodes wait for a reply that was not
        asked for yet, at least one of them, or none is live; False after `timeout_s`. Raises a
        mistake of the environment's code, such as blocking the loop that all episodes share."""

        def is_due() -> bool:
            least = max(1, math.ceil(share * len(self._live)))
            return not self._live or len(self._pending) >= least

        return self._wait_for(is_due, timeout_s)

    def wait_for_news(self, timeout_s: float) -> bool:
        """The same until there is a request that nobody has taken, or an end."""
        return self._wait_for(lambda: bool(self._pending or self._finished), timeout_s)

    def requests(self) -> list[PendingRequest]:
        """The requests that nobody has taken, in the order of their rows."""
        with self._changed:
            pending, self._pending = self._pending, {}
            return [pending[row] for row in sorted(pending)]

    def finished(self) -> dict[int, Finished]:
        """The episodes that came to their end since the last call, by their rows."""
        with self._changed:
            finished, self._finished = self._finished, {}
            return dict(sorted(finished.items()))

    def _wait_for(self, is_due: Callable[[], bool], timeout_s: float | None) -> bool:
        until = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            if self._look is not None:
                self._look()
            left = max(0.0, min(until - time.monotonic(), self._look_s))
            with self._changed:
                due = self._changed.wait_for(lambda: self._error is not None or is_due(), left)
                if self._error is not None:
                    raise self._error
                if due or time.monotonic() >= until:
                    return due

    def _take(self, pending: PendingRequest) -> None:
        """A row has a request."""
        with self._changed:
            self._pending[pending.request.row] = pending
            self._changed.notify_all()

    def _forget(self, pending: PendingRequest) -> None:
        """Nobody waits for the request any more."""
        with self._changed:
            pending.is_gone = True
            if self._pending.get(pending.request.row) is pending:
                del self._pending[pending.request.row]

    def _end(self, row: int, finished: Finished) -> None:
        """A row has come to its end."""
        with self._changed:
            self._live.remove(row)
            self._finished[row] = finished
            self._changed.notify_all()

    def _fail(self, error: Exception) -> None:
        """The first error is raised by whoever waits."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
