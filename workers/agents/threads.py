"""Calling a user's method, sync or async, from an episode: blocking ones in a thread of their own,
so that no episode waits for another's."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any


def as_failure(error: BaseException) -> RuntimeError:
    """An error that would end more than the episode whose code raised it, as one that does not."""
    failure = RuntimeError(f"{type(error).__name__}: {error}".removesuffix(": "))
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


async def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The function's result. A thread whose episode was given up goes on until its function
    returns; it keeps no process from ending."""
    if inspect.iscoroutinefunction(function):
        return await function(*args, **kwargs)
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def deliver(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        elif isinstance(error, StopIteration) or not isinstance(error, Exception):
            # No future may hold the first; SystemExit and its like would end the loop of all.
            future.set_exception(as_failure(error))
        else:
            future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = function(*args, **kwargs)
        except BaseException as raised:  # the user's code, whose errors belong to the episode
            error = raised
        try:
            loop.call_soon_threadsafe(deliver, result, error)
        except RuntimeError:
            return  # the loop has ended: nobody waits for it

    context = copy_context()
    threading.Thread(target=context.run, args=(run,), name="environment", daemon=True).start()
    result = await future
    if inspect.isawaitable(result):  # a plain function that returns a coroutine
        return await result
    return result
