"""LoopThread: the asyncio loop that episodes share, in a thread of its own. No code of an episode ends
it, and what their tasks leave behind is over when it closes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from workers.agents.threads import ThreadEach

CLOSE_S = 10.0
"""Most seconds that cancelled episodes have to close what they had open."""


class LoopThread:
    """thread = LoopThread()
    thread.loop.call_soon_threadsafe(...)
    thread.close(running)
    """

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(ThreadEach())
        self._is_closing = False
        self.thread = threading.Thread(target=self._run, name="episodes", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self._is_closing:
            # Of a task that somebody awaits, sys.exit is that episode's failure; here, and with
            # loop.stop() in an episode's code, it would end all of them.
            with suppress(SystemExit, KeyboardInterrupt):
                self.loop.run_forever()

    def close(self, running: Mapping[int, asyncio.Task[Any]]) -> None:
        """Cancels these tasks, then all others, and ends when they have."""
        asyncio.run_coroutine_threadsafe(_cancel(running), self.loop).result()
        self._is_closing = True
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


async def _cancel(running: Mapping[int, asyncio.Task[Any]]) -> None:
    """These first: they close what they have open, with the help of further tasks."""
    attempts = list(running.values())
    if attempts:
        for attempt in attempts:
            attempt.cancel()
        await asyncio.wait(attempts, timeout=CLOSE_S)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    if left:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=CLOSE_S)
