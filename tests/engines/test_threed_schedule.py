"""Timetables of engine `threed`: every pass once, in an order that can run, with the idle time
and the memory that the papers promise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.engines.threed.schedule import Action, peak_in_flight, timetable

SIZES = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(0, 20))


@given(SIZES, st.booleans())
def test_every_pass_runs_once_after_what_it_needs(sizes: tuple[int, int, int], train: bool) -> None:
    ranks, chunks, micro_batches = sizes
    stages = ranks * chunks
    done: set[Action] = set()
    for tick in timetable(ranks, stages, micro_batches, train):
        running = [action for action in tick if action is not None]
        assert running, "a tick in which nobody works"
        for rank, action in enumerate(tick):
            if action is None:
                continue
            assert action.stage % ranks == rank and action not in done
            before = action.stage + (1 if action.backward else -1)
            if action.backward:
                assert Action(action.stage, action.micro_batch) in done
            if 0 <= before < stages:
                assert Action(before, action.micro_batch, action.backward) in done
        done.update(running)
    passes = [False, True] if train else [False]
    assert done == {
        Action(stage, index, backward)
        for stage in range(stages)
        for index in range(micro_batches)
        for backward in passes
    }


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_idle_time_is_the_papers(ranks: int, chunks: int) -> None:
    micro_batches = 4 * ranks
    ticks = timetable(ranks, ranks * chunks, micro_batches, True)
    work = 2 * chunks * micro_batches
    # Bubble (p - 1) / (s m) of the work: Narayanan et al. 2021, section 2.2.
    assert len(ticks) == work + 2 * (ranks - 1)


@pytest.mark.parametrize("micro_batches", [4, 32])
def test_1f1b_keeps_at_most_p_micro_batches_alive(micro_batches: int) -> None:
    ticks = timetable(4, 4, micro_batches, True)
    assert [peak_in_flight(ticks, rank) for rank in range(4)] == [4, 3, 2, 1]


def test_docstring_example() -> None:
    ticks = timetable(2, 2, 2, True)
    shown = [
        "".join(
            f"{a.stage}.{a.micro_batch}{'b' if a.backward else ''}".ljust(6) if a else " " * 6
            for a in row
        ).rstrip()
        for row in zip(*ticks, strict=True)
    ]
    assert shown == ["0.0   0.1         0.0b        0.1b", "      1.0   1.0b  1.1   1.1b"]
