"""Calling a user's methods, sync or async, from an episode: blocking ones in a thread, so that no
episode waits for another's."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from typing import Any

from workers.agents.outcome import text_of


def as_failure(error: BaseException) -> RuntimeError:
    """An error that would end more than the episode whose code raised it, as one that does not."""
    failure = RuntimeError(f"{type(error).__name__}: {text_of(error)}".removesuffix(": "))
    return failure.with_traceback(error.__traceback__)


class ThreadEach(ThreadPoolExecutor):
    """loop.set_default_executor(ThreadEach()): asyncio.to_thread has a thread for each call.

    asyncio's own has a few for all: in lockstep, agents that hold them would wait for others that
    wait for one. The threads keep no process from ending.
    """

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See Executor.submit."""
        future: Future[Any] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function(*args, **kwargs)
            except BaseException as error:  # the user's code, whose errors belong to the episode
                is_plain = isinstance(error, Exception) and not isinstance(error, StopIteration)
                future.set_exception(error if is_plain else as_failure(error))
            else:
                future.set_result(result)

        threading.Thread(target=run, name="agent", daemon=True).start()
        return future


class Caller:
    """call = Caller()
    await call(environment.reset, task)
    await call(environment.step, action)

    Functions that block run in one thread, which the first of them begins: a connection of sqlite3, a
    browser or a window belongs to the thread that opened it. Where that thread is busy, as after a
    time-out, the next one has a thread of its own. A function whose episode was given up goes on
    until it returns; it keeps no process from ending.
    """

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._has_begun, self._is_busy = False, False
        weakref.finalize(self, self._work.put, None)  # ends the thread

    async def __call__(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """The function's result."""
        if inspect.iscoroutinefunction(function):
            return await function(*args, **kwargs)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        is_own, process = not self._is_busy, os.getpid()

        def run() -> None:
            result, error = None, None
            try:
                result = function(*args, **kwargs)
            except BaseException as raised:  # the user's code, whose errors belong to the episode
                error = raised
            end_forked(process, error)
            if is_own:
                self._is_busy = False
            try:
                loop.call_soon_threadsafe(_deliver, future, result, error)
            except RuntimeError:
                return  # the loop has ended: nobody waits for it

        self._begin(partial(copy_context().run, run), is_own=is_own)
        result = await future
        if inspect.isawaitable(result):  # a plain function that returns a coroutine
            return await result
        return result

    def _begin(self, run: Callable[[], None], *, is_own: bool) -> None:
        if not is_own:
            _begin_thread(run)
            return
        self._is_busy = True
        if not self._has_begun:
            _begin_thread(partial(_run_all, self._work))
            self._has_begun = True
        self._work.put(run)


def _begin_thread(function: Callable[[], None]) -> None:
    threading.Thread(target=function, name="environment", daemon=True).start()


def _run_all(work: SimpleQueue[Callable[[], None] | None]) -> None:
    while (run := work.get()) is not None:
        run()
        del run  # it holds the Caller, whose end is this thread's


def end_forked(process: int, error: BaseException | None) -> None:
    """Ends a process that an episode's code forked off `process`, and in which that code has come
    to its end: it has no part in the episodes."""
    if os.getpid() == process:
        return
    status = 0 if error is None else 1
    if isinstance(error, SystemExit) and isinstance(error.code, int | None):
        status = error.code or 0
    os._exit(status)


def _deliver(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, StopIteration) or not isinstance(error, Exception):
        # No future may hold the first; SystemExit and its like would end the loop of all.
        future.set_exception(as_failure(error))
    else:
        future.set_exception(error)
