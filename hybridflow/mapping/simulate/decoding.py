"""DecodeProfile: how many sequences run during how many decode steps, under continuous batching.

It depends on lengths and counts only, not on the model or machine; so all layouts with the same
counts share a profile. A finished sequence is replaced by a waiting one at once (Yu et al. 2022,
Orca's iteration-level scheduling); when none waits, the tail of long ones runs in an emptying
batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from heapq import heapify, heapreplace

from hybridflow.mapping.question.workload import Lengths

MAX_SEGMENTS = 24


@dataclass(frozen=True, slots=True)
class Segment:
    """`steps` decode steps in which `running` sequences have generated `generated` tokens each, on
    average."""

    steps: float
    running: float
    generated: float


@lru_cache(maxsize=65536)
def decode_profile(lengths: Lengths, rows: int, max_running: int) -> tuple[Segment, ...]:
    """The profile of a replica that generates `rows` responses, at most `max_running` at once.

    decode_profile(Lengths.fixed(10), rows=5, max_running=2) -> (Segment(20, 2, 5.0), Segment(10, 1, 5.0))
    """
    if len(lengths.quantiles) == 1:
        return _fixed(lengths.longest, rows, max_running)
    return condense(_simulate(lengths.sample(rows), max_running))


def _fixed(length: int, rows: int, max_running: int) -> tuple[Segment, ...]:
    full, rest = divmod(rows, max_running)
    segments = []
    if full:
        segments.append(Segment(length * full, max_running, length / 2))
    if rest:
        segments.append(Segment(length, rest, length / 2))
    return tuple(segments)


def _simulate(lengths: list[int], max_running: int) -> list[Segment]:
    """Goes from event to event: the next sequence finishes, and a waiting one takes its place."""
    lengths = [max(1, length) for length in lengths]
    running = [(length, 0) for length in lengths[:max_running]]
    heapify(running)
    started = 0.0
    segments: list[Segment] = []
    now = 0
    for length in lengths[max_running:]:
        finish, start = running[0]
        extend(segments, now, finish, len(running), started)
        now = finish
        heapreplace(running, (now + length, now))
        started += now - start
    ordered = sorted(running)
    for index, (finish, start) in enumerate(ordered):
        extend(segments, now, finish, len(ordered) - index, started)
        now = finish
        started -= start
    return segments


def extend(segments: list[Segment], now: float, until: float, running: int, started: float) -> None:
    """Adds a segment from `now` to `until`; `started` is the sum of the running sequences'
    first steps."""
    if until > now:
        segments.append(Segment(until - now, running, (now + until) / 2 - started / running))


def condense(segments: list[Segment]) -> tuple[Segment, ...]:
    """Merges neighbours by their step-weighted means, down to about MAX_SEGMENTS."""
    total = sum(segment.steps for segment in segments)
    result: list[Segment] = []
    bunch: list[Segment] = []
    steps = 0.0
    for segment in segments:
        bunch.append(segment)
        steps += segment.steps
        if steps * MAX_SEGMENTS >= total:
            result.append(_merge(bunch))
            bunch, steps = [], 0.0
    if bunch:
        result.append(_merge(bunch))
    return tuple(result)


def _merge(bunch: list[Segment]) -> Segment:
    steps = tokens = generated = 0.0
    for part in bunch:
        steps += part.steps
        tokens += part.steps * part.running
        generated += part.steps * part.running * part.generated
    return Segment(steps, tokens / steps, generated / tokens)
