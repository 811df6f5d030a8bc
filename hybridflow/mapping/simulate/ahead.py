"""Generation that runs ahead of training: how many sequences decode, and for how many decode steps,
in a step of a run that has been going on for a while.

The scheduling is that of a run (docs/asynchronous.md): a step takes the first finished groups within
a window that begins at the oldest group that no step took, and as many start in their place. Left
out: the time that training takes, which a schedule compares with this.
"""

from __future__ import annotations

import random
from collections import deque
from functools import lru_cache
from heapq import heappop, heappush

from hybridflow.mapping.question.workload import Asynchrony, Lengths, Workload
from hybridflow.mapping.simulate.decoding import Segment, condense, extend

MOST_ROWS = 256
"""Rows of a step that are simulated; larger steps are taken in proportion."""
MEASURED_STEPS = 8


def continuous_profile(workload: Workload, replicas: int, max_running: int) -> tuple[Segment, ...]:
    """The segments of one training step, `running` on a replica; `workload.asynchrony` must be
    there."""
    assert workload.asynchrony is not None
    samples = workload.samples_per_prompt
    groups = max(1, min(workload.batch_size, MOST_ROWS // samples))
    share = groups / workload.batch_size
    most = max(1, round(max_running * replicas * share))
    most = min(most, groups * samples * (workload.asynchrony.staleness + 1))
    profile = _profile(workload.response, groups, samples, most, workload.asynchrony)
    segments = []
    for part in profile:
        running = max(1.0, part.running / share / replicas)
        segments.append(Segment(part.steps, running, part.generated))
    return tuple(segments)


@lru_cache(maxsize=4096)
def _profile(
    lengths: Lengths, groups: int, samples: int, most: int, asynchrony: Asynchrony
) -> tuple[Segment, ...]:
    """The same with at most `most` running sequences in all, `groups` to a step."""
    generation = _Generation(lengths, groups, samples, most, asynchrony)
    for _ in range(2 * (asynchrony.staleness + 1)):  # the beginning is not typical
        generation.step()
    segments: list[Segment] = []
    for _ in range(MEASURED_STEPS):
        segments += generation.step()
    parts = []
    for part in condense(segments):
        parts.append(Segment(part.steps / MEASURED_STEPS, part.running, part.generated))
    return tuple(parts)


class _Generation:
    """A generator whose groups are taken as soon as the window lets them."""

    def __init__(
        self, lengths: Lengths, groups: int, samples: int, most: int, asynchrony: Asynchrony
    ) -> None:
        self._quantiles, self._random = lengths.quantiles, random.Random(0)
        self._groups, self._samples, self._most = groups, samples, most
        active = (asynchrony.staleness + 1) * groups
        self._width = max(1, int(asynchrony.look_ahead * active))
        self._left: dict[int, int] = {}
        """Group that no step has taken, in order -> its rows that have not finished."""
        self._number = 0
        self._queue: deque[tuple[int, int]] = deque()
        """(group, length) of rows that wait for a place."""
        self._running: list[tuple[int, int, int]] = []
        """(end, group, start) of rows, by their end."""
        self._started = 0
        """The sum of the running rows' starts."""
        self._now = 0
        self._start(active)

    def _start(self, groups: int) -> None:
        for number in range(self._number, self._number + groups):
            self._left[number] = self._samples
            for length in self._random.choices(self._quantiles, k=self._samples):
                self._queue.append((number, max(1, length)))
        self._number += groups

    def step(self) -> list[Segment]:
        """Decodes until the groups of a step are there and takes them; the segments until then."""
        segments: list[Segment] = []
        taken = 0
        while True:
            number = self._next()
            if number is not None:
                del self._left[number]
                taken += 1
                if taken == self._groups:
                    self._start(self._groups)
                    return segments
                continue
            self._decode(segments)

    def _decode(self, segments: list[Segment]) -> None:
        """Fills free places and decodes until the next row ends."""
        while self._queue and len(self._running) < self._most:
            group, length = self._queue.popleft()
            heappush(self._running, (self._now + length, group, self._now))
            self._started += self._now
        end, group, start = self._running[0]
        extend(segments, self._now, end, len(self._running), self._started)
        heappop(self._running)
        self._now = end
        self._started -= start
        self._left[group] -= 1

    def _next(self) -> int | None:
        """The oldest finished group inside the window."""
        oldest = next(iter(self._left))
        for number, rows in self._left.items():
            if number >= oldest + self._width:
                return None
            if not rows:
                return number
        return None
