"""reward.sandbox, for whatever runs programs inside a reward function."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum


class Sandbox(StrEnum):
    required = "required"
    """Programs run in the sandbox, or the run stops."""
    off = "off"
    """Programs run as the run's user, where the reward's options allow that too."""


_MODE = ContextVar("sandbox", default=Sandbox.required)


def sandbox_mode() -> Sandbox:
    """The setting under which this reward function is called; required outside of a run."""
    return _MODE.get()


@contextmanager
def use_sandbox(mode: Sandbox) -> Iterator[None]:
    """Rewards that are called inside follow `mode`."""
    token = _MODE.set(mode)
    try:
        yield
    finally:
        _MODE.reset(token)
