"""Scores: which hosts compute more slowly than the others, or than they once did.

    scores = Scores()
    scores.add({("policy", 0): 0.011, ("policy", 1): 0.024}, now)       # seconds of one probe each
    scores.score("policy", 1)                                           # 0.46

A score is between 0 and 1: the others' median time, or the host's own best one, by its present time
(relative and individual score of NVIDIA's nvidia-resiliency-ext, which takes the best of the others).
Times are medians of the last looks, so a single slow look is none. What a host is slow with, a
collective, a disk, the network, is left out: this is its own arithmetic and memory.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

THRESHOLD = 0.7
"""A host under it is a straggler."""
WINDOW = 5
"""Looks whose median counts as the present time."""
PATIENCE = 6
"""Looks in a row, each of them under the threshold, before a host is named."""
HostName = tuple[str, int]
"""Pool and rank."""


@dataclass(slots=True)
class History:
    """One host's looks."""

    latest: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    best: float = math.inf
    """The smallest median of a full window."""
    num_slow: int = 0
    """Looks in a row under the threshold."""
    is_named: bool = False

    @property
    def seconds(self) -> float:
        return median(self.latest)


@dataclass(frozen=True, slots=True)
class Straggler:
    """A host that has become one."""

    host: HostName
    relative: float
    individual: float


class Scores:
    """See above."""

    def __init__(self) -> None:
        self._hosts: dict[HostName, History] = {}

    def add(self, seconds: Mapping[HostName, float]) -> list[Straggler]:
        """Takes one look at all hosts, and leaves out NaN; returns those that are named with it."""
        measured = {host: duration for host, duration in seconds.items() if duration == duration}
        for host, duration in measured.items():
            history = self._hosts.setdefault(host, History())
            history.latest.append(duration)
            if len(history.latest) == WINDOW:
                history.best = min(history.best, history.seconds)
        named = []
        for host, duration in measured.items():
            history = self._hosts[host]
            # Each look by itself: on a busy machine a median is slow by chance sooner or later.
            others = self._others(host)
            is_slow = (others if others < math.inf else history.best) < THRESHOLD * duration
            history.num_slow = history.num_slow + 1 if is_slow else 0
            if self.score(*host) >= THRESHOLD:
                history.is_named = False
            elif history.num_slow >= PATIENCE and not history.is_named:
                history.is_named = True
                named.append(Straggler(host, self.relative(*host), self.individual(*host)))
        return named

    def forget(self, host: HostName) -> None:
        """Its process is another one now, perhaps on another node."""
        self._hosts.pop(host, None)

    def relative(self, pool: str, rank: int) -> float:
        """The median time of the other hosts by its own, at most 1; 1 without others."""
        history = self._hosts.get((pool, rank))
        if history is None or not history.latest:
            return 1.0
        return min(1.0, self._others((pool, rank)) / history.seconds)

    def individual(self, pool: str, rank: int) -> float:
        """Its best time by its present one, at most 1."""
        history = self._hosts.get((pool, rank))
        if history is None or len(history.latest) < WINDOW:
            return 1.0
        return min(1.0, history.best / history.seconds)

    def score(self, pool: str, rank: int) -> float:
        """The one that decides: the relative one, the individual one without others. If all hosts are
        slower than they were, none of them is the cause."""
        if self._others((pool, rank)) < math.inf:
            return self.relative(pool, rank)
        return self.individual(pool, rank)

    def _others(self, host: HostName) -> float:
        """The median of the other hosts' times; infinite without others."""
        times = []
        for other, history in self._hosts.items():
            if other != host and history.latest:
                times.append(history.seconds)
        return median(times) if times else math.inf
