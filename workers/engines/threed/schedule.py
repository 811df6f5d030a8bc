"""Pipeline timetables: which forward or backward every pipeline rank runs at every tick, computed
before anything runs.

1F1B (Narayanan et al. 2019) and interleaved 1F1B (Narayanan et al. 2021): with s virtual stages a
rank has s slices of the model, and the idle share falls from (p - 1) / m to (p - 1) / (s m). Any
number of micro-batches works, also for the interleaved order.

A tick counts one forward or backward as one unit. The real times differ, and ranks do not wait for
ticks: the ticks only fix an order of messages that both ends of every message know and that cannot
deadlock (a message of tick t depends on earlier ticks only). Left out: zero-bubble schedules, which
split the backward pass in two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import chain


@dataclass(frozen=True, slots=True)
class Action:
    """The forward or backward pass of micro-batch `micro_batch` through stage `stage`; stage k
    lives on pipeline rank k % p."""

    stage: int
    micro_batch: int
    backward: bool = False


Tick = tuple[Action | None, ...]
"""The action of each pipeline rank; None: it waits."""


@lru_cache(maxsize=64)
def timetable(
    num_ranks: int, num_stages: int, num_micro_batches: int, train: bool
) -> tuple[Tick, ...]:
    """All ticks of one step; without `train` the forward passes only.

    timetable(2, 2, 2, True) is, written stage.micro_batch and b for backward,
        rank 0:  0.0  0.1        0.0b       0.1b
        rank 1:       1.0  1.0b  1.1  1.1b
    """
    queues = []
    for rank in range(num_ranks):
        queues.append(_order(rank, num_ranks, num_stages, num_micro_batches, train))
    done: set[Action] = set()
    ticks: list[Tick] = []
    while any(queues):
        tick = tuple(_ready_first(queue, done, num_stages) for queue in queues)
        if not any(tick):
            # The interleaved order of an incomplete last group of micro-batches can wait in a
            # circle: forward passes go first then.
            tick = tuple(_ready_forward(queue, done, num_stages) for queue in queues)
        assert any(tick), (
            f"pipeline order of {num_ranks} ranks, {num_stages} stages, {num_micro_batches} "
            "micro-batches is stuck"
        )
        for queue, action in zip(queues, tick, strict=True):
            if action is not None:
                queue.remove(action)
                done.add(action)
        ticks.append(tick)
    return tuple(ticks)


def _ready_forward(queue: list[Action], done: set[Action], num_stages: int) -> Action | None:
    for action in queue:
        if not action.backward and _needs(action, num_stages) <= done:
            return action
    return None


def peak_in_flight(ticks: tuple[Tick, ...], rank: int) -> int:
    """Most forward passes of `rank` whose backward pass is still to come: what its activations
    cost."""
    alive = peak = 0
    for tick in ticks:
        action = tick[rank]
        if action is not None:
            alive += -1 if action.backward else 1
            peak = max(peak, alive)
    return peak


def _needs(action: Action, num_stages: int) -> set[Action]:
    if not action.backward:
        return {Action(action.stage - 1, action.micro_batch)} if action.stage else set()
    if action.stage == num_stages - 1:
        return {Action(action.stage, action.micro_batch)}
    return {
        Action(action.stage, action.micro_batch),
        Action(action.stage + 1, action.micro_batch, True),
    }


def _ready_first(queue: list[Action], done: set[Action], num_stages: int) -> Action | None:
    """The first action of the queue, if what it needs is done."""
    if queue and _needs(queue[0], num_stages) <= done:
        return queue[0]
    return None


def _order(
    rank: int, num_ranks: int, num_stages: int, num_micro_batches: int, train: bool
) -> list[Action]:
    """The actions of one rank, in its order."""
    chunks = range(num_stages // num_ranks)
    forwards, backwards = [], []
    for start in range(0, num_micro_batches, num_ranks):
        group = range(start, min(start + num_ranks, num_micro_batches))
        for chunk in chunks:
            forwards += [Action(chunk * num_ranks + rank, m) for m in group]
        for chunk in reversed(chunks):
            backwards += [Action(chunk * num_ranks + rank, m, True) for m in group]
    if not train:
        return forwards
    warm_up = min(len(forwards), _warm_up(rank, num_ranks, len(chunks)))
    steady = len(forwards) - warm_up
    pairs = list(chain.from_iterable(zip(forwards[warm_up:], backwards[:steady], strict=True)))
    return forwards[:warm_up] + pairs + backwards[steady:]


def _warm_up(rank: int, num_ranks: int, num_chunks: int) -> int:
    """Forward passes before the first backward pass."""
    if num_chunks == 1:
        return num_ranks - rank - 1
    return 2 * (num_ranks - rank - 1) + (num_chunks - 1) * num_ranks
