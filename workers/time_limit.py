"""limited(): ends a call in this process that takes too long, as a reward function with
runtime=local may.

In the main thread a signal interrupts the call where it stands, so that it runs where a breakpoint
works. In another thread, which no signal reaches, it runs in a thread of its own that is left to
itself. Native code that never returns to Python is not interrupted.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextvars import copy_context
from types import FrameType
from typing import TypeVar

Result = TypeVar("Result")


class OutOfTime(KeyboardInterrupt):
    """The call took too long. No Exception, which the function itself might catch; an interrupt, at
    which an event loop starts none of its other tasks."""


def limited(call: Callable[[], Result], timeout_s: float) -> Result:
    """call()'s result, or OutOfTime after `timeout_s`; while a debugger holds it there is no
    limit."""
    if threading.current_thread() is not threading.main_thread():
        return in_thread(call, timeout_s)
    debugged = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal debugged
        debugged = sys.gettrace() is not None
        if not debugged:
            raise OutOfTime

    started = time.monotonic()
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        result = call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    # A function with an alarm of its own has taken this one's place.
    if time.monotonic() - started > timeout_s and not debugged:
        raise OutOfTime
    return result


def in_thread(call: Callable[[], Result], timeout_s: float | None = None) -> Result:
    """call()'s result from a thread that does not keep the process alive, or OutOfTime."""
    future: Future[Result] = Future()
    context = copy_context()

    def work() -> None:
        try:
            future.set_result(context.run(call))
        except BaseException as error:  # raised where the result is waited for
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    if not wait([future], timeout_s).done:
        raise OutOfTime
    return future.result()
