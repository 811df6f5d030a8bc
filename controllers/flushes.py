"""Flushes: what recovery's machine asks of the disk, and what became of it as events.

    flushes = Flushes(loop, inbox)
    flushes.under_way = state.flush         # after every decision
    flushes.begin(step)                     # is written in the background
    flushes.look()                          # puts Flushed or FlushFailed once that is known
    flushes.commit(step, number)            # puts Committed or FlushFailed

What the disk refuses ends no run: when it is tried again is the machine's to say.
"""

from __future__ import annotations

from collections import deque

from controllers.loop import Loop
from controllers.saving import SnapshotLost
from hybridflow.recovery import events as on
from hybridflow.recovery.events import Event
from hybridflow.recovery.state import FlushUnderWay


class Flushes:
    """See above."""

    def __init__(self, loop: Loop, inbox: deque[Event]) -> None:
        self.loop, self.saving = loop, loop.saving
        self._inbox = inbox
        self.under_way: FlushUnderWay | None = None

    def export(self, step: int) -> None:
        try:
            self.loop.export()
        except OSError as error:
            self._inbox.append(on.ExportFailed(step=step, cause=str(error)))

    def begin(self, step: int, *, without_roles: bool = False) -> None:
        """`without_roles`: from here, and whole when this returns; their processes may be busy."""
        try:
            if without_roles:
                self.saving.begin_flush_from_here(step)
            else:
                self.loop.begin_flush()
                self.look()
        except SnapshotLost as error:
            self.fail(str(error), lost=True)
        except OSError as error:
            self.fail(str(error))

    def look(self) -> None:
        flush = self.under_way
        if flush is None:
            return
        try:
            if self.saving.is_flushed():
                self._inbox.append(on.Flushed(step=flush.step, number=flush.number))
        except SnapshotLost as error:
            self.fail(str(error), lost=True)
        except OSError as error:
            self.fail(str(error))

    def fail(self, cause: str, *, lost: bool = False) -> None:
        """Gives up the flush under way."""
        flush = self.under_way
        assert flush is not None
        self.saving.give_up_flush()
        failed = on.FlushFailed(step=flush.step, number=flush.number, cause=cause, lost=lost)
        self._inbox.append(failed)

    def commit(self, step: int, number: int) -> None:
        try:
            commit = self.saving.commit()
        except OSError as error:
            self.fail(str(error))
        else:
            committed = on.Committed(step=step, number=number, without_model=not commit.has_model)
            # Before what came meanwhile: what is due next depends on whether a flush is under way.
            self._inbox.appendleft(committed)
